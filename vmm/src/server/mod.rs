//! The server: one per home. It owns every family's memory manager and starts, steers and ends the VM processes.
//!
//! One thread, one event loop. Nothing in it waits: what takes time (a process that prepares itself, a freeze, a guest's
//! answer) is a state that a later message completes, and pages settle in small batches between rounds. So a trap is
//! never far from being served, whatever else is going on.
//!
//! | file | has |
//! | --- | --- |
//! | `watch`, `clients` | the loop's descriptors, and who is connected |
//! | `process`, `zygote`, `window`, `pool`, `expect` | VM processes, who makes them, their memory, and the prepared ones |
//! | `files` | what is mapped into guests from files |
//! | `vm`, `names`, `roll` | the list of VMs, their names, and its copy in the home |
//! | `launch`, `fork`, `hint`, `balloon`, `talk`, `end` | the verbs that change something |
//! | `reclaim`, `budget`, `swap` | what takes memory out, when, and where it goes |
//! | `idle` | balloons of VMs that do nothing |
//! | `look`, `report`, `guest_stats`, `check` | the verbs that look |
//! | `aside` | the thread that asks the kernel what it takes long to tell |
//! | `inbox` | what VM processes say |
//! | `settle`, `pace` | traps, and pages that settle behind the guests' backs |

mod aside;
mod balloon;
mod budget;
mod check;
mod clients;
mod end;
mod expect;
mod files;
mod fork;
mod guest_stats;
mod hint;
mod idle;
mod inbox;
mod launch;
mod look;
mod names;
mod pace;
mod pool;
mod process;
mod reclaim;
mod report;
mod roll;
mod settle;
mod shed;
mod swap;
mod talk;
mod vm;
mod watch;
mod window;
mod working_set;
mod zygote;

use crate::api::{Answer, Failure, Greeting, Reply, Request};
use crate::client::{Home, HomeError};
use crate::clock::monotonic_ns;
use crate::host::heap;
use crate::host::latency::WakeLatency;
use crate::nice;
use crate::wire::{HostFeatures, Isolation};
use aside::{Aside, Finding};
use budget::Budget;
use check::Checks;
use clients::{Client, ClientId, Heard};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use files::Files;
use fork::{ForkId, ForkOp};
use guest_mem::Manager;
use guest_mem::manager::SwapCounts;
use guest_mem::store::memfd::MemfdStores;
use guest_mem::swap::handle::SharedSwap;
use guest_mem::sys::Userfaultfd;
use look::{Looks, Wanted};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;
use pool::Pool;
use process::{ProcessId, VmProcess};
use reclaim::Reclaims;
use roll::Roll;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use swap::HostSwap;
use vm::{FamilyId, Generation, Vms};
use watch::Watches;
use window::{RemoteWindow, Want, Wants};
use zygote::{Jail, Zygote};

pub use crate::wire::Strictness;
pub use idle::{AutoBalloon, IdleConfig};
pub use swap::SwapConfig;
pub use zygote::try_jail;

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

/// How soon a memory that outlives its process is looked at again.
const LINGER: Duration = Duration::from_millis(5);

/// How long no client is waited for where there is no descriptor for one.
const DEAF: Duration = Duration::from_secs(1);

/// What an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Listener,
    Signals,
    Client(ClientId),
    Process(ProcessId),
    Traps(ProcessId),
    Swap,
    Files,
    Aside,
}

type FamilyManager = Manager<MemfdStores, RemoteWindow>;

