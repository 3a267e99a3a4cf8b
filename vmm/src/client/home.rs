//! The directory that a server and its clients share.
//!
//! ```text
//! HOME/            0700, owned by the user; locked by the server for life, so that it has one whatever is deleted in it
//!   lock           locked as well (an open-file-description lock, which others can ask for); its text is the server's pid
//!   socket         where the server listens
//!   server.log     what a server in the background has to say
//!   vms            what VMs there are
//! ```

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use nix::unistd::geteuid;
use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// What a server puts into its home.
const OURS: [&str; 6] = ["lock", "socket", "server.log", "swap", "vms", "cage"];

/// How long somebody may take to ask whether a home has a server.
const ASKING: Duration = Duration::from_millis(200);

/// Bytes of a Unix socket's path, its end included.
const SUN_PATH: usize = 108;

/// A server's home: an absolute path, which need not exist yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home(PathBuf);

/// Why a home cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// It could not be made, looked at or opened.
    #[error("home {}: {operation}: {source}", home.display())]
    Io {
        /// The home.
        home: PathBuf,
        /// What failed.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It is the root of the file system, which has other uses.
    #[error("home {}: it is the root of the file system: name a directory of the server's own", .0.display())]
    Root(PathBuf),
    /// Something else is there.
    #[error("home {}: not a directory (and a symbolic link is not followed)", .0.display())]
    NotADirectory(PathBuf),
    /// Somebody else could answer there, or listen.
    #[error("home {}: it belongs to user {owner}, and this is user {user}", home.display())]
    NotOurs {
        /// The home.
        home: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        user: u32,
    },
    /// Somebody else could put a socket there.
    #[error("home {}: others may write to it (mode {mode:03o}): make it 700", home.display())]
    OpenToOthers {
        /// The home.
        home: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It has a server.
    #[error("a server is already running for {}{}", home.display(), of_pid(*pid))]
    Locked {
        /// The home.
        home: PathBuf,
        /// The server's process; 0 if it has not said yet.
        pid: i32,
    },
}

fn of_pid(pid: i32) -> String {
    if pid == 0 { String::new() } else { format!(" (pid {pid})") }
}

impl HomeError {
    /// Which home it is about.
    pub fn home(&self) -> &Path {
        match self {
            Self::Root(home) | Self::NotADirectory(home) => home,
            Self::Io { home, .. } | Self::NotOurs { home, .. } => home,
            Self::OpenToOthers { home, .. } | Self::Locked { home, .. } => home,
        }
    }
}

impl Home {
    /// The home at `path`, which is made absolute.
    pub fn at(path: impl AsRef<Path>) -> io::Result<Self> {
        std::path::absolute(path).map(Self)
    }

    /// The user's home: `OFFSHOOT_HOME`, else `$XDG_RUNTIME_DIR/offshoot`, else `/tmp/offshoot-UID`.
    pub fn of_user() -> io::Result<Self> {
        let set = |variable| env::var_os(variable).filter(|value| !value.is_empty());
        match (set("OFFSHOOT_HOME"), set("XDG_RUNTIME_DIR")) {
            (Some(home), _) => Self::at(home),
            (None, Some(runtime)) if Path::new(&runtime).is_absolute() => {
                Self::at(Path::new(&runtime).join("offshoot"))
            }
            _ => Self::at(format!("/tmp/offshoot-{}", geteuid())),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The log of a server in the background.
    pub fn log(&self) -> PathBuf {
        self.0.join("server.log")
    }

    /// Makes the directory, if it is not there, and checks that it is the user's alone to write to.
    pub fn create(&self) -> Result<(), HomeError> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => HomeError::NotADirectory(self.0.clone()),
            _ => self.io("create directory", e),
        })?;
        self.check()?;
        // Somebody else may be able to look into one that was there.
        let mode = fs::symlink_metadata(&self.0).map_err(|e| self.io("look at directory", e))?.mode();
        if mode & 0o077 != 0 && self.has_only_ours()? {
            let own = fs::Permissions::from_mode(mode & 0o700);
            fs::set_permissions(&self.0, own).map_err(|e| self.io("close directory to others", e))?;
        }
        Ok(())
    }

    /// Whether nothing is there but what a server puts there.
    fn has_only_ours(&self) -> Result<bool, HomeError> {
        let mut entries = fs::read_dir(&self.0).map_err(|e| self.io("list directory", e))?;
        Ok(entries.all(|entry| entry.is_ok_and(|entry| OURS.iter().any(|ours| entry.file_name() == *ours))))
    }

    /// Checks that the directory is there, and the user's alone to write to. A symbolic link is not followed.
    pub fn check(&self) -> Result<(), HomeError> {
        let home = || self.0.clone();
        let meta = fs::symlink_metadata(&self.0).map_err(|e| self.io("look at directory", e))?;
        let user = geteuid().as_raw();
        let mode = meta.mode() & 0o777;
        if fs::metadata("/").is_ok_and(|root| (root.dev(), root.ino()) == (meta.dev(), meta.ino())) {
            return Err(HomeError::Root(home()));
        } else if !meta.is_dir() {
            return Err(HomeError::NotADirectory(home()));
        } else if meta.uid() != user {
            return Err(HomeError::NotOurs { home: home(), owner: meta.uid(), user });
        } else if mode & 0o022 != 0 {
            return Err(HomeError::OpenToOthers { home: home(), mode });
        }
        Ok(())
    }

    /// Where the server listens, for `bind` and `connect`.
    pub fn socket(&self) -> Result<SocketPath, HomeError> {
        let path = self.0.join("socket");
        if path.as_os_str().as_bytes().len() < SUN_PATH {
            return Ok(SocketPath { path, _directory: None });
        }
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(&self.0)
            .map_err(|e| self.io("open directory", e))?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/socket", directory.as_raw_fd()));
        if !path.parent().is_some_and(Path::exists) {
            let e =
                io::Error::other(format!("its socket's path is longer than {SUN_PATH} bytes, and there is no /proc"));
            return Err(self.io("open socket", e));
        }
        Ok(SocketPath { path, _directory: Some(directory) })
    }

    /// Becomes the server of this home, until the lock is dropped or the process ends. A second one gets
    /// [`HomeError::Locked`].
    pub fn lock(&self) -> Result<HomeLock, HomeError> {
        let deadline = Instant::now() + ASKING;
        let directory = loop {
            match Flock::lock(self.open_directory()?, FlockArg::LockExclusiveNonblock) {
                Ok(directory) => break directory,
                Err((_, Errno::EWOULDBLOCK)) => match self.holder()? {
                    // Somebody asks whether there is a server, and takes a moment for it.
                    None if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
                    holder => return Err(HomeError::Locked { home: self.0.clone(), pid: holder.unwrap_or(0) }),
                },
                Err((_, e)) => return Err(self.io("lock directory", e.into())),
            }
        };
        let file = self.lock_file()?;
        Ok(HomeLock { home: self.clone(), directory, file })
    }

    fn lock_file(&self) -> Result<File, HomeError> {
        let mut file = self.open_lock(OpenOptions::new().read(true).write(true).create(true).mode(0o600))?;
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => {
                return Err(HomeError::Locked { home: self.0.clone(), pid: read_pid(&mut file) });
            }
            Err(e) => return Err(self.io("lock", e.into())),
        }
        let wrote = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        wrote.map_err(|e| self.io("write lock file", e))?;
        Ok(file)
    }

    /// The process of the server that this home has (0 if it has not said which), or none.
    pub fn server_pid(&self) -> Result<Option<i32>, HomeError> {
        if let Some(pid) = self.holder()? {
            return Ok(Some(pid));
        }
        // Somebody may have deleted its lock file: the directory is locked as well. To take that lock as one of many is how
        // to ask for it, and a server that starts meanwhile tries again.
        let directory = match self.open_directory() {
            Err(HomeError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            directory => directory?,
        };
        match Flock::lock(directory, FlockArg::LockSharedNonblock) {
            Err((_, Errno::EWOULDBLOCK)) => Ok(Some(0)),
            _ => Ok(None),
        }
    }

    /// Who has the lock file locked. Asking takes nothing.
    fn holder(&self) -> Result<Option<i32>, HomeError> {
        let mut file = match self.open_lock(OpenOptions::new().read(true)) {
            Err(HomeError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut lock = whole_file();
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).map_err(|e| self.io("ask for lock", e.into()))?;
        Ok((lock.l_type != libc::F_UNLCK as libc::c_short).then(|| read_pid(&mut file)))
    }

    fn open_directory(&self) -> Result<File, HomeError> {
        let mut options = OpenOptions::new();
        let options = options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW);
        options.open(&self.0).map_err(|e| self.io("open directory", e))
    }

    fn open_lock(&self, options: &OpenOptions) -> Result<File, HomeError> {
        options.open(self.0.join("lock")).map_err(|e| self.io("open lock file", e))
    }

    fn io(&self, operation: &'static str, source: io::Error) -> HomeError {
        HomeError::Io { home: self.0.clone(), operation, source }
    }
}

