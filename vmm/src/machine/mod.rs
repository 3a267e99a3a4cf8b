//! A VM process: one KVM VM, its vCPUs, its devices and its window.
//!
//! ```text
//!   main thread                                vCPU thread
//!   ───────────                                ───────────
//!   process   socket and bell, messages        vcpu       runs the guest, carries out its port accesses
//!     │  vm   start, freeze, pause               │
//!     └──────────────►  floor  ◄─────────────────┘
//!        what each vCPU is told and where it stands, the mailbox, the console, messages for the server
//! ```
//!
//! Rules:
//! * Only the vCPU thread touches guest memory once the guest has run, and never with the floor locked: a touch may
//!   trap and wait for the server, and a freeze needs the floor.
//! * A vCPU stops only where `KVM_RUN` was interrupted, never between a port access and its completion: its registers
//!   are whole whenever it stands.
//! * The window is the main thread's. A vCPU whose guest gives pages back offers them to it and waits, also where the main
//!   thread waits for that vCPU to stand.
//! * From before its guest has run, each thread makes the system calls it needs and no others ([`filter`]).
//! * The process ends with its server: by `PDEATHSIG`, or at the socket's end.
//!
//! VM processes are children of the server, but made by its zygote, whose pages they share.

mod chips;
mod cpuid;
mod facts;
mod filter;
mod floor;
pub(crate) mod isolate;
mod jail;
mod keeper;
mod kick;
mod kvm;
pub(crate) mod landlock;
mod linux;
mod mailbox;
mod mmio;
mod outbox;
mod panic;
mod ports;
mod probe;
mod process;
mod registers;
pub mod state;
mod touch;
mod vcpu;
mod vm;
mod voice;
mod zygote;

pub use voice::Voice;

use crate::clock::monotonic_ns as now_ns;
use facts::Known;
use std::os::fd::OwnedFd;

/// Where a VM process's window stands: far below where the kernel places mappings of its own choice.
pub const WINDOW_BASE: u64 = 0x1000_0000_0000;

/// Runs a VM process, whose server is at the other end of `socket`, to its end. It must have one thread.
pub fn vm_process_main(socket: OwnedFd) -> ! {
    end("VM process", process::run(socket, &Known::little()))
}

/// Runs a zygote, whose server is at the other end of `socket`, to its end, and all VM processes that it makes. It must
/// have one thread.
pub fn zygote_main(socket: OwnedFd) -> ! {
    end("zygote", zygote::run(socket))
}

fn end(what: &str, done: Result<(), String>) -> ! {
    let code = match done {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{what}: {error}");
            1
        }
    };
    std::process::exit(code)
}
