//! The image on a real /dev/kvm, under a VMM of one file.
#![allow(unsafe_code)] // Memory slots, private mappings and the page map.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use firmware::abi::{
    self, COM1, DOORBELL, Doorbell, ForkState, HOLE_START, IMAGE_BASE, PAGE_SIZE, WAIT, at, page_to_gpa, wake,
};
use firmware::pattern::{PAGE_WORDS, word};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

/// The registers under test are those the VMM uses.
#[path = "../../vmm/src/boot/monitor.rs"]
mod boot;
#[path = "../../guest-mem/tests/common/skip.rs"]
#[allow(dead_code, reason = "each crate's tests lack something else")]
mod skips;

use skips::{Lack, skip};

const COM1_LSR: u16 = COM1 + 5;
const MIB: u64 = 1 << 20;

/// Says something that the test harness does not swallow.
macro_rules! say {
    ($($arg:tt)*) => { writeln!(std::io::stderr(), $($arg)*).expect("standard error is open") };
}

/// /dev/kvm, or nothing where tests may do without.
fn kvm() -> Option<Kvm> {
    Kvm::new().inspect_err(|error| skip(Lack::Kvm, format!("/dev/kvm: {error}"))).ok()
}

/// Why the VMM has control again.
#[derive(Debug, PartialEq, Eq)]
enum Exit {
    Rang(Doorbell),
    /// The monitor wrote where there is no memory.
    Nowhere,
    /// The monitor waits; it has been told 0.
    Waits,
}

/// What a fork hands on besides memory.
struct State {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
}

struct Vm {
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: GuestMemoryMmap,
    /// What the next wait returns.
    wake: u32,
    typed: VecDeque<u8>,
    screen: String,
    tag: u64,
}

impl Vm {
    fn new(kvm: &Kvm, memory: GuestMemoryMmap) -> Self {
        let vm = kvm.create_vm().unwrap();
        for (slot, region) in memory.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: `Self` keeps the mapping as long as the VM.
            unsafe { vm.set_user_memory_region(slot) }.unwrap();
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
        let (wake, typed, screen) = (0, VecDeque::new(), String::new());
        Self { vcpu, _vm: vm, memory, wake, typed, screen, tag: 0 }
    }

    /// A VM with so much RAM and the image in it, registers still those of a reset.
    fn loaded(kvm: &Kvm, ram: u64) -> Self {
        let low = (GuestAddress(0), ram.min(HOLE_START) as usize);
        let high = (GuestAddress(abi::HOLE_END), ram.saturating_sub(HOLE_START) as usize);
        let ranges: Vec<_> = [low, high].into_iter().filter(|(_, len)| *len > 0).collect();
        let vm = Self::new(kvm, GuestMemoryMmap::from_ranges(&ranges).unwrap());
        vm.memory.write_slice(firmware::IMAGE, GuestAddress(IMAGE_BASE)).unwrap();
        vm
    }

    /// A VM whose monitor is about to run.
    fn launch(kvm: &Kvm, ram: u64) -> Self {
        let vm = Self::loaded(kvm, ram);
        vm.set(at::MEM_PAGES, ram / PAGE_SIZE);
        vm.set(at::GENERATION, 1u64);
        vm.set(at::TSC_KHZ, u64::from(vm.vcpu.get_tsc_khz().unwrap()));
        vm.text(at::NAME_LEN, at::NAME, "base");
        vm.set(at::EVENT, 1u64);
        let mut sregs = vm.vcpu.get_sregs().unwrap();
        let regs = boot::registers(&mut sregs);
        vm.vcpu.set_sregs(&sregs).unwrap();
        vm.vcpu.set_regs(&regs).unwrap();
        vm
    }

    /// A VM whose monitor waits for its first line.
    fn ready(kvm: &Kvm, ram: u64) -> Self {
        let mut vm = Self::launch(kvm, ram);
        assert_eq!(vm.run(), Exit::Rang(Doorbell::Alive));
        assert_eq!(vm.run(), Exit::Waits);
        vm
    }

