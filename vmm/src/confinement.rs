//! What keeps a VM process apart, read back from `/proc`: not what it was told to do, and nothing that it says.

use crate::api::{Confinement, Limits};
use crate::wire::Isolation;
use nix::sys::statvfs::{FsFlags, statvfs};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Kinds of namespaces there are.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
/// Those of which a VM process has others than the server.
const APART: [&str; 4] = ["ipc", "mnt", "net", "uts"];
/// Threads that are looked at: ours have fewer by far. The root has nothing in it, and is not counted further either.
const MOST: usize = 128;
/// A thread that the kernel made for itself in a process, like KVM's: it runs no code of the process.
const PF_USER_WORKER: u64 = 0x4000;

/// Looks at a process that a server here, which is this process, has made. `how` is what it is to be kept apart by.
///
/// # Errors
/// It is gone, or not ours to look at.
pub fn of(pid: i32, how: Isolation) -> io::Result<Confinement> {
    let of = |name: &str| PathBuf::from(format!("/proc/{pid}")).join(name);
    let status = fs::read_to_string(of("status"))?;
    let (own_namespaces, shared_namespaces) = namespaces(&of("ns"))?;
    let threads = fs::read_dir(of("task"))?.take(MOST).flatten().map(|thread| thread.path());
    let mut confinement = Confinement {
        user: field(&status, "Uid:", 1).and_then(|id| id.parse().ok()).ok_or(io::ErrorKind::InvalidData)?,
        group: field(&status, "Gid:", 1).and_then(|id| id.parse().ok()).ok_or(io::ErrorKind::InvalidData)?,
        seccomp: if threads.into_iter().all(|thread| is_filtered(&thread)) { "filter" } else { "none" }.into(),
        no_new_privs: field(&status, "NoNewPrivs:", 0) == Some("1"),
        effective_capabilities: field(&status, "CapEff:", 0).unwrap_or("?").into(),
        bounding_capabilities: field(&status, "CapBnd:", 0).unwrap_or("?").into(),
        own_namespaces,
        shared_namespaces,
        root_entries: fs::read_dir(of("root")).ok().map(|all| all.take(MOST).count() as u64),
        root_read_only: statvfs(&of("root")).ok().map(|root| root.flags().contains(FsFlags::ST_RDONLY)),
        control_group: fs::read_to_string(of("cgroup")).ok().and_then(|groups| control_group(&groups)),
        limits: limits(&fs::read_to_string(of("limits"))?),
        weaknesses: Vec::new(),
    };
    confinement.weaknesses = weaknesses(&confinement, how, own_user());
    Ok(confinement)
}

fn own_user() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// Namespaces of a process that are not those of this one, and those that are.
fn namespaces(of: &Path) -> io::Result<(Vec<String>, Vec<String>)> {
    let (mut own, mut shared) = (Vec::new(), Vec::new());
    for kind in NAMESPACES {
        // A kernel may have been built without one.
        let Ok(ours) = fs::read_link(Path::new("/proc/self/ns").join(kind)) else { continue };
        let theirs = fs::read_link(of.join(kind))?;
        if theirs == ours { &mut shared } else { &mut own }.push(kind.to_owned());
    }
    Ok((own, shared))
}

/// Whether a thread is held to a filter, has ended, or is none of the process's own.
fn is_filtered(thread: &Path) -> bool {
    let Ok(status) = fs::read_to_string(thread.join("status")) else { return true };
    let filtered = field(&status, "Seccomp:", 0) == Some("2");
    filtered || fs::read_to_string(thread.join("stat")).is_ok_and(|stat| is_worker(&stat))
}

/// The flags are the seventh field behind the name, which may hold anything.
fn is_worker(stat: &str) -> bool {
    let flags = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_USER_WORKER != 0)
}

/// A word of a line of `status`.
fn field<'a>(status: &'a str, name: &str, word: usize) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().nth(word)
}

/// That of the one hierarchy of version 2; with version 1 that of the memory controller.
fn control_group(groups: &str) -> Option<String> {
    let of = |wanted: &dyn Fn(&str) -> bool| {
        let line = groups.lines().find(|line| line.split(':').nth(1).is_some_and(wanted))?;
        line.splitn(3, ':').nth(2).map(str::to_owned)
    };
    of(&|controllers| controllers.split(',').any(|one| one == "memory")).or_else(|| of(&str::is_empty))
}

fn limits(text: &str) -> Limits {
    // The name of a limit has spaces; behind it are the soft one, the hard one, and mostly a unit.
    let soft =
        |name: &str| text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok();
    Limits {
        open_files: soft("Max open files"),
        processes: soft("Max processes"),
        file_size_bytes: soft("Max file size"),
        locked_memory_bytes: soft("Max locked memory"),
        core_bytes: soft("Max core file size"),
        message_queue_bytes: soft("Max msgqueue size"),
    }
}

