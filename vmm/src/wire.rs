//! What the server and a VM process say to each other: messages, and the descriptors that travel with them.
//!
//! The socket is a `SOCK_SEQPACKET` pair; a message is one packet (its bytes in a sealed memfd where they are too many
//! for a packet), its descriptors ride on it and, past what one packet carries, on packets that follow.

use crate::boot::linux::Plan;
use crate::machine::state::PackedState;
use guest_mem::ids::Run;
use guest_mem::window::Along;
use guest_mem::window::host::SmallExtents;
use guest_mem::{Gfn, GfnRange, PageCount, Protection, StoreId};
use serde::{Deserialize, Serialize};

mod from_vm;

pub use from_vm::{ADDRESSES_END, ANSWER_MAX, Bounds, Ending, FEW, FromVm, Frozen, SOME, Said};

/// The parts of a VM that are fixed when its KVM VM is made: a prepared VM process fits any VM of its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MachineShape {
    /// RAM.
    pub ram: PageCount,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// What it is made for.
    pub machine: Machine,
}

/// Kinds of machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Machine {
    /// The built-in guest's: one vCPU, a serial console and the monitor's ports. No interrupts.
    Monitor,
    /// A Linux guest's: interrupt controllers, a timer, ACPI tables and virtio devices.
    Linux,
}

/// How a VM process is kept apart from the server and from its siblings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Isolation {
    /// A user and group id of its own, no /proc (the server is root).
    OwnUser,
    /// A user namespace without capabilities, no /proc.
    UserNamespace,
    /// None: this host allows neither.
    Off,
}

impl std::fmt::Display for Isolation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::OwnUser => "own user",
            Self::UserNamespace => "user namespace",
            Self::Off => "off",
        })
    }
}

/// Kernel features that have a fallback; `OFFSHOOT_DISABLE=userfaultfd,pagemap-scan` turns them off for tests of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFeatures {
    /// Traps: without them a fork settles within the pause.
    pub userfaultfd: bool,
    /// The `PAGEMAP_SCAN` ioctl (Linux 6.7): without it the pagemap is read.
    pub pagemap_scan: bool,
}

/// Who a VM is; new for every launch and every fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The VM's name.
    pub name: String,
    /// Unique per VM of a server: the guest's generation id and its event word.
    pub generation: u64,
}

/// A line for the guest, or from it. The answer carries the tag of its line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Tells the answer to this line from answers to others.
    pub tag: u64,
    /// The text, without a newline.
    pub text: String,
}

/// Whether a VM's vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunState {
    /// They run.
    Running,
    /// They stand still.
    Paused,
}

/// How a freeze takes pages out of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Take {
    /// They are moved out, and the store is mapped in their place.
    Remap,
    /// The same, but short stretches stay where they are, and are copied: that leaves the window with fewer mappings.
    CopyInPlace,
    /// They stay where they are, and the process makes a copy of itself that has them as well. A second descriptor travels
    /// along, of a pipe: the copy lives until its other end is closed. A process that cannot copies in place.
    Snapshot,
}

impl Take {
    /// What becomes of short stretches.
    pub fn small_extents(self) -> SmallExtents {
        match self {
            Self::Remap => SmallExtents::Remap,
            Self::CopyInPlace | Self::Snapshot => SmallExtents::CopyInPlace,
        }
    }
}

/// Where a VM's machine state comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Origin {
    /// The monitor, from its entry point.
    Monitor,
    /// A Linux kernel, from its entry point; the descriptor of its file travels along, behind those of the stores.
    Linux(Box<Plan>),
    /// A fork. The parent's state follows, in a [`ToVm::Load`] or as a [`ToVm::LoadExpected`].
    Fork {
        /// This child's number in its fork, from 1.
        index: u32,
    },
}

/// Everything a prepared VM process needs to become a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// Who it is.
    pub identity: Identity,
    /// Its window, but for what it has of a [`ToVm::Expect`] as it is; a descriptor for each store in `stores` travels
    /// along. Those of shared memory can be written through.
    pub runs: Vec<Run>,
    /// The stores that `runs` name, in the order of the descriptors.
    pub stores: Vec<StoreId>,
    /// What its guest may not write, sorted.
    pub read_only: Vec<GfnRange>,
    /// Where its machine state comes from.
    pub origin: Origin,
    /// Whether it runs at once.
    pub activity: RunState,
    /// Pages that it is likely to write, all of which are in their stores: it is to have copies of them before it runs. But for
    /// those of which it has copies since a [`ToVm::Expect`].
    pub ahead: Vec<GfnRange>,
}

/// What a prepared VM process can have ready of a start that will most likely follow.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Expect {
    /// Its window, but for what the process has of an earlier [`ToVm::Expect`], and without shared memory; a descriptor for each
    /// store in `stores` travels along.
    pub runs: Vec<Run>,
    /// The stores that `runs` name, in the order of the descriptors.
    pub stores: Vec<StoreId>,
    /// Pages of which it is to have copies, all of which are in their stores, or were.
    pub ahead: Vec<GfnRange>,
    /// The state that it will start from, where that can be told.
    pub state: Option<PackedState>,
}

