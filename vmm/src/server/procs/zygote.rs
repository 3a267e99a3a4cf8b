//! The zygote as the server sees it: it makes VM processes, which are children of the server.
//!
//! Nobody waits for it. It is asked, and heard like anybody else; until it has told of a process, that process has no number.

use crate::link::Link;
use crate::server::ids::ProcessId;
use crate::server::watch::Token;
use crate::wire::{Isolation, Made, Strictness, ToZygote};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io};

/// The zygote, or where it would be, and what it has been asked for.
#[derive(Debug)]
pub struct Zygote {
    jail: Jail,
    running: Option<Running>,
    orders: Orders,
    /// Those that were to end, and have not been reaped.
    ending: Vec<Pid>,
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

/// VM processes that are to be made.
#[derive(Debug, Default)]
struct Orders {
    /// In the order in which they were asked for, which is that of the answers.
    asked: VecDeque<ProcessId>,
    /// Since when nothing has been heard of the first.
    since: Option<Instant>,
    /// Children that have been reaped meanwhile, and nobody knew: one that is told of next may be one of them.
    reaped: Vec<Pid>,
}

/// What became of a process that was to be made.
#[derive(Debug, PartialEq, Eq)]
pub enum Birth {
    /// It lives, be it as a zombie.
    Lives(Pid),
    /// It has lived: it has ended, and been reaped, already.
    Ended,
    /// It could not be made.
    Failed(String),
}

impl Orders {
    fn push(&mut self, process: ProcessId, now: Instant) {
        self.asked.push_back(process);
        self.since.get_or_insert(now);
    }

    /// The next answer has come. `None`: nothing was asked.
    fn answered(&mut self, made: Made, now: Instant) -> Option<(ProcessId, Birth)> {
        let process = self.asked.pop_front()?;
        let birth = match made.map(Pid::from_raw) {
            Ok(pid) if self.reaped.contains(&pid) => Birth::Ended,
            Ok(pid) => Birth::Lives(pid),
            Err(why) => Birth::Failed(why),
        };
        self.since = (!self.asked.is_empty()).then_some(now);
        if self.asked.is_empty() {
            self.reaped.clear();
        }
        Some((process, birth))
    }

    /// A child whom nobody knows has been reaped.
    fn reaped(&mut self, pid: Pid) {
        if !self.asked.is_empty() {
            self.reaped.push(pid);
        }
    }

    fn take(&mut self) -> VecDeque<ProcessId> {
        std::mem::take(self).asked
    }
}

impl Zygote {
    /// None yet, for this jail.
    pub fn new(jail: Jail) -> Self {
        Self { jail, running: None, orders: Orders::default(), ending: Vec::new() }
    }

    /// Starts it, if it does not run.
    ///
    /// # Errors
    /// No process, or no descriptors.
    pub fn start(&mut self, watch: impl FnOnce(&Link) -> Token) -> io::Result<()> {
        if self.running.is_none() {
            self.running = Some(Running::start(&self.jail, watch)?);
        }
        Ok(())
    }

    /// Asks it for a VM process with this socket.
    ///
    /// # Errors
    /// It does not run, or cannot be relied on any more.
    pub fn ask_for(&mut self, process: ProcessId, socket: &OwnedFd, now: Instant) -> io::Result<()> {
        let running = self.running.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        running.link.send(&ToZygote::Make, &[socket.as_fd()])?;
        self.orders.push(process, now);
        Ok(())
    }

    /// What it tells next.
    ///
    /// # Errors
    /// It cannot be relied on any more.
    pub fn hear(&mut self, now: Instant) -> io::Result<Option<(ProcessId, Birth)>> {
        let Some(running) = &mut self.running else { return Ok(None) };
        match running.link.recv::<Made>()? {
            None => Ok(None),
            Some((made, _)) => match self.orders.answered(made, now) {
                Some(born) => Ok(Some(born)),
                None => Err(io::Error::new(io::ErrorKind::InvalidData, "it tells of a process that nobody wants")),
            },
        }
    }

    /// What hears it, if it runs.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(|running| running.link.as_fd())
    }

