//! The place of one vCPU on the floor.

use super::Load;
use crate::machine::kick::StopSwitch;
use crate::machine::state::VcpuState;

/// One vCPU: what it is told, and where it stands.
#[derive(Debug)]
pub(super) struct Desk {
    pub stop: StopSwitch,
    pub wish: Wish,
    pub load: Option<Load>,
    pub saved: Option<Result<VcpuState, String>>,
    pub at: Station,
    /// Its guest waits, and its thread here: it is not in `KVM_RUN`.
    pub waits: bool,
    pub rest: Rest,
}

/// A guest that waits when it is stopped is told that there is nothing yet, and would do no more than ask again. So it is
/// not run until there is something: meanwhile it is stopped, and goes on, at once, and its registers are known.
#[derive(Debug, Default)]
pub(super) enum Rest {
    /// It runs, or is to.
    #[default]
    Not,
    /// It was told that there is nothing yet.
    Told,
    /// It has not run since, and has these registers.
    Resting(Box<VcpuState>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Stand,
    /// Stand, and save the registers once all vCPUs stand: until then others may send it interrupts.
    Save,
    Run,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Station {
    /// Its thread has not come to the floor yet, or sets its registers.
    Arriving,
    Standing,
    /// In or about to enter `KVM_RUN`, or on an errand.
    Running {
        since_ns: u64,
    },
    /// It will never run again.
    Ended,
}

impl Desk {
    /// A vCPU that rests stands as soon as it is to.
    pub fn stop_resting(&mut self) {
        self.saved = None;
        if let Rest::Resting(registers) = &self.rest {
            self.at = Station::Standing;
            if self.wish == Wish::Save {
                (self.wish, self.saved) = (Wish::Stand, Some(Ok((**registers).clone())));
            }
        }
    }
}