struct Server {
    home: Home,
    features: HostFeatures,
    /// What VM processes run with.
    niceness: i32,
    isolation: Isolation,
    cage: PathBuf,
    /// Mappings a window may have: a quarter of what the kernel allows a process.
    max_runs: u32,
    watches: Watches<Origin>,
    listener: UnixListener,
    listener_token: Option<watch::Token>,
    /// There was no descriptor for a client: until when none is waited for.
    deaf_until: Option<Instant>,
    signals: SignalFd,
    clients: BTreeMap<ClientId, Client>,
    processes: BTreeMap<ProcessId, VmProcess>,
    /// Whose a child of this process is: a VM process, its keeper, or a copy.
    pids: HashMap<Pid, ProcessId>,
    /// When to look for processes that VM processes have left behind.
    strays_at: Option<Instant>,
    /// Those that have ended, and whose memory a worker of KVM's holds on to.
    lingering: BTreeSet<ProcessId>,
    zygote: Zygote,
    wants: Wants,
    pool: Pool,
    families: BTreeMap<FamilyId, FamilyManager>,
    stores: MemfdStores,
    swap: Rc<RefCell<HostSwap>>,
    reclaims: Reclaims,
    budget: Budget,
    idle: idle::IdlePolicy,
    /// What families that are gone have counted.
    past: SwapCounts,
    files: Files,
    vms: Vms,
    roll: Roll,
    latency: WakeLatency,
    forks: BTreeMap<ForkId, ForkOp>,
    balloons: Vec<balloon::BalloonOp>,
    /// Clients that wait for what a guest says of its memory.
    stats_waiters: Vec<(ClientId, Generation)>,
    aside: Aside,
    looks: Looks,
    checks: Checks,
    removals: Vec<end::Removal>,
    deadlines: Vec<(Instant, talk::Deadline)>,
    /// What is to leave windows.
    sheds: shed::Sheds,
    working_sets: working_set::WorkingSets,
    /// When families do again what failed, or could not be done yet.
    retries: BTreeMap<FamilyId, Instant>,
    pace: pace::Pace,
    /// Clients that got an answer, and may have asked the next thing already.
    replied: Vec<ClientId>,
    lost: Vec<String>,
    next_id: u64,
    stopping: Option<ClientId>,
}

/// Serves `config.home` until a client asks for an end.
///
/// # Errors
/// The home has a server already, or the host will not let this one start.
pub fn run(config: Config) -> Result<(), Error> {
    // Whatever the mask is that we were started with: what is in the home is its user's alone.
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    heap::keep();
    // Only root may. VM processes go back to where they can be ended.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        log::debug!("oom_score_adj: {error}");
    }
    config.home.create()?;
    let lock = config.home.lock()?;
    let server = Rc::new(RefCell::new(Server::new(config)?));
    let mut events = EventManager::new().map_err(Error::Loop)?;
    let id = events.add_subscriber(Rc::clone(&server) as Rc<RefCell<dyn MutEventSubscriber>>);
    while !server.borrow().has_stopped() {
        let wait = server.borrow_mut().between_rounds();
        server.borrow_mut().watches.apply(&mut events.event_ops(id).map_err(Error::Loop)?);
        events.run_with_timeout(wait).map_err(Error::Loop)?;
    }
    let done = server.borrow().clean_up();
    drop(lock);
    done
}

impl MutEventSubscriber for Server {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let Some((_, origin)) = self.watches.source(&events) else { return };
        match origin {
            Origin::Listener => self.accept(),
            Origin::Signals => self.reap(),
            Origin::Client(client) => self.serve_client(client),
            Origin::Process(process) => self.hear_process(process),
            Origin::Traps(process) if events.event_set().contains(EventSet::ERROR) => self.traps_broken(process),
            Origin::Traps(process) => self.serve_traps(process),
            Origin::Swap => self.swap_moved(),
            Origin::Files => self.file_read(),
            Origin::Aside => self.told_aside(),
        }
        self.grant_wants();
    }

    fn init(&mut self, _ops: &mut EventOps) {
        self.listener_token = Some(self.watches.add(&self.listener, EventSet::IN, Origin::Listener));
        self.watches.add(&self.signals, EventSet::IN, Origin::Signals);
        self.watches.add(self.files.bell(), EventSet::IN, Origin::Files);
        self.watches.add(self.aside.bell(), EventSet::IN, Origin::Aside);
    }
}

