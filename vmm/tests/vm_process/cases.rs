//! The cases.

use crate::family::{Family, Machine};
use crate::worker::{ALL, Worker, read_memory};
use guest_mem::{Along, GfnRange, PageCount, Protection, Run};
use nix::sys::signal::{Signal, kill};
use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;
use vmm::machine::state::{MachineState, PackedState, VcpuState};
use vmm::wire::{Ending, Expect, FromVm, HostFeatures, Isolation, Origin, RunState, Start, Take, ToVm};

const MEM: u64 = 64 << 20;

fn moved_pages(frozen: &vmm::wire::Frozen) -> u64 {
    frozen.harvest.private().iter().map(|range| range.count().0).sum()
}

pub fn the_monitor_starts_and_answers() {
    let mut family = Family::new(MEM);
    let mut root = family.launch();
    println!("  {}", root.worker.ok("mem"));
    println!("  {}", root.worker.ok("id"));
    root.worker.ok("fill 100 50 7");
    root.worker.ok("verify 100 50 7");
    assert!(root.worker.ask("verify 100 50 8").starts_with("err"));
}

pub fn a_fork_and_its_parent_go_separate_ways() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    parent.worker.ok("fill 1000 3000 1");
    let mut child = family.fork(&mut parent, "child");
    assert!(child.worker.ok("id").contains("child"));
    child.worker.ok("verify 1000 3000 1");
    child.worker.ok("fill 1000 10 2");
    parent.worker.ok("verify 1000 3000 1");
    parent.worker.ok("fill 2000 10 3");
    child.worker.ok("verify 1000 10 2");
    child.worker.ok("verify 1010 2990 1");
    let mut grandchild = family.fork(&mut child, "grandchild");
    drop(child);
    grandchild.worker.ok("verify 1000 10 2");
    grandchild.worker.ok("verify 1010 2990 1");
    parent.worker.ok("verify 2000 10 3");
    for depth in 0..12 {
        grandchild.worker.ok(&format!("fill {} 3 {depth}", 5000 + depth * 2));
        let next = family.fork(&mut grandchild, "deep");
        grandchild = next;
    }
    (0..11).for_each(|depth| drop(grandchild.worker.ok(&format!("verify {} 2 {depth}", 5000 + depth * 2))));
    grandchild.worker.ok("verify 1010 2990 1");
}

pub fn an_idle_fork_moves_nothing() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    // It gives its sign of life before it waits, and writes its stack in between.
    std::thread::sleep(Duration::from_millis(50));
    let mut child = family.fork(&mut parent, "one");
    let again = family.freeze(&mut parent);
    assert_eq!(moved_pages(&again), 0, "{:?}", again.harvest);
    // The child was told who it is: that is all it has written.
    let first = family.freeze(&mut child);
    assert_eq!(moved_pages(&first), 1, "{:?}", first.harvest);
    family.settle(&mut child, &first);
    assert_eq!(moved_pages(&family.freeze(&mut child)), 0);
    child.worker.ok("mem");
}

pub fn a_touch_of_what_has_not_settled_waits() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    parent.worker.ok("fill 1000 100 1");
    let frozen = family.freeze(&mut parent);
    assert_eq!(frozen.activity, RunState::Running);
    let tag = parent.worker.post("verify 1000 100 1");
    let early = parent.worker.try_recv(Duration::from_millis(200));
    assert!(early.is_none(), "{early:?}");
    family.settle(&mut parent, &frozen);
    assert!(parent.worker.answer(tag).starts_with("ok"));
}

