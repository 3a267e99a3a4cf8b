//! A file's pages in a memfd: filled from the file on first touch, the same memfd for every family that maps the file.

use super::memfd::MemfdStore;
use super::{FileStore, Store, StoreFactory};
use crate::addr::{Gfn, GfnRange, PAGE_SIZE, PageCount, PageIndex};
use rangemap::RangeSet;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

/// Where a file's bytes come from.
#[derive(Debug)]
pub enum Content {
    /// They are part of the program.
    Bytes(&'static [u8]),
    /// They are read from a file, which must not change while it is in use.
    File(File),
}

/// A file's store.
#[derive(Debug)]
pub struct MemfdFile {
    content: Content,
    pages: PageCount,
    inner: RefCell<Filled>,
}

#[derive(Debug)]
struct Filled {
    store: MemfdStore,
    pages: RangeSet<u64>,
}

impl MemfdFile {
    /// The store of a file; it holds no page yet.
    ///
    /// # Errors
    /// The file's length is not to be had, or the host has no memory or no descriptors left.
    pub fn new(content: Content, stores: &mut super::memfd::MemfdStores) -> io::Result<Self> {
        let len = match &content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::File(file) => file.metadata()?.len(),
        };
        let pages = PageCount::covering(len);
        let inner = RefCell::new(Filled { store: stores.create(pages)?, pages: RangeSet::new() });
        Ok(Self { content, pages, inner })
    }

    /// How many pages the file fills, the last one perhaps in part.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// How many of them are in memory.
    pub fn resident(&self) -> PageCount {
        PageCount(self.inner.borrow().pages.iter().map(|part| part.end - part.start).sum())
    }

    /// Runs `action` with the descriptor for windows.
    pub fn with_read_only<R>(&self, action: impl FnOnce(BorrowedFd<'_>) -> R) -> R {
        action(self.inner.borrow().store.read_only())
    }

    /// The memfd's inode, by which `/proc/PID/maps` names it.
    pub fn inode(&self) -> u64 {
        self.inner.borrow().store.inode()
    }

    /// Reads what the file has from `first` on; zeros after its end.
    fn read_content(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()> {
        let at = first.offset();
        buf.fill(0);
        match &self.content {
            Content::Bytes(bytes) => {
                let rest = &bytes[usize::try_from(at).map_or(bytes.len(), |at| at.min(bytes.len()))..];
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(())
            }
            Content::File(file) => {
                let mut done = 0;
                while done < buf.len() {
                    match file.read_at(&mut buf[done..], at + done as u64)? {
                        0 => break,
                        n => done += n,
                    }
                }
                Ok(())
            }
        }
    }
}

impl FileStore for MemfdFile {
    fn ensure(&self, pages: GfnRange) -> io::Result<()> {
        let pages = pages.intersect(GfnRange::new(Gfn(0), self.pages));
        let mut filled = self.inner.borrow_mut();
        let missing: Vec<GfnRange> = filled.pages.gaps(&pages.raw()).map(GfnRange::from).collect();
        for part in missing {
            let mut bytes = vec![0; part.count().0 as usize * PAGE_SIZE];
            let first = PageIndex(part.start().0);
            self.read_content(first, &mut bytes)?;
            if let Err(error) = filled.store.fill(first, &bytes) {
                if error.kind() != io::ErrorKind::AlreadyExists {
                    // What did get in would be in the way of the next try.
                    filled.store.punch(first, part.count());
                }
                return Err(error);
            }
            filled.pages.insert(part.raw());
        }
        filled.store.rest();
        Ok(())
    }

    fn read(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()> {
        self.read_content(first, buf)
    }
}

#[cfg(test)]
mod tests {
    use super::super::memfd::MemfdStores;
    use super::*;
    use std::io::Write;

    #[test]
    fn pages_come_in_when_they_are_needed_and_end_in_zeros() {
        let path = std::env::temp_dir().join(format!("offshoot-file-{}", std::process::id()));
        let mut file = File::create_new(&path).unwrap();
        file.write_all(&[7; PAGE_SIZE + 10]).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let store = MemfdFile::new(Content::File(file), &mut MemfdStores::new(None)).unwrap();
        assert_eq!((store.pages(), store.resident()), (PageCount(2), PageCount(0)));
        store.ensure(GfnRange::new(Gfn(1), PageCount(9))).unwrap();
        store.ensure(GfnRange::new(Gfn(1), PageCount(1))).unwrap();
        assert_eq!(store.resident(), PageCount(1));
        let mut page = [1; PAGE_SIZE];
        store.inner.borrow().store.read(PageIndex(1), &mut page).unwrap();
        assert_eq!((page[9], page[10], page[PAGE_SIZE - 1]), (7, 0, 0));
    }
}
