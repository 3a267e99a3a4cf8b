//! What the event loop watches, and for whom.
//!
//! Handlers have no hold of the loop: they note what is to change, and the loop applies it between rounds. A
//! descriptor that is to be watched no more is kept open until then, so that its number is not given to another.

use crate::server::ids::{ClientId, Generation, ProcessId, VisitorId};
use event_manager::{EventOps, EventSet, Events};
use std::collections::HashMap;
use std::fmt::Debug;
use std::os::fd::{AsRawFd, RawFd};

/// What an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Listener,
    Signals,
    Client(ClientId),
    /// A guest's socket.
    Door(Generation),
    Visitor(VisitorId),
    Process(ProcessId),
    Traps(ProcessId),
    Swap,
    Files,
    Aside,
    Zygote,
    Home,
}

/// Names a watch; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u32);

impl Token {
    /// Of something that is not watched.
    pub const NONE: Self = Self(u32::MAX);
}

#[derive(Debug)]
enum Change {
    Add(RawFd, Token, EventSet),
    Modify(RawFd, Token, EventSet),
    Remove(RawFd, #[expect(dead_code, reason = "held until the loop has let go of it")] Box<dyn Held>),
}

/// Something that keeps a descriptor open.
pub trait Held: Debug {}
impl<T: Debug> Held for T {}

/// All watches. `S` says what an event is for.
#[derive(Debug)]
pub struct Watches<S> {
    sources: HashMap<Token, (RawFd, EventSet, S)>,
    changes: Vec<Change>,
    next: u32,
}

impl<S: Clone> Watches<S> {
    /// Nothing is watched.
    pub fn new() -> Self {
        Self { sources: HashMap::new(), changes: Vec::new(), next: 0 }
    }

    /// Watches `fd`, which must stay open until it is removed.
    pub fn add(&mut self, fd: &impl AsRawFd, events: EventSet, source: S) -> Token {
        let token = Token(self.next);
        self.next += 1;
        self.sources.insert(token, (fd.as_raw_fd(), events, source));
        self.changes.push(Change::Add(fd.as_raw_fd(), token, events));
        token
    }

    /// Watches for other events, or for none.
    pub fn modify(&mut self, token: Token, mut events: EventSet) {
        // The kernel tells of a hang-up whatever it is asked for, and again and again if that is not the edge alone.
        if events.is_empty() {
            events = EventSet::EDGE_TRIGGERED;
        }
        if let Some((fd, watched, _)) = self.sources.get_mut(&token)
            && *watched != events
        {
            *watched = events;
            self.changes.push(Change::Modify(*fd, token, events));
        }
    }

    /// Watches no more; `holder`, which owns the descriptor, is dropped afterwards.
    pub fn remove(&mut self, token: Token, holder: impl Debug + 'static) {
        if let Some((fd, ..)) = self.sources.remove(&token) {
            self.changes.push(Change::Remove(fd, Box::new(holder)));
        }
    }

    /// Whom an event is for; none if it came too late.
    pub fn source(&self, events: &Events) -> Option<(Token, S)> {
        let token = Token(events.data());
        self.sources.get(&token).map(|(.., source)| (token, source.clone()))
    }

    /// What somebody is watched for.
    #[cfg(test)]
    pub fn events(&self, token: Token) -> Option<EventSet> {
        self.sources.get(&token).map(|(_, events, _)| *events)
    }

    /// Makes the loop watch as noted.
    pub fn apply(&mut self, ops: &mut EventOps) {
        for change in self.changes.drain(..) {
            let done = match &change {
                Change::Add(fd, token, events) => ops.add(Events::with_data_raw(*fd, token.0, *events)),
                Change::Modify(fd, token, events) => ops.modify(Events::with_data_raw(*fd, token.0, *events)),
                Change::Remove(fd, _) => ops.remove(Events::empty_raw(*fd)),
            };
            if let Err(error) = done {
                log::error!("event loop: {change:?}: {error:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
    use std::os::unix::net::UnixStream;

    /// Counts what it is told.
    struct Counter {
        watches: Watches<()>,
        told: usize,
    }

    impl MutEventSubscriber for Counter {
        fn init(&mut self, ops: &mut EventOps<'_>) {
            self.watches.apply(ops);
        }

        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
            self.told += 1;
        }
    }

    /// Who hung up while its request was carried out kept the server busy until the answer.
    #[test]
    fn who_hangs_up_and_is_not_listened_to_is_heard_of_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut watches = Watches::new();
        let token = watches.add(&ours, EventSet::IN, ());
        let mut events = EventManager::new().unwrap();
        let id = events.add_subscriber(Counter { watches, told: 0 });
        drop(theirs);
        events.run_with_timeout(0).unwrap();
        for _ in 0..5 {
            let counter = events.subscriber_mut(id).unwrap();
            counter.watches.modify(token, EventSet::empty());
            let mut watches = std::mem::replace(&mut counter.watches, Watches::new());
            watches.apply(&mut events.event_ops(id).unwrap());
            events.subscriber_mut(id).unwrap().watches = watches;
            events.run_with_timeout(0).unwrap();
        }
        assert_eq!(events.subscriber_mut(id).unwrap().told, 2, "once as asked, and once for the change");
    }
}
