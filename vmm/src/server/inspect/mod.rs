//! The verbs that look, and change nothing.

pub mod check;
pub mod guest_stats;
pub mod look;
pub mod report;
mod windows;

use crate::server::aside::Aside;
use crate::server::ids::{ClientId, Generation};
use check::Checks;
use look::Looks;

/// What is being looked at.
#[derive(Debug)]
pub struct Inspect {
    pub aside: Aside,
    pub looks: Looks,
    pub checks: Checks,
    /// Clients that wait for what a guest says of its memory.
    pub stats_waiters: Vec<(ClientId, Generation)>,
}

impl Inspect {
    /// Nothing yet.
    pub fn new(aside: Aside) -> Self {
        Self { aside, looks: Looks::default(), checks: Checks::default(), stats_waiters: Vec::new() }
    }
}
