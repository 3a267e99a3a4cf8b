//! A home of a test's own, its server, and the proof that nothing of it is left.

use crate::binary::binary;
use crate::turn::{Company, Turn};
use crate::{Lack, Outcome, TEN_SECONDS, is_root, process, skip};
use nix::unistd::{Gid, Uid, chown, mkdtemp};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;
use std::{env, fs, thread};
use vmm::api::Totals;
use vmm::client::{Client, Home, LaunchOptions, Vm};
use vmm::units::ByteSize;

/// As whom a test's commands run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum User {
    /// As the test.
    #[default]
    Same,
    /// As somebody without any right but to use `/dev/kvm` and `/dev/userfaultfd`. Takes root to become.
    Ordinary(u32),
    /// As the test, on a host without devices. Takes root to hide them.
    WithoutDevices,
    /// As root that may not administer anything, as in most containers: it gets no namespaces.
    WithoutAdmin,
    /// As root of a user namespace that has no other user, as in a rootless container.
    RootOfNamespace,
}

/// What a test needs.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Whom it can bear beside it.
    pub company: Company,
    /// As whom its commands run.
    pub user: User,
    /// Features of the host that its server is to do without (`OFFSHOOT_DISABLE`).
    pub disable: &'static str,
}

impl Setup {
    /// A home, or none where this host has no KVM; then it is told loudly.
    #[must_use]
    pub fn home(self) -> Option<TestHome> {
        if let Err(e) = vmm::host::open_kvm() {
            skip(Lack::Kvm, e);
            return None;
        }
        if self.user != User::Same && !is_root() {
            skip(Lack::Root, "only root can become another user");
            return None;
        }
        // Building may take long, and is nothing to wait for a turn with.
        let binary = binary();
        let turn = Turn::wait(self.company);
        let directory = mkdtemp(&env::temp_dir().join("offshoot-it-XXXXXX")).expect("make a temporary directory");
        let home = TestHome { directory, setup: self, client: OnceLock::new(), _turn: turn };
        if let User::Ordinary(id) = home.setup.user {
            home.make_usable_for(id, binary);
        }
        Some(home)
    }
}

/// A home of a test's own. When this is dropped, its server is shut down, and nothing of it may be left.
#[derive(Debug)]
pub struct TestHome {
    directory: PathBuf,
    setup: Setup,
    client: OnceLock<Client>,
    _turn: Turn,
}

impl TestHome {
    /// A home beside those of other tests.
    #[must_use]
    pub fn new() -> Option<Self> {
        Setup::default().home()
    }

    /// A home while no other test runs.
    #[must_use]
    pub fn alone() -> Option<Self> {
        Setup { company: Company::None, ..Setup::default() }.home()
    }

    /// Where the server is.
    pub fn path(&self) -> PathBuf {
        self.directory.join("home")
    }

    /// Its client. The server is started with the first.
    pub fn client(&self) -> &Client {
        self.client.get_or_init(|| self.connect())
    }

    fn connect(&self) -> Client {
        if !self.setup.disable.is_empty() || self.setup.user != User::Same {
            self.cli(&["budget", "none"]).good();
        }
        Client::builder().home(self.path()).binary(binary()).connect().expect("start a server and connect to it")
    }

    /// Launches a VM.
    #[track_caller]
    pub fn launch(&self, name: &str, memory: ByteSize) -> Vm {
        let launched = self.client().launch(LaunchOptions::new().name(name).memory(memory));
        launched.unwrap_or_else(|e| panic!("launch {name}: {e}"))
    }

    /// The server's process, if it runs.
    pub fn server(&self) -> Option<i32> {
        Home::at(self.path())
            .and_then(|home| home.server_pid().map_err(std::io::Error::other))
            .expect("ask for the server")
    }

    /// The server's children but its zygote: VM processes, pool and keepers.
    pub fn processes(&self) -> Vec<i32> {
        let mut children = self.children();
        children.retain(|&pid| !process::is_zygote(pid));
        children
    }

    /// The server's zygote.
    pub fn zygote(&self) -> Option<i32> {
        self.children().into_iter().find(|&pid| process::is_zygote(pid))
    }

    fn children(&self) -> Vec<i32> {
        self.server().map(process::children_of).unwrap_or_default()
    }

    /// The server's figures in total.
    #[track_caller]
    pub fn totals(&self) -> Totals {
        self.client().stats().expect("stats").total
    }

    /// Has the server check its invariants, all of which must hold.
    #[track_caller]
    pub fn check(&self) {
        let report = self.client().check().expect("check");
        assert!(report.broken.is_empty(), "{report:?}");
    }

