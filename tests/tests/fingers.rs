//! Commands as fingers type them: names that other tools have for things, several names, lines that begin with a dash,
//! sizes, JSON of what is made and of what fails, and nothing started by who only looks.

use offshoot_tests::process::is_alive;
use offshoot_tests::{Guest, TEN_SECONDS, TestHome, offshoot_binary, wait_until};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use vmm::client::ForkOptions;
use vmm::units::ByteSize;

/// A home with the VMs `a`, `a-1` and `a-2`.
fn with_three() -> Option<TestHome> {
    let home = TestHome::new()?;
    home.launch("a", ByteSize::mib(16)).fork(ForkOptions::new().count(2)).expect("fork");
    Some(home)
}

fn names(home: &TestHome) -> Vec<String> {
    home.cli(&["ls", "-q"]).good().lines().map(str::to_owned).collect()
}

fn states(home: &TestHome) -> Vec<String> {
    let vms = home.cli(&["ls", "--json"]).json();
    vms.as_array().unwrap().iter().map(|vm| vm["state"].as_str().unwrap().to_owned()).collect()
}

/// The one object on stderr of a command that fails, with its kind and subject.
#[track_caller]
fn error(home: &TestHome, arguments: &[&str], code: i32) -> (String, Value) {
    let outcome = home.cli(arguments);
    assert_eq!((outcome.code, outcome.err.lines().count()), (code, 1), "{outcome:?}");
    let mut object: Value = serde_json::from_str(&outcome.err).expect("an object");
    let error = object["error"].take();
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{outcome:?}");
    (error["kind"].as_str().expect("a kind").to_owned(), error["subject"].clone())
}

#[test]
fn several_names_are_done_each_whatever_becomes_of_the_others() {
    let Some(home) = with_three() else { return };
    home.cli(&["pause", "a", "a-1"]).good();
    assert_eq!(states(&home), ["paused", "paused", "running"]);
    let outcome = home.cli(&["resume", "nobody", "a", "a-1"]);
    assert_eq!((outcome.code, outcome.out.as_str()), (1, ""), "{outcome:?}");
    assert_eq!(outcome.err, "offshoot: there is no VM \"nobody\"\n");
    assert_eq!(states(&home), ["running"; 3]);
    let outcome = home.cli(&["pause", "nobody", "somebody"]);
    assert_eq!((outcome.code, outcome.err.lines().count()), (2, 2), "{outcome:?}");

    home.cli(&["stop", "a", "a-2"]).good();
    assert_eq!(home.cli(&["wait", "a", "a-2"]).good(), "a: off\na-2: off\n");
    let outcome = home.cli(&["wait", "a", "a-1", "--timeout", "0.1"]);
    assert_eq!((outcome.code, outcome.out.as_str(), outcome.err.lines().count()), (3, "a: off\n", 1), "{outcome:?}");
    let ends = home.cli(&["wait", "a", "a-2", "--json"]).good();
    assert_eq!(ends.matches("\"state\": \"off\"").count(), 2, "{ends}");
}

/// One name that nobody has, and nothing was removed.
#[test]
fn what_is_there_is_removed_and_what_is_not_is_said() {
    let Some(home) = with_three() else { return };
    let outcome = home.cli(&["rm", "a-1", "gone", "a-2"]);
    assert_eq!((outcome.code, outcome.err.as_str()), (1, "offshoot: rm: there is no VM \"gone\"\n"), "{outcome:?}");
    assert_eq!(names(&home), ["a"]);
    assert_eq!(error(&home, &["rm", "a-1", "--json"], 2), ("no_such_vm".into(), "a-1".into()));
    let removed = home.cli(&["rm", "a", "a", "--json"]).json();
    assert_eq!((&removed["removed"], &removed["missing"]), (&Value::from(vec!["a"]), &Value::Array(Vec::new())));
    assert_eq!(home.cli(&["rm", "--all", "--json"]).json()["removed"], Value::Array(Vec::new()));
}

