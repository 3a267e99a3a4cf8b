//! One freeze, from the moment its VM process is told of it to the last that comes of it.
//!
//! It is a value: what happens goes in, and what is to be done comes out. The process says, in this order,
//!
//! ```text
//!   Asked ── Standing ──► Standing ── Frozen ──► Taken ── Saved ──► Saved ── Copied, WentOn ──► Over
//!     │                      │                     │                  │
//!     └──── FreezeFailed ────┘                     └── FreezeFailed, or anything out of turn: the VM's end
//! ```
//!
//! and whatever it does instead, or does not do in time, has its place here as well.

use crate::wire::{Frozen, RunState};

/// Where a freeze is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeOp {
    /// The process has been told. Its guest may still run.
    Asked,
    /// The vCPUs stand: any page may be moved out from now on.
    Standing,
    /// What was taken is in the books, and children may begin. How the machine stood is to come.
    Taken(Rest),
    /// How the machine stood is known as well.
    Saved(Rest),
    /// Nothing more is to come.
    Over,
}

/// What is to come after the state of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing: all pages are where they will be read, and the guest stands.
    Nothing,
    /// That the guest runs.
    Running,
    /// That the pages that stayed have been copied.
    Copies,
    /// That they have been, and then that the guest runs.
    CopiesThenRunning,
}

impl Rest {
    /// What a process that has said this is still to say.
    pub fn of(frozen: &Frozen) -> Self {
        match (frozen.copied.is_some(), frozen.activity) {
            (false, RunState::Paused) => Self::Nothing,
            (false, RunState::Running) => Self::Running,
            (true, RunState::Paused) => Self::Copies,
            (true, RunState::Running) => Self::CopiesThenRunning,
        }
    }
}

/// What can happen to a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeEvent {
    /// The process says that its vCPUs stand,
    Standing,
    /// what it has taken,
    Frozen(Rest),
    /// how the machine stood,
    Saved,
    /// that what stayed has been copied,
    Copied,
    /// that the guest runs again,
    WentOn,
    /// or that it could not, and has changed nothing.
    Failed,
    /// It has said nothing for too long.
    Deadline,
    /// The VM has ended.
    Died,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeAction {
    /// Nothing.
    Nothing,
    /// Have the books know that pages may be on their way.
    Stand,
    /// Put what was taken into the books. Whoever wanted the freeze goes on, and the next one has its turn.
    Take,
    /// Hand on how the machine stood.
    HandOn,
    /// All pages can be read.
    NoteCopies,
    /// The guest runs again.
    NotePause,
    /// Undo what the books have of it. Whoever wanted it is told that there is none, and the next one has its turn.
    Abort,
    /// Whoever wanted it never gets the state of the machine.
    Lose,
    /// End the VM, which is [`FreezeEvent::Died`].
    End(Broken),
}

/// What a process has broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// It has said something out of turn.
    Order,
    /// It says that a freeze failed of which it has told what it took.
    Promise,
    /// It does not answer.
    Silence,
}

impl FreezeOp {
    /// What becomes of the freeze, and what is to be done.
    #[must_use]
    pub fn on(self, event: FreezeEvent) -> (Self, FreezeAction) {
        use FreezeAction as Do;
        use FreezeEvent as On;
        match (self, event) {
            (Self::Over, On::Deadline | On::Died) => (Self::Over, Do::Nothing),
            (_, On::Deadline) => (self, Do::End(Broken::Silence)),

            (Self::Asked, On::Standing) => (Self::Standing, Do::Stand),
            (Self::Asked | Self::Standing, On::Failed | On::Died) => (Self::Over, Do::Abort),
            (Self::Standing, On::Frozen(rest)) => (Self::Taken(rest), Do::Take),

            (Self::Taken(rest), On::Saved) => (Self::after_state(rest), Do::HandOn),
            (Self::Taken(_), On::Died) => (Self::Over, Do::Lose),
            (Self::Taken(_) | Self::Saved(_), On::Failed) => (self, Do::End(Broken::Promise)),

            (Self::Saved(Rest::Copies), On::Copied) => (Self::Over, Do::NoteCopies),
            (Self::Saved(Rest::CopiesThenRunning), On::Copied) => (Self::Saved(Rest::Running), Do::NoteCopies),
            (Self::Saved(Rest::Running), On::WentOn) => (Self::Over, Do::NotePause),
            // Its children have all they need. What was not copied stays where it is.
            (Self::Saved(_), On::Died) => (Self::Over, Do::Nothing),

            _ => (self, Do::End(Broken::Order)),
        }
    }

    fn after_state(rest: Rest) -> Self {
        if rest == Rest::Nothing { Self::Over } else { Self::Saved(rest) }
    }

    /// Whether what is taken is not known yet: until then there is no other freeze of the VM.
    pub fn is_taking(self) -> bool {
        matches!(self, Self::Asked | Self::Standing)
    }
}
