//! This terminal: how large it is, and what is changed of it for a while.
#![allow(unsafe_code)] // the ioctl that tells the size

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io::{self, Stdin, Write};
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;

/// Columns and rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub columns: usize,
    pub rows: usize,
}

impl Size {
    /// Where nobody tells.
    pub const USUAL: Self = Self { columns: 80, rows: 24 };

    /// Of the terminal that this leads to; the usual one if it is none, or does not know.
    pub fn of(terminal: impl AsFd) -> Self {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: The descriptor is open, and the kernel writes no more than a `winsize` to what is one.
        let told = unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
        match (told, size.ws_col, size.ws_row) {
            (0, columns @ 1.., rows @ 1..) => Self { columns: columns.into(), rows: rows.into() },
            _ => Self::USUAL,
        }
    }
}

/// The terminal without line editing, echo and signal keys, until this is dropped. Its output stays as it was: lines need
/// no carriage returns.
#[derive(Debug)]
pub struct RawMode<'a> {
    terminal: &'a Stdin,
    before: Termios,
}

impl<'a> RawMode<'a> {
    pub fn enter(terminal: &'a Stdin) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        raw.output_flags = before.output_flags;
        tcsetattr(terminal, SetArg::TCSANOW, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawMode<'_> {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(self.terminal, SetArg::TCSANOW, &self.before);
    }
}

/// A screen of our own, without a cursor, until this is dropped: then what was on the terminal is there again.
#[derive(Debug)]
pub struct OwnScreen;

impl OwnScreen {
    pub fn enter(out: &mut impl Write) -> io::Result<Self> {
        let entered = Self;
        out.write_all(b"\x1b[?1049h\x1b[?25l").and_then(|()| out.flush())?;
        Ok(entered)
    }
}

impl Drop for OwnScreen {
    fn drop(&mut self) {
        let mut out = io::stdout();
        let _ = out.write_all(b"\x1b[?25h\x1b[?1049l").and_then(|()| out.flush());
    }
}
