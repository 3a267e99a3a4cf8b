//! The guest image: the monitor on a real machine.
//!
//! The image is never written once it runs, so all VMs share its pages: it has no `.data` and no `.bss` (the linker
//! script refuses them), and its page tables and descriptors have their accessed and dirty bits set beforehand.
#![no_std]
#![no_main]

mod builtins;
mod pc;
mod pvh;
mod tables;
mod touch;

use core::arch::asm;
use core::fmt::Write;
use core::panic::PanicInfo;

use firmware::monitor::{Monitor, SerialText};

/// The first function in user mode, at [`firmware::abi::ENTRY`]. `start_info` is 0, or what a PVH loader left.
// SAFETY: the linker script and the PVH entry are the only ones that refer to this name.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.entry")]
extern "C" fn user_entry(start_info: u64) -> ! {
    // SAFETY: this runs once, first, with the tables of this image loaded.
    let pc = unsafe { pc::Pc::new() };
    pvh::describe(&pc, start_info);
    loop {
        Monitor::new(&pc).run();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // The serial port gets the reason; the undefined instruction, with no handler for it, shuts the machine down.
    // SAFETY: as in `user_entry`, before which nothing can panic.
    let pc = unsafe { pc::Pc::new() };
    let _ = write!(SerialText(&pc), "\r\n{info}\r\n");
    // SAFETY: ends the machine.
    unsafe { asm!("ud2", options(noreturn)) }
}
