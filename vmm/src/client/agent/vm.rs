//! What a VM has of its agent.

use super::{Agent, Command, Error, Forward, Identity, Output};
use crate::api::{Connected, ErrorKind, Failure};
use crate::client::Vm;
use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

/// How long a guest may take to accept a connection.
const ACCEPT: Duration = Duration::from_secs(10);

impl Vm {
    /// The agent of a Linux guest. Whether it has one shows when it is asked for something.
    pub fn agent(&self) -> Agent {
        let vm = self.clone();
        Agent::by(self.name(), move || {
            let (stream, Connected { name, generation }) =
                vm.connect(::agent::PORT, ACCEPT).map_err(|e| unreached(vm.name(), e))?;
            Ok((stream, Identity { name, generation }))
        })
    }

    /// A program to run in a Linux guest, with its arguments.
    pub fn command(&self, argv: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        self.agent().command(argv)
    }

    /// Runs a program in a Linux guest without input, and waits until it has ended: `vm.exec(["cargo", "test"])?.status`.
    pub fn exec(&self, argv: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Output, Error> {
        self.agent().exec(argv)
    }

    /// Copies a file or a tree into a Linux guest, as [`Agent::copy_in`].
    pub fn copy_in(&self, from: &Path, to: impl AsRef<OsStr>) -> Result<(), Error> {
        self.agent().copy_in(from, to)
    }

    /// Copies a file or a tree out of a Linux guest, as [`Agent::copy_out`].
    pub fn copy_out(&self, from: impl AsRef<OsStr>, to: &Path) -> Result<(), Error> {
        self.agent().copy_out(from, to)
    }

    /// Has a free port of the host's loopback lead to a TCP port of a Linux guest's. What becomes of connections that cannot be
    /// made goes to the log.
    pub fn forward(&self, guest_port: u16) -> Result<Forward, Error> {
        self.agent().forward(0, guest_port, |e| log::warn!("forward: {e}"))
    }
}

/// The guest has refused, or did not answer: that means its agent here.
fn unreached(name: &str, e: Error) -> Error {
    match e.kind() {
        ErrorKind::Refused => {
            let why = format!("{name}: no agent listens in this guest (launch --agent gives it one)");
            Failure::new(ErrorKind::Refused, why).about(name).into()
        }
        _ => e,
    }
}
