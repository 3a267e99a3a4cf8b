# about: programs, files and ports of Linux guests by their agent: exit codes, streams, terminals, sessions, and forks among them
# needs: linux
# runs: 6.12/6.1 6.1/6.12
. /lab/lib.sh

# code WANTED COMMAND…: the exit code.
code() {
  _wanted=$1
  shift
  _said=$("$@" 2>&1 </dev/null)
  same "exit code $_wanted: $(echo "$*" | cut -c 10-70)" "$_wanted" $?
}
x() { offshoot exec "$@" </dev/null; }

boot a --agent
check "the agent answers" x a true || exit 1

code 7 offshoot exec a sh -c 'exit 7'
code 137 offshoot exec a sh -c 'kill -9 $$'
code 127 offshoot exec a no-such-program
code 126 offshoot exec a /etc/passwd
code 125 offshoot exec -w /no/such a true
code 125 offshoot exec -u nobody-here a true
code 124 offshoot exec --timeout 0.5 a sleep 60
code 125 offshoot exec nobody true
code 2 offshoot exec --fly a true
same "streams stay apart" "out" "$(x a sh -c 'echo out; echo err >&2' 2>/tmp/err)"
same "and both come" "err" "$(cat /tmp/err)"
same "input" "TYPED" "$(echo typed | offshoot exec -i a tr a-z A-Z)"
same "no input without -i" 0 "$(echo typed | offshoot exec a wc -c)"
same "environment and directory" "b c /tmp" "$(x -e 'A=b c' -w /tmp a sh -c 'echo $A $PWD')"
same "user" "77:88" "$(x -u 77:88 a sh -c 'echo $(id -u):$(id -g)')"
same "no terminal" "not a tty" "$(x a tty)"
expect "a terminal" '^/dev/pts/' offshoot exec -t a tty
head -c 3000000 /dev/urandom >/tmp/bytes
same "bytes pass as they are" "$(sha256sum </tmp/bytes)" "$(offshoot exec -i a cat </tmp/bytes | sha256sum)"

# Files: a tree, and 64 MiB, which the serial console would take an hour for.
mkdir -p /tmp/tree/sub && cp /tmp/bytes /tmp/tree/sub/ && ln -s sub/bytes /tmp/tree/link && chmod 750 /tmp/tree/sub
check "cp of a tree" offshoot cp /tmp/tree a:/tmp/copy
same "is whole" "$(sha256sum </tmp/bytes)" "$(x a sha256sum /tmp/copy/link | cut -d ' ' -f 1)  -"
check "and back" offshoot cp a:/tmp/copy /tmp/back
same "with modes and links" "750 sub/bytes" "$(stat -c %a /tmp/back/sub) $(readlink /tmp/back/link)"
same "as an archive" "copy/link" "$(offshoot cp a:/tmp/copy - | tar t | grep link)"
head -c 67108864 /dev/zero >/tmp/large
_begun=$(hundredths)
check "cp of 64 MiB" offshoot cp /tmp/large a:/tmp/large
_took=$(($(hundredths) - _begun))
note "64 MiB: ${_took}0 ms"
_begun=$(hundredths)
told "32 KiB by the console" a 'head -c 32768 /dev/zero | tr "\000" x; echo; echo done' '(?m)^done' 60
_console=$(($(hundredths) - _begun))
note "32 KiB by the console: ${_console}0 ms"
at_most "times the console's pace: a twentieth of its time for as much" $((_console * 2048 / 20)) "$_took"
rm -f /tmp/large && x a rm -f /tmp/large

# Ports.
check "a server in the guest" offshoot exec -d a sh -c 'mkdir -p /tmp/www; echo page >/tmp/www/index.html; exec httpd -f -p 127.0.0.1:80 -h /tmp/www'
ip link set lo up
offshoot forward a 0:80 >/tmp/ports &
_forward=$!
_tries=0
until grep -q : /tmp/ports || [ $_tries -ge 50 ]; do sleep 0.2 && _tries=$((_tries + 1)); done
port=$(grep -oE ':[0-9]+ ' /tmp/ports | tr -d ': ')
same "a page through a forwarded port" page "$(wget -q -O - "http://127.0.0.1:$port/" 2>&1)"
kill $_forward
wait $_forward
same "forward ends by a signal, with exit code" 0 $?

# Sessions.
x a mkfifo /tmp/fifo
offshoot exec a sh -c 'echo begun; read x </tmp/fifo; echo got $x; exit 5' </dev/null >/tmp/first 2>&1 &
_client=$!
sleep 2
kill -9 $_client
id=$(offshoot ps a | grep fifo | awk '{ print $1 }')
check "a program outlives its client" test -n "$id"
(sleep 2 && x a sh -c 'echo it >/tmp/fifo') &
_said=$(offshoot attach --no-stdin a "$id")
same "attach ends with its exit code" 5 $?
expect "and has what it wrote" 'got it' echo "$_said"
sleeper=$(x -d a sleep 1000)
check "kill" offshoot kill a "$sleeper" TERM
code 143 offshoot attach --no-stdin a "$sleeper"
offshoot exec a sleep 1000 </dev/null &
_client=$!
sleep 2
kill -INT $_client
wait $_client
same "a signal to exec is the program's" 130 $?

# Forks: the parent's streams go on, children's are other programs'.
offshoot exec a sh -c 'i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); echo line $i; [ $((i % 100)) -eq 0 ] && sleep 0.2; done' </dev/null >/tmp/lines &
_client=$!
sleep 1
children=$(fork a 5)
wait $_client
same "a stream of the parent survives five forks" "0 2000" "$? $(grep -c '^line' /tmp/lines)"
set -- $children
c1=$1 c2=$2
for n in 1 2 3; do
  x "$c1" sh -c 'seq 1 3000 | sed s/^/one/' >/tmp/one$n &
  x "$c2" sh -c 'seq 1 3000 | sed s/^/two/' >/tmp/two$n &
done
wait
same "streams of two clones never cross" "9000 9000" "$(cat /tmp/one? | grep -c '^one[0-9]*$') $(cat /tmp/two? | grep -c '^two[0-9]*$')"
same "clones know their names" "$c1 $c2" "$(x "$c1" hostname) $(x "$c2" hostname)"
same "and have random numbers of their own" 2 "$(for c in "$c1" "$c2"; do x "$c" sha256sum /proc/sys/kernel/random/uuid; done | sort -u | wc -l)"

untroubled a
# An agent that is gone.
told "the agent of a clone is killed" "$c1" 'for p in /proc/[0-9]*; do case $(readlink $p/exe) in */offshoot/agent) kill -9 ${p#/proc/};; esac; done; echo killed' '(?m)^killed'
refuse "exec says so" 125 offshoot exec "$c1" true
refuse "and others fail" 1 offshoot ps "$c1"
gone