    fn set(&self, gpa: u64, value: impl vm_memory::ByteValued) {
        self.memory.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    fn text(&self, len_at: u64, at: u64, text: &str) {
        self.memory.write_slice(text.as_bytes(), GuestAddress(at)).unwrap();
        self.set(len_at, text.len() as u32);
    }

    fn u64_at(&self, gpa: u64) -> u64 {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    fn run(&mut self) -> Exit {
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoIn(WAIT, data) => {
                    let bits = std::mem::take(&mut self.wake);
                    data.copy_from_slice(&bits.to_le_bytes());
                    if bits == 0 {
                        return Exit::Waits;
                    }
                }
                VcpuExit::IoIn(COM1_LSR, data) => data[0] = 0x60 | u8::from(!self.typed.is_empty()),
                VcpuExit::IoIn(COM1, data) => data[0] = self.typed.pop_front().unwrap(),
                VcpuExit::IoOut(COM1, data) => self.screen.push(char::from(data[0])),
                VcpuExit::IoOut(DOORBELL, data) => {
                    let value = u32::from_le_bytes(data.try_into().unwrap());
                    return Exit::Rang(Doorbell::from_u32(value).unwrap());
                }
                VcpuExit::MmioWrite(..) => return Exit::Nowhere,
                other => panic!("{other:?}; console: {}", self.screen),
            }
        }
    }

    /// Puts a line in the inbox.
    fn line(&mut self, line: &str) {
        self.tag += 1;
        self.set(at::INBOX_TAG, self.tag);
        self.text(at::INBOX_LEN, at::INBOX_TEXT, line);
        self.wake = wake::INBOX;
    }

    /// Runs until the next notice, over waits.
    fn notice(&mut self) -> Doorbell {
        loop {
            if let Exit::Rang(doorbell) = self.run() {
                return doorbell;
            }
        }
    }

    /// Runs until the line is answered. There is no balloon.
    fn answer(&mut self) -> String {
        let mut notice = self.notice();
        while matches!(notice, Doorbell::Inflate | Doorbell::Deflate) {
            notice = self.notice();
        }
        assert_eq!(notice, Doorbell::Answer);
        assert_eq!(self.u64_at(at::OUTBOX_TAG), self.tag);
        let len: u32 = self.memory.read_obj(GuestAddress(at::OUTBOX_LEN)).unwrap();
        let mut text = vec![0; len as usize];
        self.memory.read_slice(&mut text, GuestAddress(at::OUTBOX_TEXT)).unwrap();
        String::from_utf8(text).unwrap()
    }

    fn send(&mut self, line: &str) -> String {
        self.line(line);
        self.answer()
    }

    /// Completes the access in flight and reads the registers.
    fn save(&mut self) -> State {
        self.vcpu.set_kvm_immediate_exit(1);
        assert_eq!(self.vcpu.run().unwrap_err().errno(), libc::EINTR);
        self.vcpu.set_kvm_immediate_exit(0);
        State {
            regs: self.vcpu.get_regs().unwrap(),
            sregs: self.vcpu.get_sregs().unwrap(),
            fpu: self.vcpu.get_fpu().unwrap(),
        }
    }

