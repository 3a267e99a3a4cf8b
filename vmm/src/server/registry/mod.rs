//! The list of VMs: how they come, what they are called, and how they end.

pub mod end;
pub mod launch;
pub mod names;
pub mod quota;
pub mod roll;
pub mod vm;

use crate::server::Server;
use vm::{FamilyId, Generation};

impl Server {
    pub fn members(&self, family: FamilyId) -> Vec<Generation> {
        self.vms.iter().filter(|vm| vm.memory.is_some_and(|(f, _)| f == family)).map(|vm| vm.generation).collect()
    }

    /// Keeps, in the home, the names of what would be lost if this server died.
    pub fn record_names(&mut self) {
        let news = std::mem::take(&mut self.vms.news);
        if !news.is_empty()
            && let Err(error) = self.roll.note(&news, self.vms.iter().map(|vm| vm.name.as_str()))
        {
            log::error!("record of VMs in {}: {error}", self.home.path().display());
        }
    }
}
