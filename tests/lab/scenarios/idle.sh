# about: balloons of idle guests go up by themselves and come back down; in clones of clones; and not where that is off
# needs: linux
# runs: 6.12/6.12
# timeout: 900
. /lab/lib.sh

figure() { offshoot stats "$1" --json | json "$2"; }
# Bytes in a balloon, without waking its guest.
ballooned() { offshoot ls --json | tr -d ' \n' | tr '}' '\n' | grep "\"name\":\"$1\"" | json balloon_bytes; }
# until_balloon NAME TEST BYTES SECONDS: waits until `BYTES-in-balloon TEST BYTES`.
until_balloon() {
  _end=$(($(hundredths) + $4 * 100))
  while [ "$(hundredths)" -lt $_end ]; do
    [ "$(ballooned "$1")" "$2" "$3" ] && return 0
    sleep 0.5
  done
  echo "$(ballooned "$1") bytes in the balloon of $1"
  return 1
}
serve --auto-balloon idle --balloon-idle 3
boot a -m 256M
check "an idle guest gives what it can spare" until_balloon a -gt $((64 << 20)) 60
sleep 12
given=$(ballooned a)
note "$((given >> 20)) MiB in its balloon"
at_most "it keeps some to begin with" "$(figure a available_memory_bytes)" $((16 << 20))
child=$(fork a 1) && pass "fork" || fail "fork"
grandchild=$(fork "$child" 1 --name g) && pass "fork of the clone" || fail "fork of the clone"
same "they have its balloon" "$given $given" "$(ballooned "$child") $(ballooned "$grandchild")"
offshoot send "$grandchild" 'while :; do :; done &' --expect 'lab#' --timeout 30 >/dev/null
check "one that runs has its memory back" until_balloon "$grandchild" -eq 0 60
told "it can use it" "$grandchild" 'head -c 100000000 /dev/zero >/tmp/y && wc -c </tmp/y; rm /tmp/y' '(?m)^(lab# )?100000000' 150
told "one that had it in its balloon can, too" "$child" 'head -c 100000000 /dev/zero >/tmp/y && wc -c </tmp/y; rm /tmp/y' '(?m)^(lab# )?100000000' 150
check "what its user asks for comes first" offshoot balloon a 200M --timeout 60
same "and is what it has" $((56 << 20)) "$(ballooned a)"
for vm in a $child $grandchild; do
  untroubled "$vm"
done
expect "check finds nothing broken" ' 0 broken' offshoot check
gone

serve --auto-balloon off --balloon-idle 1
boot b -m 256M
sleep 8
same "where it is off nothing happens" 0 "$(ballooned b)"
offshoot rm b
check "shutdown" offshoot shutdown

serve --balloon-idle 2
boot c -m 256M
sleep 8
same "nothing happens while nobody wants the memory" 0 "$(ballooned c)"
check "a budget" offshoot budget 80M
check "a budget that is short makes an idle guest give" until_balloon c -gt $((32 << 20)) 90
gone
