//! Why a request was not carried out.

use serde::{Deserialize, Serialize};

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct Failure {
    /// What kind of failure it is.
    pub kind: ErrorKind,
    /// One line for the user.
    pub message: String,
    /// What it is about, mostly a VM's name.
    pub subject: Option<String>,
}

/// Kinds of failure, for programs to tell apart. Each has an exit code of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request makes no sense: a name that is none, a size that is too small, an option that does not go with another.
    BadRequest,
    /// There is no VM of that name.
    NoSuchVm,
    /// There is a VM of that name already.
    NameTaken,
    /// The VM is off, dead or paused.
    NotRunning,
    /// It is more than there may be, or than the host has.
    Limit,
    /// This host cannot do that.
    Unsupported,
    /// There is no server, and what was asked for starts none. Only a client says so.
    NoServer,
    /// The server's home cannot be used. Only a client says so.
    Home,
    /// The VM has not started yet, or is on its way to something else.
    Busy,
    /// The VM ended before it was done.
    VmEnded,
    /// The VM's process does not answer.
    DoesNotAnswer,
    /// Nothing in the guest accepts a connection.
    Refused,
    /// The guest answered `err`. Only a client says so.
    Guest,
    /// It was not done in the time that was given for it.
    TimedOut,
    /// The server is on its way out.
    ShuttingDown,
    /// The host refused something that the server needs.
    Host,
    /// The server cannot be reached, or went away, or is of another version. Only a client says so.
    Connection,
    /// Something else.
    Failed,
}

impl ErrorKind {
    /// All there are.
    pub const ALL: [Self; 18] = [
        Self::BadRequest,
        Self::NoSuchVm,
        Self::NameTaken,
        Self::NotRunning,
        Self::Limit,
        Self::Unsupported,
        Self::NoServer,
        Self::Home,
        Self::Busy,
        Self::VmEnded,
        Self::DoesNotAnswer,
        Self::Refused,
        Self::Guest,
        Self::TimedOut,
        Self::ShuttingDown,
        Self::Host,
        Self::Connection,
        Self::Failed,
    ];

    /// The exit code of a command that fails so: 1 it failed, 2 it was bad input and nothing has changed, 3 it timed out.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::BadRequest | Self::NoSuchVm | Self::NameTaken | Self::NotRunning => 2,
            Self::Limit | Self::Unsupported | Self::NoServer | Self::Home => 2,
            Self::Busy | Self::VmEnded | Self::DoesNotAnswer | Self::Refused | Self::Guest | Self::ShuttingDown => 1,
            Self::Host | Self::Connection | Self::Failed => 1,
            Self::TimedOut => 3,
        }
    }
}

impl Failure {
    /// A failure of some kind, about nothing in particular.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), subject: None }
    }

    /// The request makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadRequest, message)
    }

    /// It went wrong.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    /// The host refused something.
    pub fn host(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Host, message)
    }

    /// It took too long.
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::TimedOut, message)
    }

    /// The same, about something.
    pub fn about(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }
}
