//! The server reads what hostile processes say. What no server needs it has given up, which is tried with its own hands.

use nix::errno::Errno;
use offshoot_tests::puppet::{Called, Puppet};
use offshoot_tests::{Guest, Setup, TEN_SECONDS, TestHome, User, process, wait_until};
use std::fs;
use std::path::Path;
use vmm::client::ForkOptions;
use vmm::units::ByteSize;

const NOBODY: u64 = u64::MAX;

/// One of each kind. With these arguments each would fail in another way, or not at all, if it were made.
const REFUSED: &[(&str, libc::c_long, &[u64])] = &[
    ("trace itself", libc::SYS_ptrace, &[libc::PTRACE_TRACEME as u64, 0, 0, 0]),
    ("write another's memory", libc::SYS_process_vm_writev, &[NOBODY, 0, 0, 0, 0, 1]),
    ("take descriptors", libc::SYS_pidfd_getfd, &[NOBODY, 0, 0]),
    ("load a program into the kernel", libc::SYS_bpf, &[NOBODY, 0, 0]),
    ("count events", libc::SYS_perf_event_open, &[0, 0, NOBODY, NOBODY, 0]),
    ("load a module", libc::SYS_finit_module, &[NOBODY, 0, 0]),
    ("remove a module", libc::SYS_delete_module, &[0, 0]),
    ("load another kernel", libc::SYS_kexec_load, &[0, 0, 0, NOBODY]),
    ("restart the host", libc::SYS_reboot, &[0, 0, 0, 0]),
    ("use keys", libc::SYS_keyctl, &[NOBODY, 0, 0, 0, 0]),
    ("add a key", libc::SYS_add_key, &[0, 0, 0, 0, 0]),
    ("make a ring", libc::SYS_io_uring_setup, &[0, 0]),
    ("set the clock", libc::SYS_clock_settime, &[NOBODY, 0]),
    ("enter a namespace", libc::SYS_setns, &[NOBODY, 0]),
    ("open past directories", libc::SYS_open_by_handle_at, &[NOBODY, 0, 0]),
    ("make a device", libc::SYS_mknodat, &[NOBODY, 0, 0, 0]),
    ("mount the new way", libc::SYS_fsopen, &[0, 0]),
    ("use a port", libc::SYS_iopl, &[0]),
    ("talk to a network", libc::SYS_socket, &[libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0]),
    ("talk to the kernel", libc::SYS_socket, &[libc::AF_NETLINK as u64, libc::SOCK_RAW as u64, 0]),
    ("talk to VMs of the host", libc::SYS_socket, &[libc::AF_VSOCK as u64, libc::SOCK_STREAM as u64, 0]),
];

/// Each thread of a process, by what its status says.
fn all_threads(pid: i32, holds: impl Fn(&str) -> bool) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("list threads").flatten();
    threads.map(|thread| fs::read_to_string(thread.path().join("status")).unwrap_or_default()).all(|s| holds(&s))
}

fn capabilities(pid: i32, set: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read a process's status");
    let line = status.lines().find_map(|line| line.strip_prefix(set)).expect("a set of capabilities");
    u64::from_str_radix(line.trim_matches(|c: char| c == ':' || c.is_whitespace()), 16).expect("a number")
}

#[test]
fn what_no_server_needs_is_refused() {
    let Some(home) = TestHome::new() else { return };
    // By somebody else: who has started it waits for it, and would be told in our place that it stands.
    home.cli(&["budget", "none"]).good();
    let vm = home.launch("a", ByteSize::mib(32));
    vm.fill(1000..1100, 1);
    let server = home.server().expect("it runs");
    let Some(mut puppet) = Puppet::take_idle(server) else { return };
    for (what, number, arguments) in REFUSED {
        assert_eq!(puppet.call(*number, arguments), Called::Failed(Errno::EPERM), "{what}");
    }
    // A socket of its own kind it may have.
    let unix = &[libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0];
    assert!(matches!(puppet.call(libc::SYS_socket, unix), Called::Gave(_)));
    drop(puppet);
    // It goes on as before, and all that it does works: another zygote, another jail, swap, forks.
    let zygote = home.zygote().expect("there is a zygote");
    process::kill(zygote);
    wait_until("it is gone", TEN_SECONDS, || home.zygote() != Some(zygote));
    home.launch("b", ByteSize::mib(48)).say("id");
    assert!(home.zygote().is_some_and(|another| another != zygote));
    home.cli(&["reclaim", "--all", "4M"]).good();
    let child = vm.fork(ForkOptions::new().wait_settled(true)).expect("fork").remove(0).vm;
    child.verify(1000..1100, 1);
    home.check();
}

#[test]
fn all_its_threads_and_children_are_held_to_it() {
    for user in [User::Same, User::Ordinary(12347), User::RootOfNamespace] {
        let Some(home) = (Setup { user, ..Setup::default() }).home() else { return };
        home.cli(&["launch", "a", "--memory", "32M"]).good();
        let server = home.server().expect("it runs");
        let zygote = home.zygote().expect("there is a zygote");
        for pid in [server, zygote] {
            let held = |status: &str| status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1");
            assert!(all_threads(pid, held), "{user:?}: {pid}");
        }
        // SYS_MODULE, SYS_RAWIO, SYS_BOOT, SYS_TIME, NET_ADMIN, NET_RAW, MKNOD, SYSLOG, PERFMON, BPF.
        let dangerous = [16, 17, 22, 25, 12, 13, 27, 34, 38, 39].into_iter().fold(0_u64, |all, one| all | 1 << one);
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert_eq!(capabilities(server, set) & dangerous, 0, "{user:?}: {set}");
        }
        // Where it may change the bounding set at all.
        if user == User::Same && offshoot_tests::is_root() {
            assert_eq!(capabilities(server, "CapBnd") & dangerous, 0);
            assert_eq!(capabilities(zygote, "CapBnd"), 0);
        }
        assert!(Path::new("/proc/self/status").exists() && home.cli(&["check"]).code == 0);
    }
}
