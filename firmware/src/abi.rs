//! The contract between the VMM and the monitor: addresses, ports, and what lies where.
//!
//! All addresses are guest physical, in bytes. Pages are 4 KiB and numbered linearly: page `p` is the `p`-th page of
//! RAM, wherever the hole below 4 GiB puts it ([`page_to_gpa`]).
//!
//! ```text
//! 0x00000  not used          0x07000  BalloonPage
//! 0x01000  EventPage         0x08000  stack, grows down from 0x10000
//! 0x02000  Inbox             0x10000  image: page tables, descriptors, code, constants (never written)
//! 0x03000  Outbox (4 pages)  0x40000  first free page (64): RAM for the commands
//! ```
//!
//! Shared fields are atomics because the other side is another program. The VMM does not use the structures: it
//! reads and writes single fields at the addresses in [`at`].

use core::mem::{offset_of, size_of};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// Where [`EventPage`] lies.
pub const EVENT_PAGE: u64 = 0x1000;
/// Where [`Inbox`] lies.
pub const INBOX: u64 = 0x2000;
/// Where [`Outbox`] lies.
pub const OUTBOX: u64 = 0x3000;
/// Where [`BalloonPage`] lies.
pub const BALLOON: u64 = 0x7000;
/// Lowest address of the stack. The monitor has no other private memory.
pub const STACK_BASE: u64 = 0x8000;
/// One past the highest address of the stack.
pub const STACK_TOP: u64 = 0x1_0000;
/// Where the flat image goes.
pub const IMAGE_BASE: u64 = 0x1_0000;
/// One past the highest address an image may use.
pub const IMAGE_LIMIT: u64 = 0x4_0000;
/// First page that commands may write.
pub const FIRST_FREE_PAGE: u64 = IMAGE_LIMIT / PAGE_SIZE;
/// RAM below ends here; devices live from here to [`HOLE_END`].
pub const HOLE_START: u64 = 3 << 30;
/// RAM continues here.
pub const HOLE_END: u64 = 4 << 30;
/// Most RAM a VM with the monitor can have, in pages: what the page tables inside the image show, 32 GiB.
pub const MAX_PAGES: u64 = (32 << 30) / PAGE_SIZE;

/// The top-level page table inside the image, for CR3. It maps RAM to itself, for user mode.
pub const PAGE_TABLE: u64 = IMAGE_BASE;
/// The task state segment inside the image; its I/O bitmap allows [`DOORBELL`], [`WAIT`] and [`COM1`] to user mode.
pub const TSS: u64 = IMAGE_BASE + 0x2_2000;
/// Segment limit of [`TSS`]: size in bytes less one.
pub const TSS_LIMIT: u32 = 0x68 + (WAIT as u32 + 8) / 8;
/// Where the page tables show all RAM a second time, so that page 0 is not at the null address.
pub const RAM_VIEW: u64 = 1 << 39;
/// Code for a VMM that wants pages touched before the monitor needs them. Entered as the monitor is, or where it was stopped,
/// it writes to each of the RCX pages from address RDI on, in [`RAM_VIEW`], what is there, and rings [`Doorbell::Touched`]. It
/// uses no stack, and goes on nowhere.
pub const TOUCH: u64 = IMAGE_BASE + 0x2_3000;
/// First instruction, in 64-bit user mode, with the stack pointer at [`ENTRY_STACK`].
pub const ENTRY: u64 = TOUCH + 0x40;
/// The stack pointer at [`ENTRY`]: as after a call.
pub const ENTRY_STACK: u64 = STACK_TOP - 8;

/// 32-bit OUT port of the guest's notices: a [`Doorbell`]. Behind the ports of QEMU's `fw_cfg` (0x510 to 0x51b): there, as
/// under any other VMM, nothing must be at ours.
pub const DOORBELL: u16 = 0x520;
/// 32-bit IN port that the VMM completes when there is something to do: bits of [`wake`].
///
/// The read may be completed with 0 at any time (a fork does so); the monitor waits again and writes no memory.
pub const WAIT: u16 = 0x524;
/// First port of the serial console, a 16550.
pub const COM1: u16 = 0x3f8;

/// What the monitor tells the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Doorbell {
    /// The outbox holds an answer.
    Answer = 1,
    /// The monitor has seen a new [`EventPage::event`].
    Alive = 2,
    /// Fork this VM [`EventPage::fork_count`] times, then set [`EventPage::fork_state`] here and in each child.
    Fork = 3,
    /// Power off. The vCPU need not run again.
    Halt = 4,
    /// Drop the contents of the pages that [`BalloonPage`] tells, then set [`BalloonPage::state`].
    Inflate = 5,
    /// [`BalloonPage::held`] is less now: set [`BalloonPage::state`].
    Deflate = 6,
    /// The code at [`TOUCH`] is done.
    Touched = 7,
}

