//! What a VM process says, and what of it can be: whoever is taken over may say anything.

use super::{Line, MachineShape, RunState};
use crate::devices::virtio::{Noticed, Outcome};
use crate::layout::ram_ranges;
use crate::machine::WINDOW_BASE;
use crate::machine::state::PackedState;
use crate::plain;
use guest_mem::window::host::ScratchRow;
use guest_mem::window::{Harvest, are_apart};
use guest_mem::{Gfn, GfnRange, PAGE_SIZE, PageCount, StoreId};
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::marker::PhantomData;

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
    Deduped {
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
    /// How a connection to the guest came out.
    Connected {
        /// Names it.
        tag: u64,
        /// How.
        outcome: Outcome,
    },
    /// The guest wants to be connected to this port of the host's. Answered by `Connected`.
    Connect {
        /// Names it.
        tag: u64,
        /// The port.
        port: u32,
    },
    /// What came of the notice that the guest, a child, was given.
    Noticed(Noticed),
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
            Self::Noticed(Noticed::Acked { reseeded, trouble }) => {
                Self::Noticed(Noticed::Acked { reseeded, trouble: reason(trouble) })
            }
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
            Self::Deduped { pages, .. } | Self::Wrote { pages, .. } => are_apart(pages, &bounds.ram),
            _ => true,
        }
    }
}

/// Where the addresses of a process end, on x86-64.
pub const ADDRESSES_END: u64 = (1 << 47) - PAGE_SIZE as u64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Machine;

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
