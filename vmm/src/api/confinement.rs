//! What keeps a process apart.

use serde::{Deserialize, Serialize};

/// What keeps a process apart, as the kernel tells it of that process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Confinement {
    /// The user it runs as, as the server sees it.
    pub user: u32,
    /// Its group.
    pub group: u32,
    /// `filter` if all of its threads are held to a list of system calls, `none` if one is not.
    pub seccomp: String,
    /// It gets no rights by executing something.
    pub no_new_privs: bool,
    /// Its effective capabilities, a bit each, in hexadecimal. In a user namespace of its own they are for that alone.
    pub effective_capabilities: String,
    /// Those it could ever get.
    pub bounding_capabilities: String,
    /// Kinds of namespaces of which it has others than the server.
    pub own_namespaces: Vec<String>,
    /// Kinds of namespaces that are the server's as well.
    pub shared_namespaces: Vec<String>,
    /// How many files and directories there are where it looks for any; null if that cannot be looked at.
    pub root_entries: Option<u64>,
    /// Whether it could not write there; null if it cannot be looked at.
    pub root_read_only: Option<bool>,
    /// Its control group, below the root of these.
    pub control_group: Option<String>,
    /// What it may use of the host.
    pub limits: Limits,
    /// What of this is weaker than it is to be, one line each; empty if nothing is.
    pub weaknesses: Vec<String>,
}

/// Resource limits; null for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Limits {
    /// Descriptors.
    pub open_files: Option<u64>,
    /// Processes and threads of its user.
    pub processes: Option<u64>,
    /// Size of a file it writes.
    pub file_size_bytes: Option<u64>,
    /// Memory that cannot be swapped.
    pub locked_memory_bytes: Option<u64>,
    /// Size of a core dump.
    pub core_bytes: Option<u64>,
    /// Message queues.
    pub message_queue_bytes: Option<u64>,
}
