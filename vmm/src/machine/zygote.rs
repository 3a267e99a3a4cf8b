//! The zygote: a process with one thread that makes VM processes out of itself, so that they start with everything loaded,
//! relocated and learned, and share the pages of all that.
//!
//! It has no descriptor of any VM. What all VM processes share with it beside pages is where things lie in memory: one that
//! is taken over knows that of its siblings.
#![allow(unsafe_code)] // clone without a new stack, as fork, but with the caller's parent

use super::facts::Known;
use super::{isolate, jail, process};
use crate::host::heap;
use crate::link::Link;
use crate::wire::{Isolation, Made, Strictness, ToZygote};
use nix::errno::Errno;
use nix::sys::prctl::set_name;
use nix::unistd::{Pid, getppid};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Makes a VM process for each socket that comes along, until the server's end. A VM process comes back from here as well,
/// at its own end.
pub(super) fn run(socket: OwnedFd) -> Result<(), String> {
    isolate::die_with(getppid()).map_err(|error| error.to_string())?;
    name(c"offshoot-zygote");
    isolate::offer_to_oom_killer();
    heap::share();
    heap::keep();
    let mut link = Link::new(socket);
    let failed = |error: io::Error| format!("the server's socket: {error}");
    let mut entered = Err("a zygote outside of its jail".to_owned());
    let mut known = Known::little();
    loop {
        let (request, fds) = match link.recv() {
            Ok(Some(request)) => request,
            Ok(None) => continue,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        if let ToZygote::Enter { isolation, strictness, on } = request {
            entered = enter(isolation, strictness, &on);
            known = Known::learn(entered.clone().ok().flatten());
            continue;
        }
        let Ok([theirs]) = <[OwnedFd; 1]>::try_from(fds) else {
            return Err("a request that needs one descriptor".into());
        };
        let made: Made = match entered.as_ref().map_err(String::clone).and_then(|_| make().map_err(|e| e.desc().into()))
        {
            Ok(None) => {
                drop(link);
                name(c"offshoot-vm");
                return process::run(theirs, &known);
            }
            Ok(Some(pid)) => Ok(pid.as_raw()),
            Err(why) => Err(why),
        };
        // Before the answer: from then on the VM process is the only one that has it.
        drop(theirs);
        match link.send(&made, &[]) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Goes into the jail, or does without where that is allowed. Where VM processes end up then, if there is one.
fn enter(isolation: Isolation, strictness: Strictness, on: &Path) -> Result<Option<&'static Path>, String> {
    let entered = match isolation {
        Isolation::Off => Err("neither user ids nor user namespaces are to be had".to_owned()),
        isolation => jail::enter(isolation, on).map_err(|error| error.to_string()),
    };
    match (entered, strictness) {
        (Ok(()), _) => Ok(Some(Path::new(jail::EMPTY))),
        (Err(why), Strictness::Weaker) => {
            log::warn!("VM processes are not kept apart as they should be: {why}");
            Ok(None)
        }
        (Err(why), Strictness::Strict) => Err(format!(
            "this host does not keep VM processes apart: {why} (see `offshoot doctor`; `offshoot serve --isolation weaker` runs VMs all the same)"
        )),
    }
}

/// Doubles this process; the new one is a child of the server as well. `None` in the new one.
fn make() -> Result<Option<Pid>, Errno> {
    let flags = (libc::CLONE_PARENT | libc::SIGCHLD) as libc::c_ulong;
    // SAFETY: As fork: the new process has a copy of this one's memory and its stack. There is one thread, so that no lock
    // (of the allocator, say) is held by one that the new process does not have. The C library does not learn of it, and
    // has for the main thread of the new process the id of this one's: it uses that for mutexes that know their owner,
    // which we have none of.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match Errno::result(result)? {
        0 => Ok(None),
        pid => Ok(Some(Pid::from_raw(pid as i32))),
    }
}

fn name(name: &std::ffi::CStr) {
    if let Err(error) = set_name(name) {
        log::debug!("PR_SET_NAME: {error}");
    }
}
