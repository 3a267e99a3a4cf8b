//! Where the main thread and the device meet: what the server wants, and which sockets have become ready.
//!
//! The main thread only watches and writes down. The device's sockets are the device's: they are read, written and closed by the
//! vCPU that has it.

use super::muxer::{MOST, Readiness};
use super::notice::Child;
use super::packet::Pair;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A connection that the host wants.
#[derive(Debug)]
pub struct Wanted {
    /// Names it.
    pub tag: u64,
    /// The guest's port.
    pub port: u32,
    /// Whether the socket is told when the guest has accepted.
    pub greet: bool,
    /// Its socket.
    pub socket: OwnedFd,
}

/// Something that the device has not seen.
#[derive(Debug)]
pub enum News {
    /// The host wants a connection.
    Connect(Wanted),
    /// The guest is to be told which child it is.
    Notice(Child),
    /// What the guest asked for, and its socket where there is one.
    Answer(Pair, Option<OwnedFd>),
    /// A socket has become ready.
    Ready(Pair, Readiness),
}

/// Most sockets that are looked at in one go; others are ready still.
const LOOK: usize = 64;

/// The meeting place.
#[derive(Debug)]
pub struct Outside {
    sockets: Epoll,
    news: Mutex<Vec<News>>,
}

impl Outside {
    /// Nobody has said anything.
    ///
    /// # Errors
    /// Of `epoll_create1`.
    pub fn new() -> io::Result<Self> {
        Ok(Self { sockets: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, news: Mutex::default() })
    }

    /// Main thread: the host wants a connection. Whether that can be: a guest that looks at none is not asked for ever more.
    pub fn connect(&self, wanted: Wanted) -> bool {
        let mut news = self.lock();
        let waiting = news.iter().filter(|news| matches!(news, News::Connect(..))).count();
        if waiting < MOST {
            news.push(News::Connect(wanted));
        }
        waiting < MOST
    }

    /// Main thread: the guest, which has not run since it was forked, is to be told so.
    pub fn notify(&self, child: Child) {
        self.lock().push(News::Notice(child));
    }

    /// Main thread: the server's answer to what the guest asked for.
    pub fn answer(&self, pair: Pair, socket: Option<OwnedFd>) {
        self.lock().push(News::Answer(pair, socket));
    }

    /// Main thread: writes down which sockets are ready, each of which is not watched then. Whether there are any.
    pub fn look(&self) -> bool {
        let mut events = [EpollEvent::empty(); LOOK];
        let count = match self.sockets.wait(&mut events, EpollTimeout::ZERO) {
            Ok(count) => count,
            Err(error) => {
                log::debug!("look at sockets: {error}");
                0
            }
        };
        self.lock().extend(events[..count].iter().map(|event| {
            let has = |flag| event.events().intersects(flag);
            let ready = Readiness {
                read: has(EpollFlags::EPOLLIN | EpollFlags::EPOLLERR),
                write: has(EpollFlags::EPOLLOUT),
                hung_up: has(EpollFlags::EPOLLHUP),
            };
            News::Ready(Pair::from_u64(event.data()), ready)
        }));
        count > 0
    }

    /// Main thread: is readable when a socket is ready.
    pub fn bell(&self) -> RawFd {
        self.sockets.0.as_raw_fd()
    }

    /// Device: what it has not seen.
    pub fn take(&self) -> Vec<News> {
        std::mem::take(&mut *self.lock())
    }

    /// Device: has a socket watched, for nothing yet.
    pub fn begin(&self, pair: Pair, socket: BorrowedFd<'_>) -> nix::Result<()> {
        self.sockets.add(socket, EpollEvent::new(EpollFlags::EPOLLONESHOT, pair.to_u64()))
    }

    /// Device: has a socket watched until it is ready for this once, or its other end is closed.
    pub fn watch(&self, pair: Pair, socket: BorrowedFd<'_>, wanted: Readiness) -> nix::Result<()> {
        let mut flags = EpollFlags::EPOLLONESHOT;
        flags.set(EpollFlags::EPOLLIN, wanted.read);
        flags.set(EpollFlags::EPOLLOUT, wanted.write);
        self.sockets.modify(socket, &mut EpollEvent::new(flags, pair.to_u64()))
    }

    /// Device: a socket is watched no more.
    pub fn end(&self, socket: BorrowedFd<'_>) {
        if let Err(error) = self.sockets.delete(socket) {
            log::debug!("watch a socket no more: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<News>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
