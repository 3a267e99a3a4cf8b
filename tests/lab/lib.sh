# What scenarios share; they are read by busybox's sh in the outer system, and begin with `. /lab/lib.sh`.
#
# A scenario says in comments at its top what it is about, on which kernels it runs by default (`runs: OUTER[/INNER] …`),
# on which outer kernels it makes sense (`outer:`), what it needs of offshoot (`needs: linux`), what it wants in the
# machine (`wants: qemu`), and how long it may take (`timeout:`, seconds).

passed=0 failed=0
pass() { passed=$((passed + 1)) && echo "  pass  $*"; }
fail() { failed=$((failed + 1)) && echo "  FAIL  $*"; }
note() { echo "        $*"; }

# check WHAT COMMAND…: passes if the command succeeds; shows what it said if not.
check() {
  _what=$1
  shift
  if _said=$("$@" 2>&1); then pass "$_what"; else
    _status=$?
    fail "$_what: status $_status: $*"
    echo "$_said" | tail -n 15 | sed 's/^/        | /'
    return 1
  fi
}

# expect WHAT REGEX COMMAND…: passes if the command's output matches.
expect() {
  _what=$1 _pattern=$2
  shift 2
  _said=$("$@" 2>&1)
  _status=$?
  if echo "$_said" | grep -qE -- "$_pattern"; then pass "$_what"; else
    fail "$_what: no match for /$_pattern/ (status $_status): $*"
    echo "$_said" | tail -n 15 | sed 's/^/        | /'
    return 1
  fi
}

# refuse WHAT STATUS COMMAND…: passes if the command fails with just this status, and says so in one line.
refuse() {
  _what=$1 _wanted=$2
  shift 2
  _said=$("$@" 2>&1)
  _status=$?
  if [ $_status -eq "$_wanted" ] && [ "$(echo "$_said" | wc -l)" -eq 1 ]; then pass "$_what: $_said"; else
    fail "$_what: status $_status, wanted $_wanted and one line: $*"
    echo "$_said" | tail -n 15 | sed 's/^/        | /'
    return 1
  fi
}

# same WHAT WANTED GOT
same() {
  if [ "$2" = "$3" ]; then pass "$1"; else
    fail "$1: '$3', not '$2'"
    return 1
  fi
}

# json KEY: the first value of a key in the JSON on standard input.
json() { tr -d ' \n' | grep -oE "\"$1\":(\"[^\"]*\"|[^,}]*)" | head -n 1 | sed 's/^[^:]*://; s/"//g'; }

# hundredths: the time since boot in 1/100 s.
hundredths() { cut -d ' ' -f 1 /proc/uptime | tr -d .; }

# at_most WHAT LIMIT VALUE: whole numbers.
at_most() {
  if [ "$3" -le "$2" ] 2>/dev/null; then pass "$1: $3 (at most $2)"; else
    fail "$1: $3 is more than $2"
    return 1
  fi
}

# --- The emulated processor -------------------------------------------------------------------------------------------

# QEMU's SVM emulation loses guests, its own as well as ours. An interrupt that is injected when a guest is entered stays
# noted as the processor's exception, and is delivered once more, wherever the guest is by then, if the thread that
# emulates it is kicked without another interrupt before the guest exits. Linux does not survive that everywhere. The
# guest then shuts down, most often over a page fault at the very instruction that it was resumed at, in the kernel or in a
# program, or it exits at an address of the host's own VMRUN. These exits are written down, so that what the emulation
# breaks is told from what we break.
_watched=/sys/kernel/tracing/instances/lab
_crashes=/sys/kernel/tracing/instances/crashes
_watch_emulation() {
  [ -d $_watched ] || {
    mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
    mkdir $_watched 2>/dev/null || return
  }
  _run=0x$(grep -m 1 ' __svm_vcpu_run' /proc/kallsyms | cut -d ' ' -f 1)
  echo 16 >$_watched/buffer_size_kb
  echo "(guest_rip >= $_run && guest_rip < $(printf '0x%x' $((_run + 0x400)))) || \
    (exit_reason == 0x7f && intr_info == 0x80000b0e && (error_code == 0x10 || error_code == 0x14))" >$_watched/events/kvm/kvm_exit/filter
  echo 1 >$_watched/events/kvm/kvm_exit/enable
  # Every guest that shut down, for whoever reads of a failure.
  mkdir $_crashes 2>/dev/null || return
  echo 16 >$_crashes/buffer_size_kb
  echo "exit_reason == 0x7f" >$_crashes/events/kvm/kvm_exit/filter
  echo 1 >$_crashes/events/kvm/kvm_exit/enable
}
_watch_emulation

# lost_by_emulation: whether the emulated processor has lost a guest since this was last asked: it shows.
lost_by_emulation() {
  grep -q kvm_exit $_watched/trace 2>/dev/null || return 1
  echo >$_watched/trace
  note "the emulated processor has lost a guest"
}