impl Server {
    fn new(config: Config) -> Result<Self, Error> {
        let Config { home, swap, budget, idle, isolation: strictness } = config;
        let io = |operation| move |source: io::Error| Error::Io { operation, source };
        let features = crate::host::features();
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block().map_err(|e| io("block SIGCHLD")(e.into()))?;
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
        let lost = Roll::left_at(&roll_path(&home));
        // After the swap's threads were made: they may wait.
        let niceness = nice::go_ahead();
        Ok(Self {
            features,
            niceness,
            isolation,
            max_runs: crate::host::max_map_count() / 4,
            watches: Watches::new(),
            listener: listen(&home)?,
            listener_token: None,
            deaf_until: None,
            signals,
            clients: BTreeMap::new(),
            processes: BTreeMap::new(),
            pids: HashMap::new(),
            strays_at: None,
            lingering: BTreeSet::new(),
            // After the niceness: the server waits for it.
            zygote: Zygote::start(Jail { isolation, strictness, on: cage.clone() }),
            cage,
            wants: Wants::default(),
            pool: Pool::default(),
            families: BTreeMap::new(),
            stores: MemfdStores::new(userfaultfd).with_swap(SharedSwap::new(Rc::clone(&swap))),
            swap,
            reclaims: Reclaims::default(),
            budget: Budget::new(budget),
            idle: idle::IdlePolicy::new(idle),
            past: SwapCounts::default(),
            files: Files::new().map_err(io("make an eventfd"))?,
            vms: Vms::default(),
            roll: Roll::at(roll_path(&home)),
            latency: WakeLatency::open(),
            forks: BTreeMap::new(),
            balloons: Vec::new(),
            stats_waiters: Vec::new(),
            aside: Aside::new(niceness).map_err(io("make an eventfd"))?,
            looks: Looks::default(),
            checks: Checks::default(),
            removals: Vec::new(),
            deadlines: Vec::new(),
            sheds: shed::Sheds::default(),
            working_sets: working_set::WorkingSets::default(),
            retries: BTreeMap::new(),
            pace: pace::Pace::default(),
            replied: Vec::new(),
            lost,
            next_id: 1,
            stopping: None,
            home,
        })
    }

    /// A number nothing else of this server has.
    fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// What is done when no event waits. How long the loop may wait for the next, in milliseconds.
    fn between_rounds(&mut self) -> i32 {
        let now = Instant::now();
        self.latency.tend(now);
        if self.forks.is_empty() {
            self.record_names();
        }
        for client in std::mem::take(&mut self.replied) {
            self.hear(client);
        }
        self.pass_deadlines(now);
        let settling = self.settle(now);
        self.grant_wants();
        self.tend_sheds();
        self.answer_settled_forks();
        let reclaiming = self.tend_reclaims(now) | self.tend_budget(now);
        self.tend_idle(now);
        self.watch_swap();
        self.swap.borrow_mut().trim();
        self.grant_wants();
        let bringing = self.bring_ahead();
        let filling = self.tend_pool(now, settling || bringing);
        self.tend_lingering();
        self.end_strays(now);
        self.finish_removals(now);
        self.listen_again(now);
        let checking = self.tend_checks(now);
        self.finish_checks();
        let looking = self.tend_looks();
        let (past, budget) = (&mut self.past, &mut self.budget);
        self.families.retain(|&family, manager| {
            let lives = manager.windows() > 0 || manager.has_writeback();
            if !lives {
                *past = *past + manager.counts();
                budget.forget(family);
            }
            lives
        });
        self.pool.retain(|parent| self.vms.get(parent).is_some_and(vm::Vm::is_alive));
        let busy = reclaiming
            || bringing
            || filling
            || looking
            || checking.is_some_and(|at| at <= now)
            || !self.replied.is_empty();
        if settling || busy {
            return self.pace.wait(now).filter(|_| !busy).map_or(0, |wait| wait.as_millis() as i32);
        }
        if self.forks.is_empty() {
            self.families.values_mut().for_each(FamilyManager::stock_up);
        }
        let pool = self.pool.next_look();
        let next =
            self.deadlines.iter().map(|(at, _)| *at).chain(self.retries.values().copied()).chain(pool).chain(checking);
        let next = next.chain(self.reclaims.next_look()).chain(self.budget.next_look(&self.vms));
        let lingering = (!self.lingering.is_empty()).then(|| now + LINGER);
        let removals = self.removals.iter().map(|removal| removal.until).filter(|until| *until > now);
        let next = next.chain(removals).chain(self.strays_at).chain(self.deaf_until);
        let next = next.chain(self.next_idle_look()).chain(self.latency.until()).chain(lingering).min();
        next.map_or(-1, |at| at.saturating_duration_since(now).as_millis().min(60_000) as i32 + 1)
    }

