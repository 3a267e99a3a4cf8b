//! The agent: a program in a Linux guest that does what clients on the host ask for.
//!
//! As process 1 of an initial RAM disk it brings the guest up first ([`init`]). Otherwise it is a service of whatever system
//! there is:
//!
//! ```text
//! offshoot-agent [--listen PATH] [--root DIR] [--follow DIR]
//! ```
//!
//! It listens on a vsock port, or on a Unix socket, which is how its own tests reach it. With `--root` the system that it
//! changes at a fork lies below that directory, and the clock is not its own. With `--follow`, which names a `/proc`, its root
//! is that of process 1, also when that goes over from an initial RAM disk to another root.

mod children;
mod connection;
mod dial;
mod init;
mod notice;
mod power;
mod program;
mod session;
mod sys;
mod users;

use notice::Identity;
use session::Sessions;
use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// What the agent knows and has.
struct System {
    /// Where the system lies that it serves.
    root: PathBuf,
    /// Whether the clock is its own.
    owns_machine: bool,
    identity: Identity,
    sessions: Arc<Sessions>,
    /// The `/proc` that tells where the root of process 1 is, where that may change.
    follow: Option<File>,
}

impl System {
    fn new(root: PathBuf, follow: Option<File>) -> Arc<Self> {
        let sessions = Arc::<Sessions>::default();
        sessions.reap();
        let owns_machine = root == Path::new("/");
        Arc::new(Self { root, owns_machine, identity: Identity::launched(), sessions, follow })
    }
}

/// What a mutex guards is whole after every statement of ours, so a panic elsewhere changes nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    words.next();
    if std::process::id() == 1 {
        return init::run();
    }
    let (mut root, mut listen, mut follow) = (PathBuf::from("/"), None, None);
    while let Some(word) = words.next() {
        match (word.to_str(), words.next()) {
            (Some("--root"), Some(directory)) => root = directory.into(),
            (Some("--listen"), Some(path)) => listen = Some(PathBuf::from(path)),
            (Some("--follow"), Some(proc)) => follow = File::open(proc).ok(),
            _ => {
                eprintln!("usage: offshoot-agent [--listen PATH] [--root DIR] [--follow DIR]");
                return ExitCode::from(2);
            }
        }
    }
    let system = System::new(root, follow);
    let served = match listen {
        Some(path) => serve_unix(&system, &path),
        None => serve_vsock(&system),
    };
    if let Err(e) = served {
        eprintln!("offshoot-agent: {e}");
    }
    ExitCode::FAILURE
}

fn serve_unix(system: &Arc<System>, path: &Path) -> io::Result<()> {
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    for connection in listener.incoming() {
        let connection = session::file(connection?);
        begin(system, move |system| connection::serve(system, connection));
    }
    Ok(())
}

fn serve_vsock(system: &Arc<System>) -> io::Result<()> {
    let listener = sys::vsock_listen(agent::PORT)?;
    eprintln!("offshoot-agent: listens on vsock port {}", agent::PORT);
    loop {
        match sys::vsock_accept(&listener) {
            // Programs of the guest are not who this is for.
            Ok((connection, sys::CID_HOST)) => {
                let connection = session::file(connection);
                begin(system, move |system| connection::serve(system, connection));
            }
            Ok(_) => {}
            // Out of descriptors, or a client that left at once.
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Does something in a thread of its own. Where there can be no more threads it is not done, and its connection ends.
fn begin(system: &Arc<System>, work: impl FnOnce(&Arc<System>) + Send + 'static) {
    if let Some(proc) = &system.follow {
        // A process 1 that cannot be looked at has no other root.
        let _ = sys::enter_root_of_init(proc);
    }
    let system = Arc::clone(system);
    let _ = thread::Builder::new().spawn(move || work(&system));
}
