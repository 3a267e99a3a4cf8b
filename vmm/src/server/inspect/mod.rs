//! The verbs that look, and change nothing.

pub mod check;
pub mod guest_stats;
pub mod look;
pub mod report;
