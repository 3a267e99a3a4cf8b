//! What makes no sense is refused: exit code 2, one line on stderr, nothing changed, nothing left behind.

use offshoot_tests::process::kill;
use offshoot_tests::{Guest, Lack, Setup, TEN_SECONDS, TestHome, User, skip};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use vmm::units::ByteSize;

/// Refused whether there are VMs or not.
const NEVER: &[&[&str]] = &[
    &["launch", "x", "--mem", "0"],
    &["launch", "x", "--mem", "3"],
    &["launch", "x", "--mem", "15M"],
    &["launch", "x", "--mem", "17825793"],
    &["launch", "x", "--mem", "1E"],
    &["launch", "x", "--mem", "-1"],
    &["launch", "x", "--mem", "64Mi"],
    &["launch", "x", "--mem", "16777216T"],
    // More than any host has, in numbers that mean something.
    &["launch", "x", "--mem", "100T"],
    &["launch", "a/b"],
    &["launch", ".."],
    &["launch", ""],
    &["launch", "a b"],
    &["launch", "--", "--all"],
    &["launch", "--", "-x"],
    &["launch", ".hidden"],
    &["launch", "x", "--memory", "1.5"],
    &["launch", "x", "--memory", "1GB"],
    &["launch", "x", "--vcpus", "0"],
    &["launch", "x", "--vcpus", "2"],
    &["launch", "x", "--kernel", "/etc/passwd"],
    &["launch", "x", "--kernel", "/no/such/file"],
    &["launch", "x", "--kernel", "/"],
    &["launch", "x", "--initrd", "/etc/passwd"],
    &["fork", "nobody"],
    &["fork", "nobody", "--count", "0"],
    &["fork", "nobody", "child", "--count", "2"],
    &["fork", "nobody", "--", "-child"],
    &["send", "nobody", "id", "--expect", ""],
    &["kill", "nobody"],
    &["tree", "nobody"],
    &["logs", "nobody", "--tail", "-1"],
    &["reclaim", "nobody", "4M"],
    &["reclaim", "--all", "0"],
    &["serve", "--compressed", "1"],
    &["serve", "--memory", "1"],
    &["completions", "tcl"],
    &["man", "fly"],
    &["stats", "--watch=0"],
    &["send", "nobody", "id"],
    &["send", "nobody", "id", "--timeout", "0"],
    &["console", "nobody"],
    &["logs", "nobody"],
    &["stats", "nobody"],
    &["inspect", "nobody"],
    &["pause", "nobody"],
    &["resume", "nobody"],
    &["stop", "nobody"],
    &["wait", "nobody"],
    &["rm", "nobody"],
    &["rm"],
    &["rm", "--all", "nobody"],
    &["exec"],
    &["exec", "a"],
    &["exec", "--timeout", "0", "a", "true"],
    &["exec", "-e", "=x", "a", "true"],
    &["exec", "-it", "a", "true"],
    &["attach", "a", "one"],
    &["ps", "nobody"],
    &["kill", "nobody", "1"],
    &["kill", "nobody", "1", "NOSUCH"],
    &["kill", "nobody", "1", "2", "3"],
    &["cp", "/etc/hosts", "/tmp/x"],
    &["cp", "nobody:/a", "nobody:/b"],
    &["cp", "nobody:/a", "/tmp/x"],
    &["cp", "nobody:", "/tmp/x"],
    &["forward", "nobody", "0:80"],
    &["forward", "nobody", "80"],
    &["forward", "nobody", "0:0"],
    &["fly"],
    &["ls", "--fly"],
    &[],
];

/// Refused beside the VMs `a`, which runs, `off` and `dead`.
const HERE: &[&[&str]] = &[
    &["launch", "a"],
    &["launch", "off"],
    &["launch", "dead"],
    &["fork", "off"],
    &["fork", "dead"],
    &["fork", "a", "--count", "0"],
    &["fork", "a", "--count", "1001"],
    &["fork", "a", "--count", "99999999999"],
    &["fork", "a", "--name", "x/y"],
    &["send", "off", "id"],
    &["send", "dead", "id"],
    &["send", "a", "id\nid"],
    &["console", "dead"],
    &["pause", "off"],
    &["resume", "dead"],
    &["stop", "off"],
    &["kill", "off"],
    &["kill", "dead"],
    &["fork", "a", "off"],
    &["fork", "a", "b", "b"],
    &["fork", "a", "b", "a"],
    &["reclaim", "a", "0"],
    &["reclaim", "a", "4095"],
];

