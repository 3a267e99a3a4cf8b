//! Sessions: a program, what it writes, and the client that follows it, if one does.
//!
//! A client that goes away ends nothing. The program runs on, its input stays open, and the last of what it wrote is kept for
//! whoever attaches. So it is in a child of a fork too, whose clients were the parent's.

use crate::children::{Children, Then};
use crate::lock;
use crate::program;
use crate::sys::{self, Ended, HANGUP, Half, PollFd, READABLE, WRITABLE};
use agent::frame::{self, MAX_DATA};
use agent::message::{self, Exit, Failed, FailedKind, FromAgent, Size, Start};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of output that are kept of each session.
const KEPT: usize = 64 << 10;
/// Ended sessions that are kept for someone to attach to.
const MAX_ENDED: usize = 64;
/// What a program that has ended can have left in a pipe, which holds no more.
const MAX_LEFT: usize = 1 << 20;
/// End of transmission: what a terminal takes for the end of its input.
const EOT: u8 = 4;

/// The client's end of a connection, for those who write to it.
pub struct Client {
    out: Mutex<File>,
    /// To end the connection while somebody writes to it.
    connection: File,
}

impl Client {
    pub fn new(connection: &File) -> io::Result<Self> {
        Ok(Self { out: Mutex::new(connection.try_clone()?), connection: connection.try_clone()? })
    }

    pub fn send(&self, message: &FromAgent) -> io::Result<()> {
        frame::write(&mut *lock(&self.out), message)
    }

    fn hang_up(&self) {
        sys::hang_up(&self.connection, Half::Both);
    }
}

/// All sessions.
#[derive(Default)]
pub struct Sessions {
    children: Children,
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    last: u32,
    all: BTreeMap<u32, Arc<Session>>,
}

/// One of them.
pub struct Session {
    pub id: u32,
    pub pid: u32,
    argv: Vec<Vec<u8>>,
    started: Instant,
    /// The terminal, from our side.
    terminal: Option<File>,
    /// Where input goes; none when it has ended.
    input: Mutex<Option<File>>,
    /// Closed when the program has ended, so that whoever waits for its output hears of it.
    alive: Mutex<Option<PipeWriter>>,
    ended_pipe: PipeReader,
    timed_out: AtomicBool,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    kept: Kept,
    client: Option<Arc<Client>>,
    exit: Option<Exit>,
    /// Streams of output that have not come to their end.
    open: usize,
    /// Somebody has been told how it ended, or is about to be.
    told: bool,
}

impl State {
    /// Whether there is nothing to come.
    fn is_over(&self) -> bool {
        self.exit.is_some() && self.open == 0
    }
}

/// The last of what a program wrote.
#[derive(Default)]
struct Kept {
    pieces: VecDeque<(Stream, Vec<u8>)>,
    bytes: usize,
}

/// Which of its outputs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

impl Stream {
    fn message(self, bytes: Vec<u8>) -> FromAgent {
        match self {
            Self::Out => FromAgent::Out(bytes),
            Self::Err => FromAgent::Err(bytes),
        }
    }
}

impl Kept {
    fn push(&mut self, stream: Stream, bytes: &[u8]) {
        match self.pieces.back_mut() {
            // Small pieces become one, so that the list is no longer than what is in it.
            Some((last, piece)) if *last == stream && piece.len() + bytes.len() <= 4096 => piece.extend(bytes),
            _ => self.pieces.push_back((stream, bytes.to_vec())),
        }
        self.bytes += bytes.len();
        while self.bytes > KEPT {
            let Some((_, first)) = self.pieces.front_mut() else { break };
            let excess = self.bytes - KEPT;
            if first.len() <= excess {
                self.bytes -= first.len();
                self.pieces.pop_front();
            } else {
                first.drain(..excess);
                self.bytes -= excess;
            }
        }
    }
}

impl Sessions {
    /// Reaps children, for ever, in a thread of its own.
    pub fn reap(self: &Arc<Self>) {
        let sessions = Arc::clone(self);
        thread::spawn(move || sessions.children.reap());
    }

    pub fn children(&self) -> &Children {
        &self.children
    }

