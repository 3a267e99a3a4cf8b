//! Reaching a home's server, and starting it where there is none.

use super::connection::Connection;
use super::{Error, Home};
use crate::api::{ErrorKind, Failure};
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a server may take to start, and to greet.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a server that is there may not listen before a client that starts none gives up.
const MUTE: Duration = Duration::from_secs(2);
/// What is heard of a server that cannot start.
const WORDS_MAX: u64 = 4096;
/// How often to look whether it listens.
const POLL: Duration = Duration::from_millis(2);
/// How long to leave a server that is ending before the next try to replace it.
const RETRY: Duration = Duration::from_millis(20);

/// Where the server is, and how to start it.
#[derive(Clone, Debug)]
pub(super) struct Launcher {
    pub home: Home,
    pub binary: Option<PathBuf>,
    pub start: bool,
    pub log_level: log::LevelFilter,
}

/// Who started the server of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Starter {
    ThisClient,
    SomebodyElse,
}

impl Launcher {
    /// Connects to the home's server. If there is none, starts one, where that is wanted.
    ///
    /// Any number of clients may do so at once: of their servers, those that do not get the home's lock end with
    /// success, and their clients go on trying to connect.
    pub fn connect(&self) -> Result<(Connection, Starter), Error> {
        if self.start {
            self.home.create()?;
        } else if !self.home.path().exists() {
            return Err(self.no_server());
        } else {
            self.home.check()?;
        }
        let begun = Instant::now();
        let deadline = begun + PATIENCE;
        let mut server: Option<Server> = None;
        loop {
            match Connection::open(&self.home.socket()?, PATIENCE) {
                Ok(connection) => {
                    let connection = connection?;
                    let pid = connection.greeting().pid;
                    let ours = server.is_some_and(|server| server.release() == pid);
                    return Ok((connection, if ours { Starter::ThisClient } else { Starter::SomebodyElse }));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(self.too_slow("connect to")),
                Err(e) if e.kind() == io::ErrorKind::InvalidData => return Err(Error::Protocol("greeting")),
                Err(e) if !is_absent(&e) => {
                    return Err(Error::io(format!("connect to server of {}", self.home.path().display()))(e));
                }
                Err(_) if !self.start => match self.home.server_pid()? {
                    None => return Err(self.no_server()),
                    // It is about to listen, or about to end.
                    Some(pid) if Instant::now() > begun + MUTE => return Err(self.does_not_listen(pid)),
                    Some(_) => {
                        thread::sleep(POLL);
                        continue;
                    }
                },
                Err(_) => {}
            }
            let mut pause = POLL;
            match &mut server {
                None => server = Some(self.start()?),
                Some(running) => match running.child.try_wait().map_err(Error::io("wait for server"))? {
                    None => {}
                    // Another one has the lock.
                    Some(status) if status.success() => (server, pause) = (None, RETRY),
                    Some(status) => return Err(Failure::failed(running.last_words(&status.to_string())).into()),
                },
            }
            if Instant::now() > deadline {
                if let Some(server) = server {
                    server.end();
                }
                return Err(self.too_slow("start"));
            }
            thread::sleep(pause);
        }
    }

    fn no_server(&self) -> Error {
        Error::NoServer(self.home.path().to_owned())
    }

    fn does_not_listen(&self, pid: i32) -> Error {
        let (home, which) =
            (self.home.path().display(), if pid == 0 { String::new() } else { format!(" (pid {pid})") });
        Failure::new(ErrorKind::DoesNotAnswer, format!("the server of {home}{which} does not listen")).into()
    }

    fn too_slow(&self, verb: &str) -> Error {
        let home = self.home.path().display();
        Failure::timed_out(format!("{verb} server of {home}: no greeting within {} s", PATIENCE.as_secs())).into()
    }

    fn start(&self) -> Result<Server, Error> {
        let binary = self.find_binary()?;
        let log = self.open_log().map_err(Error::io(format!("open {}", self.home.log().display())))?;
        let (log_start, stderr) = log;
        let child = Command::new(&binary)
            .arg0(BINARY)
            .arg("--home")
            .arg(self.home.path())
            .args(["--log-level", self.log_level.as_str(), "serve", "--background"])
            .stdin(Stdio::null())
            // Its last words, if it cannot start: there may be no room for them in the log.
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .map_err(Error::io(format!("start server {}", binary.display())))?;
        log::info!("started server {} of {} (pid {})", binary.display(), self.home.path().display(), child.id());
        Ok(Server { child, log: self.home.log(), log_start })
    }

    fn open_log(&self) -> io::Result<(u64, File)> {
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(self.home.log())?;
        Ok((log.metadata()?.len(), log))
    }

    /// The `offshoot` binary: the one asked for, else `OFFSHOOT_BIN`, else this program if it is that, else the one
    /// beside this program or above it (`target/debug/deps`), else the one in `PATH`.
    fn find_binary(&self) -> Result<PathBuf, Error> {
        let asked =
            self.binary.clone().or_else(|| env::var_os("OFFSHOOT_BIN").filter(|bin| !bin.is_empty()).map(Into::into));
        if let Some(binary) = asked {
            return Ok(binary);
        }
        env::current_exe()
            .ok()
            .and_then(|this| binary_near(&this))
            .or_else(|| binary_in(&env::var_os("PATH").unwrap_or_default()))
            .ok_or_else(|| {
                Error::bad_request(
                    "start server: there is no `offshoot` binary near this program or in PATH; set OFFSHOOT_BIN",
                )
            })
    }
}

const BINARY: &str = "offshoot";

fn binary_near(this: &Path) -> Option<PathBuf> {
    if this.file_name() == Some(OsStr::new(BINARY)) {
        return Some(this.to_owned());
    }
    this.ancestors().skip(1).take(2).map(|directory| directory.join(BINARY)).find(|path| path.is_file())
}

fn binary_in(path: &OsString) -> Option<PathBuf> {
    env::split_paths(path).map(|directory| directory.join(BINARY)).find(|path| path.is_file())
}

/// No server listens (any more, or yet).
fn is_absent(e: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(e.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof)
}

/// A server process that has not greeted yet.
struct Server {
    child: Child,
    log: PathBuf,
    /// Bytes that its log had before.
    log_start: u64,
}

impl Server {
    /// Lets it go its way. A thread stays behind, so that it is no zombie where this process outlives it.
    fn release(mut self) -> i32 {
        let pid = self.child.id() as i32;
        thread::spawn(move || self.child.wait());
        pid
    }

