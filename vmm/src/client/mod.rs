//! The client library: every verb of the command line, typed.
//!
//! A [`Client`] talks to the server of one [`Home`], and starts it where there is none. VMs belong to the server, not to
//! the client: they live until they are removed, or the server is shut down. A [`Scoped`] VM is removed when it goes out
//! of scope, which is what a test wants.
//!
//! # A warm VM for each test
//!
//! Bring a VM up once, and fork it for each test: a fork takes about a millisecond, shares all memory that neither side
//! writes, and no test sees what another did.
//!
//! ```no_run
//! use std::sync::LazyLock;
//! use std::time::Duration;
//! use vmm::client::{Client, Error, LaunchOptions, Warm, warm};
//!
//! const PATIENCE: Duration = Duration::from_secs(30);
//!
//! static WARM: LazyLock<Warm> = LazyLock::new(|| warm_up().expect("a warm VM"));
//!
//! fn warm_up() -> Result<Warm, Error> {
//!     let client = Client::builder().home("/tmp/my-tests").connect()?;
//!     warm(&client, LaunchOptions::new().name("warm"), |vm| {
//!         vm.send("fill 64 16384 1", PATIENCE).map(drop) // 64 MiB of state that was dear to come by
//!     })
//! }
//!
//! fn one_test() -> Result<(), Error> {
//!     let vm = WARM.fork()?;
//!     vm.send("fill 64 1 2", PATIENCE)?;
//!     vm.send("verify 64 1 2", PATIENCE)?;
//!     Ok(()) // the fork is removed
//! }
//!
//! fn another_test() -> Result<(), Error> {
//!     WARM.fork()?.send("verify 64 16384 1", PATIENCE)?; // never sees the first one's write
//!     Ok(())
//! }
//! # one_test().and(another_test()).unwrap()
//! ```
//!
//! [`Warm::fork_each`] runs one test on many cases, each on a fork.

pub mod agent;
mod connection;
mod error;
mod expect;
mod home;
mod initrd;
mod options;
mod start;
#[cfg(test)]
pub(crate) mod testing;
mod vm;
mod warm;

pub use connection::Stream;
pub use error::Error;
pub use home::{Home, HomeError, HomeLock, SocketPath};
pub use options::{ForkOptions, LaunchOptions};
pub use vm::{Forked, Scoped, Vm};
pub use warm::{Warm, warm};

use crate::api::{
    Answer, BudgetReport, BudgetSetting, CheckReport, Connected, Failure, PROTOCOL, Reclaimed, Removed, Request, Stats,
    TreeRow, VmSummary,
};
use crate::name::check_name;
use crate::units::ByteSize;
use connection::Connection;
use start::{Launcher, Starter};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a server that was told to shut down may take to end.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);

/// A home's server, as its user sees it. Clones talk to the same server, from any thread: each call has a connection to
/// itself while it lasts.
#[derive(Clone, Debug)]
pub struct Client(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    launcher: Launcher,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Connections that no call uses.
    idle: Vec<Connection>,
    /// The server's process, if this client started it.
    started: Option<i32>,
    /// VMs of an earlier server, not told yet.
    lost: Vec<String>,
}

/// How a client finds its server.
#[derive(Clone, Debug)]
pub struct ClientBuilder {
    home: Option<PathBuf>,
    binary: Option<PathBuf>,
    start: bool,
    log_level: log::LevelFilter,
}

impl ClientBuilder {
    /// The server's home; without it, the user's ([`Home::of_user`]).
    pub fn home(mut self, home: impl AsRef<Path>) -> Self {
        self.home = Some(home.as_ref().to_owned());
        self
    }

    /// The `offshoot` binary to start a server with. Without it: `OFFSHOOT_BIN`, this program if it is `offshoot`, one
    /// beside it or in the directory above, one in `PATH`.
    pub fn binary(mut self, binary: impl AsRef<Path>) -> Self {
        self.binary = Some(binary.as_ref().to_owned());
        self
    }

    /// Whether to start a server where none runs; otherwise [`Error::NoServer`] says so.
    pub fn start_server(mut self, start: bool) -> Self {
        self.start = start;
        self
    }

    /// How much a server that is started writes to its log.
    pub fn log_level(mut self, level: log::LevelFilter) -> Self {
        self.log_level = level;
        self
    }

