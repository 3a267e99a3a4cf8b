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
use seccompiler::{BpfProgram, SeccompAction, apply_filter, sock_filter};
use std::collections::BTreeMap;
use std::mem::offset_of;

/// There is no filter.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
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
    /// A signal to a thread of this process that is not `SIGKILL`: that of a kick, or of a panic.
    Kick(libc::c_long),
    /// Never, but this is no reason for an end: the answer is that of a kernel that does not know it.
    Unknown(libc::c_long),
}

use Call::{Any, Kick, One, Unknown, Without};

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
    Kick(libc::SYS_tgkill),
    // The end.
    Any(libc::SYS_exit),
    Any(libc::SYS_exit_group),
    // The C library asks for more than it needs, and the server has the process [try](super::probe) to write to a store.
    Unknown(libc::SYS_clone3),
    Unknown(libc::SYS_open),
    Unknown(libc::SYS_openat),
    Unknown(libc::SYS_fchmod),
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
const VCPU: &[Call] = &[
    One(libc::SYS_ioctl, 1, OF_VCPU),
    // Sockets of the guest's connections: the main thread watches each once, and the vCPU that serves it has it watched again.
    One(libc::SYS_epoll_ctl, 1, &[libc::EPOLL_CTL_ADD as u64, libc::EPOLL_CTL_DEL as u64, libc::EPOLL_CTL_MOD as u64]),
    // What they have for the guest, and whether whoever asked for a connection is still there. Never with a wait.
    One(libc::SYS_recvfrom, 3, &[libc::MSG_DONTWAIT as u64, (libc::MSG_PEEK | libc::MSG_DONTWAIT) as u64]),
    // Where the guest has ended one direction of a connection.
    One(libc::SYS_shutdown, 1, &[libc::SHUT_RD as u64, libc::SHUT_WR as u64]),
];

/// The keeper's, all its life: it shares the memory of a process that may be taken over, its stack included.
const KEEPER: &[Call] = &[
    Any(libc::SYS_close_range),
    One(libc::SYS_prctl, 0, &[libc::PR_SET_PDEATHSIG as u64]),
    Any(libc::SYS_getppid),
    Any(libc::SYS_pause),
    Any(libc::SYS_restart_syscall),
    Any(libc::SYS_exit),
];

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
    // KVM_KVMCLOCK_CTRL: the guest's watchdog is told that it stood still.
    request(0, KVM, 0xad, 0),
    // The time stamp counter's offset.
    request(WRITE, KVM, 0xe1, size_of::<kvm_device_attr>()),
    request(WRITE, KVM, 0xe2, size_of::<kvm_device_attr>()),
    // KVM_PRE_FAULT_MEMORY: pages touched ahead.
    request(BOTH, KVM, 0xd5, size_of::<kvm_pre_fault_memory>()),
];

/// The programs that hold each thread and the keeper to its calls. They are compiled once, by the zygote: VM processes have
/// them with the rest of its memory.
#[derive(Clone, Debug)]
pub(super) struct Filters {
    main: BpfProgram,
    vcpu: BpfProgram,
    keeper: BpfProgram,
}

impl Filters {
    /// Compiles them.
    pub fn compile() -> Self {
        let of_thread = |calls: &[Call]| program(EVERY.iter().chain(calls));
        Self { main: of_thread(MAIN), vcpu: of_thread(VCPU), keeper: program(KEEPER) }
    }

    /// Holds the calling thread, and what it makes, to what one of its kind does.
    ///
    /// # Errors
    /// This kernel cannot. The thread must not go on.
    pub fn confine(&self, thread: Thread) -> Result<(), FilterError> {
        let mut program = match thread {
            Thread::Main => self.main.clone(),
            Thread::Vcpu => self.vcpu.clone(),
        };
        let this = getpid().as_raw() as u32;
        program
            .iter_mut()
            .filter(|instruction| instruction.k == THIS_PROCESS)
            .for_each(|instruction| instruction.k = this);
        Ok(apply_filter(&program)?)
    }

    /// What the keeper is held to.
    pub fn of_keeper(&self) -> BpfProgram {
        self.keeper.clone()
    }
}

