//! What a VM process may not do is tried, call by call, by real VM processes: each is ended for it, and nothing else happens.

use nix::errno::Errno;
use offshoot_tests::process::{descriptors, is_alive, users};
use offshoot_tests::puppet::{Called, Puppet};
use offshoot_tests::{
    Guest, Lack, Outcome, Served, Setup, TEN_SECONDS, TestHome, User, fork_settled, is_root, skip, wait_until,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use vmm::client::{ForkOptions, Vm};
use vmm::units::ByteSize;

/// What a call is to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The process is ended.
    Ended,
    /// The kernel does not know the call.
    Unknown,
}

type Attempt = (&'static str, libc::c_long, &'static [u64], Fate);

const KVM_CREATE_VM: u64 = 0xae01;
const KVM_CREATE_DEVICE: u64 = 0xc00c_aee0;
const EXECUTABLE: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const NOBODY: u64 = u64::MAX;

/// One for each rule, and for each kind of thing that no rule allows.
const ATTEMPTS: &[Attempt] = &[
    ("open a path", libc::SYS_openat, &[NOBODY, 0, 0], Fate::Unknown),
    ("open a path, the old way", libc::SYS_open, &[0, 0, 0], Fate::Unknown),
    ("change a mode", libc::SYS_fchmod, &[NOBODY, 0o777], Fate::Unknown),
    ("make a process of any kind", libc::SYS_clone3, &[0, 0], Fate::Unknown),
    ("open a path, the new way", libc::SYS_openat2, &[NOBODY, 0, 0, 0], Fate::Ended),
    ("fork", libc::SYS_clone, &[libc::SIGCHLD as u64], Fate::Ended),
    ("share memory with a process", libc::SYS_clone, &[(libc::CLONE_VM | libc::SIGCHLD) as u64], Fate::Ended),
    ("make a namespace", libc::SYS_clone, &[(libc::CLONE_NEWUSER | libc::SIGCHLD) as u64], Fate::Ended),
    ("fork, the old way", libc::SYS_fork, &[], Fate::Ended),
    ("vfork", libc::SYS_vfork, &[], Fate::Ended),
    ("unshare", libc::SYS_unshare, &[libc::CLONE_NEWUSER as u64], Fate::Ended),
    ("enter a namespace", libc::SYS_setns, &[NOBODY, 0], Fate::Ended),
    ("execute a program", libc::SYS_execve, &[0, 0, 0], Fate::Ended),
    ("execute a file", libc::SYS_execveat, &[NOBODY, 0, 0, 0, 0], Fate::Ended),
    ("connect", libc::SYS_socket, &[libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0], Fate::Ended),
    ("talk to the host", libc::SYS_socket, &[libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0], Fate::Ended),
    ("receive", libc::SYS_recvfrom, &[0, 0, 0, libc::MSG_DONTWAIT as u64, 0, 0], Fate::Ended),
    ("end a connection", libc::SYS_shutdown, &[0, libc::SHUT_RD as u64], Fate::Ended),
    ("make a pair of sockets", libc::SYS_socketpair, &[libc::AF_UNIX as u64, 1, 0, 0], Fate::Ended),
    ("end everything of its user", libc::SYS_kill, &[NOBODY, 0], Fate::Ended),
    ("signal to another process", libc::SYS_tgkill, &[1, 1, 0], Fate::Ended),
    ("signal to any thread", libc::SYS_tkill, &[1, 0], Fate::Ended),
    ("signal with a value", libc::SYS_rt_sigqueueinfo, &[1, 0, 0], Fate::Ended),
    ("hold a process", libc::SYS_pidfd_open, &[1, 0], Fate::Ended),
    ("trace", libc::SYS_ptrace, &[libc::PTRACE_ATTACH as u64, 1, 0, 0], Fate::Ended),
    ("read another's memory", libc::SYS_process_vm_readv, &[1, 0, 0, 0, 0, 0], Fate::Ended),
    ("write another's memory", libc::SYS_process_vm_writev, &[1, 0, 0, 0, 0, 0], Fate::Ended),
    ("compare processes", libc::SYS_kcmp, &[1, 1, 0, 0, 0], Fate::Ended),
    ("limit another process", libc::SYS_prlimit64, &[1, libc::RLIMIT_NOFILE as u64, 0, 0], Fate::Ended),
    ("move another process", libc::SYS_sched_setaffinity, &[1, 0, 0], Fate::Ended),
    ("be nice for others", libc::SYS_setpriority, &[0, 1, 19], Fate::Ended),
    ("outlive the server", libc::SYS_prctl, &[libc::PR_SET_PDEATHSIG as u64, 0], Fate::Ended),
    ("be dumped", libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as u64, 1], Fate::Ended),
    ("become somebody", libc::SYS_setresuid, &[0, 0, 0], Fate::Ended),
    ("have the server wait", libc::SYS_fcntl, &[0, libc::F_SETFL as u64, 0], Fate::Ended),
    ("be sent signals", libc::SYS_fcntl, &[0, libc::F_SETOWN as u64, 0], Fate::Ended),
    ("have the server wait, by another call", libc::SYS_ioctl, &[0, libc::FIONBIO, 0], Fate::Ended),
    ("make a KVM VM", libc::SYS_ioctl, &[0, KVM_CREATE_VM, 0], Fate::Ended),
    ("make a device of KVM's", libc::SYS_ioctl, &[0, KVM_CREATE_DEVICE, 0], Fate::Ended),
    ("type on a terminal", libc::SYS_ioctl, &[0, libc::TIOCSTI, 0], Fate::Ended),
    ("map code", libc::SYS_mmap, &[0, 4096, EXECUTABLE, PRIVATE, NOBODY, 0], Fate::Ended),
    ("make code of data", libc::SYS_mprotect, &[0, 4096, EXECUTABLE], Fate::Ended),
    ("the same with a key", libc::SYS_pkey_mprotect, &[0, 4096, EXECUTABLE, 0], Fate::Ended),
    ("remap a file's pages", libc::SYS_remap_file_pages, &[0, 4096, 0, 0, 0], Fate::Ended),
    ("catch faults", libc::SYS_userfaultfd, &[0], Fate::Ended),
    ("make a ring", libc::SYS_io_uring_setup, &[1, 0], Fate::Ended),
    ("count events", libc::SYS_perf_event_open, &[0, 0, NOBODY, NOBODY, 0], Fate::Ended),
    ("load a program into the kernel", libc::SYS_bpf, &[0, 0, 0], Fate::Ended),
    ("add a key", libc::SYS_add_key, &[0, 0, 0, 0, 0], Fate::Ended),
    ("use keys", libc::SYS_keyctl, &[0, 0, 0, 0, 0], Fate::Ended),
    ("mount", libc::SYS_mount, &[0, 0, 0, 0, 0], Fate::Ended),
    ("leave its root", libc::SYS_chroot, &[0], Fate::Ended),
    ("make a directory", libc::SYS_mkdir, &[0, 0o777], Fate::Ended),
    ("have secret memory", libc::SYS_memfd_secret, &[0], Fate::Ended),
    ("share memory by key", libc::SYS_shmget, &[0, 4096, 0o1000], Fate::Ended),
    ("queue messages", libc::SYS_msgget, &[0, 0o1000], Fate::Ended),
    ("move descriptors out of the way", libc::SYS_dup2, &[0, 1], Fate::Ended),
    ("loosen its filter", libc::SYS_seccomp, &[1, 0, 0], Fate::Ended),
    ("make a pipe", libc::SYS_pipe2, &[0, 0], Fate::Ended),
    ("32-bit personality", libc::SYS_personality, &[8], Fate::Ended),
];

