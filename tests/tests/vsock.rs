//! Connections to guests, through forks, with a guest that drives the real device: `kernel/vsock.c`.

use offshoot_tests::hostile::Hostile;
use offshoot_tests::process::descriptors;
use offshoot_tests::{AgentHost, Guest, TEN_SECONDS, TestHome, wait_until};
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vmm::api::ErrorKind;
use vmm::client::{Error, ForkOptions, LaunchOptions, Vm};
use vmm::devices::virtio::{DEVICES, Kind, Noticed, Outcome};
use vmm::layout::devices::{VIRTIO, VIRTIO_SIZE};
use vmm::units::ByteSize;
use vmm::wire::FromVm;

/// Ports of the kernel.
const ECHO: u32 = 7;
const COUNT: u32 = 8;
const CALL: u32 = 9;
const SILENT: u32 = 10;
const LIAR: u32 = 11;
const NOBODY: u32 = 12;

/// Compiles the kernel into a home.
fn kernel(home: &TestHome) -> PathBuf {
    let number = DEVICES.iter().position(|kind| *kind == Kind::Vsock).expect("the device is there");
    let base = VIRTIO + number as u32 * VIRTIO_SIZE;
    fs::create_dir_all(home.path()).expect("a home");
    let elf = home.path().with_file_name("vsock.elf");
    let compiled = Command::new("gcc")
        .args(["-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-mgeneral-regs-only", "-nostdlib", "-static"])
        .args(["-fno-pie", "-no-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"])
        .args(["-Wl,-Ttext=0x201000,-e,entry,--build-id=none,-z,noexecstack"])
        .arg(format!("-DBASE={base:#x}u"))
        .arg("-o")
        .arg(&elf)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel/vsock.c"))
        .status()
        .expect("gcc runs");
    assert!(compiled.success(), "the kernel does not compile");
    elf
}

fn launch_with(home: &TestHome, name: &str, more: impl FnOnce(LaunchOptions) -> LaunchOptions) -> Vm {
    let options = LaunchOptions::new().name(name).memory(ByteSize::mib(64)).kernel(kernel(home)).expect("a path");
    let vm = home.client().launch(more(options)).expect("launch");
    wait_until("the kernel is ready", TEN_SECONDS, || vm.log().contains("ready\n"));
    vm
}

fn launch(home: &TestHome, name: &str) -> Vm {
    launch_with(home, name, |options| options)
}

fn connect(vm: &Vm, port: u32) -> Result<UnixStream, Error> {
    let (stream, connected) = vm.connect(port, TEN_SECONDS)?;
    assert_eq!(connected.name, vm.name());
    stream.set_read_timeout(Some(TEN_SECONDS)).expect("a time to wait");
    Ok(stream)
}

fn kind(result: Result<UnixStream, Error>) -> ErrorKind {
    kind_of(result.map(drop))
}

fn kind_of(result: Result<(), Error>) -> ErrorKind {
    match result {
        Err(Error::Failure(failure)) => failure.kind,
        other => panic!("{other:?}"),
    }
}

fn echo(stream: &mut UnixStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back)?;
    assert_eq!(back, bytes);
    Ok(())
}

/// All that comes until the end.
fn all(mut stream: UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("read to the end");
    text
}

/// How many other connections a guest has, how many were reset while they were open, and how many of its own were refused.
fn counts(vm: &Vm) -> [u32; 3] {
    let text = all(connect(vm, COUNT).expect("connect"));
    let numbers: Vec<u32> = text.split_whitespace().map(|number| number.parse().expect("a number")).collect();
    numbers.try_into().expect("three numbers")
}

/// Sets a flag when it is dropped, also in a panic: those who wait for it are not waited for in vain.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    let mut stream = connect(&vm, ECHO).unwrap();
    echo(&mut stream, b"hello").unwrap();
    // More than the guest, the device and the sockets have room for together.
    let bytes: Vec<u8> = (0..512 << 10_u32).map(|at| (at * 7 + at / 251) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            writer.write_all(&bytes).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(back == bytes, "{} of {} bytes came back, or others", back.len(), bytes.len());
    });
    wait_until("the guest has forgotten it", TEN_SECONDS, || counts(&vm)[0] == 0);
    home.check();
}

