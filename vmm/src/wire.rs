//! What the server and a VM process say to each other: messages, and the descriptors that travel with them.
//!
//! The socket is a `SOCK_SEQPACKET` pair; a message is one packet (its bytes in a sealed memfd where they are too many
//! for a packet), its descriptors ride on it and, past what one packet carries, on packets that follow.

use crate::boot::linux::Plan;
use crate::layout::ram_ranges;
use crate::machine::WINDOW_BASE;
use crate::machine::state::PackedState;
use crate::plain;
use guest_mem::ids::Run;
use guest_mem::window::host::{ScratchRow, SmallExtents};
use guest_mem::window::{Along, Harvest, are_apart};
use guest_mem::{Gfn, GfnRange, PAGE_SIZE, PageCount, Protection, StoreId};
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::marker::PhantomData;

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
    pub activity: RunState,
    /// `CLOCK_MONOTONIC` of the first vCPU kick, in nanoseconds.
    pub kicked_ns: u64,
}

/// VM process to server: those of a packet, one after the other, [`FEW`] at most. Descriptors that travel along are the first
/// one's.
#[derive(Debug, Serialize, Deserialize)]
pub struct Said(#[serde(deserialize_with = "few")] pub Vec<FromVm>);

/// Most messages of a packet, and most entries of lists that are never long.
pub const FEW: usize = 64;
/// Most stretches of pages in one message that may come again and again.
pub const SOME: usize = 4096;

/// Elements that take a byte each may take fifty when they are decoded: whoever sends many of them is ours no more.
fn few<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    at_most::<FEW, _, _>(from)
}

/// The same, of stretches of pages.
fn some<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    at_most::<SOME, _, _>(from)
}

