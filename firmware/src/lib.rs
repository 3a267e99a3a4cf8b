//! The built-in guest of Offshoot: a ROM monitor.
#![no_std]

pub mod abi;

/// The flat image, a whole number of pages, to be placed at [`abi::IMAGE_BASE`].
pub static IMAGE: &[u8] = &[];
/// The same image as an ELF file.
pub static ELF: &[u8] = &[];
