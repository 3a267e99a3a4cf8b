//! The server, in the foreground or left behind by the first command.

use super::args::Serve;
use super::errors::CliError;
use super::{Done, SUCCESS};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{chdir, close, setsid};
use std::path::Path;
use std::{fs, io};
use vmm::client::{Home, HomeError};
use vmm::server;

pub fn run(home: Option<&Path>, serve: Serve) -> Done {
    let home = home.map_or_else(Home::of_user, Home::at)?;
    let Serve { swap, compressed, memory, auto_balloon, balloon_idle, isolation, answer_within, background } = serve;
    let (path, size) = swap.map_or((None, None), |place| (Some(place.path), place.size));
    let swap = server::SwapConfig { path, size: size.map(|s| s.0), compressed: compressed.map(|s| s.0) };
    let idle = server::IdleConfig { when: auto_balloon.into(), after: balloon_idle };
    let budget = memory.map(|s| s.0);
    if background {
        detach()?;
    }
    raise_open_files();
    let isolation = isolation.into();
    match server::run(server::Config { home, swap, budget, idle, isolation, answer_within }) {
        Ok(()) => Ok(SUCCESS),
        // Another one was faster: the client that started this one finds it.
        Err(server::Error::Home(HomeError::Locked { .. })) if background => Ok(SUCCESS),
        Err(server::Error::Home(e)) => Err(vmm::client::Error::Home(e).into()),
        Err(e @ server::Error::Swap(_)) => Err(CliError::bad_input(format!("serve: {e}"))),
        Err(e) => Err(CliError::failed(format!("serve: {e}"))),
    }
}

/// Leaves the terminal, the working directory, and whatever descriptors the first command's caller had open (a pipe held
/// here would never end for its reader). The log is stderr, by the doing of who started this.
fn detach() -> io::Result<()> {
    // A leader of its process group already has what this is for.
    let _ = setsid();
    chdir("/")?;
    close_all_but_standard()
}

/// Closes all descriptors but the standard streams.
pub(super) fn close_all_but_standard() -> io::Result<()> {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&descriptor| descriptor > 2)
        .collect();
    for descriptor in open {
        // The directory that was read is among them, and closed.
        let _ = close(descriptor);
    }
    Ok(())
}

/// Every VM takes several descriptors: as many as there may be.
fn raise_open_files() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        log::warn!("raise the limit of open files: {e}");
    }
}
