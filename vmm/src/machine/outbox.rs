//! What a VM process has to say to the server: several messages in one packet, where nobody waits for the first.
//!
//! Every packet wakes the server, which takes as long as anything that is done between two of them.

use crate::link::Link;
use crate::wire::{FEW, FromVm};
use std::io;
use std::os::fd::BorrowedFd;
use std::slice;

/// Messages that are on their way, in order.
#[derive(Debug)]
pub(super) struct Outbox<'a> {
    link: &'a mut Link,
    held: Vec<FromVm>,
}

impl<'a> Outbox<'a> {
    /// Messages for `link`.
    pub fn new(link: &'a mut Link) -> Self {
        Self { link, held: Vec::new() }
    }

    /// Keeps a message until the next is sent.
    pub fn hold(&mut self, message: FromVm) {
        self.held.push(message);
    }

    /// Sends a message, behind all that are held.
    pub fn tell(&mut self, message: FromVm) -> io::Result<()> {
        self.hold(message);
        self.send()
    }

    /// Sends a message, behind all that are held, and waits until it will be heard whatever becomes of this process.
    pub fn tell_for_good(&mut self, message: FromVm) -> io::Result<()> {
        self.tell(message)?;
        self.link.await_sent()
    }

    /// Sends what is held.
    pub fn send(&mut self) -> io::Result<()> {
        let held = std::mem::take(&mut self.held);
        held.chunks(FEW).try_for_each(|some| self.link.send(&some, &[]))
    }
}

/// Sends one message, and descriptors.
pub(super) fn tell(link: &mut Link, message: &FromVm, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    // As a `Said` of one.
    link.send(&slice::from_ref(message), fds)
}
