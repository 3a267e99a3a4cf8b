//! The built-in guest of Offshoot: a ROM monitor.
//!
//! It takes a line and answers `ok …` or `err …`. That is enough to fill memory, fork, and see who sees what, with
//! nothing to download. This crate is both sides' view of it: the contract ([`abi`]), the finished image ([`IMAGE`]),
//! and the monitor's logic, which runs on any [`machine::Machine`], a few vectors for instance.
//!
//! ```text
//!             VMM                                        guest, user mode
//!   event page, inbox ──────────────┐          ┌──► console ─┐
//!   WAIT completes ─────────────────┴► monitor ┤             ├► command ─► ops ─► RAM, by pattern
//!   DOORBELL, outbox ◄──────── answer ◄────────┴─────────────┘
//! ```
//!
//! `image/` is the rest: the one machine that is real ([`abi`]'s ports and pages), its page tables and descriptors as
//! constants, the entry for PVH loaders, and the memory functions compilers call. `build.rs` compiles this library
//! again for it, without the image, and links the two.
//!
//! # What holds
//!
//! * The image is never written. It has no `.data` and no `.bss`, its page tables have their accessed and dirty bits
//!   set, and no instruction marks its descriptors. All VMs share its pages.
//! * A monitor that waits writes nothing, whatever completes the wait, until a line comes. An answer writes the outbox
//!   and one page of stack.
//! * A VM that finds a new event word says so before it does anything else, in the middle of a command too.
//! * A command that writes checks its whole range first, and leaves everything below the first free page alone.
//! * A page in the balloon is not written until it is taken out.
//! * Everything runs in user mode, with interrupts off and no interrupt table, on one vCPU.
//!
//! # Holes
//!
//! * 32 GiB of RAM at most ([`abi::MAX_PAGES`]): the page tables are constants, of 2 MiB pages.
//! * A command is not interrupted: neither a stop nor a line reaches the monitor before it answers. A stop during a
//!   fork does.
//! * Serial bytes that come while a fork is under way complete every wait at once until it ends.
//! * An exception or a panic shuts the machine down (a panic says why on the serial port).
//! * The balloon holds up to 254 ranges of pages ([`abi::BALLOON_RANGES`]); under another VMM it answers `err unsupported`.
//! * Under another VMM (the serial port only) the monitor polls, uses RAM below 3 GiB only, has no clock for `gap`, and
//!   `fork` waits for ever. The image must survive at [`abi::IMAGE_BASE`], where some firmware keeps its own data.
#![no_std]
#![forbid(unsafe_code)]

pub mod abi;
mod answer;
mod balloon;
mod command;
mod console;
pub mod machine;
pub mod monitor;
mod ops;
pub mod pattern;

/// The flat image, a whole number of pages, to be placed at [`abi::IMAGE_BASE`] and entered at [`abi::ENTRY`].
#[cfg(not(monitor_image))]
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/monitor.bin"));

/// The image as an ELF file with a PVH note, for other VMMs.
#[cfg(not(monitor_image))]
pub static ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/monitor.elf"));

#[cfg(all(test, not(monitor_image)))]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_whole_pages_below_the_first_free_one() {
        assert_eq!(IMAGE.len() as u64 % abi::PAGE_SIZE, 0);
        assert!(abi::IMAGE_BASE + IMAGE.len() as u64 <= abi::IMAGE_LIMIT);
    }

    #[test]
    fn the_elf_file_enters_where_the_contract_says() {
        assert_eq!(ELF[24..32], abi::ENTRY.to_le_bytes());
    }

    #[test]
    fn ram_skips_the_devices() {
        let hole = abi::HOLE_START / abi::PAGE_SIZE;
        assert_eq!(abi::page_to_gpa(hole - 1), abi::HOLE_START - abi::PAGE_SIZE);
        assert_eq!(abi::page_to_gpa(hole), abi::HOLE_END);
    }
}
