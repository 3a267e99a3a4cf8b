//! The agent of Linux guests, run as an ordinary program of this host, and the client that talks to it. No VM is needed: what
//! is tried is what both say to each other, and what the agent does about it.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use offshoot_tests::{AgentHost as Host, Lack, TEN_SECONDS, is_root, skip, wait_until};
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vmm::api::ErrorKind;
use vmm::client::Error;
use vmm::client::agent::{AgentErrorKind, Event, Running, Size};

fn sh(line: &str) -> [&str; 3] {
    ["sh", "-c", line]
}

fn kind(error: &Error) -> AgentErrorKind {
    match error {
        Error::Agent(e) => e.kind,
        other => panic!("{other:?}"),
    }
}

/// What a program writes until this is in it.
fn until(running: &mut Running, text: &str) -> String {
    let mut all = String::new();
    while !all.contains(text) {
        match running.next_event().unwrap() {
            Event::Out(bytes) | Event::Err(bytes) => all += &String::from_utf8_lossy(&bytes),
            Event::Exit(status) => panic!("{status} after {all:?}"),
        }
    }
    all
}

#[test]
fn programs_run_and_tell_how_they_ended() {
    let host = Host::new();
    let agent = host.agent();
    let output = agent.exec(sh("echo out; echo err >&2; exit 7")).unwrap();
    assert_eq!((output.status.code(), output.status.shell()), (Some(7), 7));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert!(agent.exec(["true"]).unwrap().status.success());

    let killed = agent.exec(sh("kill -9 $$")).unwrap().status;
    assert_eq!((killed.code(), killed.signal(), killed.shell()), (None, Some(9), 137));
    let began = Instant::now();
    let late = agent.command(["sleep", "60"]).timeout(Duration::from_millis(200)).output().unwrap().status;
    assert!(late.timed_out() && late.shell() == 124 && began.elapsed() < TEN_SECONDS, "{late:?}");

    let told = agent.command(sh("echo $A-$HOME; pwd; cat")).env("A", "b c").current_dir("/usr").output().unwrap();
    assert_eq!(String::from_utf8(told.stdout).unwrap(), "b c-/root\n/usr\n");
    let mut cat = agent.command(["cat"]).stdin(true).spawn().unwrap();
    let mut input = cat.input();
    input.write_all(b"typed").unwrap();
    assert_eq!(until(&mut cat, "typed"), "typed");
    input.end().unwrap();
    assert!(cat.wait().unwrap().success());
}

#[test]
fn what_cannot_be_run_is_told_apart() {
    let host = Host::new();
    let agent = host.agent();
    let fails = |argv: &[&str]| agent.exec(argv).unwrap_err();
    assert_eq!(kind(&fails(&["no-such-program"])), AgentErrorKind::NoProgram);
    assert_eq!(fails(&["/no/such"]).to_string(), "vm: /no/such: No such file or directory (os error 2)");
    assert_eq!(kind(&fails(&["/etc/passwd"])), AgentErrorKind::NotExecutable);
    assert_eq!(kind(&fails(&["/etc"])), AgentErrorKind::NotExecutable);
    assert_eq!(fails(&[]).to_string(), "vm: there is no program to run");
    assert_eq!(fails(&[""]).kind(), ErrorKind::BadRequest);
    let command = || agent.command(["true"]);
    let e = command().user("nobody-here").output().unwrap_err();
    assert_eq!(e.to_string(), "vm: there is no user \"nobody-here\" in the guest");
    let e = command().current_dir("/no/such").output().unwrap_err();
    assert_eq!(e.to_string(), "vm: \"/no/such\" in the guest: No such file or directory (os error 2)");
    let long = agent.exec(["echo", &"x".repeat(70_000)]).unwrap_err();
    assert!(long.kind() == ErrorKind::BadRequest && long.to_string().contains("65536 at most"), "{long}");
    // None of them is left in the list.
    assert_eq!(agent.sessions().unwrap(), []);
}

#[test]
fn users_are_those_of_the_guest() {
    let host = Host::new();
    fs::write(host.root("etc/passwd"), "ana:x:12345:12346::/:/bin/sh\n").unwrap();
    fs::write(host.root("etc/group"), "audio:x:77:ana\n").unwrap();
    if !is_root() {
        // Rather not at all than as somebody else.
        let e = host.agent().command(["true"]).user("ana").output().unwrap_err();
        assert!(e.to_string().contains("the agent is not root"), "{e}");
        return skip(Lack::Root, "a program becomes somebody else");
    }
    let told = host.agent().command(sh("id -u; id -g; id -G; echo $USER")).user("ana").output().unwrap();
    assert_eq!(String::from_utf8(told.stdout).unwrap(), "12345\n12346\n12346 77\nana\n");
}

