//! A guest that stands still, for others to start from: its memory in a memfd, and its registers.

use super::memory::Show;
use super::vm::{State, span};
use super::{MemoryFile, Platform, Vm, Window};
use crate::Result;

/// A guest at its prompt that has written so much, frozen.
pub struct Snapshot {
    /// Its memory.
    pub file: MemoryFile,
    /// Its registers.
    pub state: State,
    /// Its RAM in bytes.
    pub ram: u64,
}

impl Snapshot {
    /// Boots a guest, has it write `pages` pages (from the first free one on), and freezes it.
    pub fn make(platform: &Platform, ram: u64, pages: u64) -> Result<Self> {
        let file = MemoryFile::new(span(ram))?;
        let mut vm = Vm::boot(platform, ram, Show::Shared(&file))?;
        if pages > 0 {
            vm.send(&format!("fill 64 {pages} 1"))?;
        }
        let state = vm.save()?;
        drop(vm);
        Ok(Self { file, state, ram })
    }

    /// A VM that goes on from here: everything made now, over a private mapping.
    pub fn fork(&self, platform: &Platform) -> Result<Vm> {
        let window = Window::showing(span(self.ram), Show::Private(&self.file))?;
        let vm = Vm::new(platform, window, self.ram)?;
        vm.load(&self.state)?;
        Ok(vm)
    }
}
