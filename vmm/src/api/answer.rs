//! What the server tells.

use super::{Confinement, RequestKind};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What the server answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer", content = "value")]
#[non_exhaustive]
pub enum Answer {
    /// The new VM.
    Launched(VmSummary),
    /// The children, in the order of their numbers.
    Forked(Vec<Child>),
    /// The guest's answer.
    Said(String),
    /// Raw bytes follow.
    Stream,
    /// The guest has accepted a connection, whose socket travels along.
    Connected(Connected),
    /// All VMs.
    Vms(Vec<VmSummary>),
    /// All VMs, parents before children.
    Tree(Vec<TreeRow>),
    /// Figures.
    Stats(Stats),
    /// What has been removed, and what was not there.
    Removed(Removed),
    /// How a VM ended.
    Ended(VmSummary),
    /// What a guest has left.
    Ballooned(Balloon),
    /// One VM.
    Inspected(Box<Inspection>),
    /// What was taken out of memory.
    Reclaimed(Reclaimed),
    /// The budget.
    Budget(BudgetReport),
    /// The invariants that do not hold: none, if all is well.
    Checked(CheckReport),
    /// It is done.
    Done,
}

/// Whom a connection leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Connected {
    /// The VM's name.
    pub name: String,
    /// Its id if it was forked, and 0 if it was launched.
    pub generation: u64,
}

/// The budget, and what of it cannot be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BudgetReport {
    /// What is set; null if nothing is.
    pub budget_bytes: Option<u64>,
    /// What no eviction takes: VM processes without their guests' pages, files, shared memory, the server's books.
    pub floor_bytes: u64,
}

/// A forked VM.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Child {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: u64,
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
    pub window_runs: u64,
    /// Request received to the agent's word that it has heard which child it is; null if it has not, or was not waited for.
    pub acked_us: Option<u64>,
    /// Free pages that the guest told of for this fork; null if it was not asked to.
    pub hinted_pages: Option<u64>,
}

/// `reclaim`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Reclaimed {
    /// What was asked for.
    pub requested_bytes: u64,
    /// What left stores and live layers, as the books count it. Less than was asked for where there was no more.
    pub reclaimed_bytes: u64,
}

/// `rm`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Removed {
    /// Names of the VMs that are gone.
    pub removed: Vec<String>,
    /// Names that no VM had.
    pub missing: Vec<String>,
}

/// What a VM is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VmState {
    /// Its vCPUs run.
    #[default]
    Running,
    /// They stand still.
    Paused,
    /// The guest powered off, or rebooted: then `reason` says so.
    Off,
    /// It ended otherwise; `reason` says how.
    Dead,
}

/// One row of `ls`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VmSummary {
    /// Its name.
    pub name: String,
    /// Its id, which no other VM of this host ever has: it counts from the microsecond in which the server began.
    pub id: u64,
    /// The name of the VM it was forked from, as that was called; null for one that was launched.
    pub parent: Option<String>,
    /// The id of that VM.
    pub parent_id: Option<u64>,
    /// Whether that VM is not listed any more. Another one may have its name by now.
    pub parent_is_gone: bool,
    /// What it is doing.
    pub state: VmState,
    /// Why it is dead, or that it is off since it rebooted.
    pub reason: Option<String>,
    /// RAM in pages of 4 KiB.
    pub mem_pages: u64,
    /// Memory in its balloon, as the guest says.
    pub balloon_bytes: u64,
    /// Its process; null once it has none.
    pub pid: Option<i32>,
    /// How long until the server ends it; null for never, and once it has ended.
    pub ttl_ms: Option<u64>,
    /// How many VMs may descend from the launched VM that it is, or descends from; null for any number.
    pub max_children: Option<u32>,
}

/// A guest's memory and its balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Balloon {
    /// What it can use.
    pub size_bytes: u64,
    /// What it has given back.
    pub balloon_bytes: u64,
}

/// One row of `tree`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
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
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
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

