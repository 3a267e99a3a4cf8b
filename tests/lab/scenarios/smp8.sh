# about: a guest with 8 vCPUs, and a clone of it
# needs: linux
# runs: 6.12/6.12
# timeout: 600
. /lab/lib.sh

boot a --vcpus 8
told "eight CPUs" a nproc '(?m)^8'
child=$(fork a 1) || fail "fork"
for vm in a "$child"; do
  for cpu in 0 1 2 3 4 5 6 7; do
    mask=$(printf %x $((1 << cpu)))
    told "$vm runs on CPU $cpu" "$vm" "taskset $mask echo on=\$((10+$cpu))" "(?m)^on=$((10 + cpu))" 60
  done
done
told "no stall was seen" "$child" 'dmesg | grep -cE "stall|lockup|hung"' '(?m)^0' 60
gone
