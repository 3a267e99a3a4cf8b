//! Offshoot, as its users have it: a server in a home of its own, asked through the client library.

use super::janitor::{self, Janitor};
use super::{Result, fail, processes};
use crate::stats::timed;
use nix::unistd::mkdtemp;
use std::cell::RefCell;
use std::env;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};
use vmm::client::{Client, ForkOptions, LaunchOptions, Vm};
use vmm::units::ByteSize;

/// How long a guest may take for a command.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Prepared processes that a pool has at least.
const POOL: usize = 2;
/// Where guest page numbers begin that are for use.
pub const FIRST_PAGE: u64 = 64;

/// A home, its server, and nothing left of them when this is dropped.
#[derive(Debug)]
pub struct Home {
    directory: PathBuf,
    client: Client,
    server: i32,
    served: Child,
    janitor: Rc<RefCell<Janitor>>,
}

/// How long the parts of a fork took, in µs.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// The parent stood still for so long: the server's clock (`pause_us`).
    pub pause: f64,
    /// Request received to the child's vCPU in `KVM_RUN`: the server's clock (`ready_us`).
    pub ready: f64,
    /// Request received to the child's first exit: the server's clock (`first_exit_us`).
    pub first: f64,
    /// Request sent to answer received: the client's clock.
    pub answered: f64,
}

impl Home {
    /// A server with these options, and `--low-latency`: what is measured is not how soon the host wakes a processor.
    pub fn new(janitor: &Rc<RefCell<Janitor>>, options: &[&str]) -> Result<Self> {
        let directory = mkdtemp(&env::temp_dir().join("offshoot-bench-XXXXXX"))?;
        janitor.borrow_mut().tell("open", &directory);
        let path = directory.join("home");
        let served = serve(&path, options)?;
        let builder = Client::builder().home(&path).binary(binary()?).start_server(false);
        let client = wait("a server listens", || builder.clone().connect().ok())?;
        let server = client.home().server_pid()?.ok_or("the server is gone")?;
        Ok(Self { directory, client, server, served, janitor: Rc::clone(janitor) })
    }

    /// Its client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Its server's process.
    pub fn server(&self) -> i32 {
        self.server
    }

    /// Launches a guest of so many MiB.
    pub fn launch(&self, name: &str, mib: u64) -> Result<Vm> {
        Ok(self.client.launch(LaunchOptions::new().name(name).memory(ByteSize::mib(mib)))?)
    }

    /// Launches a guest that has written `pages` pages and was forked once since: all of it has settled, and the dirty
    /// log is on, as in a family's everyday life.
    pub fn launch_settled(&self, name: &str, mib: u64, pages: u64) -> Result<Vm> {
        let vm = self.launch(name, mib)?;
        if pages > 0 {
            vm.send(&format!("fill {FIRST_PAGE} {pages} 1"), PATIENCE)?;
        }
        fork_settled(&vm)?.0.remove()?;
        // What the answer to that has written goes with the next.
        fork_settled(&vm)?.0.remove()?;
        Ok(vm)
    }

    /// Waits until the pool of the only shape is as full as it gets with `vms` VMs, and whoever filled it is done.
    pub fn rest(&self, vms: usize) -> Result<()> {
        // Every VM process has a keeper beside it.
        let wanted = 2 * (vms + POOL);
        wait("the pool is full", || (processes::vms_of(self.server).len() >= wanted).then_some(()))?;
        thread::sleep(Duration::from_millis(5));
        Ok(())
    }

    /// All processes of the server, itself included.
    pub fn processes(&self) -> Vec<i32> {
        let mut all = processes::children_of(self.server);
        all.push(self.server);
        all
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        janitor::clean(&self.directory);
        let _ = self.served.wait();
        self.janitor.borrow_mut().tell("gone", &self.directory);
    }
}

/// Forks once, takes the times.
pub fn fork(vm: &Vm) -> Result<(Vm, Times)> {
    fork_with(vm, ForkOptions::new())
}

/// The same, and returns when all has settled: only then the answer comes.
pub fn fork_settled(vm: &Vm) -> Result<(Vm, Times)> {
    fork_with(vm, ForkOptions::new().wait_settled(true))
}

fn fork_with(vm: &Vm, options: ForkOptions) -> Result<(Vm, Times)> {
    let (forked, answered) = timed(|| vm.fork(options));
    let child = forked?.remove(0);
    let known = |us: Option<u64>| us.map(|us| us as f64).ok_or("a fork without times");
    let figures = &child.figures;
    let times = Times {
        pause: known(figures.pause_us)?,
        ready: known(figures.ready_us)?,
        first: known(figures.first_exit_us)?,
        answered,
    };
    Ok((child.vm, times))
}

/// Has a guest do something: µs from the client's request to the answer it has.
pub fn say(vm: &Vm, line: &str) -> Result<f64> {
    let (said, us) = timed(|| vm.send(line, PATIENCE));
    said.map_err(|e| format!("{}: {line}: {e}", vm.name()))?;
    Ok(us)
}

/// Looks every millisecond until there is something.
pub fn wait<T>(what: &str, mut there: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = there() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return fail(format!("not within 30 s: {what}"));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// The `offshoot` binary: `OFFSHOOT_BIN`, else the one beside this program.
fn binary() -> Result<PathBuf> {
    let named = env::var_os("OFFSHOOT_BIN").filter(|path| !path.is_empty()).map(PathBuf::from);
    let binary = named.map_or_else(|| Ok(env::current_exe()?.with_file_name("offshoot")), Ok::<_, crate::Error>)?;
    if binary.is_file() { Ok(binary) } else { fail(format!("{} is not there: run tests/bench", binary.display())) }
}

/// A server in the foreground. Its log is where that of one in the background would be.
fn serve(home: &Path, options: &[&str]) -> Result<Child> {
    DirBuilder::new().mode(0o700).create(home)?;
    let log = File::create(home.join("server.log"))?;
    let mut command = Command::new(binary()?);
    command.arg("--home").arg(home).args(["serve", "--low-latency"]).args(options);
    Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?)
}
