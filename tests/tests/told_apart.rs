//! `inspect` and `doctor` tell what keeps a VM process apart as the kernel has it, and not as it was meant.

use offshoot_tests::process::users;
use offshoot_tests::{Guest, Served, Setup, TestHome, User, is_root};
use serde_json::Value;
use std::fs;

fn confinement(home: &TestHome, name: &str) -> Value {
    let inspected = home.cli(&["inspect", name, "--json"]).json();
    assert!(inspected["confinement"].is_object(), "{inspected}");
    inspected["confinement"].clone()
}

#[track_caller]
fn words(value: &Value) -> Vec<&str> {
    value.as_array().expect("an array").iter().map(|word| word.as_str().expect("a string")).collect()
}

/// Every VM, launched and forked, as root and as an ordinary user, is kept apart as README has it.
#[test]
fn inspect_tells_what_each_vm_really_has() {
    for user in [User::Same, User::Ordinary(12346)] {
        let Some(home) = (Setup { user, ..Setup::default() }).home() else { return };
        home.cli(&["launch", "a", "--memory", "32M"]).good();
        home.cli(&["fork", "a", "b"]).good();
        for name in ["a", "b"] {
            let found = confinement(&home, name);
            assert_eq!(words(&found["weaknesses"]), [""; 0], "{user:?}: {found}");
            assert_eq!((&found["seccomp"], &found["no_new_privs"]), (&"filter".into(), &true.into()), "{found}");
            assert_eq!((&found["root_entries"], &found["root_read_only"]), (&0.into(), &true.into()), "{found}");
            assert_eq!(found["effective_capabilities"], "0000000000000000");
            assert_eq!(found["bounding_capabilities"], "0000000000000000");
            let own = words(&found["own_namespaces"]);
            assert!(["mnt", "net", "ipc", "uts"].iter().all(|kind| own.contains(kind)), "{found}");
            let pid = home.cli(&["inspect", name, "--json"]).json()["stats"]["pid"].as_i64().expect("a pid") as i32;
            assert_eq!(found["user"], users(pid)[0]);
            // Said as README says it: nobody is to read of a namespace that a process has not.
            for kind in words(&found["shared_namespaces"]) {
                let link = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace");
                assert_eq!(link(pid), link(home.server().expect("it runs")), "{kind}");
            }
            assert!(found["limits"]["open_files"].as_u64().is_some_and(|most| most <= 8192), "{found}");
            assert_eq!(found["limits"]["core_bytes"], 0);
        }
        let text = home.cli(&["inspect", "b"]).good();
        assert!(
            text.contains("\n  system calls  filter\n") && text.contains("\n  root          0 files, read-only\n"),
            "{text}"
        );
        assert!(!text.contains("weaker"), "{text}");
        home.cli(&["kill", "b"]).good();
        assert_eq!(home.cli(&["inspect", "b", "--json"]).json()["confinement"], Value::Null);
    }
}

/// What `--isolation weaker` leaves out is told of each VM.
#[test]
fn what_is_weaker_is_told() {
    let Some(home) = (Setup { user: User::WithoutAdmin, ..Setup::default() }).home() else { return };
    let _server = Served::new(&home, &["--isolation", "weaker"]);
    home.cli(&["launch", "a", "--memory", "32M"]).good();
    let found = confinement(&home, "a");
    let weak = words(&found["weaknesses"]);
    for kind in ["ipc", "mnt", "net", "uts"] {
        assert!(weak.contains(&format!("its {kind} namespace is the server's").as_str()), "{found}");
        assert!(words(&found["shared_namespaces"]).contains(&kind), "{found}");
    }
    assert_eq!(found["seccomp"], "filter", "that is not left out");
    let text = home.cli(&["inspect", "a"]).good();
    assert!(
        text.contains("weaker than they should be") && text.contains("weaker than it should be: its mnt"),
        "{text}"
    );
}

#[test]
fn doctor_looks_at_a_vm_process() {
    for user in [User::Same, User::Ordinary(12346)] {
        let Some(home) = (Setup { user, ..Setup::default() }).home() else { return };
        let doctor = home.cli(&["doctor", "--json"]).json();
        let found = &doctor["confinement"];
        assert_eq!(words(&found["weaknesses"]), [""; 0], "{user:?}: {doctor}");
        assert_eq!(found["seccomp"], "filter", "{doctor}");
        assert!(is_root() && user == User::Same || found["user"] != 0, "{doctor}");
        let mut items = doctor["items"].as_array().expect("items").iter();
        let item = items.find(|item| item["item"] == "confinement").expect("it is one of the items");
        assert_eq!((&item["verdict"], &item["value"]), (&"ok".into(), &"complete".into()));
    }
    // Where no VM can be made, there is nothing to look at.
    let Some(home) = (Setup { user: User::WithoutDevices, ..Setup::default() }).home() else { return };
    let doctor = home.cli(&["doctor", "--json"]);
    assert_eq!((doctor.code, doctor.err.as_str()), (1, ""), "{doctor:?}");
    let doctor: Value = serde_json::from_str(&doctor.out).expect("JSON");
    assert_eq!(doctor["confinement"], Value::Null);
}

/// Nothing of what is told comes from the process: it stands still, and is told of all the same.
#[test]
fn a_process_has_no_word_in_it() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("a", vmm::units::ByteSize::mib(16));
    let pid = nix::unistd::Pid::from_raw(vm.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("stop a process");
    assert_eq!(words(&confinement(&home, "a")["weaknesses"]), [""; 0]);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).expect("let it go on");
    vm.say("id");
}
