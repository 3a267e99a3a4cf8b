//! Files that are mapped into guests: one store for each content, for as long as a VM maps it.
//!
//! A file is read whole, by a thread, before its VM is launched: one after the other, so that the second of two that are the
//! same finds the first. What is written to it later is not seen by anybody.

use crate::api::{ErrorKind, Failure, Launch};
use crate::nice;
use crate::server::Server;
use crate::server::ids::ClientId;
use crate::server::registry::launch::Guest;
use guest_mem::PageCount;
use guest_mem::store::file::MemfdFile;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The files that somebody maps, and launches that wait for theirs.
#[derive(Debug)]
pub struct Files {
    all: Vec<Weak<MemfdFile>>,
    builtin: Weak<MemfdFile>,
    /// The first of them is being read.
    waiting: VecDeque<Waiting>,
    /// Rings when it has been read.
    bell: EventFd,
    has_read: (Sender<io::Result<HasRead>>, Receiver<io::Result<HasRead>>),
}

/// A launch that waits for its initrd.
#[derive(Debug)]
struct Waiting {
    client: ClientId,
    launch: Launch,
    guest: Guest,
    initrd: File,
    len: u64,
    /// Those that it is compared with: they stay as long.
    others: Vec<Rc<MemfdFile>>,
}

/// A file that was read, and the inode of another store of the same content.
#[derive(Debug)]
struct HasRead(MemfdFile, Option<u64>);

/// What a file is compared with: checksum, inode, and a descriptor.
type Other = (u32, u64, OwnedFd);

impl Files {
    /// None yet.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new() -> io::Result<Self> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { all: Vec::new(), builtin: Weak::new(), waiting: VecDeque::new(), bell, has_read: channel() })
    }

    /// Rings when a file has been read.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// The built-in guest's pages.
    ///
    /// # Errors
    /// The host has no memory or no descriptors left.
    pub fn builtin(&mut self, image: &'static [u8]) -> io::Result<Rc<MemfdFile>> {
        if let Some(file) = self.builtin.upgrade() {
            return Ok(file);
        }
        let file = Rc::new(MemfdFile::read(image, image.len() as u64)?);
        self.builtin = Rc::downgrade(&file);
        self.keep(&file);
        Ok(file)
    }

    fn keep(&mut self, file: &Rc<MemfdFile>) {
        self.all.retain(|file| file.strong_count() > 0);
        self.all.push(Rc::downgrade(file));
    }

    /// Pages of all of them, which are in memory.
    pub fn resident(&self) -> PageCount {
        PageCount(self.all.iter().filter_map(Weak::upgrade).map(|file| file.pages().0).sum())
    }

    /// Begins to read the first file that is waited for.
    ///
    /// # Errors
    /// No thread, or no descriptors.
    fn begin(&mut self, niceness: i32) -> io::Result<()> {
        let Some(first) = self.waiting.front_mut() else { return Ok(()) };
        first.others = self.all.iter().filter_map(Weak::upgrade).collect();
        let duplicate = |file: &Rc<MemfdFile>| Ok((file.sum(), file.inode(), file.read_only().try_clone_to_owned()?));
        let others: Vec<Other> = first.others.iter().map(duplicate).collect::<io::Result<_>>()?;
        let (file, len) = (first.initrd.try_clone()?, first.len);
        let (done, bell) = (self.has_read.0.clone(), self.bell.try_clone()?);
        thread::Builder::new().name("files".into()).spawn(move || {
            if let Err(error) = nice::set(niceness) {
                log::debug!("niceness of a thread that reads files: {error}");
            }
            // The server is there, or nobody is interested.
            let _ = done.send(read(file, len, &others)).map(|()| bell.write(1));
        })?;
        Ok(())
    }

    /// The store for a file that was read.
    fn adopt(&mut self, HasRead(file, same): HasRead, others: &[Rc<MemfdFile>]) -> Rc<MemfdFile> {
        match others.iter().find(|other| same == Some(other.inode())) {
            Some(other) => Rc::clone(other),
            None => {
                let file = Rc::new(file);
                self.keep(&file);
                file
            }
        }
    }
}