/// What a vCPU's thread may not do: what the main one may, and with sockets of the guest's connections what would wait.
const OF_MAIN: &[Attempt] = &[
    ("receive", libc::SYS_recvmsg, &[0, 0, 0], Fate::Ended),
    ("have memory of its own", libc::SYS_memfd_create, &[0, 0], Fate::Ended),
    ("copy the process", libc::SYS_clone, &[(libc::CLONE_PARENT | libc::SIGCHLD) as u64], Fate::Ended),
    ("read the dirty log", libc::SYS_ioctl, &[0, 0x4010_ae42, 0], Fate::Ended),
    ("turn traps off", libc::SYS_ioctl, &[0, 0x8010_aa01, 0], Fate::Ended),
    ("wait for events", libc::SYS_epoll_wait, &[0, 0, 0, 0], Fate::Ended),
    ("have another name", libc::SYS_prctl, &[libc::PR_SET_NAME as u64, 0], Fate::Ended),
    ("receive, and wait", libc::SYS_recvfrom, &[0, 0, 0, 0, 0, 0], Fate::Ended),
    ("end both ways", libc::SYS_shutdown, &[0, libc::SHUT_RDWR as u64], Fate::Ended),
    ("watch in another way", libc::SYS_epoll_ctl, &[0, 9, 0, 0], Fate::Ended),
];

