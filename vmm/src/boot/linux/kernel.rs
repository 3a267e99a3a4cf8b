//! A kernel's file, as far as it must be known before a guest is started.

use linux_loader::elf;
use linux_loader::loader::bootparam::setup_header;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::unix::fs::FileExt;
use vm_memory::ByteValued;

/// A kernel that can be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// What kind of file it is.
    pub format: Format,
    /// End of the memory that it takes until it has looked at the memory map.
    pub end: u64,
    /// Longest command line it takes, in bytes.
    pub cmdline_max: u64,
    /// Address that the end of its initial RAM disk must not pass.
    pub initrd_limit: u64,
}

/// Kinds of kernel files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Compressed, as distributions ship it.
    BzImage,
    /// As the linker makes it (`vmlinux`).
    Elf,
}

/// Why a file is no kernel that can be started.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It cannot be read.
    #[error("read it: {0}")]
    Read(#[from] io::Error),
    /// It is something else.
    #[error("not a Linux kernel (neither a bzImage nor an x86-64 ELF file)")]
    NotAKernel,
    /// Its end is missing.
    #[error("truncated: {has} bytes of {wants}")]
    Truncated {
        /// Bytes that are there.
        has: u64,
        /// Bytes that its header tells of.
        wants: u64,
    },
    /// It cannot be entered in 64-bit mode.
    #[error("{0}")]
    Unsupported(&'static str),
}

const SETUP_HEADER: u64 = 0x1f1;
const BZIMAGE_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const BOOT_FLAG: u16 = 0xaa55;
/// The first version of the boot protocol that tells of 64-bit entry points.
const VERSION_MIN: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// Where an uncompressed kernel, which does not say, takes its initial RAM disk and how long its command line may be.
const ELF_INITRD_LIMIT: u64 = 0x8000_0000;
const ELF_CMDLINE_MAX: u64 = 2047;

impl Kernel {
    /// Looks at a file.
    ///
    /// # Errors
    /// It is no kernel, or not all of one.
    pub fn inspect(file: &File) -> Result<Self, KernelError> {
        let len = file.metadata()?.len();
        let mut magic = [0; 4];
        if len < 64 {
            return Err(KernelError::NotAKernel);
        }
        file.read_exact_at(&mut magic, 0)?;
        if magic == *b"\x7fELF" { Self::inspect_elf(file, len) } else { Self::inspect_bzimage(file, len) }
    }

    fn inspect_bzimage(file: &File, len: u64) -> Result<Self, KernelError> {
        let mut header = setup_header::default();
        if len < SETUP_HEADER + size_of::<setup_header>() as u64 {
            return Err(KernelError::NotAKernel);
        }
        file.read_exact_at(header.as_mut_slice(), SETUP_HEADER)?;
        if header.header != BZIMAGE_MAGIC || header.boot_flag != BOOT_FLAG {
            return Err(KernelError::NotAKernel);
        }
        if header.version < VERSION_MIN || header.xloadflags & XLF_KERNEL_64 == 0 || header.loadflags & LOADED_HIGH == 0
        {
            return Err(KernelError::Unsupported("it has no 64-bit entry point: a kernel of 3.8 or newer is needed"));
        }
        let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
        let wants = (u64::from(sectors) + 1) * 512 + u64::from(header.syssize) * 16;
        if len < wants {
            return Err(KernelError::Truncated { has: len, wants });
        }
        let unpacked = header.pref_address.saturating_add(header.init_size.into());
        let loaded = u64::from(header.code32_start) + len;
        Ok(Self {
            format: Format::BzImage,
            end: unpacked.max(loaded),
            cmdline_max: header.cmdline_size.into(),
            initrd_limit: u64::from(header.initrd_addr_max) + 1,
        })
    }

    fn inspect_elf(file: &File, len: u64) -> Result<Self, KernelError> {
        let mut header = elf::Elf64_Ehdr::default();
        file.read_exact_at(header.as_mut_slice(), 0)?;
        const CLASS: usize = 4;
        const ELF_CLASS_64: u8 = 2;
        const MACHINE_X86_64: u16 = 62;
        if header.e_ident[CLASS] != ELF_CLASS_64 || header.e_machine != MACHINE_X86_64 {
            return Err(KernelError::Unsupported("an ELF file for another kind of processor"));
        }
        let size = size_of::<elf::Elf64_Phdr>() as u64;
        if u64::from(header.e_phentsize) != size {
            return Err(KernelError::NotAKernel);
        }
        let mut end = 0;
        for number in 0..u64::from(header.e_phnum) {
            let at = header.e_phoff.saturating_add(number * size);
            let wants = at.saturating_add(size);
            if wants > len {
                return Err(KernelError::Truncated { has: len, wants });
            }
            let mut segment = elf::Elf64_Phdr::default();
            file.read_exact_at(segment.as_mut_slice(), at)?;
            if segment.p_type == elf::PT_LOAD {
                let wants = segment.p_offset.saturating_add(segment.p_filesz);
                if wants > len {
                    return Err(KernelError::Truncated { has: len, wants });
                }
                if segment.p_paddr < crate::layout::linux::HIGH_START {
                    return Err(KernelError::Unsupported("an ELF file that is to be loaded into the first megabyte"));
                }
                end = end.max(segment.p_paddr.saturating_add(segment.p_memsz.max(segment.p_filesz)));
            }
        }
        if end == 0 {
            return Err(KernelError::NotAKernel);
        }
        Ok(Self { format: Format::Elf, end, cmdline_max: ELF_CMDLINE_MAX, initrd_limit: ELF_INITRD_LIMIT })
    }
}
