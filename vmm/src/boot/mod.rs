//! How a guest starts.

pub mod acpi;
pub mod linux;
pub mod monitor;
