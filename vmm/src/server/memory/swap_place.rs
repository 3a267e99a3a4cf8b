//! A file or a block device that a user gives for swap: what it holds goes, and must not be anybody's.
//!
//! A server marks the last page of what it takes, for the next one after a server that was killed. Anything else that is
//! there is somebody's, unless the user says that it may go.

use guest_mem::PAGE_SIZE;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

const MARK: &[u8] = b"offshoot swap, version 1\n";

/// How much of a block device's beginning shows whether it is used: partition tables, file systems and the like are there.
const SIGNATURES: usize = 1 << 20;

/// Whether nothing is lost with what is at `path`, of which `size` bytes are to be used, or all.
///
/// # Errors
/// It cannot be read.
pub fn is_spare(path: &Path, size: Option<u64>) -> io::Result<bool> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
        file => file?,
    };
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        // It cannot be used at all, as whoever opens it says.
        return Ok(true);
    }
    let length = file.seek(SeekFrom::End(0))?;
    let ends = [size, Some(length)].into_iter().flatten().filter(|&end| end <= length);
    for end in ends {
        if is_marked(&file, end)? {
            return Ok(true);
        }
    }
    match kind.is_file() {
        true => has_no_data(&file),
        false => is_unsigned(&file, length),
    }
}

fn is_marked(file: &File, end: u64) -> io::Result<bool> {
    let Some(at) = end.checked_sub(PAGE_SIZE as u64) else { return Ok(false) };
    let mut found = [0; MARK.len()];
    file.read_exact_at(&mut found, at)?;
    Ok(found == MARK)
}

/// Whether a file is empty, or all one hole, as `truncate` and `fallocate` make them.
fn has_no_data(file: &File) -> io::Result<bool> {
    match lseek(file, 0, Whence::SeekData) {
        Err(Errno::ENXIO) => Ok(true),
        found => Ok(found.map(|_| false)?),
    }
}

fn is_unsigned(device: &File, length: u64) -> io::Result<bool> {
    let mut beginning = vec![0; SIGNATURES.min(length as usize)];
    device.read_exact_at(&mut beginning, 0)?;
    Ok(beginning.iter().all(|&byte| byte == 0))
}

/// Marks the last page before `end` as a server's.
///
/// # Errors
/// It cannot be written.
pub fn mark(path: &Path, end: u64) -> io::Result<()> {
    let mut page = [0; PAGE_SIZE];
    page[..MARK.len()].copy_from_slice(MARK);
    OpenOptions::new().write(true).open(path)?.write_all_at(&page, end - PAGE_SIZE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::TempDir;
    use std::fs;

    #[test]
    fn what_is_somebodys_is_not_spare() {
        let dir = TempDir::new();
        let path = dir.path().join("file");
        let spare = |size| is_spare(&path, size).unwrap();
        assert!(spare(None), "it is not there");
        fs::write(&path, "").unwrap();
        assert!(spare(None) && spare(Some(1 << 20)), "it is empty");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        assert!(spare(None), "it is a hole");
        fs::write(&path, "thesis").unwrap();
        assert!(!spare(None) && !spare(Some(1 << 20)));
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        assert!(!spare(None));
        mark(&path, 1 << 19).unwrap();
        assert!(spare(Some(1 << 19)) && !spare(None));
        mark(&path, 1 << 20).unwrap();
        assert!(spare(None) && spare(Some(1 << 30)));
        assert!(is_spare(dir.path(), None).unwrap(), "no file at all: others say so");
    }
}
