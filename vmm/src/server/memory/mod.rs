//! Memory: what is written back, what is taken out, when, and where it goes.

pub mod balloon;
pub mod budget;
pub mod dedup;
pub mod files;
pub mod idle;
pub mod pace;
pub mod reclaim;
pub mod request;
pub mod swap;
mod swap_place;
pub mod writeback;