    fn end(mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The last line it wrote, for a server that ended with `status`.
    fn last_words(&mut self, status: &str) -> String {
        let (mut told, mut logged) = (Vec::new(), String::new());
        // It has ended, and what it has started has no part in this pipe.
        let heard = self.child.stdout.take().map(|pipe| pipe.take(WORDS_MAX).read_to_end(&mut told));
        let read = File::open(&self.log).and_then(|mut log| {
            log.seek(SeekFrom::Start(self.log_start))?;
            log.read_to_string(&mut logged)
        });
        let told = String::from_utf8_lossy(&told);
        let last = |text: &str| text.lines().rfind(|line| !line.trim().is_empty()).map(str::to_owned);
        let told = last(&told).filter(|_| matches!(heard, Some(Ok(_))));
        match told.or_else(|| last(&logged).filter(|_| read.is_ok())) {
            Some(line) => format!("start server: {}", line.trim_start_matches("offshoot: ")),
            None => format!("start server: it ended with {status} and left no word in {}", self.log.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::TempDir;
    use std::fs;

    #[test]
    fn the_binary_is_found_near_a_test() {
        let dir = TempDir::new();
        let deps = dir.path().join("deps");
        fs::create_dir(&deps).unwrap();
        assert_eq!(binary_near(&deps.join("test-1")), None);
        fs::write(dir.path().join("offshoot"), "").unwrap();
        assert_eq!(binary_near(&deps.join("test-1")), Some(dir.path().join("offshoot")));
        assert_eq!(binary_near(Path::new("/x/offshoot")), Some("/x/offshoot".into()));
        assert_eq!(binary_in(&dir.path().into()), Some(dir.path().join("offshoot")));
    }

    fn launcher(dir: &TempDir, binary: &str) -> Launcher {
        let home = Home::at(dir.path().join("home")).unwrap();
        Launcher { home, binary: Some(binary.into()), start: true, log_level: log::LevelFilter::Warn }
    }

    #[test]
    fn a_server_that_cannot_start_says_why() {
        let dir = TempDir::new();
        // `ls` has no `--home`, and says so in two lines, as whom it was called.
        let e = launcher(&dir, "ls").connect().unwrap_err().to_string();
        assert!(e.starts_with("start server: Try 'offshoot --help'"), "{e}");
        let e = launcher(&dir, "false").connect().unwrap_err().to_string();
        assert!(e.contains("exit status: 1") && e.ends_with("server.log"), "{e}");
        let e = launcher(&dir, "/nowhere/offshoot").connect().unwrap_err().to_string();
        assert!(e.starts_with("start server /nowhere/offshoot: No such file"), "{e}");
    }

    #[test]
    fn no_server_is_started_unasked() {
        let dir = TempDir::new();
        let launcher = Launcher { start: false, ..launcher(&dir, "false") };
        assert!(matches!(launcher.connect(), Err(Error::NoServer(_))));
        assert!(!launcher.home.path().exists());
        // Nor is one that is there, and cannot be reached, taken for none: it would be said to have been shut down.
        launcher.home.create().unwrap();
        let _lock = launcher.home.lock().unwrap();
        let e = launcher.connect().unwrap_err();
        assert!(e.kind() == ErrorKind::DoesNotAnswer && e.to_string().ends_with("does not listen"), "{e}");
    }
}
