use super::testing::{TempDir, serve};
use super::*;
use crate::api::{Child, Failure, FailureKind, VmState};
use std::io::{Read, Write};

const PATIENCE: Duration = Duration::from_secs(5);

/// A client of a server that answers by `answer`. The directory is its home.
fn client(answer: impl Fn(Request) -> Result<Answer, Failure> + Send + Sync + 'static) -> (TempDir, Client) {
    let dir = TempDir::new();
    let home = Home::at(dir.path()).unwrap();
    serve(&home, &["a", "b-1"], answer);
    let client = Client::builder().home(dir.path()).start_server(false).connect().unwrap();
    (dir, client)
}

fn child(name: &str) -> Child {
    Child {
        name: name.into(),
        pause_us: Some(80),
        ready_us: None,
        first_exit_us: None,
        moved_pages: 1,
        copied_pages: None,
        gap_pages: None,
        runs: 3,
        hinted_pages: None,
    }
}

#[test]
fn what_was_lost_is_told_once() {
    let (_dir, client) = client(|_| Ok(Answer::Done));
    assert_eq!(client.take_lost(), ["a", "b-1"]);
    assert_eq!(client.take_lost(), [""; 0]);
}

#[test]
fn a_fork_gives_its_children_in_order() {
    let (_dir, client) = client(|request| match request {
        Request::Fork(fork) if fork.name == "base" && fork.count == 2 && fork.paused => {
            Ok(Answer::Forked(vec![child("base-1"), child("base-2")]))
        }
        other => Err(Failure::failed(format!("{other:?}"))),
    });
    let children = client.vm("base").fork(ForkOptions::new().count(2).paused(true)).unwrap();
    let names: Vec<_> = children.iter().map(|child| child.vm.name()).collect();
    assert_eq!(names, ["base-1", "base-2"]);
    assert_eq!(children[0].figures.pause_us, Some(80));
}

#[test]
fn the_guest_s_answer_is_taken_apart() {
    let (_dir, client) = client(|request| match request {
        Request::Send { text, timeout_ms: 5000, .. } if text == "slow" => {
            Err(Failure::timed_out("send a: 5 s have passed"))
        }
        Request::Send { text, .. } => Ok(Answer::Said(text)),
        _ => Err(Failure::bad_input("no")),
    });
    let vm = client.vm("a");
    assert_eq!(vm.send("ok sum=7", PATIENCE).unwrap(), "sum=7");
    assert_eq!(vm.send("ok", PATIENCE).unwrap(), "");
    assert!(matches!(vm.send("err mismatch page=1", PATIENCE), Err(Error::Guest(text)) if text == "mismatch page=1"));
    assert!(matches!(vm.send("okay", PATIENCE), Err(Error::Protocol("send"))));
    assert!(matches!(vm.send("slow", PATIENCE), Err(Error::TimedOut(_))));
    assert!(matches!(vm.send("two\nlines", PATIENCE), Err(Error::BadInput(_))));
    // And the connection is as good as before.
    assert_eq!(vm.ask("err x", PATIENCE).unwrap(), "err x");
}

#[test]
fn failures_keep_their_kind() {
    let (_dir, client) = client(|request| match request {
        Request::Pause { .. } => Err(Failure { kind: FailureKind::BadInput, message: "no VM is called x".into() }),
        Request::Resume { .. } => Err(Failure::failed("it is stuck")),
        _ => Ok(Answer::Done),
    });
    let vm = client.vm("x");
    assert!(matches!(vm.pause(), Err(Error::BadInput(text)) if text == "no VM is called x"));
    assert!(matches!(vm.resume(), Err(Error::Failed(_))));
    assert!(matches!(client.list(), Err(Error::Protocol("list"))));
    assert!(matches!(client.vm("a/b").stop(), Err(Error::BadInput(_))));
    vm.remove().unwrap();
}

#[test]
fn calls_do_not_wait_for_each_other() {
    let (_dir, client) = client(|request| match request {
        Request::Wait { timeout_ms: Some(ms), .. } => {
            thread::sleep(Duration::from_millis(ms));
            Err(Failure::timed_out("wait a: still running"))
        }
        _ => Ok(Answer::Vms(Vec::new())),
    });
    let start = Instant::now();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| client.vm("a").wait(Some(Duration::from_millis(300))));
        client.list().unwrap();
        assert!(start.elapsed() < Duration::from_millis(250));
        assert!(matches!(waiting.join().unwrap(), Err(Error::TimedOut(_))));
    });
}

#[test]
fn a_console_carries_bytes_both_ways() {
    let (_dir, client) = client(|_| Ok(Answer::Stream));
    let mut console = client.vm("a").console().unwrap();
    console.write_all(b"help\n").unwrap();
    let mut text = [0; 13];
    console.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"prompt> help\n");
}

#[test]
fn the_states_have_their_names_on_the_wire() {
    let text = serde_json::to_string(&VmState::Dead).unwrap();
    assert_eq!(text, "\"dead\"");
    let request = serde_json::to_string(&Request::Stats { name: None }).unwrap();
    assert_eq!(request, r#"{"verb":"stats","name":null}"#);
}