    /// Starts a program, which nobody follows yet.
    pub fn start(self: &Arc<Self>, start: &Start, system: &crate::System) -> Result<Arc<Session>, Failed> {
        let program = program::prepare(start, system)?;
        let trouble = |e: io::Error| Failed::io("start a session", &e);
        let (ended_pipe, alive) = io::pipe().map_err(trouble)?;
        let program::Program { mut command, terminal, input, outputs } = program;
        if let Some(input) = &input {
            sys::never_wait(input).map_err(trouble)?;
        }
        let outputs: Vec<(Stream, File)> = [Stream::Out, Stream::Err].into_iter().zip(outputs).collect();
        let id = {
            let mut list = lock(&self.list);
            list.last += 1;
            list.last
        };
        let started = self.children.spawn(&mut command, |pid| {
            let session = Arc::new(Session {
                id,
                pid,
                argv: start.argv.clone(),
                started: Instant::now(),
                terminal,
                input: Mutex::new(input),
                alive: Mutex::new(Some(alive)),
                ended_pipe,
                timed_out: AtomicBool::new(false),
                state: Mutex::new(State { open: outputs.len(), ..State::default() }),
                ended: Condvar::new(),
            });
            let (ending, sessions) = (Arc::clone(&session), Arc::clone(self));
            (session, Box::new(move |ended| sessions.ended(&ending, ended)) as Then)
        });
        // The program has its ends of the pipes: ours go with the command.
        drop(command);
        let session = started.map_err(|e| program::refusal(&start.argv[0], &e))?;
        lock(&self.list).all.insert(id, Arc::clone(&session));
        for (stream, output) in outputs {
            let (session, sessions) = (Arc::clone(&session), Arc::clone(self));
            thread::spawn(move || {
                session.carry(stream, output);
                sessions.output_over(&session);
            });
        }
        if start.timeout_ms > 0 {
            let (session, timeout) = (Arc::clone(&session), Duration::from_millis(start.timeout_ms));
            thread::spawn(move || session.kill_after(timeout));
        }
        Ok(session)
    }

    pub fn find(&self, id: u32) -> Result<Arc<Session>, Failed> {
        let session = lock(&self.list).all.get(&id).cloned();
        session.ok_or_else(|| Failed::new(FailedKind::Bad, format!("there is no session {id}")))
    }

    pub fn all(&self) -> Vec<message::Session> {
        let all: Vec<Arc<Session>> = lock(&self.list).all.values().cloned().collect();
        all.iter().map(|session| session.told()).collect()
    }

    /// Has a client follow a session from now on, in place of the one that does. First it gets what was kept.
    pub fn attach(&self, session: &Arc<Session>, client: &Arc<Client>) -> io::Result<()> {
        // Until this is let go of, who delivers output to the new client waits.
        let mut out = lock(&client.out);
        let (kept, exit) = {
            let mut state = lock(&session.state);
            let kept: Vec<(Stream, Vec<u8>)> = state.kept.pieces.iter().cloned().collect();
            let before = state.client.replace(Arc::clone(client));
            if let Some(before) = before.filter(|before| !Arc::ptr_eq(before, client)) {
                before.hang_up();
            }
            let exit = state.exit.filter(|_| state.is_over());
            state.told |= exit.is_some();
            (kept, exit)
        };
        frame::write(&mut *out, &FromAgent::Started { session: session.id, pid: session.pid })?;
        for (stream, bytes) in kept {
            for piece in bytes.chunks(MAX_DATA) {
                frame::write(&mut *out, &stream.message(piece.to_vec()))?;
            }
        }
        if let Some(exit) = exit {
            frame::write(&mut *out, &FromAgent::Exit(exit))?;
            self.forget(session);
        }
        Ok(())
    }

    fn forget(&self, session: &Session) {
        lock(&self.list).all.remove(&session.id);
    }

    fn ended(&self, session: &Session, ended: Ended) {
        let exit = match ended {
            Ended::Signal(_) if session.timed_out.load(Ordering::Relaxed) => Exit::TimedOut,
            Ended::Signal(signal) => Exit::Signal(signal),
            Ended::Code(code) => Exit::Code(code),
        };
        lock(&session.state).exit = Some(exit);
        session.ended.notify_all();
        *lock(&session.alive) = None;
        *lock(&session.input) = None;
        self.finish(session);
    }

    fn output_over(&self, session: &Session) {
        lock(&session.state).open -= 1;
        self.finish(session);
    }

    /// Tells the client how the program ended, once that is known and all that it wrote is told.
    fn finish(&self, session: &Session) {
        let (exit, client) = {
            let mut state = lock(&session.state);
            let Some(exit) = state.exit.filter(|_| state.is_over() && !state.told) else { return };
            state.told = true;
            (exit, state.client.clone())
        };
        if client.is_some_and(|client| client.send(&FromAgent::Exit(exit)).is_ok()) {
            self.forget(session);
            return;
        }
        let mut list = lock(&self.list);
        let over = |session: &&Arc<Session>| lock(&session.state).is_over();
        let ended: Vec<u32> = list.all.values().filter(over).map(|session| session.id).collect();
        for id in &ended[..ended.len().saturating_sub(MAX_ENDED)] {
            list.all.remove(id);
        }
    }
}

