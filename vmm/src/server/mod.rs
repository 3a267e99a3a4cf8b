//! The server: one per home. It owns every family's memory manager and starts, steers and ends the VM processes.
//!
//! One thread, one event loop. Nothing in it waits: what takes time (a process that is made or prepares itself, a freeze, a
//! guest's answer) is a state that a later message completes, or a deadline, and pages settle in small batches between rounds.
//! So a trap is never far from being served, whatever else is going on.
//!
//! The server consists of parts, which own what they need and do not see each other: what happens goes in, and what is to be
//! done comes out, or is noted in what comes along. Each folder is a room. A room uses those above it in this table.
//!
//! | room | has |
//! | --- | --- |
//! | `confine` | what the server gives up before it does anything |
//! | `ids`, `watch`, `aside`, `host` | names of things; the descriptors that are watched; the thread that asks the kernel what it takes long to tell; what is known of the host |
//! | `clients` | where clients come from, who is connected, what they say; until when somebody waits |
//! | `freeze` | the freezes of a VM, whoever wants them, as values |
//! | `guest` | what guests say of their memory, their balloons, and what becomes of these while they are idle |
//! | `procs` | VM processes: the zygote that makes them, what they owe, their windows, and the prepared ones with what they expect |
//! | `registry` | the list of VMs, where each is on its way, whether it is to run, their names and the copy of these in the home; how VMs come, and who waits for their end |
//! | `working_set` | what children of a VM need first |
//! | `memory` | faults and write-back; the budget, throttling, reclaim and swap; balloons; files that guests map |
//! | `fork` | freeze the parent, share what it has, start the children |
//! | `inspect` | the verbs that look, and `check` |
//! | `control` | what crosses rooms: requests, what VM processes say, their ends |
//! | `home` | the home, kept whole |
//! | `main_loop` | what is done when something happens, and between rounds |

mod aside;
mod clients;
mod confine;
mod control;
mod fork;
mod freeze;
mod guest;
mod home;
mod host;
mod ids;
mod inspect;
mod main_loop;
mod memory;
mod procs;
mod registry;
#[cfg(test)]
mod rooms;
mod watch;
mod working_set;

use crate::client::{Home, HomeError};
use crate::host::heap;
use crate::host::latency::{WakeLatency, WakeUps};
use crate::nice;
use aside::Aside;
use clients::deadlines::Deadlines;
use clients::{Clients, most_clients};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use fork::op::Forks;
use guest::balloon::Balloons;
use guest_mem::Manager;
use guest_mem::manager::SwapCounts;
use guest_mem::store::memfd::MemfdStores;
use guest_mem::swap::handle::SharedSwap;
use guest_mem::sys::Userfaultfd;
use home::{KeptHome, listen, roll_path};
use host::HostFacts;
use inspect::Inspect;
use memory::MemoryPolicy;
use memory::budget::Budget;
use memory::dedup::Dedups;
use memory::files::Files;
use memory::idle::IdlePolicy;
use memory::pace::Pace;
use memory::reclaim::Reclaims;
use memory::swap::HostSwap;
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use procs::Procs;
use procs::late::Patience;
use procs::window::{RemoteWindow, Wants};
use procs::zygote::Jail;
use registry::Registry;
use registry::removals::EndCause;
use registry::roll::Roll;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use watch::{Origin, Watches};
use working_set::WorkingSets;

pub use crate::wire::Strictness;
pub use guest::idle::{AutoBalloon, IdleConfig};
pub use memory::swap::SwapConfig;
pub use procs::trial::try_jail;

/// What a server needs to know.
#[derive(Debug)]
pub struct Config {
    /// Its home.
    pub home: Home,
    /// Where it evicts pages to.
    pub swap: SwapConfig,
    /// Its memory budget in bytes.
    pub budget: Option<u64>,
    /// What becomes of balloons of idle VMs.
    pub idle: IdleConfig,
    /// What becomes of VMs where their processes cannot be kept apart.
    pub isolation: Strictness,
    /// How long a VM process may take for an answer. One that takes longer is ended.
    pub answer_within: Duration,
    /// What idle processors of the host do during forks.
    pub wake_ups: WakeUps,
    /// How many VMs it may list.
    pub max_vms: Option<u32>,
}

/// How far a server has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It listens on this socket.
    Listening(PathBuf),
    /// It has been asked to end.
    Ending,
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its home cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// Something the host would not give it.
    #[error("{operation}: {source}")]
    Io {
        /// What failed.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The swap that was asked for cannot be had.
    #[error("{0}")]
    Swap(io::Error),
    /// The event loop failed.
    #[error("event loop: {0:?}")]
    Loop(event_manager::Error),
}

type FamilyManager = Manager<MemfdStores, RemoteWindow>;

struct Server {
    home: Home,
    kept_home: KeptHome,
    host: HostFacts,
    watches: Watches<Origin>,
    signals: SignalFd,
    clients: Clients,
    deadlines: Deadlines,
    registry: Registry,
    procs: Procs,
    wants: Wants,
    memory: MemoryPolicy,
    working_sets: WorkingSets,
    forks: Forks,
    inspect: Inspect,
    stopping: Option<EndCause>,
}