/// A prepared process maps what it expects, and at the fork what has come since over it: pages that the parent has written
/// then, and nothing else.
pub fn a_fork_finds_its_window_as_expected() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    parent.worker.ok("fill 1000 100 1");
    let first = family.freeze(&mut parent);
    family.settle(&mut parent, &first);
    let before = parent.runs.clone();
    let mut worker = family.prepare();
    family.expect(&mut worker, &before, vec![(1040..1060).into()], &first.state);

    parent.worker.ok("fill 1050 10 2");
    let second = family.freeze(&mut parent);
    family.settle(&mut parent, &second);
    let news: Vec<Run> = parent.runs.iter().filter(|run| !before.contains(run)).copied().collect();
    assert!(news.len() < parent.runs.len());
    let (start, fds) = family.start("child", &news, Origin::Fork { index: 1 }, RunState::Running);
    worker.start(start, &fds);
    assert!(worker.try_recv(Duration::from_millis(50)).is_none(), "it has nothing to start from");
    worker.load(&second.state);
    worker.first_sign();
    for line in ["verify 1000 50 1", "verify 1050 10 2", "verify 1060 40 1"] {
        worker.ok(line);
    }
    // What the parent wrote meanwhile is not what the child wrote, though it had been touched for it.
    let told = commanded(&told_writes(&mut worker, true));
    assert!(told.is_empty(), "{told:?}");
}

/// What a clone says that it has written, in its first moments or at their end.
fn told_writes(worker: &mut Worker, at_end: bool) -> Vec<GfnRange> {
    worker.expect(|message| match message {
        FromVm::Wrote { pages, last } if *last == at_end => Some(pages.clone()),
        _ => None,
    })
}

/// Those among them that commands write, and not the guest for itself.
fn commanded(pages: &[GfnRange]) -> Vec<u64> {
    pages.iter().flat_map(|pages| pages.raw()).filter(|page| (1000..1100).contains(page)).collect()
}

/// Pages that were touched before the guest began are written for KVM's log. What they hold tells who has written them.
pub fn touched_pages_are_told_when_they_are_written() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    parent.worker.ok("fill 1000 100 1");
    let frozen = family.freeze(&mut parent);
    family.settle(&mut parent, &frozen);
    let mut worker = family.prepare();
    family.expect(&mut worker, &parent.runs, vec![(1040..1060).into(), (1070..1071).into()], &frozen.state);
    let (start, fds) = family.start("child", &[], Origin::Fork { index: 1 }, RunState::Running);
    worker.start(start, &fds);
    worker.tell(&ToVm::LoadExpected, &[]);
    worker.first_sign();
    worker.ok("fill 1035 10 2");
    let known = commanded(&told_writes(&mut worker, false));
    assert_eq!(known, (1035..1040).collect::<Vec<_>>(), "of the others it is known");
    assert_eq!(commanded(&told_writes(&mut worker, true)), (1035..1045).collect::<Vec<_>>());
    for line in ["verify 1000 35 1", "verify 1035 10 2", "verify 1045 55 1"] {
        worker.ok(line);
    }
}

/// The registers that a process has got ready are those of its parent's last fork, or of another parent's.
pub fn a_fork_starts_from_its_own_registers_whatever_was_expected() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    let frozen = family.freeze(&mut parent);
    family.settle(&mut parent, &frozen);
    let one = frozen.state.vcpus[0].clone();
    let other = different_in_every_group(&one);
    for (expected, given) in [
        (vec![], &other),
        (vec![&one], &one),
        (vec![&one], &other),
        (vec![&other], &one),
        (vec![&one, &other], &one),
        (vec![&other, &one], &other),
    ] {
        let mut worker = family.prepare();
        let state = |vcpu: &VcpuState| MachineState { vcpus: vec![vcpu.clone()], ..*frozen.state.clone() };
        for vcpu in &expected {
            family.expect(&mut worker, &parent.runs, vec![(1..2).into(), (200..210).into()], &state(vcpu));
        }
        let (start, fds) = family.start("child", &parent.runs, Origin::Fork { index: 1 }, RunState::Paused);
        worker.start(start, &fds);
        match expected.last() {
            Some(last) if *last == given => worker.tell(&ToVm::LoadExpected, &[]),
            _ => worker.load(&state(given)),
        }
        let mut child = Machine { worker, runs: parent.runs.clone() };
        let got = without_unused(&family.freeze(&mut child).state.vcpus[0]);
        assert!(got == without_unused(given), "{given:?}\nis expected to be, after {expected:?}\n{got:?}");
    }
}

