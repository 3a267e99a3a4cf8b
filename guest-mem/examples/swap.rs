//! Four VMs that may take a quarter of the memory that they see: what is over the budget goes to swap, compressed, and to
//! a file. What they share goes there once, and comes back once.

use guest_mem::local::{Local, LocalVm, Options};
use guest_mem::swap::{SwapOptions, SwapStore};
use guest_mem::{Gfn, GfnRange, PageCount, manager};
use std::error::Error;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

/// What each VM has (8 MiB), and what all of them may take.
const PAGES: u64 = 2048;
const BUDGET: u64 = PAGES / 4;

/// Words that do not compress.
fn page(number: u64) -> Vec<u8> {
    let mut word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..512).map(|_| {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word
    });
    words.flat_map(u64::to_le_bytes).collect()
}

/// Evicts what is over the budget.
fn shrink(family: &Local) -> Result<(), Box<dyn Error>> {
    loop {
        let resident = family.stats()?.totals.resident;
        if resident <= BUDGET {
            return Ok(());
        }
        let evicted = family.evict_some(PageCount(resident - BUDGET))?;
        match evicted.stopped {
            None => {}
            // The disk is behind.
            Some(manager::Error::PutSwap { source, .. }) if source.kind() == ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(1));
            }
            Some(error) => return Err(error.into()),
        }
    }
}

/// Reads all that a VM sees. How many pages have changed since the beginning.
fn read(family: &Local, vm: LocalVm) -> Result<u64, Box<dyn Error>> {
    let (memory, mut bytes, mut changed) = (family.memory(vm)?, vec![0; 4096], 0);
    for number in 0..PAGES {
        memory.read_slice(&mut bytes, GuestAddress(number << 12))?;
        changed += u64::from(bytes != page(number));
        if number % 128 == 0 {
            shrink(family)?;
        }
    }
    Ok(changed)
}

/// Writes, forks, evicts, and reads everything again.
pub fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::temp_dir().join(format!("guest-mem-swap-{}", std::process::id()));
    let options = SwapOptions { path: Some(path.clone()), size: Some(64 << 20), compressed: 1 << 20 };
    let swap = Arc::new(Mutex::new(SwapStore::open(options)?));
    std::fs::remove_file(&path)?;
    let ram = vec![GfnRange::new(Gfn(0), PageCount(PAGES))];
    let family = Local::with_options(ram, Options::default().swap(Arc::clone(&swap) as _))?;

    let base = family.launch()?;
    let memory = family.memory(base)?;
    (0..PAGES).try_for_each(|number| memory.write_slice(&page(number), GuestAddress(number << 12)))?;
    let workers = [family.fork(base)?, family.fork(base)?, family.fork(base)?];
    // What has been written back to its store can be evicted.
    family.write_back()?;
    shrink(&family)?;
    let out = family.stats()?;
    println!("{} pages are in memory, {} in swap only", out.totals.resident, out.totals.swapped);
    assert!(out.totals.swapped >= PAGES - BUDGET);
    assert!(swap.lock().unwrap().stats().disk_bytes > 0, "some went to the disk");

    for (count, &worker) in (1..).zip(&workers) {
        (0..count).try_for_each(|number| {
            family.memory(worker)?.write_obj(count, GuestAddress(number << 12)).map_err(Box::<dyn Error>::from)
        })?;
        assert_eq!(read(&family, worker)?, count, "what it wrote, and nothing else");
    }
    assert_eq!(read(&family, base)?, 0);
    let end = family.stats()?;
    println!("{} pages went out, {} came back: {:?}", end.swap.swap_out_pages, end.swap.swap_in_pages, end);
    assert!(end.swap.swap_in_pages >= PAGES && end.totals.resident <= BUDGET + 128);
    Ok(())
}
