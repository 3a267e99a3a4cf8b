//! VM processes: who makes them, what they say, their memory, and those that are prepared.

pub mod answers;
pub mod children;
pub mod expect;
pub mod late;
pub mod pool;
pub mod process;
pub mod trial;
pub mod window;
pub mod zygote;

use crate::server::ids::ProcessId;
use children::Children;
use late::Patience;
use pool::Pool;
use process::VmProcess;
use std::collections::BTreeMap;
use zygote::{Jail, Zygote};

/// All VM processes, and those that are to be.
#[derive(Debug)]
pub struct Procs {
    pub all: BTreeMap<ProcessId, VmProcess>,
    pub children: Children,
    pub zygote: Zygote,
    pub patience: Patience,
    pub pool: Pool,
    next: ProcessId,
}

impl Procs {
    /// None yet. They are made in this jail, and have so long to answer.
    pub fn new(jail: Jail, patience: Patience) -> Self {
        let (all, children, pool) = (BTreeMap::new(), Children::default(), Pool::default());
        Self { all, children, zygote: Zygote::new(jail), patience, pool, next: ProcessId(1) }
    }

    /// A name that no process of this server has had.
    pub fn fresh_id(&mut self) -> ProcessId {
        let fresh = self.next;
        self.next.0 += 1;
        fresh
    }
}