/// Killed VMs stay listed, as they do elsewhere.
#[test]
fn a_vm_is_ended_at_once() {
    let Some(home) = with_three() else { return };
    let pid = home.client().vm("a-1").pid();
    home.cli(&["pause", "a-1"]).good();
    home.cli(&["kill", "a-1"]).good();
    assert!(!is_alive(pid));
    assert_eq!(states(&home), ["running", "dead", "running"]);
    assert_eq!(home.cli(&["wait", "a-1"]).code, 1);
    home.cli(&["kill", "a-1"]).failure(2);
    home.cli(&["kill", "a", "a-2"]).good();
    assert_eq!(home.cli(&["ps"]).good(), home.cli(&["ls"]).good());
    assert_eq!(home.cli(&["launch", "b", "--rm", "-m", "16M"]).good(), "b\n");
    home.cli(&["kill", "b"]).good();
    assert_eq!(names(&home), ["a", "a-1", "a-2"]);
}

#[test]
fn a_line_may_begin_with_a_dash() {
    let Some(home) = with_three() else { return };
    for (line, said) in [
        (&["send", "a", "-x"][..], "err unknown command -x\n"),
        (&["send", "a", "ls", "-la"], "err unknown command ls\n"),
        (&["send", "a", "--", "--json"], "err unknown command --json\n"),
        (&["send", "--timeout", "5", "a", "ls", "-h"], "err unknown command ls\n"),
    ] {
        let outcome = home.cli(line);
        assert_eq!((outcome.code, outcome.out.as_str(), outcome.err.as_str()), (1, said, ""), "{outcome:?}");
    }
    assert_eq!(home.cli(&["send", "a", "mem", "--timeout", "5"]).good(), "ok first=64 pages=4096\n");
    assert!(home.cli(&["send", "a", "--help"]).good().contains("Usage: offshoot send"));
}

#[test]
fn sizes_are_written_as_people_do() {
    let Some(home) = TestHome::new() else { return };
    for (option, size) in [("--memory", "16MiB"), ("--mem", "0.015625GiB"), ("-m", "16384K"), ("-m", "0.016G")] {
        home.cli(&["launch", "a", option, size]).good();
        let pages = home.cli(&["ls", "--json"]).json()[0]["mem_pages"].as_u64().unwrap();
        assert!([4096, 4194].contains(&pages), "{size}: {pages}");
        home.cli(&["rm", "a"]).good();
    }
}

#[test]
fn what_is_made_and_said_is_told_as_json() {
    let Some(home) = TestHome::new() else { return };
    let made = home.cli(&["launch", "a", "-m", "16M", "--json"]).json();
    assert_eq!((&made["name"], &made["state"]), (&Value::from("a"), &Value::from("running")));
    assert_eq!(made, home.cli(&["ls", "--json"]).json()[0]);
    let said = home.cli(&["send", "a", "mem", "--json"]).json();
    assert_eq!((&said["name"], &said["ok"]), (&Value::from("a"), &Value::from(true)));
    assert_eq!(said["answer"], "ok first=64 pages=4096");
    let refused = home.cli(&["send", "a", "fly", "--json"]);
    let said: Value = serde_json::from_str(&refused.out).unwrap();
    assert_eq!((refused.code, &said["ok"]), (1, &Value::from(false)), "{refused:?}");
    let expected = home.cli(&["send", "a", "id", "--expect", "name=\\w+", "--json"]).json();
    assert!(expected["answer"].as_str().unwrap().contains("name=a"), "{expected}");
}