_finish() {
  _status=$?
  if [ $failed -gt 0 ] || [ $_status -ne 0 ]; then
    [ $_status -eq 0 ] || fail "the scenario itself ended with status $_status"
    # The lines that `run` looks for to start the scenario again: as often as it takes, or once.
    lost_by_emulation && echo "after $passed passed, $failed failed" && echo "lost by the emulated processor" && exit 1
    grep -h kvm_exit $_crashes/trace 2>/dev/null | tail -n 5 | sed 's/^ */        a guest shut down: /'
    grep -q kvm_exit $_crashes/trace 2>/dev/null && echo "perhaps lost by the emulated processor"
    echo "        offshoot ls:"
    offshoot ls 2>&1 | tail -n 30 | sed 's/^/        | /'
    for _vm in $(offshoot ls -q 2>/dev/null); do
      echo "        console of $_vm:"
      console "$_vm" | tail -n 4 | sed 's/^/        | /'
    done
    echo "        server log:"
    tail -n 15 "${OFFSHOOT_HOME:-/tmp/offshoot-0}/server.log" 2>/dev/null | sed 's/^/        | /'
  fi
  dmesg | grep -E 'BUG:|Oops|WARNING:|Call Trace|Out of memory|kvm.*(unexpected|unhandled)' | head -n 5 | sed 's/^/        kernel: /'
  echo "$passed passed, $failed failed"
  [ $failed -eq 0 ] || exit 1
  exit 0
}
trap _finish EXIT

# gone: everything ends, and nothing stays behind.
gone() {
  offshoot rm --all >/dev/null 2>&1
  expect "check finds nothing broken after rm" '0 broken' offshoot check
  check "shutdown" offshoot shutdown
  _tries=0
  while [ -n "$(pidof offshoot)" ] && [ $_tries -lt 50 ]; do sleep 0.1 && _tries=$((_tries + 1)); done
  same "no process stays" "" "$(pidof offshoot)"
}

# serve [ARGUMENT…]: a server of the scenario's own, for the commands that follow.
serve() {
  offshoot serve "$@" 2>>/tmp/serve.log &
  _tries=0
  until offshoot budget >/dev/null 2>&1 || [ $_tries -ge 50 ]; do sleep 0.1 && _tries=$((_tries + 1)); done
}

# on_one_processor: VMs run on one of the machine's two processors from now on, their server on both. Where several guests run
# on both and exit often for their memory, the emulation breaks within a minute: guests shut down, and the outer kernel finds
# its stacks overwritten, which no program of its could do. On one processor nothing of that was seen.
on_one_processor() {
  offshoot budget none >/dev/null
  for _pid in $(pidof offshoot); do
    grep -q zygote /proc/"$_pid"/comm && taskset -p 2 "$_pid" >/dev/null && return
  done
  fail "no process that makes VMs"
}

# --- Linux guests -----------------------------------------------------------------------------------------------------

kernel=/kernels/$LAB_INNER/vmlinuz
cmdline="console=ttyS0 panic=-1"

# console NAME: what a guest has printed.
console() { offshoot logs "$1" 2>&1 | tr -d '\r'; }

# wait_log NAME REGEX SECONDS: until the guest's console has it.
wait_log() {
  _end=$(($(hundredths) + $3 * 100))
  while :; do
    console "$1" | grep -qE "$2" && return 0
    [ "$(hundredths)" -lt $_end ] || break
    offshoot ls | grep -E "^$1 " | grep -qE 'dead|off' && break
    sleep 0.5
  done
  console "$1" | tail -n 12
  return 1
}

# boot NAME [ARGUMENT…]: launches a Linux guest and waits for its shell. A guest that does not boot ends the scenario; one
# that the emulated processor has lost is launched again.
boot() {
  _name=$1
  shift
  for _try in 1 2 3 4; do
    _boot_started=$(hundredths)
    check "launch $_name" offshoot launch "$_name" --kernel "$kernel" --initrd /initrd.gz --cmdline "$cmdline" "$@" || exit 1
    _said=$(wait_log "$_name" 'offshoot-lab: ready' 60) && break
    lost_by_emulation || break
    offshoot rm "$_name" >/dev/null
  done
  check "$_name reaches user space" wait_log "$_name" 'offshoot-lab: ready' 0 || exit 1
  same "$_name loads every module" "" "$(console "$_name" | grep 'offshoot-lab: no ')"
  note "$_name: $(($(hundredths) - _boot_started))0 ms to user space"
}

# untroubled NAME: its kernel has complained of nothing.
untroubled() {
  _said=$(console "$1" | grep -E 'BUG|Oops|lockup|fail:|error:|invoked oom')
  same "$1 saw no kernel trouble" "" "$_said"
}

# ask NAME LINE REGEX [SECONDS]: types a line, prints the answer's lines that match.
ask() { offshoot send "$1" "$2" --expect "$3" --timeout "${4:-30}" | tr -d '\r'; }

# told WHAT NAME LINE REGEX [SECONDS]: passes if the guest answers so.
told() { check "$1" offshoot send "$2" "$3" --expect "$4" --timeout "${5:-30}"; }

# stamp NAME: starts the stamping program on its console; quits with `quit`.
stamp() { told "$1: stamp starts" "$1" stamp '(?m)^ok ready' || exit 1; }

# answer NAME LINE KEY [SECONDS]: the value of KEY= in stamp's answer, all of its line: a guest may stall in the middle of it.
answer() { ask "$1" "$2" '(?m)^(ok|err) .*\n' "${4:-30}" | grep -oE "$3=[^ ]*" | head -n 1 | cut -d = -f 2; }

# fork NAME COUNT [ARGUMENT…]: the children's names.
fork() {
  _parent=$1 _count=$2
  shift 2
  offshoot fork "$_parent" --count "$_count" "$@"
}
