//! A file's pages in a memfd: read whole before anybody maps them, and the same memfd for every family that maps a file of
//! the same content.
//!
//! No page is missing, so that nobody who looks at one changes what the others see: a hole of a memfd becomes a page of zeros
//! when it is touched untrapped. And whoever changes the file later changes nothing here.
//!
//! So under pressure file pages stay, though they need not go to swap to be read again: to evict one is to make a hole, and a
//! hole of this memfd is not one family's own. They count as memory in use, once for each content.

use super::FileStore;
use super::memfd::write_all;
use crate::addr::{PAGE_SIZE, PageCount, PageIndex, PageRange};
use crate::sys::Memfd;
use nix::sys::stat::fstat;
use nix::sys::uio::pread;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A file's store.
#[derive(Debug)]
pub struct MemfdFile {
    file: Memfd,
    read_only: OwnedFd,
    inode: u64,
    sum: u32,
}

/// So much is read at a time: little, since an allocator that has once been given back a large buffer keeps as much for later.
const CHUNK: usize = 16 * PAGE_SIZE;

impl MemfdFile {
    /// The store of the next `len` bytes of a file.
    ///
    /// # Errors
    /// `UnexpectedEof`: there are fewer. Otherwise the file cannot be read, or the host has no memory or no descriptors left.
    pub fn read(mut from: impl Read, len: u64) -> io::Result<Self> {
        let file = Memfd::new("offshoot-store", PageCount::covering(len))?;
        let (mut sum, mut chunk, mut at) = (crc32fast::Hasher::new(), vec![0; CHUNK], 0);
        while at < len {
            let part = (len - at).min(CHUNK as u64) as usize;
            from.read_exact(&mut chunk[..part])?;
            sum.update(&chunk[..part]);
            let whole = part.next_multiple_of(PAGE_SIZE);
            chunk[part..whole].fill(0);
            write_all(&file, PageIndex(at / PAGE_SIZE as u64), &chunk[..whole])?;
            at += part as u64;
        }
        let read_only = file.read_only()?;
        let inode = fstat(&file)?.st_ino;
        Ok(Self { file, read_only, inode, sum: sum.finalize() })
    }

    /// How many pages the file fills, the last one perhaps in part.
    pub fn pages(&self) -> PageCount {
        self.file.pages()
    }

    /// The descriptor for windows: it cannot be written through.
    pub fn read_only(&self) -> BorrowedFd<'_> {
        self.read_only.as_fd()
    }

    /// The memfd's inode, by which `/proc/PID/maps` names it.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// A checksum of its content: files that differ have the same now and then, and on purpose if somebody wants it so.
    pub fn sum(&self) -> u32 {
        self.sum
    }

    /// Whether `other`, a read-only descriptor of another such store, has the same pages.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn is_same(&self, other: BorrowedFd<'_>) -> io::Result<bool> {
        if fstat(other)?.st_size as u64 != self.pages().bytes() {
            return Ok(false);
        }
        let (mut ours, mut theirs) = (vec![0; CHUNK], vec![0; CHUNK]);
        for at in (0..self.pages().bytes()).step_by(CHUNK) {
            let read = [read_up_to(self.read_only(), at, &mut ours)?, read_up_to(other, at, &mut theirs)?];
            if read[0] != read[1] || ours[..read[0]] != theirs[..read[1]] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Reads until the buffer is full, or the file ends.
fn read_up_to(file: BorrowedFd<'_>, at: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match pread(file, &mut buf[done..], (at + done as u64) as i64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

impl FileStore for MemfdFile {
    /// All are.
    fn ensure(&self, _pages: PageRange) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()> {
        let done = read_up_to(self.read_only(), first.offset(), buf)?;
        buf[done..].fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{Whence, lseek};

    /// Whoever touched a page untrapped that had not been read from the file yet made it zeros, for all who map the file.
    #[test]
    fn all_pages_are_there_before_anybody_maps_them() {
        let mut content = vec![7; 300 * PAGE_SIZE + 10];
        // Zeros are no holes.
        content[PAGE_SIZE..200 * PAGE_SIZE].fill(0);
        let store = MemfdFile::read(content.as_slice(), content.len() as u64).unwrap();
        assert_eq!(store.pages(), PageCount(301));
        assert_eq!(lseek(store.read_only(), 0, Whence::SeekHole).unwrap() as u64, store.pages().bytes());
        let mut page = [1; PAGE_SIZE];
        store.read(PageIndex(300), &mut page).unwrap();
        assert_eq!((page[9], page[10], page[PAGE_SIZE - 1]), (7, 0, 0));
        store.read(PageIndex(301), &mut page).unwrap();
        assert_eq!(page, [0; PAGE_SIZE]);
    }

    #[test]
    fn content_alone_says_what_is_the_same() {
        let read = |bytes: &[u8]| MemfdFile::read(bytes, bytes.len() as u64).unwrap();
        let mut content = vec![3; CHUNK + 5 * PAGE_SIZE];
        let (one, again) = (read(&content), read(&content));
        content[CHUNK + 7] = 4;
        let (other, shorter) = (read(&content), read(&content[..CHUNK]));
        assert!(one.is_same(again.read_only()).unwrap() && one.sum() == again.sum());
        assert!(!one.is_same(other.read_only()).unwrap() && !one.is_same(shorter.read_only()).unwrap());
        let short = MemfdFile::read(&content[..10], 11).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
    }
}
