//! Drives real VM processes over their sockets, without the server: this program is server and VM process in one.
//!
//! It brings its own `main` because a VM process starts with one thread, which the usual test harness does not offer.
#![allow(missing_docs)]

mod cases;
mod family;
mod figures;
#[path = "../../../guest-mem/tests/common/skip.rs"]
#[allow(dead_code, reason = "each crate's tests lack something else")]
mod skips;
mod worker;

use libtest_mimic::{Arguments, Trial};
use skips::{Lack, skip};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

type Case = (&'static str, fn());

const CASES: &[Case] = &[
    ("the monitor starts and answers", cases::the_monitor_starts_and_answers),
    ("a fork and its parent go separate ways", cases::a_fork_and_its_parent_go_separate_ways),
    ("an idle fork moves nothing", cases::an_idle_fork_moves_nothing),
    ("a touch of what has not settled waits", cases::a_touch_of_what_has_not_settled_waits),
    ("a fork finds its window as expected", cases::a_fork_finds_its_window_as_expected),
    ("touched pages are told when they are written", cases::touched_pages_are_told_when_they_are_written),
    (
        "a fork starts from its own registers whatever was expected",
        cases::a_fork_starts_from_its_own_registers_whatever_was_expected,
    ),
    ("msrs other than this hosts are refused", cases::msrs_other_than_this_hosts_are_refused),
    ("a fork in the middle of a command", cases::a_fork_in_the_middle_of_a_command),
    ("a fork that the guest asks for", cases::a_fork_that_the_guest_asks_for),
    ("a paused machine stands still", cases::a_paused_machine_stands_still),
    ("the console passes bytes both ways", cases::the_console_passes_bytes_both_ways),
    ("off is off and a crash is told", cases::off_is_off_and_a_crash_is_told),
    ("each isolation leaves nothing to take", cases::each_isolation_leaves_nothing_to_take),
    ("a keeper outlives its VM process", cases::a_keeper_outlives_its_vm_process),
    ("without traps the parent waits for its pages", cases::without_traps_the_parent_waits_for_its_pages),
    ("a write to what is protected ends its VM", cases::a_write_to_what_is_protected_ends_its_vm),
    ("relatives see each others writes in shared memory", cases::relatives_see_each_others_writes_in_shared_memory),
    ("nonsense ends the process", cases::nonsense_ends_the_process),
    ("figures", figures::figures),
];

fn main() -> ExitCode {
    if std::env::var_os(worker::CHILD).is_some() {
        #[allow(unsafe_code)]
        // SAFETY: `Worker::spawn` put the socket there, and nobody else in this new program knows of it.
        let socket = unsafe { OwnedFd::from_raw_fd(worker::SOCKET) };
        vmm::machine::vm_process_main(socket);
    }
    // One after the other: some of them measure.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let run = |case: fn()| match kvm_ioctls::Kvm::new() {
        Ok(_) => case(),
        Err(error) => skip(Lack::Kvm, format!("/dev/kvm: {error}")),
    };
    let trials = CASES.iter().map(|&(name, case)| {
        Trial::test(name.replace(' ', "_"), move || {
            run(case);
            Ok(())
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
