//! The home as its server keeps it: locked, and whole. What somebody deletes in it is made again; a home that is deleted
//! itself, or moved away, is the server's end: nobody would find it any more.

use super::registry::removals::EndCause;
use super::registry::roll::Roll;
use super::{Error, Server};
use crate::client::{Home, HomeLock};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The lock of a home, and the watch on what becomes of it.
#[derive(Debug)]
pub struct KeptHome {
    lock: HomeLock,
    /// None where the host has no watches left for its users.
    watch: Option<Inotify>,
    /// When to make again what was deleted.
    mend_at: Option<Instant>,
}

/// Who deletes a whole home is not to find new files in it.
const PATIENCE: Duration = Duration::from_secs(1);

impl KeptHome {
    /// Watches a home that is locked.
    pub fn new(home: &Home, lock: HomeLock) -> Self {
        let watch = watch(home).inspect_err(|e| log::warn!("watch {}: {e}", home.path().display()));
        Self { lock, watch: watch.ok(), mend_at: None }
    }

    /// What to wait on.
    pub fn watch(&self) -> Option<&Inotify> {
        self.watch.as_ref()
    }

    /// When there is something to do.
    pub fn next_look(&self) -> Option<Instant> {
        self.mend_at
    }

    /// Takes in what has happened; what it was shows when one looks.
    fn drain(&self) {
        while self.watch.as_ref().is_some_and(|watch| watch.read_events().is_ok()) {}
    }
}

fn watch(home: &Home) -> nix::Result<Inotify> {
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let gone = AddWatchFlags::IN_DELETE | AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
    watch.add_watch(home.path(), gone | AddWatchFlags::IN_ONLYDIR)?;
    Ok(watch)
}

impl Server {
    /// Something in the home has been deleted, by the server itself perhaps.
    pub fn home_changed(&mut self) {
        self.kept_home.drain();
        if self.stopping.is_some() {
            return;
        }
        match self.kept_home.lock.is_home() {
            true => self.kept_home.mend_at = Some(Instant::now() + PATIENCE),
            false => self.home_is_gone(),
        }
    }

    fn home_is_gone(&mut self) {
        log::error!("{} is gone: the server ends, and its VMs with it", self.home.path().display());
        self.shut_down(EndCause::HomeIsGone);
    }

    /// Makes again what has been deleted a while ago.
    pub fn mend_home(&mut self, now: Instant) {
        if self.kept_home.mend_at.take_if(|at| *at <= now).is_none() || self.stopping.is_some() {
            return;
        }
        // It is open here, and with that its own end is not told of.
        if !self.kept_home.lock.is_home() {
            return self.home_is_gone();
        }
        let home = self.home.path().display().to_string();
        match self.kept_home.lock.mend() {
            Ok(false) => {}
            Ok(true) => log::warn!("somebody deleted {home}/lock: it is made again"),
            Err(e) => log::error!("{e}"),
        }
        if is_missing(self, "socket") {
            match listen(&self.home) {
                Ok(listener) => {
                    log::warn!("somebody deleted {home}/socket: it is made again");
                    self.clients.listener().replace(listener, &mut self.watches);
                }
                Err(e) => log::error!("{home}/socket is deleted: {e}"),
            }
        }
        if is_missing(self, "cage")
            && let Err(e) = fs::create_dir(&self.host.cage)
        {
            log::error!("{}: {e}", self.host.cage.display());
        }
        if is_missing(self, "vms") && self.registry.vms.iter().len() > 0 {
            self.registry.roll = Roll::at(roll_path(&self.home));
            if let Err(e) = self.registry.roll.note(&[], self.registry.vms.iter().map(|vm| vm.name.as_str())) {
                log::error!("record of VMs in {home}: {e}");
            }
        }
    }
}

fn is_missing(server: &Server, file: &str) -> bool {
    let there = fs::symlink_metadata(server.home.path().join(file));
    there.is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
}

/// Listens on the home's socket, whatever an earlier server has left of it.
///
/// # Errors
/// It cannot be made.
pub fn listen(home: &Home) -> Result<UnixListener, Error> {
    let path = home.socket()?;
    match std::fs::remove_file(path.as_ref()) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(Error::Io { operation: "remove an old socket", source: e });
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).and_then(|listener| {
        // Whatever the mask is that we were started with.
        std::fs::set_permissions(path.as_ref(), Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map_err(|source| Error::Io { operation: "listen on the home's socket", source })
}

/// Where the names of VMs are kept.
pub fn roll_path(home: &Home) -> PathBuf {
    home.path().join("vms")
}