#[test]
fn what_fails_is_told_as_json() {
    let Some(home) = TestHome::new() else { return };
    assert_eq!(error(&home, &["inspect", "x", "--json"], 2), ("no_such_vm".into(), "x".into()));
    assert_eq!(error(&home, &["budget", "--json"], 2).0, "no_server");
    home.launch("a", ByteSize::mib(16));
    for (arguments, code, kind, subject) in [
        (&["launch", "a", "--json"][..], 2, "name_taken", Value::from("a")),
        (&["fork", "a", "a", "--json"], 2, "name_taken", "a".into()),
        (&["inspect", "x", "--json"], 2, "no_such_vm", "x".into()),
        (&["tree", "x", "--json"], 2, "no_such_vm", "x".into()),
        (&["wait", "a", "--timeout", "0.1", "--json"], 3, "timed_out", "a".into()),
        (&["send", "a", "gap 500", "--timeout", "0.1", "--json"], 3, "timed_out", "a".into()),
        (&["balloon", "a", "1G", "--json"], 2, "bad_request", "a".into()),
        (&["launch", "b", "--memory", "100T", "--json"], 2, "limit", "b".into()),
        (&["launch", "--memory", "3", "--json"], 2, "bad_request", Value::Null),
        (&["launch", "b", "--attach", "--json"], 2, "bad_request", Value::Null),
        (&["ls", "--fly", "--json"], 2, "bad_request", Value::Null),
    ] {
        assert_eq!(error(&home, arguments, code), (kind.into(), subject), "{arguments:?}");
    }
    home.cli(&["kill", "a"]).good();
    assert_eq!(error(&home, &["fork", "a", "--json"], 2), ("not_running".into(), "a".into()));
}

/// `ls` of a mistyped home made directories and left a server there.
#[test]
fn who_looks_starts_nothing() {
    let Some(home) = TestHome::new() else { return };
    for (arguments, out) in [
        (&["ls"][..], "NAME  STATE  PARENT  MEMORY  PID\n"),
        (&["ls", "-q"], ""),
        (&["ls", "--json"], "[]\n"),
        (&["tree", "--json"], "[]\n"),
        (&["tree"], "NAME  STATE  PRIVATE  SHARED  TOTAL\n"),
        (&["stats"], ""),
        (&["check"], "checked 0 VMs, 0 window mappings, 0 pages: 0 broken\n"),
    ] {
        let outcome = home.cli(arguments);
        assert_eq!((outcome.code, outcome.out.as_str()), (0, out), "{outcome:?}");
        assert_eq!(outcome.err, format!("offshoot: no server at {}\n", home.path().display()), "{outcome:?}");
    }
    for verb in ["inspect", "logs", "console", "stats", "tree", "pause", "resume", "stop", "kill", "wait", "rm", "fork"]
    {
        let line = home.cli(&[verb, "a"]).failure(2);
        assert!(line.contains("there is no VM \"a\": no server at"), "{line}");
    }
    assert!(home.cli(&["budget"]).failure(2).contains("no server at"));
    home.cli(&["shutdown"]).good();
    home.cli(&["rm", "--all"]).good();
    assert!(!home.path().exists());
    let outcome = Command::new(offshoot_binary()).args(["--home", "/", "launch"]).output().unwrap();
    assert_eq!(outcome.status.code(), Some(2), "{outcome:?}");
}

