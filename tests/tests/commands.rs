//! The command line: exit codes, what is printed, and the keys of the JSON.

use offshoot_tests::process::{is_alive, kill};
use offshoot_tests::{Guest, PATIENCE, TEN_SECONDS, TestHome, wait_until};
use serde_json::Value;
use std::process::Stdio;
use std::time::{Duration, Instant};
use vmm::units::ByteSize;

const SUMMARY: &[&str] =
    &["name", "id", "parent", "parent_id", "parent_is_gone", "state", "reason", "mem_pages", "balloon_bytes", "pid"];
const TREE: &[&str] = &["depth", "private_pages", "shared_pages"];
const CHILD: &[&str] = &[
    "name",
    "id",
    "pause_us",
    "ready_us",
    "first_exit_us",
    "moved_pages",
    "copied_pages",
    "gap_pages",
    "window_runs",
    "hinted_pages",
];
const VM_STATS: &[&str] = &[
    "private_pages",
    "shared_pages",
    "zero_pages",
    "swapped_pages",
    "ballooned_pages",
    "unsettled_pages",
    "chain_depth",
    "window_runs",
    "pss_bytes",
    "traps",
    "messages",
    "guest_stats",
];
const TOTALS: &[&str] = &[
    "server_pid",
    "vms",
    "objects",
    "stores",
    "resident_pages",
    "swapped_pages",
    "unsettled_pages",
    "stage2_tables",
    "stage2_tables_unshared_equivalent",
    "host_bytes",
    "budget_bytes",
    "accounted_bytes",
    "compressed_bytes",
    "disk_bytes",
    "swap_slots",
    "swap_out_pages",
    "swap_write_pages",
    "swap_in_pages",
    "clean_eviction_pages",
    "discarded_pages",
    "refault_pages",
    "lost_pages",
    "swap_in_live_pages",
    "readahead_pages",
    "readahead_hit_pages",
    "writeahead_pages",
    "traps",
];

#[track_caller]
fn has_keys(object: &Value, keys: &[&str]) {
    for key in keys {
        assert!(object.get(key).is_some(), "no key {key} in {object}");
    }
}

/// A home with the VM `a`.
fn with_a() -> Option<TestHome> {
    let home = TestHome::new()?;
    assert_eq!(home.cli(&["launch", "a", "--mem", "16M"]).good(), "a\n");
    Some(home)
}

fn state(home: &TestHome, name: &str) -> String {
    let vms = home.cli(&["ls", "--json"]).json();
    let vm = vms.as_array().unwrap().iter().find(|vm| vm["name"] == name).cloned();
    vm.map_or("none".into(), |vm| vm["state"].as_str().unwrap().to_owned())
}

/// Every listing command's JSON has the keys that are promised.
#[test]
fn the_json_has_its_keys() {
    let Some(home) = with_a() else { return };
    home.cli(&["send", "a", "fill", "1000", "500", "1"]).good();
    let forked = home.cli(&["fork", "a", "--count", "2", "--wait-settled", "--json"]).json();
    for (index, child) in forked.as_array().unwrap().iter().enumerate() {
        has_keys(child, CHILD);
        assert_eq!(child["name"], format!("a-{}", index + 1));
        assert!(child["copied_pages"].as_u64().unwrap() >= 500 && child["first_exit_us"].is_u64(), "{child}");
    }
    let late = home.cli(&["fork", "a", "--name", "late", "--json"]).json();
    assert_eq!((&late[0]["name"], &late[0]["copied_pages"]), (&Value::from("late-1"), &Value::Null));

    let list = home.cli(&["ls", "--json"]).json();
    assert_eq!(list.as_array().map(Vec::len), Some(4));
    list.as_array().unwrap().iter().for_each(|vm| has_keys(vm, SUMMARY));
    assert_eq!((&list[0]["parent"], &list[1]["parent"]), (&Value::Null, &Value::from("a")));
    assert_eq!((&list[0]["state"], &list[0]["mem_pages"]), (&Value::from("running"), &Value::from(4096)));

    let tree = home.cli(&["tree", "--json"]).json();
    tree.as_array().unwrap().iter().for_each(|row| has_keys(row, &[SUMMARY, TREE].concat()));
    let stats = home.cli(&["stats", "--json"]).json();
    stats["vms"].as_array().unwrap().iter().for_each(|vm| has_keys(vm, &[SUMMARY, VM_STATS].concat()));
    has_keys(&stats["total"], TOTALS);
    assert_eq!(stats["total"]["server_pid"], home.server().unwrap());
    let one = home.cli(&["stats", "a-1", "--json"]).json();
    assert_eq!((one["vms"].as_array().map(Vec::len), &one["vms"][0]["name"]), (Some(1), &Value::from("a-1")));
    let inspection = home.cli(&["inspect", "a", "--json"]).json();
    has_keys(&inspection, &["generation", "keeper_pid", "isolation", "children", "child_ids", "entries", "runs"]);
    has_keys(&home.cli(&["check", "--json"]).json(), &["vms", "mappings", "pages", "broken"]);
    has_keys(&home.cli(&["doctor", "--json"]).json(), &["can_run", "items"]);
    assert_eq!(home.cli(&["version", "--json"]).json()["version"], env!("CARGO_PKG_VERSION"));
}