fn listed(home: &TestHome) -> Value {
    home.cli(&["ls", "--json"]).json()
}

/// The first command of a home, where it is refused, leaves no server.
#[test]
fn a_refused_first_command_leaves_no_server() {
    let Some(home) = TestHome::new() else { return };
    let long = "x".repeat(65);
    let too_long: &[&str] = &["launch", &long];
    for arguments in NEVER.iter().chain([&too_long]) {
        let line = home.cli(arguments).failure(2);
        assert!(line.len() < 400, "{line}");
        assert_eq!(home.server(), None, "after {arguments:?}");
    }
}

/// The same, and more, among VMs: the list stays as it is, to the letter.
#[test]
fn a_refused_command_changes_nothing() {
    let Some(home) = TestHome::new() else { return };
    for name in ["a", "off", "dead"] {
        home.launch(name, ByteSize::mib(16));
    }
    home.client().vm("off").stop().unwrap();
    kill(home.client().vm("dead").pid());
    for name in ["off", "dead"] {
        home.client().vm(name).wait(Some(TEN_SECONDS)).unwrap();
    }
    let before = listed(&home);
    assert_eq!(before.as_array().map(Vec::len), Some(3));
    let long = "x".repeat(65);
    let too_long: [&[&str]; 2] = [&["launch", &long], &["fork", "a", "--name", &long]];
    for arguments in NEVER.iter().chain(HERE).chain(&too_long) {
        home.cli(arguments).failure(2);
        assert_eq!(listed(&home), before, "after {arguments:?}");
    }
    home.cli(&["send", "a", "id"]).good();
}

/// A little more memory than the host has to give.
#[test]
fn more_memory_than_there_is() {
    let Some(home) = TestHome::new() else { return };
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    let kib: u64 = available.trim().trim_end_matches(" kB").parse().unwrap();
    let line = home.cli(&["launch", "x", "--mem", &format!("{}K", (kib + (1 << 20)) & !3)]).failure(2);
    assert!(line.contains("memory") && line.contains("GiB"), "{line}");
    assert_eq!(home.server(), None);
}

/// No /dev/kvm.
#[test]
fn a_host_without_kvm() {
    let Some(home) = (Setup { user: User::WithoutDevices, ..Setup::default() }).home() else { return };
    let line = home.cli(&["launch", "x"]).failure(2);
    assert!(line.contains("/dev/kvm"), "{line}");
    assert_eq!(home.server(), None);
    let doctor = home.cli(&["doctor"]);
    assert_eq!((doctor.code, doctor.err.as_str()), (1, ""), "{doctor:?}");
    assert!(doctor.out.contains("VMs cannot run on this host."), "{doctor:?}");
}

/// A control group of 64 MiB below this process's own; none where that cannot be made.
fn small_group() -> Option<Group> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let v1 = mounts.lines().map(fields).find(|mount| mount.last().is_some_and(|o| o.split(',').any(|o| o == "memory")));
    let v2 = mounts.lines().map(fields).find(|mount| mount.iter().any(|field| field == "cgroup2"));
    let (mount, group, limit) = match (v1, v2) {
        (Some(mount), _) => {
            (mount, own.lines().find_map(|line| line.split_once(":memory:"))?.1, "memory.limit_in_bytes")
        }
        (None, Some(mount)) => (mount, own.lines().find_map(|line| line.strip_prefix("0::"))?, "memory.max"),
        (None, None) => return None,
    };
    let group = Path::new(&mount[4]).join(group.trim_start_matches('/'));
    let made = Group(group.join(format!("offshoot-it-{}", std::process::id())));
    fs::create_dir(&made.0).ok()?;
    fs::write(made.0.join(limit), "67108864").ok().map(|()| made)
}

struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// More memory than this process's control group may have.
#[test]
fn more_memory_than_the_control_group_allows() {
    let Some(home) = TestHome::new() else { return };
    let Some(group) = small_group() else {
        return skip(Lack::Cgroups, "no control group that bounds memory can be made here");
    };
    let launch = |memory: &str| {
        let command = home.command(&["launch", "x", "--mem", memory]);
        let mut inside = Command::new("sh");
        inside.args(["-ec", "echo $$ > \"$0\"; exec \"$@\""]).arg(group.0.join("cgroup.procs"));
        inside.arg(command.get_program()).args(command.get_args()).output().unwrap()
    };
    let output = launch("128M");
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{line}");
    assert!(line.contains("128M of memory is more than"), "{line}");
    assert_eq!(home.server(), None);
}