#[test]
fn much_output_comes_whole() {
    let host = Host::new();
    let output = host.agent().exec(sh("seq 1 2000000; seq 1 300000 >&2")).unwrap();
    let wanted = |last: u32| (1..=last).map(|n| format!("{n}\n")).collect::<String>();
    assert!(output.stdout == wanted(2_000_000).into_bytes(), "{} bytes", output.stdout.len());
    assert!(output.stderr == wanted(300_000).into_bytes(), "{} bytes", output.stderr.len());
}

#[test]
fn input_that_is_not_read_holds_up_nothing_else() {
    let host = Host::new();
    let agent = host.agent();
    let mut sleeper = agent.command(sh("echo ready; sleep 100")).stdin(true).spawn().unwrap();
    until(&mut sleeper, "ready");
    let (session, mut input) = (sleeper.session(), sleeper.input());
    let typist = std::thread::spawn(move || input.write_all(&vec![0; 8 << 20]));
    std::thread::sleep(Duration::from_millis(100));
    agent.signal(session, 15).unwrap();
    assert_eq!(sleeper.wait().unwrap().signal(), Some(15));
    // Whatever was left of the input.
    let _ = typist.join().unwrap();
}

#[test]
fn who_goes_on_in_the_background_holds_nobody_up() {
    let host = Host::new();
    let began = Instant::now();
    let output = host.agent().exec(sh("sleep 30 & echo $!")).unwrap();
    assert!(output.status.success() && began.elapsed() < TEN_SECONDS);
    let pid: i32 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    // It lives, and is nobody's but ours to end.
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

#[test]
fn terminals_are_terminals() {
    let host = Host::new();
    let agent = host.agent();
    let size = Size { rows: 33, columns: 77 };
    let line = "test -t 0 && test -t 1 && stty size; trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut shell = agent.command(sh(line)).terminal(size).stdin(true).spawn().unwrap();
    assert!(until(&mut shell, "ready").starts_with("33 77\r\n"));
    shell.input().resize(Size { rows: 40, columns: 100 }).unwrap();
    until(&mut shell, "40 100");
    shell.input().write_all(b"\x03").unwrap();
    let status = shell.wait().unwrap();
    assert!(status.signal() == Some(2) || status.code() == Some(130), "{status}");

    let mut cat = agent.command(["cat"]).terminal(size).stdin(true).spawn().unwrap();
    cat.input().write_all(b"line\n").unwrap();
    until(&mut cat, "line\r\nline");
    cat.input().end().unwrap();
    assert!(cat.wait().unwrap().success());
}

#[test]
fn a_session_outlives_its_client() {
    let host = Host::new();
    let agent = host.agent();
    // A client that leaves.
    let mut first = agent.command(sh("echo begun; read line; echo got $line; exit 5")).stdin(true).spawn().unwrap();
    until(&mut first, "begun");
    let id = first.session();
    drop(first);
    wait_until("nobody follows it", TEN_SECONDS, || !agent.sessions().unwrap()[0].attached);
    let listed = agent.sessions().unwrap().remove(0);
    assert_eq!((listed.id, listed.exit, listed.argv[0].as_slice()), (id, None, &b"sh"[..]));

    // Another that comes, and one that takes its place.
    let mut second = agent.attach(id).unwrap();
    until(&mut second, "begun");
    let mut third = agent.attach(id).unwrap();
    until(&mut third, "begun");
    assert_eq!(second.next_event().unwrap_err().kind(), ErrorKind::Connection);
    third.input().write_all(b"it\n").unwrap();
    until(&mut third, "got it");
    assert_eq!(third.wait().unwrap().code(), Some(5));
    wait_until("it is forgotten", TEN_SECONDS, || agent.sessions().unwrap().is_empty());
    assert_eq!(agent.attach(id).unwrap_err().to_string(), format!("vm: there is no session {id}"));

    // One that nobody follows: the last of what it wrote is kept, and how it ended.
    let id = agent.command(sh("seq 1 100000; exit 3")).detach().unwrap();
    wait_until("it has ended", TEN_SECONDS, || agent.sessions().unwrap()[0].exit.is_some());
    let mut late = agent.attach(id).unwrap();
    let mut kept = Vec::new();
    let status = loop {
        match late.next_event().unwrap() {
            Event::Out(bytes) | Event::Err(bytes) => kept.extend(bytes),
            Event::Exit(status) => break status,
        }
    };
    assert_eq!((kept.len(), status.code()), (64 << 10, Some(3)));
    assert!(kept.ends_with(b"99999\n100000\n"));
}

#[test]
fn signals_reach_all_of_a_session() {
    let host = Host::new();
    let agent = host.agent();
    let mut running = agent.command(sh("sleep 100 & echo $!; wait")).spawn().unwrap();
    let child: i32 = until(&mut running, "\n").trim().parse().unwrap();
    let id = running.session();
    assert!(agent.signal(id, 0).unwrap_err().to_string().contains("no signal 0"));
    assert!(agent.signal(id + 7, 9).unwrap_err().to_string().contains("no session"));
    agent.signal(id, 9).unwrap();
    assert_eq!(running.wait().unwrap().signal(), Some(9));
    let state = || fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
    wait_until("its child is gone as well", TEN_SECONDS, || state().is_empty() || state().contains(") Z "));
}

#[test]
fn files_go_both_ways() {
    let host = Host::new();
    let agent = host.agent();
    let (here, there) = (host.directory().join("here"), host.directory().join("there"));
    fs::create_dir_all(here.join("sub")).unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(7919) >> 5) as u8).collect();
    fs::write(here.join("sub/large"), &bytes).unwrap();
    fs::write(here.join("script"), "#!/bin/sh\necho copied\n").unwrap();
    fs::set_permissions(here.join("script"), Permissions::from_mode(0o750)).unwrap();
    symlink("sub/large", here.join("link")).unwrap();

    agent.copy_in(&here, &there).unwrap();
    assert_eq!(fs::read(there.join("sub/large")).unwrap(), bytes);
    assert_eq!(agent.exec([there.join("script")]).unwrap().stdout, b"copied\n");
    agent.copy_in(&here.join("script"), &there).unwrap();
    let back = host.directory().join("back");
    agent.copy_out(&there, &back).unwrap();
    assert_eq!(fs::read(back.join("link")).unwrap(), bytes);
    agent.copy_out(there.join("script"), &host.directory().join("renamed")).unwrap();
    assert!(host.directory().join("renamed").exists());

    let mut archive = Vec::new();
    agent.archive(there.join(".")).unwrap().copy_to(&mut archive).unwrap();
    fs::create_dir(host.directory().join("again")).unwrap();
    agent.unpack(archive.as_slice(), host.directory().join("again")).unwrap();
    assert_eq!(fs::read(host.directory().join("again/sub/large")).unwrap(), bytes);

    let e = agent.copy_out("/no/such", &back).unwrap_err();
    assert_eq!(e.to_string(), "vm: cp: /no/such: No such file or directory (os error 2)");
    let e = agent.copy_in(&here, "/no/such/directory").unwrap_err();
    assert!(e.to_string().starts_with("vm: cp: /no/such/directory: "), "{e}");
    let e = agent.copy_in(Path::new("/no/such"), &there).unwrap_err();
    assert_eq!((e.kind(), e.to_string().starts_with("cp: /no/such: ")), (ErrorKind::BadRequest, true), "{e}");
    let e = agent.unpack(&b"no archive".repeat(100)[..], &there).unwrap_err();
    assert!(e.to_string().contains("no tar archive"), "{e}");
}

