//! Takes away from a VM process what it does not need, before its guest runs.
#![allow(unsafe_code)] // prctl and capset, which have no safe wrapper

use super::landlock;
use crate::host::USERS;
use crate::link::MESSAGE_MAX;
use crate::wire::Isolation;
use guest_mem::PageCount;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::{set_dumpable, set_no_new_privs, set_pdeathsig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid, chdir, chroot, getpid, getppid, setgroups, setresgid, setresuid};
use std::path::Path;

/// The user and group id of a VM process is this plus its process id.
const FIRST_ID: u32 = USERS.start as u32;

/// The VM process, as one was or is, that this user id was made for.
pub fn process_of_user(user: u32) -> Option<Pid> {
    user.checked_sub(FIRST_ID).and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw)
}

/// A step of the isolation failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {cause}")]
pub(super) struct IsolateError {
    step: &'static str,
    cause: Errno,
}

pub(super) fn during(step: &'static str) -> impl FnOnce(Errno) -> IsolateError {
    move |cause| IsolateError { step, cause }
}

/// Threads and processes that a VM process is beside its vCPUs: the main thread, the keeper, a copy, and who helps with a freeze.
const COMPANY: u64 = 12;

/// Descriptors that a VM process may have: while it starts, one for each store of which it sees a page.
const DESCRIPTORS: u64 = 8192;

/// Limits what this process may use of the host beside memory that is accounted. No file of its own, be it one without a
/// name, is larger than its guest's memory and what goes with that in a message.
pub(super) fn limit(how: Isolation, vcpus: u8, ram: PageCount) -> Result<(), IsolateError> {
    let set = |what, name, most: u64| setrlimit(what, most, most).map_err(during(name));
    set(Resource::RLIMIT_CORE, "RLIMIT_CORE", 0)?;
    set(Resource::RLIMIT_MEMLOCK, "RLIMIT_MEMLOCK", 0)?;
    set(Resource::RLIMIT_MSGQUEUE, "RLIMIT_MSGQUEUE", 0)?;
    set(Resource::RLIMIT_FSIZE, "RLIMIT_FSIZE", ram.bytes() + MESSAGE_MAX)?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).map_err(during("RLIMIT_NOFILE"))?;
    set(Resource::RLIMIT_NOFILE, "RLIMIT_NOFILE", DESCRIPTORS.min(most))?;
    if how == Isolation::OwnUser {
        // Of a user that has no other process.
        let most = u64::from(vcpus) + COMPANY;
        set(Resource::RLIMIT_NPROC, "RLIMIT_NPROC", most)?;
    }
    Ok(())
}

/// Has nothing that is executed from here on get a right that its file would give it.
pub(super) fn empty_bounding_set() -> Result<(), IsolateError> {
    drop_from_bounding_set(|_| true).map_err(during("an empty bounding set"))
}

/// When memory is short, the kernel is to end VMs and not the server, with which all of them would end.
pub(super) fn offer_to_oom_killer() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "300") {
        log::warn!("oom_score_adj: {error}");
    }
}

/// Isolates this process, which has one thread, with `cage`, an empty directory, as its root.
///
/// Descriptors that are open stay open: KVM, the userfaultfd, the pagemap and the socket are all it has left.
pub(super) fn isolate(how: Isolation, cage: &Path) -> Result<(), IsolateError> {
    match how {
        Isolation::Off => {}
        Isolation::OwnUser => {
            enter(cage)?;
            let id = FIRST_ID + getpid().as_raw().unsigned_abs();
            setgroups(&[]).map_err(during("setgroups"))?;
            let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
            setresgid(gid, gid, gid).map_err(during("setresgid"))?;
            // Leaving user 0 drops all capabilities.
            setresuid(uid, uid, uid).map_err(during("setresuid"))?;
        }
        Isolation::UserNamespace => {
            unshare(CloneFlags::CLONE_NEWUSER).map_err(during("unshare(CLONE_NEWUSER)"))?;
            enter(cage)?;
            // Who makes a user namespace may get every right there is, in that.
            empty_bounding_set()?;
            drop_capabilities().map_err(during("capset"))?;
        }
    }
    // What a filter of system calls needs, too.
    set_no_new_privs().map_err(during("PR_SET_NO_NEW_PRIVS"))?;
    match landlock::enter() {
        Ok(how) => log::debug!("Landlock: {how:?}"),
        // A wall behind others.
        Err(error) => log::warn!("Landlock: {error}"),
    }
    if how == Isolation::UserNamespace {
        // The server, the same user outside, reads moved pages out of this process.
        set_dumpable(true).map_err(during("PR_SET_DUMPABLE"))?;
    }
    Ok(())
}

