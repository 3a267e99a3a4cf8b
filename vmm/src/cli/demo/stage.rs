//! Where the demo plays: a server of its own, or the one of a given home; cleared however the demo ends.

use super::super::errors::{CliError, tell};
use super::super::reach::connect;
use super::super::signals::{self, Signals};
use nix::unistd::mkdtemp;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::{env, fs, process, thread};
use vmm::client::{Client, ClientBuilder};

/// A server, and what the demo puts there.
pub struct Stage {
    scene: Arc<Scene>,
    client: Client,
}

struct Scene {
    /// The directory that goes with the demo; none where the home was given.
    own_home: Option<PathBuf>,
    /// The first VM's name; the others' begin with it.
    root: String,
    /// Until it is cleared: then the client is gone.
    standing: Mutex<Option<Client>>,
}

impl Stage {
    /// Sets it up, to be cleared also by a signal.
    pub fn set(home: Option<&Path>, server: ClientBuilder, signals: Signals) -> Result<Self, CliError> {
        let own_home = match home {
            Some(_) => None,
            None => Some(mkdtemp(&env::temp_dir().join("offshoot-demo-XXXXXX"))?),
        };
        let server = match &own_home {
            Some(directory) => server.home(directory),
            None => server,
        };
        let root = if own_home.is_some() { "demo".into() } else { format!("demo-{}", process::id()) };
        let scene = Arc::new(Scene { own_home, root, standing: Mutex::new(None) });
        let client = connect(server).inspect_err(|_| scene.remove_home())?;
        *scene.standing.lock().unwrap_or_else(PoisonError::into_inner) = Some(client.clone());
        let stage = Self { scene: scene.clone(), client };
        thread::spawn(move || {
            let Ok(signal) = signals.wait() else { return };
            // Kept until the end: the demo, whose server is gone, waits for it in vain instead of telling of that.
            let mut standing = scene.standing.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(e) = scene.clear(&mut standing) {
                tell(&e.to_string());
            }
            process::exit(signals::exit_code(signal).into())
        });
        Ok(stage)
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The first VM's name.
    pub fn root(&self) -> &str {
        &self.scene.root
    }

    /// Whether a VM is the demo's.
    pub fn owns(&self, name: &str) -> bool {
        self.scene.owns(name)
    }

    /// Ends what the demo has started.
    pub fn clear(&self) -> Result<(), CliError> {
        self.scene.clear(&mut self.scene.standing.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Err(e) = self.clear() {
            tell(&e.to_string());
        }
    }
}

impl Scene {
    fn owns(&self, name: &str) -> bool {
        name.strip_prefix(&self.root).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }

    /// Does so once.
    fn clear(&self, standing: &mut Option<Client>) -> Result<(), CliError> {
        let Some(client) = standing.take() else { return Ok(()) };
        let cleared = if self.own_home.is_some() { client.shutdown() } else { self.remove_vms(client) };
        self.remove_home();
        cleared.map_err(|e| CliError::failed(format!("demo: clean up: {e}")))
    }

    fn remove_vms(&self, client: Client) -> Result<(), vmm::client::Error> {
        let ours: Vec<String> = client.list()?.into_iter().map(|vm| vm.name).filter(|name| self.owns(name)).collect();
        if !ours.is_empty() {
            client.remove(ours)?;
        }
        client.undo_start()
    }

    fn remove_home(&self) {
        if let Some(directory) = &self.own_home
            && let Err(e) = fs::remove_dir_all(directory)
        {
            log::warn!("remove {}: {e}", directory.display());
        }
    }
}