#[test]
fn what_cannot_be_connected_is_told() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    assert_eq!(kind(connect(&vm, NOBODY)), ErrorKind::Refused);
    let silent = vm.connect(SILENT, Duration::from_millis(200)).map(|(stream, _)| stream);
    assert_eq!(kind(silent), ErrorKind::TimedOut);
    vm.pause().unwrap();
    assert_eq!(kind(connect(&vm, ECHO)), ErrorKind::NotRunning);
    vm.resume().unwrap();
    echo(&mut connect(&vm, ECHO).unwrap(), b"again").unwrap();
    assert_eq!(kind(connect(&home.launch("built-in", ByteSize::mib(64)), ECHO)), ErrorKind::Unsupported);
    assert_eq!(kind(connect(&home.client().vm("nobody"), ECHO)), ErrorKind::NoSuchVm);
    // A client that waits when the VM ends is told, and streams end.
    let mut open = connect(&vm, ECHO).unwrap();
    thread::scope(|scope| {
        let waits = scope.spawn(|| connect(&vm, SILENT));
        thread::sleep(Duration::from_millis(200));
        vm.kill().unwrap();
        assert_eq!(kind(waits.join().unwrap()), ErrorKind::VmEnded);
    });
    assert_eq!(open.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(kind(connect(&vm, ECHO)), ErrorKind::NotRunning);
}

/// Every byte that the parent was sent comes back, whatever is forked meanwhile. A child has none of its parent's connections,
/// and its guest knows that before anybody connects to it.
#[test]
fn the_parent_keeps_its_connections_and_the_child_has_none_of_them() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    let streams: Vec<UnixStream> = (0..4).map(|_| connect(&vm, ECHO).unwrap()).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let echoes = streams.into_iter().zip(1_u8..).map(|(mut stream, seed)| {
            let stop = &stop;
            scope.spawn(move || {
                let mut sent = 0;
                while !stop.load(Ordering::Relaxed) || sent < 20 {
                    let bytes: Vec<u8> = (0..1000_u32).map(|at| (at + sent) as u8 ^ seed).collect();
                    echo(&mut stream, &bytes).unwrap_or_else(|e| panic!("stream {seed} after {sent}: {e}"));
                    sent += 1;
                }
                stream
            })
        });
        let echoes: Vec<_> = echoes.collect();
        let ending = AtEnd(&stop);
        for _ in 0..5 {
            let child = vm.fork(ForkOptions::new()).unwrap().remove(0).vm;
            let mut stream = connect(&child, ECHO).unwrap();
            wait_until("its own is there, and others were reset", TEN_SECONDS, || counts(&child)[..2] == [1, 4]);
            echo(&mut stream, b"in the child").unwrap();
            let grandchild = child.fork(ForkOptions::new()).unwrap().remove(0).vm;
            wait_until("all were reset", TEN_SECONDS, || counts(&grandchild)[..2] == [0, 5]);
            echo(&mut stream, b"still there").unwrap();
        }
        drop(ending);
        let streams: Vec<_> = echoes.into_iter().map(|echo| echo.join().unwrap()).collect();
        assert_eq!(counts(&vm)[..2], [4, 0], "none was reset in the parent");
        drop(streams);
    });
    home.check();
}

/// A connection that was asked for after the fork is not reset by what ends those of before: each is answered.
#[test]
fn connections_begin_in_the_midst_of_forks() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    let (stop, made) = (AtomicBool::new(false), std::sync::atomic::AtomicU32::new(0));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let mut stream = connect(&vm, ECHO).expect("connect in a storm");
                    echo(&mut stream, b"storm").expect("a connection that was made");
                    made.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _ending = AtEnd(&stop);
        for _ in 0..40 {
            let child = vm.fork(ForkOptions::new()).unwrap().remove(0).vm;
            echo(&mut connect(&child, ECHO).expect("connect to a child"), b"child").expect("a child's connection");
            home.client().remove([child.name()]).unwrap();
        }
    });
    assert!(made.load(Ordering::Relaxed) > 40, "{made:?} connections");
}

