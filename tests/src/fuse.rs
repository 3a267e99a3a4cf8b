//! A file whose blocks can be made to fail: a FUSE file system of this one file, spoken over `/dev/fuse` (the kernel's
//! `linux/fuse.h`, version 7.31). It needs root and no library.

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::mkdtemp;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

const ENOENT: i32 = Errno::ENOENT as i32;
const EINTR: i32 = Errno::EINTR as i32;
const ENOSYS: i32 = Errno::ENOSYS as i32;

/// Bytes of a block.
pub const BLOCK: u64 = 4096;

/// Blocks that cannot be read, or written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Reads that touch one of these fail so.
    pub read: Option<(Range<u64>, Errno)>,
    /// Writes that touch one of these fail so, and change nothing.
    pub write: Option<(Range<u64>, Errno)>,
}

/// A file whose blocks can be made to fail, there until this is dropped.
#[derive(Debug)]
pub struct FaultyFile {
    path: PathBuf,
    shared: Arc<Mutex<Disk>>,
    server: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Disk {
    bytes: Vec<u8>,
    faults: Faults,
    failed_reads: u64,
    failed_writes: u64,
}

impl FaultyFile {
    /// Mounts it over an empty file in a directory of its own, seen by this thread and by processes that it starts, so that it
    /// is gone with them whatever happens.
    ///
    /// # Errors
    /// This host has no FUSE, or this user may not mount.
    pub fn mount(bytes: u64) -> io::Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)?;
        let path = mkdtemp(&std::env::temp_dir().join("offshoot-disk-XXXXXX"))?.join("disk");
        File::create(&path)?;
        let options = format!("fd={},rootmode=100600,user_id=0,group_id=0", device.as_raw_fd());
        mount(Some("faulty"), &path, Some("fuse"), MsFlags::empty(), Some(options.as_str()))?;
        let shared = Arc::new(Mutex::new(Disk { bytes: vec![0; bytes as usize], ..Disk::default() }));
        let disk = Arc::clone(&shared);
        let server = thread::Builder::new().name("fuse".into()).spawn(move || serve(device, &disk))?;
        Ok(Self { path, shared, server: Some(server) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on these blocks fail, and no others.
    pub fn fail(&self, faults: Faults) {
        lock(&self.shared).faults = faults;
    }

    /// Requests that have failed so far: reads and writes.
    pub fn failures(&self) -> (u64, u64) {
        let disk = lock(&self.shared);
        (disk.failed_reads, disk.failed_writes)
    }

    /// Blocks that hold something.
    pub fn used(&self) -> Vec<u64> {
        let disk = lock(&self.shared);
        let blocks = disk.bytes.chunks(BLOCK as usize).enumerate();
        blocks.filter(|(_, block)| block.iter().any(|&byte| byte != 0)).map(|(number, _)| number as u64).collect()
    }

    /// Turns one bit of a block over.
    pub fn flip(&self, block: u64, bit: u64) {
        lock(&self.shared).bytes[(block * BLOCK + bit / 8) as usize] ^= 1 << (bit % 8);
    }
}

impl Drop for FaultyFile {
    fn drop(&mut self) {
        // Forced: whoever still waits for it gets an error, and our thread its end.
        if let Err(error) = umount2(&self.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH) {
            eprintln!("unmount {}: {error}", self.path.display());
            return;
        }
        let _ = self.server.take().map(JoinHandle::join);
        let _ = std::fs::remove_file(&self.path).and_then(|()| std::fs::remove_dir(self.path.with_file_name("")));
    }
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().expect("nobody panics with the disk")
}

/// What requests are numbered by.
mod op {
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
}

/// The length of a request's header, and of what precedes the bytes of a write.
const HEADER: usize = 40;
const WRITE_HEADER: usize = 40;
/// The most that is written at a time.
const MAX_WRITE: usize = 128 << 10;

/// Answers requests until it is unmounted.
fn serve(mut device: File, disk: &Mutex<Disk>) {
    let mut buffer = vec![0; HEADER + WRITE_HEADER + MAX_WRITE];
    loop {
        let length = match device.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if matches!(error.raw_os_error(), Some(EINTR | ENOENT)) => continue,
            Err(_) => return,
        };
        let request = &buffer[..length];
        let (opcode, unique) = (u32_at(request, 4), u64_at(request, 8));
        if matches!(opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT) {
            continue;
        }
        let (error, body) = match answer(&mut lock(disk), opcode, &request[HEADER..]) {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = Vec::with_capacity(16 + body.len());
        reply.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
        reply.extend_from_slice(&error.to_ne_bytes());
        reply.extend_from_slice(&unique.to_ne_bytes());
        reply.extend_from_slice(&body);
        // Who asked may have gone.
        let _ = device.write(&reply);
        if opcode == op::DESTROY {
            return;
        }
    }
}

fn answer(disk: &mut Disk, opcode: u32, body: &[u8]) -> Result<Vec<u8>, i32> {
    match opcode {
        op::INIT => {
            let mut reply = Vec::new();
            [7_u32, 31, 0, 0].iter().for_each(|word| reply.extend_from_slice(&word.to_ne_bytes()));
            [16_u16, 12].iter().for_each(|half| reply.extend_from_slice(&half.to_ne_bytes()));
            [MAX_WRITE as u32, 1].iter().for_each(|word| reply.extend_from_slice(&word.to_ne_bytes()));
            reply.resize(64, 0);
            Ok(reply)
        }
        op::GETATTR => Ok(attributes(disk)),
        op::SETATTR => {
            const SIZE: u32 = 1 << 3;
            if u32_at(body, 0) & SIZE != 0 {
                disk.bytes.resize(u64_at(body, 16) as usize, 0);
            }
            Ok(attributes(disk))
        }
        op::OPEN => {
            // Past the page cache.
            const DIRECT_IO: u64 = 1;
            Ok([0, DIRECT_IO].iter().flat_map(|word: &u64| word.to_ne_bytes()).collect())
        }
        op::READ => {
            let (offset, size) = (u64_at(body, 8), u64::from(u32_at(body, 16)));
            if let Some(errno) = hit(&disk.faults.read, offset, size) {
                disk.failed_reads += 1;
                return Err(errno);
            }
            let end = (offset + size).min(disk.bytes.len() as u64);
            Ok(disk.bytes[offset.min(end) as usize..end as usize].to_vec())
        }
        op::WRITE => {
            let (offset, size) = (u64_at(body, 8), u64::from(u32_at(body, 16)));
            if let Some(errno) = hit(&disk.faults.write, offset, size) {
                disk.failed_writes += 1;
                return Err(errno);
            }
            let (start, end) = (offset as usize, (offset + size) as usize);
            if disk.bytes.len() < end {
                disk.bytes.resize(end, 0);
            }
            disk.bytes[start..end].copy_from_slice(&body[WRITE_HEADER..WRITE_HEADER + size as usize]);
            Ok(size.to_ne_bytes().to_vec())
        }
        op::RELEASE | op::FSYNC | op::FLUSH | op::DESTROY => Ok(Vec::new()),
        _ => Err(ENOSYS),
    }
}

fn hit(fault: &Option<(Range<u64>, Errno)>, offset: u64, size: u64) -> Option<i32> {
    let (blocks, errno) = fault.as_ref()?;
    let touched = offset / BLOCK..(offset + size).div_ceil(BLOCK);
    (touched.start < blocks.end && blocks.start < touched.end).then_some(*errno as i32)
}

/// Of the one file there is, asked for again each time.
fn attributes(disk: &Disk) -> Vec<u8> {
    let size = disk.bytes.len() as u64;
    let mut reply = vec![0; 16];
    [1, size, size / 512, 0, 0, 0].iter().for_each(|word: &u64| reply.extend_from_slice(&word.to_ne_bytes()));
    let (mode, links) = (0o100_600, 1);
    let words: [u32; 10] = [0, 0, 0, mode, links, 0, 0, 0, BLOCK as u32, 0];
    words.iter().for_each(|word| reply.extend_from_slice(&word.to_ne_bytes()));
    reply
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
