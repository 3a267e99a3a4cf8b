use super::testing::{TempDir, serve};
use super::*;
use crate::api::{Child, ErrorKind, Failure, VmState};
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
        id: 7,
        pause_us: Some(80),
        ready_us: None,
        first_exit_us: None,
        moved_pages: 1,
        copied_pages: None,
        gap_pages: None,
        window_runs: 3,
        acked_us: None,
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
        _ => Err(Failure::bad_request("no")),
    });
    let vm = client.vm("a");
    assert_eq!(vm.send("ok sum=7", PATIENCE).unwrap(), "sum=7");
    assert_eq!(vm.send("ok", PATIENCE).unwrap(), "");
    assert!(matches!(vm.send("err mismatch page=1", PATIENCE), Err(Error::Guest(text)) if text == "mismatch page=1"));
    assert!(matches!(vm.send("okay", PATIENCE), Err(Error::Protocol("send"))));
    assert_eq!(vm.send("slow", PATIENCE).unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(vm.send("two\nlines", PATIENCE).unwrap_err().kind(), ErrorKind::BadRequest);
    // And the connection is as good as before.
    assert_eq!(vm.ask("err x", PATIENCE).unwrap(), "err x");
}

#[test]
fn failures_keep_their_kind() {
    let (_dir, client) = client(|request| match request {
        Request::Pause { .. } => Err(Failure::new(ErrorKind::NoSuchVm, "no VM is called x").about("x")),
        Request::Resume { .. } => Err(Failure::failed("it is stuck")),
        _ => Ok(Answer::Done),
    });
    let vm = client.vm("x");
    let e = vm.pause().unwrap_err();
    assert_eq!(
        (e.kind(), e.subject(), e.to_string()),
        (ErrorKind::NoSuchVm, Some("x".into()), "no VM is called x".into())
    );
    assert_eq!(vm.resume().unwrap_err().kind(), ErrorKind::Failed);
    assert!(matches!(client.list(), Err(Error::Protocol("list"))));
    assert_eq!(client.vm("a/b").stop().unwrap_err().kind(), ErrorKind::BadRequest);
    vm.kill().unwrap();
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
        assert_eq!(waiting.join().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
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

/// Fields that another version has or has not would be misread.
#[test]
fn a_server_of_another_protocol_is_not_talked_to() {
    let dir = TempDir::new();
    let home = Home::at(dir.path()).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(home.socket().unwrap()).unwrap();
    thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        writeln!(socket, r#"{{"ok":{{"protocol":99,"version":"9.0","pid":7,"lost":[],"news":1}}}}"#).unwrap();
    });
    let e = Client::builder().home(dir.path()).start_server(false).connect().unwrap_err();
    assert!(matches!(&e, Error::OtherVersion { protocol: 99, pid: 7, .. }), "{e}");
    assert_eq!(e.kind(), ErrorKind::Connection);
}

/// A server that can hear nobody else says so instead of a greeting.
#[test]
fn a_server_that_does_not_serve_says_why() {
    let dir = TempDir::new();
    let home = Home::at(dir.path()).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(home.socket().unwrap()).unwrap();
    thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        writeln!(socket, r#"{{"error":{{"kind":"limit","message":"too many connections","subject":null}}}}"#).unwrap();
    });
    let e = Client::builder().home(dir.path()).start_server(false).connect().unwrap_err();
    assert_eq!((e.kind(), e.to_string()), (ErrorKind::Limit, "too many connections".into()));
}
