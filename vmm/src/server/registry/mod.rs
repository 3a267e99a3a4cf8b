//! The list of VMs: how they come, what they are called, and how they end.

pub mod launch;
pub mod names;
pub mod phase;
pub mod quota;
pub mod removals;
pub mod roll;
pub mod run;
pub mod vm;

use crate::server::Server;
use crate::server::ids::{FamilyId, Generation};
use removals::Removals;
use roll::Roll;
use vm::Vms;

/// All VMs, and those who wait until some are gone.
#[derive(Debug)]
pub struct Registry {
    pub vms: Vms,
    pub roll: Roll,
    pub removals: Removals,
    /// How many VMs there may be.
    pub max_vms: Option<u32>,
}

impl Registry {
    /// No VMs yet, whose names will be kept in this roll.
    pub fn new(roll: Roll, max_vms: Option<u32>) -> Self {
        Self { vms: Vms::default(), roll, removals: Removals::default(), max_vms }
    }
}

impl Server {
    pub fn members(&self, family: FamilyId) -> Vec<Generation> {
        self.registry
            .vms
            .iter()
            .filter(|vm| vm.memory.is_some_and(|(f, _)| f == family))
            .map(|vm| vm.generation)
            .collect()
    }

    /// Keeps, in the home, the names of what would be lost if this server died.
    pub fn record_names(&mut self) {
        let news = std::mem::take(&mut self.registry.vms.news);
        if !news.is_empty()
            && let Err(error) = self.registry.roll.note(&news, self.registry.vms.iter().map(|vm| vm.name.as_str()))
        {
            log::error!("record of VMs in {}: {error}", self.home.path().display());
        }
    }
}
