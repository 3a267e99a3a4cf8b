//! Connections to guests that clients have asked for, until the guest answers.
//!
//! A connection is a pair of sockets. One goes to the VM's process with the request; the other waits here, and goes to the client
//! with the answer. So no byte of it passes through the server, and who gives up ends it by closing an end.

use crate::devices::virtio::Outcome;
use crate::server::ids::{ClientId, Generation};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// A connection that its guest has not answered yet.
#[derive(Debug)]
pub struct Asked {
    /// The guest's VM.
    pub vm: Generation,
    /// Who asked for it.
    pub client: ClientId,
    /// The guest's port.
    pub port: u32,
    /// The client's end.
    pub socket: OwnedFd,
}

/// All of them, by what they are called on the way to the VM's process and back.
#[derive(Debug, Default)]
pub struct Connects {
    asked: HashMap<u64, Asked>,
    last_tag: u64,
}

impl Connects {
    /// A client asks for a connection. What it is called, and the guest's end, which never waits.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn ask(&mut self, vm: Generation, client: ClientId, port: u32) -> io::Result<(u64, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let tag = self.fresh_tag();
        self.asked.insert(tag, Asked { vm, client, port, socket: ours.into() });
        Ok((tag, theirs.into()))
    }

    /// A tag that nobody waits for.
    pub fn fresh_tag(&mut self) -> u64 {
        self.last_tag += 1;
        self.last_tag
    }

    /// A VM's process says what came of a request. It may say so of others' requests, or of none: that is not heard.
    pub fn answered(&mut self, vm: Generation, tag: u64, outcome: Outcome) -> Option<(Asked, Outcome)> {
        self.asked.get(&tag).filter(|asked| asked.vm == vm)?;
        Some((self.asked.remove(&tag)?, outcome))
    }

    /// Nobody waits for this one any longer.
    pub fn late(&mut self, tag: u64) -> Option<Asked> {
        self.asked.remove(&tag)
    }

    /// A VM has ended. The clients that waited for its guest.
    pub fn ended(&mut self, vm: Generation) -> Vec<ClientId> {
        self.asked.extract_if(|_, asked| asked.vm == vm).map(|(_, asked)| asked.client).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    const A: Generation = Generation(1);
    const B: Generation = Generation(2);

    #[test]
    fn a_process_answers_for_its_own_guest_and_once() {
        let mut connects = Connects::default();
        let (first, _) = connects.ask(A, ClientId(1), 52).unwrap();
        let (second, _end) = connects.ask(A, ClientId(2), 53).unwrap();
        assert!(connects.answered(B, first, Outcome::Accepted).is_none(), "another VM's request");
        assert!(connects.answered(A, second + 1, Outcome::Accepted).is_none(), "nobody's");
        let (asked, outcome) = connects.answered(A, second, Outcome::Refused).unwrap();
        assert_eq!((asked.client, asked.port, outcome), (ClientId(2), 53, Outcome::Refused));
        assert!(connects.answered(A, second, Outcome::Accepted).is_none(), "said twice");
        assert_eq!(connects.ended(A), [ClientId(1)]);
        assert_eq!(connects.ended(A), []);
    }

    #[test]
    fn who_gives_up_closes_the_guests_end() {
        let mut connects = Connects::default();
        let (tag, end) = connects.ask(A, ClientId(1), 52).unwrap();
        let mut end = UnixStream::from(end);
        assert_eq!(end.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(connects.late(tag).unwrap().client, ClientId(1));
        assert_eq!(end.read(&mut [0]).unwrap(), 0);
        assert!(connects.late(tag).is_none());
    }
}
