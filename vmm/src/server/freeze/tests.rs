//! All that can happen to two freezes of a VM, in any order, with an end or a silence at any point.

use super::op::{Broken, FreezeAction, FreezeEvent, FreezeOp, Rest};
use super::queue::{FreezeQueue, Last, Purpose, Step};
use crate::server::ids::ForkId;
use guest_mem::StoreId;
use std::collections::BTreeMap;

const EVENTS: [FreezeEvent; 11] = [
    FreezeEvent::Standing,
    FreezeEvent::Frozen(Rest::Nothing),
    FreezeEvent::Frozen(Rest::Running),
    FreezeEvent::Frozen(Rest::Copies),
    FreezeEvent::Frozen(Rest::CopiesThenRunning),
    FreezeEvent::Saved,
    FreezeEvent::Copied,
    FreezeEvent::WentOn,
    FreezeEvent::Failed,
    FreezeEvent::Deadline,
    FreezeEvent::Died,
];

/// What an honest process says of a freeze that takes something.
fn honest(rest: Rest) -> Vec<FreezeEvent> {
    let mut said = vec![FreezeEvent::Standing, FreezeEvent::Frozen(rest), FreezeEvent::Saved];
    if matches!(rest, Rest::Copies | Rest::CopiesThenRunning) {
        said.push(FreezeEvent::Copied);
    }
    if matches!(rest, Rest::Running | Rest::CopiesThenRunning) {
        said.push(FreezeEvent::WentOn);
    }
    said
}

const RESTS: [Rest; 4] = [Rest::Nothing, Rest::Running, Rest::Copies, Rest::CopiesThenRunning];

#[test]
fn an_honest_process_is_never_ended_and_every_word_counts_once() {
    for rest in RESTS {
        let mut op = FreezeOp::Asked;
        let mut done = Vec::new();
        for event in honest(rest) {
            let action;
            assert_ne!(op, FreezeOp::Over, "{rest:?}: over before {event:?}");
            (op, action) = op.on(event);
            assert!(!matches!(action, FreezeAction::End(_) | FreezeAction::Nothing), "{rest:?}: {event:?}: {action:?}");
            assert!(!done.contains(&action));
            done.push(action);
        }
        assert_eq!(op, FreezeOp::Over, "{rest:?}");
    }
}

#[test]
fn what_failed_before_it_took_anything_is_undone_and_afterwards_it_is_a_broken_promise() {
    for before in [&[][..], &[FreezeEvent::Standing]] {
        let op = before.iter().fold(FreezeOp::Asked, |op, event| op.on(*event).0);
        assert_eq!(op.on(FreezeEvent::Failed), (FreezeOp::Over, FreezeAction::Abort));
    }
    for rest in RESTS {
        let said = honest(rest);
        for after in 2..said.len() {
            let op = said[..after].iter().fold(FreezeOp::Asked, |op, event| op.on(*event).0);
            assert_eq!(op.on(FreezeEvent::Failed), (op, FreezeAction::End(Broken::Promise)), "{rest:?}, {after}");
        }
    }
}

/// A parent that ended between the two left its fork waiting for ever.
#[test]
fn who_waits_for_a_state_that_never_comes_is_told() {
    for rest in RESTS {
        assert_eq!(FreezeOp::Taken(rest).on(FreezeEvent::Died), (FreezeOp::Over, FreezeAction::Lose));
        assert_eq!(FreezeOp::Saved(rest).on(FreezeEvent::Died), (FreezeOp::Over, FreezeAction::Nothing));
    }
}

/// What a server has done for somebody who wanted a freeze.
#[derive(Clone, Debug, Default)]
struct Served {
    actions: Vec<FreezeAction>,
    answered: u32,
}

/// A VM with two freezes, and what the server does for them.
struct Play {
    queue: FreezeQueue,
    served: BTreeMap<StoreId, Served>,
    wanted: u32,
    begun: u32,
    ended: bool,
}

const PURPOSES: [Purpose; 2] = [Purpose::Fork(ForkId(1)), Purpose::Swap];

impl Play {
    fn new() -> Self {
        let mut play =
            Self { queue: FreezeQueue::default(), served: BTreeMap::new(), wanted: 0, begun: 0, ended: false };
        for purpose in PURPOSES {
            play.queue.push(purpose);
            play.wanted += 1;
        }
        play.begin();
        play
    }

    /// As the server does: the next freeze begins when it is known what the last one took.
    fn begin(&mut self) {
        if !self.ended && self.queue.turn().is_some() {
            self.begun += 1;
            self.queue.begin(StoreId(self.begun));
            self.served.insert(StoreId(self.begun), Served::default());
            assert_eq!(self.queue.turn(), None, "one at a time");
        }
    }

