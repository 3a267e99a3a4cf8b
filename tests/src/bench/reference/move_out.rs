//! **Bare move-out**: unregister, `mremap`, `mmap`, register of the same bytes under a live guest. And the other way for
//! scattered pages: one call that protects the range against writes.

use super::{numbers, serve};
use crate::bare::memory::Show;
use crate::bare::uffd::{Trap, Uffd};
use crate::bare::vm::span;
use crate::bare::{MemoryFile, PAGE, Platform, Vm, Window};
use crate::stats::timed;
use crate::{Result, fail};

/// First page that is moved: where page tables begin.
pub const FIRST: u64 = 512;

/// RAM in MiB. Answers `contiguous COUNT` (µs for moving out COUNT pages that the guest has just written), and `scattered
/// COUNT STEP` (µs for moving out COUNT single pages STEP apart, and µs for protecting their whole range instead).
pub fn run(arguments: &[u64]) -> Result<()> {
    let [mib] = numbers(arguments)?;
    let (ram, platform, uffd) = (mib << 20, Platform::open()?, Uffd::new()?);
    let (old, new) = (MemoryFile::new(span(ram))?, MemoryFile::new(span(ram))?);
    let scratch = Window::reserve(span(ram))?;
    let mut vm = Vm::boot(&platform, ram, Show::Private(&old))?;
    vm.log_writes()?;
    serve(|verb, given| match verb {
        "contiguous" => {
            let [count] = numbers(given)?;
            if count == 0 {
                return Ok(vec![0.0]);
            }
            vm.send(&format!("touch {FIRST} {count} 1"))?;
            let (at, len) = (FIRST * PAGE, count * PAGE);
            uffd.register(vm.window(), at, len, Trap::Missing)?;
            let (moved, us) = timed(|| move_out(&uffd, &scratch, &vm, &new, at..at + len, [(at, len)]));
            moved?;
            put_back(&uffd, &scratch, &vm, at, len)?;
            Ok(vec![us])
        }
        "scattered" => {
            let [count, step] = numbers(given)?;
            let pages = || (FIRST..).step_by(step as usize).take(count as usize);
            for page in pages() {
                vm.send(&format!("touch {page} 1 1"))?;
            }
            let (at, len) = (FIRST * PAGE, count * step * PAGE);
            uffd.register(vm.window(), at, len, Trap::MissingAndWrites)?;
            let (protected, protect) = timed(|| uffd.write_protect(vm.window(), at, len));
            protected?;
            uffd.unregister(vm.window(), at, len)?;
            uffd.register(vm.window(), at, len, Trap::Missing)?;
            let all = at..at + len;
            let (moved, us) =
                timed(|| move_out(&uffd, &scratch, &vm, &new, all, pages().map(|page| (page * PAGE, PAGE))));
            moved?;
            uffd.unregister(vm.window(), at, len)?;
            for page in pages() {
                scratch.move_to(vm.window(), page * PAGE, PAGE)?;
            }
            Ok(vec![us, protect])
        }
        _ => fail("contiguous or scattered"),
    })
}

/// Traps end over all of it, each part goes, `file` takes its place, and traps are back.
fn move_out(
    uffd: &Uffd,
    scratch: &Window,
    vm: &Vm,
    file: &MemoryFile,
    all: std::ops::Range<u64>,
    parts: impl IntoIterator<Item = (u64, u64)>,
) -> Result<()> {
    let len = all.end - all.start;
    uffd.unregister(vm.window(), all.start, len)?;
    for (at, len) in parts {
        vm.window().move_to(scratch, at, len)?;
        vm.window().map(at, len, Show::Private(file))?;
    }
    Ok(uffd.register(vm.window(), all.start, len, Trap::Missing)?)
}

fn put_back(uffd: &Uffd, scratch: &Window, vm: &Vm, at: u64, len: u64) -> Result<()> {
    uffd.unregister(vm.window(), at, len)?;
    Ok(scratch.move_to(vm.window(), at, len)?)
}
