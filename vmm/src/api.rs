//! What a client and the server say to each other: one line of JSON each way over the home's Unix socket.
//!
//! On connecting, the server sends a [`Greeting`]. Then the client sends one [`Request`] a line and gets one [`Reply`] a
//! line, in order. After [`Answer::Stream`] the connection carries raw console bytes, both ways for a console, until
//! either side closes it.

use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Smallest guest memory, in bytes.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Guest memory where none is asked for, in bytes.
pub const DEFAULT_MEMORY: u64 = 256 << 20;
/// Most virtual CPUs of a Linux guest.
pub const MAX_VCPUS: u8 = 8;
/// Longest VM name.
pub const MAX_NAME: usize = 64;

/// The server's first line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Greeting {
    /// Version of the server.
    pub version: String,
    /// Process id of the server.
    pub pid: i32,
    /// VMs that an earlier server of this home had when it died; told once.
    pub lost: Vec<String>,
}

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
    /// End VMs and forget them. Answered by `Done` when their processes are gone.
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
        bytes: u64,
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
    #[serde(default)]
    pub shared: Vec<Range<u64>>,
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
    /// Children are called PREFIX-1, PREFIX-2, …; null for the parent's name.
    pub prefix: Option<String>,
    /// Answer when all moved pages have settled.
    pub wait_settled: bool,
    /// Leave the children paused.
    pub paused: bool,
    /// Have a Linux guest tell of its free pages first, and wait for that no longer than so many milliseconds.
    #[serde(default)]
    pub hint_free_ms: Option<u64>,
}

/// The server's answer to a request.
pub type Reply = Result<Answer, Failure>;

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Whose fault it is.
    pub kind: FailureKind,
    /// One line for the user.
    pub message: String,
}

/// Kinds of failure, each with an exit code of the CLI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The request makes no sense here: exit code 2, and nothing has changed.
    BadInput,
    /// It went wrong: exit code 1.
    Failed,
    /// It took too long: exit code 3.
    TimedOut,
}

impl Failure {
    /// The request makes no sense here.
    pub fn bad_input(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::BadInput, message: message.into() }
    }

    /// It went wrong.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Failed, message: message.into() }
    }

    /// It took too long.
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::TimedOut, message: message.into() }
    }
}

/// What the server answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer", content = "value")]
pub enum Answer {
    /// The VM's name.
    Launched(String),
    /// The children, in the order of their numbers.
    Forked(Vec<Child>),
    /// The guest's answer.
    Said(String),
    /// Raw bytes follow.
    Stream,
    /// All VMs.
    Vms(Vec<VmSummary>),
    /// All VMs, parents before children.
    Tree(Vec<TreeRow>),
    /// Figures.
    Stats(Stats),
    /// How a VM ended.
    Ended(VmSummary),
    /// What a guest has left.
    Ballooned(Balloon),
    /// One VM.
    Inspected(Box<Inspection>),
    /// What was taken out of memory.
    Reclaimed(Reclaimed),
    /// The budget in bytes, if there is one.
    Budget(Option<u64>),
    /// The invariants that do not hold: none, if all is well.
    Checked(CheckReport),
    /// It is done.
    Done,
}

/// A forked VM. Times are microseconds; see DESIGN section 10 for their exact meaning.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Child {
    /// Its name.
    pub name: String,
    /// How long the parent stood still; null if it was paused already.
    pub pause_us: Option<u64>,
    /// Request received to the child's vCPU in `KVM_RUN`; null for a child left paused.
    pub ready_us: Option<u64>,
    /// Request received to the child's first sign of life; null for a child left paused, and for a Linux guest.
    pub first_exit_us: Option<u64>,
    /// Pages moved out of the parent in the pause.
    pub moved_pages: u64,
    /// Pages the server copied for this fork; null until all has settled.
    pub copied_pages: Option<u64>,
    /// Clean pages copied along to keep the number of mappings down; null until all has settled.
    pub gap_pages: Option<u64>,
    /// Mappings of the child's window.
    pub runs: u64,
    /// Free pages that the guest told of for this fork; null if it was not asked to.
    pub hinted_pages: Option<u64>,
}

