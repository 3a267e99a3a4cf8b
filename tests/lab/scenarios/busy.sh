# about: forks of a guest that is busy in user space, busy in the kernel, and idle
# needs: linux
# runs: 6.12/6.1
. /lab/lib.sh
on_one_processor

boot a
try() {
  for n in 1 2 3; do
    child=$(fork a 1) || { fail "$1: fork $n" && return; }
    told "$1: $child goes on" "$child" "echo $1-$n=\$((1+1))" "(?m)^$1-$n=2" 60
    told "$1: its clock and timers too" "$child" "sleep 0.2 && echo slept=\$((2+1))" '(?m)^slept=3' 60
    offshoot rm "$child" >/dev/null
  done
  told "$1: the parent goes on" a "echo $1=\$((3+4))" "(?m)^$1=7" 60
}
sleep 2
try idle
offshoot send a '(while :; do :; done) & echo user=$((5+5))' --expect '(?m)^user=10' >/dev/null
try user
offshoot send a 'kill %1; dd if=/dev/zero of=/dev/null bs=1M & echo kernel=$((6+6))' --expect '(?m)^kernel=12' >/dev/null
try kernel
offshoot send a 'kill %2 %1; (while :; do mount -t tmpfs none /mnt 2>/dev/null; ls -lR /proc/1 >/dev/null 2>&1; done) & echo calls=$((7+7))' --expect '(?m)^calls=14' >/dev/null
try calls
told "no stall was seen" a 'dmesg | grep -cE "stall|lockup|hung|BUG"' '(?m)^0'
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