/// A hostile parent's list had an MSR twice: the vCPU got both, and was compared by the first only.
pub fn msrs_other_than_this_hosts_are_refused() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    let frozen = family.freeze(&mut parent);
    family.settle(&mut parent, &frozen);
    let honest = &frozen.state.vcpus[0].msrs;
    let last = *honest.last().expect("a vCPU has MSRs");
    let twice = [honest.as_slice(), &[last]].concat();
    let mut swapped = honest.clone();
    swapped.swap(0, 1);
    let fewer = honest[1..].to_vec();
    for msrs in [twice, swapped, fewer] {
        let vcpu = VcpuState { msrs, ..frozen.state.vcpus[0].clone() };
        let state = MachineState { vcpus: vec![vcpu], ..*frozen.state.clone() };
        let refused = |message: &FromVm| match message {
            FromVm::StartFailed(why) => Some(why.clone()),
            FromVm::Expecting | FromVm::Paused => Some("it is taken".into()),
            _ => None,
        };
        let mut expecting = family.prepare();
        let (Start { runs, stores, .. }, fds) =
            family.start("nobody", &parent.runs, Origin::Monitor, RunState::Running);
        let expected = Expect { runs, stores, ahead: Vec::new(), state: Some(PackedState::pack(&state)) };
        expecting.tell(&ToVm::Expect(Box::new(expected)), &fds);
        let mut loading = family.prepare();
        let (start, fds) = family.start("child", &parent.runs, Origin::Fork { index: 1 }, RunState::Paused);
        loading.start(start, &fds);
        loading.load(&state);
        for worker in [&mut expecting, &mut loading] {
            let why = worker.expect(refused);
            assert!(why.contains("other MSRs"), "{why}");
        }
    }
}

/// Words of the XSAVE area.
const XMM: Range<usize> = 160 / 4..416 / 4;
const COMPONENTS_IN_USE: usize = 512 / 4;
/// Among those, the XMM registers.
const SSE: u32 = 2;

/// A processor that runs finds out that registers which are all zero are not in use, which is the same.
fn without_unused(vcpu: &VcpuState) -> VcpuState {
    let mut vcpu = vcpu.clone();
    if vcpu.xsave[XMM].iter().all(|word| *word == 0) {
        vcpu.xsave[COMPONENTS_IN_USE] &= !SSE;
    }
    vcpu
}

/// But for the TSC: not every host keeps another offset.
fn different_in_every_group(vcpu: &VcpuState) -> VcpuState {
    const LSTAR: u32 = 0xc000_0082;
    let mut other = vcpu.clone();
    other.regs.rbx ^= 1;
    other.sregs.fs.base ^= 0x1000;
    other.xsave[XMM.start] ^= 1;
    other.xsave[COMPONENTS_IN_USE] |= SSE;
    other.xcrs.xcrs[0].value ^= 2;
    other.debug.db[0] ^= 0x1000;
    other.msrs.iter_mut().filter(|msr| msr.index == LSTAR).for_each(|msr| msr.data ^= 0x1000);
    other.events.nmi.masked ^= 1;
    other
}

pub fn a_fork_in_the_middle_of_a_command() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    parent.worker.ok("fill 1000 100 1");
    let tag = parent.worker.post("spin 300000000");
    std::thread::sleep(Duration::from_millis(20));
    let mut child = family.fork(&mut parent, "child");
    assert!(child.worker.answer(tag).starts_with("ok"), "the child ends the line too");
    child.worker.ok("verify 1000 100 1");
    assert!(parent.worker.answer(tag).starts_with("ok"));
    parent.worker.ok("verify 1000 100 1");
}

