//! What a user of the library does who writes no `unsafe`: nothing of it ends the process, waits for ever, or shows one
//! family's memory to another.
#![forbid(unsafe_code)]

use guest_mem::{Gfn, GfnRange, Local, LocalVm, PageCount};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

#[path = "common/skip.rs"]
#[allow(dead_code, reason = "each crate's tests lack something else")]
mod skips;
use skips::{Lack, skip};

const PAGES: u64 = 1024;
const LONG: Duration = Duration::from_secs(30);

/// A family of one VM whose pages all say 7, or nothing on a host that has no traps.
fn family() -> Option<(Local, LocalVm)> {
    match Local::new(vec![GfnRange::new(Gfn(0), PageCount(PAGES))]) {
        Ok(family) => {
            let vm = family.launch().unwrap();
            let memory = family.memory(vm).unwrap();
            (0..PAGES).for_each(|page| memory.write_obj(7u64, at(page)).unwrap());
            Some((family, vm))
        }
        Err(error) => {
            skip(Lack::Userfaultfd, error);
            None
        }
    }
}

fn at(page: u64) -> GuestAddress {
    GuestAddress(page << 12)
}

/// Reads a page on another thread.
fn reader(memory: &GuestMemoryMmap, page: u64) -> mpsc::Receiver<u64> {
    let memory = memory.clone();
    let (read, reads) = mpsc::channel();
    thread::spawn(move || read.send(memory.read_obj(at(page)).unwrap()));
    reads
}

#[test]
fn a_family_can_be_used_and_moved_between_threads() {
    fn check<T: Send + Sync + 'static>() {}
    check::<Local>();
    check::<GuestMemoryMmap>();
}

/// It was the memory of the family that began next.
#[test]
fn memory_of_a_vm_that_is_gone_is_nobody_elses() {
    let Some((first, vm)) = family() else { return };
    let memory = first.memory(vm).unwrap();
    first.exit(vm).unwrap();
    let (second, other) = family().unwrap();
    let others = second.memory(other).unwrap();
    assert_eq!(memory.read_obj::<u64>(at(5)).unwrap(), 0, "it is zero");
    memory.write_obj(9u64, at(5)).unwrap();
    assert_eq!(others.read_obj::<u64>(at(5)).unwrap(), 7);
    drop(first);
    assert_eq!(memory.read_obj::<u64>(at(5)).unwrap(), 9, "it stays for as long as somebody holds it");
}

#[test]
fn memory_outlives_its_family() {
    let Some((family, vm)) = family() else { return };
    let memory = family.memory(vm).unwrap();
    let child = family.memory(family.fork(vm).unwrap()).unwrap();
    drop(family);
    assert_eq!([&memory, &child].map(|memory| memory.read_obj::<u64>(at(5)).unwrap()), [0, 0]);
}

/// The window was unmapped under a thread that waited for a page of it.
#[test]
fn who_waits_for_a_page_when_its_vm_exits_goes_on() {
    let Some((family, parent)) = family() else { return };
    for round in 0..20 {
        let child = family.fork(parent).unwrap();
        let memory = family.memory(child).unwrap();
        // Nobody answers until this returns.
        let (begun, begins) = mpsc::channel();
        let (go, goes) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(|| {
                let busy = move |_: &_| {
                    begun.send(()).unwrap();
                    goes.recv().unwrap();
                };
                family.inspect(busy).unwrap();
            });
            begins.recv().unwrap();
            let reads = [5, 500, 1000].map(|page| reader(&memory, page));
            thread::sleep(Duration::from_millis(5));
            let exits = scope.spawn(|| family.exit(child).unwrap());
            go.send(()).unwrap();
            exits.join().unwrap();
            for reads in reads {
                let word = reads.recv_timeout(LONG).expect("it goes on");
                assert!(word == 7 || word == 0, "round {round}: {word}");
            }
        });
    }
    family.write_back().unwrap();
    assert_eq!(family.memory(parent).unwrap().read_obj::<u64>(at(1000)).unwrap(), 7, "no zeros were planted");
}

/// It waited for itself to write the page back.
#[test]
fn memory_is_there_at_once_for_the_thread_that_forks() {
    let Some((family, parent)) = family() else { return };
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || {
        for _ in 0..20 {
            let child = family.fork(parent).unwrap();
            let [parents, childs] = [parent, child].map(|vm| family.memory(vm).unwrap());
            for page in 0..PAGES {
                assert_eq!(childs.read_obj::<u64>(at(page)).unwrap(), 7);
                parents.write_obj(7u64, at(page)).unwrap();
            }
            family.exit(child).unwrap();
        }
        done.send(()).unwrap();
    });
    is_done.recv_timeout(2 * LONG).expect("it does not hang");
}