fn read(file: File, len: u64, others: &[Other]) -> io::Result<HasRead> {
    let file = MemfdFile::read(file, len)?;
    for (sum, inode, other) in others {
        if *sum == file.sum() && file.is_same(other.as_fd())? {
            return Ok(HasRead(file, Some(*inode)));
        }
    }
    Ok(HasRead(file, None))
}

impl Server {
    /// Launches a VM as soon as its initrd, of `len` bytes, has been read.
    pub fn launch_when_read(&mut self, client: ClientId, launch: Launch, guest: Guest, initrd: (File, u64)) {
        let (initrd, len) = initrd;
        self.memory.files.waiting.push_back(Waiting { client, launch, guest, initrd, len, others: Vec::new() });
        if self.memory.files.waiting.len() == 1 {
            self.read_next();
        }
    }

    fn read_next(&mut self) {
        while let Err(error) = self.memory.files.begin(self.host.niceness) {
            let failed = self.memory.files.waiting.pop_front().expect("the first could not be read");
            self.reply(failed.client, Err(Failure::host(format!("read the initrd: {error}"))));
        }
    }

    /// A file has been read.
    pub fn file_read(&mut self) {
        let _ = self.memory.files.bell.read();
        while let Ok(read) = self.memory.files.has_read.1.try_recv() {
            let Some(Waiting { client, launch, guest, others, .. }) = self.memory.files.waiting.pop_front() else {
                return;
            };
            let file = read.map(|read| self.memory.files.adopt(read, &others));
            let launched = match file {
                _ if self.stopping.is_some() => {
                    Err(Failure::new(ErrorKind::ShuttingDown, "the server is shutting down"))
                }
                Ok(file) => self.launch_read(client, launch, guest, file),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    Err(Failure::failed("the initrd has become shorter while it was read"))
                }
                Err(error) => Err(Failure::host(format!("read the initrd: {error}"))),
            };
            if let Err(failure) = launched {
                self.reply(client, Err(failure));
            }
            self.read_next();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_mem::store::FileStore;
    use guest_mem::{PAGE_SIZE, PageIndex};
    use std::io::{Seek, Write};

    fn other(file: &Rc<MemfdFile>) -> Other {
        (file.sum(), file.inode(), file.read_only().try_clone_to_owned().unwrap())
    }

    /// Two launches got one store where the file seemed unchanged, and all who mapped it what was in the file when they first
    /// touched a page.
    #[test]
    fn a_store_is_of_a_content_and_keeps_it() {
        let path = std::env::temp_dir().join(format!("offshoot-files-{}", std::process::id()));
        let mut file = File::create_new(&path).unwrap();
        file.write_all(&[7; 3 * PAGE_SIZE]).unwrap();
        let len = 3 * PAGE_SIZE as u64;
        let open = || File::open(&path).unwrap();
        let mut files = Files::new().unwrap();
        let first = files.adopt(read(open(), len, &[]).unwrap(), &[]);
        let known = [Rc::clone(&first)];
        let again = files.adopt(read(open(), len, &[other(&first)]).unwrap(), &known);
        assert!(Rc::ptr_eq(&first, &again));
        assert_eq!(files.resident(), PageCount(3));
        // The same file, as long as before, at the same time as far as its clock goes.
        file.rewind().unwrap();
        file.write_all(&[8; PAGE_SIZE]).unwrap();
        let changed = files.adopt(read(open(), len, &[other(&first)]).unwrap(), &known);
        assert!(!Rc::ptr_eq(&first, &changed));
        std::fs::remove_file(&path).unwrap();
        let mut page = [0; PAGE_SIZE];
        first.read(PageIndex(0), &mut page).unwrap();
        assert_eq!(page, [7; PAGE_SIZE]);
        changed.read(PageIndex(0), &mut page).unwrap();
        assert_eq!(page, [8; PAGE_SIZE]);
        drop((again, changed));
        assert_eq!(files.resident(), PageCount(3));
    }
}