    /// A copy of this VM, whose memory shows a frozen copy of ours until it is written.
    fn fork(&mut self, kvm: &Kvm, event: u64) -> Self {
        let state = self.save();
        let region = self.memory.iter().next().unwrap();
        // SAFETY: the name is a C string; the descriptor is checked, and nobody else's.
        let store = unsafe {
            let fd = libc::memfd_create(c"frozen".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        let mut bytes = vec![0; region.len() as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        store.write_all_at(&bytes, 0).unwrap();
        let window: MmapRegion = MmapRegion::build(
            Some(FileOffset::from_arc(Arc::new(store), 0)),
            bytes.len(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        )
        .unwrap();
        // SAFETY: our own mapping. A page that is there already is not brought in for writing by chance.
        unsafe { libc::madvise(window.as_ptr().cast(), window.size(), libc::MADV_POPULATE_READ) };
        let region = GuestRegionMmap::new(window, GuestAddress(0)).unwrap();
        let mut child = Self::new(kvm, GuestMemoryMmap::from_regions(vec![region]).unwrap());
        child.vcpu.set_sregs(&state.sregs).unwrap();
        child.vcpu.set_regs(&state.regs).unwrap();
        child.vcpu.set_fpu(&state.fpu).unwrap();
        child.tag = self.tag;
        child.set(at::EVENT, event);
        child
    }

    /// The pages of the first region that are not the file's any more.
    fn private_pages(&self) -> Vec<u64> {
        const PRESENT: u64 = 1 << 63;
        const FILE: u64 = 1 << 61;
        let region = self.memory.iter().next().unwrap();
        let pages = region.len() / PAGE_SIZE;
        let mut entries = vec![0; pages as usize * 8];
        let pagemap = OpenOptions::new().read(true).open("/proc/self/pagemap").unwrap();
        pagemap.read_exact_at(&mut entries, region.as_ptr() as u64 / PAGE_SIZE * 8).unwrap();
        (0..pages)
            .zip(entries.chunks_exact(8))
            .filter(|(_, entry)| u64::from_le_bytes((*entry).try_into().unwrap()) & (PRESENT | FILE) == PRESENT)
            .map(|(page, _)| page)
            .collect()
    }

    fn assert_image_unwritten(&self) {
        let mut image = vec![0; firmware::IMAGE.len()];
        self.memory.read_slice(&mut image, GuestAddress(IMAGE_BASE)).unwrap();
        assert!(image == firmware::IMAGE, "the guest wrote to its image");
    }
}

#[test]
fn commands() {
    let Some(kvm) = kvm() else { return };
    let mut vm = Vm::ready(&kvm, 64 * MIB);
    for (line, answer) in [
        ("id", "ok name=base generation=1"),
        ("mem", "ok first=64 pages=16384"),
        ("fill 64 100 5", "ok filled=100"),
        ("verify 64 100 5", "ok verified=100"),
        ("verify-touch 100 64 5", "ok verified=64"),
        ("touch 64 100 6", "ok touched=100"),
        ("verify-touch 64 100 6", "ok verified=100"),
        ("zero 64 100", "ok zeroed=100"),
        ("sum 64 100", "ok sum=0"),
        ("inflate 64 1", "err unsupported"),
        ("deflate 64 1", "err unsupported"),
        ("spin 1000000", "ok"),
        ("fill 16383 2 5", "err page=16383 count=2 is outside 64..16384"),
        ("what", "err unknown command what"),
        ("sum 0", "err usage: sum PAGE COUNT"),
    ] {
        assert_eq!(vm.send(line), answer, "{line}");
    }
    assert!(vm.send("help").starts_with("ok help, id, mem, "));
    assert!(vm.send("sum 0 16384").starts_with("ok sum="));

    vm.set(page_to_gpa(70) + 8 * 3, 1u64);
    assert_eq!(vm.send("fill 64 6 1"), "ok filled=6");
    assert_eq!(vm.send("zero 70 1"), "ok zeroed=1");
    let want = word(1, 70, 0);
    assert_eq!(vm.send("verify 64 10 1"), format!("err mismatch page=70 word=0 want={want} got=0"));

    let begin = Instant::now();
    let gap = vm.send("gap 20");
    assert!(begin.elapsed() >= Duration::from_millis(20), "{gap} after {:?}", begin.elapsed());
    assert!(gap["ok max_gap_us=".len()..].parse::<u64>().unwrap() < 1_000_000, "{gap}");

    vm.assert_image_unwritten();
    assert_eq!(vm.send("halt"), "ok");
    assert_eq!(vm.run(), Exit::Rang(Doorbell::Halt));
}

#[test]
fn stop_powers_off() {
    let Some(kvm) = kvm() else { return };
    let mut vm = Vm::ready(&kvm, 4 * MIB);
    vm.wake = wake::STOP;
    assert_eq!(vm.notice(), Doorbell::Halt);
}

#[test]
fn ram_goes_on_above_the_hole() {
    let Some(kvm) = kvm() else { return };
    let ram = 5 << 30;
    let mut vm = Vm::ready(&kvm, ram);
    assert_eq!(vm.send("mem"), "ok first=64 pages=1310720");
    let hole = HOLE_START / PAGE_SIZE;
    for first in [hole - 8, ram / PAGE_SIZE - 16] {
        assert_eq!(vm.send(&format!("fill {first} 16 42")), "ok filled=16");
        assert_eq!(vm.send(&format!("verify {first} 16 42")), "ok verified=16");
        for page in first..first + 16 {
            for index in [0, 1, 511] {
                assert_eq!(vm.u64_at(page_to_gpa(page) + index * 8), word(42, page, index), "page {page} word {index}");
            }
        }
    }
    vm.assert_image_unwritten();
}

#[test]
fn an_idle_fork_writes_nothing() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Vm::ready(&kvm, 4 * MIB);
    let mut child = parent.fork(&kvm, 2);
    assert_eq!(child.private_pages(), [abi::EVENT_PAGE / PAGE_SIZE], "what the VMM wrote");
    assert_eq!(child.run(), Exit::Rang(Doorbell::Alive));
    for _ in 0..100 {
        assert_eq!(child.run(), Exit::Waits);
        child.wake = wake::EVENT;
    }
    assert_eq!(child.private_pages(), [abi::EVENT_PAGE / PAGE_SIZE], "nothing was written by waiting");
    assert_eq!(child.send("id"), "ok name=base generation=1");
    let page = |gpa| gpa / PAGE_SIZE;
    let touched = [page(abi::EVENT_PAGE), page(abi::INBOX), page(abi::OUTBOX), page(abi::STACK_TOP) - 1];
    assert_eq!(child.private_pages(), touched, "a command writes its answer and one page of stack");
    assert_eq!(parent.send("id"), "ok name=base generation=1");
}

/// Pages are touched in a child that has not begun, by code of the image that is not the monitor's: nothing but that they are
/// private shows of it afterwards.
#[test]
fn pages_are_touched_ahead() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Vm::ready(&kvm, 4 * MIB);
    assert_eq!(parent.send("fill 64 100 1"), "ok filled=100");
    assert_eq!(parent.run(), Exit::Waits);
    let mut child = parent.fork(&kvm, 2);
    let mut before = vec![0; 4 << 20];
    child.memory.read_slice(&mut before, GuestAddress(0)).unwrap();
    let regs = child.vcpu.get_regs().unwrap();
    for (first, pages) in [(80, 10), (1, 1), (163, 2)] {
        child.vcpu.set_regs(&boot::toucher(&regs, page_to_gpa(first), pages)).unwrap();
        assert_eq!(child.run(), Exit::Rang(Doorbell::Touched));
    }
    child.save();
    child.vcpu.set_regs(&regs).unwrap();
    let touched: Vec<u64> = [1].into_iter().chain(80..90).chain([163, 164]).collect();
    assert_eq!(child.private_pages(), touched);
    let mut after = vec![0; 4 << 20];
    child.memory.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(before == after, "a touch changes nothing");
    assert_eq!(child.run(), Exit::Rang(Doorbell::Alive), "the monitor goes on where it was");
    assert_eq!(child.send("verify 64 100 1"), "ok verified=100");
    child.assert_image_unwritten();
}

#[test]
fn fork_from_inside() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Vm::ready(&kvm, 4 * MIB);
    assert_eq!(parent.send("fill 64 100 1"), "ok filled=100");
    parent.line("fork 2");
    assert_eq!(parent.notice(), Doorbell::Fork);
    assert_eq!(parent.memory.read_obj::<u32>(GuestAddress(at::FORK_COUNT)).unwrap(), 2);
    assert_eq!(parent.run(), Exit::Waits);
    let mut children = [parent.fork(&kvm, 11), parent.fork(&kvm, 12)];

    parent.text(at::FORK_TEXT_LEN, at::FORK_TEXT, "a b");
    parent.set(at::FORK_STATE, ForkState::Parent as u32);
    parent.wake = wake::EVENT;
    assert_eq!(parent.answer(), "ok parent child=a child=b");
    for (index, child) in (1u32..).zip(&mut children) {
        child.set(at::FORK_INDEX, index);
        child.set(at::FORK_STATE, ForkState::Child as u32);
        assert_eq!(child.run(), Exit::Rang(Doorbell::Alive), "the first thing a child does");
        assert_eq!(child.answer(), format!("ok child index={index}"));
        assert_eq!(child.send(&format!("fill 64 50 {}", index + 1)), "ok filled=50");
    }
    for (seed, vm) in (1..).zip([&mut parent].into_iter().chain(&mut children)) {
        assert_eq!(vm.send(&format!("verify 64 50 {seed}")), "ok verified=50");
        assert_eq!(vm.send("verify 114 50 1"), "ok verified=50");
    }

    parent.line("fork");
    assert_eq!(parent.notice(), Doorbell::Fork);
    parent.text(at::FORK_TEXT_LEN, at::FORK_TEXT, "no more names");
    parent.set(at::FORK_STATE, ForkState::Failed as u32);
    parent.wake = wake::EVENT;
    assert_eq!(parent.answer(), "err no more names");
}

#[test]
fn a_child_forked_in_the_middle_says_so_and_finishes() {
    let Some(kvm) = kvm() else { return };
    let mut vm = Vm::ready(&kvm, 4 * MIB);
    // The last two pages are not there: writes to them are exits in the middle of the command.
    vm.set(at::MEM_PAGES, 4 * MIB / PAGE_SIZE + 2);
    vm.line("fill 64 962 3");
    while vm.run() != Exit::Nowhere {}
    let mut child = vm.fork(&kvm, 2);
    while vm.run() == Exit::Nowhere {}
    while child.run() != Exit::Rang(Doorbell::Alive) {}
    while child.run() == Exit::Nowhere {}
    for vm in [&mut vm, &mut child] {
        assert_eq!(vm.u64_at(at::OUTBOX_TAG), 1);
        assert_eq!(vm.send("verify 64 960 3"), "ok verified=960");
    }
}

#[test]
fn the_console_is_the_serial_port() {
    let Some(kvm) = kvm() else { return };
    let mut vm = Vm::ready(&kvm, 4 * MIB);
    vm.typed.extend(b"ix\x7fd\r\nhalt\n");
    vm.wake = wake::SERIAL;
    assert_eq!(vm.notice(), Doorbell::Halt);
    assert_eq!(vm.screen, "> ix\x08 \x08d\r\nok name=base generation=1\r\n> halt\r\nok\r\n");
}

/// As a PVH loader that knows nothing of our ports: 32-bit protected mode, a `start_info`, a serial port.
#[test]
fn other_loaders_can_boot_the_elf_file() {
    let Some(kvm) = kvm() else { return };
    let ram = 64 * MIB;
    let mut vm = Vm::loaded(&kvm, ram);
    let (info, memmap) = (0x5_0000, 0x5_1004);
    vm.set(info, 0x336e_c578u32);
    vm.set(info + 40, memmap);
    vm.set(info + 48, 2u32);
    for (entry, start, end) in [(memmap, 0, 0x9_fc00), (memmap + 24, MIB, ram)] {
        vm.set(entry, start);
        vm.set(entry + 8, end - start);
        vm.set(entry + 16, 1u32);
    }
    vm.set(at::EVENT, 0xdeadu64);
    let note = firmware::ELF.windows(4).position(|bytes| bytes == b"Xen\0").unwrap() + 4;
    let entry = u32::from_le_bytes(firmware::ELF[note..note + 4].try_into().unwrap());

    let code = kvm_segment { limit: !0, selector: 8, type_: 11, present: 1, db: 1, s: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: 16, type_: 3, ..code };
    let sregs = vm.vcpu.get_sregs().unwrap();
    let sregs = kvm_sregs { cs: code, ds: data, es: data, ss: data, cr0: 0x11, ..sregs };
    vm.vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs { rip: entry.into(), rbx: info, rflags: 2, ..Default::default() };
    vm.vcpu.set_regs(&regs).unwrap();

    vm.typed.extend(b"mem\rfill 64 10 1\rhalt\r");
    let doorbell = loop {
        vm.wake = !0;
        if let Exit::Rang(doorbell) = vm.run() {
            break doorbell;
        }
    };
    assert_eq!(doorbell, Doorbell::Halt);
    assert!(vm.screen.starts_with("> mem\r\nok first=64 pages=16384\r\n> fill 64 10 1\r\nok filled=10\r\n"));
}

/// Figures, not limits: what the machine gives depends on the machine.
#[test]
fn speed() {
    let Some(kvm) = kvm() else { return };
    let begin = Instant::now();
    let mut vm = Vm::launch(&kvm, 128 * MIB);
    let loaded = begin.elapsed();
    assert_eq!(vm.run(), Exit::Rang(Doorbell::Alive));
    let alive = begin.elapsed();
    assert_eq!(vm.run(), Exit::Waits);
    say!(
        "launch: loaded {loaded:?}, alive {alive:?}, waits {:?}; image {} pages",
        begin.elapsed(),
        firmware::IMAGE.len() as u64 / PAGE_SIZE
    );
    let pages = 16384;
    for (what, line) in [
        ("fill, first touch", format!("fill 64 {pages} 1")),
        ("fill", format!("fill 64 {pages} 2")),
        ("verify", format!("verify 64 {pages} 2")),
        ("sum", format!("sum 64 {pages}")),
        ("touch", format!("touch 64 {pages} 3")),
        ("zero", format!("zero 64 {pages}")),
    ] {
        let begin = Instant::now();
        assert!(vm.send(&line).starts_with("ok "));
        say!("{what}: {:.2} µs/page", begin.elapsed().as_secs_f64() * 1e6 / f64::from(pages));
    }
    let begin = Instant::now();
    for _ in 0..100 {
        vm.send("spin 0");
    }
    say!("a line and its answer: {:?}", begin.elapsed() / 100);
    assert_eq!(vm.u64_at(page_to_gpa(64) + 8 * (PAGE_WORDS as u64 - 1)), 0);
}
