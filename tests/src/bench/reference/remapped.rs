//! **Remapped**: the parent of the in-process design, whose memory was just put into a memfd and mapped privately again.

use super::{numbers, serve};
use crate::Result;
use crate::bare::memory::Show;
use crate::bare::vm::span;
use crate::bare::{MemoryFile, PAGE, Platform, Vm};
use crate::stats::timed;

/// RAM in MiB, and pages that the guest has written. Answers anything: µs for writing each of the pages once more, right
/// after the memory was mapped anew.
pub fn run(arguments: &[u64]) -> Result<()> {
    let [mib, pages] = numbers(arguments)?;
    let (ram, platform) = (mib << 20, Platform::open()?);
    let mut vm = Vm::boot(&platform, ram, Show::Anonymous)?;
    vm.send(&format!("fill 64 {pages} 1"))?;
    serve(|_, _| {
        let file = MemoryFile::new(span(ram))?;
        let mut bytes = vec![0; PAGE as usize];
        for at in (0..64 + pages).map(|page| page * PAGE) {
            vm.window().read(at, &mut bytes);
            file.write(at, &bytes)?;
        }
        vm.window().map(0, span(ram), Show::Private(&file))?;
        let (done, us) = timed(|| vm.send(&format!("touch 64 {pages} 2")));
        done?;
        Ok(vec![us])
    })
}
