//! The swap that all families share: opened when the first page goes there, unless it was asked for by name.

use super::swap_place::{is_spare, mark};
use crate::client::Home;
use crate::server::watch::Origin;
use crate::server::{Error, FamilyManager, Server};
use event_manager::EventSet;
use guest_mem::ids::SwapSlot;
use guest_mem::swap::{Fetch, Swap, SwapOptions, SwapStats, SwapStore};
use guest_mem::{PAGE_SIZE, PageCount};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Which swap a server is to have. What is not said is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SwapConfig {
    /// A file, or a block device.
    pub path: Option<PathBuf>,
    /// How many bytes of it.
    pub size: Option<u64>,
    /// How many bytes of compressed pages may be in memory before they go there.
    pub compressed: Option<u64>,
    /// Whether what else the path may have may go.
    pub force: bool,
}

/// A file system that outlives a host's memory, where the home's does not.
const DISK: &str = "/var/tmp";

/// A server's swap.
#[derive(Debug)]
pub struct HostSwap {
    store: Option<SwapStore>,
    /// The home, for the file that is made when it is needed.
    home: PathBuf,
    compressed: u64,
    /// The compressed tier takes no more than this, whatever it was given.
    bound: u64,
    /// The store was opened, and nobody watches its event yet.
    unwatched: bool,
    /// The most memory that compressed pages have taken since the heap was last trimmed.
    peak: u64,
    /// Why the store could not be opened.
    failure: Option<(io::ErrorKind, String)>,
}

/// Memory that is worth a walk over the heap, and what can be given back in some milliseconds.
const TRIM: u64 = 16 << 20;
const TRIMMED: u64 = 32 << 20;

impl HostSwap {
    /// The swap of a server.
    ///
    /// # Errors
    /// What was asked for by name cannot be had.
    pub fn new(home: &Home, config: SwapConfig) -> Result<Self, Error> {
        // Servers left a file with a name here once, where they were killed.
        if let Err(error) = std::fs::remove_file(file_in(home.path()))
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("remove the swap file of an earlier server: {error}");
        }
        let compressed = config.compressed.unwrap_or_else(|| host_memory() / 4);
        let home = home.path().to_owned();
        let mut swap =
            Self { store: None, home, compressed, bound: u64::MAX, unwatched: false, peak: 0, failure: None };
        if let Some(path) = &config.path {
            let store = open_named(&config, path, compressed);
            swap.adopt(store.map_err(Error::Swap)?);
        }
        Ok(swap)
    }

    fn adopt(&mut self, store: SwapStore) {
        self.store = Some(store);
        self.unwatched = true;
    }

    /// The store, opened now if it was not.
    fn store(&mut self) -> io::Result<&mut SwapStore> {
        if self.store.is_none() {
            if let Some((kind, why)) = &self.failure {
                return Err(io::Error::new(*kind, why.clone()));
            }
            match open_default(&self.home, self.compressed.min(self.bound)) {
                Ok(store) => self.adopt(store),
                Err(error) => {
                    log::error!("swap: {error}");
                    self.failure = Some((error.kind(), error.to_string()));
                    return Err(error);
                }
            }
        }
        Ok(self.store.as_mut().expect("opened above"))
    }

    /// Keeps the compressed tier below `bytes`.
    pub fn bound(&mut self, bytes: u64) {
        if self.bound != bytes {
            self.bound = bytes;
            if let Some(store) = &mut self.store {
                store.set_compressed(self.compressed.min(bytes));
            }
        }
    }

    /// What it holds and has done.
    pub fn stats(&self) -> SwapStats {
        self.store.as_ref().map(SwapStore::stats).unwrap_or_default()
    }

    /// The store, if it has been opened since this was last asked.
    pub fn take_unwatched(&mut self) -> Option<&SwapStore> {
        self.store.as_ref().filter(|_| std::mem::take(&mut self.unwatched))
    }

    /// Takes in what the disk has done. Whether somebody may have waited for it.
    pub fn complete(&mut self) -> bool {
        self.store.as_mut().is_some_and(SwapStore::complete)
    }

    /// Where compressed pages took much more memory than they do now, gives that back to the host, and not so much at a time
    /// that it takes long.
    pub fn trim(&mut self) {
        let now = self.stats().compressed_bytes;
        self.peak = self.peak.max(now);
        let all_freed = now == 0 && self.peak > 0;
        if all_freed || self.peak - now >= (self.peak / 2).clamp(TRIM, TRIMMED) {
            crate::host::heap::trim();
            self.peak = now;
        }
    }
}