impl Doorbell {
    /// Decodes what was written to [`DOORBELL`].
    pub const fn from_u32(value: u32) -> Option<Self> {
        match value {
            1 => Some(Self::Answer),
            2 => Some(Self::Alive),
            3 => Some(Self::Fork),
            4 => Some(Self::Halt),
            5 => Some(Self::Inflate),
            6 => Some(Self::Deflate),
            7 => Some(Self::Touched),
            _ => None,
        }
    }
}

/// Bits that complete a read of [`WAIT`].
pub mod wake {
    /// A line is in the inbox. Reported once per line; no other line follows before its answer.
    pub const INBOX: u32 = 1 << 0;
    /// The serial port has bytes.
    pub const SERIAL: u32 = 1 << 1;
    /// The event page changed: a fork ended or the event word is new.
    pub const EVENT: u32 = 1 << 2;
    /// Power off, as if the command `halt` had been given.
    pub const STOP: u32 = 1 << 3;
}

/// How a fork ended for the VM that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ForkState {
    /// It has not ended. The monitor writes this before it rings [`Doorbell::Fork`].
    Pending = 0,
    /// This is the parent; [`EventPage::fork_text`] names the children, separated by spaces.
    Parent = 1,
    /// This is child number [`EventPage::fork_index`], from 1.
    Child = 2,
    /// It failed; [`EventPage::fork_text`] says why, in one line.
    Failed = 3,
}

impl ForkState {
    /// Decodes [`EventPage::fork_state`].
    pub const fn from_u32(value: u32) -> Option<Self> {
        match value {
            0 => Some(Self::Pending),
            1 => Some(Self::Parent),
            2 => Some(Self::Child),
            3 => Some(Self::Failed),
            _ => None,
        }
    }
}

/// How the VMM took what the monitor asked of the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum BalloonState {
    /// It does not know of balloons. The monitor writes this before it rings.
    Pending = 0,
    /// It is done.
    Done = 1,
    /// It cannot be done, and not all of the pages read zero.
    Failed = 2,
}

impl BalloonState {
    /// Decodes [`BalloonPage::state`].
    pub const fn from_u32(value: u32) -> Option<Self> {
        match value {
            0 => Some(Self::Pending),
            1 => Some(Self::Done),
            2 => Some(Self::Failed),
            _ => None,
        }
    }
}

/// Longest VM name, in bytes.
pub const NAME_MAX: usize = 64;
/// Longest [`EventPage::fork_text`], in bytes.
pub const FORK_TEXT_MAX: usize = 3072;
/// Longest line in the inbox, in bytes.
pub const INBOX_TEXT_MAX: usize = 4080;
/// Longest answer in the outbox, in bytes.
pub const OUTBOX_TEXT_MAX: usize = 16368;

/// What a VM is told about itself. All fields but [`fork_count`](Self::fork_count) are the VMM's, except that the
/// monitor sets [`fork_state`](Self::fork_state) back to pending.
#[repr(C)]
pub struct EventPage {
    /// Not 0, and new for every launched or forked VM before it runs.
    pub event: AtomicU64,
    /// The VM's generation, for `id`.
    pub generation: AtomicU64,
    /// RAM, in pages.
    pub mem_pages: AtomicU64,
    /// TSC ticks per millisecond; 0 if unknown.
    pub tsc_khz: AtomicU64,
    /// Bytes of `name` in use.
    pub name_len: AtomicU32,
    /// The VM's name, printable ASCII.
    pub name: [AtomicU8; NAME_MAX],
    /// A [`ForkState`].
    pub fork_state: AtomicU32,
    /// Which child this is, from 1.
    pub fork_index: AtomicU32,
    /// Bytes of `fork_text` in use.
    pub fork_text_len: AtomicU32,
    /// Names of the children or an error, printable ASCII.
    pub fork_text: [AtomicU8; FORK_TEXT_MAX],
    /// How many children the monitor asks for.
    pub fork_count: AtomicU32,
}

/// A line for the monitor.
#[repr(C)]
pub struct Inbox {
    /// Comes back with the answer.
    pub tag: AtomicU64,
    /// Bytes of `text` in use.
    pub len: AtomicU32,
    _pad: u32,
    /// The line, without a newline.
    pub text: [AtomicU8; INBOX_TEXT_MAX],
}

/// An answer of the monitor.
#[repr(C)]
pub struct Outbox {
    /// The tag of the line that is answered.
    pub tag: AtomicU64,
    /// Bytes of `text` in use.
    pub len: AtomicU32,
    _pad: u32,
    /// `ok …` or `err …`, without a newline.
    pub text: [AtomicU8; OUTBOX_TEXT_MAX],
}

/// Most ranges of pages in the balloon.
pub const BALLOON_RANGES: usize = 254;

/// What the monitor has given back. All fields but [`state`](Self::state) are the monitor's; pages are linear ones.
#[repr(C)]
pub struct BalloonPage {
    /// First page that is to be given back.
    pub first: AtomicU64,
    /// How many are.
    pub count: AtomicU64,
    /// How many pages are in the balloon once that is done.
    pub held: AtomicU64,
    /// A [`BalloonState`]. The VMM sets it before the doorbell's write is complete.
    pub state: AtomicU32,
    /// How many of `ranges` are in use.
    pub len: AtomicU32,
    /// The pages in the balloon, sorted; no two ranges touch.
    pub ranges: [BalloonRange; BALLOON_RANGES],
}

