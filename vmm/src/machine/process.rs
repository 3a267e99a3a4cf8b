//! A VM process: a loop over the server's messages and the bell of the vCPUs.

use super::facts::Known;
use super::isolate;
use super::outbox::{self, Outbox};
use super::probe::ways_to_write;
use super::vm::{Freeze, Preparation, Vm, VmError};
use super::voice;
use crate::devices::virtio::Wanted;
use crate::link::Link;
use crate::nice;
use crate::wire::{FromVm, RunState, SOME, Take, ToVm};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use guest_mem::window::host::Asked;
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::{Pid, close, getppid};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Serves `socket` until it ends. `known` is what is known of KVM already.
pub(super) fn run(socket: OwnedFd, known: &Known) -> Result<(), String> {
    let server = getppid();
    isolate::die_with(server).map_err(|error| error.to_string())?;
    // A thread that panics must not leave a machine behind that half works.
    std::panic::set_hook(Box::new(move |panic| {
        log::error!("{panic}");
        std::process::abort();
    }));
    voice::speak_to(socket.as_fd()).map_err(|error| format!("the server's socket: {error}"))?;
    make_room(&socket).map_err(|error| format!("room for descriptors: {error}"))?;
    let link = Link::new(socket);
    link.never_wait().map_err(|error| error.to_string())?;
    let mut events = EventManager::new().map_err(|error| error.to_string())?;
    let process = events.add_subscriber(Process {
        link,
        known,
        vm: None,
        moments: None,
        spare: None,
        done: None,
        backed_up: false,
    });
    let mut wait = -1;
    loop {
        events.run_with_timeout(wait).map_err(|error| error.to_string())?;
        let process = events.subscriber_mut(process).map_err(|error| error.to_string())?;
        if let Some(done) = process.done.take() {
            return done;
        }
        process.end_moments().map_err(|error| format!("the server's socket: {error}"))?;
        process.end_spare();
        wait = process.wait();
    }
}

/// Has the kernel make room for the descriptors of a clone with many ancestors, while there is one thread: with several it
/// waits, for some 10 ms, until no other processor can be looking at the smaller table.
fn make_room(some: &OwnedFd) -> nix::Result<()> {
    const DESCRIPTORS: i32 = 256;
    close(fcntl(some, FcntlArg::F_DUPFD_CLOEXEC(DESCRIPTORS - 1))?)
}

/// The main thread's half of a VM process.
struct Process<'a> {
    link: Link,
    known: &'a Known,
    vm: Option<Vm>,
    /// The first moments of a clone.
    moments: Option<Moments>,
    /// When the last freeze began or had settled: there may be memory for the copies of the next.
    spare: Option<Instant>,
    /// How the process has ended.
    done: Option<Result<(), String>>,
    /// The socket did not take everything: wait until it does.
    backed_up: bool,
}

/// A clone's first moments: what it writes in them, its siblings are likely to write.
struct Moments {
    began: Instant,
    /// Answers of its guest until which it was looked at.
    answers: u32,
}

/// How long the first moments are.
const FIRST_MOMENTS: Duration = Duration::from_millis(100);
/// For how long after a freeze memory is kept for the copies of the next: a VM that is forked again and again has it, and
/// one that is forked now and then gives it back.
const SPARE: Duration = Duration::from_secs(10);
/// A clone is looked at after so many answers, and at the end of its first moments.
const FIRST_ANSWERS: u32 = 2;

const SOCKET: u32 = 0;
const BELL: u32 = 1;
const CONSOLE: u32 = 2;
const SOCKETS: u32 = 3;

impl MutEventSubscriber for Process<'_> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::with_data(&self.link, SOCKET, EventSet::IN)) {
            self.done = Some(Err(format!("epoll of the socket: {error}")));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let served = match events.data() {
            BELL | CONSOLE => self.pass_on(),
            SOCKETS => {
                self.vm.iter().for_each(Vm::serve_sockets);
                Ok(())
            }
            _ => self.serve(ops),
        };
        match served.and_then(|()| self.flush(ops)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.done = Some(Ok(())),
            Err(error) => self.done = Some(Err(format!("the server's socket: {error}"))),
        }
    }
}