/// Firecracker's way: `CONNECT PORT`, `OK PORT`; and the guest's own connections.
#[test]
fn programs_reach_guests_by_a_socket_and_are_reached() {
    let Some(home) = TestHome::new() else { return };
    let directory = home.path().with_file_name("sockets");
    fs::create_dir(&directory).unwrap();
    let vm = launch_with(&home, "a", |options| options.vsock(directory.join("{name}.sock")).unwrap());
    let visit = |name: &str, line: &str| {
        let mut stream = UnixStream::connect(directory.join(format!("{name}.sock"))).expect("a socket of its own");
        stream.set_read_timeout(Some(TEN_SECONDS)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream
    };
    let greeted = |stream: &mut UnixStream| {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a greeting");
            line.extend(byte);
        }
        let line = String::from_utf8(line).unwrap();
        line.strip_prefix("OK ")
            .and_then(|port| port.trim_end().parse::<u32>().ok())
            .unwrap_or_else(|| panic!("{line}"))
    };
    let mut stream = visit("a", "CONNECT 7\nat once");
    let first = greeted(&mut stream);
    let mut back = [0; 7];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"at once");
    let mut other = visit("a", "CONNECT 7\n");
    assert_ne!(greeted(&mut other), first);
    assert_eq!(all(visit("a", "CONNECT 12\n")), "", "nobody listens there");
    assert!(!matches!(visit("a", "HELLO\n").read(&mut [0]), Ok(1)), "that is no place to go to");
    assert_eq!(home.client().vm("a").inspect().unwrap().vsock.unwrap(), directory.join("a.sock"));

    let child = vm.fork(ForkOptions::new()).unwrap().remove(0).vm;
    let mut of_child = visit(child.name(), "CONNECT 7\n");
    greeted(&mut of_child);
    echo(&mut of_child, b"another guest").unwrap();
    echo(&mut stream, b"the same as before").unwrap();

    // The guest connects to port 5000 of the host, in either way.
    for (caller, path) in
        [(&vm, directory.join("a.sock_5000")), (&child, directory.join(format!("{}.sock_5000", child.name())))]
    {
        let listener = UnixListener::bind(&path).unwrap();
        connect(caller, CALL).unwrap().write_all(&5000_u32.to_le_bytes()).unwrap();
        let mut called = accept(&listener);
        echo(&mut called, b"from outside").unwrap();
    }
    home.client().remove(["a", child.name()]).unwrap();
    assert!(!directory.join("a.sock").exists());
    let left: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "only what this test has made: {left:?}");
}

#[track_caller]
fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let mut came = None;
    wait_until("the guest connects", TEN_SECONDS, || {
        came = listener.accept().ok();
        came.is_some()
    });
    let (stream, _) = came.expect("it has come");
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(TEN_SECONDS)).unwrap();
    stream
}

/// Without a socket of its own, a guest reaches what listens in the home. Where nobody does it is refused, and says so no more.
#[test]
fn a_guest_reaches_what_listens_in_the_home() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    connect(&vm, CALL).unwrap().write_all(&5001_u32.to_le_bytes()).unwrap();
    wait_until("it was refused", TEN_SECONDS, || counts(&vm)[2] == 1);
    let directory = home.path().join("vsock");
    fs::create_dir(&directory).unwrap();
    let listener = UnixListener::bind(directory.join("a_5001")).unwrap();
    connect(&vm, CALL).unwrap().write_all(&5001_u32.to_le_bytes()).unwrap();
    echo(&mut accept(&listener), b"in the home").unwrap();
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn a_socket_that_cannot_be_made_is_refused_and_nothing_changes() {
    let Some(home) = TestHome::new() else { return };
    let kernel = kernel(&home);
    let launch = |path: &Path| {
        let kernel = kernel.to_str().unwrap();
        home.cli(&["launch", "x", "-m", "64M", "--kernel", kernel, "--vsock", path.to_str().unwrap()])
    };
    let taken = home.path().with_file_name("taken");
    fs::write(&taken, "something").unwrap();
    for path in [taken.clone(), "/no/such/directory/x.sock".into(), format!("/tmp/{}", "x".repeat(120)).into()] {
        let why = launch(&path).failure(2);
        assert!(why.contains(path.to_str().unwrap()), "{why}");
    }
    assert_eq!(fs::read_to_string(&taken).unwrap(), "something");
    assert!(home.cli(&["launch", "x", "--vsock", "/tmp/x.sock"]).failure(2).contains("--kernel"));
    assert!(home.client().list().unwrap().is_empty());
}