    fn members(&self, family: FamilyId) -> Vec<Generation> {
        self.vms.iter().filter(|vm| vm.memory.is_some_and(|(f, _)| f == family)).map(|vm| vm.generation).collect()
    }

    /// Does what windows asked for.
    fn grant_wants(&mut self) {
        loop {
            let Some((id, want)) = self.wants.borrow_mut().pop_front() else { return };
            let Some(process) = self.processes.get_mut(&id) else { continue };
            match want {
                Want::DropScratch(store) => {
                    // Its memory is less from now on.
                    self.budget.stir();
                    process.send(&crate::wire::ToVm::DropScratch(store), &[]);
                }
                Want::LeaveScratch(store, pages) => {
                    process.send(&crate::wire::ToVm::LeaveScratch { store, pages }, &[]);
                }
                Want::Protect(pages, protection) => {
                    let message = crate::wire::ToVm::Protect { pages, protection };
                    process.send_when_ready(process::Parcel { message, descriptors: Vec::new() });
                }
                Want::Room => self.watch_process(id),
                Want::Release => self.end_process(id),
                Want::Fail(why) => {
                    if let process::Role::Vm(generation) = process.role {
                        self.end_vm(generation, vm::Phase::Dead(why));
                    }
                }
            }
        }
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                    return self.rest_from_clients(&error);
                }
                Err(_) => return,
            };
            let id = ClientId(self.fresh_id());
            let Ok(mut client) = Client::new(stream) else { continue };
            if !client.is_ours() {
                log::warn!("somebody else's connection is refused");
                continue;
            }
            client.say(&Greeting {
                version: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id() as i32,
                lost: std::mem::take(&mut self.lost),
            });
            client.token = Some(self.watches.add(client.stream(), EventSet::IN, Origin::Client(id)));
            self.clients.insert(id, client);
        }
    }

    /// A client waits, and there is no descriptor for it: it would be heard of in every round.
    fn rest_from_clients(&mut self, error: &io::Error) {
        log::error!("clients wait: {error}");
        self.deaf_until = Some(Instant::now() + DEAF);
        if let Some(token) = self.listener_token {
            self.watches.modify(token, EventSet::empty());
        }
    }

    fn listen_again(&mut self, now: Instant) {
        if let (Some(_), Some(token)) = (self.deaf_until.take_if(|until| *until <= now), self.listener_token) {
            self.watches.modify(token, EventSet::IN);
        }
    }

    /// Something that was asked aside has been found out.
    fn told_aside(&mut self) {
        for (ticket, finding) in self.aside.answers() {
            match finding {
                Finding::Usage(usage) => self.usage_came(ticket, usage),
                Finding::Layers(layers) => self.layers_came(ticket, layers),
                Finding::Window(mappings, live) => self.window_seen(ticket, mappings, live),
                Finding::Extents(extents) => self.extents_came(ticket, extents),
            }
        }
    }

    fn serve_client(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.flush();
        client.read();
        self.hear(id);
    }

    /// Does what a client has to say, as far as it may say it now.
    fn hear(&mut self, id: ClientId) {
        while let Some(client) = self.clients.get_mut(&id) {
            match client.hear() {
                Heard::Nothing => {
                    self.rewatch(id);
                    return;
                }
                Heard::Gone => return self.drop_client(id),
                Heard::Typed(vm, bytes) => self.type_on_console(vm, bytes),
                Heard::Request(Err(why)) => self.reply(id, Err(Failure::bad_input(why))),
                Heard::Request(Ok(request)) => {
                    client.asked_ns = monotonic_ns();
                    self.carry_out(id, request);
                }
            }
        }
    }

    fn rewatch(&mut self, id: ClientId) {
        let Some(client) = self.clients.get(&id) else { return };
        let mut events = EventSet::empty();
        events.set(EventSet::IN, client.wants_input());
        events.set(EventSet::OUT, client.has_output());
        if let Some(token) = client.token {
            self.watches.modify(token, events);
        }
    }

    fn drop_client(&mut self, id: ClientId) {
        if let Some(client) = self.clients.remove(&id)
            && let Some(token) = client.token
        {
            self.watches.remove(token, client);
        }
    }

    /// Answers the request that a client waits for. Its next one is heard between rounds.
    fn reply(&mut self, id: ClientId, reply: Reply) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.reply(&reply);
            self.rewatch(id);
            self.replied.push(id);
        }
    }

    fn carry_out(&mut self, client: ClientId, request: Request) {
        log::debug!("{client:?}: {request:?}");
        self.budget.stir();
        match request {
            Request::Launch(_) if self.stopping.is_some() => {
                self.reply(client, Err(Failure::failed("the server is shutting down")));
            }
            Request::Launch(launch) => self.launch(client, launch),
            Request::Fork(fork) => self.fork(client, fork),
            Request::Send { name, text, timeout_ms } => self.send(client, &name, text, timeout_ms),
            Request::Console { name } => self.console(client, &name),
            Request::Logs { name, follow } => self.logs(client, &name, follow),
            Request::List => {
                let answer = Answer::Vms(self.list());
                self.reply(client, Ok(answer));
            }
            Request::Tree => self.begin_look(client, Wanted::Tree),
            Request::Stats { name: Some(name) } => self.stats_of(client, &name),
            Request::Stats { name: None } => self.begin_look(client, Wanted::Stats(None)),
            Request::Inspect { name } => self.begin_look(client, Wanted::Inspect(name)),
            Request::Pause { name } => self.pause(client, &name, true),
            Request::Resume { name } => self.pause(client, &name, false),
            Request::Stop { name } => {
                let answer = self.stop(&name).map(|()| Answer::Done);
                self.reply(client, answer);
            }
            Request::Wait { name, timeout_ms } => self.wait(client, &name, timeout_ms),
            Request::Balloon { name, size_bytes, timeout_ms } => self.balloon(client, &name, size_bytes, timeout_ms),
            Request::Remove { names, all } => self.remove(client, &names, all),
            Request::Reclaim { name, bytes } => self.reclaim(client, name.as_deref(), bytes),
            Request::Budget { set } => {
                let answer = self.set_budget(set).map(Answer::Budget);
                self.reply(client, answer);
            }
            Request::Check => self.check(client),
            Request::Shutdown => self.shut_down(client),
        }
    }

    /// The VM of a name, for a verb that takes any.
    fn find(&self, name: &str) -> Result<&vm::Vm, Failure> {
        self.vms.find(name).ok_or_else(|| Failure::bad_input(format!("there is no VM {name:?}")))
    }

    /// The VM of a name, for a verb that takes one that has not ended.
    fn find_alive(&self, name: &str) -> Result<&vm::Vm, Failure> {
        let vm = self.find(name)?;
        match &vm.phase {
            vm::Phase::Off | vm::Phase::Rebooted => Err(Failure::bad_input(format!("VM {name:?} is off"))),
            vm::Phase::Dead(reason) => Err(Failure::bad_input(format!("VM {name:?} is dead: {reason}"))),
            _ => Ok(vm),
        }
    }

    /// Keeps, in the home, the names of what would be lost if this server died.
    fn record_names(&mut self) {
        let news = std::mem::take(&mut self.vms.news);
        if !news.is_empty()
            && let Err(error) = self.roll.note(&news, self.vms.iter().map(|vm| vm.name.as_str()))
        {
            log::error!("record of VMs in {}: {error}", self.home.path().display());
        }
    }

    fn has_stopped(&self) -> bool {
        self.stopping.is_some_and(|client| {
            let gone = self.processes.is_empty() || self.removals.is_empty();
            gone && self.clients.get(&client).is_none_or(|client| !client.has_output())
        }) && self.removals.is_empty()
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
        HostSwap::clean_up(&self.home);
        std::fs::remove_dir(&self.cage).map_err(|source| Error::Io { operation: "remove the empty directory", source })
    }
}

fn listen(home: &Home) -> Result<UnixListener, Error> {
    let path = home.socket()?;
    match std::fs::remove_file(path.as_ref()) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(Error::Io { operation: "remove an old socket", source: e });
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).and_then(|listener| {
        // Whatever the mask is that we were started with.
        std::fs::set_permissions(path.as_ref(), Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map_err(|source| Error::Io { operation: "listen on the home's socket", source })
}

/// Where the names of VMs are kept.
fn roll_path(home: &Home) -> PathBuf {
    home.path().join("vms")
}
