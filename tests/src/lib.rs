//! What the integration tests of Offshoot have in common. The tests themselves are in `tests/`, one file a subject, and
//! run against this host's real KVM.
//!
//! | file | has |
//! | --- | --- |
//! | `home` | a home of a test's own, its server, and the proof that nothing of it is left |
//! | `agent` | the agent of Linux guests as a program of this host |
//! | `fuse` | a file whose blocks can be made to fail |
//! | `hostile` | a VM process that has been taken over |
//! | `puppet` | a process that makes the system calls a test wants |
//! | `served` | a server with options of its own |
//! | `skips` | what becomes of a test that cannot run here |
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
//! A test that cannot run here fails, unless `OFFSHOOT_SKIPS` allows it to be skipped ([`skip`]).

mod agent;
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
#[path = "../../guest-mem/tests/common/skip.rs"]
mod skips;
mod traced;
mod turn;

pub use self::agent::{AgentHost, command_at};
pub use binary::binary as offshoot_binary;
pub use command::Outcome;
pub use figures::{Random, TEN_SECONDS, median, wait_until};
pub use guest::{Guest, PATIENCE, each, fork_settled};
pub use home::{Setup, TestHome, User};
pub use served::Served;
pub use skips::{Lack, skip};
pub use traced::{Image, Stamp, Traced};
pub use turn::Company;

/// Whether this process is root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::Lack;
    use super::skips::allows;

    #[test]
    fn only_what_is_listed_is_skipped() {
        assert_eq!(allows("", Lack::Kvm), Ok(false), "nothing passes silently");
        assert_eq!(allows("root, fuse", Lack::Root), Err("fuse"), "who mistypes a word hears of it");
        assert_eq!(allows("root, lab", Lack::Root), Ok(true));
        assert_eq!(allows("root, lab", Lack::Kvm), Ok(false));
        assert_eq!(allows("all", Lack::Kvm), Ok(true));
    }
}