/// What the keeper may not do, in whose memory a process that is taken over can write.
const OF_KEEPER: &[Attempt] = &[
    ("read", libc::SYS_read, &[0, 0, 0], Fate::Ended),
    ("map", libc::SYS_mmap, &[0, 4096, 0, PRIVATE, NOBODY, 0], Fate::Ended),
    ("make a copy", libc::SYS_clone, &[(libc::CLONE_PARENT | libc::SIGCHLD) as u64], Fate::Ended),
    ("outlive the server", libc::SYS_prctl, &[libc::PR_SET_NAME as u64, 0], Fate::Ended),
    ("open a path", libc::SYS_openat, &[NOBODY, 0, 0], Fate::Ended),
];

/// Tries all in processes of their own: children of one VM, so that all is as it is when clones run.
fn try_all(home: &TestHome, vm: &Vm, thread: impl Fn(&Vm) -> i32, attempts: &[Attempt]) {
    let children = vm.fork(ForkOptions::new().count(attempts.len() as u32).wait_settled(true)).expect("fork");
    for (child, &(what, number, arguments, fate)) in children.iter().zip(attempts) {
        let thread = thread(&child.vm);
        let Some(mut puppet) = Puppet::take(thread) else { return };
        let called = puppet.call(number, arguments);
        drop(puppet);
        match fate {
            Fate::Ended => {
                assert_eq!(called, Called::Ended, "{what}");
                wait_until("it has ended", TEN_SECONDS, || !is_alive(thread));
            }
            Fate::Unknown => {
                assert_eq!(called, Called::Failed(Errno::ENOSYS), "{what}");
                child.vm.say("id");
            }
        }
    }
    home.cli(&["ls"]).good();
    vm.verify(1000..1100, 1);
    home.client().remove(children.iter().map(|child| child.vm.name().to_owned())).expect("remove");
}

fn parent(home: &TestHome) -> Vm {
    let vm = home.launch("a", ByteSize::mib(32));
    vm.fill(1000..1100, 1);
    vm
}

/// No rule of the filter is without a call that it forbids, and each of those ends the process that makes it, and nothing
/// else.
#[test]
fn what_no_rule_allows_ends_the_process() {
    let Some(home) = TestHome::new() else { return };
    let vm = parent(&home);
    try_all(&home, &vm, |vm| vm.pid(), ATTEMPTS);
    home.check();
}

/// A vCPU's thread, which is the first that a guest gets hold of.
#[test]
fn a_vcpus_thread_does_less_than_the_main_one() {
    let Some(home) = TestHome::new() else { return };
    let vm = parent(&home);
    let vcpu = |vm: &Vm| {
        let threads = fs::read_dir(format!("/proc/{}/task", vm.pid())).expect("list threads").flatten();
        let named = |path: &Path| fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim_end() == "vcpu0");
        let found = threads.map(|entry| entry.path()).find(|path| named(path)).expect("a VM has a vCPU");
        found.file_name().and_then(|name| name.to_str()?.parse().ok()).expect("a thread has a number")
    };
    try_all(&home, &vm, vcpu, OF_MAIN);
}

#[test]
fn a_keeper_does_nothing() {
    let Some(home) = TestHome::new() else { return };
    let vm = parent(&home);
    let keeper = |vm: &Vm| {
        let is_keeper = |pid: &i32| users(*pid) == users(vm.pid()) && descriptors(*pid).is_empty();
        home.processes().into_iter().find(is_keeper).expect("a VM process has a keeper")
    };
    if !is_root() {
        return skip(Lack::Root, "only root gives VM processes users by which their keepers can be told");
    }
    try_all(&home, &vm, keeper, OF_KEEPER);
}