/// A guest that lies on the ring ends its own connection, and nothing else.
#[test]
fn a_guest_that_lies_hurts_that_connection() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    let mut honest = connect(&vm, ECHO).unwrap();
    for round in 0..60 {
        let mut liar = connect(&vm, LIAR).expect("connect to the liar");
        let _ = liar.write_all(&[round; 6]);
        echo(&mut honest, b"honest").unwrap_or_else(|e| panic!("round {round}: {e}"));
    }
    assert_eq!(home.client().list().unwrap()[0].reason, None);
    home.check();
}

/// A VM process that has been taken over tells of connections that nobody asked it for.
#[test]
fn a_process_that_lies_about_connections_is_not_believed() {
    let Some(home) = TestHome::new() else { return };
    let (vm, other) = (launch(&home, "a"), launch(&home, "b"));
    let Some(mut hostile) = Hostile::take_over(&vm) else { return };
    thread::scope(|scope| {
        let waits = scope.spawn(|| other.connect(SILENT, Duration::from_secs(2)).map(|(stream, _)| stream));
        thread::sleep(Duration::from_millis(300));
        let claims = |outcome: fn() -> Outcome| (0..100).map(move |tag| FromVm::Connected { tag, outcome: outcome() });
        hostile.say(&claims(|| Outcome::Accepted).chain(claims(|| Outcome::Refused)).collect::<Vec<_>>()[..128]);
        assert_eq!(kind(waits.join().unwrap()), ErrorKind::TimedOut, "nobody has answered for it");
    });
    // A flood of wishes is answered one by one, and nobody else waits for that.
    let began = Instant::now();
    for port in 0..200 {
        hostile.say(&(0..50).map(|tag| FromVm::Connect { tag, port }).collect::<Vec<_>>());
    }
    echo(&mut connect(&other, ECHO).unwrap(), b"meanwhile").unwrap();
    assert!(began.elapsed() < TEN_SECONDS, "{:?}", began.elapsed());
    home.client().remove(["a"]).unwrap();
    home.check();
}

/// Neither side keeps anything of connections that have ended.
#[test]
fn connections_leave_nothing() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    let server = home.server().expect("it runs");
    let open = || (descriptors(server).len(), descriptors(vm.pid()).len());
    let use_one = || {
        echo(&mut connect(&vm, ECHO).unwrap(), b"once").unwrap();
        assert_eq!(kind(connect(&vm, NOBODY)), ErrorKind::Refused);
    };
    use_one();
    let before = open();
    (0..100).for_each(|_| use_one());
    let deadline = Instant::now() + TEN_SECONDS;
    // The server may have others: a VM process that it prepares, a client's.
    while open().0 > before.0 + 10 || open().1 > before.1 {
        assert!(
            Instant::now() < deadline,
            "descriptors of the server and the VM's process: {before:?}, then {:?}",
            open()
        );
        thread::sleep(Duration::from_millis(20));
    }
    wait_until("the guest has forgotten them", TEN_SECONDS, || counts(&vm)[0] == 0);
}

