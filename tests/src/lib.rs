//! What the integration tests of Offshoot have in common. The tests themselves are in `tests/`, one file a subject, and
//! run against this host's real KVM.
//!
//! | file | has |
//! | --- | --- |
//! | `home` | a home of a test's own, its server, and the proof that nothing of it is left |
//! | `fuse` | a file whose blocks can be made to fail |
//! | `hostile` | a VM process that has been taken over |
//! | `puppet` | a process that makes the system calls a test wants |
//! | `served` | a server with options of its own |
//! | `turn` | who may run beside whom |
//! | `binary` | the `offshoot` binary, built if it is not there or not of today |
//! | `command` | how a command line ended |
//! | `guest` | the monitor's commands, as methods of a VM |
//! | `traced` | a VM and what its memory must hold |
//! | `process` | what `/proc` says of the server's processes |
//! | `figures` | medians, random numbers |
//!
//! The benchmarks (`bench/`, a program of their own) share none of it.
//!
//! A test that cannot run here says so on stderr, in a line that begins with `SKIPPED`, and passes.

mod binary;
mod command;
mod figures;
pub mod fuse;
mod guest;
mod home;
pub mod hostile;
pub mod process;
pub mod puppet;
mod served;
mod traced;
mod turn;

pub use binary::binary as offshoot_binary;
pub use command::Outcome;
pub use figures::{Random, TEN_SECONDS, median, wait_until};
pub use guest::{Guest, PATIENCE, each, fork_settled};
pub use home::{Setup, TestHome, User};
pub use served::Served;
pub use traced::{Image, Stamp, Traced};
pub use turn::Company;

use std::io::Write;

/// Says that a test, or a part of it, is not run, and why: past the test runner's capture.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    // A closed stderr changes nothing about the test.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {reason}");
}

/// Whether this process is root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
