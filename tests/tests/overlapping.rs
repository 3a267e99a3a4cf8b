//! Requests that overlap, and clients and VMs that leave in the middle of one.

use offshoot_tests::process::kill;
use offshoot_tests::{Guest, TEN_SECONDS, TestHome, wait_until};
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use vmm::api::{Answer, Line, Reply, Request, VmState};
use vmm::client::{ForkOptions, Forked, Home, Vm};
use vmm::units::ByteSize;

const WRITTEN: Range<u64> = 1000..33768;

/// A connection that has been greeted.
fn connection(home: &TestHome) -> BufReader<UnixStream> {
    let path = Home::at(home.path()).unwrap().socket().unwrap();
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(TEN_SECONDS)).unwrap();
    let mut stream = BufReader::new(stream);
    stream.read_line(&mut String::new()).unwrap();
    stream
}

fn line(request: &Request) -> String {
    serde_json::to_string(request).unwrap() + "\n"
}

/// All ask before anybody reads an answer.
fn ask_at_once(home: &TestHome, requests: &[Request]) -> Vec<Reply> {
    let mut connections: Vec<_> = requests.iter().map(|_| connection(home)).collect();
    for (connection, request) in connections.iter_mut().zip(requests) {
        connection.get_mut().write_all(line(request).as_bytes()).unwrap();
    }
    let answer = |mut connection: BufReader<UnixStream>| {
        let mut line = String::new();
        connection.read_line(&mut line).expect("an answer in time");
        serde_json::from_str::<Line<Answer>>(&line).unwrap().into()
    };
    connections.into_iter().map(answer).collect()
}

/// The VM says once that it stands: only who had asked first was told.
#[test]
fn all_who_pause_a_vm_are_answered() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("p", ByteSize::mib(32));
    let name = || vm.name().to_owned();
    for _ in 0..20 {
        for request in [Request::Pause { name: name() }, Request::Resume { name: name() }] {
            let replies = ask_at_once(&home, &[request.clone(), request.clone(), request]);
            assert!(replies.iter().all(Result::is_ok), "{replies:?}");
        }
    }
}

/// A server that was told of a hang-up again and again did nothing else until the answer was there.
#[test]
fn who_leaves_while_the_server_waits_for_a_vm_costs_it_nothing() {
    let Some(home) = TestHome::new() else { return };
    home.launch("p", ByteSize::mib(32));
    let mut waiter = connection(&home);
    let wait = Request::Wait { name: "p".into(), timeout_ms: None };
    waiter.get_mut().write_all(line(&wait).as_bytes()).unwrap();
    // It has been heard when one that asked later has its answer.
    home.client().list().unwrap();
    drop(waiter);
    let used = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", home.server().unwrap())).unwrap();
        let ticks = stat.rsplit(") ").next().unwrap().split(' ').skip(11).take(2);
        ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>()
    };
    let before = used();
    thread::sleep(Duration::from_secs(1));
    let ticks = used() - before;
    assert!(ticks < 30, "{ticks} of some 100 ticks");
}

/// A fork of a VM that has all of its memory to itself, whose asker waits until its pages have settled, and its child.
fn forked_and_awaited(home: &TestHome, meanwhile: impl FnOnce(&Vm, Vm)) -> Vec<Forked> {
    let parent = home.launch("p", ByteSize::mib(160));
    parent.fill(WRITTEN, 1);
    let (done, outcome) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| done.send(parent.fork(ForkOptions::new().wait_settled(true))).unwrap());
        let lives = || home.client().list().unwrap().iter().any(|vm| vm.name == "p-1" && vm.state == VmState::Running);
        wait_until("there is a child", TEN_SECONDS, lives);
        let child = home.client().vm("p-1");
        child.ask("id", TEN_SECONDS).expect("it has begun");
        meanwhile(&parent, child);
        outcome.recv_timeout(2 * TEN_SECONDS).expect("the fork is answered").expect("the fork")
    })
}

/// It could not be forked as long as somebody waited for its pages, and its end was that of the fork, with all siblings.
#[test]
fn a_child_whose_pages_are_waited_for_is_a_vm_like_any_other() {
    let Some(home) = TestHome::new() else { return };
    // All may have settled when we get to look.
    let in_time = (0..5).any(|_| {
        let mut unsettled = 0;
        let forked = forked_and_awaited(&home, |_, child| {
            let grandchild = loop {
                match child.fork(ForkOptions::new()) {
                    Ok(mut forked) => break forked.remove(0).vm,
                    Err(error) => assert!(error.to_string().contains("has not started yet"), "{error}"),
                }
            };
            unsettled = home.totals().unsettled_pages;
            child.remove().unwrap();
            grandchild.verify(WRITTEN, 1);
        });
        assert_eq!(forked.len(), 1);
        home.check();
        home.client().remove_all().unwrap();
        unsettled > 0
    });
    assert!(in_time, "no child was forked before all had settled");
}

/// What stayed with the parent was to be given back by it, since it was in memory twice, and whoever waited for that waited for ever.
#[test]
fn a_parent_that_ends_has_nothing_to_dedup() {
    let Some(home) = TestHome::new() else { return };
    forked_and_awaited(&home, |parent, child| {
        kill(parent.stats().unwrap().vm.pid.expect("it runs"));
        child.verify(WRITTEN, 1);
    });
    home.check();
}