pub fn a_fork_that_the_guest_asks_for() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    let tag = parent.worker.post("fork 2");
    let count = parent.worker.expect(|message| match message {
        FromVm::Fork { count } => Some(*count),
        _ => None,
    });
    assert_eq!(count, 2);
    let frozen = family.freeze(&mut parent);
    family.settle(&mut parent, &frozen);
    for index in [1, 2] {
        let mut child = family.child(&format!("c-{index}"), &parent.runs, &frozen.state, index);
        let answer = child.worker.answer(tag);
        assert!(answer.contains(&format!("child index={index}")), "{answer}");
        child.worker.ok("mem");
    }
    parent.worker.tell(&ToVm::ForkDone(Ok(vec!["c-1".into(), "c-2".into()])), &[]);
    let answer = parent.worker.answer(tag);
    assert!(answer.contains("parent") && answer.contains("c-1") && answer.contains("c-2"), "{answer}");
    parent.worker.ok("mem");
}

pub fn a_paused_machine_stands_still() {
    let mut family = Family::new(MEM);
    let mut root = family.launch();
    let paused = |message: &FromVm| matches!(message, FromVm::Paused).then_some(());
    root.worker.tell(&ToVm::Pause, &[]);
    root.worker.expect(paused);
    let tag = root.worker.post("mem");
    assert!(root.worker.try_recv(Duration::from_millis(100)).is_none());
    let frozen = family.freeze(&mut root);
    assert_eq!(frozen.activity, RunState::Paused);
    family.settle(&mut root, &frozen);
    root.worker.tell(&ToVm::Resume, &[]);
    root.worker.running();
    assert!(root.worker.answer(tag).starts_with("ok"));

    let mut worker = family.prepare();
    let (start, fds) = family.start("asleep", &root.runs, Origin::Fork { index: 1 }, RunState::Paused);
    worker.start(start, &fds);
    worker.load(&frozen.state);
    worker.expect(paused);
    // Shorter than a clone's first moments, at whose end it says what it wrote.
    assert!(worker.try_recv(Duration::from_millis(50)).is_none());
    worker.tell(&ToVm::Resume, &[]);
    worker.running();
    worker.ok("mem");
}

pub fn the_console_passes_bytes_both_ways() {
    let mut family = Family::new(MEM);
    let mut root = family.launch();
    root.worker.tell(&ToVm::Console(b"mem\r".to_vec()), &[]);
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("ok ") {
        seen.extend(root.worker.expect(|message| match message {
            FromVm::Console(bytes) => Some(bytes.clone()),
            _ => None,
        }));
    }
    println!("  {:?}", String::from_utf8_lossy(&seen));
}

pub fn off_is_off_and_a_crash_is_told() {
    let ending = |message: &FromVm| match message {
        FromVm::Ended(ending) => Some(ending.clone()),
        _ => None,
    };
    let mut family = Family::new(MEM);
    let mut root = family.launch();
    root.worker.tell(&ToVm::Stop, &[]);
    assert_eq!(root.worker.expect(ending), Ending::Off);
    let mut root = family.launch();
    root.worker.post("halt");
    assert_eq!(root.worker.expect(ending), Ending::Off);
    let store = family.new_store();
    root.worker.tell(
        &ToVm::Freeze { store, max_runs: 100, take: Take::Remap, along: Along::default(), first: Vec::new() },
        &[family.file(store)],
    );
    let why = root.worker.expect(|message| match message {
        FromVm::FreezeFailed(why) => Some(why.clone()),
        _ => None,
    });
    assert!(why.contains("ended"), "{why}");

    let mut garbage = firmware::IMAGE.to_vec();
    garbage[(firmware::abi::ENTRY - firmware::abi::IMAGE_BASE) as usize..].fill(0x06); // no instruction
    let mut family = Family::with_image(MEM, &garbage);
    let mut worker = family.prepare();
    let runs = family.launch_runs();
    let (start, fds) = family.start("crash", &runs, Origin::Monitor, RunState::Running);
    worker.start(start, &fds);
    let Ending::Dead(why) = worker.expect(ending) else { panic!("it is off") };
    println!("  {why}");
}

