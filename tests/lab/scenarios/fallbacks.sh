# about: what a host lacks: no PAGEMAP_SCAN (Linux 6.1), no userfaultfd; forks work and doctor says so
# runs: 6.1 6.12
. /lab/lib.sh

family() {
  check "$1: launch" offshoot launch a || exit 1
  check "$1: fill" offshoot send a fill 1000 3000 7
  check "$1: fork" offshoot fork a --count 2 --wait-settled
  check "$1: the parent writes" offshoot send a fill 1000 1000 8
  check "$1: a child has what was" offshoot send a-1 verify 1000 3000 7
  check "$1: a grandchild" offshoot fork a-2 --name g
  check "$1: it has what was" offshoot send g-1 verify 1000 3000 7
  check "$1: the parent has its own" offshoot send a verify 1000 1000 8
  expect "$1: check finds nothing broken" ' 0 broken' offshoot check
  gone
}

case $LAB_OUTER in
  6.1) expect "doctor: no PAGEMAP_SCAN" 'PAGEMAP_SCAN +no' offshoot doctor ;;
  *) expect "doctor: PAGEMAP_SCAN" 'PAGEMAP_SCAN +yes' offshoot doctor ;;
esac
family "as it is"

export OFFSHOOT_DISABLE=pagemap-scan
[ "$LAB_OUTER" = 6.1 ] || expect "doctor: PAGEMAP_SCAN off" 'PAGEMAP_SCAN +off' offshoot doctor
family "no PAGEMAP_SCAN"

export OFFSHOOT_DISABLE=userfaultfd
expect "doctor: userfaultfd off" 'userfaultfd +off' offshoot doctor
family "no userfaultfd"
