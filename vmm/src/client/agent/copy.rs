//! Files to and from a guest.

use super::talk::{Talk, WORK};
use super::{Agent, Error, Place, unexpected};
use crate::api::{ErrorKind, Failure};
use agent::frame::MAX_DATA;
use agent::message::{FromAgent, ToAgent};
use agent::tree::{self, Trust};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

impl Agent {
    /// Copies a file or a tree of the host into the guest: below `to` if that is a directory, and as `to` otherwise. Owners are
    /// kept as numbers.
    pub fn copy_in(&self, from: &Path, to: impl AsRef<OsStr>) -> Result<(), Error> {
        let found = fs::symlink_metadata(from);
        found.map_err(|e| Error::bad_request(format!("cp: {}: {e}", from.display())))?;
        self.put(to.as_ref(), Place::As, |out| tree::pack(from, out).map(drop))
    }

    /// Copies a file or a tree of the guest to the host: below `to` if that is a directory, and as `to` otherwise. Nothing
    /// outside of that is touched, whatever the guest sends, and nothing gets the right to run as somebody else.
    pub fn copy_out(&self, from: impl AsRef<OsStr>, to: &Path) -> Result<(), Error> {
        let mut archive = self.archive(from)?;
        let done = tree::unpack(&mut archive, to, Place::As, Trust::Host);
        archive.outcome(done)
    }

    /// Unpacks an archive (`tar`'s) in a directory of the guest.
    pub fn unpack(&self, mut archive: impl Read, to: impl AsRef<OsStr>) -> Result<(), Error> {
        self.put(to.as_ref(), Place::Into, |out| io::copy(&mut archive, out).map(drop))
    }

    /// A file or a tree of the guest as an archive.
    pub fn archive(&self, from: impl AsRef<OsStr>) -> Result<Archive, Error> {
        let mut talk = self.open()?;
        talk.send(&ToAgent::Get { path: from.as_ref().as_bytes().to_vec() })?;
        Ok(Archive { talk, piece: io::Cursor::default(), begun: false, over: false, failed: None })
    }

    fn put(&self, to: &OsStr, place: Place, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
        let mut talk = self.open()?;
        talk.send(&ToAgent::Put { path: to.as_bytes().to_vec(), place })?;
        let mut pieces = BufWriter::with_capacity(MAX_DATA, Pieces(&mut talk));
        let filled = fill(&mut pieces).and_then(|()| pieces.flush());
        drop(pieces.into_parts());
        if let Err(e) = filled {
            return Err(Failure::failed(format!("cp: {e}")).into());
        }
        talk.send(&ToAgent::DataEnd)?;
        self.done(&mut talk)
    }
}

/// Bytes of an archive on their way.
struct Pieces<'a>(&'a mut Talk);

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(MAX_DATA)];
        self.0.send(&ToAgent::Data(piece.to_vec())).map_err(io::Error::other)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An archive that a guest sends. What goes wrong there is an error when it is read.
#[derive(Debug)]
pub struct Archive {
    talk: Talk,
    piece: io::Cursor<Vec<u8>>,
    begun: bool,
    over: bool,
    failed: Option<Error>,
}

impl Archive {
    /// What became of it: the guest's own words, where it was the guest that failed.
    fn outcome(mut self, done: io::Result<()>) -> Result<(), Error> {
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        done.map_err(|e| {
            // Before anything came, nothing was changed.
            let kind = if self.begun { ErrorKind::Failed } else { ErrorKind::BadRequest };
            Failure::new(kind, format!("cp: {e}")).into()
        })
    }

    /// Copies all of it.
    pub fn copy_to(mut self, out: &mut impl Write) -> Result<(), Error> {
        let done = io::copy(&mut self, out).and_then(|_| out.flush());
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        done.map_err(Error::io("cp"))
    }
}

impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || self.over {
                return Ok(count);
            }
            match self.talk.read_by(Instant::now() + WORK) {
                Ok(FromAgent::Out(bytes)) => {
                    self.begun = true;
                    self.piece = io::Cursor::new(bytes);
                }
                Ok(FromAgent::Done) => self.over = true,
                Ok(other) => self.failed = Some(unexpected(self.talk.name(), other)),
                Err(e) => self.failed = Some(e),
            }
            if self.failed.is_some() {
                return Err(io::Error::other("the guest's archive ends early"));
            }
        }
    }
}