/// Has the kernel end this process when `server`, or rather the thread that made this process, ends. To be called again
/// after every change of user, which undoes it.
pub(super) fn die_with(server: Pid) -> Result<(), IsolateError> {
    set_pdeathsig(Signal::SIGKILL).map_err(during("PR_SET_PDEATHSIG"))?;
    if getppid() == server { Ok(()) } else { Err(IsolateError { step: "the server is gone", cause: Errno::ESRCH }) }
}

fn enter(cage: &Path) -> Result<(), IsolateError> {
    chroot(cage).map_err(during("chroot to the cage"))?;
    chdir("/").map_err(during("chdir"))
}

/// Opens files as somebody who may not look at the host: what `open` gives shows no more afterwards, whoever reads it. The
/// pagemap tells a descriptor that was opened with this right where in the host's memory pages are.
pub(super) fn without_admin<T>(open: impl FnOnce() -> T) -> Result<T, IsolateError> {
    const CAP_SYS_ADMIN: u32 = 21;
    let before = capabilities().map_err(during("capget"))?;
    let mut without = before;
    without[0][0] &= !(1 << CAP_SYS_ADMIN);
    set_capabilities(&without).map_err(during("capset"))?;
    let opened = open();
    set_capabilities(&before).map_err(during("capset"))?;
    Ok(opened)
}

/// Drops all capabilities of this process, which has one thread, but these, and has nothing that it executes get others.
pub fn keep_capabilities(kept: &[u32]) -> Result<(), Errno> {
    const CAP_SETPCAP: u32 = 8;
    let mut sets = capabilities()?;
    let has = |sets: &Sets, capability: u32| sets[capability as usize / 32][0] >> (capability % 32) & 1 == 1;
    // Who may not change the bounding set has nothing to drop.
    if has(&sets, CAP_SETPCAP) {
        drop_from_bounding_set(|capability| !kept.contains(&capability))?;
    }
    for (word, set) in (0..).zip(&mut sets) {
        let mask = kept.iter().filter(|kept| **kept / 32 == word).fold(0, |mask, kept| mask | 1_u32 << (kept % 32));
        *set = set.map(|bits| bits & mask);
    }
    set_capabilities(&sets)
}

fn drop_from_bounding_set(which: impl Fn(u32) -> bool) -> Result<(), Errno> {
    for capability in (0..64).filter(|capability| which(*capability)) {
        // SAFETY: The call takes numbers alone.
        match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, u64::from(capability), 0, 0, 0) }) {
            Ok(_) => {}
            // This kernel knows no more.
            Err(Errno::EINVAL) => break,
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}

fn drop_capabilities() -> Result<(), Errno> {
    set_capabilities(&[[0; 3]; 2])
}

/// Effective, permitted and inheritable, the low 32 and the high 32.
type Sets = [[u32; 3]; 2];

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// Version 3, of this thread.
const HEADER: Header = Header { version: 0x2008_0522, pid: 0 };

fn capabilities() -> Result<Sets, Errno> {
    let (header, mut sets) = (HEADER, [[0; 3]; 2]);
    // SAFETY: The call reads a header and, in version 3, writes two sets of three words.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw const header, &raw mut sets) })?;
    Ok(sets)
}

fn set_capabilities(sets: &Sets) -> Result<(), Errno> {
    let header = HEADER;
    // SAFETY: The call reads a header and, in version 3, two sets of three words.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const *sets) }).map(drop)
}
