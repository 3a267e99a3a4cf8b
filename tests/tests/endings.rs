//! An end is not a crash: signals end a server in order, what is deleted in its home is made again, and no server is said to
//! be gone that is not.

use nix::sys::signal::{Signal, kill as send_signal};
use nix::unistd::Pid;
use offshoot_tests::process::{children_of, is_alive, kill};
use offshoot_tests::{Guest, Lack, TEN_SECONDS, TestHome, is_root, offshoot_binary, skip, wait_until};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use vmm::units::ByteSize;

/// A server in the foreground that a test ends by itself.
struct Foreground(Child);

impl Foreground {
    /// Starts one by way of `wrapper`, and waits until it says that it listens.
    fn start(home: &TestHome, wrapper: &[&str]) -> Self {
        let mut words = wrapper.iter().map(ToString::to_string).chain([offshoot_binary().display().to_string()]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg("--home").arg(home.path()).arg("serve");
        // The tests' own process group is not to get what it gets.
        let mut server = command.stdout(Stdio::piped()).process_group(0).spawn().expect("start a server");
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).expect("read what it says");
        assert_eq!(line, format!("Listening on {}/socket\n", home.path().display()));
        Self(server)
    }

    fn signal(&self, signal: Signal) {
        send_signal(Pid::from_raw(self.0.id() as i32), signal).expect("send a signal");
    }

    /// It ends, and well.
    #[track_caller]
    fn ends(mut self) {
        wait_until("it ends", TEN_SECONDS, || self.0.try_wait().expect("wait").is_some());
        assert!(self.0.wait().expect("wait").success());
    }
}

/// A client that waits for the end of `a`.
fn waiting(home: &TestHome) -> BufReader<UnixStream> {
    let mut stream = BufReader::new(UnixStream::connect(home.path().join("socket")).expect("connect"));
    stream.read_line(&mut String::new()).expect("be greeted");
    stream.get_mut().write_all(b"{\"verb\":\"wait\",\"name\":\"a\",\"timeout_ms\":null}\n").expect("ask");
    // Who asks later is answered later.
    home.client().list().expect("ls");
    stream
}

/// What a client hears until the server hangs up.
fn told(mut client: BufReader<UnixStream>) -> String {
    let mut said = String::new();
    client.read_to_string(&mut said).expect("listen");
    said
}

/// Signals ended servers as a crash does: VMs were lost, what guests had in memory stayed on the disk, and the next command
/// told of an accident.
#[test]
fn signals_end_a_server_in_order() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let Some(home) = TestHome::new() else { return };
        let server = Foreground::start(&home, &[]);
        let vm = home.launch("a", ByteSize::mib(32));
        vm.fill(1000..3000, 1);
        home.cli(&["fork", "a", "--count", "2"]).good();
        let waiting = waiting(&home);
        let processes = home.processes();
        server.signal(signal);
        server.ends();
        wait_until("its VMs end with it", TEN_SECONDS, || !processes.iter().any(|&pid| is_alive(pid)));
        let told = told(waiting);
        assert!(told.contains("\"reason\":\"removed\""), "{signal}: {told}");
        assert_eq!(home.files(), ["lock"], "{signal}");
        let next = home.cli(&["ls"]);
        assert!(next.code == 0 && !next.err.contains("died"), "{next:?}");
        fs::remove_file(home.path().join("lock")).unwrap();
    }
}

/// The whole process group of a terminal gets its Ctrl-C: VM processes leave it to the server.
#[test]
fn a_key_of_the_terminal_ends_all_in_order() {
    let Some(home) = TestHome::new() else { return };
    let server = Foreground::start(&home, &[]);
    home.launch("a", ByteSize::mib(16));
    let waiting = waiting(&home);
    send_signal(Pid::from_raw(-(server.0.id() as i32)), Signal::SIGINT).expect("send a signal");
    server.ends();
    let told = told(waiting);
    assert!(told.contains("\"reason\":\"removed\""), "a VM process ended by itself: {told}");
    fs::remove_file(home.path().join("lock")).unwrap();
}

