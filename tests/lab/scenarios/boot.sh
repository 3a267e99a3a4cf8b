# about: a stock kernel boots to user space and powers off; reboot and panic; what is no kernel is refused
# needs: linux
# runs: 6.12/6.1
. /lab/lib.sh

boot a
told "the kernel is the one asked for" a 'uname -r' "(?m)^${LAB_INNER}\\."
told "it has its memory" a "awk '/MemTotal/{print \"kb=\" int(\$2/100000)}' /proc/meminfo" '(?m)^kb=[12]'
told "the random device is there" a 'cat /sys/class/misc/hw_random/rng_current' '(?m)^virtio_rng'
told "it serves" a 'head -c 32 /dev/hwrng | wc -c' '(?m)^32'
offshoot send a 'poweroff -f' --expect 'reboot: Power down' --timeout 30 >/dev/null 2>&1
check "it powers off" offshoot wait a --timeout 30
expect "ls says off" '^a +off' offshoot ls

boot r
offshoot send r 'reboot -f' --expect 'reboot: Restarting|machine restart' --timeout 30 >/dev/null 2>&1
expect "a reboot ends it, and wait says so" '^off: the guest rebooted$' offshoot wait r --timeout 30
expect "so does ls" '^r +off .*the guest rebooted' offshoot ls

boot p
offshoot send p 'echo c >/proc/sysrq-trigger' --expect 'Kernel panic' --timeout 30 >/dev/null 2>&1
offshoot wait p --timeout 30 >/dev/null 2>&1
expect "a panic is reported" '^p +.*panic' offshoot ls

head -c 1000000 "$kernel" >/tmp/short
head -c 1000000 /dev/urandom >/tmp/noise
: >/tmp/empty
refuse "a truncated kernel" 2 offshoot launch x --kernel /tmp/short --initrd /initrd.gz
refuse "noise" 2 offshoot launch x --kernel /tmp/noise --initrd /initrd.gz
refuse "an empty file" 2 offshoot launch x --kernel /tmp/empty
refuse "no file" 2 offshoot launch x --kernel /tmp/nothing
refuse "too big for the memory" 2 offshoot launch x -m 16M --kernel "$kernel" --initrd /initrd.gz
head -c 300000000 /dev/zero >/tmp/big
refuse "an initrd that does not fit" 2 offshoot launch x -m 256M --kernel "$kernel" --initrd /tmp/big
rm /tmp/big
refuse "a command line too long" 2 offshoot launch x --kernel "$kernel" --initrd /initrd.gz --cmdline "$(head -c 5000 /dev/zero | tr '\0' x)"
refuse "nine vCPUs" 2 offshoot launch x --kernel "$kernel" --vcpus 9
expect "nothing is left of them" '0' sh -c "offshoot ls | grep -c '^x '"
gone
