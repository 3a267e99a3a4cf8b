# about: clocks go on after a fork and never back; the pause as the guest sees it, against the built-in guest's
# needs: linux
# runs: 6.12/6.1
. /lab/lib.sh

boot a -m 256M
stamp a
told "the guest fills 64 MiB" a 'fill 64 5' '(?m)^ok pages=16384' 60
# A kernel that boots slowly loses seconds on the way, before it has a clock to count by.
lag=$(($(date +%s) - $(answer a clock realtime_us) / 1000000))
before=$(answer a clock monotonic_us)
# The watch runs on the guest's own clock while it is forked.
(answer a 'gap 4000' max_gap_us 60 >/tmp/gap) &
sleep 1.5
offshoot fork a --json >/tmp/forked
child=$(json name </tmp/forked)
moved=$(json moved_pages </tmp/forked)
wait
gap=$(cat /tmp/gap)
after=$(answer a clock monotonic_us)
in_child=$(answer "$child" clock monotonic_us)
at_most "the parent's clock went on (µs)" "$after" "$before"
at_most "the clone's clock is not behind the parent's (µs)" "$in_child" "$before"
# The clone was in the middle of its watch: it ends it, and its clock did not go back.
expect "the clone ends the watch it was forked in, not going back" 'max_gap_us=[0-9]+ back_us=0' console "$child"
same "seconds pass in the clone" yes "$(a=$(answer "$child" clock monotonic_us); sleep 2; b=$(answer "$child" clock monotonic_us); [ $((b - a)) -gt 1500000 ] && [ $((b - a)) -lt 8000000 ] && echo yes)"
asked=$(date +%s)
realtime=$(answer "$child" clock realtime_us)
at_most "the clone's wall clock is not ahead of ours, to 2 s" $(($(date +%s) + 2)) "$((realtime / 1000000))"
at_most "nor behind, to 2 s, but for what its parent was ($lag s)" "$((realtime / 1000000 + lag + 2))" "$asked"

offshoot rm a "$child"
check "launch the built-in guest" offshoot launch m -m 256M
check "it has as many pages to itself" offshoot send m fill 1000 "$moved" 5
(offshoot send m gap 4000 --timeout 60 >/tmp/mgap) &
sleep 1.5
check "fork of it" sh -c 'offshoot fork m --json >/tmp/mforked'
wait
reference=$(grep -oE 'max_gap_us=[0-9]+' /tmp/mgap | cut -d = -f 2)
note "longest gap: Linux $gap µs (its vCPU stood still for $(json pause_us </tmp/forked) µs)," \
  "built-in guest $reference µs ($(json pause_us </tmp/mforked) µs)"
at_most "the guest's pause is no longer than 3 times the built-in guest's (µs)" $((3 * reference)) "$gap"
gone
