//! Connections to TCP ports of the guest's loopback.

use crate::sys::{self, Half};
use agent::message::Failed;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

/// How long a connection may take: on the loopback, that is a listener whose queue is full.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects to a port, by IPv4 or else IPv6.
pub fn connect(port: u16) -> Result<TcpStream, Failed> {
    let to = |address: SocketAddr| TcpStream::connect_timeout(&address, PATIENCE);
    let socket = to((Ipv4Addr::LOCALHOST, port).into()).or_else(|e| {
        // What is said is what the usual address said.
        to((Ipv6Addr::LOCALHOST, port).into()).map_err(|_| e)
    });
    let socket = socket.map_err(|e| Failed::io(format_args!("port {port} of the guest"), &e))?;
    // The client's pieces are what it meant to send at once.
    let _ = socket.set_nodelay(true);
    Ok(socket)
}

/// Carries bytes both ways until both are over. Each way ends by itself.
pub fn join(socket: TcpStream, client: &File) -> io::Result<()> {
    let (from, to) = (socket.try_clone()?, client.try_clone()?);
    let back = thread::spawn(move || {
        let (mut from, mut to) = (from, to);
        let _ = io::copy(&mut from, &mut to);
        sys::hang_up(&to, Half::Write);
    });
    let (mut from, mut to) = (client, &socket);
    if io::copy(&mut from, &mut to).is_err() {
        // A client that was reset reads nothing more, either.
        let _ = socket.shutdown(Shutdown::Both);
    }
    let _ = socket.shutdown(Shutdown::Write);
    let _ = back.join();
    Ok(())
}
