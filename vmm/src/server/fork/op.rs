//! A fork under way, as a value: what has come of it, and whether that is all.

use super::hint::Hint;
use crate::api::Child;
use crate::server::guest::idle::IdleBalloon;
use crate::server::ids::{ClientId, FamilyId, ForkId, Generation};
use guest_mem::StoreId;
use guest_mem::manager::Copied;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// For so long what is not urgent waits for a fork: the list of names, processes for the next one.
const HURRY: Duration = Duration::from_millis(50);

/// Who asked for a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A client.
    Client(ClientId),
    /// The guest itself.
    Guest,
}

/// How far a fork is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The parent has not been frozen for it.
    Waiting,
    /// The parent has, and the children begin. The freeze has more to tell.
    Begun,
    /// The freeze has told all.
    Told,
}

/// A child on its way.
#[derive(Debug)]
struct Progress {
    generation: Generation,
    name: String,
    ready_ns: Option<u64>,
    first_ns: Option<u64>,
    agent: Agent,
    runs: u64,
    /// Whether it runs and has shown a sign of life, or stands still as asked; or never will.
    there: There,
}

/// Whether a child is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum There {
    Awaited,
    Is,
}

/// What is known of a child's agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agent {
    /// It has not answered.
    Awaited,
    /// It will not: there is none, or the child has ended.
    None,
    /// It has heard of the fork.
    Acked { at_ns: u64 },
}

/// What a child has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many parts of its memory are mapped.
    Mapped { runs: u64 },
    /// Its vCPU is about to run, and its guest will give a sign of its own;
    Runs { at_ns: u64 },
    /// or it will not, and that is all there is.
    RunsSilently { at_ns: u64 },
    /// It stands still as asked.
    Stands,
    /// Its guest has shown its first sign of life.
    Alive { at_ns: u64 },
    /// Its agent has heard of the fork.
    Acked { at_ns: u64 },
    /// It has none.
    NoAgent,
    /// It never came to life.
    Failed,
}

/// A fork under way.
#[derive(Debug)]
pub struct ForkOp {
    pub asker: Asker,
    pub parent: Generation,
    asked_ns: u64,
    /// It is not in a hurry any more.
    rests_at: Instant,
    /// Whether its children are to stand still.
    pub paused: bool,
    /// Whether its answer waits for its pages.
    pub wait_settled: bool,
    /// Until when its answer waits for the agents of its children.
    pub agents_by: Option<Instant>,
    pub hint: Hint,
    /// What the guest was asked to have in its balloon when it was frozen: by its user, and besides.
    pub balloon: (u64, IdleBalloon),
    stage: Stage,
    /// The freeze's store, once it has taken something, and the family it is of.
    store: Option<(FamilyId, StoreId)>,
    pause_ns: Option<u64>,
    moved: u64,
    children: Vec<Progress>,
    failure: Option<String>,
}

impl ForkOp {
    /// A fork that was asked for at `asked_ns` of the monotonic clock, which is `now` or shortly before.
    pub fn new(asker: Asker, parent: Generation, asked_ns: u64, now: Instant) -> Self {
        Self {
            asker,
            parent,
            asked_ns,
            rests_at: now + HURRY,
            paused: false,
            wait_settled: false,
            agents_by: None,
            hint: Hint::Unasked,
            balloon: (0, IdleBalloon::default()),
            stage: Stage::Waiting,
            store: None,
            pause_ns: None,
            moved: 0,
            children: Vec::new(),
            failure: None,
        }
    }

    /// One more child is on its way.
    pub fn add_child(&mut self, generation: Generation, name: String) {
        let (ready_ns, first_ns, agent, runs, there) = (None, None, Agent::Awaited, 0, There::Awaited);
        self.children.push(Progress { generation, name, ready_ns, first_ns, agent, runs, there });
    }

    /// The parent has been frozen into this store, with so many pages, and the children begin.
    pub fn begin(&mut self, store: (FamilyId, StoreId), moved: u64) {
        (self.stage, self.store, self.moved) = (Stage::Begun, Some(store), moved);
    }

    /// The guest was kept from running for so long; not at all, if it stood before.
    pub fn note_pause(&mut self, pause_ns: Option<u64>) {
        self.pause_ns = pause_ns;
    }

    /// All is known that a freeze tells, or there was none to be done.
    pub fn told(&mut self) {
        self.stage = Stage::Told;
    }

    /// It comes to nothing. The first reason counts.
    pub fn fail(&mut self, why: impl Into<String>) {
        self.failure.get_or_insert_with(|| why.into());
    }

