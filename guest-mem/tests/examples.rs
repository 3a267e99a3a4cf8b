//! The examples do what they say.

use guest_mem::Local;
use std::fs::OpenOptions;

#[path = "../examples/fork.rs"]
mod fork;
#[path = "../examples/swap.rs"]
mod swap;

/// Whether there are traps, and otherwise says so.
fn has_traps() -> bool {
    let family = Local::new(vec![(0..1).into()]);
    family.map_err(|error| eprintln!("SKIPPED: {error}")).is_ok()
}

#[test]
fn a_guest_is_forked_in_one_process() {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return eprintln!("SKIPPED: a_guest_is_forked_in_one_process: /dev/kvm: {error}");
    }
    if has_traps() {
        fork::main().unwrap();
    }
}

#[test]
fn pages_go_out_and_come_back() {
    if has_traps() {
        swap::main().unwrap();
    }
}
