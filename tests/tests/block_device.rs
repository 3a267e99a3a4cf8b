//! A block device as swap.

use nix::sched::{CloneFlags, unshare};
use offshoot_tests::{Guest, Lack, Served, TEN_SECONDS, TestHome, fork_settled, is_root, skip, wait_until};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use vmm::units::ByteSize;

const SIZE: u64 = 96 << 20;
const OWN: std::ops::Range<u64> = 1000..9192;

/// A loop device over a sparse file. The kernel takes it apart when this and all who use it are gone.
struct Loop {
    path: PathBuf,
    backing: PathBuf,
    file: File,
    _open: File,
}

impl Loop {
    /// None where there are no loop devices for us; then it is told loudly.
    fn new(file: &Path) -> Option<Self> {
        if !is_root() {
            skip(Lack::Root, "only root can make loop devices");
            return None;
        }
        let backing = File::create(file).expect("make a file");
        backing.set_len(SIZE).expect("make it sparse");
        let made = losetup(&["--find".as_ref(), "--show".as_ref(), file.as_os_str()]);
        let opened = made.and_then(|path| {
            let path = PathBuf::from(path.trim());
            let open = File::open(&path);
            // As long as it is open, this only says what is to become of it afterwards.
            losetup(&["--detach".as_ref(), path.as_os_str()])?;
            Ok((path, open?))
        });
        match opened {
            Ok((path, open)) => Some(Self { path, backing: file.to_owned(), file: backing, _open: open }),
            Err(error) => {
                skip(Lack::Disks, format!("no loop devices: {error}"));
                let _ = fs::remove_file(file);
                None
            }
        }
    }

    fn name(&self) -> &str {
        self.path.to_str().expect("a short name")
    }

    /// Bytes that the file behind it takes.
    fn taken(&self) -> u64 {
        self.file.metadata().expect("ask for a file's size").blocks() * 512
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // It may have gone with the home beside it.
        let _ = fs::remove_file(&self.backing);
    }
}

fn losetup(arguments: &[&std::ffi::OsStr]) -> io::Result<String> {
    let output = Command::new("losetup").args(arguments).output()?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

/// Its size is the device's, memory comes back from it, and nothing stays on it.
#[test]
fn memory_comes_back_from_a_block_device() {
    let Some(home) = TestHome::new() else { return };
    let Some(device) = Loop::new(&home.path().with_file_name("backing")) else { return };
    let server = Served::new(&home, &["--swap", device.name(), "--compressed", "1M"]);
    let vm = home.launch("a", ByteSize::mib(64));
    vm.fill(OWN, 1);
    let child = fork_settled(&vm, 1).remove(0);
    home.client().reclaim_all(ByteSize::mib(64)).expect("reclaim");
    wait_until("the tier is written out", TEN_SECONDS, || home.totals().compressed_bytes < 4 << 20);
    let out = home.totals();
    println!("{} KiB taken: {out:?}", device.taken() >> 10);
    assert!(out.disk_bytes >= 28 << 20 && device.taken() >= 28 << 20, "{out:?}");
    child.verify(OWN, 1);
    vm.verify(OWN, 1);
    home.check();
    // Nobody else gets it meanwhile.
    let other = TestHome::new().expect("as above");
    let said = other.cli(&["serve", "--swap", device.name()]).failure(2);
    assert!(said.contains("in use"), "{said}");
    let _ = fs::remove_file(other.path().join("lock"));

    home.client().remove_all().expect("rm --all");
    wait_until("the disk is free", TEN_SECONDS, || home.totals().disk_bytes == 0);
    wait_until("what nobody needs is discarded", TEN_SECONDS, || device.taken() < 2 << 20);
    drop((home, server));
    assert!(device.taken() < 1 << 20, "{} bytes stay on the device", device.taken());
}

/// As much of it as is said, from its start.
#[test]
fn a_size_is_a_limit() {
    let Some(home) = TestHome::new() else { return };
    let Some(device) = Loop::new(&home.path().with_file_name("backing")) else { return };
    let beyond = File::options().write(true).open(&device.path).expect("open the device");
    beyond.write_all_at(b"somebody's", 16 << 20).and_then(|()| beyond.sync_all()).expect("write to the device");
    drop(beyond);
    let place = format!("{}:16M", device.name());
    let server = Served::new(&home, &["--swap", &place, "--compressed", "1M"]);
    let vm = home.launch("a", ByteSize::mib(64));
    vm.fill(OWN, 1);
    let done = home.client().reclaim_all(ByteSize::mib(64)).expect("reclaim");
    assert!((8 << 20..24 << 20).contains(&done.reclaimed_bytes), "{done:?}");
    assert!(home.totals().disk_bytes <= 16 << 20);
    vm.verify(OWN, 1);
    drop((home, server));
    let mut found = [0; 10];
    File::open(&device.path).and_then(|read| read.read_exact_at(&mut found, 16 << 20)).expect("read the device");
    assert_eq!(&found, b"somebody's");
}

#[test]
fn devices_that_cannot_be_had_are_refused() {
    let Some(home) = TestHome::new() else { return };
    let Some(device) = Loop::new(&home.path().with_file_name("backing")) else { return };
    let refused = |place: &str, why: &str| {
        let said = home.cli(&["serve", "--swap", place, "--force"]).failure(2);
        assert!(said.starts_with("offshoot: serve: swap on /dev/") && said.contains(why), "{said}");
        fs::remove_file(home.path().join("lock")).expect("nothing else is left");
    };
    refused(&format!("{}:97M", device.name()), "has 100663296 bytes only");
    refused("/dev/null", "neither a regular file nor a block device");
    refused("/dev/null:8M", "neither a regular file nor a block device");
    // As a mount takes it, or another's swap.
    let taken = OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(&device.path).expect("take it");
    refused(device.name(), "mounted, or in use");
    drop(taken);

    let made = Command::new("mkfs.ext2").arg("-q").arg(&device.path).status();
    if !made.is_ok_and(|status| status.success()) {
        return skip(Lack::Disks, "no mkfs.ext2: no file system to mount");
    }
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount table of our own");
    let private = nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("make mounts private");
    let point = home.path().with_file_name("mounted");
    fs::create_dir(&point).expect("make a directory");
    let none = nix::mount::MsFlags::empty();
    if let Err(error) = nix::mount::mount(Some(&device.path), &point, Some("ext2"), none, None::<&str>)
        .or_else(|_| nix::mount::mount(Some(&device.path), &point, Some("ext4"), none, None::<&str>))
    {
        return skip(Lack::Disks, format!("the file system cannot be mounted: {error}"));
    }
    refused(device.name(), "mounted, or in use");
    nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH).expect("unmount");
    fs::remove_dir(&point).expect("remove a directory");
}