    /// Connects to the server, which may have to be started first.
    pub fn connect(self) -> Result<Client, Error> {
        let home = match self.home {
            Some(home) => Home::at(home),
            None => Home::of_user(),
        };
        let launcher = Launcher {
            home: home.map_err(Error::io("find home"))?,
            binary: self.binary,
            start: self.start,
            log_level: self.log_level,
        };
        let client = Client(Arc::new(Shared { launcher, state: Mutex::default() }));
        let connection = client.open()?;
        client.state().idle.push(connection);
        Ok(client)
    }
}

/// Passes on the value of the expected kind of answer.
macro_rules! answer {
    ($answer:expr, $operation:literal, $kind:ident) => {
        match $answer? {
            Answer::$kind(value) => Ok(value),
            _ => Err(Error::Protocol($operation)),
        }
    };
    ($answer:expr, $operation:literal) => {
        match $answer? {
            Answer::Done => Ok(()),
            _ => Err(Error::Protocol($operation)),
        }
    };
}
use answer;

impl Client {
    /// Connects to the server of `home`, and starts it where there is none.
    pub fn connect(home: &Home) -> Result<Self, Error> {
        Self::builder().home(home.path()).connect()
    }

    /// Connects to a server in other ways.
    pub fn builder() -> ClientBuilder {
        ClientBuilder { home: None, binary: None, start: true, log_level: log::LevelFilter::Warn }
    }

    /// The server's home.
    pub fn home(&self) -> &Home {
        &self.0.launcher.home
    }

    /// The VMs that an earlier server of this home had when it died. Told once.
    pub fn take_lost(&self) -> Vec<String> {
        std::mem::take(&mut self.state().lost)
    }

    /// Launches a guest. The built-in one has reached its prompt when this returns, a Linux guest has begun to boot.
    pub fn launch(&self, options: LaunchOptions) -> Result<Vm, Error> {
        self.launch_told(options).map(|(vm, _)| vm)
    }

    /// The same, with what the server tells of the new VM.
    pub fn launch_told(&self, options: LaunchOptions) -> Result<(Vm, VmSummary), Error> {
        let options = options.prepared(self.home().path())?;
        options.check()?;
        let summary = answer!(self.call(&Request::Launch(options.launch)), "launch", Launched)?;
        Ok((Vm::new(self.clone(), summary.name.clone()), summary))
    }

    /// The VM of that name. Whether there is one shows when it is asked for something.
    pub fn vm(&self, name: impl Into<String>) -> Vm {
        Vm::new(self.clone(), name.into())
    }

    /// All VMs.
    pub fn list(&self) -> Result<Vec<VmSummary>, Error> {
        answer!(self.call(&Request::List), "list", Vms)
    }

    /// All VMs with their page counts, parents before children.
    pub fn tree(&self) -> Result<Vec<TreeRow>, Error> {
        answer!(self.call(&Request::Tree), "tree", Tree)
    }

    /// Figures of all VMs, and in total.
    pub fn stats(&self) -> Result<Stats, Error> {
        answer!(self.call(&Request::Stats { name: None }), "stats", Stats)
    }

    /// Ends VMs and forgets them, those that are there. Their processes are gone when this returns. It tells whose they were,
    /// and which names no VM had.
    pub fn remove(&self, names: impl IntoIterator<Item = impl Into<String>>) -> Result<Removed, Error> {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        names.iter().try_for_each(|name| check_vm_name("rm", name))?;
        answer!(self.call(&Request::Remove { names, all: false }), "rm", Removed)
    }

    /// Ends all VMs and forgets them.
    pub fn remove_all(&self) -> Result<Removed, Error> {
        answer!(self.call(&Request::Remove { names: Vec::new(), all: true }), "rm", Removed)
    }

    /// Takes that much out of memory, of all VMs: to swap, cold pages first. It may be less.
    pub fn reclaim_all(&self, size: ByteSize) -> Result<Reclaimed, Error> {
        answer!(self.call(&Request::Reclaim { name: None, size_bytes: size.0 }), "reclaim", Reclaimed)
    }

    /// The memory budget of the server.
    pub fn budget(&self) -> Result<BudgetReport, Error> {
        self.ask_budget(None)
    }

