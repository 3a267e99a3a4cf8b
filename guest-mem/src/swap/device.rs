//! The disk: a file or a block device, read and written in whole blocks.

use super::extents::BLOCK;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, Flock, FlockArg, OFlag, fallocate, fcntl};
use nix::unistd::geteuid;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// What frames are written to, by several threads at a time. Buffers are whole blocks, and [aligned](Aligned).
pub trait SwapDevice: Send + Sync {
    /// Reads from block `first` on.
    ///
    /// # Errors
    /// The device's, or it ends before the buffer does.
    fn read(&self, first: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes from block `first` on.
    ///
    /// # Errors
    /// The device's; what the blocks hold now is unknown.
    fn write(&self, first: u64, bytes: &[u8]) -> io::Result<()>;

    /// Nobody needs what these blocks hold: they may hold anything from now on.
    ///
    /// # Errors
    /// `Unsupported`: it has no use for that.
    fn discard(&self, first: u64, blocks: u64) -> io::Result<()>;
}

/// A regular file or a block device that nobody else swaps to. What guests had in memory does not stay behind: dropping
/// it empties a regular file, and discards what was written to a block device, where that can.
#[derive(Debug)]
pub struct FileDevice {
    file: Flock<File>,
    kind: DeviceKind,
    blocks: u64,
    /// Nothing was written from this block on.
    unwritten: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeviceKind {
    Regular,
    Block,
}

/// Whether nobody else has opened a regular file, or may, as far as its owner and its names tell.
fn only_ours(file: &File) -> io::Result<()> {
    let found = file.metadata()?;
    if found.is_file() && (found.uid() != geteuid().as_raw() || found.nlink() != 1) {
        let why = "the file is somebody else's, or has another name: its owner could read what guests have in memory";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    Ok(())
}

impl FileDevice {
    /// Opens the file at `path` for use as [`new`](Self::new) says; makes it if it is not there.
    ///
    /// # Errors
    /// It cannot be opened, or is another user's; as of [`new`](Self::new).
    pub fn open(path: &Path, size: Option<u64>) -> io::Result<Self> {
        let context = |error: io::Error| {
            let why = match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                Errno::EBUSY => "the device is mounted, or in use otherwise".to_owned(),
                _ => error.to_string(),
            };
            io::Error::new(error.kind(), format!("swap on {}: {why}", path.display()))
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match fs::metadata(path) {
            // Not one that is mounted, or somebody's swap.
            Ok(found) if found.file_type().is_block_device() => options.custom_flags(libc::O_EXCL),
            // What it holds goes once it is ours, not before.
            _ => options.create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW),
        };
        let file = options.open(path).map_err(context)?;
        only_ours(&file).map_err(context)?;
        Self::new(file, size).map_err(context)
    }

    /// Takes a regular file, whose contents go and which gets `size` bytes or keeps its length, or a block device, of
    /// which `size` bytes or all are used.
    ///
    /// # Errors
    /// `InvalidInput`: it is neither, or the size does not fit. `WouldBlock`: another server has it. Otherwise of the
    /// system calls.
    pub fn new(file: File, size: Option<u64>) -> io::Result<Self> {
        let invalid = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let metadata = file.metadata()?;
        let kind = match metadata.file_type() {
            kind if kind.is_file() => DeviceKind::Regular,
            kind if kind.is_block_device() => DeviceKind::Block,
            _ => return invalid("neither a regular file nor a block device".into()),
        };
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            io::Error::new(io::Error::from(errno).kind(), format!("it cannot be locked: {errno}"))
        })?;
        let there = file.seek(SeekFrom::End(0))?;
        let blocks = size.unwrap_or(there) / BLOCK as u64;
        if blocks == 0 {
            return invalid("it has no size".into());
        }
        match kind {
            DeviceKind::Regular => {
                file.set_permissions(Permissions::from_mode(0o600))?;
                file.set_len(0)?;
                file.set_len(blocks * BLOCK as u64)?;
            }
            DeviceKind::Block if blocks > there / BLOCK as u64 => {
                return invalid(format!("the device has {there} bytes only"));
            }
            DeviceKind::Block => {}
        }
        let device = Self { file, kind, blocks, unwritten: AtomicU64::new(0) };
        device.go_direct()?;
        Ok(device)
    }

    /// Its length.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Goes round the page cache where the filesystem lets us: what is evicted must not fill memory again.
    fn go_direct(&self) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(&*self.file, FcntlArg::F_GETFL)?);
        let set = |flags| fcntl(&*self.file, FcntlArg::F_SETFL(flags));
        let mut buffer = Aligned::default();
        if set(flags | OFlag::O_DIRECT).is_err() || self.read(0, buffer.slice(BLOCK)).is_err() {
            log::info!("swap: no direct I/O, the page cache is used");
            set(flags)?;
        }
        Ok(())
    }
}

impl SwapDevice for FileDevice {
    fn read(&self, first: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, first * BLOCK as u64)
    }

    fn write(&self, first: u64, bytes: &[u8]) -> io::Result<()> {
        self.unwritten.fetch_max(first + (bytes.len() / BLOCK) as u64, Ordering::Relaxed);
        self.file.write_all_at(bytes, first * BLOCK as u64)
    }

    fn discard(&self, first: u64, blocks: u64) -> io::Result<()> {
        // On a block device too: the kernel discards, or writes zeros if the device is quick at that.
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, length) = (first * BLOCK as u64, blocks * BLOCK as u64);
        fallocate(&*self.file, how, offset as i64, length as i64).map_err(|errno| match errno {
            Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV => io::ErrorKind::Unsupported.into(),
            errno => errno.into(),
        })
    }
}

impl Drop for FileDevice {
    fn drop(&mut self) {
        let emptied = match (self.kind, self.unwritten.load(Ordering::Relaxed)) {
            (DeviceKind::Regular, _) => self.file.set_len(0),
            (DeviceKind::Block, 0) => Ok(()),
            (DeviceKind::Block, blocks) => self.discard(0, blocks),
        };
        if let Err(error) = emptied {
            log::warn!("swap: what was written stays on the disk: {error}");
        }
    }
}

/// A buffer that starts where a block may: direct I/O wants that.
#[derive(Debug, Default)]
pub struct Aligned {
    bytes: Vec<u8>,
}

impl Aligned {
    /// `len` bytes of it, which hold anything.
    pub fn slice(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < len + BLOCK {
            self.bytes = vec![0; len + BLOCK];
        }
        let skip = self.bytes.as_ptr().align_offset(BLOCK);
        &mut self.bytes[skip..skip + len]
    }
}
