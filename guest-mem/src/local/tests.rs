use super::*;
use crate::addr::Gfn;
use crate::ids::SwapSlot;
use crate::swap::Fetch;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

fn family(pages: u64) -> Local {
    Local::new(vec![GfnRange::new(Gfn(0), PageCount(pages))]).expect("these tests need userfaultfd")
}

fn at(page: u64) -> GuestAddress {
    GuestAddress(page * 4096)
}

fn read(family: &Local, vm: LocalVm, page: u64) -> u64 {
    family.memory(vm).unwrap().read_obj(at(page)).unwrap()
}

fn write(family: &Local, vm: LocalVm, page: u64, word: u64) {
    family.memory(vm).unwrap().write_obj(word, at(page)).unwrap();
}

/// The books are in order, and agree with the stores.
fn check(family: &Local) {
    let broken = family.inspect(|manager| {
        let mut broken = Vec::new();
        manager.check_stores(&mut broken);
        broken.extend(manager.family().check_invariants().err().into_iter().flatten());
        broken
    });
    assert_eq!(broken.unwrap(), Vec::<String>::new());
}

/// One that is gone, and one of another family: no call about them changes anything.
#[test]
fn a_vm_that_is_not_there_is_an_error_of_every_call() {
    let (local, other) = (family(16), family(16));
    let vm = local.launch().unwrap();
    write(&local, vm, 3, 4);
    let gone = local.fork(vm).unwrap();
    local.exit(gone).unwrap();
    local.write_back().unwrap();
    let stranger = other.launch().unwrap();
    let before = format!("{:?}", local.stats().unwrap());
    for of in [gone, stranger] {
        let pages = GfnRange::from(0..1);
        let errors = [
            local.fork(of).map(drop),
            local.memory(of).map(drop),
            local.failure(of).map(drop),
            local.balloon(of, &[pages]).map(drop),
            local.protect(of, pages, Protection::ReadOnly),
            local.map(of, pages, Sharing::Shared),
            local.unmap(of, pages),
            local.move_pages(of, pages, Gfn(5)),
            local.exit(of),
        ];
        for (call, error) in errors.iter().enumerate() {
            assert!(matches!(error, Err(Error::NoSuchVm { vm, .. }) if *vm == of), "call {call}: {error:?}");
        }
    }
    assert_eq!(format!("{:?}", local.stats().unwrap()), before);
    assert_eq!((read(&local, vm, 3), read(&other, stranger, 3)), (4, 0));
    check(&local);
    check(&other);
}

/// A child reads pages that have not been written back yet.
#[test]
fn a_page_is_there_when_it_is_needed() {
    let family = family(4096);
    let parent = family.launch().unwrap();
    (0..2048).for_each(|page| write(&family, parent, page, page + 1));
    let child = family.fork(parent).unwrap();
    for page in (0..4096).rev() {
        assert_eq!(read(&family, child, page), if page < 2048 { page + 1 } else { 0 });
    }
    check(&family);
}

/// All members of a family give the same pages back: the store has room again, and nobody sees them.
#[test]
fn pages_that_are_given_back_are_freed() {
    let family = family(1024);
    let parent = family.launch().unwrap();
    (0..512).for_each(|page| write(&family, parent, page, page + 1));
    let mut vms = vec![parent];
    vms.extend((0..3).map(|_| family.fork(parent).unwrap()));
    family.write_back().unwrap();
    let pages = GfnRange::new(Gfn(100), PageCount(200));
    for &vm in &vms {
        assert_eq!(family.stats().unwrap().totals.resident, 512);
        assert_eq!(family.balloon(vm, &[pages]).unwrap(), [pages]);
        check(&family);
    }
    assert_eq!(family.stats().unwrap().totals.resident, 312);
    let child = family.fork(vms[2]).unwrap();
    for vm in vms.into_iter().chain([child]) {
        assert_eq!([99, 100, 299, 300].map(|page| read(&family, vm, page)), [100, 0, 0, 301]);
    }
}

/// Pages in a vector, each read at the second time of asking; or lost.
#[derive(Default)]
struct VecSwap {
    pages: Vec<u8>,
    asked: bool,
    freed: u64,
    fails: bool,
}

impl Swap for VecSwap {
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
        let first = SwapSlot((self.pages.len() / 4096) as u64);
        self.pages.extend_from_slice(pages);
        Ok(first)
    }

    fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        if self.fails {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.asked = !self.asked;
        if self.asked {
            return Ok(Fetch::Coming);
        }
        let at = first.0 as usize * 4096;
        buf.copy_from_slice(&self.pages[at..at + buf.len()]);
        Ok(Fetch::Here)
    }

    fn free(&mut self, _: SwapSlot, count: PageCount) {
        self.freed += count.0;
    }
}

