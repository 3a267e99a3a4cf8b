//! What the server and a VM process say to each other: messages, and the descriptors that travel with them.
//!
//! The socket is a `SOCK_SEQPACKET` pair; a message is one packet (its bytes in a sealed memfd where they are too many
//! for a packet), its descriptors ride on it and, past what one packet carries, on packets that follow.

use crate::boot::linux::Plan;
use crate::machine::state::PackedState;
use guest_mem::window::host::Short;
use guest_mem::window::{Harvest, Run, are_apart};
use guest_mem::{Gfn, GfnRange, PAGE_SIZE, PageCount, Protection, StoreId};
use serde::{Deserialize, Serialize};

/// The parts of a VM that are fixed when its KVM VM is made: a prepared VM process fits any VM of its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shape {
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
pub enum Activity {
    /// They run.
    Running,
    /// They stand still.
    Paused,
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
    /// along.
    pub runs: Vec<Run>,
    /// The stores that `runs` name, in the order of the descriptors.
    pub stores: Vec<StoreId>,
    /// What its guest may not write, sorted.
    pub read_only: Vec<GfnRange>,
    /// Where its machine state comes from.
    pub origin: Origin,
    /// Whether it runs at once.
    pub activity: Activity,
    /// Pages that it is likely to write, all of which are in their stores: it is to have copies of them before it runs. But for
    /// those of which it has copies since a [`ToVm::Expect`].
    pub ahead: Vec<GfnRange>,
}

/// What a prepared VM process can have ready of a start that will most likely follow.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Expect {
    /// Its window, but for what the process has of an earlier [`ToVm::Expect`]; a descriptor for each store in `stores`
    /// travels along.
    pub runs: Vec<Run>,
    /// The stores that `runs` name, in the order of the descriptors.
    pub stores: Vec<StoreId>,
    /// Pages of which it is to have copies, all of which are in their stores, or were.
    pub ahead: Vec<GfnRange>,
    /// The state that it will start from, where that can be told.
    pub state: Option<PackedState>,
}

/// Server to zygote: make a VM process. Its socket travels along.
#[derive(Debug, Serialize, Deserialize)]
pub struct Make;

/// Zygote to server: the process id of the VM process, or why there is none.
pub type Made = Result<i32, String>;

/// Server to VM process.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToVm {
    /// First message: make the KVM VM, the vCPUs and the window; answer `Ready`. Isolate as told, with `cage`, an empty
    /// directory, as root directory.
    Prepare {
        /// What to make.
        shape: Shape,
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
    /// Stop the vCPUs, take all dirty private pages: move them out and put this store (its descriptor travels along) in
    /// their place, or copy them; run on as before. Answered by `Frozen` and `Saved`, or by `FreezeFailed`.
    ///
    /// Where a second descriptor comes along, a pipe, the process may make a copy of itself instead of moving pages. The
    /// copy lives until the other end of the pipe is closed.
    Freeze {
        /// The store that takes the pages' place, and names the scratch range.
        store: StoreId,
        /// The window may have this many mappings afterwards.
        max_runs: u32,
        /// What becomes of short stretches.
        short: Short,
        /// Pages that are taken along, though the guest has not written them; sorted, apart.
        along: Vec<GfnRange>,
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
    /// freeze into it, all of which have settled; run on as before. Answered by `Shed`.
    Shed {
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
                | Self::Shed { .. }
                | Self::Protect { .. }
                | Self::Probe
        )
    }
}

/// How a VM came to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// The guest powered off.
    Off,
    /// The guest reset its machine.
    Reboot,
    /// It cannot go on, and why.
    Dead(String),
}

/// What a freeze has taken.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Frozen {
    /// The freeze's store.
    pub store: StoreId,
    /// What was taken out.
    pub harvest: Harvest,
    /// Host address, in the VM process, where guest frame 0 would stand in the scratch range.
    pub scratch_base: u64,
    /// Frame of the scratch range where copies begin.
    pub copies: Gfn,
    /// Of stretches that stayed, those that are in the scratch range, if the others are not yet: `Copied` follows, and until
    /// then the window shows what they have, since no vCPU runs: it is said before one does.
    pub copied: Option<Vec<GfnRange>>,
    /// The process that has the pages of the scratch range, if it is a copy of this one.
    pub copy: Option<i32>,
    /// Whether the vCPUs run again, at the latest when all is copied. They do not if they stood still before, or if the host
    /// has no userfaultfd: then the server settles all pages first and sends `Resume`.
    pub activity: Activity,
    /// `CLOCK_MONOTONIC` of the first vCPU kick, in nanoseconds.
    pub kicked_ns: u64,
}