/// `reclaim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reclaimed {
    /// What was asked for.
    pub requested_bytes: u64,
    /// What left stores and live layers, as the books count it. Less than was asked for where there was no more.
    pub reclaimed_bytes: u64,
}

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its vCPUs run.
    Running,
    /// They stand still.
    Paused,
    /// The guest powered off, or rebooted: then `reason` says so.
    Off,
    /// It ended otherwise; `reason` says how.
    Dead,
}

/// One row of `ls`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmSummary {
    /// Its name.
    pub name: String,
    /// The VM it was forked from.
    pub parent: Option<String>,
    /// What it is doing.
    pub state: VmState,
    /// Why it is dead, or that it is off since it rebooted.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// RAM in pages of 4 KiB.
    pub mem_pages: u64,
    /// Memory in its balloon, as the guest says.
    pub balloon_bytes: u64,
    /// Its process; null once it has none.
    pub pid: Option<i32>,
}

/// A guest's memory and its balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// What it can use.
    pub size_bytes: u64,
    /// What it has given back.
    pub balloon_bytes: u64,
}

/// One row of `tree`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TreeRow {
    /// The VM.
    #[serde(flatten)]
    pub vm: VmSummary,
    /// How far below its root it stands.
    pub depth: u32,
    /// Its live layer and the frozen pages that only it sees.
    pub private_pages: u64,
    /// Pages that at least one other VM sees as well.
    pub shared_pages: u64,
}

/// Figures of one VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmStats {
    /// The VM.
    #[serde(flatten)]
    pub vm: VmSummary,
    /// Its live layer and the frozen pages that only it sees.
    pub private_pages: u64,
    /// Pages that at least one other VM sees as well.
    pub shared_pages: u64,
    /// Pages without storage.
    pub zero_pages: u64,
    /// Pages in swap.
    pub swapped_pages: u64,
    /// Pages in the balloon.
    pub ballooned_pages: u64,
    /// Pages it sees that are still in a scratch range.
    pub unsettled_pages: u64,
    /// Objects one behind the other, from its top one down.
    pub chain_depth: u64,
    /// Mappings of its window.
    pub window_runs: u64,
    /// Its process's share of memory.
    pub pss_bytes: u64,
    /// Traps served.
    pub traps: u64,
    /// Messages between the server and its process, both ways.
    pub messages: u64,
    /// What the guest says of its memory; null for the built-in guest, and for one that has no balloon driver yet.
    pub guest_stats: Option<GuestStats>,
}

/// What a Linux guest's balloon driver says of its memory, under the names that other VMMs have for it. Memory is in bytes;
/// what an older driver does not tell of is null.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// How long ago it said so, in milliseconds.
    pub age_ms: u64,
    /// Memory swapped in.
    pub swap_in: Option<u64>,
    /// Memory swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that took a read from disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Memory that nothing uses.
    pub free_memory: Option<u64>,
    /// Memory there is.
    pub total_memory: Option<u64>,
    /// Memory that programs could have without swapping.
    pub available_memory: Option<u64>,
    /// Memory that could be had back quickly from what was read from disks.
    pub disk_caches: Option<u64>,
    /// Huge pages of hugetlb given out.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages of hugetlb that were not to be had.
    pub hugetlb_failures: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_kill: Option<u64>,
    /// Allocations that had to wait for reclaim.
    pub alloc_stall: Option<u64>,
    /// Memory looked at by reclaim in the background.
    pub async_scan: Option<u64>,
    /// Memory looked at by reclaim of those that allocate.
    pub direct_scan: Option<u64>,
    /// Memory reclaimed in the background.
    pub async_reclaim: Option<u64>,
    /// Memory reclaimed by those that allocate.
    pub direct_reclaim: Option<u64>,
}

