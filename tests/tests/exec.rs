//! `exec`, `attach`, `ps`, `kill`, `cp` and `forward` against the agent as a program of this host, and against ones that lie.

use agent::message::{Exit, FromAgent, Hello, Session, ToAgent};
use agent::tar::{Entry, Kind, Writer};
use agent::{PROTOCOL, frame};
use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;
use offshoot_tests::{AgentHost, Outcome, TEN_SECONDS, command_at, wait_until};
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

fn with_input(mut command: Command, input: &[u8]) -> (i32, Vec<u8>) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut stdin, bytes) = (child.stdin.take().unwrap(), input.to_vec());
    let typist = thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output().unwrap();
    let _ = typist.join().unwrap();
    (output.status.code().unwrap_or(-1), output.stdout)
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// The numbers of sessions there are.
fn sessions(host: &AgentHost) -> Vec<String> {
    host.cli(&["ps", "a", "-q"]).good().lines().map(str::to_owned).collect()
}

#[test]
fn the_exit_code_is_the_programs_or_says_why_it_did_not_run() {
    let host = AgentHost::new();
    let code = |arguments: &[&str]| host.cli(arguments).code;
    assert_eq!(code(&["exec", "a", "true"]), 0);
    assert_eq!(code(&["exec", "a", "sh", "-c", "exit 7"]), 7);
    assert_eq!(code(&["exec", "a", "sh", "-c", "kill -9 $$"]), 137);
    assert_eq!(code(&["exec", "--timeout", "0.2", "a", "sleep", "60"]), 124);
    host.cli(&["exec", "a", "no-such-program"]).failure(127);
    host.cli(&["exec", "a", "/etc/passwd"]).failure(126);
    host.cli(&["exec", "-w", "/no/such", "a", "true"]).failure(125);
    host.cli(&["exec", "-u", "nobody-here", "a", "true"]).failure(125);
    host.cli(&["exec", "-e", "=x", "a", "true"]).failure(2);
    host.cli(&["exec", "-it", "a", "true"]).failure(2);
    host.cli(&["exec", "--fly", "a", "true"]).failure(2);
    let out = host.cli(&["exec", "-e", "A=b c", "-w", "/usr", "a", "sh", "-c", "echo $A; pwd"]).good();
    assert_eq!(out, "b c\n/usr\n");
    assert_eq!(host.cli(&["exec", "a", "echo", "-n", "--json", "-i"]).good(), "--json -i");
}

