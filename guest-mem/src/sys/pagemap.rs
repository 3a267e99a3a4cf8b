//! Which pages of this process are private.
#![allow(unsafe_code)] // the PAGEMAP_SCAN ioctl

use crate::addr::PAGE_SIZE;
use linux_raw_sys::general::{
    PAGE_IS_FILE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, page_region, pm_scan_arg,
};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{io, mem};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

/// How the pagemap is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanMethod {
    /// The `PAGEMAP_SCAN` ioctl (Linux 6.7).
    Scan,
    /// By reading it. The zero page looks private here: such pages are all zeros, and harmless.
    Read,
}

/// `/proc/self/pagemap`, kept open from before the process went where there is no `/proc`.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// Whether it is to be read.
    read: AtomicBool,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PM_PRESENT: u64 = 1 << 63;
const PM_SWAPPED: u64 = 1 << 62;
const PM_FILE: u64 = 1 << 61;

impl Pagemap {
    /// Opens this process's.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn open(method: ScanMethod) -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")?, read: AtomicBool::new(method == ScanMethod::Read) })
    }

    /// Opens another process's, which this one may look at.
    ///
    /// # Errors
    /// It is gone, or not ours to look at.
    pub fn open_process(pid: i32, method: ScanMethod) -> io::Result<Self> {
        Ok(Self {
            file: File::open(format!("/proc/{pid}/pagemap"))?,
            read: AtomicBool::new(method == ScanMethod::Read),
        })
    }

    /// Tells `found` the private pages within `bytes`, as ascending ranges of bytes: pages that are present or in swap,
    /// and neither a file's nor the zero page. A page that the kernel is migrating counts as one in swap.
    ///
    /// # Errors
    /// Of the ioctl or the read.
    pub fn private(&self, bytes: Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        if !self.read.load(Ordering::Relaxed) {
            match self.scan(bytes.clone(), &mut found) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    log::info!("PAGEMAP_SCAN: {error}; the pagemap is read instead");
                    self.read.store(true, Ordering::Relaxed);
                }
                done => return done,
            }
        }
        self.read(bytes, found)
    }

    fn scan(&self, bytes: Range<u64>, found: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        let unwanted = u64::from(PAGE_IS_FILE | PAGE_IS_PFNZERO);
        let mut regions = [page_region { start: 0, end: 0, categories: 0 }; 512];
        let mut at = bytes.start;
        while at < bytes.end {
            let mut scan = pm_scan_arg {
                size: mem::size_of::<pm_scan_arg>() as u64,
                flags: 0,
                start: at,
                end: bytes.end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                max_pages: 0,
                category_inverted: unwanted,
                category_mask: unwanted,
                category_anyof_mask: u64::from(PAGE_IS_PRESENT | PAGE_IS_SWAPPED),
                // The same for all pages that are found, so that neighbours come as one region.
                return_mask: u64::from(PAGE_IS_FILE),
            };
            // SAFETY: The structure is the request's, and `vec` has room for `vec_len` regions.
            let got = unsafe { ioctl_with_mut_ref(&self.file, PAGEMAP_SCAN, &mut scan) };
            if got < 0 {
                return Err(io::Error::last_os_error());
            }
            regions[..got as usize].iter().for_each(|region| found(region.start..region.end));
            if scan.walk_end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN does not get on"));
            }
            at = scan.walk_end;
        }
        Ok(())
    }

    fn read(&self, bytes: Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        const ENTRY: u64 = mem::size_of::<u64>() as u64;
        let page = PAGE_SIZE as u64;
        let mut buffer = [0; 64 << 10];
        let mut run = bytes.start..bytes.start;
        let mut at = bytes.start;
        while at < bytes.end {
            let want = ((bytes.end - at) / page * ENTRY).min(buffer.len() as u64) as usize;
            let entries = &mut buffer[..want];
            self.file.read_exact_at(entries, at / page * ENTRY)?;
            for entry in entries.chunks_exact(ENTRY as usize) {
                let entry = u64::from_ne_bytes(entry.try_into().expect("eight bytes"));
                let private = entry & (PM_PRESENT | PM_SWAPPED) != 0 && entry & PM_FILE == 0;
                if private && run.end == at {
                    run.end += page;
                } else if private {
                    if !run.is_empty() {
                        found(run);
                    }
                    run = at..at + page;
                }
                at += page;
            }
        }
        if !run.is_empty() {
            found(run);
        }
        Ok(())
    }
}
