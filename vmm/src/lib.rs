//! Offshoot: launch a microVM and fork it while it runs.

pub mod api;
pub mod boot;
pub mod client;
pub mod clock;
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
pub mod units;
pub mod wire;
