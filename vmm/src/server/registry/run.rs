//! Whether a VM's vCPUs are to run: its user says so, and the budget, which has VMs stand still for moments without telling.
//!
//! ```text
//!   Free ── hold ──► Stopping ── Paused ──► Held ── release ──► Releasing ── Running ──► Free
//!     ▲                 │                    │
//!     └── somebody asks for a pause: it is that somebody's from now on
//! ```

use crate::server::ids::ClientId;

/// How far a VM is kept from growing, unknown to its user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Hold {
    /// It is not.
    #[default]
    Free,
    /// Its vCPUs are to stand.
    Stopping,
    /// They stand.
    Held,
    /// They are to run again.
    Releasing,
}

/// What its process is to be told, or a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunAction {
    /// To stand still.
    Pause,
    /// To run.
    Resume,
    /// The client, that it is as it asked.
    Answer,
    /// Nothing: what is awaited will come.
    Wait,
}

/// What a process says of its vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunNews {
    /// They run.
    Running,
    /// They stand.
    Paused,
}

/// What is to be done about that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunChange {
    /// It is as the VM's user wants it: these have waited for that.
    Told(Vec<ClientId>),
    /// It stands still for the budget.
    Held,
    /// It runs on, and stands still again where somebody has asked for that meanwhile.
    Released(RunAction),
}

/// Whether a VM is to run, and who waits until it does, or does not.
#[derive(Debug, Default)]
pub struct RunOrder {
    paused: bool,
    hold: Hold,
    waiting: Vec<ClientId>,
    /// Those who have asked for a pause while it was let go.
    late: Vec<ClientId>,
}

impl RunOrder {
    /// It stands still from its first moment on.
    pub fn begin_paused(&mut self) {
        self.paused = true;
    }

    /// Whether it stands still because somebody asked for it.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether it stands still, or is about to, whoever wanted it.
    pub fn stands(&self) -> bool {
        self.paused || matches!(self.hold, Hold::Stopping | Hold::Held)
    }

    /// Whether the budget has nothing to do with it now.
    pub fn is_free(&self) -> bool {
        self.hold == Hold::Free
    }

