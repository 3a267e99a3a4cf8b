//! One connection to a server: lines of JSON, and then perhaps raw bytes.

use super::SocketPath;
use crate::api::{Answer, Failure, Greeting, Line, Reply, Request};
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A greeted connection.
#[derive(Debug)]
pub(super) struct Connection {
    socket: BufReader<UnixStream>,
    greeting: Greeting,
}

impl Connection {
    /// Connects, and hears within `patience` who the server is, or why it does not serve.
    pub fn open(path: &SocketPath, patience: Duration) -> io::Result<Result<Self, Failure>> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(patience))?;
        let mut socket = BufReader::new(socket);
        let greeting = read_line(&mut socket)?;
        socket.get_ref().set_read_timeout(None)?;
        Ok(greeting.map(|greeting| Self { socket, greeting }))
    }

    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Asks, and waits for the answer.
    pub fn call(&mut self, request: &Request) -> io::Result<Reply> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.socket.get_mut().write_all(&line)?;
        read_line(&mut self.socket)
    }

    /// The same, where a socket may come with the answer.
    pub fn call_for_socket(&mut self, request: &Request) -> io::Result<(Reply, Option<UnixStream>)> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let socket = self.socket.get_mut();
        socket.write_all(&line)?;
        let (mut line, mut came) = (Vec::new(), None);
        let mut buffer = [0; 4096];
        // Nothing but the answer can come, and no further than to the end of its line.
        while line.last() != Some(&b'\n') {
            let (read, descriptor) = socket.recv_with_fd(&mut buffer)?;
            came = came.or(descriptor);
            if read == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
            }
            line.extend_from_slice(&buffer[..read]);
        }
        let line: Line<Answer> = serde_json::from_slice(&line)?;
        Ok((line.into(), came.map(|file| UnixStream::from(OwnedFd::from(file)))))
    }

    /// After [`Answer::Stream`].
    pub fn into_stream(self) -> Stream {
        Stream(self.socket)
    }

    /// Waits until the server has closed the connection, `patience` at most.
    pub fn wait_closed(mut self, patience: Duration) {
        // Whatever ends the wait, what matters is seen by the home's lock.
        let _ = self.socket.get_ref().set_read_timeout(Some(patience));
        let _ = io::copy(&mut self.socket, &mut io::sink());
    }
}

fn read_line<T: DeserializeOwned>(socket: &mut BufReader<UnixStream>) -> io::Result<Result<T, Failure>> {
    let mut line = Vec::new();
    socket.read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
    }
    let line: Line<T> = serde_json::from_slice(&line)?;
    Ok(line.into())
}

/// A VM's console or log: raw bytes. It ends when the VM does, and is closed by dropping it.
#[derive(Debug)]
pub struct Stream(BufReader<UnixStream>);

impl Stream {
    /// Bytes that are here already: while there are any, polling the descriptor tells nothing.
    pub fn buffered(&self) -> &[u8] {
        self.0.buffer()
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
