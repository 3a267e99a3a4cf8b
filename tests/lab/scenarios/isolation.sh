# about: what one clone writes no other sees: all of them stamp and check at the same time
# needs: linux
# runs: 6.1/6.12
# timeout: 600
. /lab/lib.sh
on_one_processor

boot a
stamp a
told "the parent fills" a 'fill 48 1' '(?m)^ok pages=12288' 180
children=$(fork a 4)
seed=10
for vm in a $children; do
  seed=$((seed + 1))
  # Overlapping ranges, all at the same time.
  (answer "$vm" "dirty $((seed * 100)) 3000 $seed" pages 180 >/tmp/wrote-"$vm") &
done
wait
seed=10
for vm in a $children; do
  seed=$((seed + 1))
  same "$vm wrote" 3000 "$(cat /tmp/wrote-"$vm")"
  told "$vm has its own" "$vm" "verify-page $((seed * 100)) 3000 $seed" '(?m)^ok verified' 180
  told "$vm has what was before it" "$vm" "verify-page 0 $((seed * 100)) 1" '(?m)^ok verified' 180
  told "$vm has what was behind it" "$vm" "verify-page $((seed * 100 + 3000)) 6000 1" '(?m)^ok verified' 180
done
# Forks while they write.
for vm in $children; do (answer "$vm" "fill 48 77" pages 180 >/dev/null) & done
late=$(fork a 2)
wait
for vm in $late; do told "$vm, made meanwhile, has the parent's" "$vm" "verify-page 1100 3000 11" '(?m)^ok verified' 180; done
for vm in $children; do told "$vm has its new fill" "$vm" 'verify 77' '(?m)^ok verified' 180; done
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
