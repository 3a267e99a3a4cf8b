//! The agent as process 1 of an initial RAM disk.
//!
//! With a `/init` of the user's in it, the agent leaves process 1 to that, once the modules are loaded that it needs itself,
//! and stays as a process beside it. Otherwise it is the guest's init: it mounts what every program wants, reaps, and powers off
//! when it is asked to.

use crate::{System, power, serve_vsock, sys};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Where the initial RAM disk has what is ours.
const OURS: &str = "/offshoot";
const USERS_INIT: &str = "/init";
/// Mounted in this order: what, where, with which options.
const MOUNTS: [(&str, &str, &str); 6] = [
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", "mode=0755"),
    ("devpts", "/dev/pts", "mode=0620,ptmxmode=0666"),
    ("tmpfs", "/run", "mode=0755"),
    ("tmpfs", "/tmp", "mode=1777"),
];

pub fn run() -> ExitCode {
    let trouble = load_modules();
    if users_init().is_some() {
        return beside_another(&trouble);
    }
    let failed = mount_all();
    say(trouble.iter().chain(&failed));
    if let Err(e) = loopback_up() {
        say(&[format!("loopback: {e}")]);
    }
    let system = System::new(PathBuf::from("/"), None);
    if power::watch(&system) == 0 {
        say(&["no power button: a request to power off is not heard".into()]);
    }
    let served = serve_vsock(&system);
    if let Err(e) = served {
        say(&[format!("vsock: {e}")]);
    }
    // Process 1 must not end: the kernel would panic. A guest that nobody can talk to is of no use.
    let _ = sys::power_off();
    ExitCode::FAILURE
}

/// The user's own init, unless that is this program.
fn users_init() -> Option<&'static Path> {
    let path = Path::new(USERS_INIT);
    let file = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()));
    let theirs = file(path).ok()?;
    let ours = file(&Path::new(OURS).join("agent")).ok();
    (Some(theirs) != ours).then_some(path)
}

/// Starts the agent as a process of its own, and becomes the user's init.
fn beside_another(trouble: &[String]) -> ExitCode {
    say(trouble);
    let proc = Path::new(OURS).join("proc");
    let mounted = fs::create_dir_all(&proc).and_then(|()| sys::mount_at("proc", &format!("{OURS}/proc"), ""));
    let mut agent = Command::new(Path::new(OURS).join("agent"));
    if let Err(e) = mounted.and_then(|()| agent.arg("--follow").arg(&proc).spawn()) {
        say(&[format!("agent: {e}")]);
    }
    // The kernel's own arguments, as that init would have got them.
    let e = Command::new(USERS_INIT).args(std::env::args_os().skip(1)).exec();
    say(&[format!("{USERS_INIT}: {e}")]);
    ExitCode::FAILURE
}

/// Loads the modules that came with the agent, in their order. What went wrong.
fn load_modules() -> Vec<String> {
    const EEXIST: i32 = 17;
    let directory = Path::new(OURS).join("modules");
    let Ok(order) = fs::read_to_string(directory.join("order")) else { return Vec::new() };
    let load = |name: &str| File::open(directory.join(name)).and_then(sys::load_module);
    let failed = |name: &str| match load(name) {
        Err(e) if e.raw_os_error() != Some(EEXIST) => Some(format!("module {name}: {e}")),
        _ => None,
    };
    order.lines().filter_map(failed).collect()
}

fn mount_all() -> Vec<String> {
    let mut failed = Vec::new();
    for (kind, target, options) in MOUNTS {
        let mounted = fs::create_dir_all(target).and_then(|()| sys::mount_at(kind, target, options));
        if let Err(e) = mounted {
            failed.push(format!("{target}: {e}"));
        }
    }
    // What programs take for granted, and devtmpfs does not make.
    for (target, link) in [("/proc/self/fd", "/dev/fd"), ("/proc/self/fd/0", "/dev/stdin")] {
        let _ = symlink(target, link);
    }
    let _ = symlink("/proc/self/fd/1", "/dev/stdout");
    let _ = symlink("/proc/self/fd/2", "/dev/stderr");
    failed
}

/// Where `forward` connects to.
fn loopback_up() -> io::Result<()> {
    sys::interface_up("lo")
}

/// Says lines on the console, for whoever reads why there is no agent.
fn say<'a>(lines: impl IntoIterator<Item = &'a String>) {
    for line in lines {
        eprintln!("offshoot-agent: {line}");
    }
}
