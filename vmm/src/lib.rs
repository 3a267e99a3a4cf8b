//! Offshoot: launch a microVM and fork it while it runs.

pub mod api;
pub mod boot;
pub mod client;
pub mod clock;
mod confinement;
pub mod devices;
pub mod host;
pub mod layout;
pub mod link;
pub mod machine;
pub mod name;
mod nice;
pub mod plain;
pub mod procfs;
pub mod server;
#[cfg(test)]
#[path = "../../guest-mem/tests/common/skip.rs"]
#[allow(dead_code, reason = "each crate's tests lack something else")]
mod skips;
pub mod units;
pub mod wire;
