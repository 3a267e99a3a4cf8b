# about: what Linux guests share goes to swap once and comes back once; a clone that waits for it can be removed
# needs: linux
# runs: 6.12/6.12
# timeout: 400
. /lab/lib.sh

total() { offshoot stats --json | sed -n '/"total"/,$p' | json "$1"; }
# private_kib: private memory of all VMs, as the kernel counts it.
private_kib() {
  for pid in $(offshoot ls --json | grep -oE '"pid": *[0-9]+' | grep -oE '[0-9]+'); do
    sed -n 's/^RssAnon:[^0-9]*\([0-9]*\).*/\1/p' /proc/"$pid"/status
  done | awk '{ n += $1 } END { print n + 0 }'
}

pages=12288
serve --swap /swap:1G --compressed 0
boot a -m 256M
stamp a
told "the parent fills" a 'fill 48 1' "(?m)^ok pages=$pages" 60
children=$(fork a 4 --wait-settled)
all="a $children"

for round in 1 2; do
  out=$(total swap_write_pages) in=$(total swap_in_pages)
  check "round $round: everything goes out" offshoot reclaim --all 1G
  written=$(($(total swap_write_pages) - out))
  note "$written pages were written"
  [ $round -eq 1 ] && at_most "what all share is written" "$written" $pages
  at_most "and once" $((pages * 5 / 2)) "$written"
  for vm in $all; do told "$vm verifies" "$vm" 'verify 1' '(?m)^ok verified' 120; done
  read=$(($(total swap_in_pages) - in))
  at_most "it is read" "$read" $pages
  at_most "and once" $((pages * 5 / 2)) "$read"
  # KVM brings pages in by workers that write: each VM has copies of its own of some that it only read.
  before=$(private_kib)
  for vm in $all; do
    child=$(fork "$vm" 1 --wait-settled) && offshoot rm "$child" >/dev/null || fail "fork of $vm"
  done
  after=$(private_kib)
  note "private memory: $before KiB, and $after KiB after a fork of each"
done
