//! Those who wait until VMs are gone, with all that they had; and why the server itself ends.

use crate::api::{Answer, Failure, Reply};
use crate::server::ids::{ClientId, ProcessId};
use crate::units::count;
use std::time::{Duration, Instant};

/// How long the memory of processes that have been ended may stay. Where it stays longer, somebody holds on to it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndCause {
    /// This client asked for it, and is told.
    Client(ClientId),
    /// A signal did.
    Signal,
    /// There is no home any more in which somebody would look for it.
    HomeIsGone,
}

/// Somebody, a client mostly, who waits until these processes are gone.
#[derive(Debug)]
struct Removal {
    client: Option<ClientId>,
    processes: Vec<ProcessId>,
    /// What it is told then.
    answer: Answer,
    /// It waits no longer.
    until: Instant,
}

/// All who wait.
#[derive(Debug, Default)]
pub struct Removals(Vec<Removal>);

/// What there still is of VMs that have ended.
pub trait Remains {
    /// Whether this process is there, or its memory.
    fn has(&self, process: ProcessId) -> bool;
    /// Whether what families that are gone had in swap is still given back, bit by bit.
    fn is_freeing(&self) -> bool;
}

impl Removals {
    /// Somebody waits for the end of these processes, and is answered then.
    pub fn wait(&mut self, client: Option<ClientId>, processes: Vec<ProcessId>, answer: Answer, now: Instant) {
        self.0.push(Removal { client, processes, answer, until: now + PATIENCE });
    }

    /// Nobody waits any longer.
    pub fn give_up(&mut self) {
        self.0.clear();
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// When somebody waits no longer.
    pub fn next_look(&self, now: Instant) -> Option<Instant> {
        self.0.iter().map(|removal| removal.until).filter(|until| *until > now).min()
    }

    /// Those whose processes are gone, or who wait no longer, and what they are told.
    pub fn finish(&mut self, now: Instant, remains: &impl Remains) -> Vec<(Option<ClientId>, Reply)> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let freeing = remains.is_freeing();
        let left = |removal: &Removal| removal.processes.iter().filter(|id| remains.has(**id)).count();
        let over = |removal: &mut Removal| removal.until <= now || (!freeing && left(removal) == 0);
        let reply = |removal: Removal| match left(&removal) {
            0 => (removal.client, Ok(removal.answer)),
            left => {
                let processes = count(left as u64, "VM process");
                let why = format!("the memory of {processes} is held on to by somebody");
                (removal.client, Err(Failure::host(why)))
            }
        };
        self.0.extract_if(.., over).map(reply).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Removed;

    /// What there is, as we say.
    struct Made {
        processes: Vec<u64>,
        freeing: bool,
    }

    impl Remains for Made {
        fn has(&self, process: ProcessId) -> bool {
            self.processes.contains(&process.0)
        }

        fn is_freeing(&self) -> bool {
            self.freeing
        }
    }

    fn made(processes: &[u64], freeing: bool) -> Made {
        Made { processes: processes.to_vec(), freeing }
    }

    fn waiting(now: Instant) -> Removals {
        let mut removals = Removals::default();
        removals.wait(Some(ClientId(1)), vec![ProcessId(1), ProcessId(2)], Answer::Removed(Removed::default()), now);
        removals.wait(Some(ClientId(2)), vec![ProcessId(2)], Answer::Done, now);
        removals.wait(None, Vec::new(), Answer::Done, now);
        removals
    }

    fn told(done: &[(Option<ClientId>, Reply)]) -> Vec<(Option<u64>, bool)> {
        done.iter().map(|(client, reply)| (client.map(|client| client.0), reply.is_ok())).collect()
    }

    #[test]
    fn who_waits_is_told_when_all_is_gone_and_once() {
        let now = Instant::now();
        let mut removals = waiting(now);
        assert_eq!(told(&removals.finish(now, &made(&[1, 2], true))), []);
        assert_eq!(told(&removals.finish(now, &made(&[1, 2], false))), [(None, true)]);
        assert_eq!(told(&removals.finish(now, &made(&[1], false))), [(Some(2), true)]);
        assert_eq!(told(&removals.finish(now, &made(&[], true))), [], "swap is not given back yet");
        assert_eq!(told(&removals.finish(now, &made(&[], false))), [(Some(1), true)]);
        assert!(removals.is_empty() && removals.next_look(now).is_none());
    }

    #[test]
    fn nobody_waits_for_ever() {
        let now = Instant::now();
        let mut removals = waiting(now);
        assert_eq!(removals.next_look(now), Some(now + PATIENCE));
        let done = removals.finish(now + PATIENCE, &made(&[1, 2], true));
        assert_eq!(told(&done), [(Some(1), false), (Some(2), false), (None, true)]);
        let why = done[0].1.as_ref().unwrap_err().to_string();
        assert!(why.contains("2 VM processes"), "{why}");
        let mut removals = waiting(now);
        removals.give_up();
        assert_eq!(told(&removals.finish(now + PATIENCE, &made(&[1], false))), []);
    }
}