/// Every process that a guest could get hold of is held to rules, may not get rights, and is ended before the server when
/// memory is short.
#[test]
fn all_processes_are_confined() {
    let Some(home) = TestHome::new() else { return };
    let vm = parent(&home);
    let child = fork_settled(&vm, 1).remove(0);
    let status = |pid: i32| fs::read_to_string(format!("/proc/{pid}/status")).expect("read a process's status");
    let oom = |pid: i32| {
        let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?;
        Some(score.trim_end().parse::<i32>().expect("a number"))
    };
    let server = home.server().expect("it runs");
    for pid in home.processes() {
        // One that was prepared for nothing may end meanwhile.
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten() {
            let status = || fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let name = status().lines().next().unwrap_or_default().to_owned();
            // A worker of KVM's is none of ours.
            if name.contains("vcpu") || name.contains("offshoot") {
                // One that prepares itself gets there.
                let confined = || !task.path().exists() || status().contains("Seccomp:\t2");
                wait_until("it is held to rules", TEN_SECONDS, confined);
                assert!(!task.path().exists() || status().contains("NoNewPrivs:\t1"), "{pid}: {}", status());
            }
        }
        assert!(oom(pid).is_none_or(|score| score == 300), "{pid}");
    }
    for pid in [vm.pid(), child.pid(), home.zygote().expect("there is a zygote")] {
        assert_eq!(oom(pid), Some(300));
    }
    // Root may go below what it was started with, where it has CAP_SYS_RESOURCE.
    assert!(oom(server).is_some_and(|score| score <= 0), "{:?}", oom(server));
    let limits = fs::read_to_string(format!("/proc/{}/limits", child.pid())).expect("read limits");
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("a limit");
        line.split_whitespace().next().expect("a limit").to_owned()
    };
    let file = ByteSize::mib(32 + 64).0.to_string();
    for (name, most) in [
        ("Max core file size", "0"),
        ("Max locked memory", "0"),
        ("Max msgqueue size", "0"),
        ("Max file size", file.as_str()),
    ] {
        assert_eq!(limit(name), most, "{name}: {limits}");
    }
    assert!(limit("Max open files").parse::<u32>().expect("a number") <= 8192, "{limits}");
    assert!(status(child.pid()).contains("CapBnd:\t0000000000000000"), "{}", status(child.pid()));
    if is_root() {
        assert_eq!(limit("Max processes"), "13", "{limits}");
    }
}

/// Each limit is tried: up to it, and one beyond.
#[test]
fn no_limit_gives_way() {
    let Some(home) = TestHome::new() else { return };
    let vm = parent(&home);
    let pid = fork_settled(&vm, 1).remove(0).pid();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("read limits");
    let limit = |name: &str| -> u64 {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("a limit");
        line.split_whitespace().next().and_then(|most| most.parse().ok()).expect("a number")
    };
    let Some(mut puppet) = Puppet::take(pid) else { return };
    // Open files, by the numbers that they may have.
    let name = puppet.stack();
    let Called::Gave(file) = puppet.call(libc::SYS_memfd_create, &[name, 0]) else { panic!("no memory of its own") };
    let last = limit("Max open files") - 1;
    let duplicate = [file, libc::F_DUPFD_CLOEXEC as u64, last];
    assert_eq!(puppet.call(libc::SYS_fcntl, &duplicate), Called::Gave(last));
    assert_eq!(puppet.call(libc::SYS_fcntl, &duplicate), Called::Failed(Errno::EMFILE));
    // Locked memory: none.
    let locked = PRIVATE | libc::MAP_LOCKED as u64;
    assert_eq!(puppet.call(libc::SYS_mmap, &[0, 4096, 0, locked, NOBODY, 0]), Called::Failed(Errno::EPERM));
    // Processes of its user, all that it is made of included.
    let (most, mut made) = (limit("Max processes"), 0);
    if is_root() {
        let last = loop {
            match puppet.make_process(libc::CLONE_PARENT | libc::SIGCHLD) {
                Called::Gave(_) if made < most => made += 1,
                last => break last,
            }
        };
        assert_eq!(last, Called::Failed(Errno::EAGAIN), "after {made} of {most}");
        assert!(made > 0 && made < most, "{made} of {most}");
    }
    // The size of a file; who goes beyond is ended for it.
    let size = limit("Max file size");
    assert_eq!(puppet.call(libc::SYS_ftruncate, &[file, size]), Called::Gave(0));
    assert_eq!(puppet.call(libc::SYS_ftruncate, &[file, size + 1]), Called::Failed(Errno::EFBIG));
    drop(puppet);
    wait_until("it has ended", TEN_SECONDS, || !is_alive(pid));
    vm.verify(1000..1100, 1);
    home.check();
}