    /// Sends what is queued. The watch on it, and whether there is more.
    pub fn flush(&mut self) -> Option<(Token, bool)> {
        let running = self.running.as_mut()?;
        Some((running.token, running.link.flush().unwrap_or(false)))
    }

    /// When its next answer is late, if it owes one.
    pub fn late_at(&self, within: Duration) -> Option<Instant> {
        self.orders.since.map(|since| since + within)
    }

    /// Whether it is this process.
    pub fn is(&self, pid: Pid) -> bool {
        self.pid() == Some(pid) || self.ending.contains(&pid)
    }

    /// It, if it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.running.as_ref().map(|running| running.pid)
    }

    /// A child of the server has been reaped; its id may soon be somebody else's. Whether it was the zygote.
    pub fn reaped(&mut self, pid: Pid) -> bool {
        self.ending.retain(|ending| *ending != pid);
        self.pid() == Some(pid)
    }

    /// A child of the server has been reaped, and nobody knows whose it was.
    pub fn reaped_unknown(&mut self, pid: Pid) {
        self.orders.reaped(pid);
    }

    /// Ends it, if it is there. What it has not made is not made; its socket is to be watched no more.
    pub fn end(&mut self, there: Still) -> (VecDeque<ProcessId>, Option<Running>) {
        let running = self.running.take();
        if let (Some(Running { pid, .. }), Still::There) = (&running, there) {
            match kill(*pid, Signal::SIGKILL) {
                Ok(()) => self.ending.push(*pid),
                Err(error) => log::error!("end zygote {pid}: {error}"),
            }
        }
        (self.orders.take(), running)
    }
}

/// Whether a zygote has been reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Still {
    /// It has not.
    There,
    /// It has.
    Reaped,
}

/// A zygote that runs.
#[derive(Debug)]
pub struct Running {
    pid: Pid,
    link: Link,
    /// The watch on its socket.
    token: Token,
}

impl Running {
    /// Its process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The watch on its socket.
    pub fn token(&self) -> Token {
        self.token
    }

    fn start(jail: &Jail, watch: impl FnOnce(&Link) -> Token) -> io::Result<Self> {
        // Somebody may have tidied up.
        fs::create_dir_all(&jail.on)?;
        let (mut link, theirs) = Link::pair()?;
        let child = Command::new("/proc/self/exe")
            .arg("vm-process")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            // A terminal's keys are for the server, which ends its VMs in order.
            .process_group(0)
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("start a zygote: {error}")))?;
        let &Jail { isolation, strictness, ref on } = jail;
        link.send(&ToZygote::Enter { isolation, strictness, on: on.clone() }, &[])?;
        let token = watch(&link);
        Ok(Self { pid: Pid::from_raw(child.id() as i32), link, token })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_the_order_of_the_questions() {
        let (start, mut orders) = (Instant::now(), Orders::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(orders.answered(Ok(7), start), None, "nobody asked");
        [1, 2, 3].into_iter().for_each(|id| orders.push(ProcessId(id), at(id)));
        assert_eq!(orders.since, Some(at(1)));
        assert_eq!(orders.answered(Ok(7), at(4)), Some((ProcessId(1), Birth::Lives(Pid::from_raw(7)))));
        assert_eq!(orders.since, Some(at(4)), "it has had no time for the others");
        assert_eq!(orders.answered(Err("none".into()), at(5)), Some((ProcessId(2), Birth::Failed("none".into()))));
        assert_eq!(orders.take(), [ProcessId(3)]);
        assert_eq!(orders.since, None);
    }

    /// A process that has ended and been reaped before the zygote told of it: its number may be anybody's.
    #[test]
    fn who_was_reaped_before_we_heard_of_it_has_ended() {
        let (now, mut orders) = (Instant::now(), Orders::default());
        orders.reaped(Pid::from_raw(7));
        orders.push(ProcessId(1), now);
        orders.push(ProcessId(2), now);
        orders.reaped(Pid::from_raw(8));
        assert_eq!(orders.answered(Ok(7), now), Some((ProcessId(1), Birth::Lives(Pid::from_raw(7)))), "another 7");
        assert_eq!(orders.answered(Ok(8), now), Some((ProcessId(2), Birth::Ended)));
        assert!(orders.reaped.is_empty());
    }
}
