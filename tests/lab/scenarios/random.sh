# about: clones have different random numbers from their first; 6.12 guests log that they were reseeded
# needs: linux
# runs: 6.12/6.12
. /lab/lib.sh
on_one_processor

boot a
# The kernel makes the boot's id when it is first asked for it: the parent is, before it is forked.
ask a 'cat /proc/sys/kernel/random/boot_id' '(?m)^[0-9a-f-]{36}' >/dev/null
stamp a
answer a random bytes >/dev/null
children=$(fork a 5)
for vm in a $children; do answer "$vm" random bytes; done >/tmp/random
cat /tmp/random | sed 's/^/        /'
same "six answers" 6 "$(grep -cE '^[0-9a-f]{32}$' /tmp/random)"
same "all of them different" 6 "$(sort -u /tmp/random | wc -l)"
for vm in a $children; do offshoot send "$vm" quit --expect '(?m)^lab#' >/dev/null; done
for vm in a $children; do ask "$vm" 'cat /proc/sys/kernel/random/uuid' '(?m)^[0-9a-f-]{36}'; done | grep -oE '[0-9a-f-]{36}' >/tmp/uuid
same "six UUIDs" 6 "$(wc -l </tmp/uuid)"
same "all of them different" 6 "$(sort -u /tmp/uuid | wc -l)"
for vm in a $children; do ask "$vm" 'cat /proc/sys/kernel/random/boot_id' '(?m)^[0-9a-f-]{36}'; done | grep -oE '[0-9a-f-]{36}' >/tmp/boot
same "the boot they share is the parent's" 1 "$(sort -u /tmp/boot | wc -l)"
if [ "$LAB_INNER" = 6.12 ]; then
  for vm in $children; do told "$vm was reseeded" "$vm" 'dmesg | grep -c "crng reseeded due to virtual machine fork"' '(?m)^[1-9]'; done
  told "the parent was not" a 'dmesg | grep -c "crng reseeded due to virtual machine fork"' '(?m)^0'
  grandchild=$(fork "$(echo "$children" | head -n 1)" 1)
  told "a grandchild was reseeded again" "$grandchild" 'dmesg | grep -c "crng reseeded due to virtual machine fork"' '(?m)^2'
fi
gone
