# about: a Linux guest's balloon: down to half and back, statistics, stress in a ballooned guest, forks meanwhile
# needs: linux
# runs: 6.12/6.12
# timeout: 900
. /lab/lib.sh

# figure NAME KEY: of one VM; of the server in total.
figure() { offshoot stats "$1" --json | json "$2"; }
total() { offshoot stats --json | json "$1"; }
# anonymous NAME: the host's own count, in KiB.
anonymous() { awk '/^RssAnon:/ { print $2 }' "/proc/$(figure "$1" pid)/status"; }

on_one_processor
boot a -m 256M
memory=$(figure a total_memory)
at_most "it tells how much memory it has" $((256 << 20)) "$memory"
at_most "and how much of that is free" "$memory" "$(figure a free_memory_bytes)"
at_most "just now (ms)" 2000 "$(figure a age_ms)"
expect "and the rest" '"(major|minor)_faults": [0-9]+' offshoot stats a --json
before=$(figure a free_memory_bytes)
told "it takes 64 MiB" a 'head -c 67108864 /dev/urandom >/tmp/x; echo taken' '(?m)^taken' 60
at_most "which are not free any more" $((before - (60 << 20))) "$(figure a free_memory_bytes)"
told "and gives them back" a 'rm /tmp/x; echo gone' '(?m)^gone'

check "down to half" offshoot balloon a 128M --timeout 120
same "the balloon holds the other half" $((128 << 20)) "$(figure a balloon_bytes)"
at_most "the host sees no more than half in use (KiB)" $((128 * 1024 + 8192)) "$(anonymous a)"
at_most "the guest has less free" $((memory - (128 << 20))) "$(figure a free_memory_bytes)"
# The shell's prompt may be on the line that an answer begins on.
run='(stress-ng --vm 1 --vm-bytes 24M --vm-method all --verify --timeout 12s </dev/null; s=$?; echo; echo stress=$s)'
offshoot send a "$run &" --expect 'dispatching|lab#' --timeout 30 >/dev/null
sleep 3
children=$(fork a 2) && pass "forks under stress, ballooned" || fail "forks under stress, ballooned"
first=${children%%
*}
grandchild=$(fork "$first" 1 --name g) && pass "a fork of a clone" || fail "a fork of a clone"
# A guest that runs out of memory takes a little out by itself.
for vm in $children $grandchild; do at_most "$vm has its parent's balloon: 120 MiB, of" "$(figure $vm balloon_bytes)" $((120 << 20)); done
for vm in a $children $grandchild; do
  check "$vm ends its run" wait_log "$vm" '^stress=' 180
  expect "$vm found no wrong byte" '^stress=0' console "$vm"
  at_most "$vm tells of itself (ms)" 3000 "$(figure "$vm" age_ms)"
done
expect "check finds nothing broken" ' 0 broken' offshoot check

# Back and down again, on both sides of a fork taken in between.
offshoot balloon a 256M --timeout 0.05 >/dev/null 2>&1
late=$(fork a 1 --name l)
check "all of it again" offshoot balloon a 256M --timeout 120
check "so for the fork taken meanwhile" offshoot balloon "$late" 256M --timeout 120
same "nothing is left in the balloon" 0 "$(figure a balloon_bytes)"
check "a clone of a clone as well" offshoot balloon "$grandchild" 200M --timeout 120
told "it can use what it has again" a 'head -c 100000000 /dev/zero >/tmp/y && wc -c </tmp/y; rm /tmp/y' '(?m)^(lab# )?100000000' 180
refuse "more than it has" 2 offshoot balloon a 300M
for vm in a $children $grandchild $late; do
  untroubled "$vm"
done
expect "check finds nothing broken" ' 0 broken' offshoot check
offshoot rm a $children $grandchild $late

# Free pages at a fork. What has just been freed has not been reported yet. Debian's kernels clear what they allocate, and so
# the pages that they tell of: that takes its time here.
boot b -m 192M
check "a first fork, which takes all there is" offshoot fork b --name first --wait-settled
run='head -c 64000000 /dev/zero >/tmp/x; rm /tmp/x; echo freed'
told "it uses and frees 60 MiB" b "$run" '(?m)^freed' 120
plain=$(offshoot fork b --name plain --wait-settled --json | json moved_pages)
told "and once more" b "$run" '(?m)^freed' 120
hinted=$(offshoot fork b --name hinted --hint-free=10000 --wait-settled --json)
note "moved: $plain pages without hints; $(echo "$hinted" | json moved_pages) with, of $(echo "$hinted" | json hinted_pages) free ones; $(echo "$hinted" | json ready_us) us"
at_most "what is free is not moved (pages)" $((plain / 2)) "$(echo "$hinted" | json moved_pages)"
told "the parent can use it again" b "$run" '(?m)^freed' 120
told "so can the child" hinted-1 "$run" '(?m)^freed' 120
at_most "a fork waits no longer than it is told to (ms)" 3000 "$(($(offshoot fork b --name short --hint-free=1 --json | json ready_us) / 1000))"
told "the parent goes on" b 'echo $((6 * 7))' '(?m)^42' 120
told "and the child" short-1 'echo $((6 * 7))' '(?m)^42' 120
check "pause" offshoot pause b
check "one that stands still is not asked" timeout 8 offshoot fork b --name still --hint-free=10000 --paused
check "and has its last figures" [ "$(figure still-1 total_memory)" -gt 0 ]
check "resume" offshoot resume b
for vm in b plain-1 hinted-1 short-1; do untroubled $vm; done
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
