//! What the zygote goes into before it makes the first VM process, and all that is made of it is in: mount, network, IPC and
//! UTS namespaces of its own, and a root with nothing but what a VM process opens while it sets itself up. They are made once
//! and inherited, so that no VM pays for them.
//!
//! ```text
//!   /            tmpfs, read-only, no devices, nothing to run
//!   ├─ dev/      kvm, userfaultfd, null, urandom: those that the host has
//!   ├─ proc/     the host's: a process looks at itself
//!   └─ empty/    where each VM process ends up
//! ```

use super::isolate::{IsolateError, during, empty_bounding_set};
use crate::wire::Isolation;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, chroot, getgid, getuid, pivot_root};
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Where a VM process ends up.
pub(super) const EMPTY: &str = "/empty";

/// What a VM process opens below `/dev`.
const DEVICES: [&str; 4] = ["kvm", "userfaultfd", "null", "urandom"];

/// What the root's file system is mounted with.
fn inert() -> MsFlags {
    MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
}

/// Goes there, with the new root first mounted on `on`, a directory that only this process's view of the files loses.
///
/// # Errors
/// What this host or this user may not. The process must make no VM process then.
pub(super) fn enter(how: Isolation, on: &Path) -> Result<(), IsolateError> {
    if how == Isolation::UserNamespace {
        own_user_namespace()?;
    }
    let apart =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(apart).map_err(during("mount, network, IPC and UTS namespaces"))?;
    let nothing = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(nothing, "/", nothing, private, nothing).map_err(during("mounts that the host does not see"))?;
    mount(Some("tmpfs"), on, Some("tmpfs"), inert(), Some("size=64k,nr_inodes=32,mode=0755"))
        .map_err(during("a file system for the root"))?;
    furnish(on)?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | inert();
    mount(nothing, on, nothing, read_only, nothing).map_err(during("a root that is read-only"))?;
    chdir(on).map_err(during("chdir to the root"))?;
    match pivot_root(".", ".") {
        // The old root lies on top of the new one now.
        Ok(()) => umount2(".", MntFlags::MNT_DETACH).map_err(during("unmount the host's files"))?,
        // The host has its initial file system as its root, which cannot be taken away: the new root covers it, for good.
        Err(Errno::EINVAL) => {
            mount(Some("."), "/", nothing, MsFlags::MS_MOVE, nothing).map_err(during("a root over the initial one"))?;
            chroot(".").map_err(during("chroot to the root"))?;
        }
        Err(cause) => return Err(during("pivot_root")(cause)),
    }
    chdir("/").map_err(during("chdir"))?;
    empty_bounding_set()
}

/// Puts what is needed into the root at `on`.
fn furnish(on: &Path) -> Result<(), IsolateError> {
    let made = |done: io::Result<()>| done.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)));
    let directory = |name: &str| made(fs::create_dir(on.join(name))).map_err(during("a directory of the root"));
    let bind = |from: &Path, to: &Path, how: MsFlags| {
        let nothing = None::<&str>;
        mount(Some(from), to, nothing, MsFlags::MS_BIND | how, nothing)
    };
    ["dev", "proc", "empty"].into_iter().try_for_each(directory)?;
    for name in DEVICES {
        let device = Path::new("/dev").join(name);
        if device.exists() {
            let here = on.join("dev").join(name);
            made(File::create(&here).map(drop)).map_err(during("a device of the root"))?;
            bind(&device, &here, MsFlags::empty()).map_err(during("a device of the root"))?;
        }
    }
    bind(Path::new("/proc"), &on.join("proc"), MsFlags::MS_REC).map_err(during("/proc of the root"))
}

/// As an ordinary user: what is to come takes rights that one has in a user namespace of one's own. Without the user's own id
/// in it no file could be made.
fn own_user_namespace() -> Result<(), IsolateError> {
    let (user, group) = (getuid(), getgid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(during("a user namespace"))?;
    let tell = |name: &str, text: String| {
        let told = fs::write(Path::new("/proc/self").join(name), text);
        told.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    };
    tell("setgroups", "deny".into()).map_err(during("setgroups of a user namespace"))?;
    tell("uid_map", format!("{user} {user} 1")).map_err(during("the user of a user namespace"))?;
    tell("gid_map", format!("{group} {group} 1")).map_err(during("the group of a user namespace"))
}