/// The name of a VM was lost, and the VM stayed.
#[test]
fn what_cannot_be_named_is_not_left_behind() {
    let Some(home) = with_three() else { return };
    for arguments in [&["launch", "-m", "16M"][..], &["fork", "a", "--count", "2"], &["launch", "-m", "16M", "--json"]]
    {
        let full = File::options().write(true).open("/dev/full").expect("there is a /dev/full");
        let output = home.command(arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
        assert!(told.contains("removed again") && told.contains("No space left"), "{told}");
        assert_eq!(names(&home), ["a", "a-1", "a-2"]);
    }
}

#[test]
fn a_paused_console_says_so() {
    let Some(home) = with_three() else { return };
    home.cli(&["pause", "a"]).good();
    let outcome = home.cli_with_input(&["console", "a"], "");
    assert_eq!((outcome.code, outcome.err.lines().count()), (0, 1), "{outcome:?}");
    assert!(outcome.err.contains("a is paused"), "{outcome:?}");
}

#[test]
fn part_of_what_there_is_can_be_asked_for() {
    let Some(home) = with_three() else { return };
    home.cli(&["fork", "a-1", "deep"]).good();
    let below = home.cli(&["tree", "a-1", "--json"]).json();
    let rows: Vec<_> =
        below.as_array().unwrap().iter().map(|row| (row["name"].clone(), row["depth"].clone())).collect();
    assert_eq!(rows, [("a-1".into(), 0.into()), ("deep".into(), 1.into())]);
    assert!(home.cli(&["tree", "a-1"]).good().contains("└─ deep"));

    home.cli_with_input(&["console", "a"], "one\ntwo\n").good();
    wait_until("the log has it", TEN_SECONDS, || home.cli(&["logs", "a"]).good().contains("unknown command two"));
    let all = home.cli(&["logs", "a"]).good();
    let last = home.cli(&["logs", "a", "--tail", "2"]).good();
    assert!(all.ends_with(&last) && last.contains("two") && !last.contains("one"), "{last:?} of {all:?}");
    assert_eq!(home.cli(&["logs", "a", "-n", "0"]).good(), "");
    assert_eq!(home.cli(&["logs", "a", "--tail", "999999"]).good(), all);

    let mut watching = home.command(&["stats", "--watch=0.05"]).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let rounds = lines.map(|line| line.unwrap()).filter(|line| line.starts_with("NAME")).take(3).count();
    assert_eq!(rounds, 3);
    // Nobody reads on, and it ends by itself.
    assert!(watching.wait().unwrap().success());
}

/// Under another name, no server was started: only a neighbour called `offshoot` would do.
#[test]
fn a_renamed_binary_starts_itself() {
    let Some(home) = TestHome::new() else { return };
    let renamed = home.path().with_file_name("off2");
    fs::copy(offshoot_binary(), &renamed).expect("copy the binary");
    let command = home.command(&["launch", "a", "-m", "16M"]);
    let arguments: Vec<_> = command.get_args().map(|word| word.to_owned()).collect();
    let output = Command::new(&renamed).args(&arguments[3..]).env("PATH", "").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let server = home.server().expect("a server");
    assert_eq!(fs::read_link(format!("/proc/{server}/exe")).unwrap(), renamed);
    assert_eq!(fs::read_to_string(format!("/proc/{server}/comm")).unwrap(), "offshoot\n");
    fs::remove_file(renamed).unwrap();
    home.cli(&["fork", "a"]).good();
}

#[test]
fn tables_fit_a_terminal() {
    let Some(home) = TestHome::new() else { return };
    home.launch("a-name-of-sixteen", ByteSize::mib(16)).fork(ForkOptions::new().count(3)).expect("fork");
    home.cli(&["kill", "a-name-of-sixteen"]).good();
    for verb in [&["ls"][..], &["tree"], &["stats"], &["doctor"], &["demo"]] {
        let outcome = home.cli(verb);
        let widest = outcome.out.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(80), "{verb:?}: {widest:?}: {}", outcome.out);
    }
}

#[test]
fn shells_and_man_know_every_command() {
    let Some(home) = TestHome::new() else { return };
    for shell in ["bash", "zsh", "fish"] {
        let script = home.cli(&["completions", shell]).good();
        for word in ["launch", "fork", "wait-settled", "completions"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
        assert!(!script.contains("vm-process"), "{shell}");
    }
    assert!(home.cli(&["man"]).good().contains(".TH offshoot 1"));
    assert!(home.cli(&["man", "fork"]).good().contains(".TH offshoot-fork 1"));
    let pages = home.path().with_file_name("man1");
    home.cli(&["man", "--dir", pages.to_str().unwrap()]).good();
    let written: Vec<_> = fs::read_dir(&pages).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(written.len() > 20 && written.contains(&"offshoot-launch.1".into()), "{written:?}");
    assert_eq!(home.cli(&["--version"]).good(), format!("offshoot {}\n", env!("CARGO_PKG_VERSION")));
}