#[test]
fn streams_stay_apart_and_bytes_as_they_are() {
    let host = AgentHost::new();
    let outcome = host.cli(&["exec", "a", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((outcome.code, outcome.out.as_str(), outcome.err.as_str()), (0, "out\n", "err\n"));
    let bytes: Vec<u8> = (0..5_000_000u32).map(|n| (n.wrapping_mul(7919) >> 5) as u8).collect();
    assert!(with_input(host.command(&["exec", "-i", "a", "cat"]), &bytes) == (0, bytes.clone()));
    // Without -i there is no input, and what does not read it does not wait for it.
    assert_eq!(with_input(host.command(&["exec", "a", "cat"]), b"typed"), (0, Vec::new()));
    assert_eq!(with_input(host.command(&["exec", "-i", "a", "true"]), &bytes), (0, Vec::new()));
    // Whose reader has left is told, in the guest too.
    let mut yes = host.command(&["exec", "a", "yes"]).stdout(Stdio::piped()).spawn().unwrap();
    BufReader::new(yes.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    assert_eq!(yes.wait().unwrap().code(), Some(141));
    wait_until("yes has ended", TEN_SECONDS, || {
        let listed = host.cli(&["ps", "a", "--json"]).json();
        listed.as_array().unwrap().iter().all(|session| session["running"] == false)
    });
}

#[test]
fn signals_are_the_programs_and_the_third_leaves_it() {
    let host = AgentHost::new();
    let begin = |line: &str| {
        let mut command = host.command(&["exec", "-i", "a", "sh", "-c", line]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "ready\n");
        child
    };
    let mut child = begin("trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done");
    send(&child, Signal::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(9));
    let mut child = begin("echo ready; exec sleep 60");
    // Input that nobody reads is in nobody's way.
    let mut input = child.stdin.take().unwrap();
    thread::spawn(move || input.write_all(&vec![0; 8 << 20]));
    thread::sleep(std::time::Duration::from_millis(100));
    send(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));

    let mut child = begin("trap '' INT; echo ready; while :; do sleep 0.05; done");
    for _ in 0..3 {
        send(&child, Signal::SIGINT);
        thread::sleep(std::time::Duration::from_millis(100));
    }
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut said = String::new();
    child.stderr.unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("goes on (offshoot attach a "), "{said}");
    host.cli(&["kill", "a", sessions(&host).last().unwrap()]).good();
}

#[test]
fn sessions_are_listed_followed_and_killed() {
    let host = AgentHost::new();
    let id = host.cli(&["exec", "-d", "a", "sh", "-c", "echo begun; read line; exit 5"]).good().trim().to_owned();
    let hostile = ["exec", "-d", "a", "sh", "-c", "sleep 60", "\x1b]0;owned\x07\u{9b}"];
    let hostile = host.cli(&hostile).good().trim().to_owned();
    let table = host.cli(&["ps", "a"]).good();
    assert!(table.contains("\\u{1b}]0;owned\\u{7}\\u{9b}") && !table.contains('\x1b'), "{table}");
    let listed = host.cli(&["ps", "a", "--json"]).json();
    let last = &listed[1];
    assert_eq!((&last["running"], &last["attached"], &last["argv"][0]), (&true.into(), &false.into(), &"sh".into()));
    // It had no input, so it has ended.
    let attached = host.cli(&["attach", "--no-stdin", "a", &id]);
    assert_eq!((attached.code, attached.out.as_str()), (5, "begun\n"), "{attached:?}");
    host.cli(&["kill", "a", &hostile, "TERM"]).good();
    assert_eq!(host.cli(&["attach", "--no-stdin", "a", &hostile]).code, 143);
    assert_eq!(sessions(&host), Vec::<String>::new());
    host.cli(&["attach", "a", "99"]).failure(125);
    host.cli(&["kill", "a", "99"]).failure(2);
    host.cli(&["kill", "a", "99", "NOSUCH"]).failure(2);

    // A client that is killed leaves it running.
    let mut child = host.command(&["exec", "a", "sh", "-c", "sleep 1; echo late; exit 3"]).spawn().unwrap();
    wait_until("it runs", TEN_SECONDS, || !sessions(&host).is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    let outcome = host.cli(&["attach", "--no-stdin", "a", &sessions(&host)[0]]);
    assert_eq!((outcome.code, outcome.out.as_str()), (3, "late\n"), "{outcome:?}");
}

#[test]
fn a_terminal_is_raw_resized_and_put_back() {
    let host = AgentHost::new();
    let pty = openpty(None, None).unwrap();
    let (mut master, slave) = (File::from(pty.master), File::from(pty.slave));
    let echoes = || tcgetattr(&slave).unwrap().local_flags.contains(LocalFlags::ECHO);
    let stty = |words: &[&str]| {
        let input = slave.try_clone().unwrap();
        assert!(Command::new("stty").args(words).stdin(input).status().unwrap().success());
    };
    let begin = |words: &[&str]| {
        let copy = || slave.try_clone().unwrap();
        host.command(words).stdin(copy()).stdout(copy()).stderr(copy()).spawn().unwrap()
    };
    let mut keyboard = master.try_clone().unwrap();
    // What came, and was not waited for yet.
    let mut said = String::new();
    let mut until = |text: &str| {
        let (mut buffer, began) = ([0; 4096], Instant::now());
        while !said.contains(text) {
            let mut ready = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
            assert!(began.elapsed() < TEN_SECONDS, "{text:?}: {said:?}");
            if poll(&mut ready, 100u16).unwrap() > 0 {
                let count = master.read(&mut buffer).unwrap();
                said += &String::from_utf8_lossy(&buffer[..count]);
            }
        }
        let end = said.find(text).unwrap() + text.len();
        said.drain(..end);
    };
    stty(&["rows", "33", "cols", "77"]);
    let line = "stty size; trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut child = begin(&["exec", "-it", "a", "sh", "-c", line]);
    until("33 77");
    until("ready");
    wait_until("the terminal is raw", TEN_SECONDS, || !echoes());
    stty(&["rows", "40", "cols", "100"]);
    send(&child, Signal::SIGWINCH);
    until("40 100");
    send(&child, Signal::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(echoes());

    // The keys that leave, and what is left goes on.
    let mut child = begin(&["exec", "-it", "a", "cat"]);
    wait_until("the terminal is raw", TEN_SECONDS, || !echoes());
    keyboard.write_all(b"typed\r").unwrap();
    until("typed\r\ntyped");
    keyboard.write_all(b"\x10\x11").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    until("goes on (offshoot attach a ");
    assert!(echoes());
    let left = sessions(&host).pop().unwrap();
    let mut child = begin(&["attach", "a", &left]);
    until("typed");
    wait_until("the terminal is raw", TEN_SECONDS, || !echoes());
    keyboard.write_all(b"\x04").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(echoes());
}

#[test]
fn files_are_copied_as_by_docker() {
    let host = AgentHost::new();
    let at = |path: &str| host.directory().join(path);
    let here = |path: &str| at(path).display().to_string();
    let there = |path: &str| format!("a:{}", at(path).display());
    fs::create_dir_all(at("tree/sub")).unwrap();
    fs::write(at("tree/sub/file"), "text").unwrap();
    fs::set_permissions(at("tree/sub/file"), Permissions::from_mode(0o741)).unwrap();
    symlink("sub/file", at("tree/link")).unwrap();
    fs::create_dir(at("guest")).unwrap();
    let good = |from: &str, to: &str| assert_eq!(host.cli(&["cp", from, to]).good(), "");

    good(&here("tree"), &there("guest"));
    good(&here("tree"), &there("guest/new"));
    good(&here("tree/."), &there("guest/new/sub"));
    good(&here("tree/sub/file"), &there("guest/renamed"));
    for path in ["guest/tree/link", "guest/new/sub/file", "guest/new/sub/sub/file", "guest/renamed"] {
        assert_eq!(fs::read_to_string(at(path)).unwrap(), "text", "{path}");
    }
    good(&there("guest/tree"), &here("back"));
    assert_eq!(fs::metadata(at("back/sub/file")).unwrap().permissions().mode() & 0o7777, 0o741);
    assert_eq!(fs::read_link(at("back/link")).unwrap(), Path::new("sub/file"));

    let (code, archive) = with_input(host.command(&["cp", &there("guest/tree"), "-"]), b"");
    assert_eq!(code, 0);
    fs::create_dir(at("again")).unwrap();
    assert_eq!(with_input(host.command(&["cp", "-", &there("again")]), &archive), (0, Vec::new()));
    assert_eq!(fs::read_to_string(at("again/tree/sub/file")).unwrap(), "text");

    for (from, to, code) in [
        (here("tree"), here("other"), 2),
        (there("tree"), there("other"), 2),
        ("-".into(), "-".into(), 2),
        (here("none"), there("other"), 2),
        (there("none"), here("other"), 2),
        (here("tree/sub/file"), there("none/"), 2),
        (there("tree"), here("none/below"), 2),
        (here("tree"), there("guest/renamed"), 1),
        ("a:".into(), here("other"), 2),
    ] {
        host.cli(&["cp", &from, &to]).failure(code);
        assert!(!at("other").exists(), "{from} {to}");
    }
}

#[test]
fn ports_are_forwarded_with_half_closes_until_a_signal() {
    let host = AgentHost::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let guest = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            thread::spawn(move || {
                let mut all = Vec::new();
                socket.read_to_end(&mut all).unwrap();
                all.reverse();
                let _ = socket.write_all(&all);
            });
        }
    });
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = host.command(&["forward", "a", &format!("0:{guest}"), &format!("0:{nobody}")]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ports: Vec<u16> = (0..2)
        .map(|_| lines.next().unwrap().unwrap())
        .map(|line| line.split([':', ' ']).nth(1).unwrap().parse().unwrap())
        .collect();
    let clients: Vec<_> = (0..20u8)
        .map(|seed| {
            let mut socket = TcpStream::connect(("127.0.0.1", ports[0])).unwrap();
            thread::spawn(move || {
                let mut sent: Vec<u8> = (0..300_000u32).map(|n| n as u8 ^ seed).collect();
                let mut got = Vec::new();
                socket.write_all(&sent).unwrap();
                socket.shutdown(Shutdown::Write).unwrap();
                socket.read_to_end(&mut got).unwrap();
                sent.reverse();
                assert!(got == sent);
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    let mut refused = TcpStream::connect(("127.0.0.1", ports[1])).unwrap();
    assert!(!refused.read(&mut [0]).is_ok_and(|count| count > 0));
    host.cli(&["forward", "a", &format!("{}:{guest}", ports[0])]).failure(1);
    send(&child, Signal::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let mut said = String::new();
    child.stderr.unwrap().read_to_string(&mut said).unwrap();
    assert!(said.starts_with("offshoot: forward: a: port ") && said.contains("refused"), "{said}");
}

/// Serves whoever connects as an agent that says these messages once it is asked for something.
fn liar(socket: &Path, says: impl Fn() -> Vec<FromAgent> + Send + 'static) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection: UnixStream = connection.unwrap();
            let hello = FromAgent::Hello(Hello { protocol: PROTOCOL, generation: 0 });
            let _ = frame::write(&mut connection, &hello);
            let _ = frame::read::<ToAgent>(&mut connection);
            let _ = frame::read::<ToAgent>(&mut connection);
            says().iter().for_each(|message| drop(frame::write(&mut connection, message)));
            let _ = connection.shutdown(Shutdown::Write);
            let _ = std::io::copy(&mut connection, &mut std::io::sink());
        }
    });
}

fn run(socket: &Path, directory: &Path, arguments: &[&str]) -> Outcome {
    let output = command_at(socket, directory, arguments).stdin(Stdio::null()).output().unwrap();
    Outcome::new(arguments.join(" "), output)
}

#[test]
fn an_archive_that_lies_writes_nothing_outside() {
    let host = AgentHost::new();
    let directory = host.directory();
    fs::write(directory.join("victim"), "whole").unwrap();
    let entry = |path: &str, kind: Kind| {
        let entry = Entry { path: path.into(), kind, mode: 0o6777, uid: 0, gid: 0, mtime: 0 };
        let bytes: &[u8] = if matches!(entry.kind, Kind::File(_)) { b"owned" } else { b"" };
        (entry, bytes)
    };
    let victim = directory.join("victim").display().to_string();
    let outside = directory.display().to_string();
    let lies = [
        vec![entry("x/../../victim", Kind::File(5))],
        vec![entry("../victim", Kind::File(5))],
        vec![
            entry("x", Kind::Directory),
            entry("x/link", Kind::Symlink(outside.clone().into())),
            entry("x/link/victim", Kind::File(5)),
        ],
        vec![entry("x", Kind::Symlink(outside.into())), entry("x/victim", Kind::File(5))],
        vec![
            entry("x", Kind::Directory),
            entry("x/y", Kind::HardLink(b"../victim".to_vec())),
            entry("x/y", Kind::File(5)),
        ],
        vec![
            entry("x", Kind::Directory),
            entry("x/y", Kind::HardLink(victim.clone().into())),
            entry("x/y", Kind::File(5)),
        ],
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let mut archive = Writer::new(Vec::new());
        lie.iter().for_each(|(entry, bytes)| archive.entry(entry, &mut &**bytes).unwrap());
        let archive = archive.finish().unwrap();
        let socket = directory.join(format!("liar-{number}"));
        liar(&socket, move || vec![FromAgent::Out(archive.clone()), FromAgent::Done]);
        let to = directory.join(format!("to-{number}"));
        fs::create_dir(&to).unwrap();
        run(&socket, directory, &["cp", "a:/x", &to.display().to_string()]).failure(1);
        assert_eq!(fs::read_to_string(directory.join("victim")).unwrap(), "whole", "{lie:?}");
    }
    // An absolute path is one below the directory, and nothing runs as somebody else.
    let mut archive = Writer::new(Vec::new());
    archive.entry(&entry("/x", Kind::File(5)).0, &mut &b"owned"[..]).unwrap();
    let archive = archive.finish().unwrap();
    let socket = directory.join("liar");
    liar(&socket, move || vec![FromAgent::Out(archive.clone()), FromAgent::Done]);
    fs::create_dir(directory.join("to")).unwrap();
    run(&socket, directory, &["cp", "a:/x", &directory.join("to").display().to_string()]).good();
    assert_eq!(fs::metadata(directory.join("to/x")).unwrap().permissions().mode() & 0o7777, 0o777);
}

#[test]
fn an_agent_that_lies_is_told_of_in_one_line() {
    let host = AgentHost::new();
    let at = |name: &str| host.directory().join(name);
    let says = |name: &str, messages: Vec<FromAgent>| liar(&at(name), move || messages.clone());
    let run = |name: &str, arguments: &[&str]| run(&at(name), host.directory(), arguments);
    says("nothing", Vec::new());
    run("nothing", &["exec", "a", "true"]).failure(125);
    run("nothing", &["ps", "a"]).failure(1);
    says("else", vec![FromAgent::Done]);
    assert!(run("else", &["exec", "a", "true"]).failure(125).contains("an answer to something else"));
    let session = Session {
        id: 1,
        pid: 1,
        age_ms: u64::MAX,
        attached: false,
        terminal: false,
        exit: Some(Exit::Signal(255)),
        argv: vec![b"\x1b[2J\n\xff".repeat(99)],
    };
    says("many", vec![FromAgent::Session(session.clone()); 20_000]);
    assert!(run("many", &["ps", "a"]).failure(1).contains("more than 10000 sessions"));
    says("odd", vec![FromAgent::Session(session), FromAgent::Done]);
    let table = run("odd", &["ps", "a"]).good();
    assert!(!table.contains('') && table.lines().count() == 2, "{table}");
    // Nobody at all.
    run("nobody", &["exec", "a", "true"]).failure(125);
    // One that takes connections, and says nothing, ever.
    let _silent = UnixListener::bind(at("silent")).unwrap();
    let began = Instant::now();
    let others = thread::scope(|scope| {
        let other = scope.spawn(|| run("silent", &["ps", "a"]));
        assert!(run("silent", &["exec", "a", "true"]).failure(125).contains("does not answer"));
        other.join().unwrap()
    });
    others.failure(3);
    assert!(began.elapsed().as_secs() < 20);
}