/// Pages in the balloon.
#[repr(C)]
pub struct BalloonRange {
    /// The first page.
    pub first: AtomicU64,
    /// One past the last.
    pub end: AtomicU64,
}

const _: () = assert!(size_of::<BalloonPage>() as u64 == PAGE_SIZE);
const _: () = assert!(size_of::<EventPage>() as u64 <= PAGE_SIZE);
const _: () = assert!(size_of::<Inbox>() as u64 == PAGE_SIZE);
const _: () = assert!(size_of::<Outbox>() as u64 == 4 * PAGE_SIZE);

/// Guest physical addresses of the shared fields.
pub mod at {
    use super::*;

    /// [`EventPage::event`], 8 bytes.
    pub const EVENT: u64 = EVENT_PAGE + offset_of!(EventPage, event) as u64;
    /// [`EventPage::generation`], 8 bytes.
    pub const GENERATION: u64 = EVENT_PAGE + offset_of!(EventPage, generation) as u64;
    /// [`EventPage::mem_pages`], 8 bytes.
    pub const MEM_PAGES: u64 = EVENT_PAGE + offset_of!(EventPage, mem_pages) as u64;
    /// [`EventPage::tsc_khz`], 8 bytes.
    pub const TSC_KHZ: u64 = EVENT_PAGE + offset_of!(EventPage, tsc_khz) as u64;
    /// [`EventPage::name_len`], 4 bytes.
    pub const NAME_LEN: u64 = EVENT_PAGE + offset_of!(EventPage, name_len) as u64;
    /// [`EventPage::name`], [`NAME_MAX`] bytes.
    pub const NAME: u64 = EVENT_PAGE + offset_of!(EventPage, name) as u64;
    /// [`EventPage::fork_state`], 4 bytes.
    pub const FORK_STATE: u64 = EVENT_PAGE + offset_of!(EventPage, fork_state) as u64;
    /// [`EventPage::fork_index`], 4 bytes.
    pub const FORK_INDEX: u64 = EVENT_PAGE + offset_of!(EventPage, fork_index) as u64;
    /// [`EventPage::fork_text_len`], 4 bytes.
    pub const FORK_TEXT_LEN: u64 = EVENT_PAGE + offset_of!(EventPage, fork_text_len) as u64;
    /// [`EventPage::fork_text`], [`FORK_TEXT_MAX`] bytes.
    pub const FORK_TEXT: u64 = EVENT_PAGE + offset_of!(EventPage, fork_text) as u64;
    /// [`EventPage::fork_count`], 4 bytes.
    pub const FORK_COUNT: u64 = EVENT_PAGE + offset_of!(EventPage, fork_count) as u64;
    /// [`BalloonPage::first`], 8 bytes.
    pub const BALLOON_FIRST: u64 = BALLOON + offset_of!(BalloonPage, first) as u64;
    /// [`BalloonPage::count`], 8 bytes.
    pub const BALLOON_COUNT: u64 = BALLOON + offset_of!(BalloonPage, count) as u64;
    /// [`BalloonPage::held`], 8 bytes.
    pub const BALLOON_HELD: u64 = BALLOON + offset_of!(BalloonPage, held) as u64;
    /// [`BalloonPage::state`], 4 bytes.
    pub const BALLOON_STATE: u64 = BALLOON + offset_of!(BalloonPage, state) as u64;
    /// [`Inbox::tag`], 8 bytes.
    pub const INBOX_TAG: u64 = INBOX + offset_of!(Inbox, tag) as u64;
    /// [`Inbox::len`], 4 bytes.
    pub const INBOX_LEN: u64 = INBOX + offset_of!(Inbox, len) as u64;
    /// [`Inbox::text`], [`INBOX_TEXT_MAX`] bytes.
    pub const INBOX_TEXT: u64 = INBOX + offset_of!(Inbox, text) as u64;
    /// [`Outbox::tag`], 8 bytes.
    pub const OUTBOX_TAG: u64 = OUTBOX + offset_of!(Outbox, tag) as u64;
    /// [`Outbox::len`], 4 bytes.
    pub const OUTBOX_LEN: u64 = OUTBOX + offset_of!(Outbox, len) as u64;
    /// [`Outbox::text`], [`OUTBOX_TEXT_MAX`] bytes.
    pub const OUTBOX_TEXT: u64 = OUTBOX + offset_of!(Outbox, text) as u64;
}

/// The guest physical address of linear page `page`, which must be below [`MAX_PAGES`].
pub const fn page_to_gpa(page: u64) -> u64 {
    let linear = page * PAGE_SIZE;
    if linear < HOLE_START { linear } else { linear + (HOLE_END - HOLE_START) }
}
