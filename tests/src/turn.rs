//! Who may run beside whom. Tests run in parallel, in one process or in several; those that measure want no company.

use crate::binary::profile_directory;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;

/// Whom a test can bear beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Company {
    /// Others that are like that.
    #[default]
    Welcome,
    /// Nobody: it measures, or takes the whole machine.
    None,
}

/// A test's turn, until this is dropped.
#[derive(Debug)]
pub(crate) struct Turn(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl Turn {
    /// Waits for it.
    pub fn wait(company: Company) -> Self {
        let file = File::create(profile_directory().join("offshoot-tests.turn")).expect("make a lock file");
        let how = match company {
            Company::Welcome => FlockArg::LockShared,
            Company::None => FlockArg::LockExclusive,
        };
        Self(Flock::lock(file, how).map_err(|(_, e)| e).expect("lock a file"))
    }
}
