//! The agent in a Linux guest, as its user sees it: programs, files, and ports.
//!
//! Each thing that is done has a connection to itself, straight to the guest: the server passes none of its bytes on.
//!
//! A VM that was forked is told so before anything else is asked of it, by whoever comes first: its kernel gets random numbers
//! of its own. If that did not work, its agent does nothing for anyone.

mod copy;
mod exec;
mod forward;
mod talk;
mod vm;

pub use copy::Archive;
pub use exec::{Command, Event, Input, Output, Running, Status};
pub use forward::Forward;

pub use ::agent::message::{Exit, Place, Session, Size};

use super::Error;
use crate::api::{ErrorKind, Failure};
use ::agent::message::{Failed, FailedKind, FromAgent, ToAgent};
use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use talk::{PROMPT, Talk, WORK};

/// More sessions than any agent keeps.
const MAX_SESSIONS: usize = 10_000;

/// Which VM an agent is to be the agent of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub name: String,
    /// Its id if it was forked, and 0 if it was launched.
    pub generation: u64,
}

/// The agent of the VM of that name. Clones are of the same.
#[derive(Clone)]
pub struct Agent {
    reach: Arc<Reach>,
    name: String,
}

/// How a connection to the agent is made, and to which VM it leads: another one may have that name by now.
type Reach = dyn Fn() -> Result<(UnixStream, Identity), Error> + Send + Sync;

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What became of the notice that a child of a fork gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acked {
    /// What was not done beside the random numbers, if anything: the host name, a hook.
    pub trouble: Option<String>,
    /// How long it took.
    pub took: Duration,
}

impl Agent {
    /// The agent that connections made so lead to.
    pub fn by(
        name: impl Into<String>,
        reach: impl Fn() -> Result<(UnixStream, Identity), Error> + Send + Sync + 'static,
    ) -> Self {
        Self { reach: Arc::new(reach), name: name.into() }
    }

    /// An agent that listens on a Unix socket, and is that VM's: for tests, and for guests that are reached in ways of their
    /// own.
    pub fn at_socket(vm: Identity, path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self::by(vm.name.clone(), move || {
            let stream = UnixStream::connect(&path).map_err(Error::io(format!("connect to {}", path.display())))?;
            Ok((stream, vm.clone()))
        })
    }

    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A program to run in the guest, with its arguments.
    pub fn command(&self, argv: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>) -> Command {
        Command::new(self.clone(), argv)
    }

    /// Runs a program without input, and waits until it has ended. How it ended is for the caller to look at.
    pub fn exec(&self, argv: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>) -> Result<Output, Error> {
        self.command(argv).output()
    }

    /// Programs that were started here and run, and those that ended while no client followed them.
    pub fn sessions(&self) -> Result<Vec<Session>, Error> {
        let mut talk = self.open()?;
        talk.send(&ToAgent::List)?;
        let until = Instant::now() + PROMPT;
        let mut sessions = Vec::new();
        loop {
            match talk.read_by(until)? {
                FromAgent::Session(session) if sessions.len() < MAX_SESSIONS => sessions.push(session),
                FromAgent::Session(_) => {
                    let why = format!("more than {MAX_SESSIONS} sessions");
                    return Err(talk_failed(&self.name, io::Error::new(io::ErrorKind::InvalidData, why)));
                }
                FromAgent::Done => return Ok(sessions),
                other => return Err(self.unexpected(other)),
            }
        }
    }

    /// Follows a session from now on, in place of whoever does. The last 64 KiB of what it wrote come first.
    pub fn attach(&self, session: u32) -> Result<Running, Error> {
        let mut talk = self.open()?;
        talk.send(&ToAgent::Attach { session })?;
        Running::begin(self, talk)
    }

    /// Sends a signal to the processes of a session.
    pub fn signal(&self, session: u32, signal: u8) -> Result<(), Error> {
        let mut talk = self.open()?;
        talk.send(&ToAgent::Signal { session, signal })?;
        self.done(&mut talk)
    }

    /// A connection to a TCP port of the guest's loopback.
    pub fn dial(&self, port: u16) -> Result<UnixStream, Error> {
        let mut talk = self.open()?;
        talk.send(&ToAgent::Dial { port })?;
        match talk.read_by(Instant::now() + WORK)? {
            FromAgent::Connected => talk.into_stream(),
            other => Err(self.unexpected(other)),
        }
    }

    /// Makes sure that a VM that was forked has been told so, and has random numbers of its own.
    pub fn notify(&self) -> Result<Acked, Error> {
        let began = Instant::now();
        let trouble = self.open()?.trouble.filter(|trouble| !trouble.is_empty());
        Ok(Acked { trouble, took: began.elapsed() })
    }

    fn open(&self) -> Result<Talk, Error> {
        let (stream, vm) = (self.reach)()?;
        Talk::open(stream, &vm)
    }

    fn done(&self, talk: &mut Talk) -> Result<(), Error> {
        match talk.read_by(Instant::now() + WORK)? {
            FromAgent::Done => Ok(()),
            other => Err(self.unexpected(other)),
        }
    }

    /// What an answer means that is not the one that was asked for.
    fn unexpected(&self, message: FromAgent) -> Error {
        unexpected(&self.name, message)
    }
}

fn unexpected(name: &str, message: FromAgent) -> Error {
    match message {
        FromAgent::Failed(failed) => AgentError::new(name, failed).into(),
        _ => talk_failed(name, io::Error::new(io::ErrorKind::InvalidData, "an answer to something else")),
    }
}

/// The connection failed, or what came on it is none of ours.
fn talk_failed(name: &str, e: io::Error) -> Error {
    let (kind, why) = match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => (ErrorKind::TimedOut, "it does not answer".into()),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            (ErrorKind::Connection, "the connection ended".into())
        }
        _ => (ErrorKind::Connection, e.to_string()),
    };
    Failure::new(kind, format!("agent of {name}: {why}")).about(name).into()
}

/// The agent refused, or what it tried failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {why}")]
pub struct AgentError {
    /// The VM.
    pub name: String,
    /// What kind of failure it is.
    pub kind: AgentErrorKind,
    /// The guest's error number; 0 if there is none.
    pub errno: i32,
    /// Why, in the agent's words, made fit for a terminal.
    pub why: String,
}

/// Kinds of failure in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AgentErrorKind {
    /// The request makes no sense there, or names what is not there.
    Bad,
    /// There is no such program.
    NoProgram,
    /// It cannot be executed.
    NotExecutable,
    /// The VM has no random numbers of its own.
    NotReseeded,
    /// Its agent is of another version.
    Version,
    /// The guest refused something.
    Guest,
}

impl AgentError {
    fn new(name: &str, failed: Failed) -> Self {
        let kind = match failed.kind {
            FailedKind::Bad => AgentErrorKind::Bad,
            FailedKind::NoProgram => AgentErrorKind::NoProgram,
            FailedKind::NotExecutable => AgentErrorKind::NotExecutable,
            FailedKind::NotReseeded => AgentErrorKind::NotReseeded,
            FailedKind::Version => AgentErrorKind::Version,
            FailedKind::Guest => AgentErrorKind::Guest,
        };
        let why = crate::plain::line(&String::from_utf8_lossy(&failed.why), crate::plain::REASON_MAX);
        Self { name: name.to_owned(), kind, errno: failed.errno, why }
    }

    /// The kind that a failure of the server would have.
    pub fn error_kind(&self) -> ErrorKind {
        match self.kind {
            AgentErrorKind::Bad => ErrorKind::BadRequest,
            AgentErrorKind::Version => ErrorKind::Unsupported,
            _ => ErrorKind::Guest,
        }
    }
}