/// A path for a home's socket that fits the socket address: a long home is reached through a descriptor of it, which
/// lives as long as this.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    _directory: Option<File>,
}

impl AsRef<Path> for SocketPath {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

/// The right to be a home's server. It ends when this is dropped, or with the process; children do not inherit it
/// unless they share its file descriptors.
#[derive(Debug)]
pub struct HomeLock {
    home: Home,
    directory: Flock<File>,
    file: File,
}

impl HomeLock {
    /// Whether the home is still the directory that was locked. If not, nobody finds its server any more.
    pub fn is_home(&self) -> bool {
        let same = |there: fs::Metadata| {
            self.directory.metadata().is_ok_and(|locked| (locked.dev(), locked.ino()) == (there.dev(), there.ino()))
        };
        fs::symlink_metadata(self.home.path()).is_ok_and(same)
    }

    /// Makes the lock file again where somebody has deleted it. Whether that was so.
    pub fn mend(&mut self) -> Result<bool, HomeError> {
        match fs::symlink_metadata(self.home.path().join("lock")) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.file = self.home.lock_file()?;
                Ok(true)
            }
            Err(e) => Err(self.home.io("look at lock file", e)),
            Ok(_) => Ok(false),
        }
    }
}

fn read_pid(lock: &mut File) -> i32 {
    let mut text = String::new();
    lock.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok()).unwrap_or(0)
}

fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::TempDir;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn a_home_is_made_for_its_user_alone() {
        let dir = TempDir::new();
        let home = Home::at(dir.path().join("a/b")).unwrap();
        home.create().unwrap();
        home.create().unwrap();
        assert_eq!(fs::metadata(home.path()).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_home_that_others_can_use_is_refused() {
        let dir = TempDir::new();
        let home = Home::at(dir.path().join("h")).unwrap();
        home.create().unwrap();
        fs::set_permissions(home.path(), PermissionsExt::from_mode(0o777)).unwrap();
        assert!(matches!(home.create(), Err(HomeError::OpenToOthers { mode: 0o777, .. })));
        let mode = || fs::metadata(home.path()).unwrap().mode() & 0o777;
        fs::write(home.path().join("lock"), "").unwrap();
        fs::set_permissions(home.path(), PermissionsExt::from_mode(0o755)).unwrap();
        home.create().unwrap();
        assert_eq!(mode(), 0o700);
        // A directory that has another use stays as it is: the socket is its user's alone all the same.
        fs::write(home.path().join("thesis"), "").unwrap();
        fs::set_permissions(home.path(), PermissionsExt::from_mode(0o755)).unwrap();
        home.create().unwrap();
        assert_eq!(mode(), 0o755);

        symlink(home.path(), dir.path().join("link")).unwrap();
        let link = Home::at(dir.path().join("link")).unwrap();
        assert!(matches!(link.create(), Err(HomeError::NotADirectory(_))));
        fs::write(dir.path().join("file"), "").unwrap();
        let file = Home::at(dir.path().join("file")).unwrap();
        assert!(matches!(file.create(), Err(HomeError::NotADirectory(_))));
        for root in ["/", "//", "/tmp/.."] {
            assert!(matches!(Home::at(root).unwrap().create(), Err(HomeError::Root(_))), "{root}");
        }
        if geteuid().is_root() {
            std::os::unix::fs::chown(home.path(), Some(1), None).unwrap();
            assert!(matches!(home.create(), Err(HomeError::NotOurs { owner: 1, user: 0, .. })));
        }
    }

    #[test]
    fn a_home_has_one_server() {
        let dir = TempDir::new();
        let home = Home::at(dir.path()).unwrap();
        assert_eq!(home.server_pid().unwrap(), None);
        let lock = home.lock().unwrap();
        let pid = std::process::id() as i32;
        assert_eq!(home.server_pid().unwrap(), Some(pid));
        match home.lock() {
            Err(e @ HomeError::Locked { pid: holder, .. }) => {
                assert_eq!(holder, pid);
                assert_eq!(
                    e.to_string(),
                    format!("a server is already running for {} (pid {pid})", dir.path().display())
                );
            }
            other => panic!("{other:?}"),
        }
        drop(lock);
        assert_eq!(home.server_pid().unwrap(), None);
        home.lock().unwrap();
    }

    /// What cleans temporary directories took the lock file, and the next server did not see that there was one.
    #[test]
    fn a_home_has_one_server_whatever_is_deleted() {
        let dir = TempDir::new();
        let home = Home::at(dir.path().join("h")).unwrap();
        home.create().unwrap();
        let mut lock = home.lock().unwrap();
        assert!(!lock.mend().unwrap() && lock.is_home());
        fs::remove_file(home.path().join("lock")).unwrap();
        assert_eq!(home.server_pid().unwrap(), Some(0));
        let e = home.lock().unwrap_err();
        assert!(matches!(e, HomeError::Locked { pid: 0, .. }) && !e.to_string().contains("pid"), "{e}");
        assert!(lock.mend().unwrap());
        assert_eq!(home.server_pid().unwrap(), Some(std::process::id() as i32));

        fs::remove_dir_all(home.path()).unwrap();
        assert!(!lock.is_home());
        assert_eq!(home.server_pid().unwrap(), None);
        home.create().unwrap();
        assert!(!lock.is_home());
        home.lock().unwrap();
    }

    #[test]
    fn who_asks_for_a_server_keeps_none_from_starting() {
        let dir = TempDir::new();
        let home = Home::at(dir.path()).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    home.server_pid().unwrap();
                }
            });
            (0..200).for_each(|_| drop(home.lock().unwrap()));
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn a_long_home_has_a_socket_too() {
        let dir = TempDir::new();
        let home = Home::at(dir.path().join("x".repeat(150))).unwrap();
        home.create().unwrap();
        let socket = home.socket().unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        UnixStream::connect(home.socket().unwrap()).unwrap();
        assert!(home.path().join("socket").exists());
    }
}