fn swapping(pages: u64, options: Options) -> (Local, Arc<Mutex<VecSwap>>) {
    let swap = Arc::new(Mutex::new(VecSwap::default()));
    let ram = vec![GfnRange::new(Gfn(0), PageCount(pages))];
    let family = Local::with_options(ram, options.swap(Arc::clone(&swap) as LocalSwap));
    (family.expect("these tests need userfaultfd"), swap)
}

/// Parent and child read what was evicted under their eyes, twice; what they have written themselves stays.
#[test]
fn evicted_pages_come_back_through_real_windows() {
    let (family, swap) = swapping(512, Options::default());
    let parent = family.launch().unwrap();
    (0..512).for_each(|page| write(&family, parent, page, page + 1));
    let child = family.fork(parent).unwrap();
    family.write_back().unwrap();
    (0..512).step_by(16).for_each(|page| write(&family, child, page, 0));
    for round in 0..2 {
        let evicted = family.evict_some(PageCount(512)).unwrap();
        assert_eq!((evicted.pages, evicted.stopped.is_none()), (PageCount(512), true));
        assert_eq!(family.stats().unwrap().totals.resident, 0);
        for vm in [child, parent] {
            for page in 0..512 {
                let want = if vm == child && page % 16 == 0 { 0 } else { page + 1 };
                assert_eq!(read(&family, vm, page), want, "round {round}");
            }
        }
        check(&family);
    }
    let counts = family.stats().unwrap().swap;
    assert_eq!((counts.swap_out_pages, counts.swap_in_pages, counts.clean_evictions), (512, 1024, 512));
    family.exit(parent).unwrap();
    family.exit(child).unwrap();
    assert_eq!((swap.lock().unwrap().freed, family.inspect(Manager::windows).unwrap()), (512, 0));
}

/// Generations of forks, each writing one page, each reading all of its ancestors'; the books and the real mappings
/// agree, and the end leaves nothing.
#[test]
fn generations() {
    let family = family(1024);
    let mut vms = vec![family.launch().unwrap()];
    for generation in 0..16u64 {
        let vm = *vms.last().unwrap();
        write(&family, vm, generation * 3, generation + 1);
        vms.push(family.fork(vm).unwrap());
        if generation % 3 == 0 {
            family.write_back().unwrap();
        }
    }
    family.write_back().unwrap();
    for (age, &vm) in vms.iter().enumerate() {
        for generation in 0..16u64 {
            let want = if age as u64 >= generation { generation + 1 } else { 0 };
            assert_eq!(read(&family, vm, generation * 3), want);
        }
    }
    check(&family);
    for vm in vms {
        family.exit(vm).unwrap();
        check(&family);
    }
    family.write_back().unwrap();
    let totals = family.stats().unwrap().totals;
    assert_eq!((totals.objects, totals.stores, totals.tables), (0, 0, 0));
    assert_eq!(family.inspect(Manager::windows).unwrap(), 0);
}

/// Waits until something is so, for a few seconds.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Swap did not give a page back. Its window logged that, nobody was told, and who waited for it waited for ever.
#[test]
fn who_waits_for_a_lost_page_is_told_and_goes_on() {
    let (told, tells) = mpsc::channel();
    let goes_on = Arc::new(AtomicBool::new(false));
    let waits = Arc::clone(&goes_on);
    let options = Options::default().observe(move |vm, event| {
        // Whoever observes may stop a vCPU here: it has not gone on.
        thread::sleep(Duration::from_millis(50));
        let Event::Failed(failure) = event else { panic!("{event:?}") };
        told.send((vm, failure, waits.load(Ordering::SeqCst))).unwrap();
    });
    let (family, swap) = swapping(64, options);
    let parent = family.launch().unwrap();
    (0..64).for_each(|page| write(&family, parent, page, page + 1));
    let child = family.fork(parent).unwrap();
    family.write_back().unwrap();
    family.evict_some(PageCount(64)).unwrap();
    swap.lock().unwrap().fails = true;
    let memory = family.memory(child).unwrap();
    let (went, goes) = mpsc::channel();
    thread::spawn(move || {
        let word = memory.read_obj::<u64>(at(5)).unwrap();
        goes_on.store(true, Ordering::SeqCst);
        went.send(word).unwrap();
    });
    assert_eq!(goes.recv_timeout(Duration::from_secs(20)), Ok(0), "it goes on, and finds zeros");
    assert_eq!(tells.recv(), Ok((child, Failure::LostInSwap(Gfn(5)), false)));
    assert_eq!(family.failure(child).unwrap(), Some(Failure::LostInSwap(Gfn(5))));
    let refused = family.fork(child).unwrap_err();
    assert!(matches!(refused, Error::Failed { operation: "fork", .. }), "{refused}");
    assert_eq!(family.failure(parent).unwrap(), None, "it has not touched it yet");
    family.exit(child).unwrap();
    check(&family);
}

