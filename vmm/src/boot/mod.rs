//! How a guest starts.

pub mod monitor;
