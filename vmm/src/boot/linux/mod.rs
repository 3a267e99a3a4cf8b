//! Linux guests: what is checked before one is started, and what its memory and its first vCPU hold when it is.
//!
//! The server looks at the files, before anything is started, and makes a [`Plan`]. The VM process carries it out: the
//! kernel is written into the guest's memory, the initial RAM disk is mapped in its place like any other file.

mod e820;
mod kernel;
mod load;
mod plan;
mod registers;
#[cfg(test)]
mod tests;

pub use kernel::{Kernel, KernelError};
pub use load::{LoadError, load};
pub use plan::{Plan, PlanError, Request};
pub use registers::{MSRS, registers};

/// The command line where none is given.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1";
