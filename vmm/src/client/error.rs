//! How a client's call can fail.

use super::HomeError;
use super::agent::AgentError;
use crate::api::{ErrorKind, Failure, PROTOCOL};
use std::io;
use std::path::PathBuf;

/// Why a call of the client failed. Each is one line; [`Error::kind`] is what to tell them apart by.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It was refused or went wrong, as the server says, or this client before it asked any.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// The guest answered `err`, and this.
    #[error("the guest answered: err {0}")]
    Guest(String),
    /// The guest's agent refused, or failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// There is no server, and none was to be started.
    #[error("no server at {}", .0.display())]
    NoServer(PathBuf),
    /// The server's home cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The server cannot be reached, or went away.
    #[error("{operation}: {source}")]
    Io {
        /// What was being done.
        operation: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The server said something that is no answer.
    #[error("{0}: the server's answer makes no sense; is it of another version?")]
    Protocol(&'static str),
    /// The server speaks another version of the protocol.
    #[error(
        "the server of {} is offshoot {version}, which speaks protocol {protocol}, and this is {PROTOCOL}: end it with \
         `offshoot shutdown` of that version, or SIGTERM to process {pid}",
        home.display()
    )]
    OtherVersion {
        /// The server's home.
        home: PathBuf,
        /// The server's version.
        version: String,
        /// Its protocol's.
        protocol: u32,
        /// Its process.
        pid: i32,
    },
}

impl Error {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Failure(failure) => failure.kind,
            Self::Guest(_) => ErrorKind::Guest,
            Self::Agent(e) => e.error_kind(),
            Self::NoServer(_) => ErrorKind::NoServer,
            Self::Home(_) => ErrorKind::Home,
            Self::Io { .. } | Self::Protocol(_) | Self::OtherVersion { .. } => ErrorKind::Connection,
        }
    }

    /// What it is about, where that is known: a VM's name, or a path.
    pub fn subject(&self) -> Option<String> {
        match self {
            Self::Failure(failure) => failure.subject.clone(),
            Self::Agent(e) => Some(e.name.clone()),
            Self::NoServer(home) | Self::OtherVersion { home, .. } => Some(home.display().to_string()),
            Self::Home(e) => Some(e.home().display().to_string()),
            Self::Guest(_) | Self::Io { .. } | Self::Protocol(_) => None,
        }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Failure::bad_request(message).into()
    }

    pub(super) fn io(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Io { operation, source }
    }
}