    /// Whether somebody waits for it to stand still, or to run.
    pub fn is_awaited(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// A client wants it to stand still, or to run.
    pub fn ask(&mut self, client: ClientId, wanted: RunNews) -> RunAction {
        let pause = wanted == RunNews::Paused;
        if pause == self.paused {
            return RunAction::Answer;
        }
        match self.hold {
            Hold::Free => {}
            // It stands, or is about to, and now somebody knows.
            Hold::Held => {
                (self.hold, self.paused) = (Hold::Free, true);
                return RunAction::Answer;
            }
            Hold::Stopping => {
                self.hold = Hold::Free;
                self.waiting.push(client);
                return RunAction::Wait;
            }
            Hold::Releasing => {
                self.late.push(client);
                return RunAction::Wait;
            }
        }
        // It says once that it has come to that, for all who wait.
        let asked = self.is_awaited();
        self.waiting.push(client);
        match (asked, pause) {
            (true, _) => RunAction::Wait,
            (false, true) => RunAction::Pause,
            (false, false) => RunAction::Resume,
        }
    }

    /// It is to stand still for the budget.
    pub fn hold(&mut self) -> RunAction {
        self.hold = Hold::Stopping;
        RunAction::Pause
    }

    /// It need not stand still for the budget any longer.
    pub fn release(&mut self) -> RunAction {
        if self.hold != Hold::Held {
            return RunAction::Wait;
        }
        self.hold = Hold::Releasing;
        RunAction::Resume
    }

    /// Its process says what its vCPUs do.
    pub fn says(&mut self, news: RunNews) -> RunChange {
        match (news, self.hold) {
            (RunNews::Running, Hold::Releasing) => {
                self.hold = Hold::Free;
                self.waiting.append(&mut self.late);
                RunChange::Released(if self.is_awaited() { RunAction::Pause } else { RunAction::Wait })
            }
            (RunNews::Paused, Hold::Stopping) => {
                self.hold = Hold::Held;
                RunChange::Held
            }
            _ => {
                self.paused = news == RunNews::Paused;
                RunChange::Told(std::mem::take(&mut self.waiting))
            }
        }
    }

    /// It has ended: these wait for nothing.
    pub fn end(&mut self) -> Vec<ClientId> {
        self.hold = Hold::Free;
        let mut all = std::mem::take(&mut self.waiting);
        all.append(&mut self.late);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::RunNews::{Paused, Running};
    use super::*;

    const A: ClientId = ClientId(1);
    const B: ClientId = ClientId(2);

    fn told(clients: &[ClientId]) -> RunChange {
        RunChange::Told(clients.to_vec())
    }

    #[test]
    fn all_who_wait_are_told_at_once() {
        let mut run = RunOrder::default();
        assert_eq!(run.ask(A, Running), RunAction::Answer, "it runs");
        assert_eq!([run.ask(A, Paused), run.ask(B, Paused)], [RunAction::Pause, RunAction::Wait]);
        assert_eq!(run.says(Paused), told(&[A, B]));
        assert_eq!((run.is_paused(), run.ask(A, Paused)), (true, RunAction::Answer));
        assert_eq!(run.ask(A, Running), RunAction::Resume);
        assert_eq!(run.says(Running), told(&[A]));
        assert!(!run.stands());
    }

    #[test]
    fn a_hold_is_not_seen() {
        let mut run = RunOrder::default();
        assert_eq!(run.hold(), RunAction::Pause);
        assert!(run.stands() && !run.is_paused());
        assert_eq!(run.release(), RunAction::Wait, "it does not stand yet");
        assert_eq!(run.says(Paused), RunChange::Held);
        assert_eq!(run.release(), RunAction::Resume);
        assert!(!run.stands() && !run.is_free());
        assert_eq!(run.says(Running), RunChange::Released(RunAction::Wait));
        assert!(run.is_free());
    }

    #[test]
    fn who_asks_for_a_pause_has_it_whatever_the_budget_does() {
        let stopping = |run: &mut RunOrder| assert_eq!(run.hold(), RunAction::Pause);
        let held = |run: &mut RunOrder| assert_eq!((run.hold(), run.says(Paused)), (RunAction::Pause, RunChange::Held));
        let releasing = |run: &mut RunOrder| {
            held(run);
            assert_eq!(run.release(), RunAction::Resume);
        };

        let mut run = RunOrder::default();
        stopping(&mut run);
        assert_eq!(run.ask(A, Paused), RunAction::Wait, "it was told already");
        assert_eq!(run.says(Paused), told(&[A]));
        assert!(run.is_paused() && run.is_free());

        let mut run = RunOrder::default();
        held(&mut run);
        assert_eq!(run.ask(A, Paused), RunAction::Answer);
        assert_eq!((run.is_paused(), run.release()), (true, RunAction::Wait), "nobody lets it go");

        let mut run = RunOrder::default();
        releasing(&mut run);
        assert_eq!([run.ask(A, Paused), run.ask(B, Paused)], [RunAction::Wait; 2]);
        assert_eq!(run.says(Running), RunChange::Released(RunAction::Pause));
        assert_eq!(run.says(Paused), told(&[A, B]));
    }

    /// Every sequence of up to five: whoever has asked is answered when it ends at the latest, and only once.
    #[test]
    fn nobody_is_forgotten() {
        for code in 0..6_u32.pow(5) {
            let (mut run, mut asked, mut answered) = (RunOrder::default(), 0, 0);
            for step in 0..5 {
                let (client, step) = (ClientId(u64::from(step)), code / 6_u32.pow(step) % 6);
                let wanted = if step == 0 { Paused } else { Running };
                match step {
                    0 | 1 => {
                        asked += 1;
                        answered += usize::from(run.ask(client, wanted) == RunAction::Answer);
                    }
                    2 if run.is_free() && !run.is_paused() && !run.is_awaited() => {
                        run.hold();
                    }
                    2 | 3 => {
                        run.release();
                    }
                    _ => {
                        if let RunChange::Told(clients) = run.says(if step == 4 { Paused } else { Running }) {
                            answered += clients.len();
                        }
                    }
                }
            }
            answered += run.end().len();
            assert_eq!((asked, run.end().len(), run.is_free()), (answered, 0, true), "{code}");
        }
    }
}
