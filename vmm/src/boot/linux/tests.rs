//! Files that are no kernels, and guests they do not fit into.

use super::load::load;
use super::*;
use crate::layout::linux as place;
use crate::wire::{Machine, MachineShape};
use guest_mem::PageCount;
use linux_loader::loader::bootparam::{boot_params, setup_header};
use std::fs::File;
use std::io::Write;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

const MIB: u64 = 1 << 20;
const SETUP: usize = 1024;

/// A file that nobody else has.
fn file(bytes: &[u8]) -> File {
    let fd = nix::sys::memfd::memfd_create(c"kernel", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let mut file = File::from(fd);
    file.write_all(bytes).unwrap();
    file
}

/// Something that looks like a compressed kernel of `len` bytes behind its setup.
fn bzimage(len: usize) -> Vec<u8> {
    let header = setup_header {
        setup_sects: (SETUP / 512 - 1) as u8,
        syssize: (len / 16) as u32,
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        xloadflags: 1,
        cmdline_size: 255,
        pref_address: 16 * MIB,
        init_size: (32 * MIB) as u32,
        ..Default::default()
    };
    let mut bytes = vec![0xcc; SETUP + len];
    bytes[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    bytes
}

fn plan(kernel: &[u8], initrd: Option<&[u8]>, ram: u64, cmdline: &str) -> Result<Plan, String> {
    let (kernel, initrd) = (file(kernel), initrd.map(file));
    let request = Request { ram: PageCount::covering(ram), kernel: &kernel, initrd: initrd.as_ref(), cmdline };
    Plan::new(request).map_err(|error| error.to_string())
}

#[test]
fn what_is_no_kernel_is_refused_and_told_why() {
    let whole = bzimage(4096);
    let refused = |bytes: &[u8]| plan(bytes, None, 64 * MIB, "").unwrap_err();
    assert!(refused(b"").contains("not a Linux kernel"));
    assert!(refused(b"#!/bin/sh\n").contains("not a Linux kernel"));
    assert!(refused(&vec![0x5a; 100_000]).contains("not a Linux kernel"));
    assert!(refused(&whole[..600]).contains("not a Linux kernel"), "{}", refused(&whole[..600]));
    assert!(refused(&whole[..SETUP + 4000]).contains("truncated: 5024 bytes of 5120"));
    let mut old = whole.clone();
    old[0x206] = 0;
    assert!(refused(&old).contains("64-bit entry point"));
    let mut elf = vec![0; 4096];
    elf[..5].copy_from_slice(b"\x7fELF\x01");
    assert!(refused(&elf).contains("another kind of processor"));
    // Any single byte of the header may be anything.
    for at in 0x1f1..SETUP {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        let _ = plan(&bytes, Some(b"x"), 64 * MIB, "");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_told_why() {
    let kernel = bzimage(4096);
    let page = PageCount(1).bytes() as usize;
    assert!(plan(&kernel, None, 32 * MIB, "").unwrap_err().contains("it needs 48.0 MiB of memory"));
    assert!(plan(&kernel, Some(b""), 64 * MIB, "").unwrap_err().contains("it is empty"));
    let room = (16 * MIB) as usize;
    let placed = plan(&kernel, Some(&vec![1; room]), 64 * MIB, "").unwrap().initrd.unwrap();
    assert_eq!((placed.address, placed.len), (48 * MIB, 16 * MIB));
    let error = plan(&kernel, Some(&vec![1; room + 1]), 64 * MIB, "").unwrap_err();
    assert!(error.contains("do not fit"), "{error}");
    let placed = plan(&kernel, Some(&vec![1; page + 1]), 4096 * MIB, "").unwrap().initrd.unwrap();
    assert_eq!(placed.address, 2048 * MIB - 2 * page as u64, "as far up as the kernel takes it");
    assert!(plan(&kernel, None, 64 * MIB, &"x".repeat(255)).is_ok());
    let error = plan(&kernel, None, 64 * MIB, &"x".repeat(256)).unwrap_err();
    assert!(error.contains("256 bytes, and this kernel takes 255"), "{error}");
    assert!(plan(&kernel, None, 64 * MIB, "a\nb").is_err());
}

#[test]
fn a_kernel_is_put_where_it_belongs_with_all_it_is_told() {
    let kernel = bzimage(4096);
    let plan = plan(&kernel, Some(b"initrd"), 64 * MIB, "quiet").unwrap();
    let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    let shape = MachineShape { ram: PageCount::covering(64 * MIB), vcpus: 2, machine: Machine::Linux };
    let entry = load(&memory, shape, &mut file(&kernel), &plan).unwrap();
    assert_eq!(entry, 0x10_0200);
    let params: boot_params = memory.read_obj(GuestAddress(place::BOOT_PARAMS)).unwrap();
    let (image, size, line) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size, params.hdr.cmd_line_ptr);
    assert_eq!((u64::from(image), size, u64::from(line)), (64 * MIB - 4096, 6, place::CMDLINE));
    let mut text = [0; 6];
    memory.read_slice(&mut text, GuestAddress(place::CMDLINE)).unwrap();
    assert_eq!(&text, b"quiet\0");
    let first: u64 = memory.read_obj(GuestAddress(place::PAGE_TABLES + 0x2000 + 8)).unwrap();
    assert_eq!(first, (2 * MIB) | 0x83);
    let loaded: u8 = memory.read_obj(GuestAddress(place::HIGH_START)).unwrap();
    assert_eq!(loaded, 0xcc);
    assert!(load(&memory, shape, &mut file(&kernel[..100]), &plan).is_err(), "the file has changed since");
}
