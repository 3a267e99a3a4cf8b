//! Landlock, where the kernel has it: a second wall behind the filter of system calls and the namespaces, which holds from
//! before the threads are made.
//!
//! | | since | what else forbids it |
//! | --- | --- | --- |
//! | all use of files by their paths | ABI 1 | an empty, read-only root |
//! | TCP: bind and connect | ABI 4 | no sockets; an empty network namespace |
//! | abstract Unix sockets of processes outside | ABI 6 | no sockets; the network namespace |
//! | signals to processes outside | ABI 6 | the filter alone: the PID namespace is the host's |
//!
//! What is open already stays usable, KVM among it; the server, which is in no such domain, reads the process's memory as
//! before; and threads of one process signal to each other.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest that we know of. An older kernel does what it can.
const NEWEST: ABI = ABI::V6;

/// How much of it there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landlocked {
    /// All.
    Whole,
    /// What an older kernel has.
    Partly,
    /// Nothing.
    Not,
}

/// Holds this thread, and what it makes, to nothing of all that: no rule allows any of it.
///
/// # Errors
/// The kernel has it, and refuses.
pub fn enter() -> Result<Landlocked, RulesetError> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?;
    Ok(match ruleset.create()?.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Landlocked::Whole,
        RulesetStatus::PartiallyEnforced => Landlocked::Partly,
        RulesetStatus::NotEnforced => Landlocked::Not,
    })
}

/// How much of it this kernel has, tried in a thread that ends.
pub fn probe() -> Result<Landlocked, String> {
    let tried = std::thread::spawn(enter).join();
    tried.map_err(|_| "the trial thread panicked".to_owned())?.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skips::{Lack, skip};
    use nix::errno::Errno;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    use std::fs::File;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
    use std::process::{Command, Stdio};
    use std::thread;

    /// Each thing that it forbids is tried by a thread that is held to it, and by one that is not.
    #[test]
    fn what_it_forbids_fails() {
        if probe() != Ok(Landlocked::Whole) {
            return skip(Lack::Landlock, format!("this kernel has no Landlock with ABI 6: {:?}", probe()));
        }
        let name = format!("offshoot-landlock-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let _outside = UnixListener::bind_addr(&address).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap();
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let other = Pid::from_raw(child.id() as i32);
        let mut open = tempfile();
        let attempts = move |open: &mut File| {
            let os = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
            [
                File::open("/proc/self/stat").map(drop).map_err(os),
                std::fs::create_dir("/tmp/offshoot-landlock")
                    .and_then(|()| std::fs::remove_dir("/tmp/offshoot-landlock"))
                    .map_err(os),
                TcpListener::bind("127.0.0.1:0").map(drop).map_err(os),
                TcpStream::connect(port).map(drop).map_err(os),
                UnixStream::connect_addr(&address).map(drop).map_err(os),
                kill(other, None).map(drop),
                kill(other, Signal::SIGCONT).map(drop),
                // What stays: open files, and its own process.
                open.write_all(b"x").map_err(os),
                kill(Pid::this(), None).map(drop),
            ]
        };
        assert_eq!(attempts.clone()(&mut open), [Ok(()); 9], "without");
        let held = thread::spawn(move || {
            assert_eq!(enter().unwrap(), Landlocked::Whole);
            attempts(&mut open)
        });
        let (file, far) = (Err(Errno::EACCES), Err(Errno::EPERM));
        assert_eq!(held.join().unwrap(), [file, file, file, file, far, far, far, Ok(()), Ok(())]);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(File::open("/proc/self/stat").is_ok(), "other threads are not held to it");
    }

    /// A file that is open, and has no name.
    fn tempfile() -> File {
        nix::sys::memfd::memfd_create(c"offshoot-landlock", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap().into()
    }
}