/// A trap could not be answered for want of memory. It, and all that had been read together with it, were forgotten.
#[test]
fn a_trap_that_fails_is_answered_later() {
    // On this thread, where calls can be made to fail.
    let (_orders, taken) = mpsc::channel();
    let delays = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&delays);
    let options = Options::default().observe(move |_, event| {
        assert!(matches!(event, Event::Delayed(manager::Error::Fill { .. })), "{event:?}");
        *counted.lock().unwrap() += 1;
    });
    let bell = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let ram = vec![GfnRange::new(Gfn(0), PageCount(64))];
    let mut owner = FamilyThread::new(1, ram, options, taken, bell).expect("these tests need userfaultfd");
    let parent = owner.launch().unwrap();
    (0..64).for_each(|page| owner.memory(parent).unwrap().write_obj(page + 1, at(page)).unwrap());
    let child = owner.fork(parent).unwrap();
    let guests = [5, 20].map(|page| {
        let memory = owner.memory(child).unwrap();
        thread::spawn(move || memory.read_obj::<u64>(at(page)).unwrap())
    });
    until("both wait", || guests.iter().all(|guest| !guest.is_finished()) && owner.waits_readable(child));
    crate::sys::inject::fail_after(0);
    owner.serve(child.id());
    assert!(crate::sys::inject::stop() && *delays.lock().unwrap() == 1, "one trap has failed");
    let deadline = Instant::now() + Duration::from_secs(20);
    while guests.iter().any(|guest| !guest.is_finished()) {
        assert!(Instant::now() < deadline, "they wait for ever");
        owner.serve(child.id());
        owner.try_again();
    }
    assert_eq!(guests.map(|guest| guest.join().unwrap()), [6, 21]);
}

/// It was taken silently, or there was a panic.
#[test]
fn a_vm_that_is_gone_or_anothers_is_an_error_in_every_call() {
    let (family, other) = (family(16), family(16));
    let (vm, gone, anothers) = (family.launch().unwrap(), family.launch().unwrap(), other.launch().unwrap());
    family.exit(gone).unwrap();
    assert_eq!(anothers.id(), vm.id(), "the books of each family count from the same number");
    for bad in [gone, anothers] {
        let errors = [
            family.fork(bad).map(drop),
            family.memory(bad).map(drop),
            family.failure(bad).map(drop),
            family.balloon(bad, &[GfnRange::from(0..1)]).map(drop),
            family.protect(bad, GfnRange::from(0..1), Protection::ReadOnly),
            family.exit(bad),
        ];
        for error in errors {
            let error = error.unwrap_err();
            assert!(matches!(error, Error::NoSuchVm { vm, .. } if vm == bad), "{error}");
        }
    }
    assert_eq!(family.fork(gone).unwrap_err().to_string(), format!("fork {gone}: there is no such VM in this family"));
    assert_eq!((read(&family, vm, 3), read(&other, anothers, 3)), (0, 0));
}

#[test]
fn memory_is_ranges_in_order() {
    let ranges = |raw: &[(u64, u64)]| raw.iter().map(|&(start, end)| GfnRange::from(start..end)).collect::<Vec<_>>();
    for bad in [&[][..], &[(4, 4)], &[(8, 12), (0, 4)], &[(0, 8), (4, 12)], &[(0, 1 << 35)]] {
        assert!(matches!(Local::new(ranges(bad)), Err(Error::BadMemory(_))), "{bad:?}");
    }
    let family = Local::new(ranges(&[(0, 4), (8, 12)])).unwrap();
    let vm = family.launch().unwrap();
    write(&family, vm, 11, 7);
    let child = family.fork(vm).unwrap();
    assert_eq!(read(&family, child, 11), 7);
    assert!(family.memory(child).unwrap().read_obj::<u64>(at(5)).is_err());
}

/// The thread would wait for itself.
#[test]
fn an_observer_that_asks_its_own_family_is_told_so() {
    let family: Arc<Mutex<Option<Arc<Local>>>> = Arc::default();
    let asked = Arc::clone(&family);
    let (told, tells) = mpsc::channel();
    let observer = move |vm, _: Event<'_>| {
        let family = asked.lock().unwrap().take();
        told.send(matches!(family.unwrap().exit(vm), Err(Error::Observing))).unwrap();
    };
    let (local, swap) = swapping(16, Options::default().observe(observer));
    let local = Arc::new(local);
    *family.lock().unwrap() = Some(Arc::clone(&local));
    let parent = local.launch().unwrap();
    write(&local, parent, 0, 1);
    let child = local.fork(parent).unwrap();
    local.write_back().unwrap();
    local.evict_some(PageCount(16)).unwrap();
    swap.lock().unwrap().fails = true;
    assert_eq!((read(&local, child, 0), tells.recv()), (0, Ok(true)));
}
