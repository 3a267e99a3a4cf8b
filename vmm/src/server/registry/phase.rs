//! Where a VM is on its way, from the moment it is listed.
//!
//! ```text
//!   Launching ── first sign of life (Linux: it runs) ──► Live ──► Off, Rebooted, Dead
//!   Forking ──── its fork is over ───────────────────────►
//! ```

use crate::server::ids::{ClientId, ForkId};
use crate::wire::Machine;

/// Where a VM is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Launched by this client, and not at its prompt yet.
    Launching(Option<ClientId>),
    /// A child of this fork, which has not shown its first sign of life.
    Forking(ForkId),
    /// It is a VM like any other.
    Live,
    /// Its guest powered off.
    Off,
    /// Its guest reset the machine, which is not started again: memory and devices of a clone are not what it booted with.
    Rebooted,
    /// It ended otherwise.
    Dead(String),
}

/// What a process says of its guest's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// Its first sign of life, then;
    First {
        at_ns: u64,
    },
    /// or that a vCPU runs, or stands as asked.
    Runs {
        at_ns: u64,
    },
    Stands,
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignAction {
    /// Nothing.
    Nothing,
    /// The VM has started: whoever launched it is told.
    Launched(Option<ClientId>),
    /// The fork is told that its child is about to run, or stands as asked,
    ChildReady(ForkId, Option<u64>),
    /// or that it lives.
    ChildAlive(ForkId, u64),
}

/// Who has waited for the start of a VM that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// Nobody any more: it had started, or was never waited for.
    Nobody,
    /// This client.
    Client(ClientId),
    /// This fork.
    Fork(ForkId),
}

impl Phase {
    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        !matches!(self, Self::Off | Self::Rebooted | Self::Dead(_))
    }

    /// Its process says something. A Linux guest gives no first sign of its own; of the built-in guest it is what counts.
    pub fn on(&mut self, sign: Sign, machine: Machine) -> SignAction {
        match (&*self, sign) {
            (Self::Launching(client), Sign::First { .. }) => {
                let client = *client;
                *self = Self::Live;
                SignAction::Launched(client)
            }
            (Self::Launching(client), Sign::Runs { .. } | Sign::Stands) if machine == Machine::Linux => {
                let client = *client;
                *self = Self::Live;
                SignAction::Launched(client)
            }
            (Self::Forking(fork), Sign::First { at_ns }) => SignAction::ChildAlive(*fork, at_ns),
            (Self::Forking(fork), Sign::Runs { at_ns }) => SignAction::ChildReady(*fork, Some(at_ns)),
            (Self::Forking(fork), Sign::Stands) => SignAction::ChildReady(*fork, None),
            _ => SignAction::Nothing,
        }
    }

    /// Its fork is over, and well.
    pub fn forked(&mut self, by: ForkId) {
        if *self == Self::Forking(by) {
            *self = Self::Live;
        }
    }

    /// It ends like this, unless it has ended: why, in one line that names it, and who has waited for its start.
    pub fn end(&mut self, end: Self, name: &str) -> Option<(String, Starter)> {
        if !self.is_alive() {
            return None;
        }
        let before = std::mem::replace(self, end);
        let why = match (&*self, &before) {
            (Self::Dead(why), Self::Live) => format!("VM {name:?} is dead: {why}"),
            (Self::Dead(why), _) => format!("VM {name:?} did not start: {why}"),
            _ => format!("VM {name:?} is off"),
        };
        let starter = match before {
            Self::Launching(Some(client)) => Starter::Client(client),
            Self::Forking(fork) => Starter::Fork(fork),
            _ => Starter::Nobody,
        };
        Some((why, starter))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: Option<ClientId> = Some(ClientId(1));
    const FORK: ForkId = ForkId(3);
    const FIRST: Sign = Sign::First { at_ns: 5 };
    const RUNS: Sign = Sign::Runs { at_ns: 4 };

    #[test]
    fn a_launch_is_over_at_the_prompt_or_where_there_is_none_when_it_runs() {
        let mut phase = Phase::Launching(CLIENT);
        assert_eq!(phase.on(RUNS, Machine::Monitor), SignAction::Nothing);
        assert_eq!(phase, Phase::Launching(CLIENT));
        assert_eq!(phase.on(FIRST, Machine::Monitor), SignAction::Launched(CLIENT));
        assert_eq!(phase, Phase::Live);
        assert_eq!(phase.on(FIRST, Machine::Monitor), SignAction::Nothing, "one that says it twice is told once");
        let mut phase = Phase::Launching(CLIENT);
        assert_eq!(phase.on(RUNS, Machine::Linux), SignAction::Launched(CLIENT));
        assert_eq!(phase.on(Sign::Stands, Machine::Linux), SignAction::Nothing);
    }

    #[test]
    fn a_child_is_its_forks_until_that_is_over() {
        let mut phase = Phase::Forking(FORK);
        assert_eq!(phase.on(RUNS, Machine::Monitor), SignAction::ChildReady(FORK, Some(4)));
        assert_eq!(phase.on(Sign::Stands, Machine::Linux), SignAction::ChildReady(FORK, None));
        assert_eq!(phase.on(FIRST, Machine::Monitor), SignAction::ChildAlive(FORK, 5));
        phase.forked(ForkId(4));
        assert_eq!(phase, Phase::Forking(FORK), "another fork's end is not its");
        phase.forked(FORK);
        assert_eq!(phase, Phase::Live);
    }

    #[test]
    fn an_end_is_told_to_whoever_waited_and_happens_once() {
        let dead = || Phase::Dead("killed".into());
        let ends = [
            (Phase::Launching(CLIENT), dead(), "VM \"a\" did not start: killed", Starter::Client(ClientId(1))),
            (Phase::Launching(None), dead(), "VM \"a\" did not start: killed", Starter::Nobody),
            (Phase::Forking(FORK), Phase::Off, "VM \"a\" is off", Starter::Fork(FORK)),
            (Phase::Live, dead(), "VM \"a\" is dead: killed", Starter::Nobody),
            (Phase::Live, Phase::Rebooted, "VM \"a\" is off", Starter::Nobody),
        ];
        for (mut phase, end, why, starter) in ends {
            assert_eq!(phase.end(end.clone(), "a"), Some((why.into(), starter)));
            assert_eq!(phase, end);
            assert_eq!(phase.end(dead(), "a"), None);
            assert_eq!((phase.on(FIRST, Machine::Monitor), phase == end), (SignAction::Nothing, true), "it stays so");
            phase.forked(FORK);
            assert_eq!(phase, end);
        }
    }
}
