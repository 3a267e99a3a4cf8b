//! The examples do what they say.

use guest_mem::Local;
use std::fs::OpenOptions;

#[path = "../examples/fork.rs"]
mod fork;
#[path = "common/skip.rs"]
#[allow(dead_code, reason = "each crate's tests lack something else")]
mod skips;
#[path = "../examples/swap.rs"]
mod swap;

use skips::{Lack, skip};

/// Whether there are traps, and otherwise says so.
fn has_traps() -> bool {
    let family = Local::new(vec![(0..1).into()]);
    family.map_err(|error| skip(Lack::Userfaultfd, error)).is_ok()
}

#[test]
fn a_guest_is_forked_in_one_process() {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return skip(Lack::Kvm, format!("/dev/kvm: {error}"));
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