/// `nohup` is taken at its word.
#[test]
fn a_signal_that_is_ignored_ends_nothing() {
    let Some(home) = TestHome::new() else { return };
    let server = Foreground::start(&home, &["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]);
    server.signal(Signal::SIGHUP);
    home.launch("a", ByteSize::mib(16)).say("id");
    server.signal(Signal::SIGTERM);
    server.ends();
    fs::remove_file(home.path().join("lock")).unwrap();
}

/// Process 1 of a container gets no signal that it has made no arrangement for.
#[test]
fn process_1_ends_in_order() {
    let Some(home) = TestHome::new() else { return };
    if !is_root() {
        return skip(Lack::Root, "only root can make a process 1");
    }
    let server = Foreground::start(&home, &["unshare", "--pid", "--fork", "--mount-proc"]);
    home.cli(&["launch", "a", "-m", "16M"]).good();
    let init = children_of(server.0.id() as i32)[0];
    send_signal(Pid::from_raw(init), Signal::SIGTERM).expect("send a signal");
    server.ends();
    assert_eq!(home.files(), ["lock"]);
    fs::remove_file(home.path().join("lock")).unwrap();
}

/// With nothing to wait for it waited for ever.
#[test]
fn a_server_without_vms_ends_too() {
    let Some(home) = TestHome::new() else { return };
    let server = Foreground::start(&home, &[]);
    server.signal(Signal::SIGTERM);
    server.ends();
    fs::remove_file(home.path().join("lock")).unwrap();
}

#[test]
fn who_started_it_is_told_when_it_is_ready_and_when_it_ends() {
    let Some(home) = TestHome::new() else { return };
    let path = home.path().with_file_name("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(TEN_SECONDS)).unwrap();
    let told = || {
        let mut text = [0; 4096];
        let count = socket.recv(&mut text).expect("it is told");
        String::from_utf8_lossy(&text[..count]).into_owned()
    };
    let server = Foreground::start(&home, &["env", &format!("NOTIFY_SOCKET={}", path.display())]);
    assert!(told().starts_with("READY=1\n"));
    home.cli(&["shutdown"]).good();
    assert_eq!(told(), "STOPPING=1");
    server.ends();
    fs::remove_file(home.path().join("lock")).unwrap();
}

/// What cleans temporary directories took the lock, and there were two servers; or the socket, and one that lived was said
/// to have been shut down.
#[test]
fn what_is_deleted_in_a_home_is_made_again() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("a", ByteSize::mib(16));
    let server = home.server().unwrap();
    for file in ["lock", "socket", "vms", "cage"] {
        let path = home.path().join(file);
        let deleted = if path.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) };
        deleted.expect(file);
        wait_until(file, TEN_SECONDS, || path.exists());
        assert_eq!(home.server(), Some(server), "after {file}");
        let second = home.cli(&["serve"]).failure(2);
        assert!(second.contains("already running") && second.contains(&server.to_string()), "{second}");
        vm.say("id");
        home.cli(&["launch", file, "-m", "32M"]).good();
    }
    for file in ["socket", "vms"] {
        fs::remove_file(home.path().join(file)).unwrap();
    }
    wait_until("they are back", TEN_SECONDS, || home.path().join("socket").exists());
    home.cli(&["shutdown"]).good();
    wait_until("it ends", TEN_SECONDS, || !is_alive(server));
}

/// A server whose home is gone cannot be found by anybody.
#[test]
fn a_server_ends_with_its_home() {
    for moved in [false, true] {
        let Some(home) = TestHome::new() else { return };
        home.launch("a", ByteSize::mib(16));
        let server = home.server().unwrap();
        let processes = children_of(server);
        if moved {
            fs::rename(home.path(), home.path().with_file_name("elsewhere")).unwrap();
        } else {
            fs::remove_dir_all(home.path()).unwrap();
        }
        wait_until("it ends", TEN_SECONDS, || !is_alive(server));
        wait_until("its VMs end with it", TEN_SECONDS, || !processes.iter().any(|&pid| is_alive(pid)));
        // A new one starts as if there had been none.
        home.cli(&["launch", "b", "-m", "16M"]).good();
        assert_eq!(home.cli(&["ls", "-q"]).good(), "b\n");
    }
}

