//! What the server gives up before it does anything: it reads what hostile processes say, and whoever got hold of it through
//! that would have all it has.
//!
//! * **System calls** that no server needs are refused with `EPERM`: those that change the host, trace processes, make
//!   programs of the kernel's, use its keys or its rings, and sockets that are no Unix sockets. The zygote and all VM processes
//!   inherit that; theirs are held to much less.
//! * **Capabilities** that neither the server nor its zygote needs, in all sets, so that nothing it executes has them either.
//! * **New privileges**: nothing that is executed gets any.
//!
//! What it keeps: `mount`, `unshare` and their like, since a zygote that ends is replaced, and the new one makes its jail;
//! reading other processes' memory, from which it takes pages; and its user's files, which clients name.

use crate::machine::isolate;
use crate::wire::Isolation;
use nix::sys::prctl::set_no_new_privs;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// Whatever their arguments are.
const REFUSED: [libc::c_long; 64] = [
    // The host itself.
    libc::SYS_reboot,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_vhangup,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_personality,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS__sysctl,
    libc::SYS_nfsservctl,
    // Other processes. Their memory is read, and never written.
    libc::SYS_ptrace,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_setns,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_rt_sigqueueinfo,
    // Programs in the kernel, and what has had many holes.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_lookup_dcookie,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_vmsplice,
    libc::SYS_remap_file_pages,
    libc::SYS_memfd_secret,
    libc::SYS_fanotify_init,
    // Files past their directories, devices, and mounts in ways that a jail is not made.
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    // Memory that others have by its key.
    libc::SYS_shmget,
];

/// By the numbers of `<linux/capability.h>`, with what each is for. All others go.
const KEPT: [(u32, &str); 12] = [
    (1, "DAC_OVERRIDE: files that clients name, swap"),
    (2, "DAC_READ_SEARCH: the same"),
    (3, "FOWNER: modes of files in the home"),
    (5, "KILL: VM processes are other users"),
    (6, "SETGID: they become these"),
    (7, "SETUID: the same"),
    (8, "SETPCAP: their bounding sets are emptied"),
    (18, "SYS_CHROOT: their roots"),
    (19, "SYS_PTRACE: their memory is read, their userfaultfds serve KVM"),
    (21, "SYS_ADMIN: the zygote's namespaces and mounts"),
    (23, "SYS_NICE: the server goes ahead of guests"),
    (24, "SYS_RESOURCE: limits, and who is ended when memory is short"),
];

/// As root of a user namespace one needs it to have a user namespace below in which one is still root.
const SETFCAP: u32 = 31;

/// What the server cannot give up.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The kernel has no filters.
    #[error("system call filter: {0}")]
    Filter(#[from] seccompiler::Error),
    /// A filter that makes no sense.
    #[error("system call filter: {0}")]
    Compile(#[from] BackendError),
    /// It keeps more than it needs.
    #[error("{0}: {1}")]
    Rights(&'static str, nix::errno::Errno),
}

/// Gives up what no server needs. There must be one thread: those to come, and all children, inherit it.
///
/// # Errors
/// What this host does not allow. All that it does allow is given up all the same.
pub fn confine(isolation: Isolation) -> Result<(), ConfineError> {
    let mut kept: Vec<u32> = KEPT.iter().map(|(capability, _)| *capability).collect();
    if isolation != Isolation::OwnUser {
        kept.push(SETFCAP);
    }
    let capabilities = isolate::keep_capabilities(&kept).map_err(|e| ConfineError::Rights("capabilities", e));
    let privileges = set_no_new_privs().map_err(|e| ConfineError::Rights("PR_SET_NO_NEW_PRIVS", e));
    seccompiler::apply_filter(&filter()?)?;
    capabilities.and(privileges)
}

fn filter() -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<libc::c_long, Vec<SeccompRule>> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, libc::AF_UNIX as u64)?;
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        rules.insert(call, vec![SeccompRule::new(vec![other.clone()])?]);
    }
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, refused, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::net::TcpListener;
    use std::os::unix::net::UnixStream;
    use std::thread;

    #[test]
    fn each_call_is_refused_once_and_what_is_kept_is_known_to_the_kernel() {
        assert_eq!(REFUSED.iter().collect::<BTreeSet<_>>().len(), REFUSED.len());
        assert!(KEPT.is_sorted_by_key(|(capability, _)| *capability));
        assert!(KEPT.iter().all(|(capability, _)| *capability < 41 && *capability != SETFCAP));
    }

    /// A filter is a thread's.
    #[test]
    fn what_is_refused_fails_and_the_rest_goes_on() {
        let held = thread::spawn(|| {
            set_no_new_privs().unwrap();
            seccompiler::apply_filter(&filter().unwrap()).unwrap();
            let refused = TcpListener::bind("127.0.0.1:0").map(drop).map_err(|error| error.raw_os_error());
            (
                refused,
                UnixStream::pair().is_ok(),
                thread::spawn(|| std::fs::read("/proc/self/stat").is_ok()).join().unwrap(),
            )
        });
        assert_eq!(held.join().unwrap(), (Err(Some(libc::EPERM)), true, true));
        assert!(TcpListener::bind("127.0.0.1:0").is_ok(), "other threads are not held to it");
    }
}
