//! What takes the kernel long to tell is asked aside: by a thread, while the loop goes on.
//!
//! To go over the page tables of a process, or over the pages of a store, takes some 20 ms for each GiB, in one call that nobody
//! can cut in pieces. What is asked about is opened by the loop: whatever has its number when the thread gets there, this is
//! what it looks at.

use crate::nice;
use crate::procfs::{Mapping, Usage, UsageFiles};
use crate::server::ids::{Generation, ProcessId};
use guest_mem::sys::Pagemap;
use guest_mem::{GfnRange, PAGE_SHIFT, PageRange};
use rangemap::RangeSet;
use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Names a question; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// Whose memory something is about: a process's, or the server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    Server,
    Process(ProcessId),
}

/// What was found out.
#[derive(Debug)]
pub enum Finding {
    /// What processes use, those that are gone left out.
    Usage(Vec<(Holder, Usage)>),
    /// The live layers of VMs.
    Layers(Vec<(Generation, RangeSet<u64>)>),
    /// What a VM process maps, and the pages of its live layer.
    Window(io::Result<Vec<Mapping>>, u64),
    /// The pages that a store has.
    Extents(io::Result<Vec<PageRange>>),
}

type Answer = (Ticket, Finding);
type Question = Box<dyn FnOnce() -> Finding + Send>;

/// The thread, and what it has found out.
pub struct Aside {
    next: u64,
    niceness: i32,
    thread: Option<Sender<(Ticket, Question)>>,
    /// Rings when there is an answer.
    bell: EventFd,
    answers: (Sender<Answer>, Receiver<Answer>),
}

impl fmt::Debug for Aside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Aside({} questions)", self.next)
    }
}

impl Aside {
    /// Nothing is asked yet; whoever answers will have this niceness.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(niceness: i32) -> io::Result<Self> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { next: 0, niceness, thread: None, bell, answers: channel() })
    }

    /// Rings when there is an answer.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Has something found out. Questions are answered one after the other.
    pub fn ask(&mut self, question: impl FnOnce() -> Finding + Send + 'static) -> Ticket {
        self.next += 1;
        let ticket = Ticket(self.next);
        if self.thread.is_none() {
            self.thread = self.start().inspect_err(|error| log::error!("a thread to look aside: {error}")).ok();
        }
        let question: (Ticket, Question) = (ticket, Box::new(question));
        let unasked = match &self.thread {
            Some(thread) => thread.send(question).err().map(|unsent| unsent.0),
            None => Some(question),
        };
        if let Some((ticket, question)) = unasked {
            // Late is better than never.
            self.thread = None;
            let _ = self.answers.0.send((ticket, question())).map(|()| self.bell.write(1));
        }
        ticket
    }

    fn start(&self) -> io::Result<Sender<(Ticket, Question)>> {
        let (asked, questions) = channel::<(Ticket, Question)>();
        let (told, bell, niceness) = (self.answers.0.clone(), self.bell.try_clone()?, self.niceness);
        thread::Builder::new().name("aside".into()).spawn(move || {
            if let Err(error) = nice::set(niceness) {
                log::debug!("niceness of a thread that looks aside: {error}");
            }
            for (ticket, question) in questions {
                // The server is there, or nobody is interested.
                let _ = told.send((ticket, question())).map(|()| bell.write(1));
            }
        })?;
        Ok(asked)
    }

    /// What has been found out since it was last asked.
    pub fn answers(&mut self) -> Vec<(Ticket, Finding)> {
        let _ = self.bell.read();
        self.answers.1.try_iter().collect()
    }
}

/// Where a VM's live layer can be read.
#[derive(Debug)]
pub struct LiveLayer {
    pub pagemap: Pagemap,
    /// Host address of guest frame 0.
    pub base: u64,
    pub ram: Vec<GfnRange>,
}

impl LiveLayer {
    /// The private pages of the window, as they are now.
    pub fn read(self) -> RangeSet<u64> {
        let Self { pagemap, base, ram } = self;
        let mut live = RangeSet::new();
        for ram in ram {
            let bytes = base + ram.start().gpa()..base + ram.end().gpa();
            let scanned = pagemap.private(bytes, |found| {
                live.insert((found.start - base) >> PAGE_SHIFT..(found.end - base) >> PAGE_SHIFT);
            });
            if let Err(error) = scanned {
                log::debug!("a pagemap: {error}");
            }
        }
        live
    }
}

/// What these have to say.
pub fn usage(of: Vec<(Holder, UsageFiles)>) -> Finding {
    Finding::Usage(of.into_iter().filter_map(|(holder, files)| Some((holder, files.read().ok()?))).collect())
}

/// What these are; empty where there is none.
pub fn layers(of: Vec<(Generation, Option<LiveLayer>)>) -> Finding {
    Finding::Layers(of.into_iter().map(|(vm, layer)| (vm, layer.map(LiveLayer::read).unwrap_or_default())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// The loop waited for each answer.
    #[test]
    fn who_asks_goes_on_and_is_told_in_turn() {
        let mut aside = Aside::new(nice::get()).unwrap();
        let (go, may_go) = channel::<()>();
        let asked = Instant::now();
        let first = aside.ask(move || {
            let _ = may_go.recv();
            Finding::Usage(Vec::new())
        });
        let second = aside.ask(|| Finding::Layers(Vec::new()));
        assert!(aside.answers().is_empty());
        go.send(()).unwrap();
        let mut answers = Vec::new();
        while answers.len() < 2 {
            assert!(asked.elapsed() < Duration::from_secs(60));
            answers.extend(aside.answers());
        }
        assert!(matches!(answers[..], [(a, Finding::Usage(_)), (b, Finding::Layers(_))] if (a, b) == (first, second)));
    }
}
