//! How a client's call can fail.

use super::HomeError;
use crate::api::{Failure, FailureKind};
use std::io;
use std::path::PathBuf;

/// Why a call of the client failed. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense here; nothing has changed.
    #[error("{0}")]
    BadInput(String),
    /// It went wrong.
    #[error("{0}")]
    Failed(String),
    /// It took too long.
    #[error("{0}")]
    TimedOut(String),
    /// The guest answered `err`, and this.
    #[error("the guest answered: err {0}")]
    Guest(String),
    /// There is no server, and none was to be started.
    #[error("no server is running for {}", .0.display())]
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
}

impl Error {
    pub(super) fn io(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Io { operation, source }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure.kind {
            FailureKind::BadInput => Self::BadInput(failure.message),
            FailureKind::Failed => Self::Failed(failure.message),
            FailureKind::TimedOut => Self::TimedOut(failure.message),
        }
    }
}