/// VM process to server: those of a packet, one after the other. Descriptors that travel along are the first one's.
pub type Said = Vec<FromVm>;

/// One message of a VM process to the server. Times are `CLOCK_MONOTONIC` nanoseconds.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromVm {
    /// Prepared; the window's userfaultfd travels along, if the host has one.
    Ready {
        /// Process id of the keeper.
        keeper: i32,
        /// Host address of guest-physical address 0 in the VM process.
        window_base: u64,
    },
    /// It could not be prepared.
    PrepareFailed(String),
    /// It has ready what it was told to expect.
    Expecting,
    /// The first vCPU is about to enter `KVM_RUN`.
    Running {
        /// When.
        at_ns: u64,
    },
    /// The guest rang for its new event word: the first sign of life.
    FirstSign {
        /// When.
        at_ns: u64,
    },
    /// The start went wrong.
    StartFailed(String),
    /// The vCPUs stand still for a freeze; said before the first page is moved, so that no trap of a moved page is ahead
    /// of it.
    Standing,
    /// The guest has given these pages back: the window shows anonymous memory there. Never between `Standing` and what
    /// comes of that freeze.
    Ballooned(Vec<GfnRange>),
    /// So many pages are in the guest's balloon now.
    BalloonSize {
        /// How many.
        pages: u64,
    },
    /// What a clone's guest has written in its first moments.
    Wrote {
        /// The pages.
        pages: Vec<GfnRange>,
        /// Whether they are over.
        last: bool,
    },
    /// What a Linux guest says of its memory: figures, each with its tag of the virtio specification.
    GuestStats(Vec<(u16, u64)>),
    /// The guest has told of all its free pages.
    Hinted,
    /// A freeze, done, but for the machine's state: children can be given what they see.
    Frozen(Box<Frozen>),
    /// After a `Frozen`: the machine as it stood.
    Saved {
        /// The freeze's store.
        store: StoreId,
        /// The state.
        state: PackedState,
        /// Whether the guest stands or rests, and will not run before a message [wakes](ToVm::wakes) it.
        still: bool,
    },
    /// All that stayed is in the scratch range.
    Copied {
        /// The freeze's store.
        store: StoreId,
    },
    /// After a `Saved`, if the vCPUs run again: they do.
    WentOn {
        /// The freeze's store.
        store: StoreId,
        /// From the first vCPU kick to the last vCPU able to run again.
        pause_ns: u64,
    },
    /// A freeze that changed nothing, and why.
    FreezeFailed(String),
    /// The window maps the store where it kept these pages, and keeps them no longer.
    Shed {
        /// The store.
        store: StoreId,
        /// The pages; none where it could not be done.
        pages: Vec<GfnRange>,
    },
    /// The vCPUs stand still.
    Paused,
    /// The guest's answer to a line.
    Answer(Line),
    /// Bytes the guest wrote to its serial console.
    Console(Vec<u8>),
    /// The guest asks to be forked. It waits for `ForkDone`.
    Fork {
        /// How many children.
        count: u32,
    },
    /// The VM has ended.
    Ended(Ending),
    /// The ways by which the descriptor let itself be written to: none, if all is well.
    Probed(Vec<String>),
}

impl FromVm {
    /// Whether it is the first that a VM process says.
    pub fn comes_first(&self) -> bool {
        matches!(self, Self::Ready { .. } | Self::PrepareFailed(_))
    }

    /// Whether addresses in it are such, and pages, where their order matters, as ours tells of them: sorted, apart, and
    /// within `ram`. A process that is taken over may say anything.
    pub fn makes_sense(&self, ram: &[GfnRange]) -> bool {
        match self {
            Self::Ready { window_base, .. } => *window_base < ADDRESSES_END,
            Self::Frozen(frozen) => {
                let Frozen { harvest, scratch_base, copies, .. } = &**frozen;
                harvest.makes_sense(ram) && *scratch_base < ADDRESSES_END && copies.0 < ADDRESSES_END / PAGE_SIZE as u64
            }
            Self::Shed { pages, .. } | Self::Wrote { pages, .. } => are_apart(pages, ram),
            _ => true,
        }
    }
}

/// Where the addresses of a process end, on x86-64.
pub const ADDRESSES_END: u64 = (1 << 47) - PAGE_SIZE as u64;