/// The same for eyes: names where they belong.
#[test]
fn tables_and_trees_are_printed() {
    let Some(home) = with_a() else { return };
    assert_eq!(home.cli(&["fork", "a", "--count", "2"]).good(), "a-1\na-2\n");
    for (verb, expected) in [
        (vec!["ls"], "a-2   running  a"),
        (vec!["tree"], "└─ a-2"),
        (vec!["stats"], "stage-2 tables"),
        (vec!["stats", "a"], "host memory"),
        (vec!["stats", "a"], "messages"),
        (vec!["inspect", "a"], "a-1 a-2"),
        (vec!["check"], "checked 3 VMs"),
        (vec!["doctor"], "VMs can run on this host"),
        (vec!["version"], env!("CARGO_PKG_VERSION")),
        (vec!["--help"], "Exit codes: 0 done"),
        (vec!["fork", "--help"], "--wait-settled"),
    ] {
        let out = home.cli(&verb).good();
        assert!(out.contains(expected), "{verb:?}: {out}");
    }
}

/// `send`: 0 for `ok`, 1 for `err`, 3 for no answer in time. A late answer is in the log.
#[test]
fn send_tells_by_its_exit_code() {
    let Some(home) = with_a() else { return };
    assert_eq!(home.cli(&["send", "a", "mem"]).good(), "ok first=64 pages=4096\n");
    let refused = home.cli(&["send", "a", "verify", "1000", "1", "1"]);
    assert_eq!((refused.code, refused.err.as_str()), (1, ""), "{refused:?}");
    assert!(refused.out.starts_with("err mismatch page=1000 word=0 "), "{refused:?}");
    home.cli(&["send", "a", "gap 500", "--timeout", "0.1"]).failure(3);
    assert!(home.cli(&["send", "a", "id"]).good().starts_with("ok name=a generation="));
    let log = home.cli(&["logs", "a"]).good();
    assert!(log.contains("ok max_gap_us="), "{log}");
}

/// A paused VM does nothing, and can be forked; its children run, unless they are to be paused as well.
#[test]
fn paused_vms() {
    let Some(home) = with_a() else { return };
    home.cli(&["send", "a", "fill 1000 100 1"]).good();
    for _ in 0..2 {
        home.cli(&["pause", "a"]).good();
        assert_eq!(state(&home, "a"), "paused");
    }
    home.cli(&["send", "a", "fill 1000 10 2", "--timeout", "0.2"]).failure(3);
    let running = home.cli(&["fork", "a", "--json"]).json();
    assert!(running[0]["pause_us"].is_null() && running[0]["ready_us"].is_u64(), "{running}");
    let paused = home.cli(&["fork", "a", "--paused", "--json"]).json();
    assert!(paused[0]["ready_us"].is_null() && paused[0]["first_exit_us"].is_null(), "{paused}");
    assert_eq!([state(&home, "a"), state(&home, "a-1"), state(&home, "a-2")], ["paused", "running", "paused"]);
    home.cli(&["send", "a-1", "verify 1000 100 1"]).good();
    home.cli(&["resume", "a-2"]).good();
    home.cli(&["send", "a-2", "verify 1000 100 1"]).good();
    // The line that was sent meanwhile has waited.
    home.cli(&["resume", "a"]).good();
    home.cli(&["send", "a", "verify 1000 10 2"]).good();
    assert_eq!(state(&home, "a"), "running");
}