pub fn each_isolation_leaves_nothing_to_take() {
    for isolation in [Isolation::OwnUser, Isolation::UserNamespace] {
        let mut family = Family::new(MEM);
        family.isolation = isolation;
        let mut parent = family.launch();
        parent.worker.ok("fill 1000 100 1");
        let mut child = family.fork(&mut parent, "child");
        child.worker.ok("verify 1000 100 1");

        let proc = format!("/proc/{}", parent.worker.pid());
        let status = fs::read_to_string(format!("{proc}/status")).unwrap();
        for wanted in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"] {
            assert!(status.contains(wanted), "{isolation:?}: {status}");
        }
        let root = fs::read_link(format!("{proc}/root")).unwrap();
        assert!(root.starts_with(std::env::temp_dir()), "{isolation:?}: {root:?}");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        for fd in fs::read_dir(format!("{proc}/fd")).unwrap() {
            let target = fs::read_link(fd.unwrap().path()).unwrap();
            assert!(!target.to_string_lossy().contains("test-store"), "{target:?} is still open");
        }
        assert_eq!(fs::read_dir(format!("/proc/{}/fd", parent.worker.keeper)).unwrap().count(), 0);
        let base = parent.worker.window_base;
        for pid in [parent.worker.pid(), parent.worker.keeper] {
            assert!(read_memory(pid, base + 0x1000, 4096).is_ok());
            let pagemap = fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
            let mut entry = [0; 8];
            std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entry, base / 4096 * 8 + 8).unwrap();
            assert_ne!(u64::from_ne_bytes(entry), 0);
        }

        let store = family.new_store();
        parent.worker.tell(&ToVm::Probe, &[family.file(store)]);
        let ways = parent.worker.expect(|message| match message {
            FromVm::Probed(ways) => Some(ways.clone()),
            _ => None,
        });
        println!("  {isolation:?}: ways to write to a store: {ways:?}");
        assert!(ways.is_empty(), "{ways:?}");
    }
}

pub fn a_keeper_outlives_its_vm_process() {
    let mut family = Family::new(MEM);
    let mut parent = family.launch();
    parent.worker.ok("fill 1000 100 9");
    let frozen = family.freeze(&mut parent);
    kill(parent.worker.pid(), Signal::SIGKILL).unwrap();
    parent.worker.child.wait().unwrap();
    let pages = frozen.harvest.private();
    let lost: Vec<_> = pages
        .iter()
        .filter(|range| {
            read_memory(parent.worker.keeper, frozen.scratch_base + range.start().gpa(), range.len_bytes()).is_err()
        })
        .collect();
    assert!(lost.is_empty(), "{lost:?}");
}

pub fn without_traps_the_parent_waits_for_its_pages() {
    let mut family = Family::new(MEM);
    family.features = HostFeatures { userfaultfd: false, pagemap_scan: false };
    let mut parent = family.launch();
    parent.worker.ok("fill 1000 100 4");
    let frozen = family.freeze(&mut parent);
    assert_eq!(frozen.activity, RunState::Paused);
    family.settle(&mut parent, &frozen);
    parent.worker.tell(&ToVm::Resume, &[]);
    parent.worker.running();
    parent.worker.ok("verify 1000 100 4");
    let mut child = family.child("child", &parent.runs, &frozen.state, 1);
    child.worker.ok("verify 1000 100 4");
}

pub fn nonsense_ends_the_process() {
    let (mut link, mut child) = Worker::spawn();
    link.send(&(77_u8, "nonsense"), &[]).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let (mut link, mut child) = Worker::spawn();
    link.send(&ToVm::Resume, &[]).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let (link, mut child) = Worker::spawn();
    drop(link);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let mut worker = Worker::prepare(PageCount(4096), Isolation::Off, ALL);
    worker.tell(
        &ToVm::Freeze {
            store: guest_mem::StoreId(1),
            max_runs: 1,
            take: Take::Remap,
            along: Along::default(),
            first: Vec::new(),
        },
        &[std::io::stdin().as_fd()],
    );
    let why = worker.expect(|message| match message {
        FromVm::FreezeFailed(why) => Some(why.clone()),
        _ => None,
    });
    assert!(why.contains("not started"), "{why}");
}

