# about: the built-in guest: random writes, forks and ends against a model, for half a minute
# runs: 6.1
. /lab/lib.sh

# The model: for every VM a file with the seed of each of 16 slots of 64 pages.
model=/tmp/model
mkdir -p $model
seed=${SEED:-20240607}
next() { seed=$(((seed * 1103515245 + 12345) & 0x7fffffff)) && random=$(((seed >> 8) % $1)); }
pick() { next "$(ls $model | wc -l)" && vm=$(ls $model | sed -n "$((random + 1))p"); }

check "launch" offshoot launch a -m 64M || exit 1
check "fill" offshoot send a fill 1000 1024 1
for slot in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do echo 1; done >$model/a
steps=0 stamp=1 bad=0 end=$(($(hundredths) + 3000))
while [ "$(hundredths)" -lt $end ] && [ $bad -lt 3 ]; do
  steps=$((steps + 1))
  pick
  next 10
  case $random in
    0 | 1 | 2 | 3)
      next 16 && slot=$random stamp=$((stamp + 1))
      # A seed does for all pages of a slot as `fill` derives words from the page as well, so slots are told apart.
      offshoot send "$vm" fill $((1000 + slot * 64)) 64 $stamp >/dev/null || { bad=$((bad + 1)) && fail "step $steps: fill in $vm"; }
      sed -i "$((slot + 1))s/.*/$stamp/" $model/"$vm"
      ;;
    4 | 5)
      if [ "$(ls $model | wc -l)" -lt 12 ]; then
        if child=$(offshoot fork "$vm"); then cp $model/"$vm" $model/"$child"; else bad=$((bad + 1)) && fail "step $steps: fork $vm"; fi
      fi
      ;;
    6)
      if [ "$(ls $model | wc -l)" -gt 4 ]; then
        offshoot rm "$vm" >/dev/null || { bad=$((bad + 1)) && fail "step $steps: rm $vm"; }
        rm $model/"$vm"
      fi
      ;;
    *)
      next 16 && slot=$random
      said=$(offshoot send "$vm" verify $((1000 + slot * 64)) 64 "$(sed -n "$((slot + 1))p" $model/"$vm")" 2>&1) ||
        { bad=$((bad + 1)) && fail "step $steps: $vm slot $slot: $said"; }
      ;;
  esac
done
[ $bad -gt 0 ] || pass "$steps steps"
for vm in $(ls $model); do
  good=yes slot=0
  while read -r stamp; do
    said=$(offshoot send "$vm" verify $((1000 + slot * 64)) 64 "$stamp" 2>&1) || { good= && fail "$vm slot $slot at the end: $said"; }
    slot=$((slot + 1))
  done <$model/"$vm"
  [ -z "$good" ] || pass "$vm is what the model says"
done
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