/// Of `<linux/audit.h>`: 64 bits, little endian, `EM_X86_64`.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// Stands for the process that is held to a program, whose id is not known when it is compiled. No call, argument or offset
/// in a program has this value.
const THIS_PROCESS: u32 = 0x7fff_fff1;

/// One program of many calls, in which the number is found by halves. For each thread of each VM process the kernel tries a
/// new program with every number that there is, and translates it: one that compares with one number after the other costs
/// most of a millisecond.
fn program<'a>(calls: impl IntoIterator<Item = &'a Call>) -> BpfProgram {
    let mut each = BTreeMap::new();
    for call in calls {
        let (number, what) = call.compiled();
        let twice = each.insert(number as u32, what);
        debug_assert!(twice.is_none(), "call {number} is there twice");
    }
    let mut all = vec![
        load(offset_of!(libc::seccomp_data, arch)),
        jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, [1, 0]),
        ends(SeccompAction::KillProcess),
        load(offset_of!(libc::seccomp_data, nr)),
    ];
    all.extend(search(&each.into_iter().collect::<Vec<_>>()));
    all
}

/// Finds the number among those of `calls`, which are in order, and goes on with what is said of its call.
fn search(calls: &[(u32, BpfProgram)]) -> BpfProgram {
    if let [(number, what)] = calls {
        return [&[jump(libc::BPF_JEQ, *number, [1, 0]), ends(SeccompAction::KillProcess)], &what[..]].concat();
    }
    let (below, from) = calls.split_at(calls.len() / 2);
    let (middle, below, from) = (from[0].0, search(below), search(from));
    let mut all = match u8::try_from(below.len()) {
        Ok(behind) => vec![jump(libc::BPF_JGE, middle, [behind, 0])],
        // Too far for a jump that depends on something.
        Err(_) => vec![jump(libc::BPF_JGE, middle, [0, 1]), jump(libc::BPF_JA, below.len() as u32, [0, 0])],
    };
    all.extend(below);
    all.extend(from);
    all
}

impl Call {
    /// Its number, and what decides on its arguments. All that is compared is 32 bits wide for the kernel.
    fn compiled(&self) -> (libc::c_long, BpfProgram) {
        let (allowed, ended) = (ends(SeccompAction::Allow), ends(SeccompAction::KillProcess));
        match *self {
            Any(number) => (number, vec![allowed]),
            Unknown(number) => (number, vec![ends(SeccompAction::Errno(libc::ENOSYS as u32))]),
            One(number, argument, values) => {
                let mut program = vec![load_argument(argument)];
                for (index, value) in values.iter().enumerate() {
                    // Over those behind it, and over the end.
                    let behind = u8::try_from(values.len() - index).expect("a list that a jump passes over");
                    program.push(jump(libc::BPF_JEQ, *value as u32, [behind, 0]));
                }
                program.extend([ended, allowed]);
                (number, program)
            }
            Without(number, argument, bits) => {
                (number, vec![load_argument(argument), jump(libc::BPF_JSET, bits as u32, [0, 1]), ended, allowed])
            }
            Kick(number) => {
                let is_here = [load_argument(0), jump(libc::BPF_JEQ, THIS_PROCESS, [0, 2])];
                let is_kill = [load_argument(2), jump(libc::BPF_JEQ, libc::SIGKILL as u32, [0, 1])];
                (number, [&is_here[..], &is_kill, &[ended, allowed]].concat())
            }
        }
    }
}

/// Loads 32 bits of what is known of a call.
fn load(offset: usize) -> sock_filter {
    sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: offset as u32 }
}

/// The lower half of an argument.
fn load_argument(number: u8) -> sock_filter {
    load(offset_of!(libc::seccomp_data, args) + size_of::<u64>() * usize::from(number))
}

/// Passes over so many instructions where the comparison holds, and where it does not. `BPF_JA` passes over `value`.
fn jump(comparison: u32, value: u32, [holds, else_]: [u8; 2]) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | comparison | libc::BPF_K) as u16, jt: holds, jf: else_, k: value }
}

fn ends(action: SeccompAction) -> sock_filter {
    sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: action.into() }
}