#[test]
fn ports_of_the_loopback_are_reached() {
    let host = Host::new();
    let agent = host.agent();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        // To the end of the client's half.
        socket.read_to_end(&mut all).unwrap();
        all.reverse();
        socket.write_all(&all).unwrap();
    });
    let mut stream = agent.dial(port).unwrap();
    let sent: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    got.reverse();
    assert!(got == sent);
    server.join().unwrap();
    let e = agent.dial(port).unwrap_err();
    assert_eq!(e.to_string(), format!("vm: port {port} of the guest: Connection refused (os error 111)"));
}

#[test]
fn a_child_of_a_fork_becomes_somebody_else() {
    if !is_root() {
        return skip(Lack::Root, "the kernel is given random numbers");
    }
    let host = Host::new();
    for directory in ["dev", "proc/sys/kernel", "etc/offshoot/fork.d"] {
        fs::create_dir_all(host.root(directory)).unwrap();
    }
    symlink("/dev/urandom", host.root("dev/urandom")).unwrap();
    fs::write(host.root("proc/sys/kernel/hostname"), "parent").unwrap();
    fs::write(host.root("etc/machine-id"), "0123456789abcdef0123456789abcdef\n").unwrap();
    let hook = host.root("etc/offshoot/fork.d/50-note");
    let noted = host.root("noted");
    let text = format!("#!/bin/sh\necho $OFFSHOOT_NAME $OFFSHOOT_GENERATION >>{}\n", noted.display());
    fs::write(&hook, text).unwrap();
    fs::set_permissions(&hook, Permissions::from_mode(0o755)).unwrap();

    // Before, it is the one that was launched.
    assert!(host.agent().exec(["true"]).unwrap().status.success());
    let running = host.agent().command(["sleep", "100"]).spawn().unwrap();
    let child = host.agent_of("vm-1", 77);
    assert!(child.exec(["true"]).unwrap().status.success());
    let read = |path: &str| fs::read_to_string(host.root(path)).unwrap();
    assert_eq!(read("proc/sys/kernel/hostname"), "vm-1");
    assert_eq!((read("run/offshoot/name").as_str(), read("run/offshoot/generation").as_str()), ("vm-1\n", "77\n"));
    assert_eq!(read("noted"), "vm-1 77\n");
    let id = read("etc/machine-id");
    assert!(id.len() == 33 && !id.starts_with("0123456789") && &id[12..13] == "4", "{id}");
    // Once is enough, however many come, and whatever the parent ran is there.
    assert_eq!(child.notify().unwrap().trouble, None);
    assert_eq!((read("noted").as_str(), read("etc/machine-id")), ("vm-1 77\n", id.clone()));
    assert_eq!(child.sessions().unwrap()[0].id, running.session());
    child.signal(running.session(), 9).unwrap();

    // Who means its parent is not served by it.
    let e = host.agent().exec(["true"]).unwrap_err();
    assert_eq!(kind(&e), AgentErrorKind::NotReseeded);
    // A grandchild, with a hook that fails: that is told, and no more.
    fs::write(&hook, "#!/bin/sh\nexit 1\n").unwrap();
    let acked = host.agent_of("vm-2", 78).notify().unwrap();
    assert!(acked.trouble.unwrap().contains("50-note"));
    assert_ne!(read("etc/machine-id"), id);

    // A child that gets no random numbers does nothing for anyone, however often it is asked.
    fs::remove_file(host.root("dev/urandom")).unwrap();
    let lost = host.agent_of("vm-3", 79);
    for _ in 0..2 {
        let e = lost.exec(["true"]).unwrap_err();
        assert_eq!(kind(&e), AgentErrorKind::NotReseeded);
        assert!(e.to_string().starts_with("vm-3: no random numbers of its own since the fork: /dev/urandom: "), "{e}");
    }
}

