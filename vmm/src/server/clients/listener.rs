//! Where clients come from, and what becomes of them where there is no room.

use super::connection::Client;
use crate::api::{ErrorKind, Failure, Greeting, Line};
use crate::server::watch::{Origin, Token, Watches};
use event_manager::EventSet;
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// How long no client is waited for where there is no descriptor for one.
pub const DEAF: Duration = Duration::from_secs(1);

/// Something that clients connect to.
pub trait Accept: AsRawFd + Debug + 'static {
    /// The next connection.
    ///
    /// # Errors
    /// There is none, or no descriptor for it.
    fn accept(&self) -> io::Result<UnixStream>;
}

impl Accept for UnixListener {
    fn accept(&self) -> io::Result<UnixStream> {
        self.accept().map(|(stream, _)| stream)
    }
}

/// The socket of the home.
#[derive(Debug)]
pub struct Listener<L> {
    socket: L,
    /// The watch on it, once there is a loop.
    token: Option<Token>,
    /// There was no descriptor for a client: until when none is waited for.
    deaf_until: Option<Instant>,
    /// Kept for one who has to be told that there are too many,
    spare: Option<File>,
    /// and when that was last said in the log.
    refused_at: Option<Instant>,
}

impl<L: Accept> Listener<L> {
    /// Nobody waits for clients yet.
    pub fn new(socket: L) -> Self {
        Self { socket, token: None, deaf_until: None, spare: spare(), refused_at: None }
    }

    /// Waits for clients from now on.
    pub fn listen(&mut self, watches: &mut Watches<Origin>) {
        self.token = Some(watches.add(&self.socket, EventSet::IN, Origin::Listener));
    }

    /// Waits for clients at another socket.
    pub fn replace(&mut self, socket: L, watches: &mut Watches<Origin>) {
        let before = std::mem::replace(&mut self.socket, socket);
        if let Some(token) = self.token.take() {
            watches.remove(token, before);
        }
        self.deaf_until = None;
        self.listen(watches);
    }

    /// The next client of ours, of which there are `there` already, and may be `most`.
    pub fn next(
        &mut self,
        (there, most): (usize, usize),
        now: Instant,
        watches: &mut Watches<Origin>,
    ) -> Option<Client> {
        loop {
            let stream = match self.socket.accept() {
                Ok(stream) => stream,
                Err(error) if is_without_descriptors(&error) && self.turn_away(there, now) => continue,
                Err(error) if is_without_descriptors(&error) || error.raw_os_error() == Some(libc::ENOMEM) => {
                    self.rest(&error, now, watches);
                    return None;
                }
                Err(_) => return None,
            };
            match Client::new(stream) {
                Err(_) => {}
                Ok(client) if !client.is_ours() => log::warn!("somebody else's connection is refused"),
                Ok(client) if there >= most => self.refuse(client, there, now),
                Ok(client) => return Some(client),
            }
        }
    }

    /// Tells a client that there are too many, with the descriptor that is kept for it. Whether one was told.
    fn turn_away(&mut self, there: usize, now: Instant) -> bool {
        if self.spare.take().is_none() {
            return false;
        }
        let told = match self.socket.accept().and_then(Client::new) {
            Ok(client) if client.is_ours() => {
                self.refuse(client, there, now);
                true
            }
            client => client.is_ok(),
        };
        self.spare = spare();
        told
    }

    fn refuse(&mut self, mut client: Client, there: usize, now: Instant) {
        if self.refused_at.is_none_or(|at| now - at > DEAF) {
            log::error!("too many connections: {there} are open");
            self.refused_at = Some(now);
        }
        let why = Failure::new(ErrorKind::Limit, "the server has too many connections");
        client.say(&Line::<Greeting, Failure>::Error(why));
    }

    /// A client waits, and there is no descriptor for it: it would be heard of in every round.
    fn rest(&mut self, error: &io::Error, now: Instant, watches: &mut Watches<Origin>) {
        log::error!("clients wait: {error}");
        self.deaf_until = Some(now + DEAF);
        if let Some(token) = self.token {
            watches.modify(token, EventSet::empty());
        }
    }

    /// Waits for clients again when that may be of use.
    pub fn tend(&mut self, now: Instant, watches: &mut Watches<Origin>) {
        if let (Some(_), Some(token)) = (self.deaf_until.take_if(|until| *until <= now), self.token) {
            watches.modify(token, EventSet::IN);
        }
    }

    /// When that is.
    pub fn next_look(&self) -> Option<Instant> {
        self.deaf_until
    }

    #[cfg(test)]
    pub fn token(&self) -> Option<Token> {
        self.token
    }
}

/// A descriptor that is kept for telling a client that there are none left.
fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

fn is_without_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}
