//! Who else is on the host: users to whom a server says nothing, and more clients than it can hear.

use nix::errno::Errno;
use nix::sys::stat::{Mode, umask};
use offshoot_tests::process::{descriptors, run_ticks};
use offshoot_tests::{Guest, Lack, TEN_SECONDS, TestHome, is_root, skip, wait_until};
use serde_json::Value;
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::Duration;
use vmm::units::ByteSize;

/// A thread of this test that is another user.
fn as_user<T: Send>(id: u32, act: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            #[allow(unsafe_code)]
            // SAFETY: The call takes plain numbers. Made like this, it is about the calling thread alone, which ends here.
            let changed = Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) });
            changed.expect("become another user");
            act()
        });
        other.join().expect("a thread")
    })
}

/// The socket's mode was whatever the mask left, and nobody asked who was there: with a mask of 0, every user drove a server
/// of root's.
#[test]
fn a_server_is_its_users_alone() {
    let Some(home) = TestHome::new() else { return };
    umask(Mode::empty());
    home.launch("a", ByteSize::mib(32));
    let socket = home.path().join("socket");
    for (file, most) in
        [("socket", 0o600), ("vms", 0o600), ("cage", 0o700), ("server.log", 0o600), ("lock", 0o600), ("", 0o700)]
    {
        let mode = fs::metadata(home.path().join(file)).expect(file).mode() & 0o777;
        assert_eq!(mode & !most, 0, "{file:?}: {mode:o}");
    }
    if !is_root() {
        return skip(Lack::Root, "only root can become another user");
    }
    // Be it that somebody opens all doors.
    let parent = home.path().parent().expect("a home is in a directory").to_owned();
    for (path, mode) in [(&parent, 0o755), (&home.path(), 0o755), (&socket, 0o777)] {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("change a mode");
    }
    let heard = as_user(12345, || {
        let mut stream = UnixStream::connect(&socket).expect("connect");
        stream.set_read_timeout(Some(TEN_SECONDS)).expect("set a timeout");
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).map(|_| heard)
    });
    assert!(heard.as_ref().is_ok_and(Vec::is_empty), "{heard:?}");
    wait_until("it is told", TEN_SECONDS, || home.server_log().contains("somebody else's connection is refused"));
    home.cli(&["ls"]).good();
}

/// With no descriptor left for a client that waits, the server was told of it in every round: it took a processor, and
/// filled the disk with complaints. So it did when it had none for the pool.
#[test]
fn a_server_without_descriptors_rests() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("a", ByteSize::mib(32));
    let server = home.server().expect("it runs");
    let limit = |most: usize| {
        let limited =
            Command::new("prlimit").args(["--pid", &server.to_string(), &format!("--nofile={most}:")]).status();
        limited.is_ok_and(|status| status.success())
    };
    let before = descriptors(server).len();
    if !limit(before + 3) {
        return skip(Lack::Proc, "no prlimit");
    }
    let socket = home.path().join("socket");
    let mut clients: Vec<UnixStream> = (0..10).map(|_| UnixStream::connect(&socket).expect("connect")).collect();
    wait_until("it has no descriptors left", TEN_SECONDS, || home.server_log().contains("too many connections"));
    // Who is too many is told so, and does not wait in vain.
    let mut refusal = home.cli(&["ls", "--json"]);
    // What was being prepared for the pool may have given descriptors back meanwhile: others take them.
    wait_until("a client is too many", TEN_SECONDS, || {
        clients.push(UnixStream::connect(&socket).expect("connect"));
        refusal = home.cli(&["ls", "--json"]);
        refusal.code != 0
    });
    let error: Value = serde_json::from_str(&refusal.err).expect("an object");
    assert_eq!((refusal.code, &error["error"]["kind"]), (2, &Value::from("limit")), "{refusal:?}");
    // What the pool had may be used up: it cannot be filled.
    let pool = home.processes().into_iter().find(|&pid| pid != vm.pid());
    pool.into_iter().for_each(offshoot_tests::process::kill);
    let (ticks, log) = (run_ticks(server), home.server_log().len());
    thread::sleep(Duration::from_secs(3));
    let (ticks, log) = (run_ticks(server) - ticks, home.server_log().len() - log);
    assert!(ticks < 50, "it has run for {ticks} hundredths of three seconds");
    assert!(log < 8 << 10, "it has written {log} bytes into its log");
    vm.fill(100..200, 1);
    drop(clients);
    assert!(limit(1024));
    home.cli(&["ls"]).good();
    vm.verify(100..200, 1);
}

/// Another user made the file for swap first, and kept it open: what guests had in memory was written where that user could
/// read it.
#[test]
fn a_swap_file_that_somebody_else_may_have_open_is_refused() {
    let Some(home) = TestHome::new() else { return };
    let directory = home.path().parent().expect("a home is in a directory").to_owned();
    let path = |name: &str| directory.join(name);
    fs::write(path("own"), [7; 10]).expect("write a file");
    symlink(path("own"), path("link")).expect("make a link");
    fs::write(path("twice"), [7; 10]).expect("write a file");
    fs::hard_link(path("twice"), path("second")).expect("make a name");
    let mut refused = vec!["link", "twice", "second"];
    if is_root() {
        fs::write(path("theirs"), [7; 10]).expect("write a file");
        chown(path("theirs"), Some(12345), None).expect("give a file away");
        refused.push("theirs");
    } else {
        skip(Lack::Root, "only root can give a file away");
    }
    for name in refused {
        let place = format!("{}:16M", path(name).display());
        let said = home.cli(&["serve", "--swap", &place, "--force"]).failure(2);
        assert!(said.starts_with("offshoot: serve: "), "{name}: {said}");
        assert_eq!(fs::read(path(name)).expect("read a file"), [7; 10], "{name} stays as it was");
    }
    fs::remove_file(home.path().join("lock")).expect("nothing else is left");
}
