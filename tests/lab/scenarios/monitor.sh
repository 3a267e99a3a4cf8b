# about: the built-in guest: launch, fork, verify, 8 deep, nothing left behind
# runs: 6.1 6.12
. /lab/lib.sh

expect "doctor sees nested paging" 'svm, nested paging' offshoot doctor
check "launch" offshoot launch a || exit 1
check "fill" offshoot send a fill 1000 2000 7
expect "fork makes three" 'a-3' offshoot fork a --count 3
for vm in a a-1 a-2 a-3; do check "$vm has the bytes" offshoot send $vm verify 1000 2000 7; done
check "a child writes" offshoot send a-1 fill 1500 500 8
check "the parent writes" offshoot send a fill 1000 100 9
check "the child has its own" offshoot send a-1 verify 1500 500 8
check "the child has the rest" offshoot send a-1 verify 1000 500 7
check "a sibling has what was" offshoot send a-2 verify 1000 2000 7
check "the parent has its own" offshoot send a verify 1000 100 9
check "the parent has the rest" offshoot send a verify 1100 1900 7

vm=a
for level in 1 2 3 4 5 6 7 8; do
  child=$(offshoot fork $vm --name d$level) || fail "fork at depth $level"
  check "$child writes" offshoot send "$child" fill $((3000 + level * 100)) 50 $((20 + level))
  vm=$child
done
for level in 1 2 3 4 5 6 7 8; do check "depth 8 has level $level" offshoot send $vm verify $((3000 + level * 100)) 50 $((20 + level)); done
check "depth 8 has the root's" offshoot send $vm verify 1100 1900 7
expect "check finds nothing broken" ' 0 broken' offshoot check
offshoot fork a --wait-settled --json | sed 's/^/        /' | grep -E 'pause_us|ready_us|first_exit_us|moved_pages'
expect "the whole family is listed" 'd8' offshoot tree
gone
