//! What the monitor says: one line, `ok …` or `err …`.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

use crate::abi::{BALLOON_RANGES, EventPage, FIRST_FREE_PAGE};
use crate::command::{Pages, ParseError, USAGE};

/// A command's success; its [`Display`](fmt::Display) is the line after `ok`.
pub enum Answer<'m> {
    /// `help`.
    Usage,
    /// `id`.
    Id(&'m EventPage),
    /// `mem`, with the page count, and how many of them are in the balloon.
    Mem(u64, u64),
    /// So many pages are in the balloon.
    Ballooned(u64),
    /// So many pages were treated as the word says.
    Pages(&'static str, u64),
    /// The sum of all words, modulo 2⁶⁴.
    Sum(u64),
    /// The longest time the clock stood still, in microseconds.
    MaxGap(u64),
    /// `fork`, in the parent.
    Parent(&'m EventPage),
    /// `fork`, in child number so much.
    Child(u32),
    /// Nothing to add.
    Done,
    /// `halt`: the monitor ends when this is said.
    Halt,
}

/// A command's failure; its [`Display`](fmt::Display) is the line after `err`.
pub enum Failure<'l> {
    /// The line is no command.
    Parse(ParseError<'l>),
    /// The line has more than [`LINE_MAX`](crate::monitor::LINE_MAX) bytes.
    TooLong,
    /// The pages are not all from `first` to below `end`.
    Outside {
        /// What was asked for.
        pages: Pages,
        /// The first page the command may use.
        first: u64,
        /// One past the last.
        end: u64,
    },
    /// `verify` found something else.
    Mismatch {
        /// Linear page.
        page: u64,
        /// 8-byte word in the page.
        word: usize,
        /// What the pattern says.
        want: u64,
        /// What memory says.
        got: u64,
    },
    /// This machine has no such device.
    Unsupported,
    /// This page is in the balloon.
    InBalloon(u64),
    /// The balloon has no room for one more range.
    BalloonFull,
    /// The VMM could not take the pages.
    NotTaken(Pages),
    /// The VMM did not say how fast the TSC runs.
    NoClock,
    /// The VMM could not fork, and says why.
    Fork(&'l EventPage),
}

impl fmt::Display for Answer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ok")?;
        match self {
            Self::Usage => USAGE.iter().enumerate().try_for_each(|(i, usage)| {
                f.write_str(if i == 0 { " " } else { ", " })?;
                f.write_str(usage)
            }),
            Self::Id(page) => {
                f.write_str(" name=")?;
                ascii(&page.name, &page.name_len).try_for_each(|c| f.write_char(c))?;
                write!(f, " generation={}", page.generation.load(Relaxed))
            }
            Self::Mem(pages, 0) => write!(f, " first={FIRST_FREE_PAGE} pages={pages}"),
            Self::Mem(pages, held) => write!(f, " first={FIRST_FREE_PAGE} pages={pages} ballooned={held}"),
            Self::Ballooned(held) => write!(f, " ballooned={held}"),
            Self::Pages(done, count) => write!(f, " {done}={count}"),
            Self::Sum(sum) => write!(f, " sum={sum}"),
            Self::MaxGap(us) => write!(f, " max_gap_us={us}"),
            Self::Parent(page) => {
                f.write_str(" parent")?;
                let mut last = ' ';
                for c in ascii(&page.fork_text, &page.fork_text_len) {
                    if last == ' ' && c != ' ' {
                        f.write_str(" child=")?;
                    }
                    if c != ' ' {
                        f.write_char(c)?;
                    }
                    last = c;
                }
                Ok(())
            }
            Self::Child(index) => write!(f, " child index={index}"),
            Self::Done | Self::Halt => Ok(()),
        }
    }
}

impl fmt::Display for Failure<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("err ")?;
        match self {
            Self::Parse(error) => error.fmt(f),
            Self::TooLong => f.write_str("line too long"),
            Self::Outside { pages: Pages { first: page, count }, first, end } => {
                write!(f, "page={page} count={count} is outside {first}..{end}")
            }
            Self::Mismatch { page, word, want, got } => {
                write!(f, "mismatch page={page} word={word} want={want} got={got}")
            }
            Self::Unsupported => f.write_str("unsupported"),
            Self::InBalloon(page) => write!(f, "page={page} is in the balloon: deflate it first"),
            Self::BalloonFull => write!(f, "more than {BALLOON_RANGES} ranges of pages in the balloon"),
            Self::NotTaken(Pages { first: page, count }) => {
                write!(f, "page={page} count={count} could not be given back")
            }
            Self::NoClock => f.write_str("TSC frequency is not known"),
            Self::Fork(page) => ascii(&page.fork_text, &page.fork_text_len).try_for_each(|c| f.write_char(c)),
        }
    }
}

/// Text from the VMM. What is not printable ASCII becomes `?`, so that an answer stays one line.
fn ascii<'m>(text: &'m [AtomicU8], len: &AtomicU32) -> impl Iterator<Item = char> + use<'m> {
    let len = text.len().min(len.load(Relaxed) as usize);
    text[..len].iter().map(|byte| match byte.load(Relaxed) {
        byte @ b' '..=b'~' => char::from(byte),
        _ => '?',
    })
}