/// What is weaker than in a jail that a server makes.
fn weaknesses(found: &Confinement, how: Isolation, server: u32) -> Vec<String> {
    let none = |set: &str| !set.is_empty() && set.bytes().all(|digit| digit == b'0');
    let mut weak = Vec::new();
    let mut unless = |holds: bool, what: String| {
        if !holds {
            weak.push(what);
        }
    };
    let own = |kind: &str| found.own_namespaces.iter().any(|one| one == kind);
    let apart = found.user != server || own("user");
    unless(how != Isolation::Off && apart, format!("it runs as user {}, as the server does", found.user));
    unless(found.seccomp == "filter", "its system calls are not filtered".into());
    unless(found.no_new_privs, "it may get rights by executing something".into());
    unless(none(&found.effective_capabilities), format!("it has capabilities: {}", found.effective_capabilities));
    unless(none(&found.bounding_capabilities), format!("it may get capabilities: {}", found.bounding_capabilities));
    for kind in APART.into_iter().filter(|kind| !own(kind)) {
        unless(false, format!("its {kind} namespace is the server's"));
    }
    match found.root_entries {
        Some(0) => {}
        Some(_) => unless(false, "there are files in its root".into()),
        None => unless(false, "its root cannot be looked at".into()),
    }
    unless(found.root_read_only == Some(true), "its root is not read-only".into());
    unless(found.limits.core_bytes == Some(0), "it may leave core dumps".into());
    unless(found.limits.locked_memory_bytes == Some(0), "it may lock memory".into());
    for (limit, what) in
        [(found.limits.open_files, "open files"), (found.limits.file_size_bytes, "the size of its files")]
    {
        unless(limit.is_some(), format!("nothing limits {what}"));
    }
    weak
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Confinement {
        Confinement {
            user: 0x7000_0001,
            seccomp: "filter".into(),
            no_new_privs: true,
            effective_capabilities: "0000000000000000".into(),
            bounding_capabilities: "0000000000000000".into(),
            own_namespaces: APART.map(str::to_owned).into(),
            root_entries: Some(0),
            root_read_only: Some(true),
            limits: Limits {
                open_files: Some(8192),
                file_size_bytes: Some(1 << 26),
                locked_memory_bytes: Some(0),
                core_bytes: Some(0),
                ..Limits::default()
            },
            ..Confinement::default()
        }
    }

    #[test]
    fn what_is_weaker_is_told_one_by_one() {
        let weak = |change: fn(&mut Confinement)| {
            let mut found = good();
            change(&mut found);
            weaknesses(&found, Isolation::OwnUser, 0)
        };
        assert_eq!(weak(|_| {}), [""; 0]);
        type Change = fn(&mut Confinement);
        let changes: [(Change, &str); 12] = [
            (|found| found.user = 0, "it runs as user 0, as the server does"),
            (|found| found.seccomp = "none".into(), "its system calls are not filtered"),
            (|found| found.no_new_privs = false, "it may get rights by executing something"),
            (|found| found.effective_capabilities = "0000000000000001".into(), "it has capabilities: 0000000000000001"),
            (|found| found.bounding_capabilities = "?".into(), "it may get capabilities: ?"),
            (|found| found.own_namespaces.retain(|kind| kind != "net"), "its net namespace is the server's"),
            (|found| found.root_entries = Some(3), "there are files in its root"),
            (|found| found.root_entries = None, "its root cannot be looked at"),
            (|found| found.root_read_only = Some(false), "its root is not read-only"),
            (|found| found.limits.core_bytes = None, "it may leave core dumps"),
            (|found| found.limits.locked_memory_bytes = Some(65536), "it may lock memory"),
            (|found| found.limits.open_files = None, "nothing limits open files"),
        ];
        for (change, what) in changes {
            assert_eq!(weak(change), [what]);
        }
        let mut same_user = good();
        same_user.user = 1000;
        assert_eq!(
            weaknesses(&same_user, Isolation::UserNamespace, 1000),
            ["it runs as user 1000, as the server does"]
        );
        same_user.own_namespaces.push("user".into());
        assert_eq!(weaknesses(&same_user, Isolation::UserNamespace, 1000), [""; 0]);
        assert_eq!(weaknesses(&same_user, Isolation::Off, 1000).len(), 1);
    }

    #[test]
    fn texts_of_the_kernel_are_read() {
        assert!(is_worker("7 (kvm ) x) S 1 7 7 0 -1 4210752 0 0"), "0x404040");
        assert!(!is_worker("7 (kvm-nx-lpage) S 1 7 7 0 -1 4194368 0 0"), "a name is no proof");
        assert!(!is_worker("7 (x"));
        assert_eq!(control_group("12:pids:/\n7:cpu,memory:/a:b\n0::/c\n").as_deref(), Some("/a:b"));
        assert_eq!(control_group("0::/user.slice\n").as_deref(), Some("/user.slice"));
        assert_eq!(control_group("1:name=systemd:/\n"), None);
        let found = limits(
            "Limit    Soft Limit  Hard Limit  Units\nMax open files   1024   4096  files\nMax core file size  0  unlimited  bytes\nMax file size  unlimited  unlimited  bytes\n",
        );
        assert_eq!((found.open_files, found.core_bytes, found.file_size_bytes), (Some(1024), Some(0), None));
    }

    #[test]
    fn this_process_is_not_kept_apart() {
        let found = of(std::process::id() as i32, Isolation::Off).unwrap();
        assert_eq!(found.own_namespaces, [""; 0]);
        assert_eq!(found.user, own_user());
        assert!(found.shared_namespaces.iter().any(|kind| kind == "mnt") && found.root_entries > Some(0), "{found:?}");
        assert!(found.weaknesses.iter().any(|weak| weak.contains("as the server does")), "{found:?}");
        assert!(of(-1, Isolation::Off).is_err());
    }
}
