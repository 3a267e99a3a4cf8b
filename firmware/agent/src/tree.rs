//! Trees of files as archives, and archives as trees of files.
//!
//! Files, directories, symbolic and hard links travel, with modes, times, and owners; devices, pipes and sockets are left out.

use crate::message::Place;
use crate::tar::{Entry, Kind, Reader, Writer};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// A file that says it has no bytes may have some all the same (those in `/proc` do). So many of them are looked for.
const MAX_UNTOLD: u64 = 1 << 20;
/// Directories whose modes are set after all that is in them is there. An archive with more gets them in passing.
const MAX_DIRECTORIES: usize = 100_000;

/// How far an archive is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It is of the user's, for a guest: symbolic links that lie in its way are followed, and modes are as it says.
    Guest,
    /// It is a guest's, for the host: it does not leave the directory, and makes nothing that runs as somebody else.
    Host,
}

/// Packs what `path` names, below the last name of it (`.` if it has none).
///
/// # Errors
/// The path and what is wrong with it, or the output fails.
pub fn pack<W: Write>(path: &Path, out: W) -> io::Result<W> {
    let name = match path.components().next_back() {
        // `.` at the end is not among the components.
        Some(Component::Normal(name)) if !path.as_os_str().as_bytes().ends_with(b"/.") => name,
        _ => OsStr::new("."),
    };
    let mut packer = Packer { out: Writer::new(out), links: HashMap::new() };
    // A link that is named is what it points to only where the name says that it is a directory.
    packer.tree(path, name.as_bytes().to_vec())?;
    packer.out.finish()
}

struct Packer<W: Write> {
    out: Writer<W>,
    /// Names of files that have several, by device and inode.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl<W: Write> Packer<W> {
    fn tree(&mut self, path: &Path, name: Vec<u8>) -> io::Result<()> {
        // Not by recursion: a tree may be deeper than a stack.
        let mut todo = vec![(path.to_owned(), name)];
        while let Some((path, name)) = todo.pop() {
            let about = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
            let metadata = fs::symlink_metadata(&path).map_err(about)?;
            self.one(&path, &name, &metadata).map_err(about)?;
            if metadata.is_dir() {
                let mut children =
                    fs::read_dir(&path).map_err(about)?.collect::<io::Result<Vec<_>>>().map_err(about)?;
                children.sort_by_key(|child| std::cmp::Reverse(child.file_name()));
                todo.extend(children.into_iter().map(|child| {
                    let name = [name.as_slice(), b"/", child.file_name().as_bytes()].concat();
                    (child.path(), name)
                }));
            }
        }
        Ok(())
    }

    fn one(&mut self, path: &Path, name: &[u8], metadata: &Metadata) -> io::Result<()> {
        let mut entry = Entry {
            path: name.to_vec(),
            kind: Kind::Other,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: metadata.mtime().try_into().unwrap_or(0),
        };
        let kind = metadata.file_type();
        if kind.is_dir() {
            entry.kind = Kind::Directory;
        } else if kind.is_symlink() {
            entry.kind = Kind::Symlink(fs::read_link(path)?.into_os_string().into_vec());
        } else if kind.is_file() {
            if metadata.nlink() > 1 {
                let file = (metadata.dev(), metadata.ino());
                if let Some(first) = self.links.get(&file) {
                    entry.kind = Kind::HardLink(first.clone());
                    return self.out.entry(&entry, &mut io::empty());
                }
                self.links.insert(file, name.to_vec());
            }
            let mut file = File::open(path)?;
            let mut untold = Vec::new();
            if metadata.len() == 0 {
                (&mut file).take(MAX_UNTOLD).read_to_end(&mut untold)?;
            }
            entry.kind = Kind::File(metadata.len() + untold.len() as u64);
            return self.out.entry(&entry, &mut untold.as_slice().chain(file));
        } else {
            return Ok(());
        }
        self.out.entry(&entry, &mut io::empty())
    }
}

/// Unpacks an archive at `path`.
///
/// # Errors
/// The path and what is wrong with it; the archive is broken, or would leave the directory.
pub fn unpack(archive: impl Read, path: &Path, place: Place, trust: Trust) -> io::Result<()> {
    let about = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let is_directory = match fs::metadata(path) {
        Ok(metadata) => metadata.is_dir(),
        Err(e) if e.kind() == io::ErrorKind::NotFound && place == Place::As => false,
        Err(e) => return Err(about(e)),
    };
    let says_directory = path.as_os_str().as_bytes().ends_with(b"/");
    let (directory, name) = match place {
        _ if is_directory => (path.to_owned(), None),
        Place::Into => return Err(about(io::ErrorKind::NotADirectory.into())),
        Place::As if says_directory => return Err(about(io::ErrorKind::NotFound.into())),
        Place::As => {
            let name = path.file_name().ok_or_else(|| about(io::ErrorKind::InvalidInput.into()))?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !fs::metadata(parent).map_err(about)?.is_dir() {
                return Err(about(io::ErrorKind::NotADirectory.into()));
            }
            (parent.to_owned(), Some(name.as_bytes().to_vec()))
        }
    };
    let unpacker = Unpacker { directory, name, trust, owners: is_root(), directories: Vec::new() };
    unpacker.run(Reader::new(archive))
}

