//! Files that are mapped into guests: one store each, for as long as a VM maps it.

use guest_mem::PageCount;
use guest_mem::store::file::{Content, MemfdFile};
use guest_mem::store::memfd::MemfdStores;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::rc::{Rc, Weak};

/// What tells a file, as it is now, from any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// The built-in guest's image.
    Builtin,
    /// A file that has not changed since.
    File { device: u64, inode: u64, len: u64, changed: (i64, i64) },
}

/// The files that somebody maps.
#[derive(Debug, Default)]
pub struct Files(BTreeMap<Key, Weak<MemfdFile>>);

impl Files {
    /// The built-in guest's pages.
    ///
    /// # Errors
    /// The host has no memory or no descriptors left.
    pub fn builtin(&mut self, image: &'static [u8], stores: &mut MemfdStores) -> io::Result<Rc<MemfdFile>> {
        self.get(Key::Builtin, Content::Bytes(image), stores)
    }

    /// A file's pages.
    ///
    /// # Errors
    /// As above, or the file cannot be looked at.
    pub fn open(&mut self, file: File, stores: &mut MemfdStores) -> io::Result<Rc<MemfdFile>> {
        let data = file.metadata()?;
        let key = Key::File {
            device: data.dev(),
            inode: data.ino(),
            len: data.len(),
            changed: (data.ctime(), data.ctime_nsec()),
        };
        self.get(key, Content::File(file), stores)
    }

    fn get(&mut self, key: Key, content: Content, stores: &mut MemfdStores) -> io::Result<Rc<MemfdFile>> {
        self.0.retain(|_, file| file.strong_count() > 0);
        if let Some(file) = self.0.get(&key).and_then(Weak::upgrade) {
            return Ok(file);
        }
        let file = Rc::new(MemfdFile::new(content, stores)?);
        self.0.insert(key, Rc::downgrade(&file));
        Ok(file)
    }

    /// Pages of all of them that are in memory.
    pub fn resident(&self) -> PageCount {
        PageCount(self.0.values().filter_map(Weak::upgrade).map(|file| file.resident().0).sum())
    }
}
