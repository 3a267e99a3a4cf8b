//! The log of a VM process. It has no descriptor of the server's: what it logs goes to the server as messages, which the
//! server shows as far as one process may have it say.

use crate::link;
use crate::wire::FromVm;
use nix::unistd::dup2_stderr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::slice;
use std::sync::OnceLock;

/// Where a logger of this program writes to: stderr, and the server as soon as this is a VM process.
#[derive(Debug)]
pub struct Voice;

static SERVER: OnceLock<OwnedFd> = OnceLock::new();

/// From now on this is a VM process, with its server at the other end of `socket`, and nobody's stderr.
pub(super) fn speak_to(socket: BorrowedFd<'_>) -> io::Result<()> {
    dup2_stderr(File::options().write(true).open("/dev/null")?)?;
    let socket = socket.try_clone_to_owned()?;
    SERVER.set(socket).map_err(|_| io::Error::other("it has a server"))
}

impl Write for Voice {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match SERVER.get() {
            Some(socket) => {
                let line = FromVm::Log(String::from_utf8_lossy(bytes).trim_end().to_owned());
                // What finds no room is not worth waiting for.
                let _ = link::send_now(socket.as_fd(), &slice::from_ref(&line));
            }
            None => io::stderr().write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
