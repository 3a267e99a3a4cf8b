# about: what is typed to one clone reaches only that one; much text in both directions
# needs: linux
# runs: 6.1/6.1
. /lab/lib.sh

boot a
children=$(fork a 3)
for vm in a $children; do told "$vm is told its name" "$vm" "me=$vm; echo i-am=\$me" "(?m)^i-am=$vm"; done
for vm in a $children; do
  told "$vm knows it" "$vm" 'echo still=$me' "(?m)^still=$vm"
  for other in a $children; do
    [ $other = $vm ] || same "$vm's console has nothing of $other's" 0 "$(console $vm | grep -cE "^(i-am|still)=$other\$")"
  done
done
told "a long line arrives whole" a "echo $(head -c 900 /dev/zero | tr '\0' y) | wc -c" '(?m)^901'
told "much text comes out whole" a 'seq 1 2000 | sed s/^/line/; echo end=$((1+1))' '(?m)^end=2' 60
same "every line of it" 2000 "$(console a | grep -cE '^line[0-9]+')"
# Forked in the middle of a line: the first half is in all of them.
offshoot send a 'seq 1 3000 | sed s/^/both/' --expect both5 --timeout 20 >/dev/null
child=$(fork a 1)
check "the clone prints on" wait_log "$child" '^both3000' 60
check "so does the parent" wait_log a '^both3000' 60
refuse "a pattern that does not come" 3 offshoot send a 'echo no' --expect 'never-printed' --timeout 2
gone
