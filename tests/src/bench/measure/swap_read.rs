//! Memory back from disk, in order, beside the file read directly.

use super::PRIVATE;
use super::swap_in::{process_of, read};
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{FIRST_PAGE, wait};
use crate::stats::{Samples, timed};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use vmm::machine::WINDOW_BASE;
use vmm::units::ByteSize;

const PAGE: u64 = 4096;
/// A cluster of pages that do not get smaller, and its header's block: what Offshoot reads at a time.
const FRAME: usize = 17 * 4096;
/// Reads under way at a time: what waits for one, and the largest window of read-ahead.
const DEPTH: usize = 8;

pub fn run(bench: &mut Bench) -> Result<()> {
    // On the disk, which a temporary directory may not be.
    let place = directory_on_disk()?;
    let file = place.0.join("swap");
    let swap = format!("{}:1G", file.display());
    let home = bench.home_with(&["--swap", &swap, "--compressed", "1M"])?;
    let parent = home.launch_settled("p", 256, PRIVATE)?;
    let pid = process_of(&parent)?;
    let [mut ours, mut direct] = [(); 2].map(|()| Samples::default());
    let mut back = Vec::new();
    for _ in bench.rounds(7, 3) {
        parent.reclaim(ByteSize::mib(64))?;
        let total = || Some(home.client().stats().ok()?.total);
        let before = wait("all is on the disk", || total().filter(|total| total.compressed_bytes < 4 << 20))?;
        let start = WINDOW_BASE + FIRST_PAGE * PAGE;
        let mut bytes = vec![0; 64 << 10];
        let (done, us) =
            timed(|| (0..PRIVATE / 16).try_for_each(|nth| read(pid, start + nth * (64 << 10), &mut bytes).map(drop)));
        done?;
        let came = home.client().stats()?.total.swap_in_pages - before.swap_in_pages;
        ours.push((came * PAGE) as f64 / us);
        back.push(came);
        let size = came * PAGE / (64 << 10) * FRAME as u64;
        let (done, us) = timed(|| read_directly(&file, size));
        done?;
        // Its headers are no memory that came back.
        direct.push((came * PAGE) as f64 / us);
    }
    let reference = Some(("O_DIRECT, 68 KiB, depth 8", &direct));
    bench.figure(&Figure { of: "in order".into(), unit: "MB/s", subject: &ours, reference, aim: Aim::AtLeast(0.7) });
    bench.note(format!(
        "pages that came back from disk: {back:?} of {PRIVATE}; the reader is process_vm_readv, 64 KiB at a time"
    ));
    Ok(())
}

struct Place(std::path::PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn directory_on_disk() -> Result<Place> {
    Ok(Place(nix::unistd::mkdtemp(Path::new("/var/tmp/offshoot-bench-XXXXXX"))?))
}

/// Reads so many bytes of a file, past the page cache.
fn read_directly(path: &Path, size: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..DEPTH).map(|_| scope.spawn(|| reader(&file, &next, size))).collect();
        readers.into_iter().try_for_each(|reader| reader.join().map_err(|_| "a reader panicked")?)
    })
}

fn reader(file: &File, next: &AtomicU64, size: u64) -> Result<()> {
    let mut room = vec![0; FRAME + 4096];
    let skip = room.as_ptr().align_offset(4096);
    loop {
        let at = next.fetch_add(FRAME as u64, Ordering::Relaxed);
        if at + FRAME as u64 > size {
            return Ok(());
        }
        file.read_exact_at(&mut room[skip..skip + FRAME], at)?;
    }
}
