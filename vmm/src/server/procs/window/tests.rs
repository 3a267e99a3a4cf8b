//! The server reads what a process has, waits for nobody, and is told no lies.

use super::memory::{Memory, Scratch};
use super::*;
use crate::skips::{Lack, skip};
use guest_mem::sys::Memfd;
use guest_mem::window::host::{Features, HostWindow, HugePages, Place};
use guest_mem::{PAGE_SIZE, PageCount, PageOrigin, Run, ScratchRange, Source};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

fn memory_of_this(process: u64, wants: Wants) -> Memory {
    let memory = Memory::new(ProcessId(process), wants);
    memory.is_born(Pid::this());
    memory
}

/// A store that pages 0 to 15 of windows show.
const STORE: StoreId = StoreId(1);

/// Such a window, whose store's file has the first `pages` alone.
fn window_on(features: Features, pages: PageCount) -> HostWindow {
    let all = GfnRange::from(0..16);
    let mut window = HostWindow::reserve(&[all], Place::Anywhere, features).unwrap();
    let file = Memfd::new("store", pages).unwrap();
    let run = Run { pages: all, source: Source::Store { store: STORE, origin: PageOrigin(0) } };
    window.map(&[run], &[(STORE, file.as_fd())], HugePages::Never).unwrap();
    window
}

/// Pages whose process lives were taken for lost where they could not be read for a moment. Here a part of a mapping lies
/// beyond its file, which the kernel tells as it tells that it was short of memory.
#[test]
fn only_memory_that_is_gone_is_lost() {
    let window = window_on(Features { userfaultfd: false, pagemap_scan: false }, PageCount(4));
    let remote = RemoteWindow(Rc::new(memory_of_this(1, Wants::default())));
    remote.0.open_image().unwrap();
    let range = ScratchRange::new(window.base(), Gfn(0), &[]);
    remote.0.scratch.borrow_mut().insert(STORE, Scratch { range, copy: None, uncopied: Vec::new() });
    let read = |first| {
        let read = remote.read_scratch(STORE, Gfn(first), &mut [0; 2 * PAGE_SIZE]);
        read.map_err(|error| error.kind())
    };
    assert_eq!(read(2), Ok(()));
    assert_eq!([read(3), read(8)], [Err(io::ErrorKind::Other); 2]);
    // One that has ended, of two that have the memory.
    remote.0.keeper.set(Some(Pid::from_raw(i32::MAX)));
    assert_eq!([read(2), read(8)], [Ok(()), Err(io::ErrorKind::Other)]);
    drop(window);
    assert_eq!(read(2), Err(io::ErrorKind::NotFound));
    remote.0.is_no_more();
    assert_eq!(read(2), Err(io::ErrorKind::NotFound));
}

/// A process that was taken over named memory whose pages it had trapped: the server, which alone could have served the
/// trap, waited for ever.
#[test]
fn whoever_reads_memory_never_waits_for_who_has_it() {
    if !crate::host::features().userfaultfd {
        return skip(Lack::Userfaultfd, "no userfaultfd");
    }
    let mut window = window_on(Features { userfaultfd: true, pagemap_scan: false }, PageCount(16));
    let wants = Wants::default();
    let remote = RemoteWindow(Rc::new(memory_of_this(1, Rc::clone(&wants))));
    remote.0.open_image().unwrap();
    let range = ScratchRange::new(window.base(), Gfn(0), &[]);
    remote.0.scratch.borrow_mut().insert(STORE, Scratch { range, copy: None, uncopied: Vec::new() });
    // Page 5 is there, its neighbours trap.
    window.supply(Gfn(5), &[9; PAGE_SIZE]).unwrap();
    let mut page = [0; PAGE_SIZE];
    remote.read_scratch(STORE, Gfn(5), &mut page).unwrap();
    assert_eq!(page, [9; PAGE_SIZE]);
    let (done, is_done) = std::sync::mpsc::channel();
    thread::spawn(move || {
        // Who waited would be freed by nothing but the end of this program.
        if is_done.recv_timeout(Duration::from_secs(20)).is_err() {
            eprintln!("whoever reads memory waits");
            std::process::abort();
        }
    });
    for first in [4, 5, 6] {
        assert!(remote.read_scratch(STORE, Gfn(first), &mut [0; 2 * PAGE_SIZE]).is_err(), "{first}");
    }
    done.send(()).unwrap();
    let failed = || wants.borrow().iter().any(|(_, want)| matches!(want, Want::Fail(_)));
    assert!(!failed());
    (0..REFUSED_MOST).for_each(|_| drop(remote.read_scratch(STORE, Gfn(6), &mut page)));
    assert!(failed(), "what is held back for long ends the VM");
}

/// A process named a copy that a sibling had made of itself as its own, and the server read that family's memory.
#[test]
fn only_who_was_given_the_lifeline_has_it() {
    let memory = memory_of_this(1, Wants::default());
    let theirs = memory.spin_lifeline().unwrap();
    let other = memory_of_this(2, Wants::default());
    let others = other.spin_lifeline().unwrap();
    // A child that has one of the two; closed on exec.
    let mut child = std::process::Command::new("sleep").arg("60").stdin(theirs).spawn().unwrap();
    let pid = Pid::from_raw(child.id() as i32);
    assert!(memory.has_lifeline(pid));
    assert!(!other.has_lifeline(pid));
    memory.cut_lifeline();
    assert!(!memory.has_lifeline(pid), "no freeze is under way");
    drop(others);
    child.kill().and_then(|()| child.wait()).unwrap();
}

/// A guest's page was being read from swap when its VM was removed: nobody answered the trap any more, and the worker of
/// KVM's that waited kept the memory, so that `rm` never came back.
#[test]
fn who_waits_for_a_forgotten_trap_touches_its_page_again() {
    if !crate::host::features().userfaultfd {
        return skip(Lack::Userfaultfd, "no userfaultfd");
    }
    let window = window_on(Features { userfaultfd: true, pagemap_scan: false }, PageCount(16));
    let memory = memory_of_this(1, Wants::default());
    let traps = window.userfaultfd().unwrap().try_clone_to_owned().unwrap();
    memory.traps.set(Userfaultfd::from_fd(traps)).unwrap();
    memory.base.set(window.base());
    let touched = || {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut traps = Vec::new();
        while traps.is_empty() && Instant::now() < deadline {
            memory.traps.get().unwrap().read(&mut traps, 64).unwrap();
            thread::sleep(Duration::from_millis(1));
        }
        traps.iter().map(|trap| memory.gfn(trap.address)).collect::<Vec<Gfn>>()
    };
    thread::scope(|scope| {
        let guest = scope.spawn(|| window.memory().read_obj::<u64>(GuestAddress(5 << 12)).unwrap());
        let first = touched();
        memory.wake_all();
        let again = touched();
        let traps = memory.traps.get().unwrap();
        let page = memory.base.get() + (5 << 12);
        traps.zero(page, PAGE_SIZE).and(traps.wake(page, PAGE_SIZE)).unwrap();
        assert_eq!(guest.join().unwrap(), 0);
        assert_eq!((first, again), (vec![Gfn(5)], vec![Gfn(5)]));
    });
}
