# about: the agent beside the init of a user's initial RAM disk, and as the init of its own, with modules found beside the kernel
# needs: linux
# runs: 6.12/6.1 6.1/6.12
. /lab/lib.sh

kept=${OFFSHOOT_HOME:-/tmp/offshoot-0}/initrds

boot a --agent
expect "the agent listens" 'offshoot-agent: listens on vsock port 1' console a
same "and has no trouble" "" "$(console a | grep 'offshoot-agent:' | grep -v listens)"
told "process 1 is the user's init" a 'readlink /proc/1/exe' '(?m)^/bin/busybox'
told "the agent is a process beside it" a 'for p in /proc/[0-9]*/exe; do readlink $p; done | grep -c offshoot/agent' '(?m)^1'
told "its modules are loaded" a 'grep -c "^vmw_vsock_virtio_transport " /proc/modules' '(?m)^1'
untroubled a

# Nothing of the user's: the agent brings the guest up, and stays.
check "launch b" offshoot launch b --kernel "$kernel" --agent || exit 1
check "the agent is its init" wait_log b 'offshoot-agent: listens on vsock port 1' 60
same "and has no trouble, either" "" "$(console b | grep 'offshoot-agent:' | grep -v listens)"
children=$(fork b 3 | tr '\n' ' ')
sleep 2
# shellcheck disable=SC2086
same "three clones of it run" 3 "$(offshoot ls | grep -E "^($(echo $children | tr ' ' '|')) " | grep -c running)"
check "two more, whose agents hear of it unasked" offshoot fork b heard1 heard2 --wait-agent=60000
for vm in heard1 heard2; do
  same "$vm has random numbers of its own" true "$(offshoot inspect $vm --json | json reseeded)"
  note "$vm: $(($(offshoot inspect $vm --json | json acked_us) / 1000)) ms to its agent's answer"
done
untroubled b

check "one of them is asked to power off" offshoot stop "${children%% *}"
expect "and does" '^off' offshoot wait "${children%% *}" --timeout 30

same "two initial RAM disks are kept" 2 "$(ls "$kept" | wc -l)"
check "launch c, as b" offshoot launch c --kernel "$kernel" --agent
same "which takes the same" 2 "$(ls "$kept" | wc -l)"

release=$(ls "/kernels/$LAB_INNER/lib/modules")
mkdir -p "/tmp/bare/lib/modules/$release/kernel"
cp "$kernel" /tmp/bare/vmlinuz
: >"/tmp/bare/lib/modules/$release/kernel/other.ko"
: >"/tmp/bare/lib/modules/$release/modules.builtin"
refuse "a kernel without the modules" 2 offshoot launch x --kernel /tmp/bare/vmlinuz --agent
refuse "two inits" 2 offshoot launch x --kernel "$kernel" --initrd /initrd.gz --cmdline "rdinit=/bin/sh" --agent
refuse "an agent without a kernel" 2 offshoot launch x --agent
gone
