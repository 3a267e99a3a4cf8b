//! The zygote as the server sees it: it makes VM processes, which are children of the server.

use crate::link::Link;
use crate::wire::{Isolation, Made, Strictness, ToZygote};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, mkdtemp};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::{env, fs, io};

/// How long a zygote may take for a VM process, in milliseconds. Without trouble it takes a fraction of one.
const PATIENCE: u16 = 5000;

/// The zygote, or where it would be: one that has died is missed when it is needed.
#[derive(Debug)]
pub struct Zygote {
    jail: Jail,
    running: Option<Running>,
}

/// Where VM processes are made.
#[derive(Clone, Debug)]
pub struct Jail {
    /// How they are kept apart.
    pub isolation: Isolation,
    /// What becomes of them where they cannot be.
    pub strictness: Strictness,
    /// An empty directory, which is made where it is not there.
    pub on: PathBuf,
}

impl Zygote {
    /// Starts it, so that it is there when it is needed.
    pub fn start(jail: Jail) -> Self {
        let running = Running::start(&jail).inspect_err(|error| log::warn!("{error}"));
        Self { jail, running: running.ok() }
    }

    /// A new VM process with this socket.
    ///
    /// # Errors
    /// No process.
    pub fn make(&mut self, socket: OwnedFd) -> io::Result<Pid> {
        if let Some(running) = &mut self.running {
            match running.make(&socket) {
                Ok(made) => return made,
                Err(error) => log::warn!("zygote {}: {error}; a new one takes its place", running.pid),
            }
            self.end();
        }
        self.running.insert(Running::start(&self.jail)?).make(&socket)?
    }

    /// Its process, if there is one.
    pub fn pid(&self) -> Option<Pid> {
        self.running.as_ref().map(|running| running.pid)
    }

    /// Whether it is this process.
    pub fn is(&self, pid: Pid) -> bool {
        self.pid() == Some(pid)
    }

    /// A child of the server has been reaped; its id may soon be somebody else's.
    pub fn reaped(&mut self, pid: Pid) {
        if self.running.take_if(|running| running.pid == pid).is_some() {
            log::warn!("zygote {pid} has ended");
        }
    }

    /// Ends it. It is gone when this returns.
    pub fn end(&mut self) {
        if let Some(Running { pid, .. }) = self.running.take() {
            // It is there, be it as a zombie: nobody has reaped it.
            let ended = kill(pid, Signal::SIGKILL).and_then(|()| waitpid(pid, None));
            if let Err(error) = ended {
                log::error!("end zygote {pid}: {error}");
            }
        }
    }
}

/// Makes a VM process as a server here would, and ends it.
///
/// # Errors
/// Why it is not kept apart.
pub fn try_jail() -> Result<(), String> {
    let on = mkdtemp(&env::temp_dir().join("offshoot-jail-XXXXXX")).map_err(|error| format!("a directory: {error}"))?;
    let jail = Jail { isolation: crate::host::isolation(), strictness: Strictness::Strict, on: on.clone() };
    let tried = || -> io::Result<()> {
        let mut zygote = Zygote { jail, running: None };
        // It ends with its socket.
        let (_, theirs) = Link::pair()?;
        let made = zygote.make(theirs);
        zygote.end();
        waitpid(made?, None)?;
        Ok(())
    };
    let tried = tried().map_err(|error| error.to_string());
    fs::remove_dir(&on).map_err(|error| format!("{}: {error}", on.display()))?;
    tried
}

#[derive(Debug)]
struct Running {
    pid: Pid,
    link: Link,
}

impl Running {
    fn start(jail: &Jail) -> io::Result<Self> {
        // Somebody may have tidied up.
        fs::create_dir_all(&jail.on)?;
        let (mut link, theirs) = Link::pair()?;
        let child = Command::new("/proc/self/exe")
            .arg("vm-process")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("start a zygote: {error}")))?;
        let &Jail { isolation, strictness, ref on } = jail;
        link.send(&ToZygote::Enter { isolation, strictness, on: on.clone() }, &[])?;
        Ok(Self { pid: Pid::from_raw(child.id() as i32), link })
    }

    /// Waits for the process: the zygote has nothing else to do, and until the server has its id, nobody may reap it. The
    /// outer error is the zygote's: it cannot be relied on.
    fn make(&mut self, socket: &OwnedFd) -> io::Result<io::Result<Pid>> {
        self.link.send(&ToZygote::Make, &[socket.as_fd()])?;
        poll(&mut [PollFd::new(self.link.as_fd(), PollFlags::POLLIN)], PATIENCE)?;
        match self.link.recv::<Made>()? {
            Some((Ok(pid), _)) => Ok(Ok(Pid::from_raw(pid))),
            Some((Err(why), _)) => Ok(Err(io::Error::other(why))),
            None => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}
