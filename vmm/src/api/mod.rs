//! What a client and the server say to each other: one line of JSON each way over the home's Unix socket.
//!
//! On connecting, the server says one [`Line`] with a [`Greeting`], or why it cannot serve. Then the client sends one
//! [`Request`] a line, and gets one [`Line`] with an [`Answer`] for each, in order. After [`Answer::Stream`] the connection
//! carries raw console bytes, both ways for a console, until either side closes it.
//!
//! `vmm/docs/protocol.md` has every verb, field and kind of error for those who write a client of their own. A test holds it
//! and these types together. Every field is always there, null where there is nothing to tell. Bytes are called `…_bytes`,
//! pages of 4 KiB `…_pages`, durations `…_us` or `…_ms`.

mod answer;
mod confinement;
mod error;
#[cfg(test)]
mod page;
mod request;

pub use answer::{
    AgentNotice, Answer, Balloon, BudgetReport, CheckReport, Child, Connected, EntryInfo, GuestStats, Inspection,
    LatencyBucket, Reclaimed, Removed, RequestLatency, RunInfo, Stats, Totals, TreeRow, VmState, VmStats, VmSummary,
};
pub use confinement::{Confinement, Limits};
pub use error::{ErrorKind, Failure};
pub use request::{BudgetSetting, Fork, Launch, Linux, Request, RequestKind};

use serde::{Deserialize, Serialize};

/// Version of this protocol. A client and a server of different ones do not talk: a field that is missing would be taken
/// for one that says nothing.
pub const PROTOCOL: u32 = 4;
/// Smallest guest memory, in bytes.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Guest memory where none is asked for, in bytes.
pub const DEFAULT_MEMORY: u64 = 256 << 20;
/// Most virtual CPUs of a Linux guest.
pub const MAX_VCPUS: u8 = 8;
/// Longest VM name.
pub const MAX_NAME: usize = 64;
/// Most children of one fork.
pub const MAX_CHILDREN: u32 = 1000;

/// One line of the server's: what was asked for, or why it is not to be had.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line<T, F = Failure> {
    /// It is so.
    Ok(T),
    /// It is not.
    Error(F),
}

impl<T> From<Line<T>> for Result<T, Failure> {
    fn from(line: Line<T>) -> Self {
        match line {
            Line::Ok(value) => Ok(value),
            Line::Error(failure) => Err(failure),
        }
    }
}

impl<'a, T> From<&'a Result<T, Failure>> for Line<&'a T, &'a Failure> {
    fn from(result: &'a Result<T, Failure>) -> Self {
        match result {
            Ok(value) => Self::Ok(value),
            Err(failure) => Self::Error(failure),
        }
    }
}

/// The server's answer to a request.
pub type Reply = Result<Answer, Failure>;

/// Who the server is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Greeting {
    /// Version of the protocol: [`PROTOCOL`].
    pub protocol: u32,
    /// Version of the server.
    pub version: String,
    /// Process id of the server.
    pub pid: i32,
    /// VMs that an earlier server of this home had when it died; told once.
    pub lost: Vec<String>,
}
