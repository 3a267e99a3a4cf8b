//! The agent of Linux guests as a program of this host.

use crate::{Outcome, TEN_SECONDS, TestHome, offshoot_binary, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use vmm::client::agent::{Agent, Identity};

/// An agent with a directory of its own.
#[derive(Debug)]
pub struct AgentHost {
    process: Child,
    directory: PathBuf,
    socket: PathBuf,
}

impl AgentHost {
    /// One that runs.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it starts a process")]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("offshoot-agent-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        let socket = directory.join("socket");
        Self::listening(directory, socket)
    }

    /// One to which the guest of the test kernel passes on who asks for the agent of that VM. It can be told of forks.
    #[must_use]
    pub fn of_vm(home: &TestHome, name: &str) -> Self {
        let (directory, sockets) = (home.path().with_file_name(format!("agent-{name}")), home.path().join("vsock"));
        fs::create_dir_all(&sockets).unwrap();
        for below in ["root/etc", "root/dev", "root/proc/sys/kernel"] {
            fs::create_dir_all(directory.join(below)).unwrap();
        }
        let host = Self::listening(directory, sockets.join(format!("{name}_{}", agent::PORT)));
        symlink("/dev/urandom", host.root("dev/urandom")).unwrap();
        for file in ["proc/sys/kernel/hostname", "etc/machine-id"] {
            fs::write(host.root(file), "parent").unwrap();
        }
        host
    }

    fn listening(directory: PathBuf, socket: PathBuf) -> Self {
        fs::create_dir_all(directory.join("root/etc")).unwrap();
        let program = directory.join("agent");
        fs::write(&program, agent::IMAGE).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(&program);
        command.arg("--root").arg(directory.join("root")).arg("--listen").arg(&socket);
        let process = command.spawn().unwrap();
        wait_until("the agent listens", TEN_SECONDS, || UnixStream::connect(&socket).is_ok());
        Self { process, directory, socket }
    }

    /// It, as the agent of a VM that was launched.
    #[must_use]
    pub fn agent(&self) -> Agent {
        self.agent_of("vm", 0)
    }

    /// It, as the agent of a VM of that name and generation.
    #[must_use]
    pub fn agent_of(&self, name: &str, generation: u64) -> Agent {
        Agent::at_socket(Identity { name: name.into(), generation }, self.socket())
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// A directory for what a test makes.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id() as i32)
    }

    /// `offshoot` with these arguments, for which every VM's agent is this one.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        command_at(&self.socket(), &self.directory, arguments)
    }

    /// Runs `offshoot` with these arguments, and nothing to read.
    #[must_use]
    pub fn cli(&self, arguments: &[&str]) -> Outcome {
        let output = self.command(arguments).stdin(Stdio::null()).output().expect("run the offshoot binary");
        Outcome::new(arguments.join(" "), output)
    }

    /// A file of the system that it serves.
    #[must_use]
    pub fn root(&self, path: &str) -> PathBuf {
        self.directory.join("root").join(path)
    }

    /// How much there is of something in its `/proc`: `fd`, `task`.
    #[must_use]
    pub fn count(&self, what: &str) -> usize {
        fs::read_dir(format!("/proc/{}/{what}", self.process.id())).unwrap().count()
    }
}

impl Drop for AgentHost {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.process.id() as i32), Signal::SIGKILL);
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// `offshoot` with these arguments, for which the agent that listens at `socket` is every VM's.
#[must_use]
pub fn command_at(socket: &Path, directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(offshoot_binary());
    command.arg("--home").arg(directory.join("home")).args(arguments).env("OFFSHOOT_AGENT_SOCKET", socket);
    command
}
