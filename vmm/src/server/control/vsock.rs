//! `connect`, and what else connects programs of the host with guests. Each connection is a socket that the VM's process has one
//! end of, and a program the other.

use crate::api::{Answer, Connected, ErrorKind, Failure};
use crate::devices::virtio::Outcome;
use crate::server::Server;
use crate::server::clients::connects::Asked;
use crate::server::clients::deadlines::Deadline;
use crate::server::clients::doors::Visit;
use crate::server::fork::op::Step;
use crate::server::ids::{ClientId, Generation, VisitorId};
use crate::wire::{Machine, ToVm};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

impl Server {
    pub fn connect(&mut self, client: ClientId, name: &str, port: u32, timeout_ms: u64) {
        let asked = self.find_talking(name).and_then(|vm| {
            let ends = self.clients.connects.ask(vm, client, port);
            ends.map(|ends| (vm, ends)).map_err(|e| Failure::host(format!("a socket: {e}")))
        });
        match asked {
            Err(failure) => self.reply(client, Err(failure)),
            Ok((vm, (tag, socket))) => {
                self.hand_over(vm, &ToVm::Connect { tag, port, greet: false }, Some(socket));
                self.set_deadline(Some(timeout_ms), Deadline::Connect(vm, tag));
            }
        }
    }

    /// A VM whose guest might answer a connection.
    fn find_talking(&self, name: &str) -> Result<Generation, Failure> {
        let generation = self.find_started(name)?;
        let vm = self.find(name)?;
        if vm.shape.machine != Machine::Linux {
            let why = format!("VM {name:?} has the built-in guest, which has no sockets");
            return Err(Failure::new(ErrorKind::Unsupported, why));
        }
        match vm.run.is_paused() {
            true => Err(Failure::new(ErrorKind::NotRunning, format!("VM {name:?} is paused"))),
            false => Ok(generation),
        }
    }

    /// A VM's process says what came of a request for a connection.
    pub fn connection_came(&mut self, vm: Generation, tag: u64, outcome: Outcome) {
        let Some((asked, outcome)) = self.clients.connects.answered(vm, tag, outcome) else {
            return log::debug!("{vm:?} tells of a connection that nobody asked for");
        };
        self.deadlines.met(Deadline::Connect(vm, tag));
        let Some(record) = self.registry.vms.get(vm) else { return };
        let Asked { client, port, socket, .. } = asked;
        let refused = match outcome {
            Outcome::Accepted => {
                let generation = record.parent().map_or(0, |_| vm.0);
                let connected = Connected { name: record.name.clone(), generation };
                return self.clients.reply_with(client, Answer::Connected(connected), socket, &mut self.watches);
            }
            Outcome::Refused => format!("nothing listens on port {port} of VM {:?}", record.name),
            Outcome::Full => format!("VM {:?} has as many connections as it may have", record.name),
        };
        self.reply(client, Err(Failure::new(ErrorKind::Refused, refused)));
    }

    /// The guest has not answered in time.
    pub fn connection_late(&mut self, vm: Generation, tag: u64) {
        let Some(Asked { client, port, .. }) = self.clients.connects.late(tag) else { return };
        let name = self.registry.vms.get(vm).map_or("", |vm| &vm.name);
        let why = format!("port {port} of VM {name:?}: no answer from the guest in time");
        self.reply(client, Err(Failure::timed_out(why)));
    }

    /// A guest wants to be connected to a port of the host's: to the socket that a program listens on for that.
    pub fn guest_connects(&mut self, vm: Generation, tag: u64, port: u32) {
        let path = self.clients.doors.outward(vm, port).or_else(|| self.outward(vm, port));
        let socket = path.and_then(|path| {
            let called = call(&path);
            called.inspect_err(|e| log::debug!("{vm:?} connects to {}: {e}", path.display())).ok()
        });
        self.hand_over(vm, &ToVm::Connected { tag }, socket);
    }

    /// Where connections of a guest go whose VM has no socket of its own.
    fn outward(&self, vm: Generation, port: u32) -> Option<PathBuf> {
        let name = &self.registry.vms.get(vm)?.name;
        Some(self.home.path().join("vsock").join(format!("{name}_{port}")))
    }

    /// A program that has come to a guest's door says something.
    pub fn hear_visitor(&mut self, id: VisitorId) {
        let Some(Visit { vm, port, stream }) = self.clients.doors.hear(id, &mut self.watches) else { return };
        // Nobody waits for what comes of it but the program, and it sees that.
        let tag = self.clients.connects.fresh_tag();
        self.hand_over(vm, &ToVm::Connect { tag, port, greet: true }, Some(stream.into()));
    }

    pub fn answer_door(&mut self, vm: Generation) {
        self.clients.doors.accept(vm, Instant::now(), &mut self.watches);
    }

    /// Tells a VM's process something, with a descriptor.
    fn hand_over(&mut self, vm: Generation, message: &ToVm, socket: Option<OwnedFd>) {
        let process = self.registry.vms.get(vm).and_then(|vm| vm.process);
        if let Some(process) = process.and_then(|id| self.procs.all.get_mut(&id)) {
            let sockets: Vec<_> = socket.iter().map(AsFd::as_fd).collect();
            process.send(message, &sockets);
        }
    }

    /// A VM has ended: nobody is connected to its guest any more, and no fork waits for its agent.
    pub fn connections_end(&mut self, vm: Generation) -> Vec<ClientId> {
        if let Some(fork) = self.forks.of_child(vm) {
            fork.child(vm, Step::NoAgent);
        }
        self.clients.doors.ended(vm, &mut self.watches);
        self.clients.connects.ended(vm)
    }
}

/// Connects to a socket, or does not: a program that does not accept is not waited for.
fn call(path: &Path) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}
