//! Guests on their way to a size that a client waits for.

use crate::server::ids::{ClientId, Generation};
use crate::wire::Line;
use firmware::abi::FIRST_FREE_PAGE;
use guest_mem::PageCount;
use std::collections::VecDeque;

/// How a guest is had to give and take pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The built-in guest is told which, line by line.
    Lines { ram: PageCount },
    /// A Linux guest's driver is told how many.
    Driver,
}

/// A guest on its way.
#[derive(Debug)]
pub struct BalloonOp {
    client: ClientId,
    vm: Generation,
    /// Pages that are to be in the balloon.
    target: u64,
    way: Way,
    /// What the built-in guest has still to be told.
    lines: VecDeque<String>,
    /// The line that it has not answered.
    tag: Option<u64>,
}

impl BalloonOp {
    /// To so many pages in the balloon.
    pub fn new(client: ClientId, vm: Generation, target: u64, way: Way) -> Self {
        let lines = match way {
            Way::Lines { ram } => lines(ram, target),
            Way::Driver => VecDeque::new(),
        };
        Self { client, vm, target, way, lines, tag: None }
    }
}

/// Whatever is in the balloon now: in the end it is the highest pages.
fn lines(ram: PageCount, target: u64) -> VecDeque<String> {
    let first = ram.0 - target;
    let below = first - FIRST_FREE_PAGE;
    [format!("deflate {FIRST_FREE_PAGE} {below}"), format!("inflate {first} {target}")].into()
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BalloonNext {
    /// Nothing: it is on its way, or nobody waits for it.
    Nothing,
    /// The guest is told this line,
    Say(Line),
    /// or to have so many pages in its balloon;
    Target(u64),
    /// or that, and it has them already, which this client is told.
    TargetIsThere(u64, ClientId),
    /// It is there, which this client is told.
    Done(ClientId),
    /// It says something else than `ok`.
    Refused(ClientId, String),
}

/// All of them: one for a VM.
#[derive(Debug, Default)]
pub struct Balloons(Vec<BalloonOp>);

impl Balloons {
    /// Whether a VM is on its way to a size that somebody waits for.
    pub fn is_under_way(&self, vm: Generation) -> bool {
        self.0.iter().any(|op| op.vm == vm)
    }

    /// One more, of a VM that has none, and that has `actual` pages in its balloon. A line, if there is one, has this tag.
    pub fn begin(&mut self, op: BalloonOp, actual: u64, tag: u64) -> BalloonNext {
        let (vm, client, target, way) = (op.vm, op.client, op.target, op.way);
        self.0.push(op);
        match way {
            Way::Lines { .. } => self.say(vm, tag),
            Way::Driver if actual != target => BalloonNext::Target(target),
            Way::Driver => {
                self.late(vm, client);
                BalloonNext::TargetIsThere(target, client)
            }
        }
    }

    fn say(&mut self, vm: Generation, tag: u64) -> BalloonNext {
        let Some(at) = self.0.iter().position(|op| op.vm == vm) else { return BalloonNext::Nothing };
        match self.0[at].lines.pop_front() {
            Some(text) => {
                self.0[at].tag = Some(tag);
                BalloonNext::Say(Line { tag, text })
            }
            None => BalloonNext::Done(self.0.remove(at).client),
        }
    }

    /// Whether a line of this tag is one of these.
    pub fn has_said(&self, vm: Generation, tag: u64) -> bool {
        self.0.iter().any(|op| op.vm == vm && op.tag == Some(tag))
    }

    /// The guest has answered it. The next line has this tag.
    pub fn answered(&mut self, vm: Generation, text: &str, tag: u64) -> BalloonNext {
        if text.split(' ').next() == Some("ok") {
            return self.say(vm, tag);
        }
        match self.0.iter().position(|op| op.vm == vm) {
            Some(at) => BalloonNext::Refused(self.0.remove(at).client, text.to_owned()),
            None => BalloonNext::Nothing,
        }
    }

    /// A guest's balloon has so many pages now.
    pub fn resized(&mut self, vm: Generation, pages: u64) -> BalloonNext {
        let there = |op: &BalloonOp| op.vm == vm && op.way == Way::Driver && op.target == pages;
        match self.0.iter().position(there) {
            Some(at) => BalloonNext::Done(self.0.remove(at).client),
            None => BalloonNext::Nothing,
        }
    }

    /// This client waits no longer. Whether it has.
    pub fn late(&mut self, vm: Generation, client: ClientId) -> bool {
        let before = self.0.len();
        self.0.retain(|op| (op.vm, op.client) != (vm, client));
        self.0.len() < before
    }

    /// A VM has ended: who has waited for nothing.
    pub fn ended(&mut self, vm: Generation) -> Vec<ClientId> {
        self.0.extract_if(.., |op| op.vm == vm).map(|op| op.client).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: Generation = Generation(1);
    const OTHER: Generation = Generation(2);
    const CLIENT: ClientId = ClientId(7);
    const RAM: PageCount = PageCount(16384);

    fn line(tag: u64, text: String) -> BalloonNext {
        BalloonNext::Say(Line { tag, text })
    }

    fn told(target: u64) -> (Balloons, BalloonNext) {
        let mut balloons = Balloons::default();
        let next = balloons.begin(BalloonOp::new(CLIENT, VM, target, Way::Lines { ram: RAM }), 0, 10);
        (balloons, next)
    }

    #[test]
    fn the_built_in_guest_is_told_line_by_line() {
        let (mut balloons, next) = told(4096);
        assert_eq!(next, line(10, format!("deflate {FIRST_FREE_PAGE} {}", 12288 - FIRST_FREE_PAGE)));
        assert!(balloons.has_said(VM, 10) && !balloons.has_said(VM, 11) && !balloons.has_said(OTHER, 10));
        assert_eq!(
            balloons.resized(VM, 4096),
            BalloonNext::Nothing,
            "what its process says of its size counts for nothing"
        );
        assert_eq!(balloons.answered(VM, "ok 0", 11), line(11, "inflate 12288 4096".into()));
        assert!(balloons.has_said(VM, 11) && !balloons.has_said(VM, 10), "it answers each once");
        assert_eq!(balloons.answered(VM, "ok", 12), BalloonNext::Done(CLIENT));
        assert!(!balloons.is_under_way(VM));
        assert_eq!(balloons.answered(VM, "ok", 13), BalloonNext::Nothing);
    }

    #[test]
    fn what_the_guest_refuses_is_over() {
        let (mut balloons, _) = told(4096);
        let said = "error: no such page";
        assert_eq!(balloons.answered(VM, said, 11), BalloonNext::Refused(CLIENT, said.into()));
        assert!(!balloons.is_under_way(VM));
        let (mut balloons, _) = told(4096);
        assert!(matches!(balloons.answered(VM, "okay", 11), BalloonNext::Refused(..)), "only ok is ok");
    }

    #[test]
    fn a_driver_gets_there_in_its_own_time() {
        let mut balloons = Balloons::default();
        let op = || BalloonOp::new(CLIENT, VM, 4096, Way::Driver);
        assert_eq!(balloons.begin(op(), 100, 1), BalloonNext::Target(4096));
        assert!(!balloons.has_said(VM, 1) && !balloons.has_said(VM, 0), "a line of that tag is somebody else's");
        assert_eq!(balloons.resized(VM, 2000), BalloonNext::Nothing);
        assert_eq!(balloons.resized(OTHER, 4096), BalloonNext::Nothing);
        assert_eq!(balloons.resized(VM, 4096), BalloonNext::Done(CLIENT));
        assert_eq!(balloons.resized(VM, 4096), BalloonNext::Nothing);
        assert_eq!(balloons.begin(op(), 4096, 2), BalloonNext::TargetIsThere(4096, CLIENT));
        assert!(!balloons.is_under_way(VM));
    }

    #[test]
    fn whoever_waits_no_longer_or_whose_vm_has_ended_is_forgotten() {
        let mut balloons = Balloons::default();
        balloons.begin(BalloonOp::new(CLIENT, VM, 4096, Way::Driver), 0, 1);
        balloons.begin(BalloonOp::new(ClientId(8), OTHER, 4096, Way::Driver), 0, 2);
        assert!(!balloons.late(OTHER, CLIENT));
        assert!(balloons.late(VM, CLIENT) && !balloons.late(VM, CLIENT));
        assert_eq!(balloons.resized(VM, 4096), BalloonNext::Nothing);
        assert_eq!((balloons.ended(OTHER), balloons.ended(OTHER)), (vec![ClientId(8)], vec![]));
    }
}
