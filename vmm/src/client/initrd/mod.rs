//! Initial RAM disks with the agent: made from the agent's program and the modules that the kernel needs to be talked to.
//!
//! One that was made is kept in the home, under a name that says its content, so that all launches of a kernel share one file,
//! and its pages.

mod cpio;
mod modules;
mod release;

use cpio::Cpio;
use modules::{Module, Tree};
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Where the agent is in the guest. Beside an init of the user's, the kernel starts it instead, and it starts that.
pub const AGENT: &str = "/offshoot/agent";
/// What a kernel needs to be talked to, and for its balloon and its random numbers. Those that they need come with them.
const WANTED: [Wanted; 6] = [
    Wanted { name: "virtio_mmio", needed: true },
    Wanted { name: "vmw_vsock_virtio_transport", needed: true },
    Wanted { name: "virtio_rng", needed: false },
    Wanted { name: "virtio_balloon", needed: false },
    // The power button, and the way in which programs hear of it.
    Wanted { name: "button", needed: false },
    Wanted { name: "evdev", needed: false },
];
/// Files that are kept in the home.
const KEPT: usize = 4;

struct Wanted {
    name: &'static str,
    needed: bool,
}

/// What goes into an initial RAM disk.
#[derive(Debug)]
pub struct Plan {
    /// The kernel's version, as `uname -r` says it.
    pub release: String,
    tree: Option<Tree>,
}

impl Plan {
    /// Looks at the kernel, and finds its modules: beside it as in an unpacked package, or among those of this host.
    ///
    /// # Errors
    /// The file is no kernel that says its version, or its modules lack one that is needed.
    pub fn new(kernel: &Path) -> Result<Self, String> {
        let release = release::of(kernel).map_err(|e| format!("kernel {}: {e}", kernel.display()))?;
        let tree = Tree::find(kernel, &release);
        if let Some(tree) = &tree
            && let Some(wanted) = WANTED.iter().find(|wanted| wanted.needed && !tree.has(wanted.name))
        {
            return Err(format!("{} has no module {}, which the agent needs", tree.directory().display(), wanted.name));
        }
        Ok(Self { release, tree })
    }

    /// Whether modules were found. A kernel without has to have all built in.
    pub fn has_modules(&self) -> bool {
        self.tree.is_some()
    }

    /// The bytes of an initial RAM disk, after those of the user's, if there is one.
    ///
    /// # Errors
    /// A module cannot be read, which is named; or the user's file cannot.
    pub fn build(&self, users: Option<&Path>) -> Result<Vec<u8>, String> {
        let mut bytes = match users {
            Some(path) => fs::read(path).map_err(|e| format!("initrd {}: {e}", path.display()))?,
            None => Vec::new(),
        };
        // The kernel looks for the next archive at a multiple of four, and passes over zeros.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let mut cpio = Cpio::new(bytes);
        if users.is_none() {
            for name in ["dev", "proc", "sys", "run", "tmp", "root", "etc"] {
                cpio.directory(name);
            }
            cpio.link("init", AGENT);
        }
        cpio.directory("offshoot");
        cpio.file(&AGENT[1..], 0o755, agent::IMAGE);
        if let Some(tree) = &self.tree {
            let wanted = WANTED.iter().map(|wanted| wanted.name).filter(|name| tree.has(name));
            let closure = tree.closure(wanted)?;
            cpio.directory("offshoot/modules");
            let order: String = closure.iter().map(|Module { name, .. }| format!("{name}.ko\n")).collect();
            cpio.file("offshoot/modules/order", 0o644, order.as_bytes());
            for Module { name, bytes } in &closure {
                cpio.file(&format!("offshoot/modules/{name}.ko"), 0o644, bytes);
            }
        }
        Ok(cpio.finish())
    }
}

/// Has a file with these bytes in this directory, and returns its path.
///
/// # Errors
/// The directory cannot be written.
pub fn keep(directory: &Path, bytes: &[u8]) -> io::Result<PathBuf> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    let path = directory.join(format!("{:016x}-{}.cpio", hasher.finish(), bytes.len()));
    if fs::read(&path).is_ok_and(|kept| kept == bytes) {
        // It is in use: others go first. A file system that keeps no times has them go in any order.
        let _ = fs::File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        return Ok(path);
    }
    // Several may do so at once: each writes a file of its own, and the last name stands.
    let new = directory.join(format!(".new-{}-{:?}", std::process::id(), std::thread::current().id()));
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(&new);
    let written =
        file.and_then(|mut file| io::Write::write_all(&mut file, bytes)).and_then(|()| fs::rename(&new, &path));
    if let Err(e) = written {
        let _ = fs::remove_file(&new);
        return Err(e);
    }
    forget_old(directory);
    Ok(path)
}

/// Only so many are kept. Whoever uses one has it open.
fn forget_old(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut kept: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "cpio"))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    kept.sort();
    for (_, path) in &kept[..kept.len().saturating_sub(KEPT)] {
        // Somebody else may have been faster.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests;