    /// Sets it, or does away with it. Returns it.
    pub fn set_budget(&self, budget: Option<ByteSize>) -> Result<BudgetReport, Error> {
        self.ask_budget(Some(budget.map_or(BudgetSetting::None, |size| BudgetSetting::Bytes(size.0))))
    }

    fn ask_budget(&self, set: Option<BudgetSetting>) -> Result<BudgetReport, Error> {
        answer!(self.call(&Request::Budget { set }), "budget", Budget)
    }

    /// Runs the invariants on the live server, which compares what it knows with what the kernel says.
    pub fn check(&self) -> Result<CheckReport, Error> {
        answer!(self.call(&Request::Check), "check", Checked)
    }

    /// Ends all VMs and the server. Its process has let go of the home when this returns, so that the next one can
    /// start.
    pub fn shutdown(self) -> Result<(), Error> {
        let mut connection = self.take()?;
        let reply = connection.call(&Request::Shutdown).map_err(self.lost_server())?;
        answer!(reply, "shutdown")?;
        self.state().idle.clear();
        let deadline = Instant::now() + SHUTDOWN_PATIENCE;
        connection.wait_closed(SHUTDOWN_PATIENCE);
        while self.home().server_pid()?.is_some() {
            if Instant::now() > deadline {
                let home = self.home().path().display();
                return Err(Failure::timed_out(format!("shutdown: the server of {home} does not end")).into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Shuts the server down again if this client started it and nobody has a VM in it: for a command that failed and
    /// wants to leave nothing behind.
    pub fn undo_start(self) -> Result<(), Error> {
        let ours = self.state().started.is_some();
        if ours && self.list()?.is_empty() { self.shutdown() } else { Ok(()) }
    }

    /// Asks on a connection of its own.
    fn call(&self, request: &Request) -> Result<Answer, Error> {
        let mut connection = self.take()?;
        let reply = connection.call(request).map_err(self.lost_server())?;
        self.state().idle.push(connection);
        Ok(reply?)
    }

    /// Asks for a stream, which takes the connection.
    fn call_stream(&self, operation: &'static str, request: &Request) -> Result<Stream, Error> {
        let mut connection = self.take()?;
        match connection.call(request).map_err(self.lost_server())? {
            Ok(Answer::Stream) => Ok(connection.into_stream()),
            Ok(_) => Err(Error::Protocol(operation)),
            Err(failure) => {
                self.state().idle.push(connection);
                Err(failure.into())
            }
        }
    }

    /// Asks for a connection to a guest.
    fn call_for_socket(&self, request: &Request) -> Result<(UnixStream, Connected), Error> {
        let mut connection = self.take()?;
        let (reply, socket) = connection.call_for_socket(request).map_err(self.lost_server())?;
        self.state().idle.push(connection);
        match (reply?, socket) {
            (Answer::Connected(connected), Some(socket)) => Ok((socket, connected)),
            _ => Err(Error::Protocol("connect")),
        }
    }

    fn take(&self) -> Result<Connection, Error> {
        let idle = self.state().idle.pop();
        idle.map_or_else(|| self.open(), Ok)
    }

    fn open(&self) -> Result<Connection, Error> {
        let (connection, starter) = self.0.launcher.connect()?;
        let greeting = connection.greeting();
        if greeting.protocol != PROTOCOL {
            let (home, version) = (self.home().path().to_owned(), greeting.version.clone());
            return Err(Error::OtherVersion { home, version, protocol: greeting.protocol, pid: greeting.pid });
        }
        let mut state = self.state();
        state.lost.extend(greeting.lost.iter().cloned());
        if starter == Starter::ThisClient {
            state.started = Some(greeting.pid);
        }
        Ok(connection)
    }

    /// The server went away in the middle of a call: its other connections are dead as well.
    fn lost_server(&self) -> impl FnOnce(std::io::Error) -> Error + '_ {
        |e| {
            self.state().idle.clear();
            Error::io(format!("ask server of {}", self.home().path().display()))(e)
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds it can leave it half changed.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses, before any server is asked, what cannot be a VM's name.
fn check_vm_name(operation: &str, name: &str) -> Result<(), Error> {
    let checked = check_name(name);
    checked.map_err(|e| Failure::bad_request(format!("{operation} {name:?}: {e}")).about(name).into())
}

#[cfg(test)]
mod tests;
