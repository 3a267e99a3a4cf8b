//! Programs in a guest.

use super::talk::{Talk, WORK};
use super::{Agent, Error, Size, talk_failed};
use agent::frame::{self, MAX_DATA};
use agent::message::{Exit, FromAgent, Start, ToAgent};
use std::ffi::OsStr;
use std::fmt;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A program to run, root's and without input where nothing else is asked for.
#[derive(Clone, Debug)]
pub struct Command {
    agent: Agent,
    start: Start,
}

impl Command {
    pub(super) fn new(agent: Agent, argv: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let argv = argv.into_iter().map(|word| word.as_ref().as_bytes().to_vec()).collect();
        Self { agent, start: Start { argv, ..Start::default() } }
    }

    /// Sets a variable of its environment, in which there are `PATH`, `HOME` and `USER` already.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.start.env.push([key.as_ref().as_bytes(), b"=", value.as_ref().as_bytes()].concat());
        self
    }

    /// Its directory; the user's home without.
    pub fn current_dir(mut self, directory: impl AsRef<OsStr>) -> Self {
        self.start.cwd = Some(directory.as_ref().as_bytes().to_vec());
        self
    }

    /// Whose it is, by the guest's own `/etc/passwd`: a name or a number, also `USER:GROUP`.
    pub fn user(mut self, user: impl AsRef<OsStr>) -> Self {
        self.start.user = Some(user.as_ref().as_bytes().to_vec());
        self
    }

    /// Gives it a terminal, on which it writes all its output.
    pub fn terminal(mut self, size: Size) -> Self {
        self.start.terminal = Some(size);
        self
    }

    /// Whether it gets input ([`Running::input`]). It waits for that until the input ends.
    pub fn stdin(mut self, stdin: bool) -> Self {
        self.start.stdin = stdin;
        self
    }

    /// Kills it when it has run for so long.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.start.timeout_ms = timeout.as_millis().try_into().unwrap_or(u64::MAX).max(1);
        self
    }

    /// Starts it.
    pub fn spawn(&self) -> Result<Running, Error> {
        self.begin(false)
    }

    /// Starts it, and leaves it alone. What it writes is kept, 64 KiB of it, for [`Agent::attach`]. Returns its session.
    pub fn detach(&self) -> Result<u32, Error> {
        Ok(self.begin(true)?.session())
    }

    fn begin(&self, detached: bool) -> Result<Running, Error> {
        let mut talk = self.agent.open()?;
        talk.send(&ToAgent::Start(Start { detached, ..self.start.clone() }))?;
        Running::begin(&self.agent, talk)
    }

    /// Runs it and waits until it has ended. Input, if it is to have some, is empty.
    pub fn output(&self) -> Result<Output, Error> {
        let mut running = self.spawn()?;
        if self.start.stdin {
            running.input().end()?;
        }
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match running.next_event()? {
                Event::Out(bytes) => stdout.extend(bytes),
                Event::Err(bytes) => stderr.extend(bytes),
                Event::Exit(status) => return Ok(Output { status, stdout, stderr }),
            }
        }
    }
}

/// What a program wrote, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: Status,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(Exit);

impl Status {
    /// Whether it ended with code 0.
    pub fn success(self) -> bool {
        self.0 == Exit::Code(0)
    }

    /// Its exit code, if it ended by itself.
    pub fn code(self) -> Option<u8> {
        if let Exit::Code(code) = self.0 { Some(code) } else { None }
    }

    /// The signal that ended it, if one did and it was not for its time.
    pub fn signal(self) -> Option<u8> {
        if let Exit::Signal(signal) = self.0 { Some(signal) } else { None }
    }

    /// Whether it was killed as its time was over.
    pub fn timed_out(self) -> bool {
        self.0 == Exit::TimedOut
    }

    /// As shells tell it: the code, 128 and the signal's number, or 124 if its time was over.
    pub fn shell(self) -> u8 {
        self.0.status()
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal(signal) => write!(f, "signal {signal}"),
            Exit::TimedOut => f.write_str("killed, as its time was over"),
        }
    }
}

/// What a program does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It wrote this to its standard output, or to its terminal.
    Out(Vec<u8>),
    /// It wrote this to its standard error.
    Err(Vec<u8>),
    /// It has ended, and nothing more will come.
    Exit(Status),
}

/// A program that runs. Dropping this leaves it running.
#[derive(Debug)]
pub struct Running {
    talk: Talk,
    input: Input,
    session: u32,
    pid: u32,
}

impl Running {
    pub(super) fn begin(agent: &Agent, mut talk: Talk) -> Result<Self, Error> {
        let (session, pid) = match talk.read_by(Instant::now() + WORK)? {
            FromAgent::Started { session, pid } => (session, pid),
            other => return Err(agent.unexpected(other)),
        };
        let stream = talk.patient()?;
        let input = Input { stream: Arc::new(Mutex::new(stream)), name: talk.name().to_owned(), session };
        Ok(Self { talk, input, session, pid })
    }

    /// Its session, for [`Agent::attach`] and [`Agent::signal`].
    pub fn session(&self) -> u32 {
        self.session
    }

    /// Its process in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it does next. Waits for it.
    pub fn next_event(&mut self) -> Result<Event, Error> {
        match self.talk.read()? {
            FromAgent::Out(bytes) => Ok(Event::Out(bytes)),
            FromAgent::Err(bytes) => Ok(Event::Err(bytes)),
            FromAgent::Exit(exit) => Ok(Event::Exit(Status(exit))),
            other => Err(super::unexpected(self.talk.name(), other)),
        }
    }

    /// Where its input goes, to be used from any thread.
    pub fn input(&self) -> Input {
        self.input.clone()
    }

    /// Waits until it has ended, and throws away what it writes.
    pub fn wait(mut self) -> Result<Status, Error> {
        loop {
            if let Event::Exit(status) = self.next_event()? {
                return Ok(status);
            }
        }
    }
}

/// The input of a program, and what else it can be told. Writing waits for a program that does not read.
#[derive(Clone, Debug)]
pub struct Input {
    stream: Arc<Mutex<UnixStream>>,
    name: String,
    session: u32,
}

impl Input {
    /// Ends it: the program reads to its end. On a terminal, Ctrl-D is typed.
    pub fn end(&self) -> Result<(), Error> {
        self.send(&ToAgent::DataEnd)
    }

    /// Tells the program of another size of its terminal.
    pub fn resize(&self, size: Size) -> Result<(), Error> {
        self.send(&ToAgent::Resize(size))
    }

    /// Sends a signal to the processes of the program's session. One that has ended is left alone.
    pub fn signal(&self, signal: u8) -> Result<(), Error> {
        self.send(&ToAgent::Signal { session: self.session, signal })
    }

    fn send(&self, message: &ToAgent) -> Result<(), Error> {
        self.put(message).map_err(|e| talk_failed(&self.name, e))
    }

    fn put(&self, message: &ToAgent) -> io::Result<()> {
        frame::write(&mut *self.stream.lock().unwrap_or_else(PoisonError::into_inner), message)
    }
}

impl Write for Input {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(MAX_DATA)];
        if !piece.is_empty() {
            self.put(&ToAgent::Data(piece.to_vec()))?;
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
