//! Whether a guest can be started from these files, and where they go.

use super::kernel::{Format, Kernel, KernelError};
use crate::layout::{linux, ram_ranges};
use crate::units::ByteSize;
use guest_mem::{Gfn, GfnRange, PageCount};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;

/// What a Linux guest is to be started from.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its memory.
    pub ram: PageCount,
    /// The kernel.
    pub kernel: &'a File,
    /// The initial RAM disk.
    pub initrd: Option<&'a File>,
    /// The command line.
    pub cmdline: &'a str,
}

/// How a Linux guest starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Whether the kernel's file is an uncompressed one.
    pub elf: bool,
    /// The command line.
    pub cmdline: String,
    /// Where its initial RAM disk is mapped.
    pub initrd: Option<Initrd>,
}

/// An initial RAM disk in a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Initrd {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

impl Initrd {
    /// The guest's pages that it fills, the last one perhaps in part.
    pub fn pages(&self) -> GfnRange {
        GfnRange::new(Gfn::of_gpa(self.address), PageCount::covering(self.len))
    }
}

/// Why a guest cannot be started so.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Of the kernel's file.
    #[error("kernel: {0}")]
    Kernel(#[from] KernelError),
    /// The kernel needs more memory than there is.
    #[error("kernel: it needs {} of memory, and the guest has {} below 3G", ByteSize(*.needs).approx(), ByteSize(*.has).approx())]
    KernelTooBig {
        /// What it takes before it looks at the memory map.
        needs: u64,
        /// Memory below the devices.
        has: u64,
    },
    /// The initial RAM disk cannot be looked at.
    #[error("initrd: {0}")]
    Initrd(io::Error),
    /// There is nothing in it.
    #[error("initrd: it is empty")]
    InitrdEmpty,
    /// It does not fit between the kernel and the end of the memory that it may take.
    #[error("initrd: {} do not fit: {} of memory are left beside the kernel", ByteSize(*.len).approx(), ByteSize(*.room).approx())]
    InitrdTooBig {
        /// Its length.
        len: u64,
        /// The room for it.
        room: u64,
    },
    /// The command line is too long.
    #[error("command line: {len} bytes, and this kernel takes {max}")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// What the kernel takes.
        max: u64,
    },
    /// The command line has something in it that cannot be there.
    #[error("command line: no line breaks and no NUL in it")]
    CmdlineText,
}

impl Plan {
    /// Checks everything that can be wrong.
    ///
    /// # Errors
    /// The first thing that is.
    pub fn new(request: Request<'_>) -> Result<Self, PlanError> {
        let kernel = Kernel::inspect(request.kernel)?;
        let cmdline = request.cmdline;
        if cmdline.contains(['\n', '\r', '\0']) {
            return Err(PlanError::CmdlineText);
        }
        let max = kernel.cmdline_max.min(linux::CMDLINE_ROOM - 1);
        if cmdline.len() as u64 > max {
            return Err(PlanError::CmdlineTooLong { len: cmdline.len(), max });
        }
        let low_end = ram_ranges(request.ram)[0].end().gpa();
        if kernel.end > low_end {
            return Err(PlanError::KernelTooBig { needs: kernel.end, has: low_end });
        }
        let initrd = request.initrd.map(|file| place_initrd(file, &kernel, low_end)).transpose()?;
        Ok(Self { elf: kernel.format == Format::Elf, cmdline: cmdline.to_owned(), initrd })
    }
}

/// At the top of the memory that the kernel takes it from, on whole pages.
fn place_initrd(file: &File, kernel: &Kernel, low_end: u64) -> Result<Initrd, PlanError> {
    let len = file.metadata().map_err(PlanError::Initrd)?.len();
    if len == 0 {
        return Err(PlanError::InitrdEmpty);
    }
    let top = Gfn::of_gpa(low_end.min(kernel.initrd_limit)).gpa();
    let bytes = PageCount::covering(len).bytes();
    match top.checked_sub(bytes) {
        Some(address) if address >= kernel.end => Ok(Initrd { address, len }),
        _ => Err(PlanError::InitrdTooBig { len, room: top - kernel.end.min(top) }),
    }
}