/// Whether owners can be given.
fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

struct Unpacker {
    directory: PathBuf,
    /// What the first name of every path becomes.
    name: Option<Vec<u8>>,
    trust: Trust,
    owners: bool,
    /// Modes and times of directories, for when all is in them.
    directories: Vec<(PathBuf, u32, u64)>,
}

impl Unpacker {
    fn run(mut self, mut archive: Reader<impl Read>) -> io::Result<()> {
        while let Some(entry) = archive.entry()? {
            let about = |e: io::Error| {
                // A stream that ends is not this file's trouble.
                let name = String::from_utf8_lossy(&entry.path).into_owned();
                if e.kind() == io::ErrorKind::UnexpectedEof {
                    e
                } else {
                    io::Error::new(e.kind(), format!("{name}: {e}"))
                }
            };
            self.one(&entry, &mut archive).map_err(about)?;
        }
        for (path, mode, mtime) in self.directories.iter().rev() {
            set_directory(path, *mode, *mtime)?;
        }
        Ok(())
    }

    fn one(&mut self, entry: &Entry, data: &mut impl Read) -> io::Result<()> {
        let names = self.names(&entry.path)?;
        let Some((last, parents)) = names.split_last() else {
            // The directory itself, which is as it is.
            return match entry.kind {
                Kind::Directory => Ok(()),
                _ => Err(refused("an entry that has no name")),
            };
        };
        let path = self.parent(parents, true)?.join(OsStr::from_bytes(last));
        let mode = match self.trust {
            Trust::Guest => entry.mode,
            Trust::Host => entry.mode & 0o777,
        };
        match &entry.kind {
            Kind::Other => return Ok(()),
            Kind::Directory => {
                self.make_directory(&path)?;
                self.own(&path, entry)?;
                if self.directories.len() < MAX_DIRECTORIES {
                    fs::set_permissions(&path, Permissions::from_mode(mode | 0o700))?;
                    self.directories.push((path, mode, entry.mtime));
                } else {
                    set_directory(&path, mode | 0o700, entry.mtime)?;
                }
            }
            Kind::Symlink(target) => {
                make_way(&path)?;
                symlink(OsStr::from_bytes(target), &path)?;
                self.own(&path, entry)?;
            }
            Kind::HardLink(target) => {
                let names = self.names(target)?;
                let (last, parents) = names.split_last().ok_or_else(|| refused("a link to nothing"))?;
                let target = self.parent(parents, false)?.join(OsStr::from_bytes(last));
                if !fs::symlink_metadata(&target)?.is_file() {
                    return Err(refused("a hard link to something that is no file"));
                }
                if target != path {
                    make_way(&path)?;
                    fs::hard_link(target, &path)?;
                }
            }
            Kind::File(_) => {
                make_way(&path)?;
                let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
                io::copy(data, &mut file)?;
                self.own(&path, entry)?;
                file.set_permissions(Permissions::from_mode(mode))?;
                // A file system without times is no reason to fail.
                let _ = file.set_modified(time(entry.mtime));
            }
        }
        Ok(())
    }

    /// The names of a path, without what means nothing.
    fn names(&self, path: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        for (at, name) in path.split(|&byte| byte == b'/').enumerate() {
            match name {
                b"." if at == 0 && self.name.is_some() => names.extend(self.name.clone()),
                b"" | b"." => {}
                b".." => return Err(refused("a path that goes up")),
                _ if name.contains(&0) => return Err(refused("a name with a zero in it")),
                _ if names.is_empty() => names.push(self.name.clone().unwrap_or_else(|| name.to_vec())),
                _ => names.push(name.to_vec()),
            }
        }
        Ok(names)
    }

    /// The directory that these names lead to.
    fn parent(&self, names: &[Vec<u8>], make: bool) -> io::Result<PathBuf> {
        let mut path = self.directory.clone();
        for name in names {
            path.push(OsStr::from_bytes(name));
            match self.look(&path) {
                Ok(metadata) if metadata.is_dir() => {}
                Ok(metadata) if metadata.is_symlink() => return Err(refused("it leads through a symbolic link")),
                Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
                Err(e) if e.kind() == io::ErrorKind::NotFound && make => fs::create_dir(&path)?,
                Err(e) => return Err(e),
            }
        }
        Ok(path)
    }

    fn look(&self, path: &Path) -> io::Result<Metadata> {
        match self.trust {
            Trust::Guest => fs::metadata(path),
            Trust::Host => fs::symlink_metadata(path),
        }
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        match self.look(path) {
            Ok(metadata) if metadata.is_dir() => Ok(()),
            _ => fs::create_dir(path),
        }
    }

    fn own(&self, path: &Path, entry: &Entry) -> io::Result<()> {
        if self.owners { lchown(path, Some(entry.uid), Some(entry.gid)) } else { Ok(()) }
    }
}

/// What is in the way of a new file goes, unless it is a directory.
fn make_way(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn set_directory(path: &Path, mode: u32, mtime: u64) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    if let Ok(directory) = File::open(path) {
        let _ = directory.set_modified(time(mtime));
    }
    Ok(())
}

fn time(seconds: u64) -> std::time::SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH)
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