/// `stop`, `wait`, `rm`: a VM that is off stays listed until it is removed; then its name is free.
#[test]
fn the_end_of_a_vm() {
    let Some(home) = with_a() else { return };
    home.cli(&["wait", "a", "--timeout", "0.1"]).failure(3);
    home.cli(&["stop", "a"]).good();
    assert_eq!(home.cli(&["wait", "a"]).good(), "off\n");
    assert_eq!(state(&home, "a"), "off");
    assert_eq!(home.cli(&["wait", "a", "--json"]).json()["state"], "off");
    home.cli(&["logs", "a"]).good();
    home.cli(&["rm", "a"]).good();
    assert_eq!(state(&home, "a"), "none");

    home.cli(&["launch", "a", "--mem", "16M"]).good();
    kill(home.client().vm("a").pid());
    let outcome = home.cli(&["wait", "a"]);
    assert!(outcome.code == 1 && outcome.out.starts_with("dead: ") && outcome.out.contains("SIGKILL"), "{outcome:?}");
    assert_eq!(state(&home, "a"), "dead");

    // Names that the server makes, and a VM that goes by itself.
    assert_eq!(home.cli(&["launch", "--mem", "16M", "--rm"]).good(), "vm-1\n");
    assert_eq!(home.cli(&["send", "vm-1", "halt"]).good(), "ok\n");
    wait_until("a VM launched with --rm is gone", TEN_SECONDS, || state(&home, "vm-1") == "none");
    assert_eq!(home.cli(&["launch", "--mem", "16M"]).good(), "vm-2\n");
    home.cli(&["fork", "vm-2", "--count", "3"]).good();
    home.cli(&["rm", "vm-2", "vm-2-2"]).good();
    // A child whose parent is gone is a root.
    let tree = home.cli(&["tree", "--json"]).json();
    assert!(tree.as_array().unwrap().iter().any(|row| row["name"] == "vm-2-1" && row["depth"] == 0), "{tree}");
    home.cli(&["rm", "--all"]).good();
    assert_eq!(home.cli(&["ls", "--json"]).good().trim(), "[]");
    home.cli(&["rm", "--all"]).good();
}

/// The console through a pipe: what is typed is echoed and answered, and the command ends by itself.
#[test]
fn a_console_through_a_pipe() {
    let Some(home) = with_a() else { return };
    let start = Instant::now();
    let said = home.cli_with_input(&["console", "a"], "id\nmem\n").good();
    assert!(said.contains("ok name=a generation=") && said.contains("ok first=64 pages=4096"), "{said}");
    assert!(start.elapsed() < TEN_SECONDS);
    let log = home.cli(&["logs", "a"]).good();
    assert!(log.contains("ok first=64 pages=4096"), "{log}");
    // It ends with the VM, too, in the middle of typing.
    let said = home.cli_with_input(&["console", "a"], "halt\nid\n").good();
    assert!(!said.contains("name=a"), "{said}");
    assert_eq!(home.cli(&["wait", "a"]).good(), "off\n");
    let attached = home.cli_with_input(&["launch", "b", "--mem", "16M", "--attach", "--rm"], "id\nhalt\n").good();
    assert!(attached.starts_with("b\n") && attached.contains("ok name=b generation="), "{attached}");
}

