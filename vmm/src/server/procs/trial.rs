//! A trial: a VM process is made as a server here would make it, looked at, and ended. Here somebody waits.

use super::process::link_to;
use super::zygote::{Birth, Jail, Still, Zygote};
use crate::api::{Confinement, MIN_MEMORY};
use crate::confinement;
use crate::host;
use crate::server::ids::ProcessId;
use crate::server::watch::Token;
use crate::wire::{Bounds, FromVm, Machine, MachineShape, Said, Strictness, ToVm};
use guest_mem::PageCount;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, mkdtemp};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{env, fs, io};

/// How long it waits for each step. Without trouble it takes some milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes a VM process as a server here would, and ends it. What keeps it apart, read back; none where this host's KVM makes no
/// VM, so that it never comes to that.
///
/// # Errors
/// Why it is not kept apart.
pub fn try_jail() -> Result<Option<Confinement>, String> {
    let on = mkdtemp(&env::temp_dir().join("offshoot-jail-XXXXXX")).map_err(|error| format!("a directory: {error}"))?;
    let (isolation, strictness) = (host::isolation(), Strictness::Strict);
    let mut zygote = Zygote::new(Jail { isolation, strictness, on: on.clone() });
    let tried = make_one(&mut zygote, &on).map_err(|error| error.to_string());
    if let (_, Some(running)) = zygote.end(Still::There) {
        reap(running.pid());
    }
    fs::remove_dir(&on).map_err(|error| format!("{}: {error}", on.display()))?;
    tried
}

fn make_one(zygote: &mut Zygote, cage: &Path) -> io::Result<Option<Confinement>> {
    let shape = MachineShape { ram: PageCount::covering(MIN_MEMORY), vcpus: 1, machine: Machine::Monitor };
    let (mut link, theirs) = link_to(&Bounds::of(shape, host::max_map_count() / 4))?;
    zygote.start(|_| Token::NONE)?;
    zygote.ask_for(ProcessId(0), &theirs, Instant::now())?;
    drop(theirs);
    if let Some(socket) = zygote.socket() {
        wait(socket, Instant::now() + PATIENCE)?;
    }
    let pid = match zygote.hear(Instant::now())? {
        Some((_, Birth::Lives(pid))) => pid,
        Some((_, Birth::Failed(why))) => return Err(io::Error::other(why)),
        Some((_, Birth::Ended)) | None => return Err(io::ErrorKind::TimedOut.into()),
    };
    let (features, server) = (host::features(), std::process::id() as i32);
    let isolation = host::isolation();
    let prepare = ToVm::Prepare { shape, isolation, features, cage: cage.to_owned(), server, niceness: 0 };
    let answer = link.send(&prepare, &[]).and_then(|()| {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some((Said(said), _)) = link.recv::<Said>()? {
                let mut said = said.into_iter();
                let answer = said.find(|said| matches!(said, FromVm::Ready { .. } | FromVm::PrepareFailed(_)));
                match answer {
                    Some(answer) => return Ok(answer),
                    None => continue,
                }
            }
            wait(link.as_fd(), until)?;
        }
    });
    let found = match &answer {
        Ok(FromVm::Ready { .. }) => confinement::of(pid.as_raw(), isolation).map(Some),
        Ok(FromVm::PrepareFailed(why)) if makes_vms() => Err(io::Error::other(why.clone())),
        Ok(_) => Ok(None),
        Err(error) => Err(io::Error::new(error.kind(), format!("a VM process: {error}"))),
    };
    // It ends with its socket, but it has no word in that.
    drop(link);
    let keeper = match answer {
        Ok(FromVm::Ready { keeper, .. }) => Some(Pid::from_raw(keeper)).filter(|keeper| keeper.as_raw() > 0),
        _ => None,
    };
    // That it names a process proves nothing: only a child of ours is ended.
    let is_child = |pid: &Pid| matches!(waitpid(*pid, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive));
    for child in [Some(pid), keeper].into_iter().flatten().filter(is_child) {
        match kill(child, Signal::SIGKILL) {
            Ok(()) => reap(child),
            Err(error) => log::warn!("end process {child}: {error}"),
        }
    }
    found
}

/// Whether this host's KVM makes VMs.
fn makes_vms() -> bool {
    host::open_kvm().is_ok_and(|kvm| kvm.create_vm().is_ok())
}

fn wait(socket: BorrowedFd<'_>, until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
    match poll(&mut [PollFd::new(socket, PollFlags::POLLIN)], left)? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

fn reap(pid: Pid) {
    if let Err(error) = waitpid(pid, None) {
        log::warn!("end process {pid}: {error}");
    }
}
