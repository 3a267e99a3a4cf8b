//! What a VM process has, and what it has not: stores it can write to, a user id that others have, files.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use offshoot_tests::process::{descriptors, maps, user_namespace, users};
use offshoot_tests::{Guest, Lack, Setup, TestHome, User, is_root, skip};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use vmm::client::{ForkOptions, Vm};
use vmm::units::ByteSize;

/// A family of five over three levels, with stores.
fn family(home: &TestHome) -> Vec<Vm> {
    let vm = home.launch("f", ByteSize::mib(32));
    vm.fill(1000..3000, 1);
    let children = vm.fork(ForkOptions::new().count(2).wait_settled(true)).unwrap();
    children[0].vm.fill(1500..2500, 2);
    let grandchildren = children[0].vm.fork(ForkOptions::new().count(2).wait_settled(true)).unwrap();
    children.into_iter().chain(grandchildren).map(|child| child.vm).chain([vm]).collect()
}

/// No VM process has a store open, or mapped so that a write would reach it; and where it was handed one, it could not
/// make it writable.
#[test]
fn no_vm_process_can_write_to_a_store() {
    let Some(home) = TestHome::new() else { return };
    let vms = family(&home);
    // A clone's first moments are over: nobody speaks unasked.
    std::thread::sleep(Duration::from_millis(200));
    let messages = || vms.iter().map(|vm| vm.stats().unwrap().messages).collect::<Vec<_>>();
    let before = messages();
    let report = home.client().check().unwrap();
    assert!(report.vms == 5 && report.mappings >= 5 && report.broken.is_empty(), "{report:?}");
    // Each has been asked to try, and has told how that went.
    let asked = before.iter().map(|count| count + 2).collect::<Vec<_>>();
    assert_eq!(messages(), asked);
    for vm in &vms {
        let pid = vm.pid();
        let maps = maps(pid);
        let stores: Vec<&String> = maps.iter().filter(|line| line.contains("/memfd:")).collect();
        assert!(!stores.is_empty(), "{}: maps no store: {maps:?}", vm.name());
        let shared =
            stores.iter().find(|line| line.split_whitespace().nth(1).is_some_and(|flags| flags.ends_with('s')));
        assert!(shared.is_none(), "{}: {shared:?}", vm.name());
        let open = descriptors(pid);
        assert!(!open.iter().any(|(_, name)| name.contains("memfd:")), "{}: {open:?}", vm.name());
    }
}

/// The server's stores are for reading only to everybody who has no writable descriptor already, and cannot change their
/// size.
#[test]
fn stores_are_sealed_and_read_only() {
    let Some(home) = TestHome::new() else { return };
    let _vms = family(&home);
    let all = descriptors(home.server().expect("a server"));
    let stores: Vec<_> = all.iter().filter(|(_, name)| name.contains("memfd:")).collect();
    assert!(!stores.is_empty(), "{all:?}");
    for (path, name) in stores {
        let store = File::open(path).unwrap();
        let mode = store.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o400, "{name}");
        let seals = SealFlag::from_bits_truncate(fcntl(&store, FcntlArg::F_GET_SEALS).unwrap());
        assert!(seals.contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW), "{name}: {seals:?}");
    }
}

/// As root, every VM process has a user id that no other process has, and all of its ids are that.
#[test]
fn as_root_each_vm_process_is_a_user_of_its_own() {
    let Some(home) = TestHome::new() else { return };
    if !is_root() {
        return skip(Lack::Root, "only root can give each VM process a user of its own");
    }
    let vms = family(&home);
    let mut seen = BTreeSet::from([0]);
    for vm in &vms {
        let users = users(vm.pid());
        assert!(users.iter().all(|&id| id == users[0]), "{}: {users:?}", vm.name());
        assert!(seen.insert(users[0]), "{}: somebody else is user {}", vm.name(), users[0]);
        let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
        for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"] {
            assert!(status.contains(line), "{}: {status}", vm.name());
        }
    }
}

/// As an ordinary user, with nothing but the right to use the two devices: VMs are launched, forked and verified, each in
/// a user namespace of its own.
#[test]
fn an_ordinary_user_has_isolation_by_user_namespace() {
    let Some(home) = (Setup { user: User::Ordinary(12345), ..Setup::default() }).home() else { return };
    let doctor = home.cli(&["doctor", "--json"]).json();
    let item = |name: &str| {
        let items = doctor["items"].as_array().unwrap().iter();
        items.clone().find(|item| item["item"] == name).unwrap_or_else(|| panic!("no {name} in {doctor}")).clone()
    };
    if item("isolation")["verdict"] != "ok" {
        return skip(
            Lack::UserNamespaces,
            format!("no user namespaces for ordinary users here: {}", item("isolation")),
        );
    }
    assert_eq!(home.cli(&["launch", "u", "--mem", "32M"]).good(), "u\n");
    assert_eq!(home.cli(&["send", "u", "fill 1000 2000 5"]).good(), "ok filled=2000\n");
    assert_eq!(home.cli(&["fork", "u", "--count", "2"]).good(), "u-1\nu-2\n");
    home.cli(&["send", "u", "fill 1500 10 6"]).good();
    home.cli(&["send", "u-2", "fork"]).good();
    for name in ["u-1", "u-2", "u-3"] {
        assert_eq!(home.cli(&["send", name, "verify 1000 2000 5"]).good(), "ok verified=2000\n");
    }
    let report = home.cli(&["check", "--json"]).json();
    assert_eq!((report["vms"].as_u64(), report["broken"].as_array().map(Vec::len)), (Some(4), Some(0)), "{report}");
    assert!(report["mappings"].as_u64().unwrap() > 4, "{report}");

    let server = home.server().expect("a server");
    assert_eq!(users(server), [12345; 4]);
    let mut namespaces = BTreeSet::from([user_namespace(server)]);
    for vm in home.cli(&["ls", "--json"]).json().as_array().unwrap() {
        let pid = vm["pid"].as_i64().unwrap() as i32;
        assert_eq!(users(pid), [12345; 4]);
        assert!(namespaces.insert(user_namespace(pid)), "{vm} shares its user namespace");
        assert!(!descriptors(pid).iter().any(|(_, name)| name.contains("memfd:")));
    }
    home.cli(&["rm", "--all"]).good();
    assert_eq!(home.processes(), [0; 0]);
}
