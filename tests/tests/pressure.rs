//! A host that is short of memory counts as a lower budget, where none is set. The host's readings are made up, in a
//! mount table of the server's own; a control group's limit is real.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use offshoot_tests::{Guest, Lack, Served, TEN_SECONDS, TestHome, fork_settled, is_root, skip, wait_until};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use vmm::api::VmState;
use vmm::units::ByteSize;

const OWN: std::ops::Range<u64> = 1000..17_384;

/// Shows `text` in the place of a file of /proc, to this thread and to what it starts. Where, to change it.
fn instead_of(proc: &str, home: &TestHome, text: &str) -> Option<PathBuf> {
    if !is_root() {
        skip(Lack::Root, format!("only root can cover {proc}"));
        return None;
    }
    if !Path::new(proc).exists() {
        skip(Lack::Proc, format!("no {proc}"));
        return None;
    }
    let mine = home.path().with_file_name(proc.replace('/', "-"));
    fs::write(&mine, text).expect("write a file");
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount table of our own");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)
        .expect("make it private");
    match mount(Some(&mine), proc, None::<&str>, MsFlags::MS_BIND, None::<&str>) {
        Ok(()) => Some(mine),
        Err(error) => {
            skip(Lack::Proc, format!("{proc} cannot be covered: {error}"));
            None
        }
    }
}

/// 64 MiB leave memory bit by bit once the reading is bad, and none before.
fn leaves_when(home: &TestHome, make_bad: impl FnOnce(), make_good: impl FnOnce()) {
    let _server = Served::new(home, &[]);
    let vm = home.launch("a", ByteSize::mib(128));
    vm.fill(OWN, 1);
    let child = fork_settled(&vm, 1).remove(0);
    thread::sleep(Duration::from_millis(2500));
    let before = home.totals();
    assert_eq!((before.swap_out_pages, before.budget_bytes), (0, None), "{before:?}");
    make_bad();
    wait_until("memory leaves", TEN_SECONDS, || home.totals().swap_out_pages >= 1000);
    println!("{:?}", home.totals());
    assert!(home.server_log().is_empty() || home.server_log().contains("short of memory"), "{}", home.server_log());
    make_good();
    child.verify(OWN, 1);
    vm.verify(OWN, 1);
    home.check();
}

const PRESSURE: &str = "/proc/pressure/memory";

fn psi(avg10: &str) -> String {
    format!("some avg10={avg10} avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
}

#[test]
fn stalls_for_want_of_memory_take_it_out() {
    let Some(home) = TestHome::new() else { return };
    let Some(file) = instead_of(PRESSURE, &home, &psi("0.00")) else { return };
    let say = |avg10: &str| fs::write(&file, psi(avg10)).expect("write a file");
    leaves_when(&home, || say("42.50"), || say("0.00"));
}

#[test]
fn little_left_of_the_hosts_memory_takes_it_out() {
    let Some(home) = TestHome::new() else { return };
    let meminfo = fs::read_to_string("/proc/meminfo").expect("read /proc/meminfo");
    let Some(file) = instead_of("/proc/meminfo", &home, &meminfo) else { return };
    // What this host's other work suffers is nothing to this test.
    if Path::new(PRESSURE).exists() && instead_of(PRESSURE, &home, &psi("0.00")).is_none() {
        return;
    }
    let lines = meminfo.lines().map(|line| match line.starts_with("MemAvailable:") {
        true => "MemAvailable:      16384 kB".to_owned(),
        false => line.to_owned(),
    });
    let bad = lines.collect::<Vec<_>>().join("\n");
    leaves_when(&home, || fs::write(&file, &bad).expect("write"), || fs::write(&file, &meminfo).expect("write"));
}

/// A control group of its own with a memory limit, removed when this is dropped.
struct Group(PathBuf);

impl Group {
    fn new(limit: u64) -> Option<Self> {
        let name = format!("offshoot-it-{}", std::process::id());
        for (top, file) in [
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/unified", "memory.max"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ] {
            // Where such a directory has no such file, it is no control group, or one without memory.
            let path = Path::new(top).join(&name);
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let group = Self(path);
            let set = |mut file: File| file.write_all(limit.to_string().as_bytes());
            if File::options().write(true).open(group.0.join(file)).and_then(set).is_ok() {
                return Some(group);
            }
        }
        skip(Lack::Cgroups, "no control group whose memory can be limited");
        None
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It is empty when the last process has been reaped.
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() || !self.0.exists() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        eprintln!("{} is left behind", self.0.display());
    }
}

/// A guest writes more than its server's group may have, not faster than once in a while is looked.
#[test]
fn a_control_groups_limit_is_kept() {
    const LIMIT: u64 = 128 << 20;
    // Ends after the server that is in it.
    let Some(group) = Group::new(LIMIT) else { return };
    let Some(home) = TestHome::alone() else { return };
    let _server = Served::new(&home, &["--compressed", "8M"]);
    let vm = home.launch("a", ByteSize::mib(256));
    for pid in home.processes().into_iter().chain(home.server()) {
        fs::write(group.0.join("cgroup.procs"), pid.to_string()).expect("put a process into the group");
    }
    let step = 512;
    for first in (1000..1000 + 192 * 256).step_by(step) {
        vm.fill(first..first + step as u64, 1);
        thread::sleep(Duration::from_millis(60));
    }
    let totals = home.totals();
    println!("{totals:?}");
    assert!(totals.swapped_pages >= (192 << 20 >> 12) - LIMIT / 4096, "{totals:?}");
    vm.verify(1000..1000 + 192 * 256, 1);
    assert_eq!(home.client().list().expect("ls")[0].state, VmState::Running);
    home.check();
    // The stalls of this group are the host's as well: tests that come after this one are to find it at rest.
    let stalls = || {
        let text = fs::read_to_string(PRESSURE).unwrap_or_default();
        let avg10 =
            text.lines().find_map(|line| line.strip_prefix("some avg10=")?.split(' ').next()?.parse::<f64>().ok());
        avg10.unwrap_or(0.0)
    };
    println!("stalls: {} %", stalls());
    wait_until("the host is at rest", Duration::from_secs(40), || stalls() < 3.0);
}
