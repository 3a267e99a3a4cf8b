//! Which system calls a VM process may make once its guest may have got hold of it. Everything else ends it.
//!
//! Rules:
//! * They hold from before the first message that a guest can have a part in, for each thread by its kind, and for what such
//!   a thread makes: the threads that help with a freeze, and copies of the process. The keeper has its own.
//! * No descriptor comes to be but from the server, from memory, or as a duplicate; no path is looked up; no code can be
//!   written or mapped. Signals go to this process alone, and nothing that concerns another process can be asked.
//! * The flags of descriptors stay: those of the userfaultfd are the server's as well.
//! * Threads of one process are no wall to each other. That a vCPU's has fewer calls makes it harder to get hold of the rest.
//!
//! A kernel that cannot hold it to this has no VMs.

use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clock_data, kvm_debugregs, kvm_device_attr, kvm_dirty_log, kvm_irq_level, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msrs, kvm_pit_state2, kvm_pre_fault_memory, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use linux_raw_sys::general::pm_scan_arg;
use linux_raw_sys::ioctl::{UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_ZEROPAGE};
use nix::unistd::getpid;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{self, Eq, MaskedEq};
use seccompiler::{BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch, apply_filter};
use std::collections::BTreeMap;

/// There is no filter.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    /// It cannot be made.
    #[error("{0}")]
    Make(#[from] seccompiler::BackendError),
    /// The kernel does not take it.
    #[error("the kernel (CONFIG_SECCOMP_FILTER): {0}")]
    Install(#[from] seccompiler::Error),
}

/// Whose calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thread {
    /// The main one's, of those that it makes, and of copies of the process.
    Main,
    /// A vCPU's.
    Vcpu,
}