/// Server to zygote.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToZygote {
    /// First message: go into the jail in which all VM processes are made.
    Enter {
        /// How VM processes are kept apart.
        isolation: Isolation,
        /// Whether there are VM processes if that cannot be.
        strictness: Strictness,
        /// An empty directory, on which the jail's root can be mounted. The host sees nothing of that.
        on: std::path::PathBuf,
    },
    /// Make a VM process. Its socket travels along.
    Make,
}

/// What becomes of a VM where its process cannot be kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Strictness {
    /// There is none.
    Strict,
    /// It runs, with as much as can be had.
    Weaker,
}

/// Zygote to server: the process id of the VM process, or why there is none.
pub type Made = Result<i32, String>;

/// Server to VM process.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToVm {
    /// First message: make the KVM VM, the vCPUs and the window; answer `Ready`. Isolate as told, with `cage`, an empty
    /// directory, as root directory.
    Prepare {
        /// What to make.
        shape: MachineShape,
        /// How to keep apart.
        isolation: Isolation,
        /// Which of the host's features to use.
        features: HostFeatures,
        /// An empty directory.
        cage: std::path::PathBuf,
        /// Process id of the server: a process that has another parent by then has lost it.
        server: i32,
        /// The niceness to run with; the server may have a lower one.
        niceness: i32,
    },
    /// A start will follow, most likely like this. Answered by `Expecting`, or `StartFailed`.
    Expect(Box<Expect>),
    /// Become this VM. Answered by `Running` (or `Paused`), or `StartFailed`; a fork's after its `Load` or `LoadExpected`.
    Start(Box<Start>),
    /// The state that a fork starts from.
    Load(PackedState),
    /// A fork starts from the state that was last [expected](Self::Expect).
    LoadExpected,
    /// Stop the vCPUs, take all dirty private pages, and run on as before. A descriptor of the store travels along. Answered
    /// by `Standing`, `Frozen`, `Saved`, and, where it applies, `Copied` and `WentOn`, in this order; or, before `Frozen`, by
    /// `FreezeFailed`.
    Freeze {
        /// The store that takes the pages' place, and names the scratch range.
        store: StoreId,
        /// The window may have this many mappings afterwards.
        max_runs: u32,
        /// How the pages are taken.
        take: Take,
        /// Pages that are taken along, though the guest has not written them.
        along: Along,
        /// Frames that somebody is about to wait for, sorted: where pages are copied, theirs come first.
        first: Vec<Gfn>,
    },
    /// Some pages of a freeze have settled: give their memory back.
    LeaveScratch {
        /// The freeze's store.
        store: StoreId,
        /// The pages.
        pages: GfnRange,
    },
    /// The pages of this freeze have settled: unmap its scratch range.
    DropScratch(StoreId),
    /// Stop the vCPUs, map this store (its descriptor travels along) in the place of pages that stayed in the window at the
    /// freeze into it, all of which have settled; run on as before. Answered by `Deduped`.
    Dedup {
        /// The store.
        store: StoreId,
        /// The pages.
        pages: Vec<GfnRange>,
    },
    /// From now on the guest may do this with these pages. A write to what is read-only ends its VM.
    Protect {
        /// The pages.
        pages: GfnRange,
        /// What it may do.
        protection: Protection,
    },
    /// Stop the vCPUs. Answered by `Paused`.
    Pause,
    /// Run. Answered by `Running`.
    Resume,
    /// A line for the guest. Answered by `Answer`, in the guest's time.
    Input(Line),
    /// Bytes typed on the serial console.
    Console(Vec<u8>),
    /// How the fork that the guest asked for went: the children's names, or why not.
    ForkDone(Result<Vec<String>, String>),
    /// Ask a Linux guest to have so many pages in its balloon. It says `BalloonSize` as it gets there.
    Balloon {
        /// How many.
        pages: u64,
    },
    /// Ask a Linux guest how it is off for memory. Answered by `GuestStats`, in the guest's time.
    AskStats,
    /// Ask a Linux guest to tell of its free pages and keep them until the next freeze is done. They come as `Ballooned`,
    /// then `Hinted`, in the guest's time.
    HintFree,
    /// Have a Linux guest accept a connection to this port of its. Its socket travels along, and does not wait. Answered by
    /// `Connected`, in the guest's time.
    Connect {
        /// Names it.
        tag: u64,
        /// The port.
        port: u32,
        /// Whether the socket is told when the guest has accepted: `OK`, the host's port, and the end of the line.
        greet: bool,
    },
    /// The answer to a `Connect` of the VM's: a socket that does not wait travels along, if there is one.
    Connected {
        /// Names it.
        tag: u64,
    },
    /// Ask the guest to power off.
    Stop,
    /// Try to write to the store whose descriptor travels along. Answered by `Probed`.
    Probe,
}

impl ToVm {
    /// Whether a guest that is still may run after this message, or its machine may be another.
    pub fn wakes(&self) -> bool {
        !matches!(
            self,
            Self::Freeze { .. }
                | Self::LeaveScratch { .. }
                | Self::DropScratch(_)
                | Self::Dedup { .. }
                | Self::Protect { .. }
                | Self::Probe
        )
    }
}
