//! The janitor: a process that shuts down the servers of a run that has come to an early end, however that was.
//!
//! It is told of homes on its standard input. When that ends, it shuts down and removes those it was not told the end of.

use crate::Result;
use nix::unistd::setsid;
use std::env;
use std::fs;
use std::io::{Write, stdin};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use vmm::client::Client;

/// What this program is called as.
pub const NAME: &str = "janitor";

/// Its life.
pub fn run() -> Result<()> {
    // What interrupts the run is not for us.
    setsid()?;
    let mut homes: Vec<PathBuf> = Vec::new();
    for line in stdin().lines() {
        match line?.split_once(' ') {
            Some(("open", path)) => homes.push(path.into()),
            Some(("gone", path)) => homes.retain(|home| home != Path::new(path)),
            _ => {}
        }
    }
    homes.iter().for_each(|home| clean(home));
    Ok(())
}

/// Shuts down the server of the home in this directory, and removes the directory.
pub fn clean(directory: &Path) {
    let client = Client::builder().home(directory.join("home")).start_server(false).connect();
    if let Some(Err(error)) = client.ok().map(Client::shutdown) {
        eprintln!("bench: shut down the server in {}: {error}", directory.display());
    }
    // It may be gone already.
    let _ = fs::remove_dir_all(directory);
}

/// A janitor at work.
#[derive(Debug)]
pub struct Janitor {
    child: Child,
    input: Option<ChildStdin>,
}

impl Janitor {
    /// Hires one.
    pub fn start() -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        let mut child = command.args([crate::reference::AS, NAME]).stdin(Stdio::piped()).spawn()?;
        let input = child.stdin.take();
        Ok(Self { child, input })
    }

    /// A home is there, or gone.
    pub fn tell(&mut self, what: &str, directory: &Path) {
        if let Some(input) = &mut self.input {
            // Without a janitor the run goes on.
            let _ = writeln!(input, "{what} {}", directory.display());
        }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.wait();
    }
}
