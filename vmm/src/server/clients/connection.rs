//! Clients: connections that ask, one request at a time, and are told.

use crate::api::{Line, Reply, Request, RequestKind};
use crate::server::ids::Generation;
use crate::server::watch::Token;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::geteuid;
use serde::Serialize;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Longest request line.
const REQUEST_MAX: usize = 1 << 20;
/// A viewer that leaves so much unread is dropped.
const UNREAD_MAX: usize = 8 << 20;

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The next line is a request.
    Idle,
    /// A request is being carried out.
    Waiting,
    /// It is a VM's console: what comes is typed.
    Console(Generation),
    /// It only reads.
    Viewer,
    /// It ends when all is written.
    Closing,
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// The watch on it.
    pub token: Option<Token>,
    /// What it is doing.
    pub mode: Mode,
    /// When the request under way was received; `CLOCK_MONOTONIC` nanoseconds.
    pub asked_ns: u64,
    /// Of what kind it is.
    pub asked: Option<RequestKind>,
    /// The VM that it is about.
    pub subject: Option<String>,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Goes with the first byte of what is sent next.
    enclosed: Option<OwnedFd>,
    /// Nothing more will come.
    ended: bool,
}

/// What a connection has for the server.
#[derive(Debug)]
pub enum Heard {
    /// Nothing yet.
    Nothing,
    /// A request, or why the line is none.
    Request(Result<Request, String>),
    /// Bytes typed on a console.
    Typed(Generation, Vec<u8>),
    /// It is over.
    Gone,
}

impl Client {
    /// A new connection.
    ///
    /// # Errors
    /// It cannot be made nonblocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            token: None,
            mode: Mode::Idle,
            asked_ns: 0,
            asked: None,
            subject: None,
            input: Vec::new(),
            output: Vec::new(),
            enclosed: None,
            ended: false,
        })
    }

    /// Whether it is of this server's user, or of root.
    pub fn is_ours(&self) -> bool {
        let peer = getsockopt(&self.stream, PeerCredentials).map(|peer| peer.uid());
        peer.is_ok_and(|user| user == 0 || user == geteuid().as_raw())
    }

    /// The connection's descriptor.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads what has come.
    pub fn read(&mut self) {
        let mut buf = [0; 16 << 10];
        while !self.ended && self.input.len() <= REQUEST_MAX {
            match self.stream.read(&mut buf) {
                Ok(0) => self.ended = true,
                Ok(n) => self.input.extend_from_slice(&buf[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.ended = true,
            }
        }
    }

    /// The next thing it has to say.
    pub fn hear(&mut self) -> Heard {
        match self.mode {
            Mode::Idle => {
                if let Some(end) = self.input.iter().position(|&b| b == b'\n') {
                    let line: Vec<u8> = self.input.drain(..=end).collect();
                    self.mode = Mode::Waiting;
                    return Heard::Request(serde_json::from_slice(&line).map_err(|e| format!("not a request: {e}")));
                }
                if self.ended || self.input.len() > REQUEST_MAX { Heard::Gone } else { Heard::Nothing }
            }
            Mode::Console(vm) if !self.input.is_empty() => Heard::Typed(vm, std::mem::take(&mut self.input)),
            Mode::Console(_) | Mode::Viewer if self.ended => Heard::Gone,
            Mode::Closing if self.output.is_empty() => Heard::Gone,
            _ => Heard::Nothing,
        }
    }

    /// Answers the request under way. A failure that names nothing is about the VM that the request is about.
    pub fn reply(&mut self, mut reply: Reply) {
        if self.mode == Mode::Waiting {
            self.mode = Mode::Idle;
        }
        let subject = self.subject.take();
        if let Err(failure) = &mut reply {
            failure.subject = failure.subject.take().or(subject);
        }
        self.say(&Line::from(&reply));
    }

    /// Has a descriptor travel with the answer to the request under way: a client that waits for that has read all before.
    pub fn enclose(&mut self, descriptor: OwnedFd) {
        self.enclosed = Some(descriptor);
    }

    /// Sends a line.
    pub fn say(&mut self, line: &impl Serialize) {
        let mut bytes = serde_json::to_vec(line).expect("the protocol's types are plain data");
        bytes.push(b'\n');
        self.write(&bytes);
    }

    /// Sends bytes, now or when the connection takes them.
    pub fn write(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
        self.flush();
    }

    /// Sends what waits.
    pub fn flush(&mut self) {
        while !self.output.is_empty() {
            match self.write_some() {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.hang_up(),
            }
        }
        if self.output.len() > UNREAD_MAX {
            self.hang_up();
        }
    }

    fn write_some(&mut self) -> io::Result<usize> {
        let Some(descriptor) = &self.enclosed else { return self.stream.write(&self.output) };
        let sent = self.stream.send_with_fd(self.output.as_slice(), descriptor.as_raw_fd())?;
        self.enclosed = None;
        Ok(sent)
    }

    fn hang_up(&mut self) {
        self.enclosed = None;
        self.output.clear();
        self.ended = true;
        self.mode = Mode::Closing;
    }

    /// Whether bytes wait to be written.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether more may be read.
    pub fn wants_input(&self) -> bool {
        !self.ended && self.input.len() <= REQUEST_MAX
    }
}