impl Swap for HostSwap {
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
        self.store()?.put(pages)
    }

    fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        self.store()?.get(first, buf)
    }

    fn expect(&mut self, first: SwapSlot, count: PageCount) -> PageCount {
        self.store.as_mut().map_or(PageCount(0), |store| store.expect(first, count))
    }

    fn get_expected(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        self.store()?.get_expected(first, buf)
    }

    fn count_hits(&mut self, pages: PageCount) {
        if let Some(store) = &mut self.store {
            store.count_hits(pages);
        }
    }

    fn free(&mut self, first: SwapSlot, count: PageCount) {
        if let Some(store) = &mut self.store {
            store.free(first, count);
        }
    }

    fn used(&self) -> Option<Vec<(SwapSlot, PageCount)>> {
        self.store.as_ref().and_then(Swap::used)
    }
}

fn file_in(home: &Path) -> PathBuf {
    home.join("swap")
}

fn host_memory() -> u64 {
    crate::host::total_memory().unwrap_or(0)
}

/// As large as the host's memory twice, if the file system has room.
fn default_size(directory: &Path) -> io::Result<u64> {
    let file_system = statfs(directory)?;
    let free = file_system.blocks_available().saturating_mul(file_system.block_size() as u64);
    Ok(free.min(host_memory().saturating_mul(2)))
}

fn open_named(config: &SwapConfig, path: &Path, compressed: u64) -> io::Result<SwapStore> {
    let context = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(error.kind(), format!("swap on {}: another server uses it", path.display()))
        }
        // The store's own errors name it.
        kind if !error.to_string().contains(&path.display().to_string()) => {
            io::Error::new(kind, format!("swap on {}: {error}", path.display()))
        }
        _ => error,
    };
    if !config.force && !is_spare(path, config.size).map_err(context)? {
        let why = "it is not empty, and no server's: name another, or have it emptied with --force";
        return Err(context(io::Error::new(io::ErrorKind::AlreadyExists, why)));
    }
    // A file that is not there, or is empty, has no size of its own.
    let size = match std::fs::metadata(path) {
        _ if config.size.is_some() => config.size,
        Ok(found) if found.is_file() && found.len() > 0 => Some(found.len()),
        Ok(found) if !found.is_file() => File::open(path).and_then(|mut device| device.seek(SeekFrom::End(0))).ok(),
        _ => {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Some(default_size(directory).map_err(context)?)
        }
    };
    // The last page is for the mark.
    let pages = size.map(|size| size.saturating_sub(PAGE_SIZE as u64));
    let store =
        SwapStore::open(SwapOptions { path: Some(path.to_owned()), size: pages, compressed }).map_err(context)?;
    size.map_or(Ok(()), |size| mark(path, size)).map_err(context)?;
    Ok(store)
}

/// The file in the home. Where that would be memory again, one without a name on a disk; where there is none, the
/// compressed tier is all.
fn open_default(home: &Path, compressed: u64) -> io::Result<SwapStore> {
    let disk = Path::new(DISK);
    let (file, directory) = if !is_memory(home) {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(file_in(home))?;
        // However the server ends, what guests had in memory does not stay on the disk.
        std::fs::remove_file(file_in(home))?;
        (file, home)
    } else if !is_memory(disk)
        && let Ok(file) = unnamed_in(disk)
    {
        (file, disk)
    } else {
        log::warn!("swap: neither {} nor {DISK} is on a disk: memory for compressed pages is all", home.display());
        return SwapStore::open(SwapOptions { path: None, size: None, compressed });
    };
    let size = Some(default_size(directory)?);
    SwapStore::open_file(file, &SwapOptions { path: None, size, compressed })
}

