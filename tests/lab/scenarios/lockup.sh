# about: a guest that stood still for longer than its watchdogs wait is told so: no soft lockup, no stall, no hung task
# needs: linux
# runs: 6.12/6.1 6.12/6.12
. /lab/lib.sh

boot a -m 256M
# The watchdog looks for a program that keeps the processor to itself: 20 seconds, and half of that, to be reported.
told "the watchdog is on" a 'cat /proc/sys/kernel/soft_watchdog /proc/sys/kernel/watchdog_thresh | tr "\n" " "' '(?m)^1 10 '
check "it is busy in user space" offshoot send a 'while :; do :; done &' --expect 'lab#' --timeout 30
check "a clone that is left paused" offshoot fork a left --paused
check "pause" offshoot pause a
sleep 45
check "resume" offshoot resume a
check "resume of the clone" offshoot resume left
sleep 5
for vm in a left; do
  told "$vm answers" $vm 'echo here $((40 + 2))' '(?m)^(lab# )?here 42'
  untroubled $vm
done
gone
