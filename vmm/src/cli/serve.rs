//! The server, in the foreground or left behind by the first command.

use super::args::Serve;
use super::errors::CliError;
use super::notify::notify;
use super::{Done, SUCCESS};
use nix::sys::prctl::set_name;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{chdir, close, dup2_stdout, setsid};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use vmm::api::ErrorKind;
use vmm::client::{Home, HomeError};
use vmm::host::latency::WakeUps;
use vmm::server::{self, Stage};

pub fn run(home: Option<&Path>, serve: Serve) -> Done {
    let home = home.map_or_else(Home::of_user, Home::at)?;
    let Serve {
        swap,
        force,
        compressed,
        memory,
        auto_balloon,
        balloon_idle,
        isolation,
        answer_within,
        low_latency,
        max_vms,
        background,
    } = serve;
    let (path, size) = swap.map_or((None, None), |place| (Some(place.path), place.size));
    let swap = server::SwapConfig { path, size: size.map(|s| s.0), compressed: compressed.map(|s| s.0), force };
    let idle = server::IdleConfig { when: auto_balloon.into(), after: balloon_idle };
    let budget = memory.map(|s| s.0);
    if background {
        detach()?;
    }
    // As `ps` shows it, whatever file it was started from.
    let _ = set_name(c"offshoot");
    let wake_ups = if low_latency { WakeUps::Fast } else { WakeUps::AsTheyAre };
    let isolation = isolation.into();
    let config = server::Config { home, swap, budget, idle, isolation, answer_within, wake_ups, max_vms };
    let served = raise_open_files().and_then(|()| match server::run(config, |stage| tell(background, stage)) {
        Ok(()) => Ok(SUCCESS),
        // Another one was faster: the client that started this one finds it.
        Err(server::Error::Home(HomeError::Locked { .. })) if background => Ok(SUCCESS),
        Err(server::Error::Home(e)) => Err(vmm::client::Error::Home(e).into()),
        Err(e @ server::Error::Swap(_)) => Err(CliError::bad_input(format!("serve: {e}"))),
        Err(e) => Err(CliError::of(ErrorKind::Host, format!("serve: {e}"))),
    });
    if let (Err(e), true) = (&served, background) {
        // The client that has started this reads it, and may be gone.
        let _ = writeln!(io::stdout(), "{e}");
    }
    served
}

/// Tells who has started this how far it has come.
fn tell(background: bool, stage: Stage) {
    match stage {
        Stage::Listening(_) if background => {
            // The client is waiting for no more words.
            let silenced = File::options().write(true).open("/dev/null").map(dup2_stdout);
            if let Err(e) = silenced {
                log::warn!("close standard output: {e}");
            }
        }
        Stage::Listening(socket) => {
            let told = writeln!(io::stdout(), "Listening on {}", socket.display()).and_then(|()| io::stdout().flush());
            if let Err(e) = told {
                log::warn!("standard output: {e}");
            }
            notify(&format!("READY=1\nSTATUS=Listening on {}", socket.display()));
        }
        Stage::Ending => notify("STOPPING=1"),
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

/// What a server has open, with one VM and some clients.
const LEAST_FILES: u64 = 128;

/// Every VM takes several descriptors: as many as there may be.
fn raise_open_files() -> Result<(), CliError> {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    match raised {
        Ok(limit) if limit < LEAST_FILES => {
            let why = format!("serve: at most {limit} open files are allowed (ulimit -n): it takes {LEAST_FILES}");
            Err(CliError::of(ErrorKind::Limit, why))
        }
        Ok(_) => Ok(()),
        Err(e) => {
            log::warn!("raise the limit of open files: {e}");
            Ok(())
        }
    }
}
