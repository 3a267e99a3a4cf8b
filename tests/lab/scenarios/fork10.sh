# about: ten clones of a running guest: a counter goes on from the same value in each, then differs
# needs: linux
# runs: 6.12/6.12
. /lab/lib.sh
on_one_processor

boot a
stamp a
for n in 1 2 3; do answer a next asked >/dev/null; done
check "fork into ten" offshoot fork a --count 10
for n in 1 2 3 4 5 6 7 8 9 10; do same "a-$n counts on from 3" 4 "$(answer a-$n next asked)"; done
same "so does the parent" 4 "$(answer a next asked)"
for n in 1 2 3; do answer a-1 next asked >/dev/null; done
same "then they differ: a-1" 8 "$(answer a-1 next asked)"
same "then they differ: a-2" 5 "$(answer a-2 next asked)"
same "then they differ: the parent" 5 "$(answer a next asked)"
first=$(answer a-3 ticks ms)
sleep 1
second=$(answer a-3 ticks ms)
at_most "timers go on in a clone (ms, before)" "$((second - 1))" "$first"
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