/// `logs --follow` shows what was, and what comes, until the VM's end.
#[test]
fn logs_can_be_followed() {
    let Some(home) = with_a() else { return };
    home.cli_with_input(&["console", "a"], "mem\n").good();
    let following = home.command(&["logs", "a", "--follow"]).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    home.cli_with_input(&["console", "a"], "id\n").good();
    home.client().vm("a").stop().unwrap();
    let output = following.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("pages=4096") && text.contains("name=a"), "{text}");
}

/// `shutdown` ends everything and leaves the log; without a server there is nothing to do.
#[test]
fn shutdown_leaves_only_the_log() {
    let Some(home) = with_a() else { return };
    home.cli(&["send", "a", "fill 1000 2000 1"]).good();
    home.cli(&["fork", "a", "--count", "2"]).good();
    let server = home.server().unwrap();
    let processes = home.processes();
    home.cli(&["shutdown"]).good();
    assert!(!processes.into_iter().any(is_alive));
    wait_until("the server, which has let go of its home, ends", TEN_SECONDS, || !is_alive(server));
    assert_eq!((home.server(), home.files()), (None, vec!["lock".to_owned(), "server.log".into()]));
    home.cli(&["shutdown"]).good();
    // A new server has lost nothing.
    assert_eq!(home.cli(&["budget", "none"]).good(), "none\n");
    assert_eq!(home.cli(&["ls", "--json"]).good().trim(), "[]");
}

/// The demonstration shows what it says, and cleans up.
#[test]
fn the_demo_runs() {
    let Some(home) = TestHome::new() else { return };
    let outcome = home.cli(&["demo"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    for expected in ["verif", "unshared", "└─ "] {
        assert!(outcome.out.contains(expected), "no {expected}: {outcome:?}");
    }
    assert_eq!(home.cli(&["rm", "--all", "--json"]).json()["removed"], Value::Array(Vec::new()));
}

/// Many commands at once find one server, and the server answers each.
#[test]
fn many_first_commands_at_once() {
    let Some(home) = TestHome::new() else { return };
    std::thread::scope(|scope| {
        for number in 0..8 {
            let home = &home;
            scope.spawn(move || home.cli(&["launch", &format!("v{number}"), "--mem", "16M"]).good());
        }
    });
    let vms = home.cli(&["ls", "--json"]).json();
    assert_eq!(vms.as_array().map(Vec::len), Some(8), "{vms}");
}

/// Lines sent to one VM at once queue; each is answered with its own answer.
#[test]
fn sends_queue() {
    let Some(home) = with_a() else { return };
    let vm = home.client().vm("a");
    vm.fill(1000..1016, 5);
    std::thread::scope(|scope| {
        for page in 1000..1016 {
            let vm = &vm;
            scope.spawn(move || {
                for count in 1..20 {
                    let answer = vm.send(&format!("touch {page} {} 1", count % 3 + 1), PATIENCE).expect("touch");
                    assert_eq!(answer, format!("touched={}", count % 3 + 1));
                }
            });
        }
    });
}

/// Scripts that speak JSON do not have to read a line for people because a verb has nothing to tell.
#[test]
fn verbs_that_have_nothing_to_tell_say_in_json_whose_they_were() {
    let Some(home) = TestHome::new() else { return };
    for name in ["a", "b"] {
        home.launch(name, ByteSize::mib(16));
    }
    for verb in ["pause", "resume", "stop"] {
        assert_eq!(home.cli(&[verb, "a", "b", "--json"]).json(), serde_json::json!({ "done": ["a", "b"] }), "{verb}");
    }
    home.cli(&["wait", "a", "b"]).good();
    home.launch("c", ByteSize::mib(16));
    let part = home.cli(&["kill", "c", "gone", "--json"]);
    let read = |text: &str| -> Value { serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {part:?}")) };
    assert_eq!((part.code, read(&part.out)), (1, serde_json::json!({ "done": ["c"] })), "{part:?}");
    let error = read(&part.err);
    assert_eq!((&error["error"]["kind"], &error["error"]["subject"]), (&"no_such_vm".into(), &"gone".into()));
}
