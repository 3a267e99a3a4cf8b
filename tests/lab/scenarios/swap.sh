# about: what Linux guests share goes to swap once and comes back once, and is shared again; clones that wait for it can go
# needs: linux
# runs: 6.12/6.12
# timeout: 500
. /lab/lib.sh

total() { offshoot stats --json | sed -n '/"total"/,$p' | json "$1"; }
pids() { offshoot ls --json | grep -oE '"pid": *[0-9]+' | grep -oE '[0-9]+'; }
# private_kib: private memory of all VMs, as the kernel counts it.
private_kib() {
  for pid in $(pids); do sed -n 's/^RssAnon:[^0-9]*\([0-9]*\).*/\1/p' /proc/"$pid"/status; done | awk '{ n += $1 } END { print n + 0 }'
}

pages=12288
serve --swap /swap:1G --compressed 0
on_one_processor
boot a -m 256M
stamp a
told "the parent fills" a 'fill 48 1' "(?m)^ok pages=$pages" 60
children=$(fork a 4 --wait-settled)
all="a $children"
for round in 1 2; do
  there=$(total resident_pages) out=$(total swap_write_pages) in=$(total swap_in_pages)
  check "round $round: everything goes out" offshoot reclaim --all 1G
  written=$(($(total swap_write_pages) - out))
  if [ $round -eq 1 ]; then at_most "what all share is written" "$written" $pages; fi
  at_most "once, with all else" $((there * 11 / 10)) "$written"
  swapped=$(total swapped_pages)
  before=$(private_kib)
  for vm in $all; do told "$vm verifies" "$vm" 'verify 1' '(?m)^ok verified' 120; done
  read=$(($(total swap_in_pages) - in))
  at_most "what all share is read" "$read" $pages
  at_most "nothing twice" "$swapped" "$read"
  # KVM brings pages in by workers that write: of some that a guest only read it has a copy, until the next harvest.
  after=$(private_kib)
  note "private memory: $before KiB out of memory, $after KiB after it was read"
  at_most "it is shared again (KiB)" $((before + pages)) "$after"
  for vm in $all; do
    child=$(fork "$vm" 1 --wait-settled) && offshoot rm "$child" >/dev/null || fail "fork of $vm"
  done
done

check "everything goes out once more" offshoot reclaim --all 1G
# In the middle of reading, with workers that wait for pages.
for vm in $children; do
  (offshoot send "$vm" 'verify 1' --expect never --timeout 20 >/dev/null 2>&1) &
done
sleep 0.3
pids=$(pids)
check "clones that wait for pages can be removed" timeout 20 offshoot rm $children
same "and are gone" 1 "$(for pid in $pids; do [ -d /proc/"$pid" ] && echo; done | wc -l)"
told "the parent verifies" a 'verify 1' '(?m)^ok verified' 120
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
