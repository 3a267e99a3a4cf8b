//! The zygote as the server sees it: it makes VM processes, which are children of the server.

use crate::link::Link;
use crate::wire::{Made, Make};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

/// How long a zygote may take for a VM process, in milliseconds. Without trouble it takes a fraction of one.
const PATIENCE: u16 = 5000;

/// The zygote, or where it would be: one that has died is missed when it is needed.
#[derive(Debug, Default)]
pub struct Zygote(Option<Running>);

impl Zygote {
    /// Starts it, so that it is there when it is needed.
    pub fn start() -> Self {
        let running = Running::start().inspect_err(|error| log::warn!("start a zygote: {error}"));
        Self(running.ok())
    }

    /// A new VM process with this socket.
    ///
    /// # Errors
    /// No process.
    pub fn make(&mut self, socket: OwnedFd) -> io::Result<Pid> {
        if let Some(running) = &mut self.0 {
            match running.make(&socket) {
                Ok(made) => return made,
                Err(error) => log::warn!("zygote {}: {error}; a new one takes its place", running.pid),
            }
            self.end();
        }
        self.0.insert(Running::start()?).make(&socket)?
    }

    /// Whether it is this process.
    pub fn is(&self, pid: Pid) -> bool {
        self.0.as_ref().is_some_and(|running| running.pid == pid)
    }

    /// A child of the server has been reaped; its id may soon be somebody else's.
    pub fn reaped(&mut self, pid: Pid) {
        if self.0.take_if(|running| running.pid == pid).is_some() {
            log::warn!("zygote {pid} has ended");
        }
    }

    /// Ends it. It is gone when this returns.
    pub fn end(&mut self) {
        if let Some(Running { pid, .. }) = self.0.take() {
            // It is there, be it as a zombie: nobody has reaped it.
            let ended = kill(pid, Signal::SIGKILL).and_then(|()| waitpid(pid, None));
            if let Err(error) = ended {
                log::error!("end zygote {pid}: {error}");
            }
        }
    }
}

#[derive(Debug)]
struct Running {
    pid: Pid,
    link: Link,
}

impl Running {
    fn start() -> io::Result<Self> {
        let (link, theirs) = Link::pair()?;
        let child = Command::new("/proc/self/exe")
            .arg("vm-process")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { pid: Pid::from_raw(child.id() as i32), link })
    }

    /// Waits for the process: the zygote has nothing else to do, and until the server has its id, nobody may reap it. The
    /// outer error is the zygote's: it cannot be relied on.
    fn make(&mut self, socket: &OwnedFd) -> io::Result<io::Result<Pid>> {
        self.link.send(&Make, &[socket.as_fd()])?;
        poll(&mut [PollFd::new(self.link.as_fd(), PollFlags::POLLIN)], PATIENCE)?;
        match self.link.recv::<Made>()? {
            Some((Ok(pid), _)) => Ok(Ok(Pid::from_raw(pid))),
            Some((Err(why), _)) => Ok(Err(io::Error::other(why))),
            None => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}