impl Session {
    fn told(&self) -> message::Session {
        let state = lock(&self.state);
        let mut argv = self.argv.clone();
        // As much of a long command line as a list can do with.
        let mut room = 4096usize;
        argv.retain(|word| {
            let fits = word.len() < room;
            room = room.saturating_sub(word.len() + 1);
            fits
        });
        message::Session {
            id: self.id,
            pid: self.pid,
            age_ms: self.started.elapsed().as_millis() as u64,
            attached: state.client.is_some() && !state.is_over(),
            terminal: self.terminal.is_some(),
            exit: state.exit,
            argv,
        }
    }

    /// A client has gone.
    pub fn detach(&self, client: &Arc<Client>) {
        let mut state = lock(&self.state);
        if state.client.as_ref().is_some_and(|current| Arc::ptr_eq(current, client)) {
            state.client = None;
        }
    }

    pub fn signal(&self, signal: u8) -> Result<(), Failed> {
        let gone = || Failed::new(FailedKind::Bad, format!("session {} has ended", self.id));
        if !(1..=64).contains(&signal) {
            return Err(Failed::new(FailedKind::Bad, format!("there is no signal {signal}")));
        }
        let state = lock(&self.state);
        if state.exit.is_some() {
            return Err(gone());
        }
        sys::signal_group(self.pid, signal).map_err(|e| Failed::io("signal", &e))
    }

    pub fn resize(&self, size: Size) {
        if let Some(terminal) = &self.terminal {
            // A terminal that is gone needs no size.
            let _ = sys::resize(terminal, size.rows, size.columns);
        }
    }

    /// Gives the program input. It waits for the program to take it, as long as there are both, and the client.
    pub fn give(&self, mut bytes: &[u8], connection: &impl AsFd) -> io::Result<()> {
        while !bytes.is_empty() {
            let Some(input) = lock(&self.input).as_ref().map(File::try_clone).transpose()? else { return Ok(()) };
            let mut fds =
                [PollFd::new(&input, WRITABLE), PollFd::new(connection, HANGUP), PollFd::new(&self.ended_pipe, 0)];
            sys::wait_for(&mut fds, -1)?;
            if fds[1].is(HANGUP) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if fds[2].is(HANGUP) {
                return Ok(());
            }
            match (&input).write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => {
                    // It reads no more.
                    self.end_input();
                }
            }
        }
        Ok(())
    }

    pub fn end_input(&self) {
        let mut input = lock(&self.input);
        if let (Some(input), Some(_)) = (input.as_mut(), &self.terminal) {
            let _ = input.write(&[EOT]);
        } else {
            *input = None;
        }
    }

    /// Passes on what the program writes, until its end, or, when it has ended, until nothing is left. What others write there
    /// later, whom it started, is nobody's: it is thrown away, so that they can go on.
    fn carry(&self, stream: Stream, mut output: File) {
        let mut buffer = vec![0; MAX_DATA / 2];
        let mut left = MAX_LEFT;
        loop {
            let mut fds = [PollFd::new(&output, READABLE), PollFd::new(&self.ended_pipe, 0)];
            if sys::wait_for(&mut fds, -1).is_err() {
                return;
            }
            let has_ended = fds[1].is(HANGUP);
            if has_ended && (left == 0 || !fds[0].is(READABLE | HANGUP)) {
                // The program has ended, and there is nothing more of it.
                if self.terminal.is_none() {
                    thread::spawn(move || io::copy(&mut output, &mut io::sink()));
                }
                return;
            }
            match output.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    self.deliver(stream, &buffer[..count]);
                    left = left.saturating_sub(if has_ended { count } else { 0 });
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                // A terminal that nobody has open.
                Err(_) => return,
            }
        }
    }

    fn deliver(&self, stream: Stream, bytes: &[u8]) {
        let client = {
            let mut state = lock(&self.state);
            state.kept.push(stream, bytes);
            state.client.clone()
        };
        if let Some(client) = client
            && client.send(&stream.message(bytes.to_vec())).is_err()
        {
            self.detach(&client);
        }
    }

    fn kill_after(&self, timeout: Duration) {
        let state = lock(&self.state);
        let waited = self.ended.wait_timeout_while(state, timeout, |state| state.exit.is_none());
        let Ok((state, _)) = waited else { return };
        if state.exit.is_none() {
            self.timed_out.store(true, Ordering::Relaxed);
            let _ = sys::signal_group(self.pid, 9);
        }
    }
}

/// A file of a descriptor that does not matter as anything else.
pub fn file(fd: impl Into<OwnedFd>) -> File {
    File::from(fd.into())
}
