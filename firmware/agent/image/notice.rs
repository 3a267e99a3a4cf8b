//! The notice of a fork: what makes a child somebody else than its parent.

use crate::{System, lock, sys};
use agent::message::{Ack, Forked};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How far the clock may be off before it is set.
const CLOCK_SLACK: Duration = Duration::from_millis(100);
/// How long the hooks may take, all of them.
const HOOKS: Duration = Duration::from_secs(10);

/// Which VM this is, as far as the agent was told.
pub struct Identity {
    current: Mutex<Ack>,
    /// Held while a notice is taken: there may be two who bring it.
    taking: Mutex<()>,
}

impl Identity {
    /// A VM that was launched.
    pub fn launched() -> Self {
        Self { current: Mutex::new(Ack { generation: 0, reseeded: true, trouble: Vec::new() }), taking: Mutex::new(()) }
    }

    pub fn current(&self) -> Ack {
        lock(&self.current).clone()
    }
}

/// Does what a child has to do. A notice that was taken already is answered as it was then.
pub fn take(system: &System, forked: &Forked) -> Ack {
    let _taking = lock(&system.identity.taking);
    let before = system.identity.current();
    if before.generation == forked.generation {
        return before;
    }
    let root = &system.root;
    let mut trouble: Vec<String> = Vec::new();
    let mut heed = |what: &str, done: io::Result<()>| match done {
        Ok(()) => true,
        Err(e) => {
            trouble.push(format!("{what}: {e}"));
            false
        }
    };
    let device = OpenOptions::new().write(true).open(root.join("dev/urandom"));
    let reseeded = heed("/dev/urandom", device.and_then(|device| sys::reseed(device, &forked.entropy)));
    heed("hostname", fs::write(root.join("proc/sys/kernel/hostname"), &forked.name));
    heed("/etc/machine-id", new_machine_id(root));
    let run = root.join("run/offshoot");
    heed("/run/offshoot", tell(&run, forked));
    if system.owns_machine {
        heed("clock", set_clock(forked.wall_ns));
    }
    for (hook, failed) in hooks(system, forked) {
        heed(&hook, Err(failed));
    }
    let ack = Ack { generation: forked.generation, reseeded, trouble: trouble.join("; ").into_bytes() };
    *lock(&system.identity.current) = ack.clone();
    ack
}

/// What programs of the guest look at.
fn tell(run: &Path, forked: &Forked) -> io::Result<()> {
    fs::create_dir_all(run)?;
    let write = |name: &str, text: &[u8]| {
        let (new, path) = (run.join(format!(".{name}")), run.join(name));
        fs::write(&new, [text, b"\n"].concat())?;
        fs::rename(new, path)
    };
    write("name", &forked.name)?;
    write("generation", forked.generation.to_string().as_bytes())
}

/// A system that has a machine id gets another one.
fn new_machine_id(root: &Path) -> io::Result<()> {
    let path = root.join("etc/machine-id");
    if !path.exists() {
        return Ok(());
    }
    let mut random = [0; 16];
    File::open(root.join("dev/urandom"))?.read_exact(&mut random)?;
    // A random UUID, as systemd makes them.
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    let mut text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    text.push('\n');
    // Who looks sees the old one or the new one. It may be mounted by itself, and then can only be written.
    let new = root.join("etc/.machine-id.offshoot");
    let replaced = fs::write(&new, &text)
        .and_then(|()| fs::set_permissions(&new, Permissions::from_mode(0o444)))
        .and_then(|()| fs::rename(&new, &path));
    replaced.or_else(|_| {
        let _ = fs::remove_file(&new);
        OpenOptions::new().write(true).truncate(true).open(&path)?.write_all(text.as_bytes())
    })
}

fn set_clock(wall_ns: u64) -> io::Result<()> {
    let told = Duration::from_nanos(wall_ns);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if told.abs_diff(now) > CLOCK_SLACK { sys::set_clock(wall_ns) } else { Ok(()) }
}

/// Runs the programs in `/etc/offshoot/fork.d`, in the order of their names. Those that failed.
fn hooks(system: &System, forked: &Forked) -> Vec<(String, io::Error)> {
    let directory = system.root.join("etc/offshoot/fork.d");
    let Ok(entries) = fs::read_dir(&directory) else { return Vec::new() };
    let mut programs: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    programs.sort();
    let deadline = std::time::Instant::now() + HOOKS;
    let mut failed = Vec::new();
    for program in programs {
        let mut command = Command::new(&program);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.env("OFFSHOOT_NAME", OsStr::from_bytes(&forked.name));
        command.env("OFFSHOOT_GENERATION", forked.generation.to_string());
        sys::detach(&mut command, false, None);
        let (ended, end) = mpsc::channel();
        let then = Box::new(move |how| {
            // Nobody waits for a hook whose time was over.
            let _ = ended.send(how);
        });
        let done = system.sessions.children().spawn(&mut command, |pid| (pid, then)).and_then(|pid| {
            match end.recv_timeout(deadline.saturating_duration_since(std::time::Instant::now())) {
                Ok(sys::Ended::Code(0)) => Ok(()),
                Ok(other) => Err(io::Error::other(format!("{other:?}"))),
                Err(_) => {
                    let _ = sys::signal_group(pid, 9);
                    Err(io::ErrorKind::TimedOut.into())
                }
            }
        });
        if let Err(e) = done {
            failed.push((program.display().to_string(), e));
        }
    }
    failed
}