fn at_most<'de, const MOST: usize, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    struct List<const MOST: usize, T>(PhantomData<T>);
    impl<'de, const MOST: usize, T: Deserialize<'de>> Visitor<'de> for List<MOST, T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MOST} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(element) = elements.next_element()? {
                if list.len() == MOST {
                    return Err(A::Error::custom("a list that is too long"));
                }
                list.push(element);
            }
            Ok(list)
        }
    }
    from.deserialize_seq(List::<MOST, T>(PhantomData))
}

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
    Ballooned(#[serde(deserialize_with = "some")] Vec<GfnRange>),
    /// So many pages are in the guest's balloon now.
    BalloonSize {
        /// How many.
        pages: u64,
    },
    /// What a clone's guest has written in its first moments.
    Wrote {
        /// The pages, or some of them.
        #[serde(deserialize_with = "some")]
        pages: Vec<GfnRange>,
        /// Whether they are over.
        last: bool,
    },
    /// What a Linux guest says of its memory: figures, each with its tag of the virtio specification.
    GuestStats(#[serde(deserialize_with = "few")] Vec<(u16, u64)>),
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
    /// A line of its log. Before the first message as well.
    Log(String),
    /// The ways by which the descriptor let itself be written to: none, if all is well.
    Probed(#[serde(deserialize_with = "few")] Vec<String>),
}

/// What messages of a VM process of some shape can be about: the server's own knowledge, against which it checks them.
#[derive(Debug)]
pub struct Bounds {
    ram: Vec<GfnRange>,
    scratch: ScratchRow,
    max_runs: usize,
    /// Bytes of a message.
    pub bytes: u64,
}

impl Bounds {
    /// Of a shape, whose windows may have `max_runs` mappings.
    pub fn of(shape: MachineShape, max_runs: u32) -> Self {
        let ram = ram_ranges(shape.ram);
        let frames = PageCount(ram.last().map_or(0, |pages| pages.end().0));
        // A freeze may tell of every second page, in ten bytes, and of so many runs; and of what each vCPU has.
        let bytes = (1 << 18) + 5 * frames.0 + 10 * u64::from(max_runs) + (u64::from(shape.vcpus) << 16);
        Self { ram, scratch: ScratchRow::behind(WINDOW_BASE, frames), max_runs: max_runs as usize, bytes }
    }

    fn allow(&self, frozen: &Frozen) -> bool {
        let Frozen { harvest, scratch_base, copies, copied, copy, .. } = frozen;
        let there = match copy {
            _ if harvest.is_empty() => true,
            Some(_) => *scratch_base == WINDOW_BASE,
            None => self.scratch.has(*scratch_base, *copies),
        };
        there
            && harvest.is_valid(&self.ram)
            // Each is a mapping of the VM's children.
            && harvest.moved.len() + harvest.copied.len() <= self.max_runs
            && copied.as_ref().is_none_or(|copied| are_apart(copied, &harvest.copied))
    }
}

/// Longest answer of a guest, in bytes.
pub const ANSWER_MAX: usize = 64 << 10;

impl FromVm {
    /// Makes what it has for people to read fit to be shown.
    pub fn plain(self) -> Self {
        let reason = |text: String| plain::line(&text, plain::REASON_MAX);
        match self {
            Self::PrepareFailed(why) => Self::PrepareFailed(reason(why)),
            Self::StartFailed(why) => Self::StartFailed(reason(why)),
            Self::FreezeFailed(why) => Self::FreezeFailed(reason(why)),
            Self::Ended(Ending::Dead(why)) => Self::Ended(Ending::Dead(reason(why))),
            Self::Log(line) => Self::Log(reason(line)),
            Self::Probed(ways) => Self::Probed(ways.into_iter().map(reason).collect()),
            other => other,
        }
    }

    /// Whether it is the first that a VM process says.
    pub fn comes_first(&self) -> bool {
        matches!(self, Self::Ready { .. } | Self::PrepareFailed(_))
    }

    /// Whether addresses in it are where ours has such things, and pages, where their order matters, as ours tells of them:
    /// sorted, apart, and within RAM. A process that is taken over may say anything.
    pub fn is_valid(&self, bounds: &Bounds) -> bool {
        match self {
            Self::Ready { window_base, .. } => *window_base == WINDOW_BASE,
            Self::Frozen(frozen) => bounds.allow(frozen),
            Self::Answer(line) => line.text.len() <= ANSWER_MAX,
            Self::Shed { pages, .. } | Self::Wrote { pages, .. } => are_apart(pages, &bounds.ram),
            _ => true,
        }
    }
}

/// Where the addresses of a process end, on x86-64.
pub const ADDRESSES_END: u64 = (1 << 47) - PAGE_SIZE as u64;

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(count: u64, element: &[u8]) -> Vec<u8> {
        let mut bytes = postcard::to_allocvec(&count).unwrap();
        (0..count).for_each(|_| bytes.extend_from_slice(element));
        bytes
    }

    /// Sixty million messages of a byte each took the server 2.5 GB.
    #[test]
    fn a_packet_says_a_few_things() {
        let standing = postcard::to_allocvec(&FromVm::Standing).unwrap();
        let said = |count| postcard::from_bytes::<Said>(&encoded(count, &standing));
        assert_eq!(said(FEW as u64).unwrap().0.len(), FEW);
        assert!(said(FEW as u64 + 1).is_err());
        let ways = |count| postcard::to_allocvec(&FromVm::Probed(vec![String::new(); count])).unwrap();
        assert!(postcard::from_bytes::<FromVm>(&ways(FEW)).is_ok());
        assert!(postcard::from_bytes::<FromVm>(&ways(FEW + 1)).is_err());
        let given = |count| postcard::to_allocvec(&FromVm::Ballooned(vec![(0..1).into(); count])).unwrap();
        assert!(postcard::from_bytes::<FromVm>(&given(SOME)).is_ok());
        assert!(postcard::from_bytes::<FromVm>(&given(SOME + 1)).is_err());
    }

    /// The server reads frozen pages where the process says that they are: only where ours would have them.
    #[test]
    fn addresses_are_those_of_the_layout() {
        let shape = MachineShape { ram: PageCount(16384), vcpus: 1, machine: Machine::Monitor };
        let bounds = Bounds::of(shape, 100);
        let frames = PageCount(bounds.ram.last().unwrap().end().0);
        let scratch = WINDOW_BASE + 4 * (1 << 30);
        assert!(bounds.scratch.has(scratch, Gfn(1 << 18)) && frames.0 <= 1 << 18);
        let moved = vec![GfnRange::from(10..20)];
        let harvest = Harvest { moved: moved.clone(), copied: Vec::new(), moved_private: moved };
        let honest = Frozen {
            store: StoreId(1),
            harvest,
            scratch_base: scratch,
            copies: Gfn(1 << 18),
            copied: None,
            copy: None,
            activity: RunState::Running,
            kicked_ns: 0,
        };
        let is_valid = |frozen: Frozen| FromVm::Frozen(Box::new(frozen)).is_valid(&bounds);
        assert!(is_valid(honest.clone()));
        assert!(is_valid(Frozen { scratch_base: WINDOW_BASE, copy: Some(7), ..honest.clone() }));
        assert!(!is_valid(Frozen { scratch_base: WINDOW_BASE, ..honest.clone() }));
        assert!(!is_valid(Frozen { copy: Some(7), ..honest.clone() }));
        assert!(!is_valid(Frozen { scratch_base: scratch + 4096, ..honest.clone() }));
        assert!(!is_valid(Frozen { copies: Gfn(0), ..honest.clone() }));
        assert!(!is_valid(Frozen { copied: Some(vec![(10..20).into()]), ..honest.clone() }));
        let pieces = |count| (0..count).map(|at| (2 * at..2 * at + 1).into()).collect::<Vec<GfnRange>>();
        let with = |moved, copied| {
            let harvest = Harvest { moved: pieces(moved), copied: pieces(copied), ..Harvest::default() };
            is_valid(Frozen { harvest, ..honest.clone() })
        };
        assert!(with(100, 0) && with(0, 100));
        assert!(!with(101, 0) && !with(0, 101), "more mappings than it was allowed");
        let (first, second) = (pieces(101)[..50].to_vec(), pieces(101)[50..].to_vec());
        let harvest = Harvest { moved: first, copied: second, ..Harvest::default() };
        assert!(!is_valid(Frozen { harvest, ..honest }), "also where some are moved and others copied");
        assert!(!FromVm::Ready { keeper: 7, window_base: WINDOW_BASE + 4096 }.is_valid(&bounds));
    }
}
