//! Stores that are memfds: what windows of other processes map.

use super::file::MemfdFile;
use super::{Store, StoreFactory};
use crate::addr::{PageCount, PageIndex, PageRange};
use crate::swap::handle::SharedSwap;
use crate::sys::{Alias, FillError, Memfd, Userfaultfd};
use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{Whence, lseek};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;

/// Makes memfd stores. They are filled through this process's userfaultfd; on a host without one they are written
/// plainly, which nobody may look at meanwhile.
#[derive(Debug)]
pub struct MemfdStores {
    userfaultfd: Option<Arc<Userfaultfd>>,
    swap: SharedSwap,
    /// The next store, made while there was time.
    spare: Option<MemfdStore>,
    closer: Arc<Closer>,
}

/// Closes files of stores. Whoever is the last to have one waits until all its pages are freed: that is a thread of its own,
/// made with the first.
#[derive(Debug, Default)]
struct Closer(OnceLock<Option<Sender<StoreFiles>>>);

impl Closer {
    fn close(&self, files: StoreFiles) {
        let start = || {
            let (closer, stores) = mpsc::channel();
            let thread = thread::Builder::new().name("closer".into());
            thread.spawn(move || stores.into_iter().for_each(drop)).ok().map(|_| closer)
        };
        if let Some(closer) = self.0.get_or_init(start) {
            // Where the thread is gone, the files are closed here.
            drop(closer.send(files));
        }
    }
}

/// Names of the files, as `/proc/PID/maps` has them.
const STORE: &str = "offshoot-store";
const SHARED: &str = "offshoot-shared";

/// What a store is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Frozen pages: nobody but we can write them.
    Frozen,
    /// Memory that several VMs write.
    Shared,
}

/// All by which this process holds on to a store's pages.
#[derive(Debug)]
struct StoreFiles {
    file: Memfd,
    read_only: OwnedFd,
    /// Mapped while pages are filled in.
    alias: Option<Alias>,
}

/// A store that is a memfd.
#[derive(Debug)]
pub struct MemfdStore {
    of: Content,
    /// There until the store is dropped.
    files: Option<StoreFiles>,
    inode: u64,
    userfaultfd: Option<Arc<Userfaultfd>>,
    /// What was filled in, and is in our page tables still.
    filled: Vec<PageRange>,
    closer: Arc<Closer>,
}

/// So many stretches, or pages, are taken out of our page tables together: a call for each interrupts all processors that
/// we run on.
const STRETCHES: usize = 16;
const FILLED: PageCount = PageCount(256);

impl MemfdStores {
    /// Stores filled through `userfaultfd`, or plainly.
    pub fn new(userfaultfd: Option<Arc<Userfaultfd>>) -> Self {
        Self { userfaultfd, swap: SharedSwap::default(), spare: None, closer: Arc::default() }
    }

    /// The same, whose pages can be evicted to `swap`.
    #[must_use]
    pub fn with_swap(self, swap: SharedSwap) -> Self {
        Self { swap, ..self }
    }

    fn make(&self, name: &str, of: Content, pages: PageCount) -> io::Result<MemfdStore> {
        let file = Memfd::new(name, pages)?;
        let read_only = file.read_only()?;
        let inode = fstat(&file)?.st_ino;
        Ok(MemfdStore {
            of,
            files: Some(StoreFiles { file, read_only, alias: None }),
            inode,
            userfaultfd: self.userfaultfd.clone(),
            filled: Vec::new(),
            closer: Arc::clone(&self.closer),
        })
    }
}

impl Clone for MemfdStores {
    fn clone(&self) -> Self {
        let (userfaultfd, swap) = (self.userfaultfd.clone(), self.swap.clone());
        Self { userfaultfd, swap, spare: None, closer: Arc::clone(&self.closer) }
    }
}

impl StoreFactory for MemfdStores {
    type Store = MemfdStore;
    type File = MemfdFile;
    type Swap = SharedSwap;

    fn create(&mut self, pages: PageCount) -> io::Result<MemfdStore> {
        match self.spare.take_if(|spare| spare.files().file.pages() == pages) {
            Some(spare) => Ok(spare),
            None => self.make(STORE, Content::Frozen, pages),
        }
    }

    fn create_shared(&mut self, pages: PageCount) -> io::Result<MemfdStore> {
        self.make(SHARED, Content::Shared, pages)
    }