/// What a Linux guest's balloon driver says of its memory, since it booted where that is a count. What an older driver does
/// not tell of is null.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GuestStats {
    /// How long ago it said so, in milliseconds.
    pub age_ms: u64,
    /// Memory swapped in.
    pub swap_in_bytes: Option<u64>,
    /// Memory swapped out.
    pub swap_out_bytes: Option<u64>,
    /// Page faults that took a read from disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Memory that nothing uses.
    pub free_memory_bytes: Option<u64>,
    /// Memory there is.
    pub total_memory_bytes: Option<u64>,
    /// Memory that programs could have without swapping.
    pub available_memory_bytes: Option<u64>,
    /// Memory that could be had back quickly from what was read from disks.
    pub disk_caches_bytes: Option<u64>,
    /// Huge pages of hugetlb given out.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages of hugetlb that were not to be had.
    pub hugetlb_failures: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Allocations that had to wait for reclaim.
    pub alloc_stalls: Option<u64>,
    /// Memory looked at by reclaim in the background.
    pub async_scan_bytes: Option<u64>,
    /// Memory looked at by reclaim of those that allocate.
    pub direct_scan_bytes: Option<u64>,
    /// Memory reclaimed in the background.
    pub async_reclaim_bytes: Option<u64>,
    /// Memory reclaimed by those that allocate.
    pub direct_reclaim_bytes: Option<u64>,
}

/// Figures of the whole server.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
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
    pub clean_eviction_pages: u64,
    /// Pages freed in swap, since nobody saw them any more.
    pub discarded_pages: u64,
    /// Pages that came back soon after they were evicted.
    pub refault_pages: u64,
    /// Pages that could not be read back.
    pub lost_pages: u64,
    /// Of the pages that came back, those that went straight into the live layer of the only VM that saw them, which was
    /// about to write them.
    pub swap_in_live_pages: u64,
    /// Pages read from the disk before anybody asked.
    pub readahead_pages: u64,
    /// Of those, pages that somebody asked for afterwards.
    pub readahead_hit_pages: u64,
    /// Pages written to the disk before memory was short.
    pub writeahead_pages: u64,
    /// Traps served, those of VMs that are gone included.
    pub traps: u64,
}

/// `stats`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Stats {
    /// Per VM.
    pub vms: Vec<VmStats>,
    /// In total.
    pub total: Totals,
    /// How long answers took, for each kind of request that there was.
    pub requests: Vec<RequestLatency>,
}

/// How long the server took to answer requests of a kind, since it began: a histogram.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RequestLatency {
    /// The kind.
    pub kind: RequestKind,
    /// Requests that have been answered.
    pub answers: u64,
    /// Of those, answered by an error.
    pub failures: u64,
    /// How long all of them took together.
    pub total_us: u64,
    /// How many took how long.
    pub buckets: Vec<LatencyBucket>,
}

/// One bucket of a histogram, which has what is in those before it as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LatencyBucket {
    /// No longer than this; null for any time.
    pub up_to_us: Option<u64>,
    /// Answers.
    pub answers: u64,
}

/// `inspect`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Inspection {
    /// Its figures.
    pub stats: VmStats,
    /// Its generation id.
    pub generation: u64,
    /// The keeper of its memory.
    pub keeper_pid: Option<i32>,
    /// How its process is isolated.
    pub isolation: String,
    /// What keeps its process apart, as the kernel tells it; null if it has none, or that is about to begin.
    pub confinement: Option<Confinement>,
    /// The socket by which programs reach its guest's ports; null if it has none.
    pub vsock: Option<PathBuf>,
    /// What came of the notice that its agent was given of the fork; null where it has not answered, or there is none.
    pub agent: Option<AgentNotice>,
    /// Its children that are listed.
    pub children: Vec<String>,
    /// Their ids.
    pub child_ids: Vec<u64>,
    /// Its address space.
    pub entries: Vec<EntryInfo>,
    /// Its window's mappings, at most the first 64.
    pub runs: Vec<RunInfo>,
}

/// What the agent of a child has made of the notice of the fork.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AgentNotice {
    /// Fork asked for to the agent's answer.
    pub acked_us: u64,
    /// Whether the kernel's random numbers are this VM's own. If not, the agent does nothing for anybody.
    pub reseeded: bool,
    /// What was not done; null if all was.
    pub trouble: Option<String>,
}

/// A map entry and the chain behind it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
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
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
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
#[non_exhaustive]
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
