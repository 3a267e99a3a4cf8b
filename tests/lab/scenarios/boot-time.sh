# about: time to user space against QEMU's microvm machine with the same kernel and initrd
# needs: linux
# wants: qemu
# runs: 6.12/6.1
. /lab/lib.sh

# Each from its start to the guest's word that it is ready, in turn, so that both meet the same host. Best of three.
with_qemu() {
  started=$(hundredths)
  qemu-system-x86_64 -M microvm -accel kvm -cpu host -m 256 -nodefaults -no-user-config \
    -display none -no-reboot -serial stdio -kernel "$kernel" -initrd /initrd.gz -append "$cmdline" \
    </dev/null >/tmp/qemu.out 2>&1 &
  pid=$!
  until grep -q 'offshoot-lab: ready' /tmp/qemu.out || ! kill -0 $pid 2>/dev/null || [ $(($(hundredths) - started)) -gt 9000 ]; do usleep 20000; done
  took=$(($(hundredths) - started))
  kill $pid 2>/dev/null
  wait $pid 2>/dev/null
  grep -q 'offshoot-lab: ready' /tmp/qemu.out || { tail -n 5 /tmp/qemu.out && took=; }
}
with_offshoot() {
  started=$(hundredths)
  offshoot launch "$1" -m 256M --kernel "$kernel" --initrd /initrd.gz --cmdline "$cmdline" >/dev/null || { took= && return; }
  offshoot logs -f "$1" >/tmp/offshoot.out 2>&1 &
  pid=$!
  until grep -q 'offshoot-lab: ready' /tmp/offshoot.out || ! kill -0 $pid 2>/dev/null || [ $(($(hundredths) - started)) -gt 9000 ]; do usleep 20000; done
  took=$(($(hundredths) - started))
  grep -q 'offshoot-lab: ready' /tmp/offshoot.out || { took= && tail -n 5 /tmp/offshoot.out && offshoot ls; }
  kill $pid 2>/dev/null
  offshoot rm "$1" >/dev/null
}
best_qemu=999999 best_offshoot=999999
for n in 1 2 3; do
  with_qemu
  note "QEMU microvm: ${took:-never} /100 s"
  [ -n "$took" ] && [ "$took" -lt $best_qemu ] && best_qemu=$took
  with_offshoot v$n
  note "offshoot:     ${took:-never} /100 s"
  [ -n "$took" ] && [ "$took" -lt $best_offshoot ] && best_offshoot=$took
done
same "QEMU's guest reaches user space" yes "$([ $best_qemu -lt 999999 ] && echo yes)"
same "offshoot's guest reaches user space" yes "$([ $best_offshoot -lt 999999 ] && echo yes)"
note "ratio: $((best_offshoot * 100 / best_qemu)) %"
at_most "offshoot takes no more than 1.3 times QEMU's time (%)" 130 $((best_offshoot * 100 / best_qemu))
gone