#[test]
fn clients_that_lie_hurt_only_themselves() {
    let host = Host::new();
    let agent = host.agent();
    let mut random = 1u64;
    for _ in 0..300 {
        let mut socket = UnixStream::connect(host.socket()).unwrap();
        let bytes: Vec<u8> = (0..64)
            .map(|n| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // Lengths that could be.
                if n % 13 < 4 { [9, 0, 0, 0][n % 13 % 4] } else { (random >> 56) as u8 }
            })
            .collect();
        let _ = socket.write_all(&bytes);
    }
    assert!(agent.exec(["true"]).unwrap().status.success());

    let mut socket = UnixStream::connect(host.socket()).unwrap();
    let hello = agent::message::Hello { protocol: 99, generation: 0 };
    agent::frame::write(&mut socket, &agent::message::ToAgent::Hello(hello)).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let mut said = Vec::new();
    socket.read_to_end(&mut said).unwrap();
    assert!(String::from_utf8_lossy(&said).contains("the agent speaks protocol 1, and the client 99"));
}

#[test]
fn many_programs_leave_nothing_behind() {
    let host = Host::new();
    let agent = host.agent();
    agent.exec(["true"]).unwrap();
    let before = (host.count("fd"), host.count("task"));
    for _ in 0..300 {
        assert!(agent.exec(["true"]).unwrap().status.success());
    }
    wait_until("threads and descriptors are gone", TEN_SECONDS, || {
        host.count("fd") <= before.0 && host.count("task") <= before.1
    });
    assert_eq!(agent.sessions().unwrap(), []);
}