/// The guest may read what is protected, and write it when it is not any more. A write before that ends its VM, and no page
/// has changed.
pub fn a_write_to_what_is_protected_ends_its_vm() {
    let mut family = Family::new(MEM);
    let mut machine = family.launch();
    machine.worker.ok("fill 1000 100 1");
    let protect = |machine: &mut Machine, protection| {
        machine.worker.tell(&ToVm::Protect { pages: GfnRange::from(1000..1050), protection }, &[]);
    };
    protect(&mut machine, Protection::ReadOnly);
    machine.worker.ok("verify 1000 100 1");
    machine.worker.ok("fill 1050 10 2");
    protect(&mut machine, Protection::ReadWrite);
    machine.worker.ok("fill 1000 10 3");
    protect(&mut machine, Protection::ReadOnly);
    let mut child = family.fork(&mut machine, "child");
    child.worker.ok("fill 1000 10 4");
    machine.worker.ok("verify 1000 10 3");
    machine.worker.post("fill 1040 1 5");
    let why = machine.worker.expect(|message| match message {
        FromVm::Ended(Ending::Dead(why)) => Some(why.clone()),
        _ => None,
    });
    assert!(why.contains("memory") || why.contains("KVM_RUN"), "{why}");
    child.worker.ok("verify 1010 40 1");
}

/// What one of them writes in shared memory the others see, before a fork and after it; no freeze takes any of it, though KVM's
/// log tells of all that is written.
pub fn relatives_see_each_others_writes_in_shared_memory() {
    let shared = GfnRange::from(2010..2110);
    let mut family = Family::new(MEM);
    family.share(shared);
    let mut parent = family.launch();
    parent.worker.ok("fill 1990 140 1");
    let mut child = family.fork(&mut parent, "child");
    child.worker.ok("verify 1990 140 1");
    child.worker.ok("fill 1990 70 2");
    parent.worker.ok("verify 1990 20 1");
    parent.worker.ok("verify 2010 50 2");
    parent.worker.ok("fill 2060 60 3");
    child.worker.ok("verify 2060 50 3");
    child.worker.ok("verify 2110 20 1");
    for machine in [&mut parent, &mut child] {
        machine.worker.ok("fill 2000 5 4");
        let frozen = family.freeze(machine);
        let taken = frozen.harvest.taken();
        assert!(!taken.is_empty() && taken.iter().all(|pages| pages.intersect(shared).is_empty()), "{taken:?}");
        family.settle(machine, &frozen);
    }
    let mut grandchild = family.fork(&mut child, "grandchild");
    drop(child);
    grandchild.worker.ok("fill 2010 10 5");
    parent.worker.ok("verify 2010 10 5");
    parent.worker.ok("fill 2100 10 6");
    grandchild.worker.ok("verify 2100 10 6");
    grandchild.worker.ok("verify 2020 40 2");
    // A descriptor for reading only is not enough, and nothing is written through it.
    let mut stranger = family.prepare();
    let runs = parent.runs.clone();
    let (start, fds) = family.start("stranger", &runs, Origin::Monitor, RunState::Running);
    let open = |fd: &BorrowedFd<'_>| fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    let read_only: Vec<fs::File> = fds.iter().map(open).collect();
    stranger.start(start, &read_only.iter().map(AsFd::as_fd).collect::<Vec<_>>());
    let why = stranger.expect(|message| match message {
        FromVm::StartFailed(why) => Some(why.clone()),
        FromVm::Running { .. } => Some("it runs".into()),
        _ => None,
    });
    assert!(why.contains("mmap"), "{why}");
}
