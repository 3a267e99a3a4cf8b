//! What is known of a guest by what it says itself, and what becomes of its balloon while it is idle.

pub mod balloon;
pub mod idle;
pub mod stats;