    fn stock_up(&mut self, pages: PageCount) {
        if self.spare.is_none() {
            // Where there is no room for it, the next store is made when it is needed.
            self.spare = self.make(STORE, Content::Frozen, pages).ok();
        }
    }

    fn swap(&mut self) -> &mut SharedSwap {
        &mut self.swap
    }
}

impl MemfdStore {
    fn files(&self) -> &StoreFiles {
        self.files.as_ref().expect("a store has files until it is dropped")
    }

    /// The descriptor for windows. It cannot be written through, unless the store is shared memory: that goes to nobody but
    /// the VMs that have it.
    pub fn for_windows(&self) -> BorrowedFd<'_> {
        match self.of {
            Content::Frozen => self.files().read_only.as_fd(),
            Content::Shared => self.files().file.as_fd(),
        }
    }

    /// A descriptor that cannot be written through.
    pub fn read_only(&self) -> BorrowedFd<'_> {
        self.files().read_only.as_fd()
    }

    /// The file's inode, by which `/proc/PID/maps` names it.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The alias does not keep what was filled in for long.
    fn note_filled(&mut self, pages: PageRange) {
        match self.filled.last_mut() {
            Some(last) if last.end() == pages.start() => *last = PageRange::between(last.start(), pages.end()),
            _ => self.filled.push(pages),
        }
        let count: u64 = self.filled.iter().map(|pages| pages.count().0).sum();
        if (self.filled.len() > STRETCHES || count >= FILLED.0)
            && let Some(alias) = self.files.as_ref().and_then(|files| files.alias.as_ref())
        {
            self.filled.drain(..).for_each(|pages| alias.forget(PageIndex(pages.start().0), pages.count()));
        }
    }
}

impl Drop for MemfdStore {
    fn drop(&mut self) {
        if let Some(files) = self.files.take() {
            self.closer.close(files);
        }
    }
}

impl Store for MemfdStore {
    fn fill(&mut self, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
        let StoreFiles { file, alias, .. } = self.files.as_mut().expect("a store has files until it is dropped");
        let Some(userfaultfd) = &self.userfaultfd else {
            return write_all(file, first, bytes);
        };
        let alias = match alias {
            Some(alias) => alias,
            None => alias.insert(Alias::new(file, Arc::clone(userfaultfd))?),
        };
        let filled = alias.fill(first, bytes).map_err(|error| match error {
            FillError::Planted(_) => io::Error::new(io::ErrorKind::AlreadyExists, error),
            FillError::Call { .. } => io::Error::other(error),
        });
        self.note_filled(PageRange::new(first, PageCount::covering(bytes.len() as u64)));
        filled
    }

    fn read(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match pread(&self.files().file, &mut buf[done..], first.offset() as i64 + done as i64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    fn punch(&mut self, first: PageIndex, count: PageCount) {
        if let Err(error) = self.files().file.punch(first, count) {
            log::error!("pages {first:?}+{} of a store stay allocated: {error}", count.0);
        }
    }

    fn extents(&self) -> io::Result<Vec<PageRange>> {
        extents(self.read_only())
    }

    fn resident(&self) -> io::Result<PageCount> {
        // It counts in blocks of 512 bytes, whatever the file system's are.
        Ok(PageCount::covering(fstat(&self.files().file)?.st_blocks as u64 * 512))
    }

    fn rest(&mut self) {
        if let Some(files) = &mut self.files {
            files.alias = None;
        }
        self.filled.clear();
    }
}

/// The pages that are there of the store that has this descriptor, in order. To go over them takes the kernel some 10 ms for
/// each GiB, in one call.
///
/// # Errors
/// Of `lseek`.
pub fn extents(store: impl AsFd) -> io::Result<Vec<PageRange>> {
    let mut extents = Vec::new();
    let mut at = 0;
    loop {
        let start = match lseek(&store, at, Whence::SeekData) {
            Err(Errno::ENXIO) => return Ok(extents),
            found => found?,
        };
        at = lseek(&store, start, Whence::SeekHole)?;
        extents.push(PageRange::between(PageIndex::of_offset(start as u64), PageIndex::of_offset(at as u64)));
    }
}

pub(super) fn write_all(file: &Memfd, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match pwrite(file, &bytes[done..], first.offset() as i64 + done as i64)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => done += n,
        }
    }
    Ok(())
}