impl Process<'_> {
    /// Carries out all messages that are there.
    fn serve(&mut self, ops: &mut EventOps<'_>) -> io::Result<()> {
        while let Some((message, fds)) = self.link.recv::<ToVm>()? {
            self.handle(message, fds, ops)?;
        }
        Ok(())
    }

    /// Sends what the vCPUs have for the server.
    fn pass_on(&mut self) -> io::Result<()> {
        let Some(vm) = &mut self.vm else { return Ok(()) };
        let (messages, console) = vm.floor().take_messages();
        if !console.is_empty() {
            outbox::tell(&mut self.link, &FromVm::Console(console), &[])?;
        }
        let answers = messages.iter().filter(|message| matches!(message, FromVm::Answer(_))).count() as u32;
        if let Some(moments) = self.moments.as_mut().filter(|moments| answers > 0 && moments.answers < FIRST_ANSWERS) {
            moments.answers += answers;
            // First of all: who has its answer may end the clone.
            self.tell_writes(false)?;
        }
        let Some(vm) = &mut self.vm else { return Ok(()) };
        let link = &mut self.link;
        messages.iter().try_for_each(|message| outbox::tell(link, message, &[]))?;
        vm.accept_gift(|message| outbox::tell(link, &message, &[]))
    }

    /// Tells what a clone has written in its first moments.
    fn tell_writes(&mut self, last: bool) -> io::Result<()> {
        let Some(vm) = &mut self.vm else { return Ok(()) };
        match vm.wrote(last) {
            Ok(mut pages) => {
                // What is scattered so widely, siblings will hardly write as well.
                pages.truncate(SOME);
                outbox::tell(&mut self.link, &FromVm::Wrote { pages, last }, &[])?;
            }
            Err(error) => log::debug!("what a clone wrote: {error}"),
        }
        Ok(())
    }

    /// How long nothing has to be done if nothing happens, in milliseconds; -1 for ever.
    fn wait(&self) -> i32 {
        let moments = self.moments.as_ref().map(|moments| moments.began + FIRST_MOMENTS);
        let next = moments.into_iter().chain(self.spare.map(|since| since + SPARE)).min();
        next.map_or(-1, |next| next.saturating_duration_since(Instant::now()).as_millis() as i32 + 1)
    }

    /// Gives memory back that no freeze has come for.
    fn end_spare(&mut self) {
        if let (Some(_), Some(vm)) = (self.spare.take_if(|since| since.elapsed() >= SPARE), &mut self.vm) {
            vm.drop_spare();
        }
    }

    /// Ends a clone's first moments when they are over.
    fn end_moments(&mut self) -> io::Result<()> {
        match self.moments.take_if(|moments| moments.began.elapsed() >= FIRST_MOMENTS) {
            Some(_) => self.tell_writes(true),
            None => Ok(()),
        }
    }

    /// Sends what is queued, and waits for the socket to take more only where it must.
    fn flush(&mut self, ops: &mut EventOps<'_>) -> io::Result<()> {
        let backed_up = self.link.flush()?;
        if backed_up != self.backed_up {
            self.backed_up = backed_up;
            let wanted = if backed_up { EventSet::IN | EventSet::OUT } else { EventSet::IN };
            ops.modify(Events::with_data(&self.link, SOCKET, wanted)).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn handle(&mut self, message: ToVm, fds: Vec<OwnedFd>, ops: &mut EventOps<'_>) -> io::Result<()> {
        let Some(vm) = &mut self.vm else { return self.prepare(message, ops) };
        let floor = Arc::clone(vm.floor());
        match message {
            ToVm::Prepare { .. } => return Err(nonsense("a second Prepare")),
            ToVm::Expect(expected) => {
                let message = match vm.expect(*expected, &fds) {
                    Ok(()) => FromVm::Expecting,
                    // A vCPU knows better why.
                    Err(error) => {
                        let mut said = floor.take_messages().0.into_iter();
                        let reason = said.find(|message| matches!(message, FromVm::StartFailed(_)));
                        reason.unwrap_or_else(|| FromVm::StartFailed(error.to_string()))
                    }
                };
                outbox::tell(&mut self.link, &message, &[])?;
            }
            ToVm::Start(start) => {
                let started = vm.start(*start, &fds);
                self.report_start(started)?;
            }
            ToVm::Load(state) => {
                let loaded = vm.load(&state);
                self.begin_moments(loaded)?;
            }
            ToVm::LoadExpected => {
                let loaded = vm.load_expected();
                self.begin_moments(loaded)?;
            }
            ToVm::Freeze { store, max_runs, take, along, first } => {
                let (file, lifeline) = match (take, fds.as_slice()) {
                    (Take::Snapshot, [file, lifeline]) => (file, Some(lifeline.as_fd())),
                    (Take::Snapshot, _) => return Err(nonsense("a snapshot needs a store and a pipe")),
                    (Take::Remap | Take::CopyInPlace, fds) => (one(fds)?, None),
                };
                self.spare = Some(Instant::now());
                let mut out = Outbox::new(&mut self.link);
                let asked = Asked { max_runs, short: take.small_extents(), along: &along };
                let freeze = Freeze { store, file: file.as_fd(), lifeline, asked, first: &first };
                match vm.freeze(&freeze, &mut out) {
                    Ok(()) => {}
                    Err(error) => {
                        out.tell(FromVm::FreezeFailed(error.to_string()))?;
                        if error.is_fatal() {
                            floor.die(error.to_string());
                        }
                    }
                }
            }
            ToVm::Dedup { store, pages } => {
                let file = one(&fds)?;
                let link = &mut self.link;
                if let Err(error) = vm.dedup(store, file.as_fd(), &pages, |message| outbox::tell(link, &message, &[])) {
                    log::warn!("pages {pages:?} stay in memory twice: {error}");
                    if error.is_fatal() {
                        floor.die(error.to_string());
                    }
                }
            }
            ToVm::Protect { pages, protection } => {
                if let Err(error) = vm.protect(pages, protection) {
                    floor.die(format!("protect memory: {error}"));
                }
            }
            ToVm::LeaveScratch { store, pages } => vm.leave_scratch(store, pages),
            ToVm::DropScratch(store) => {
                vm.drop_scratch(store);
                self.spare = Some(Instant::now());
            }
            ToVm::Pause => self.ask(RunState::Paused),
            ToVm::Resume => self.ask(RunState::Running),
            ToVm::Input(line) => {
                floor.lock().mailbox.post(line);
                floor.notify();
            }
            ToVm::Console(bytes) => {
                floor.lock().console.input(&bytes);
                floor.notify();
            }
            ToVm::ForkDone(outcome) => {
                floor.lock().mailbox.fork_done(outcome);
                floor.notify();
            }
            ToVm::Connect { tag, port, greet } => {
                let socket = fds.into_iter().next().ok_or_else(|| nonsense("a connection needs a socket"))?;
                if let Some(outcome) = vm.connect(Wanted { tag, port, greet, socket }) {
                    outbox::tell(&mut self.link, &FromVm::Connected { tag, outcome }, &[])?;
                }
            }
            ToVm::Connected { tag } => vm.answer_connect(tag, fds.into_iter().next()),
            ToVm::Balloon { pages } => vm.set_balloon(pages),
            ToVm::AskStats => vm.ask_statistics(),
            ToVm::HintFree => vm.begin_hinting(),
            ToVm::Stop => vm.stop(),
            ToVm::Probe => {
                let ways = ways_to_write(one(&fds)?.as_fd());
                outbox::tell(&mut self.link, &FromVm::Probed(ways), &[])?;
            }
        }
        Ok(())
    }

    /// A clone has its state, and begins to run.
    fn begin_moments(&mut self, loaded: Result<(), VmError>) -> io::Result<()> {
        self.moments = loaded.is_ok().then(|| Moments { began: Instant::now(), answers: 0 });
        self.report_start(loaded)
    }

    /// Tells the server if a VM that is to start cannot.
    fn report_start(&mut self, done: Result<(), VmError>) -> io::Result<()> {
        match done {
            Ok(()) => Ok(()),
            Err(error) => outbox::tell(&mut self.link, &FromVm::StartFailed(error.to_string()), &[]),
        }
    }

    /// The first message makes the VM.
    fn prepare(&mut self, message: ToVm, ops: &mut EventOps<'_>) -> io::Result<()> {
        let ToVm::Prepare { shape, isolation, features, cage, server, niceness } = message else {
            return Err(nonsense("a message before Prepare"));
        };
        let server = Pid::from_raw(server);
        if let Err(error) = nice::set(niceness) {
            log::warn!("niceness {niceness}: {error}");
        }
        match Vm::prepare(&Preparation { shape, isolation, features, cage: &cage, server, known: self.known }) {
            Ok(vm) => {
                ops.add(Events::with_data(vm.floor().bell(), BELL, EventSet::IN)).map_err(io::Error::other)?;
                let console = Events::with_data_raw(vm.floor().console_bell(), CONSOLE, EventSet::IN);
                ops.add(console).map_err(io::Error::other)?;
                let sockets = vm.socket_bell().map(|bell| Events::with_data_raw(bell, SOCKETS, EventSet::IN));
                sockets.map_or(Ok(()), |sockets| ops.add(sockets)).map_err(io::Error::other)?;
                let (ready, traps) = vm.ready();
                outbox::tell(&mut self.link, &ready, traps.as_slice())?;
                self.vm = Some(vm);
            }
            Err(error) => outbox::tell(&mut self.link, &FromVm::PrepareFailed(error.to_string()), &[])?,
        }
        Ok(())
    }

    fn ask(&mut self, activity: RunState) {
        let asked = self.vm.as_mut().map(|vm| vm.ask(activity));
        if let Some(Err(error)) = asked {
            log::warn!("asked to be {activity:?}: {error}");
        }
    }
}

/// The one descriptor that a message must bring.
fn one(fds: &[OwnedFd]) -> io::Result<&OwnedFd> {
    match fds {
        [fd] => Ok(fd),
        _ => Err(nonsense("a message that needs one descriptor")),
    }
}

fn nonsense(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
