# about: a server of an ordinary user: user namespaces for isolation, /dev/userfaultfd for traps
# runs: 6.12
. /lab/lib.sh

as_user() { su user -s /bin/sh -c "OFFSHOOT_HOME=/tmp/user-home exec \"\$@\"" -- sh "$@"; }
chmod 666 /dev/kvm /dev/userfaultfd
expect "not root" 'uid=1000' as_user id
expect "doctor: a user namespace" 'isolation +user namespace' as_user offshoot doctor
expect "doctor: userfaultfd" 'userfaultfd +yes' as_user offshoot doctor
check "launch" as_user offshoot launch a || exit 1
check "fill" as_user offshoot send a fill 1000 2000 7
check "fork" as_user offshoot fork a --count 3 --wait-settled
check "the parent writes" as_user offshoot send a fill 1000 100 8
check "a child has what was" as_user offshoot send a-3 verify 1000 2000 7
expect "check finds nothing broken" ' 0 broken' as_user offshoot check
check "rm" as_user offshoot rm --all
check "shutdown" as_user offshoot shutdown

chmod 600 /dev/userfaultfd
echo 0 >/proc/sys/vm/unprivileged_userfaultfd
expect "doctor without /dev/userfaultfd" 'userfaultfd +no' as_user offshoot doctor
check "launch without userfaultfd" as_user offshoot launch b || exit 1
check "fill" as_user offshoot send b fill 1000 500 7
check "fork without userfaultfd" as_user offshoot fork b
check "the child has the bytes" as_user offshoot send b-1 verify 1000 500 7
check "shutdown" as_user offshoot shutdown
