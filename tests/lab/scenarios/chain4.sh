# about: a clone of a clone, 4 deep, each with memory of its own; the middle of the chain ends
# needs: linux
# runs: 6.1/6.1
. /lab/lib.sh
on_one_processor

boot v0
stamp v0
told "v0 fills" v0 'fill 16 100' '(?m)^ok pages=4096'
parent=v0 chain=
for level in 1 2 3 4; do
  child=$(fork "$parent" 1) || fail "fork of $parent"
  told "$child writes" "$child" "dirty $((level * 512)) 64 $((100 + level))" '(?m)^ok pages=64'
  same "$child counts on" $level "$(answer "$child" next asked)"
  parent=$child chain="$chain $child"
done
last=$child
for level in 1 2 3 4; do told "$last has what level $level wrote" "$last" "verify-page $((level * 512)) 64 $((100 + level))" '(?m)^ok verified'; done
told "v0 has nothing of it" v0 'verify 100' '(?m)^ok verified'
set -- $chain
check "the middle ends" offshoot rm "$2"
for level in 1 2 3 4; do told "$last still has level $level" "$last" "verify-page $((level * 512)) 64 $((100 + level))" '(?m)^ok verified'; done
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
