# The outer machine: QEMU without acceleration, an AMD processor with SVM and nested paging. Its console goes to a file;
# what runs inside speaks over a second serial port of its own, so that no kernel message gets between its words.
# shellcheck shell=bash

# run_inside KERNEL INNER TIMEOUT MEMORY PARTS FILES COMMAND: boots, runs COMMAND (a line for sh) with the directory FILES
# as /lab, shows its output as it comes. Returns its exit status; 124 after TIMEOUT seconds, 125 if the machine ended
# without one.
run_inside() {
  local kernel=$1 inner=$2 limit=$3 memory=$4 parts=$5 files=$6 command=$7
  local run marker line machine ended status='' empty=0
  run=$(mktemp -d "$cache/run.XXXXXX")
  on_exit "rm -rf '$run'"
  marker="lab-status-$RANDOM$RANDOM$RANDOM"
  mkdir -p "$run/root/lab"
  cp -a "$files/." "$run/root/lab/"
  {
    echo "LAB_OUTER=$kernel LAB_INNER=$inner"
    echo "marker=$marker"
    printf 'run() {\n%s\n}\n' "$command"
  } >"$run/root/lab/command"
  # shellcheck disable=SC2086  # a list
  { cat "$images/common.cpio" "$images/modules-$kernel.cpio" $parts && pack "$run/root"; } >"$run/initramfs"
  # In the background, because a shell that waits for a pipeline heeds no signal until it ends.
  mkfifo "$run/out"
  timeout --foreground --kill-after=5 "$limit" "$programs/run" qemu-system-x86_64 -L "$programs" \
    -M q35 -accel tcg,thread=multi -cpu max,+svm -smp 2 -m "$memory" -nodefaults -no-user-config -display none -no-reboot \
    -serial "file:$run/console" -serial stdio \
    -kernel "$images/vmlinuz-$kernel" -initrd "$run/initramfs" \
    -append "console=ttyS0 panic=-1 oops=panic mitigations=off quiet ${OFFSHOOT_LAB_APPEND:-}" \
    </dev/null >"$run/out" 2>"$run/qemu" &
  machine=$!
  on_exit "kill $machine 2>/dev/null"
  while IFS= read -r line || [ -n "$line" ]; do
    line=${line%$'\r'}
    case $line in
      "$marker "*) status=${line#* } ;;
      # The marker stands on a line of its own, for which there may have been an empty one before it.
      '') empty=$((empty + 1)) ;;
      *)
        for (( ; empty > 0; empty--)); do echo; done
        printf '%s\n' "$line"
        ;;
    esac
  done <"$run/out"
  wait $machine
  ended=$?
  if [ -n "$status" ]; then
    :
  elif [ "$ended" -eq 124 ] || [ "$ended" -eq 137 ]; then
    echo "lab: the machine was stopped after $limit s" >&2
    status=124
  else
    echo "lab: the machine ended without a word (QEMU's status $ended)" >&2
    status=125
  fi
  grep -v '^$' "$run/qemu" >&2
  # Kernel warnings are always worth seeing; the rest of the console when nothing else explains the end.
  if grep -aqE 'BUG:|Oops|WARNING:|soft lockup|Call Trace|Out of memory|Kernel panic' "$run/console"; then
    echo "lab: the outer kernel says:" >&2
    tr -d '\r' <"$run/console" | tail -n 60 >&2
  elif [ "$status" -ge 124 ] && [ "$status" -le 125 ]; then
    echo "lab: the outer console ends with:" >&2
    tr -d '\r' <"$run/console" | tail -n 20 >&2
  fi
  rm -rf "$run"
  return "$status"
}