    /// What is in the home.
    pub fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path()).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// What the server has said, if it had a reason to.
    pub fn server_log(&self) -> String {
        fs::read_to_string(self.path().join("server.log")).unwrap_or_default()
    }

    /// Runs `offshoot` with these arguments.
    pub fn cli(&self, arguments: &[&str]) -> Outcome {
        self.cli_with_input(arguments, "")
    }

    /// Runs `offshoot` with these arguments and this input.
    pub fn cli_with_input(&self, arguments: &[&str], input: &str) -> Outcome {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("run the offshoot binary");
        // A command that reads nothing may have ended.
        let _ = child.stdin.take().expect("stdin is a pipe").write_all(input.as_bytes());
        let output = child.wait_with_output().expect("wait for a command");
        Outcome::new(arguments.join(" "), output)
    }

    /// `offshoot` with these arguments, for two minutes at most, as the setup's user.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut words: Vec<OsString> = ["timeout", "--kill-after=5", "120"].map(Into::into).into();
        match self.setup.user {
            User::Same => words.push(binary().into()),
            User::Ordinary(id) => {
                let script = ORDINARY.replace("UID", &id.to_string());
                words.extend(["unshare", "--mount", "sh", "-ec"].map(OsString::from));
                words.extend([
                    script.into(),
                    self.directory.join("dev").into(),
                    self.directory.join("offshoot").into(),
                ]);
            }
            User::WithoutDevices => {
                words.extend(["unshare", "--mount", "sh", "-ec"].map(OsString::from));
                words.extend(["mount -t tmpfs none /dev; exec \"$@\"".into(), "sh".into(), binary().into()]);
            }
            User::WithoutAdmin => {
                words.extend(["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"].map(OsString::from));
                words.push(binary().into());
            }
            User::RootOfNamespace => words.extend(["unshare".into(), "--map-root-user".into(), binary().into()]),
        }
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg("--home").arg(self.path()).args(arguments);
        command.env("OFFSHOOT_DISABLE", self.setup.disable);
        for variable in ["OFFSHOOT_HOME", "OFFSHOOT_BIN", "XDG_RUNTIME_DIR"] {
            command.env_remove(variable);
        }
        command
    }

    fn make_usable_for(&self, id: u32, binary: &Path) {
        let own =
            |path: &Path| chown(path, Some(Uid::from_raw(id)), Some(Gid::from_raw(id))).expect("give a file away");
        // The binary may be where only root can go.
        fs::copy(binary, self.directory.join("offshoot")).expect("copy the binary");
        fs::create_dir(self.directory.join("dev")).expect("make a directory");
        own(&self.directory);
    }

    fn shut_down(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let Some(server) = self.server() else { return self.files_left() };
        let children = process::children_of(server);
        let outcome = self.cli(&["shutdown"]);
        if outcome.code != 0 {
            wrong.push(format!("shutdown failed: {outcome:?}"));
            process::kill(server);
        }
        let deadline = Instant::now() + TEN_SECONDS;
        let left = || children.iter().chain([&server]).copied().filter(|&pid| process::is_alive(pid));
        while left().next().is_some() && Instant::now() < deadline {
            thread::sleep(std::time::Duration::from_millis(2));
        }
        for pid in left() {
            wrong.push(format!("process {pid} was left behind"));
            process::kill(pid);
        }
        wrong.extend(self.files_left());
        wrong
    }

    /// A home that was used keeps its log and its lock, and nothing else.
    fn files_left(&self) -> Vec<String> {
        let files = self.files();
        let left = !files.is_empty() && files != ["lock", "server.log"];
        left.then(|| format!("files were left behind: {files:?}")).into_iter().collect()
    }
}

/// With `dev` as $0: shows only what an ordinary user may use, then becomes one.
const ORDINARY: &str = "mount -t tmpfs -o mode=755 none \"$0\"
for device in kvm userfaultfd; do
  [ -e /dev/$device ] || continue
  mknod -m 666 \"$0/$device\" c $(stat -c '0x%t 0x%T' /dev/$device)
  mount --bind \"$0/$device\" /dev/$device
done
exec setpriv --reuid=UID --regid=UID --clear-groups --inh-caps=-all \"$@\"";

impl Drop for TestHome {
    fn drop(&mut self) {
        let mut wrong = self.shut_down();
        let log = self.server_log();
        if log.contains("panicked at") {
            wrong.push("the server, or a VM process, panicked".into());
        }
        let _ = fs::remove_dir_all(&self.directory);
        if !wrong.is_empty() || thread::panicking() {
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- the end of {}/home/server.log:", self.directory.display());
            lines[lines.len().saturating_sub(40)..].iter().for_each(|line| eprintln!("{line}"));
            eprintln!("---");
        }
        if !wrong.is_empty() && !thread::panicking() {
            panic!("{}", wrong.join("; "));
        }
    }
}
