# about: Linux guests whose swap device fails in part: who needs a lost page stops and says so, all others go on
# needs: linux
# runs: 6.12/6.1
# timeout: 500
. /lab/lib.sh

pages=8192
truncate -s 512M /disk
loop=$(losetup -f) && losetup "$loop" /disk
sectors=$((512 << 11))
disk=$(echo "0 $sectors linear $loop 0" | dm swap)
check "a device to swap to" test -b "$disk"
serve --swap "$disk" --compressed 0
boot a -m 256M
stamp a
# Each has pages of its own on the device, and shares the first.
told "the parent fills" a "fill 32 1" "(?m)^ok pages=$pages" 60
children=$(fork a 3 --wait-settled)
seed=1
for vm in $children; do
  seed=$((seed + 1))
  told "$vm writes half" "$vm" "dirty $((pages / 2)) $((pages / 2)) $seed" '(?m)^ok' 60
done
check "everything goes out" offshoot reclaim --all 1G
at_most "to the device" "$(offshoot stats --json | sed -n '/"total"/,$p' | json disk_bytes)" $((pages * 4096))
set -- $children
told "a clone has its pages back in time" "$1" 'verify-page 0 4096 1' '(?m)^ok verified' 120
told "its own as well" "$1" "verify-page 4096 4096 2" '(?m)^ok verified' 60
# From now on no sector is read.
check "the device fails" sh -c "echo '0 $sectors error' | dm swap"
for vm in "$2" "$3"; do
  offshoot send "$vm" "verify-page $((pages / 2)) $((pages / 2)) 1" --expect '(?m)^ok verified' --timeout 20 >/dev/null 2>&1
  expect "$vm stops, and says why" 'dead: memory at .* could not be read back from swap' offshoot inspect "$vm"
done
expect "the clone that has its pages lives" 'running' sh -c "offshoot ls | grep '^$1 '"
told "and goes on" "$1" 'verify-page 0 4096 1' '(?m)^ok verified' 60
told "with what it wrote itself" "$1" "verify-page 4096 4096 2" '(?m)^ok verified' 60
expect "check finds nothing broken" ' 0 broken' offshoot check
gone
losetup -d "$loop" 2>/dev/null
true