/// Nothing of the host is to be seen from where VMs are made, and where one ends up there is nothing at all.
#[test]
fn all_processes_are_in_the_jail() {
    for user in [User::Same, User::Ordinary(12345)] {
        let Some(home) = (Setup { user, ..Setup::default() }).home() else { return };
        home.cli(&["launch", "a", "--mem", "32M"]).good();
        home.cli(&["fork", "a"]).good();
        let zygote = home.zygote().expect("there is a zygote");
        let namespace = |pid: i32, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).ok();
        let server = home.server().expect("it runs");
        for pid in home.processes().into_iter().chain([zygote]) {
            for name in ["mnt", "net", "ipc", "uts"] {
                // One that was prepared for nothing may end meanwhile.
                let same = namespace(pid, name) == namespace(zygote, name) || !is_alive(pid);
                assert!(same && namespace(zygote, name).is_some(), "{user:?}: {pid}: {name}");
                assert_ne!(namespace(zygote, name), namespace(server, name), "{user:?}: {pid}: {name}");
            }
            if pid != zygote {
                // One that prepares itself gets there; one that was prepared for nothing may end meanwhile.
                let is_empty =
                    || fs::read_dir(format!("/proc/{pid}/root")).map_or(!is_alive(pid), |all| all.count() == 0);
                wait_until("it sees no file", TEN_SECONDS, is_empty);
            }
        }
        let mounts = fs::read_to_string(format!("/proc/{zygote}/mountinfo")).expect("list mounts");
        let mut points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        assert!(points.clone().count() > 2, "{mounts}");
        assert!(points.all(|at| at == "/" || at.starts_with("/dev/") || at.starts_with("/proc")), "{mounts}");
        let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).expect("there is a root");
        let flags = root.split(' ').nth(5).unwrap_or_default();
        assert_eq!(flags.split(',').take(4).collect::<Vec<_>>(), ["ro", "nosuid", "nodev", "noexec"], "{root}");
        home.cli(&["check"]).good();
    }
}

/// A launch where users or namespaces were not to be had was as good as any, and said nothing.
#[test]
fn what_cannot_be_kept_apart_does_not_run_unless_it_is_allowed() {
    let setup = Setup { user: User::WithoutAdmin, ..Setup::default() };
    let Some(home) = setup.clone().home() else { return };
    let why = home.cli(&["launch", "a", "--mem", "32M"]).failure(1);
    assert!(why.contains("namespaces") && why.contains("--isolation weaker"), "{why}");
    let doctor = home.cli(&["doctor"]);
    assert!(doctor.code == 1 && doctor.out.contains("--isolation weaker"), "{doctor:?}");
    drop(home);
    let Some(home) = setup.home() else { return };
    let _server = Served::new(&home, &["--isolation", "weaker"]);
    home.cli(&["launch", "a", "--mem", "32M"]).good();
    home.cli(&["fork", "a"]).good();
    assert!(home.server_log().contains("are not kept apart as they should be"));
}

/// Of the root of a rootless container `doctor` said that its VM processes had users of their own, and every launch failed.
#[test]
fn root_of_a_namespace_has_vms() {
    let Some(home) = (Setup { user: User::RootOfNamespace, ..Setup::default() }).home() else { return };
    assert!(home.cli(&["doctor"]).good().contains("user namespace"));
    home.cli(&["launch", "a", "--mem", "32M"]).good();
    home.cli(&["send", "a", "fill 1000 100 1"]).good();
    home.cli(&["fork", "a"]).good();
    home.cli(&["send", "a-1", "verify 1000 100 1"]).good();
    home.cli(&["check"]).good();
}

/// Where the kernel cannot hold a process to rules, no VM is started, and it is told why.
#[test]
fn without_a_filter_there_are_no_vms() {
    let Some(home) = TestHome::new() else { return };
    let without = |arguments: &[&str]| {
        let mut command = home.command(arguments);
        let rules = [(libc::SYS_seccomp, Vec::new())].into_iter().collect();
        let refused = SeccompAction::Errno(libc::ENOSYS as u32);
        let filter =
            SeccompFilter::new(rules, SeccompAction::Allow, refused, TargetArch::x86_64).expect("make a filter");
        let filter: BpfProgram = filter.try_into().expect("make a filter");
        #[allow(unsafe_code)]
        // SAFETY: Between fork and exec, two system calls are made.
        unsafe {
            command.pre_exec(move || seccompiler::apply_filter(&filter).map_err(std::io::Error::other));
        }
        Outcome::new(arguments.join(" "), command.output().expect("run a command"))
    };
    let why = without(&["launch", "a", "--mem", "32M"]).failure(1);
    assert!(why.contains("system call filter"), "{why}");
    let doctor = without(&["doctor"]);
    assert!(doctor.code != 0 && doctor.out.contains("CONFIG_SECCOMP_FILTER"), "{doctor:?}");
}
