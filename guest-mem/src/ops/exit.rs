//! Exit: a VM goes, and everything that only it saw.

use crate::addr::PageOrigin;
use crate::effect::{Effect, Effects};
use crate::family::Family;
use crate::ids::{Run, Source, VmId};

impl Family {
    /// Takes `vm` out of the books. Its window stays for as long as pages that others see wait in its scratch ranges. What
    /// nobody sees any more of objects that others need is freed when it is [tidied up](Self::tidy).
    pub fn exit(&mut self, vm: VmId, effects: &mut Effects) {
        let gone = self.vms.remove(&vm).expect("a VM of this family");
        if let Some(freezing) = gone.freezing {
            effects.push(Effect::DropStore(freezing.store()));
        }
        let mut dropped = Vec::new();
        self.stage2.release(gone.root, &mut dropped);
        // What nobody else maps goes whole; page by page, what others hide.
        for (_, entry) in gone.map.iter() {
            if let Some(object) = entry.object {
                self.objects.unmap(object, vm, gone.activity, effects);
            }
        }
        self.left.replaced.append(&mut dropped);
        let unneeded = self.objects.writeback.take_unneeded().into_iter();
        let origin = PageOrigin(0);
        let of_store = |(store, pages)| Run { pages: origin.frames(pages), source: Source::Store { store, origin } };
        self.left.replaced.extend(unneeded.map(of_store));
        if !self.objects.accounts.waits_for(vm) {
            effects.push(Effect::DropWindow(vm));
        }
    }

    /// Called after scratch ranges were dropped: whether a VM that is gone left a window nobody needs any more.
    pub(crate) fn window_is_done(&self, vm: VmId) -> bool {
        !self.vms.contains_key(&vm) && !self.objects.accounts.waits_for(vm)
    }
}
