# about: a guest with 2 vCPUs: both run, both go on in a clone
# needs: linux
# runs: 6.1/6.12
. /lab/lib.sh

boot a --vcpus 2
told "two CPUs" a nproc '(?m)^2'
told "both have timers" a "grep LOC /proc/interrupts | awk '{print \"both=\" (\$2>0 && \$3>0)}'" '(?m)^both=1'
offshoot send a 'stamp spin 600000 & stamp spin 600000 &' --expect 'lab#' --timeout 10 >/dev/null
sleep 1
for n in 1 2 3; do
  child=$(fork a 1) || fail "fork $n"
  told "$child runs on CPU 0" "$child" 'taskset 1 echo one=$((0+1))' '(?m)^one=1'
  told "$child runs on CPU 1" "$child" 'taskset 2 echo two=$((1+1))' '(?m)^two=2'
  told "$child's CPUs are both busy" "$child" "for n in 0 1; do grep ^cpu\$n /proc/stat | cut -d ' ' -f 2; done >/tmp/a; sleep 1; for n in 0 1; do grep ^cpu\$n /proc/stat | cut -d ' ' -f 2; done >/tmp/b; echo moved=\$(paste /tmp/a /tmp/b | awk '\$1 < \$2' | wc -l)" '(?m)^moved=2' 60
  offshoot rm "$child"
done
told "the parent goes on" a 'echo sum=$((40+2))' '(?m)^sum=42'
told "no stall was seen" a 'dmesg | grep -cE "stall|lockup|hung"' '(?m)^0'
gone