/// Figures of the whole server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Totals {
    /// The server's process.
    pub server_pid: i32,
    /// VMs listed.
    pub vms: u64,
    /// Objects.
    pub objects: u64,
    /// Stores.
    pub stores: u64,
    /// Pages in stores.
    pub resident_pages: u64,
    /// Pages in swap.
    pub swapped_pages: u64,
    /// Pages still in scratch ranges.
    pub unsettled_pages: u64,
    /// Stage-2 tables there are.
    pub stage2_tables: u64,
    /// Stage-2 tables there would be if no VM shared any.
    pub stage2_tables_unshared_equivalent: u64,
    /// Prepared VM processes that wait for a fork.
    pub pooled: u64,
    /// Everything the server, its VM processes, keepers and pool use.
    pub host_bytes: u64,
    /// What `accounted_bytes` is kept below; null for no budget.
    pub budget_bytes: Option<u64>,
    /// What counts against the budget: stores, files that VMs map (each content once), the compressed tier, the server's books
    /// beyond 4 MiB, and anonymous memory of VM processes, prepared ones included.
    pub accounted_bytes: u64,
    /// Memory that compressed pages take.
    pub compressed_bytes: u64,
    /// Taken on the swap disk.
    pub disk_bytes: u64,
    /// Slots of swap in use, those of pages that are in memory as well included.
    pub swap_slots: u64,
    /// Pages put into swap.
    pub swap_out_pages: u64,
    /// Pages written to the swap disk.
    pub swap_write_pages: u64,
    /// Pages that came back from swap; once for all who see them.
    pub swap_in_pages: u64,
    /// Pages evicted without putting them into swap, which had them still.
    pub clean_evictions: u64,
    /// Pages freed in swap, since nobody saw them any more.
    pub discarded_pages: u64,
    /// Pages that came back soon after they were evicted.
    pub refaults: u64,
    /// Pages that could not be read back.
    pub lost_pages: u64,
    /// Of the pages that came back, those that went straight into the live layer of the only VM that saw them, which was
    /// about to write them.
    pub swap_in_live_pages: u64,
    /// Pages read from the disk before anybody asked.
    pub readahead_pages: u64,
    /// Of those, pages that somebody asked for afterwards.
    pub readahead_hits: u64,
    /// Pages written to the disk before memory was short.
    pub writeahead_pages: u64,
}

/// `stats`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stats {
    /// Per VM.
    pub vms: Vec<VmStats>,
    /// In total.
    pub total: Totals,
}

/// `inspect`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Inspection {
    /// Its figures.
    pub stats: VmStats,
    /// Its generation id.
    pub generation: u64,
    /// The keeper of its memory.
    pub keeper_pid: Option<i32>,
    /// How its process is isolated.
    pub isolation: String,
    /// Its children.
    pub children: Vec<String>,
    /// Its address space.
    pub entries: Vec<EntryInfo>,
    /// Its window's mappings, at most the first 64.
    pub runs: Vec<RunInfo>,
}

/// A map entry and the chain behind it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EntryInfo {
    /// First guest-physical address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// A private copy is made on write.
    pub copy_on_write: bool,
    /// The next freeze stacks an object.
    pub needs_copy: bool,
    /// Ids of the objects behind it, top first.
    pub chain: Vec<u32>,
}

/// A mapping of a window.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunInfo {
    /// First guest-physical address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `anonymous`, or `store N`.
    pub source: String,
}

/// `check`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CheckReport {
    /// VMs looked at.
    pub vms: u64,
    /// Window mappings compared with `/proc/PID/maps`.
    pub mappings: u64,
    /// Pages compared with the pagemap.
    pub pages: u64,
    /// Each invariant that does not hold, numbered as in the design.
    pub broken: Vec<String>,
}