    /// A child has done something.
    pub fn child(&mut self, generation: Generation, step: Step) {
        let Some(child) = self.children.iter_mut().find(|child| child.generation == generation) else { return };
        match step {
            Step::Mapped { runs } => child.runs = runs,
            Step::Runs { at_ns } => child.ready_ns = Some(at_ns),
            Step::RunsSilently { at_ns } => (child.ready_ns, child.there) = (Some(at_ns), There::Is),
            Step::Alive { at_ns } => (child.first_ns, child.there) = (Some(at_ns), There::Is),
            Step::Stands => child.there = There::Is,
            Step::Acked { at_ns } => child.agent = Agent::Acked { at_ns },
            Step::NoAgent => child.agent = Agent::None,
            Step::Failed => (child.there, child.agent) = (There::Is, Agent::None),
        }
    }

    /// Its children.
    pub fn children(&self) -> impl Iterator<Item = Generation> {
        self.children.iter().map(|child| child.generation)
    }

    /// Why it comes to nothing.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// The store with its pages, if there are any.
    pub fn store(&self) -> Option<(FamilyId, StoreId)> {
        self.store
    }

    /// Whether nothing more is awaited of the freeze, nor of children; of one that fails, not of children.
    pub fn is_over(&self) -> bool {
        self.stage == Stage::Told && (self.failure.is_some() || self.all_there())
    }

    fn all_there(&self) -> bool {
        self.children.iter().all(|child| child.there == There::Is)
    }

    /// Whether its answer waits for an agent, which may still answer in time.
    pub fn awaits_agents(&self, now: Instant) -> bool {
        let awaited = |child: &Progress| child.agent == Agent::Awaited;
        self.agents_by.is_some_and(|by| now < by) && self.children.iter().any(awaited)
    }

    /// When it was asked for, in nanoseconds of the monotonic clock.
    pub fn asked_ns(&self) -> u64 {
        self.asked_ns
    }

    /// Whether children are about to begin, or the parent is about to go on.
    pub fn awaits_guests(&self) -> bool {
        let some_to_come = match self.stage {
            Stage::Waiting => false,
            Stage::Begun => true,
            Stage::Told => !self.all_there(),
        };
        self.failure.is_none() && some_to_come
    }

    /// The names of the children.
    pub fn names(&self) -> Vec<String> {
        self.children.iter().map(|child| child.name.clone()).collect()
    }

    /// What a client is told of the children, and of what was copied where it has waited for that.
    pub fn answer(&self, copied: Option<Copied>) -> Vec<Child> {
        let us = |ns: u64| ns.saturating_sub(self.asked_ns) / 1000;
        let child = |child: &Progress| Child {
            name: child.name.clone(),
            id: child.generation.0,
            pause_us: self.pause_ns.map(|ns| ns / 1000),
            ready_us: child.ready_ns.map(us),
            first_exit_us: child.first_ns.map(us),
            acked_us: match child.agent {
                Agent::Acked { at_ns } => Some(us(at_ns)),
                Agent::Awaited | Agent::None => None,
            },
            moved_pages: self.moved,
            copied_pages: copied.map(|copied| copied.pages),
            gap_pages: copied.map(|copied| copied.copy_ups),
            window_runs: child.runs,
            hinted_pages: match self.hint {
                Hint::Unasked => None,
                Hint::Wanted(_) => Some(0),
                Hint::Asked(count) | Hint::Over(count) => Some(count),
            },
        };
        self.children.iter().map(child).collect()
    }
}

/// The forks under way.
#[derive(Debug, Default)]
pub struct Forks(BTreeMap<ForkId, ForkOp>, u64);

impl Forks {
    /// A name that no other fork of this server has had.
    pub fn fresh_id(&mut self) -> ForkId {
        self.1 += 1;
        ForkId(self.1)
    }

    /// One more.
    pub fn insert(&mut self, id: ForkId, op: ForkOp) {
        self.0.insert(id, op);
    }

    /// It is over.
    pub fn remove(&mut self, id: ForkId) -> Option<ForkOp> {
        self.0.remove(&id)
    }

    /// A fork, if it is under way.
    pub fn get(&self, id: ForkId) -> Option<&ForkOp> {
        self.0.get(&id)
    }

    /// The same, to change it.
    pub fn get_mut(&mut self, id: ForkId) -> Option<&mut ForkOp> {
        self.0.get_mut(&id)
    }

    /// Those whose answers wait for something besides their children: pages, agents.
    pub fn that_wait(&self) -> impl Iterator<Item = (ForkId, &ForkOp)> {
        let waits = |op: &ForkOp| op.wait_settled || op.agents_by.is_some();
        self.0.iter().filter(move |(_, op)| waits(op)).map(|(&id, op)| (id, op))
    }

