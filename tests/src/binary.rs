//! The `offshoot` binary under test.

use nix::fcntl::{Flock, FlockArg};
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

/// `OFFSHOOT_BIN`, else the one that cargo puts near this test, which is built first where it is missing or older than
/// its source.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match env::var_os("OFFSHOOT_BIN").filter(|path| !path.is_empty()) {
        Some(path) => path.into(),
        None => built(),
    })
}

/// Where cargo puts binaries of this test's profile: above `deps`, where the test is.
pub(crate) fn profile_directory() -> PathBuf {
    let this = env::current_exe().expect("this program has a path");
    this.ancestors().nth(2).expect("cargo puts tests two directories deep").to_owned()
}

fn built() -> PathBuf {
    let directory = profile_directory();
    let binary = directory.join("offshoot");
    let lock = File::create(directory.join("offshoot-tests.build")).expect("make a lock file in cargo's directory");
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).expect("lock a file");
    if modified(&binary).is_none_or(|built| newest_source() > built) {
        build(&directory);
    }
    binary
}

fn build(directory: &Path) {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args(["build", "--quiet", "--package", "vmm", "--bin", "offshoot", "--target-dir"]);
    cargo.arg(directory.parent().expect("cargo has a directory for each profile"));
    if directory.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo.current_dir(workspace()).status().expect("run cargo");
    assert!(status.success(), "build the offshoot binary: {status}");
    // Cargo may find that nothing has changed. Then that is so for the next test as well.
    let touched = File::options().append(true).open(directory.join("offshoot"));
    let _ = touched.and_then(|file| file.set_modified(SystemTime::now()));
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is in a workspace")
}

fn newest_source() -> SystemTime {
    let crates = ["vmm/src", "guest-mem/src", "firmware"].map(|path| workspace().join(path));
    crates.iter().map(|path| newest_below(path)).max().expect("there are crates")
}

fn newest_below(path: &Path) -> SystemTime {
    let own = modified(path).unwrap_or(SystemTime::UNIX_EPOCH);
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| newest_below(&entry.path())).fold(own, SystemTime::max)
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()
}
