//! This terminal: how large it is, and what is changed of it for a while.
#![allow(unsafe_code)] // the ioctl that tells the size

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

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

/// What the terminal does with output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputMode {
    /// As before: who writes need not send carriage returns.
    AsItWas,
    /// Nothing: another terminal has done it.
    Raw,
}

/// The terminal without line editing, echo and signal keys, until this, or the first of its clones, is dropped.
#[derive(Clone, Debug)]
pub struct RawMode(Arc<Mutex<Option<Termios>>>);

impl RawMode {
    pub fn enter(output: OutputMode) -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        if output == OutputMode::AsItWas {
            raw.output_flags = before.output_flags;
        }
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(Arc::new(Mutex::new(Some(before)))))
    }

    /// Puts the terminal back, once. For a thread that ends the process.
    pub fn leave(&self) {
        let before = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(before) = before {
            // A terminal that is gone needs no mode.
            let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &before);
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.leave();
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

/// Ctrl-P.
const FIRST: u8 = 0x10;
/// Ctrl-Q.
const SECOND: u8 = 0x11;

/// Looks for the keys that leave a session, Ctrl-P and then Ctrl-Q, in what is typed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaveKeys {
    /// The first has been typed, and not passed on yet.
    first: bool,
}

impl LeaveKeys {
    /// What of these bytes is to be passed on, and whether the keys were typed after that.
    pub fn on(self, typed: &[u8]) -> (Self, Vec<u8>, bool) {
        let (mut first, mut passed) = (self.first, Vec::with_capacity(typed.len() + 1));
        for &byte in typed {
            match (first, byte) {
                (true, SECOND) => return (Self::default(), passed, true),
                (true, FIRST) => passed.push(FIRST),
                (true, _) => {
                    passed.extend([FIRST, byte]);
                    first = false;
                }
                (false, FIRST) => first = true,
                (false, _) => passed.push(byte),
            }
        }
        (Self { first }, passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut keys, mut all) = (LeaveKeys::default(), Vec::new());
        for piece in pieces {
            let (next, passed, left) = keys.on(piece);
            all.extend(passed);
            if left {
                return (all, true);
            }
            keys = next;
        }
        (all, false)
    }

    #[test]
    fn two_keys_leave_and_nothing_else_is_lost() {
        assert_eq!(typed(&[b"ls\x10\x11rest"]), (b"ls".to_vec(), true));
        assert_eq!(typed(&[b"a\x10", b"\x11"]), (b"a".to_vec(), true));
        assert_eq!(typed(&[b"a\x10b\x11"]), (b"a\x10b\x11".to_vec(), false));
        assert_eq!(typed(&[b"\x10\x10\x11"]), (b"\x10".to_vec(), true));
        assert_eq!(typed(&[b"\x10", b"\x10", b"x"]), (b"\x10\x10x".to_vec(), false));
        assert_eq!(typed(&[b"\x11\x10"]), (b"\x11".to_vec(), false), "the first key waits for the second");
    }
}
