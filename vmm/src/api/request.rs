//! What a client asks for.

use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What a client asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verb")]
pub enum Request {
    /// Launch a guest. Answered by `Launched`: the built-in guest's has reached its prompt, a Linux guest's vCPU runs.
    Launch(Launch),
    /// Fork a VM. Answered by `Forked`.
    Fork(Fork),
    /// Send a line to the guest and wait for its answer. Answered by `Said`. A Linux guest is not waited for: the line
    /// is typed on its serial console. Answered by `Done`.
    Send {
        /// The VM.
        name: String,
        /// The line, without a newline.
        text: String,
        /// How long to wait.
        timeout_ms: u64,
    },
    /// Attach to the serial console. Answered by `Stream`.
    Console {
        /// The VM.
        name: String,
    },
    /// What the guest printed, and its answers that nobody waited for. Answered by `Stream`.
    Logs {
        /// The VM.
        name: String,
        /// Go on with what comes.
        follow: bool,
        /// Only so many of the last lines that there are; null for all.
        tail_lines: Option<u64>,
    },
    /// Connect to a port of a Linux guest's vsock. Answered by `Connected` when the guest has accepted: a stream socket travels
    /// along, which leads straight to the guest.
    Connect {
        /// The VM.
        name: String,
        /// The port.
        port: u32,
        /// How long to wait for the guest.
        timeout_ms: u64,
    },
    /// All VMs. Answered by `Vms`.
    List,
    /// All VMs with their page counts, parents before children. Answered by `Tree`.
    Tree,
    /// Figures of all VMs, or of one. Answered by `Stats`.
    Stats {
        /// The one.
        name: Option<String>,
    },
    /// Stop the vCPUs. Answered by `Done`.
    Pause {
        /// The VM.
        name: String,
    },
    /// Let them run. Answered by `Done`.
    Resume {
        /// The VM.
        name: String,
    },
    /// Ask the guest to power off. Answered by `Done`, at once.
    Stop {
        /// The VM.
        name: String,
    },
    /// End a VM at once, and keep it listed, as dead. Answered by `Done` when its process is gone.
    Kill {
        /// The VM.
        name: String,
    },
    /// Wait until it is off or dead. Answered by `Ended`.
    Wait {
        /// The VM.
        name: String,
        /// How long; null for ever.
        timeout_ms: Option<u64>,
    },
    /// Have a guest give memory back, or take some back, until it has so much left. Answered by `Ballooned` when it has.
    Balloon {
        /// The VM.
        name: String,
        /// What it is to have left: at least 16 MiB, whole pages, not more than its memory.
        size_bytes: u64,
        /// How long to wait.
        timeout_ms: u64,
    },
    /// End VMs and forget them, those that are there. Answered by `Removed` when their processes are gone.
    Remove {
        /// Which; ignored where `all` is set.
        names: Vec<String>,
        /// All there are.
        all: bool,
    },
    /// Everything about one VM. Answered by `Inspected`.
    Inspect {
        /// The VM.
        name: String,
    },
    /// Take that much out of memory. Answered by `Reclaimed` when it is done, or no more can be done.
    Reclaim {
        /// Of this VM's family; null for all.
        name: Option<String>,
        /// How much.
        size_bytes: u64,
    },
    /// The budget, set to something else first where that is asked for. Answered by `Budget`.
    Budget {
        /// What to set it to.
        set: Option<BudgetSetting>,
    },
    /// Run the invariants on the live server. Answered by `Checked`.
    Check,
    /// End all VMs and the server. Answered by `Done`.
    Shutdown,
}

impl Request {
    /// Its verb.
    pub fn kind(&self) -> RequestKind {
        match self {
            Self::Launch(_) => RequestKind::Launch,
            Self::Fork(_) => RequestKind::Fork,
            Self::Send { .. } => RequestKind::Send,
            Self::Console { .. } => RequestKind::Console,
            Self::Logs { .. } => RequestKind::Logs,
            Self::Connect { .. } => RequestKind::Connect,
            Self::List => RequestKind::List,
            Self::Tree => RequestKind::Tree,
            Self::Stats { .. } => RequestKind::Stats,
            Self::Pause { .. } => RequestKind::Pause,
            Self::Resume { .. } => RequestKind::Resume,
            Self::Stop { .. } => RequestKind::Stop,
            Self::Kill { .. } => RequestKind::Kill,
            Self::Wait { .. } => RequestKind::Wait,
            Self::Balloon { .. } => RequestKind::Balloon,
            Self::Remove { .. } => RequestKind::Remove,
            Self::Inspect { .. } => RequestKind::Inspect,
            Self::Reclaim { .. } => RequestKind::Reclaim,
            Self::Budget { .. } => RequestKind::Budget,
            Self::Check => RequestKind::Check,
            Self::Shutdown => RequestKind::Shutdown,
        }
    }