/// Serves `config.home` until a client, SIGTERM, SIGINT or SIGHUP asks for an end, and says how far it has come. Of these
/// signals those that are ignored stay so. There must be one thread.
///
/// # Errors
/// The home has a server already, or the host will not let this one start.
pub fn run(config: Config, mut tell: impl FnMut(Stage)) -> Result<(), Error> {
    // Whatever the mask is that we were started with: what is in the home is its user's alone.
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    heap::keep();
    // Only root may. VM processes go back to where they can be ended.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        log::debug!("oom_score_adj: {error}");
    }
    if let Err(error) = confine::confine(crate::host::isolation()) {
        log::warn!("the server keeps more than it needs: {error}");
    }
    config.home.create()?;
    let kept = KeptHome::new(&config.home, config.home.lock()?);
    let socket = config.home.path().join("socket");
    let server = Rc::new(RefCell::new(Server::new(config, kept)?));
    let mut events = EventManager::new().map_err(Error::Loop)?;
    let id = events.add_subscriber(Rc::clone(&server) as Rc<RefCell<dyn MutEventSubscriber>>);
    tell(Stage::Listening(socket));
    let mut ending = false;
    while !server.borrow().has_stopped() {
        if server.borrow().stopping.is_some() && !std::mem::replace(&mut ending, true) {
            tell(Stage::Ending);
        }
        let wait = server.borrow_mut().between_rounds();
        // Nothing may be left that would happen.
        if server.borrow().has_stopped() {
            break;
        }
        server.borrow_mut().watches.apply(&mut events.event_ops(id).map_err(Error::Loop)?);
        events.run_with_timeout(wait).map_err(Error::Loop)?;
    }
    // The home is let go of with the server.
    server.borrow().clean_up()
}

impl Server {
    fn new(config: Config, kept_home: KeptHome) -> Result<Self, Error> {
        let Config { home, swap, budget, idle, isolation: strictness, answer_within, wake_ups, max_vms } = config;
        let io = |operation| move |source: io::Error| Error::Io { operation, source };
        let features = crate::host::features();
        let ends = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter();
        // Who starts a server so that it ignores one of these wants it to.
        let ignored = crate::procfs::ignored_signals().map_err(io("ask for ignored signals"))?;
        let mask: SigSet = ends.filter(|&signal| !ignored.contains(signal)).chain([Signal::SIGCHLD]).collect();
        mask.thread_block().map_err(|e| io("block signals")(e.into()))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|e| io("make a signalfd")(e.into()))?;
        // It has threads, which must not take our signals.
        let swap = Rc::new(RefCell::new(HostSwap::new(&home, swap)?));
        let cage = home.path().join("cage");
        let isolation = crate::host::isolation();
        std::fs::create_dir_all(&cage).map_err(io("make an empty directory"))?;
        let userfaultfd = match features.userfaultfd {
            true => Some(Arc::new(Userfaultfd::new().map_err(io("make a userfaultfd"))?)),
            false => None,
        };
        // What a VM process leaves behind is ours to end.
        set_child_subreaper(true).map_err(|e| io("take in orphans")(e.into()))?;
        let lost = lost_vms(&home);
        // After the swap's threads were made: they may wait.
        let niceness = nice::go_ahead();
        Ok(Self {
            kept_home,
            watches: Watches::new(),
            signals,
            clients: Clients::new(listen(&home)?, most_clients(), lost),
            deadlines: Deadlines::default(),
            registry: Registry::new(Roll::at(roll_path(&home)), max_vms),
            procs: Procs::new(Jail { isolation, strictness, on: cage.clone() }, Patience::new(answer_within)),
            wants: Wants::default(),
            memory: MemoryPolicy {
                families: BTreeMap::new(),
                stores: MemfdStores::new(userfaultfd).with_swap(SharedSwap::new(Rc::clone(&swap))),
                swap,
                reclaims: Reclaims::default(),
                budget: Budget::new(budget),
                idle: IdlePolicy::new(idle),
                past: SwapCounts::default(),
                traps: 0,
                files: Files::new().map_err(io("make an eventfd"))?,
                dedups: Dedups::default(),
                balloons: Balloons::default(),
                retries: BTreeMap::new(),
                pace: Pace::default(),
            },
            working_sets: WorkingSets::default(),
            forks: Forks::default(),
            inspect: Inspect::new(Aside::new(niceness).map_err(io("make an eventfd"))?),
            host: HostFacts {
                features,
                niceness,
                isolation,
                cage,
                max_runs: crate::host::max_map_count() / 4,
                latency: WakeLatency::open(wake_ups),
            },
            stopping: None,
            home,
        })
    }

    fn has_stopped(&self) -> bool {
        let told = match self.stopping {
            None => return false,
            Some(EndCause::Client(client)) => self.clients.has_read_all(client),
            Some(EndCause::Signal | EndCause::HomeIsGone) => true,
        };
        told && self.registry.removals.is_empty()
    }

    /// A child has ended, or somebody wants the server to end.
    fn take_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo != Signal::SIGCHLD as u32 {
                log::info!("the server ends: signal {} of process {}", signal.ssi_signo, signal.ssi_pid);
                self.shut_down(EndCause::Signal);
            }
        }
        self.reap();
    }

    /// Leaves nothing behind but the log.
    fn clean_up(&self) -> Result<(), Error> {
        for file in ["socket", "vms"] {
            match std::fs::remove_file(self.home.path().join(file)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => log::error!("remove {file}: {e}"),
                _ => {}
            }
        }
        for child in crate::procfs::children().unwrap_or_default() {
            let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
        }
        match std::fs::remove_dir(&self.host.cage) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Io { operation: "remove the empty directory", source })
            }
            _ => Ok(()),
        }
    }
}

/// The VMs of a server that did not get to end in order, as long as no other has taken its place.
pub fn lost_vms(home: &Home) -> Vec<String> {
    Roll::left_at(&roll_path(home))
}
