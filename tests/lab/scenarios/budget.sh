# about: Linux guests under a budget that is less than they use: stress with verification, forked meanwhile
# needs: linux
# runs: 6.12/6.12
# timeout: 1200
. /lab/lib.sh

limit=$((176 << 20))
total() { offshoot stats --json | sed -n '/"total"/,$p' | json "$1"; }
# watch_accounted: what is accounted, and when, until /tmp/watching is gone.
watch_accounted() {
  while [ -e /tmp/watching ]; do
    echo "$(hundredths) $(total accounted_bytes)" >>/tmp/samples
    sleep 0.1
  done
}

# A disk of memory: this machine has no other, and what is on it counts for nobody.
serve --swap /swap:1G
on_one_processor
boot a -m 256M
before=$(total accounted_bytes)
note "one guest at its prompt: $((before >> 20)) MiB accounted"
check "a budget of $((limit >> 20)) MiB" offshoot budget $limit
# It may have been above that: there is some time to get there.
for _try in 1 2 3 4 5 6 7 8 9 10; do
  [ "$(total accounted_bytes)" -le $limit ] && break
  sleep 1
done
at_most "what is accounted comes down" $limit "$(total accounted_bytes)"
: >/tmp/watching
watch_accounted &
watcher=$!
# The shell's prompt may be on the line that an answer begins on.
run='(stress-ng --vm 1 --vm-bytes 40M --vm-method write64 --verify --timeout 25s </dev/null; s=$?; echo; echo stress=$s)'
offshoot send a "$run &" --expect 'dispatching|lab#' --timeout 60 >/dev/null
sleep 4
children=
for n in 1 2; do
  child=$(fork a 1) && pass "fork $n under the budget" || fail "fork $n under the budget"
  children="$children $child"
  sleep 3
done
grandchild=$(fork "$child" 1) && pass "fork of a clone" || fail "fork of a clone"
for vm in a $children $grandchild; do
  check "$vm ends its run" wait_log "$vm" '^stress=' 240
  expect "$vm found no wrong byte" '^stress=0' console "$vm"
  # A guest that is slowed to keep the budget takes that for a lockup, in an emulation all the more.
  same "$vm saw no kernel trouble" "" "$(console "$vm" | grep -v 'soft lockup' | grep -E 'BUG|Oops|fail:|error:|invoked oom')"
done
rm /tmp/watching
wait $watcher
most=$(cut -d ' ' -f 2 /tmp/samples | sort -n | tail -n 1)
over=$(awk -v limit=$limit '$2 > limit * 1.05 { n++ } END { print n + 0 }' /tmp/samples)
note "$(wc -l </tmp/samples) samples, $over of them above 105 %; $(offshoot stats --json | sed -n '/"total"/,$p' | grep -E 'swap_|compressed|disk|resident' | tr -d '\n')"
at_most "what is accounted stays within 5 % of the budget" $((limit + limit / 20)) "$most"
out=$(total swap_out_pages)
at_most "that took swapping: 1000 pages out, of what went" "$out" 1000
offshoot budget none >/dev/null
for vm in a $children $grandchild; do told "$vm goes on" "$vm" 'echo $((6 * 7))' '(?m)^(lab# )?42' 60; done
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