/// A call, and what it is for.
enum Call {
    /// Whatever its arguments are.
    Any(libc::c_long),
    /// Where an argument, the number of which comes first, is one of these.
    One(libc::c_long, u8, &'static [u64]),
    /// Where an argument has none of these bits.
    Without(libc::c_long, u8, u64),
}

use Call::{Any, One, Without};

/// What each thread needs to be one.
const EVERY: &[Call] = &[
    // Locks, and waits for each other.
    Any(libc::SYS_futex),
    Any(libc::SYS_sched_yield),
    // Clocks, where the kernel has no page for them.
    Any(libc::SYS_clock_gettime),
    Any(libc::SYS_clock_nanosleep),
    Any(libc::SYS_nanosleep),
    Any(libc::SYS_restart_syscall),
    // The allocator. Nothing of it is code.
    Any(libc::SYS_brk),
    Without(libc::SYS_mmap, 2, libc::PROT_EXEC as u64),
    Without(libc::SYS_mprotect, 2, libc::PROT_EXEC as u64),
    Any(libc::SYS_munmap),
    Any(libc::SYS_mremap),
    Any(libc::SYS_madvise),
    Any(libc::SYS_getrandom),
    // Bells, random numbers for the guest, the socket: a log line may come from any thread.
    Any(libc::SYS_read),
    Any(libc::SYS_write),
    Any(libc::SYS_sendmsg),
    Any(libc::SYS_close),
    // When a bell is to ring by itself.
    Any(libc::SYS_timerfd_settime),
    // Duplicates, seals of a message's memory, and whether a descriptor is open at all. Not F_SETFL.
    One(
        libc::SYS_fcntl,
        1,
        &[
            libc::F_GETFD as u64,
            libc::F_DUPFD_CLOEXEC as u64,
            libc::F_ADD_SEALS as u64,
            libc::F_GET_SEALS as u64,
            libc::F_GETFL as u64,
        ],
    ),
    // Signals: a kick interrupts, a panic aborts.
    Any(libc::SYS_rt_sigreturn),
    Any(libc::SYS_rt_sigprocmask),
    Any(libc::SYS_rt_sigaction),
    Any(libc::SYS_sigaltstack),
    Any(libc::SYS_getpid),
    Any(libc::SYS_gettid),
    // The end.
    Any(libc::SYS_exit),
    Any(libc::SYS_exit_group),
];

/// What the main thread does besides: messages, the window, freezes.
const MAIN: &[Call] = &[
    // Its loop.
    Any(libc::SYS_epoll_wait),
    Any(libc::SYS_epoll_pwait),
    Any(libc::SYS_epoll_ctl),
    Any(libc::SYS_poll),
    Any(libc::SYS_recvmsg),
    // Long messages, and the copies of a freeze, are in memory of their own.
    Any(libc::SYS_memfd_create),
    Any(libc::SYS_ftruncate),
    Any(libc::SYS_fallocate),
    Any(libc::SYS_lseek),
    // A kernel that is read from its descriptor. Paths lead nowhere.
    Any(libc::SYS_fstat),
    Any(libc::SYS_newfstatat),
    Any(libc::SYS_statx),
    Any(libc::SYS_pread64),
    Any(libc::SYS_pwrite64),
    // A copy of the process, and a thread that helps to copy pages. Never a process of another kind.
    One(libc::SYS_clone, 0, &[COPY, THREAD]),
    Any(libc::SYS_set_robust_list),
    Any(libc::SYS_rseq),
    One(libc::SYS_prctl, 0, &[libc::PR_SET_NAME as u64]),
    One(libc::SYS_sched_setaffinity, 0, &[0]),
    Any(libc::SYS_sched_getaffinity),
    Any(libc::SYS_getcpu),
    // The copy gives up what it has open.
    Any(libc::SYS_close_range),
    One(libc::SYS_ioctl, 1, OF_MAIN),
];

/// What a vCPU's thread does besides.
const VCPU: &[Call] = &[One(libc::SYS_ioctl, 1, OF_VCPU)];

/// The keeper's, all its life: it shares the memory of a process that may be taken over, its stack included.
const KEEPER: &[Call] = &[
    Any(libc::SYS_close_range),
    One(libc::SYS_prctl, 0, &[libc::PR_SET_PDEATHSIG as u64]),
    Any(libc::SYS_getppid),
    Any(libc::SYS_pause),
    Any(libc::SYS_restart_syscall),
    Any(libc::SYS_exit),
];

/// Calls that are answered as by a kernel that does not know them: the C library asks for more than it needs, and the server
/// has the process [try](super::probe) to write to a store.
const UNKNOWN: &[libc::c_long] = &[libc::SYS_clone3, libc::SYS_open, libc::SYS_openat, libc::SYS_fchmod];

const COPY: u64 = (libc::CLONE_PARENT | libc::SIGCHLD) as u64;
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// `_IOC(direction, type, number, size)`: what a request of `<linux/kvm.h>` and its like is made of.
const fn request(direction: u64, kind: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | kind << 8 | number
}

const READ: u64 = 2;
const WRITE: u64 = 1;
const BOTH: u64 = READ | WRITE;
/// KVM's.
const KVM: u64 = 0xae;

/// `KVM_IRQ_LINE`: a device of ours interrupts the guest.
const IRQ_LINE: u64 = request(WRITE, KVM, 0x61, size_of::<kvm_irq_level>());

const OF_MAIN: &[u64] = &[
    // The log of what the guest writes: turned on, read and cleared at a freeze.
    request(WRITE, KVM, 0x42, size_of::<kvm_dirty_log>()),
    request(BOTH, KVM, 0xc0, size_of::<kvm_clear_dirty_log>()),
    request(WRITE, KVM, 0x46, size_of::<kvm_userspace_memory_region>()),
    // Traps. The window's runs are registered and given up as they come and go, and private copies put in their place.
    UFFDIO_REGISTER as u64,
    UFFDIO_UNREGISTER as u64,
    UFFDIO_COPY as u64,
    UFFDIO_ZEROPAGE as u64,
    UFFDIO_WAKE as u64,
    // PAGEMAP_SCAN: which pages are private.
    request(BOTH, b'f' as u64, 16, size_of::<pm_scan_arg>()),
    // A Linux guest's interrupt controllers, timer and clock, saved and restored.
    IRQ_LINE,
    request(BOTH, KVM, 0x62, size_of::<kvm_irqchip>()),
    request(READ, KVM, 0x63, size_of::<kvm_irqchip>()),
    request(READ, KVM, 0x9f, size_of::<kvm_pit_state2>()),
    request(WRITE, KVM, 0xa0, size_of::<kvm_pit_state2>()),
    request(WRITE, KVM, 0x7b, size_of::<kvm_clock_data>()),
    request(READ, KVM, 0x7c, size_of::<kvm_clock_data>()),
];

const OF_VCPU: &[u64] = &[
    // KVM_RUN; the most often by far, and so the first.
    request(0, KVM, 0x80, 0),
    IRQ_LINE,
    // Registers of all kinds, saved and restored.
    request(READ, KVM, 0x81, size_of::<kvm_regs>()),
    request(WRITE, KVM, 0x82, size_of::<kvm_regs>()),
    request(READ, KVM, 0x83, size_of::<kvm_sregs>()),
    request(WRITE, KVM, 0x84, size_of::<kvm_sregs>()),
    request(BOTH, KVM, 0x88, size_of::<kvm_msrs>()),
    request(WRITE, KVM, 0x89, size_of::<kvm_msrs>()),
    request(READ, KVM, 0x8e, size_of::<kvm_lapic_state>()),
    request(WRITE, KVM, 0x8f, size_of::<kvm_lapic_state>()),
    request(READ, KVM, 0x98, size_of::<kvm_mp_state>()),
    request(WRITE, KVM, 0x99, size_of::<kvm_mp_state>()),
    request(READ, KVM, 0x9f, size_of::<kvm_vcpu_events>()),
    request(WRITE, KVM, 0xa0, size_of::<kvm_vcpu_events>()),
    request(READ, KVM, 0xa1, size_of::<kvm_debugregs>()),
    request(WRITE, KVM, 0xa2, size_of::<kvm_debugregs>()),
    request(READ, KVM, 0xcf, size_of::<kvm_xsave>()),
    request(WRITE, KVM, 0xa5, size_of::<kvm_xsave>()),
    request(READ, KVM, 0xa6, size_of::<kvm_xcrs>()),
    request(WRITE, KVM, 0xa7, size_of::<kvm_xcrs>()),
    // The time stamp counter's offset.
    request(WRITE, KVM, 0xe1, size_of::<kvm_device_attr>()),
    request(WRITE, KVM, 0xe2, size_of::<kvm_device_attr>()),
    // KVM_PRE_FAULT_MEMORY: pages touched ahead.
    request(BOTH, KVM, 0xd5, size_of::<kvm_pre_fault_memory>()),
];

/// Holds the calling thread, and what it makes, to what one of its kind does.
///
/// # Errors
/// This kernel cannot. The thread must not go on.
pub(super) fn confine(thread: Thread) -> Result<(), FilterError> {
    let of_kind = match thread {
        Thread::Main => MAIN,
        Thread::Vcpu => VCPU,
    };
    // The signals of a kick and of a panic, to nobody but this process.
    let signals = SeccompRule::new(vec![
        equal(0, getpid().as_raw() as u64)?,
        SeccompCondition::new(2, Dword, SeccompCmpOp::Ne, libc::SIGKILL as u64)?,
    ])?;
    let mut rules = rules(EVERY.iter().chain(of_kind))?;
    rules.insert(libc::SYS_tgkill, vec![signals]);
    // What one of the two ends is ended, whatever the other says: this one leaves these to the other.
    rules.extend(UNKNOWN.iter().map(|number| (*number, Vec::new())));
    // The stricter one last: it does not let another be put in place.
    let unknown = UNKNOWN.iter().map(|number| (*number, Vec::new())).collect();
    apply_filter(&compiled(unknown, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?)?;
    Ok(apply_filter(&compiled(rules, SeccompAction::KillProcess, SeccompAction::Allow)?)?)
}

/// What the keeper is held to.
///
/// # Errors
/// It cannot be made.
pub(super) fn of_keeper() -> Result<BpfProgram, FilterError> {
    compiled(rules(KEEPER)?, SeccompAction::KillProcess, SeccompAction::Allow)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn compiled(rules: Rules, other: SeccompAction, these: SeccompAction) -> Result<BpfProgram, FilterError> {
    Ok(SeccompFilter::new(rules, other, these, TargetArch::x86_64)?.try_into()?)
}

fn rules<'a>(calls: impl IntoIterator<Item = &'a Call>) -> Result<Rules, FilterError> {
    let mut all = Rules::new();
    for call in calls {
        let (number, rules) = match call {
            Any(number) => (*number, Vec::new()),
            One(number, argument, values) => {
                let each = values.iter().map(|value| SeccompRule::new(vec![equal(*argument, *value)?]));
                (*number, each.collect::<Result<_, _>>()?)
            }
            Without(number, argument, bits) => {
                let none = SeccompCondition::new(*argument, Dword, MaskedEq(*bits), 0)?;
                (*number, vec![SeccompRule::new(vec![none])?])
            }
        };
        let twice = all.insert(number, rules);
        debug_assert!(twice.is_none(), "call {number} is there twice");
    }
    Ok(all)
}

/// The kernel takes 32 bits of all arguments that are compared here.
fn equal(argument: u8, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, Dword, Eq, value)
}
