//! Kernels of a few instructions, on the machine that Linux guests have: they run on every host, also where a stock kernel
//! does not.

use offshoot_tests::{Guest, PATIENCE, TEN_SECONDS, TestHome, wait_until};
use std::fs;
use vmm::api::VmState;
use vmm::client::{ForkOptions, Vm};

const ENTRY: u64 = 0x10_0000;
const RAM_64M: &str = "64M";

/// An ELF kernel of this code, loaded at 1 MiB and entered in 64-bit mode.
fn kernel(code: &[u8]) -> Vec<u8> {
    const OFFSET: usize = 0x1000;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for half in [1_u32, 7] {
        file.extend(half.to_le_bytes());
    }
    let len = code.len() as u64;
    for word in [OFFSET as u64, ENTRY, ENTRY, len, len, OFFSET as u64] {
        file.extend(word.to_le_bytes());
    }
    file.resize(OFFSET, 0);
    file.extend(code);
    file
}

/// `mov edx, 0x3f8; mov al, BYTE; out dx, al`
fn print(byte: u8) -> Vec<u8> {
    vec![0xba, 0xf8, 0x03, 0, 0, 0xb0, byte, 0xee]
}

/// Asks the machine for a reset, which ends it: `mov edx, RESET; mov al, VALUE; out dx, al; hlt`
fn reset() -> Vec<u8> {
    use vmm::layout::devices::{RESET, RESET_VALUE};
    let [low, high] = RESET.to_le_bytes();
    vec![0xba, low, high, 0, 0, 0xb0, RESET_VALUE, 0xee, 0xf4]
}

fn launch(home: &TestHome, name: &str, code: &[u8]) -> Vm {
    let path = home.path().join(format!("{name}.elf"));
    fs::create_dir_all(home.path()).expect("a home");
    fs::write(&path, kernel(code)).expect("write a kernel");
    let path = path.to_str().expect("a path of text");
    home.cli(&["launch", name, "-m", RAM_64M, "--kernel", path]).good();
    fs::remove_file(path).expect("remove a kernel");
    home.client().vm(name)
}

/// An uncompressed kernel starts with what the boot protocol promises, prints, and ends the machine.
#[test]
fn an_elf_kernel_runs_and_ends() {
    let Some(home) = TestHome::new() else { return };
    // The boot parameters are in RSI: their magic number, at 0x202, is printed. `mov ecx, 4; add rsi, 0x202; lodsb; out dx, al; loop`
    let boot = [0xba, 0xf8, 0x03, 0, 0, 0xb9, 4, 0, 0, 0, 0x48, 0x81, 0xc6, 0x02, 0x02, 0, 0, 0xac, 0xee, 0xe2, 0xfc];
    let vm = launch(&home, "k", &[boot.to_vec(), print(b'!'), reset()].concat());
    let ended = vm.wait(Some(TEN_SECONDS)).unwrap();
    assert_eq!((ended.state, ended.reason.as_deref()), (VmState::Off, Some("the guest rebooted")));
    assert_eq!(vm.log(), "HdrS!");
    assert_eq!(home.cli(&["wait", "k"]).good(), "off: the guest rebooted\n");
    assert!(home.cli(&["ls"]).good().contains("the guest rebooted"));
}

/// Where KVM interprets guest kernels, an instruction that it does not know ends the VM, and its owner learns what such a
/// host can run. Elsewhere the instruction is one like any other.
#[test]
fn an_instruction_that_the_host_does_not_know_ends_the_vm() {
    let Some(home) = TestHome::new() else { return };
    // `mov edi, 0x200000; lock cmpxchg16b [rdi]`
    let cmpxchg16b = vec![0xbf, 0, 0, 0x20, 0, 0xf0, 0x48, 0x0f, 0xc7, 0x0f];
    let vm = launch(&home, "k", &[print(b'.'), cmpxchg16b, print(b'!'), reset()].concat());
    let ended = vm.wait(Some(TEN_SECONDS)).unwrap();
    let doctor = home.cli(&["doctor", "--json"]).good();
    if doctor.contains("stock Linux kernels do not run") {
        assert_eq!(vm.log(), ".");
        assert_eq!(ended.state, VmState::Dead);
        let why = ended.reason.expect("a reason");
        assert!(why.contains("could not emulate") && why.contains("runs the built-in guest"), "{why}");
        let listed = home.cli(&["ls"]).good();
        assert!(listed.contains("could not emulate"), "{listed}");
    } else {
        assert_eq!((ended.state, vm.log().as_str()), (VmState::Off, ".!"));
    }
}

/// A guest prints the alphabet over and over. Its clones, and theirs, go on where it stood: no letter is lost, none comes
/// twice, in any of them.
#[test]
fn clones_go_on_with_the_next_letter() {
    let Some(home) = TestHome::new() else { return };
    let code = [
        0xba,
        0xf8,
        0x03,
        0,
        0, // mov edx, 0x3f8
        0xb0,
        b'a', // mov al, 'a'
        0xee, // out dx, al
        0xb9,
        0x40,
        0x0d,
        0x03,
        0, // mov ecx, 200000
        0xff,
        0xc9, // dec ecx
        0x75,
        0xfc, // jnz back
        0xfe,
        0xc0, // inc al
        0x3c,
        b'z' + 1, // cmp al, 'z' + 1
        0x75,
        0xf0, // jne to the out
        0xeb,
        0xec, // jmp to the first mov al
    ];
    let vm = launch(&home, "k", &code);
    wait_until("the guest prints", TEN_SECONDS, || vm.log().len() > 3);
    let mut vms = vec![vm];
    for _ in 0..3 {
        let children = vms.last().expect("a VM").fork(ForkOptions::new()).expect("fork");
        vms.extend(children.into_iter().map(|child| child.vm));
    }
    for vm in &vms {
        wait_until("a clone prints on", PATIENCE, || vm.log().len() > 4);
    }
    for vm in &vms {
        let log = vm.log();
        for pair in log.as_bytes().windows(2) {
            let next = if pair[0] == b'z' { b'a' } else { pair[0] + 1 };
            assert_eq!(pair[1], next, "{}: {log}", vm.name());
        }
    }
    assert!(home.client().check().unwrap().broken.is_empty());
}
