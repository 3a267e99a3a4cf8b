//! A port of the host's loopback that leads to one of a guest's.

use super::{Agent, Error};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

/// Connections that are carried at a time. More wait until one of those is over.
const MAX_CONNECTIONS: usize = 512;
/// How often, in milliseconds, it is looked whether one is over.
const FULL: u16 = 50;

/// A TCP port of the host's loopback, whose connections lead to a port of a guest's loopback until this is dropped. Connections
/// that are made by then go on until they end.
#[derive(Debug)]
pub struct Forward {
    port: u16,
    guest_port: u16,
    /// Closed when this is dropped.
    _open: PipeWriter,
}

impl Forward {
    /// The host's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The guest's port.
    pub fn guest_port(&self) -> u16 {
        self.guest_port
    }
}

impl Agent {
    /// Has connections to `port` of the host's loopback (any free one, if it is 0) lead to `guest_port` of the guest's. Of each
    /// that cannot be made, the callback is told.
    pub fn forward(
        &self,
        port: u16,
        guest_port: u16,
        failed: impl Fn(Error) + Send + Sync + 'static,
    ) -> Result<Forward, Error> {
        let trouble = || Error::io(format!("forward: port {port} of this host"));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(trouble())?;
        listener.set_nonblocking(true).map_err(trouble())?;
        let port = listener.local_addr().map_err(trouble())?.port();
        let (closed, open) = io::pipe().map_err(trouble())?;
        let carrier = Arc::new(Carrier { agent: self.clone(), guest_port, failed: Box::new(failed) });
        thread::Builder::new().spawn(move || accept(&listener, &closed, &carrier)).map_err(trouble())?;
        Ok(Forward { port, guest_port, _open: open })
    }
}

struct Carrier {
    agent: Agent,
    guest_port: u16,
    failed: Box<dyn Fn(Error) + Send + Sync>,
}

fn accept(listener: &TcpListener, closed: &PipeReader, carrier: &Arc<Carrier>) {
    loop {
        // Each connection has the carrier, and so has this.
        let full = Arc::strong_count(carrier) > MAX_CONNECTIONS;
        let mut ready =
            vec![PollFd::new(closed.as_fd(), PollFlags::POLLIN), PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if full {
            ready.pop();
        }
        match poll(&mut ready, if full { FULL.into() } else { PollTimeout::NONE }) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return (carrier.failed)(Error::io("forward")(e.into())),
        }
        if ready[0].any() == Some(true) {
            return;
        }
        if ready.get(1).is_none_or(|listener| listener.any() != Some(true)) {
            continue;
        }
        match listener.accept() {
            Ok((socket, _)) => {
                let carrier = Arc::clone(carrier);
                // Where there can be no more threads the connection ends.
                let _ = thread::Builder::new().spawn(move || carrier.carry(socket));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // One that was over at once, or there are no descriptors left: those that end give some back.
            Err(_) => thread::sleep(std::time::Duration::from_millis(FULL.into())),
        }
    }
}

impl Carrier {
    fn carry(&self, socket: TcpStream) {
        let begun = || -> Result<UnixStream, Error> {
            socket.set_nonblocking(false).and_then(|()| socket.set_nodelay(true)).map_err(Error::io("forward"))?;
            self.agent.dial(self.guest_port)
        };
        match begun() {
            Ok(guest) => {
                // What is wrong with a connection, both its ends are told by how it ends.
                let _ = join(&socket, &guest);
            }
            Err(e) => (self.failed)(e),
        }
    }
}

/// Carries bytes both ways until both are over. Each way ends by itself.
fn join(socket: &TcpStream, guest: &UnixStream) -> io::Result<()> {
    let (mut to_socket, mut from_guest) = (socket.try_clone()?, guest.try_clone()?);
    let back = thread::Builder::new().spawn(move || {
        let ended = copy(&mut from_guest, &mut to_socket);
        let _ = to_socket.shutdown(if ended.is_ok() { Shutdown::Write } else { Shutdown::Both });
        let _ = ended.or_else(|_| from_guest.shutdown(Shutdown::Both));
    })?;
    let ended = copy(&mut &*socket, &mut &*guest);
    let _ = guest.shutdown(if ended.is_ok() { Shutdown::Write } else { Shutdown::Both });
    let _ = ended.or_else(|_| socket.shutdown(Shutdown::Both));
    let _ = back.join();
    Ok(())
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    io::copy(from, to).map(drop)
}