    /// The one VM that it is about, if there is one.
    pub fn vm(&self) -> Option<&str> {
        match self {
            Self::Launch(launch) => launch.name.as_deref(),
            Self::Fork(fork) => Some(&fork.name),
            Self::Send { name, .. } | Self::Console { name } | Self::Logs { name, .. } => Some(name),
            Self::Pause { name } | Self::Resume { name } | Self::Stop { name } | Self::Kill { name } => Some(name),
            Self::Wait { name, .. } | Self::Balloon { name, .. } | Self::Inspect { name } => Some(name),
            Self::Connect { name, .. } => Some(name),
            Self::Stats { name } | Self::Reclaim { name, .. } => name.as_deref(),
            Self::List | Self::Tree | Self::Remove { .. } | Self::Budget { .. } => None,
            Self::Check | Self::Shutdown => None,
        }
    }
}

/// What kind of request one is: its verb, without what goes with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
#[expect(missing_docs, reason = "the same as of the requests")]
pub enum RequestKind {
    #[default]
    Launch,
    Fork,
    Send,
    Console,
    Logs,
    Connect,
    List,
    Tree,
    Stats,
    Pause,
    Resume,
    Stop,
    Kill,
    Wait,
    Balloon,
    Remove,
    Inspect,
    Reclaim,
    Budget,
    Check,
    Shutdown,
}

impl RequestKind {
    /// All there are, in their order.
    pub const ALL: [Self; 21] = [
        Self::Launch,
        Self::Fork,
        Self::Send,
        Self::Console,
        Self::Logs,
        Self::Connect,
        Self::List,
        Self::Tree,
        Self::Stats,
        Self::Pause,
        Self::Resume,
        Self::Stop,
        Self::Kill,
        Self::Wait,
        Self::Balloon,
        Self::Remove,
        Self::Inspect,
        Self::Reclaim,
        Self::Budget,
        Self::Check,
        Self::Shutdown,
    ];

    /// As the protocol calls it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Launch => "launch",
            Self::Fork => "fork",
            Self::Send => "send",
            Self::Console => "console",
            Self::Logs => "logs",
            Self::Connect => "connect",
            Self::List => "list",
            Self::Tree => "tree",
            Self::Stats => "stats",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Stop => "stop",
            Self::Kill => "kill",
            Self::Wait => "wait",
            Self::Balloon => "balloon",
            Self::Remove => "remove",
            Self::Inspect => "inspect",
            Self::Reclaim => "reclaim",
            Self::Budget => "budget",
            Self::Check => "check",
            Self::Shutdown => "shutdown",
        }
    }
}

/// A new budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BudgetSetting {
    /// None.
    None,
    /// This many bytes.
    Bytes(u64),
}

/// A launch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// Its name; null for one the server makes (`vm-1`, `vm-2`, …).
    pub name: Option<String>,
    /// RAM in bytes.
    pub mem_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Remove it when it is off.
    pub remove_when_off: bool,
    /// The Linux guest to start; null for the built-in guest.
    pub linux: Option<Linux>,
    /// Memory that all VMs which descend from this one share: what one of them writes there, all see. Sorted, apart, whole
    /// pages.
    pub shared: Vec<Range<u64>>,
    /// How long it lives; null for as long as it likes. Who is forked from it ends with it, unless the fork says otherwise.
    pub ttl_ms: Option<u64>,
    /// How many VMs may descend from it at a time, those that have ended and are still listed included; null for any number.
    pub max_children: Option<u32>,
    /// Where a socket is made by which programs connect to ports of the guest's; null for none.
    pub vsock: Option<PathBuf>,
}

/// A Linux guest. Paths are absolute.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Linux {
    /// Its kernel: a bzImage, or an x86-64 ELF file.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
}

impl Linux {
    /// Opens the kernel and the initial RAM disk.
    ///
    /// # Errors
    /// Which of them cannot be opened, and why.
    pub fn open(&self) -> Result<(File, Option<File>), String> {
        let open = |what, path: &PathBuf| open_regular(path).map_err(|e| format!("{what} {}: {e}", path.display()));
        Ok((open("kernel", &self.kernel)?, self.initrd.as_ref().map(|path| open("initrd", path)).transpose()?))
    }
}

/// A FIFO or a device would make us wait, or has no length.
fn open_regular(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path)?.is_file() { File::open(path) } else { Err(io::Error::other("not a regular file")) }
}

/// A fork.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fork {
    /// The parent.
    pub name: String,
    /// How many children.
    pub count: u32,
    /// What they are called, each of them; empty for names that the server makes.
    pub children: Vec<String>,
    /// Names that the server makes are PREFIX-1, PREFIX-2, …; null for the name of the first VM of the parent's family.
    pub prefix: Option<String>,
    /// Answer when all moved pages have settled.
    pub wait_settled: bool,
    /// Leave the children paused.
    pub paused: bool,
    /// Have a Linux guest tell of its free pages first, and wait for that no longer than so many milliseconds; null for not
    /// at all.
    pub hint_free_ms: Option<u64>,
    /// Answer when the agents of all children, Linux guests, have heard that these are children, or after so many milliseconds;
    /// null for not waiting.
    pub wait_agent_ms: Option<u64>,
    /// How long each child lives; null for as long as the parent.
    pub ttl_ms: Option<u64>,
}
