//! All measures.

use super::bench::Bench;
use super::{Result, measure};

/// Something that is measured.
#[derive(Clone, Copy)]
pub struct Measure {
    /// For `--only`, and in front of its figures' names.
    pub name: &'static str,
    /// What it is, in one line.
    pub about: &'static str,
    /// Measures it.
    pub run: fn(&mut Bench) -> Result<()>,
}

impl std::fmt::Debug for Measure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// In the order in which they are told.
pub const MEASURES: &[Measure] = &[
    Measure {
        name: "fork",
        about: "a fork of a running clone, step by step; 256 MiB, 64 MiB of it written long ago, 10 live clones",
        run: measure::fork::run,
    },
    Measure {
        name: "qemu",
        about: "a fork beside a guest that QEMU has saved, and restores for each clone",
        run: measure::qemu::run,
    },
    Measure { name: "ram", about: "first instruction over RAM size, private size fixed", run: measure::ram::run },
    Measure {
        name: "live-clones",
        about: "first instruction over the number of live clones",
        run: measure::live_clones::run,
    },
    Measure { name: "depth", about: "first instruction over the depth of the parent", run: measure::depth::run },
    Measure {
        name: "pause",
        about: "the parent's pause over what it has written in one piece since its last fork",
        run: measure::pause::run,
    },
    Measure {
        name: "scattered",
        about: "the parent's pause with 4,096 single pages written all over 256 MiB",
        run: measure::scattered::run,
    },
    Measure {
        name: "settling",
        about: "the parent's next write to each page of its 64 MiB, right after a fork",
        run: measure::settling::run,
    },
    Measure {
        name: "first-fork",
        about: "the first fork of a launched VM that has written much",
        run: measure::first_fork::run,
    },
    Measure { name: "writes", about: "a clone's write to a page that it shares", run: measure::writes::run },
    Measure {
        name: "crowd",
        about: "many forks of one parent back to back, and their end; making the pool counts",
        run: measure::crowd::run,
    },
    Measure {
        name: "memory",
        about: "memory of an idle clone, the pool's and keepers' included",
        run: measure::memory::run,
    },
    Measure {
        name: "learned",
        about: "a clone that writes the 1,000 pages its siblings wrote",
        run: measure::learned::run,
    },
    Measure { name: "launch", about: "a launch of the built-in guest to its prompt", run: measure::launch::run },
    Measure { name: "idle", about: "the server's processor time while idle clones live", run: measure::idle::run },
    Measure { name: "swap-in", about: "one page back from the compressed tier", run: measure::swap_in::run },
    Measure { name: "swap-read", about: "memory back from disk, in order", run: measure::swap_read::run },
    Measure { name: "evict", about: "a cluster taken out of memory, over its viewers", run: measure::evict::run },
    Measure { name: "victim", about: "the choice of what to evict, over the number of VMs", run: measure::victim::run },
    Measure {
        name: "growth",
        about: "what a VM costs the memory manager, over depth, RAM size and the size of its family",
        run: measure::growth::run,
    },
    Measure {
        name: "overcommit",
        about: "memory beside its budget, while clones write four times as much",
        run: measure::overcommit::run,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_words_of_their_own() {
        for (index, measure) in MEASURES.iter().enumerate() {
            assert!(measure.name.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{measure:?}");
            assert!(MEASURES[..index].iter().all(|other| other.name != measure.name), "{measure:?}");
        }
    }
}