    fn on(&mut self, store: Option<StoreId>, event: FreezeEvent) {
        if self.ended {
            return;
        }
        match self.queue.on(store, event) {
            // Something is said of a freeze that is not there.
            None => self.end(),
            Some(step) => self.carry_out(step),
        }
        self.begin();
    }

    fn carry_out(&mut self, step: Step) {
        let served = self.served.get_mut(&step.store).expect("a freeze that was begun");
        assert_eq!(served.answered, 0, "{step:?} of one that is over");
        if step.action != FreezeAction::Nothing && !matches!(step.action, FreezeAction::End(_)) {
            assert!(!served.actions.contains(&step.action), "{step:?} twice");
            served.actions.push(step.action);
        }
        served.answered += u32::from(step.last == Last::Yes);
        if matches!(step.action, FreezeAction::End(_)) {
            assert_eq!(step.last, Last::No, "its end is what ends it");
            self.end();
        }
    }

    fn end(&mut self) {
        self.ended = true;
        let (steps, waiting) = self.queue.died();
        steps.into_iter().for_each(|step| self.carry_out(step));
        self.wanted -= waiting.len() as u32;
        assert!(self.queue.is_idle() && self.queue.taking().is_none());
    }

    /// Nobody is told twice, nor of what was not done; and with the end of the VM nobody is left.
    fn check(mut self) {
        if !self.ended {
            self.end();
        }
        assert_eq!(self.begun, self.wanted);
        for served in self.served.values() {
            assert_eq!(served.answered, 1, "{served:?}");
            let has = |action| served.actions.contains(&action);
            assert!(!has(FreezeAction::Take) || has(FreezeAction::Stand), "{served:?}");
            assert!(!has(FreezeAction::HandOn) || has(FreezeAction::Take), "{served:?}");
            assert!(has(FreezeAction::Take) != has(FreezeAction::Abort), "it takes, or does not: {served:?}");
            assert!(!(has(FreezeAction::Lose) && has(FreezeAction::HandOn)), "{served:?}");
        }
    }
}

/// Whatever is said, of either freeze, up to six times: no panic, nothing twice, and everybody is told once.
#[test]
fn whatever_a_process_says_of_two_freezes_each_ends_once() {
    let words: Vec<(Option<StoreId>, FreezeEvent)> = EVENTS
        .into_iter()
        .flat_map(|event| match event {
            FreezeEvent::Standing | FreezeEvent::Failed | FreezeEvent::Died => vec![(None, event)],
            _ => vec![(Some(StoreId(1)), event), (Some(StoreId(2)), event)],
        })
        .collect();
    let mut told = 0_u64;
    let mut story = Vec::new();
    play_all(&words, &mut story, 6, &mut told);
    assert!(told > 3_000, "{told}");
}

/// Plays all stories that begin like this one; those that have ended are not told further.
fn play_all(
    words: &[(Option<StoreId>, FreezeEvent)],
    story: &mut Vec<(Option<StoreId>, FreezeEvent)>,
    more: usize,
    told: &mut u64,
) {
    let mut play = Play::new();
    for (store, event) in &*story {
        match event {
            FreezeEvent::Died => play.end(),
            _ => play.on(*store, *event),
        }
    }
    *told += 1;
    let ended = play.ended;
    play.check();
    if more == 0 || ended {
        return;
    }
    for word in words {
        story.push(*word);
        play_all(words, story, more - 1, told);
        story.pop();
    }
}

/// Two freezes in the order in which an honest process does them, cut off at each point by an end or a silence.
#[test]
fn an_end_or_a_silence_at_any_point_ends_both() {
    for (first, second) in RESTS.into_iter().flat_map(|first| RESTS.map(|second| (first, second))) {
        let of = |store, rest| honest(rest).into_iter().map(move |event| (Some(StoreId(store)), event));
        let story: Vec<_> = of(1, first).chain(of(2, second)).collect();
        for cut in 0..=story.len() {
            for last in [FreezeEvent::Died, FreezeEvent::Deadline] {
                let mut play = Play::new();
                for (store, event) in &story[..cut] {
                    play.on(*store, *event);
                    assert!(!play.ended, "{first:?}, {second:?}: {event:?} of {store:?} ends the VM");
                }
                match last {
                    FreezeEvent::Died => play.end(),
                    // Of whichever is under way.
                    _ => [1, 2].into_iter().for_each(|store| play.on(Some(StoreId(store)), last)),
                }
                play.check();
            }
        }
    }
}