/// What guests had in memory stayed in the home when the server was killed.
#[test]
fn swap_has_no_name_that_outlives_its_server() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("a", ByteSize::mib(64));
    vm.fill(1000..9000, 1);
    home.client().reclaim_all(ByteSize::mib(32)).expect("reclaim");
    assert!(!home.path().join("swap").exists());
    vm.verify(1000..9000, 1);
    kill(home.server().unwrap());
    wait_until("it ends", TEN_SECONDS, || home.server().is_none());
    assert!(!home.path().join("swap").exists());
    assert_eq!(home.cli(&["budget", "none"]).code, 0);
}

/// A file with something in it was emptied without a question.
#[test]
fn a_swap_file_with_contents_is_refused() {
    let Some(home) = TestHome::new() else { return };
    let path = home.path().with_file_name("thesis");
    let place = format!("{}:16M", path.display());
    fs::write(&path, "of years").unwrap();
    let refusal = home.cli(&["serve", "--swap", &place]).failure(2);
    assert!(refusal.contains(path.to_str().unwrap()) && refusal.contains("--force"), "{refusal}");
    assert_eq!(fs::read(&path).unwrap(), b"of years");
    fs::remove_dir_all(home.path()).unwrap();
    for option in [&["--force"][..], &[]] {
        // The second time it is what a server left that was killed.
        let server = offshoot_tests::Served::new(&home, &[&["--swap", place.as_str()], option].concat());
        let pid = home.server().unwrap();
        kill(pid);
        wait_until("it ends", TEN_SECONDS, || home.server().is_none());
        drop(server);
        fs::remove_dir_all(home.path()).unwrap();
    }
}

/// "Left no word in server.log."
#[test]
fn why_a_server_cannot_start_is_told() {
    let Some(home) = TestHome::new() else { return };
    let launch = |wrapper: &[&str]| {
        let command = home.command(&["launch", "a", "-m", "16M"]);
        let mut wrapped = Command::new(wrapper[0]);
        wrapped.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args());
        wrapped.env("OFFSHOOT_HOME", "").output().unwrap()
    };
    let output = launch(&["prlimit", "--nofile=100:100"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
    assert!(told.contains("at most 100 open files"), "{told}");
    let _ = fs::remove_dir_all(home.path());
    if !is_root() {
        return skip(Lack::Root, "only root can mount a full disk");
    }
    fs::create_dir(home.path()).unwrap();
    let script =
        "mount -t tmpfs -o size=4k,mode=700 none \"$0\"; cat /dev/zero >\"$0/full\" 2>/dev/null || true; exec \"$@\"";
    let output = launch(&["unshare", "--mount", "sh", "-ec", script, home.path().to_str().unwrap()]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
    assert!(told.contains(home.path().to_str().unwrap()) && told.contains("No space left"), "{told}");
    let _ = fs::remove_dir_all(home.path());
}

/// Three hundred idle connections took all descriptors there were: commands hung, and nothing was said.
#[test]
fn clients_that_are_too_many_are_told() {
    let Some(home) = TestHome::new() else { return };
    let server = Foreground::start(&home, &["prlimit", "--nofile=256:256"]);
    let vm = home.launch("a", ByteSize::mib(16));
    let idle: Vec<UnixStream> =
        (0..100).map(|_| UnixStream::connect(home.path().join("socket")).expect("connect")).collect();
    let refusal = home.cli(&["ls", "--json"]);
    let error: Value = serde_json::from_str(&refusal.err).expect("an object");
    assert_eq!((refusal.code, &error["error"]["kind"]), (2, &Value::from("limit")), "{refusal:?}");
    // Who was there before is served, and VMs have what they need.
    assert_eq!(vm.fork(vmm::client::ForkOptions::new().count(3)).expect("fork").len(), 3);
    let last = idle.last().unwrap();
    last.set_read_timeout(Some(TEN_SECONDS)).unwrap();
    let mut said = String::new();
    (&mut &*last).read_to_string(&mut said).expect("it is told, and the server hangs up");
    assert!(said.starts_with("{\"error\":{\"kind\":\"limit\""), "{said}");
    drop(idle);
    wait_until("they are served again", TEN_SECONDS, || home.cli(&["ls"]).code == 0);
    server.signal(Signal::SIGTERM);
    server.ends();
    fs::remove_file(home.path().join("lock")).unwrap();
}