    /// The fork under way that a VM is a child of.
    pub fn of_child(&mut self, child: Generation) -> Option<&mut ForkOp> {
        self.0.values_mut().find(|op| op.children.iter().any(|progress| progress.generation == child))
    }

    /// When the next answer waits for agents no longer.
    pub fn next_look(&self, now: Instant) -> Option<Instant> {
        self.0.values().filter_map(|op| op.agents_by).filter(|by| *by > now).min()
    }

    /// Whether children are about to begin, or a parent is about to go on.
    pub fn await_guests(&self) -> bool {
        self.0.values().any(ForkOp::awaits_guests)
    }

    /// Whether a fork has just begun, and what is not urgent waits for it.
    pub fn hurry(&self, now: Instant) -> bool {
        self.0.values().any(|op| op.rests_at > now)
    }

    /// When that is over for the first of them.
    pub fn rest_at(&self, now: Instant) -> Option<Instant> {
        self.0.values().map(|op| op.rests_at).filter(|at| *at > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: Generation = Generation(1);
    const ONE: Generation = Generation(2);
    const TWO: Generation = Generation(3);

    fn fork(now: Instant) -> ForkOp {
        let mut op = ForkOp::new(Asker::Guest, PARENT, 1_000_000, now);
        op.add_child(ONE, "a-1".into());
        op.add_child(TWO, "a-2".into());
        op
    }

    #[test]
    fn it_is_over_when_the_freeze_is_and_all_children_are_there_in_any_order() {
        let steps: [fn(&mut ForkOp); 4] = [
            |op| op.begin((FamilyId(1), StoreId(1)), 7),
            |op| op.told(),
            |op| op.child(ONE, Step::Alive { at_ns: 4_000_000 }),
            |op| op.child(TWO, Step::Stands),
        ];
        // Whatever comes first, but for what a freeze tells, which has an order of its own.
        for order in [[0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 2, 1], [0, 2, 3, 1], [0, 1, 3, 2]] {
            let mut op = fork(Instant::now());
            for step in order {
                assert!(!op.is_over(), "{order:?}: before {step}");
                steps[step](&mut op);
            }
            assert!(op.is_over() && !op.awaits_guests(), "{order:?}");
        }
    }

    #[test]
    fn one_that_fails_waits_for_what_its_parent_has_to_tell_and_for_no_child() {
        let mut op = fork(Instant::now());
        op.begin((FamilyId(1), StoreId(1)), 7);
        op.child(ONE, Step::Failed);
        op.fail("the first reason");
        op.fail("another");
        assert!(!op.is_over());
        op.told();
        assert!(op.is_over());
        assert_eq!(op.failure(), Some("the first reason"));
    }

    #[test]
    fn children_are_told_of_as_they_came() {
        let mut op = fork(Instant::now());
        op.begin((FamilyId(1), StoreId(1)), 7);
        op.note_pause(Some(2_000_000));
        op.child(ONE, Step::Mapped { runs: 5 });
        op.child(ONE, Step::Runs { at_ns: 3_000_000 });
        op.child(ONE, Step::Alive { at_ns: 4_000_000 });
        op.child(TWO, Step::RunsSilently { at_ns: 3_500_000 });
        op.child(Generation(9), Step::Failed);
        let answer = op.answer(None);
        let figures: Vec<_> =
            answer.iter().map(|child| (child.ready_us, child.first_exit_us, child.window_runs)).collect();
        assert_eq!(figures, [(Some(2000), Some(3000), 5), (Some(2500), None, 0)]);
        assert!(answer.iter().all(|child| (child.pause_us, child.moved_pages) == (Some(2000), 7)));
        assert_eq!(op.names(), ["a-1", "a-2"]);
    }

    /// As long as a fork was stuck, nobody had processes prepared, and no name was put down.
    #[test]
    fn a_fork_is_in_a_hurry_for_a_moment_only() {
        let now = Instant::now();
        let mut forks = Forks::default();
        assert!(!forks.hurry(now));
        forks.insert(ForkId(1), fork(now));
        forks.insert(ForkId(2), fork(now + HURRY / 2));
        assert!(forks.hurry(now) && forks.hurry(now + HURRY));
        assert_eq!(forks.rest_at(now), Some(now + HURRY));
        assert_eq!(forks.rest_at(now + HURRY), Some(now + HURRY / 2 + HURRY));
        assert!(!forks.hurry(now + 2 * HURRY), "though both are under way");
        assert_eq!(forks.rest_at(now + 2 * HURRY), None);
    }
}