/// A child's agent hears of the fork without anybody asking it, and before anything else is asked of it.
#[test]
fn an_agent_hears_that_its_vm_was_forked() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    let (first, second) = (AgentHost::of_vm(&home, "a-1"), AgentHost::of_vm(&home, "a-2"));
    let children = vm.fork(ForkOptions::new().count(2).wait_agent(TEN_SECONDS)).unwrap();
    for (child, agent) in children.iter().zip([&first, &second]) {
        let acked = child.figures.acked_us.expect("its agent has heard");
        let inspected = child.vm.inspect().unwrap();
        let notice = inspected.agent.expect("the server knows");
        assert!(notice.reseeded && notice.acked_us == acked && acked >= child.figures.ready_us.unwrap(), "{notice:?}");
        assert_eq!(fs::read_to_string(agent.root("run/offshoot/name")).unwrap().trim(), child.vm.name());
        assert_eq!(
            fs::read_to_string(agent.root("run/offshoot/generation")).unwrap().trim(),
            inspected.generation.to_string()
        );
    }
    assert_ne!(
        fs::read_to_string(first.root("etc/machine-id")).unwrap(),
        fs::read_to_string(second.root("etc/machine-id")).unwrap()
    );
    assert!(vm.inspect().unwrap().agent.is_none(), "it was not forked");

    // One without an agent is not waited for.
    let began = Instant::now();
    let child = vm.fork(ForkOptions::new().wait_agent(Duration::from_secs(60))).unwrap().remove(0);
    assert!(child.figures.acked_us.is_none() && began.elapsed() < TEN_SECONDS, "{:?}", began.elapsed());
    assert!(child.vm.inspect().unwrap().agent.is_none());
    let told = home.cli(&["fork", "a", "--wait-agent"]);
    assert_eq!((told.code, &told.out[..]), (3, "a-4\n"), "it is there: {told:?}");
    assert!(told.err.contains("a-4"), "{told:?}");
    let built_in = home.launch("m", ByteSize::mib(64));
    assert_eq!(kind_of(built_in.fork(ForkOptions::new().wait_agent(TEN_SECONDS)).map(drop)), ErrorKind::Unsupported);
    drop((first, second));
    fs::remove_dir_all(home.path().join("vsock")).unwrap();
}

/// Whoever waited for the agent of a child that ended meanwhile waited until the time was over.
#[test]
fn nobody_waits_for_the_agent_of_a_child_that_has_ended() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    let directory = home.path().join("vsock");
    fs::create_dir_all(&directory).unwrap();
    // It takes the notice, and says nothing.
    let silent = UnixListener::bind(directory.join(format!("a-1_{}", agent::PORT))).unwrap();
    thread::scope(|scope| {
        let began = Instant::now();
        let forks = scope.spawn(|| vm.fork(ForkOptions::new().wait_agent(Duration::from_secs(60))));
        let _heard = accept(&silent);
        home.client().vm("a-1").kill().unwrap();
        let children = forks.join().unwrap().expect("it was forked");
        assert!(children[0].figures.acked_us.is_none() && began.elapsed() < 2 * TEN_SECONDS, "{:?}", began.elapsed());
    });
    fs::remove_dir_all(&directory).unwrap();
}

/// A VM process that has been taken over says what it likes of its own agent, and nothing of others, nor of a VM that was launched.
#[test]
fn a_process_that_lies_about_its_agent_is_not_believed_of_others() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    let Some(mut hostile) = Hostile::take_over(&vm) else { return };
    let trouble = "\u{1b}[2J".repeat(1000);
    hostile.say(&[FromVm::Noticed(Noticed::Acked { reseeded: true, trouble })]);
    assert!(vm.inspect().unwrap().agent.is_none());
    home.check();
}

/// On the whole way, from the command line through server, device and guest to an agent: clones that run programs at once each
/// get what is theirs, and a VM without an agent says so.
#[test]
fn programs_of_two_clones_never_cross() {
    let Some(home) = TestHome::new() else { return };
    let vm = launch(&home, "a");
    let agents = ["a-1", "a-2"].map(|name| AgentHost::of_vm(&home, name));
    vm.fork(ForkOptions::new().count(2).wait_agent(TEN_SECONDS)).unwrap();
    thread::scope(|scope| {
        for name in ["a-1", "a-2"] {
            let home = &home;
            scope.spawn(move || {
                for round in 0..5 {
                    let line = format!("for i in $(seq 100); do echo {name} {round}; done; exit 3");
                    let ended = home.cli(&["exec", name, "sh", "-c", &line]);
                    assert_eq!((ended.code, ended.out), (3, format!("{name} {round}\n").repeat(100)));
                }
            });
        }
    });
    assert!(home.client().vm("a-1").exec(["true"]).unwrap().status.success());
    let began = Instant::now();
    let none = home.cli(&["exec", "a", "true"]).failure(125);
    assert!(none.contains(" a:"), "{none}");
    assert!(began.elapsed() < TEN_SECONDS, "{:?}", began.elapsed());
    drop(agents);
    fs::remove_dir_all(home.path().join("vsock")).unwrap();
}
