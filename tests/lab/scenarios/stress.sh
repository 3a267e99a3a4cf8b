# about: stress-ng --vm --verify in parent and clones, with forks while it runs
# needs: linux
# runs: 6.12/6.12
# timeout: 400
. /lab/lib.sh

boot a -m 256M
run='(stress-ng --vm 1 --vm-bytes 48M --vm-method all --verify --timeout 25s; s=$?; echo; echo stress=$s)'
offshoot send a "$run &" --expect 'dispatching|lab#' --timeout 30 >/dev/null
sleep 4
children=
for n in 1 2 3; do
  child=$(fork a 1) && pass "fork $n while it runs" || fail "fork $n"
  children="$children $child"
  sleep 2
done
grandchild=$(fork "$child" 1) && pass "fork of a clone" || fail "fork of a clone"
for vm in a $children $grandchild; do
  check "$vm ends its run" wait_log "$vm" '^stress=' 120
  expect "$vm found no wrong byte" '^stress=0' console "$vm"
  same "$vm saw no kernel trouble" 0 "$(console "$vm" | grep -cE 'BUG|Oops|lockup|fail:|error:')"
done
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