fn unnamed_in(directory: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(directory)
}

fn is_memory(directory: &Path) -> bool {
    const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
    statfs(directory).is_ok_and(|found| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&found.filesystem_type()))
}

impl Server {
    /// Watches the swap once it is there.
    pub fn watch_swap(&mut self) {
        if let Some(store) = self.memory.swap.borrow_mut().take_unwatched() {
            self.watches.add(store.event(), EventSet::IN, Origin::Swap);
        }
    }

    /// Reads from swap have ended, or writes.
    pub fn swap_moved(&mut self) {
        let came = self.memory.swap.borrow_mut().complete();
        self.memory.reclaims.swap_moved();
        if came {
            self.pages_came();
        }
    }

    /// Brings some pages back that nobody has asked for yet, unless others had to go for them. Whether there are more.
    pub fn bring_ahead(&mut self) -> bool {
        if !self.memory.families.values().any(FamilyManager::has_ahead) {
            return false;
        }
        let room = self.room_ahead();
        let mut more = false;
        for manager in self.memory.families.values_mut() {
            manager.set_room_ahead(room);
            more |= manager.bring_ahead();
        }
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::TempDir;

    fn swap(dir: &TempDir, config: SwapConfig) -> Result<HostSwap, Error> {
        HostSwap::new(&Home::at(dir.path()).unwrap(), config)
    }

    #[test]
    fn the_file_is_made_with_the_first_page() {
        let dir = TempDir::new();
        let file = file_in(dir.path());
        std::fs::write(&file, "of a server that was killed").unwrap();
        let mut swap = swap(&dir, SwapConfig { compressed: Some(1 << 20), ..SwapConfig::default() }).unwrap();
        assert!(!file.exists() && swap.take_unwatched().is_none());
        assert_eq!(swap.stats(), SwapStats::default());
        let slot = swap.put(&[7; 4096]).unwrap();
        assert!(swap.take_unwatched().is_some() && swap.take_unwatched().is_none());
        assert!(!file.exists(), "it has no name");
        swap.bound(64 << 10);
        swap.free(slot, PageCount(1));
        assert_eq!(swap.stats().slots_used, 0);
    }

    #[test]
    fn what_was_asked_for_is_there_at_once_and_stays() {
        let dir = TempDir::new();
        let path = dir.path().join("mine");
        let config = |path: &Path| SwapConfig {
            path: Some(path.into()),
            size: Some(1 << 20),
            compressed: Some(0),
            force: false,
        };
        let first = swap(&dir, config(&path)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
        let refusal = swap(&dir, config(&path)).unwrap_err().to_string();
        assert_eq!(refusal, format!("swap on {}: another server uses it", path.display()));
        drop(first);
        assert!(path.exists());
        assert!(swap(&dir, config(&dir.path().join("no/such"))).is_err());
        assert!(swap(&dir, config(dir.path())).is_err());
        assert!(swap(&dir, SwapConfig { path: Some(path.clone()), ..SwapConfig::default() }).is_ok());
        // What somebody else has there stays.
        std::fs::write(&path, "thesis").unwrap();
        let refusal = swap(&dir, config(&path)).unwrap_err().to_string();
        assert!(refusal.starts_with(&format!("swap on {}: it is not empty", path.display())), "{refusal}");
        assert_eq!(std::fs::read(&path).unwrap(), b"thesis");
        assert!(swap(&dir, SwapConfig { force: true, ..config(&path) }).is_ok());
    }
}
