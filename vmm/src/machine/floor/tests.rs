//! The main thread and the vCPU threads, as they meet on the floor.

use super::*;
use crate::machine::state::Tsc;
use crate::wire::Line;
use kvm_bindings::{kvm_debugregs, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs};
use std::sync::mpsc::channel;
use std::thread;

fn pages(range: std::ops::Range<u64>) -> Vec<GfnRange> {
    vec![range.into()]
}

/// The main thread waits for a vCPU to stand, which waits for the main thread to take its pages.
#[test]
fn pages_are_taken_before_their_vcpu_stands() {
    let floor = Floor::new([StopSwitch::of_nobody()], Console::default()).unwrap();
    thread::scope(|scope| {
        let (stopped, told) = channel();
        let floor = &floor;
        let vcpu = scope.spawn(move || {
            assert!(matches!(floor.next_task(0), Task::Run(_)));
            told.recv().unwrap();
            // The main thread waits by now, or soon.
            thread::sleep(Duration::from_millis(20));
            let given = floor.give_back(pages(5..9));
            assert!(matches!(floor.next_task(0), Task::Save));
            floor.saved(0, Err("as the test has it".into()));
            given
        });
        floor.ask(RunState::Running);
        floor.await_running().unwrap();
        let Stopped { before, busy, .. } = floor.stop_and_save();
        assert_eq!((before, busy), (RunState::Running, vec![0]));
        stopped.send(()).unwrap();
        let mut offered = Vec::new();
        let shared = floor.await_standing_and_accept(|pages| {
            offered.push(pages.to_vec());
            super::tests::pages(5..7)
        });
        drop(shared.unwrap());
        assert_eq!(offered, [pages(5..9)]);
        floor.await_saved().unwrap();
        assert_eq!(vcpu.join().unwrap(), pages(5..7));
    });
}

/// A vCPU that goes on after a freeze counts as running before it runs an errand.
#[test]
fn an_errand_is_run_between_two_runs() {
    let floor = Floor::new([StopSwitch::of_nobody()], Console::default()).unwrap();
    floor.send_errand();
    thread::scope(|scope| {
        scope.spawn(|| {
            assert!(matches!(floor.next_task(0), Task::Run(_)));
            assert!(matches!(floor.next_task(0), Task::Attend));
            assert!(matches!(floor.next_task(0), Task::Run(_)));
        });
        drop(floor.await_standing().unwrap());
        floor.ask(RunState::Running);
        floor.await_running().unwrap();
    });
}

/// A vCPU that runs whenever it may, of a guest that only waits. Tells what it is woken up with.
fn run_waiting_guest(floor: &Floor, registers: &VcpuState) -> Wakeup {
    loop {
        match floor.next_task(0) {
            Task::Run(_) => {
                if let Some(wakeup) = floor.await_wakeup(0) {
                    return wakeup;
                }
            }
            Task::Save => floor.saved(0, Ok(registers.clone())),
            task => panic!("{task:?}"),
        }
    }
}

fn registers(tsc: Tsc) -> VcpuState {
    VcpuState {
        regs: kvm_regs::default(),
        sregs: kvm_sregs::default(),
        xsave: Vec::new(),
        xcrs: kvm_xcrs::default(),
        debug: kvm_debugregs::default(),
        msrs: Vec::new(),
        lapic: None,
        events: kvm_vcpu_events::default(),
        mp: kvm_mp_state::default(),
        tsc,
    }
}

/// Has a guest run that waits, until it gets what `act` has for it.
fn with_waiting_guest(tsc: Tsc, act: impl FnOnce(&Floor)) -> Wakeup {
    let floor = &Floor::new([StopSwitch::of_nobody()], Console::default()).unwrap();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| run_waiting_guest(floor, &registers(tsc)));
        floor.ask(RunState::Running);
        floor.await_running().unwrap();
        act(floor);
        vcpu.join().unwrap()
    })
}

fn freeze(floor: &Floor) -> (RunState, VcpuState) {
    let Stopped { before, .. } = floor.stop_and_save();
    drop(floor.await_standing().unwrap());
    let saved = floor.await_saved().unwrap().remove(0).unwrap();
    floor.go_on(before);
    if before == RunState::Running {
        floor.await_running().unwrap();
    }
    (before, saved)
}

#[test]
fn a_guest_that_waits_runs_no_more_until_there_is_something() {
    let woken = with_waiting_guest(Tsc::Offset(7), |floor| {
        for _ in 0..3 {
            assert_eq!(freeze(floor), (RunState::Running, registers(Tsc::Offset(7))));
            assert!(matches!(floor.lock().desks[0].rest, Rest::Resting(_)));
        }
        assert!(floor.stop().rested);
        floor.go_on(RunState::Running);
        floor.lock().mailbox.post(Line { tag: 1, text: "mem".into() });
        floor.notify();
    });
    assert_ne!(woken, Wakeup::default());
}

#[test]
fn what_comes_while_a_resting_guest_is_frozen_is_not_lost() {
    let woken = with_waiting_guest(Tsc::Offset(7), |floor| {
        freeze(floor);
        floor.stop_and_save();
        floor.lock().mailbox.post(Line { tag: 1, text: "mem".into() });
        floor.notify();
        drop(floor.await_standing().unwrap());
        floor.await_saved().unwrap();
        floor.go_on(RunState::Running);
    });
    assert_ne!(woken, Wakeup::default());
}

/// It is paused, frozen and resumed: the server hears of each.
#[test]
fn a_resting_guest_can_be_paused_and_resumed() {
    with_waiting_guest(Tsc::Offset(7), |floor| {
        freeze(floor);
        floor.ask(RunState::Paused);
        drop(floor.await_standing().unwrap());
        assert_eq!(freeze(floor).0, RunState::Paused);
        floor.ask(RunState::Running);
        floor.await_running().unwrap();
        let told = floor.lock().take_messages();
        let [FromVm::Running { .. }, FromVm::Paused, FromVm::Running { .. }] = &told[..] else {
            panic!("{told:?}");
        };
        floor.lock().mailbox.stop();
        floor.notify();
    });
}

/// Its children would have the time of when it was told that there is nothing.
#[test]
fn a_guest_whose_clock_is_a_value_does_not_rest() {
    with_waiting_guest(Tsc::Value(7), |floor| {
        freeze(floor);
        assert!(matches!(floor.lock().desks[0].rest, Rest::Not));
        floor.lock().mailbox.stop();
        floor.notify();
    });
}

#[test]
fn nobody_waits_for_a_main_thread_that_ends_the_vm() {
    let floor = Floor::new([StopSwitch::of_nobody()], Console::default()).unwrap();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| floor.give_back(pages(5..9)));
        floor.end(FromVm::Ended(Ending::Off));
        assert_eq!(vcpu.join().unwrap(), []);
        assert_eq!(floor.await_standing_and_accept(<[GfnRange]>::to_vec).unwrap_err(), Unavailable::Ended);
    });
}
