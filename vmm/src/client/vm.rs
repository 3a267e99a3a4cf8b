//! One VM, and what can be asked of it.

use super::expect::Expectation;
use super::{Client, Error, ForkOptions, Stream, answer, check_vm_name};
use crate::api::{
    Answer, Balloon, Child, Connected, ErrorKind, Failure, Inspection, Reclaimed, Request, Stats, VmStats, VmSummary,
};
use crate::units::ByteSize;
use regex::Regex;
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A VM, by its name. Dropping this does nothing to it.
#[derive(Clone, Debug)]
pub struct Vm {
    client: Client,
    name: String,
}

/// A child, and how its fork went.
#[derive(Clone, Debug)]
pub struct Forked {
    /// The child.
    pub vm: Vm,
    /// Times in microseconds, and counts of pages.
    pub figures: Child,
}

impl Vm {
    pub(super) fn new(client: Client, name: String) -> Self {
        Self { client, name }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// This VM, to be removed when the value is dropped.
    pub fn scoped(self) -> Scoped {
        Scoped(self)
    }

    /// Forks it while it runs (or stands still). The children come in the order of their numbers.
    pub fn fork(&self, options: ForkOptions) -> Result<Vec<Forked>, Error> {
        let request = Request::Fork(options.of(&self.name)?);
        let children = answer!(self.client.call(&request), "fork", Forked)?;
        let forked = |figures: Child| Forked { vm: self.client.vm(&figures.name), figures };
        Ok(children.into_iter().map(forked).collect())
    }

    /// Takes that much out of memory, of this VM and its family: to swap, cold pages first. It may be less.
    pub fn reclaim(&self, size: ByteSize) -> Result<Reclaimed, Error> {
        check_vm_name("reclaim", &self.name)?;
        let request = Request::Reclaim { name: Some(self.name.clone()), size_bytes: size.0 };
        answer!(self.client.call(&request), "reclaim", Reclaimed)
    }

    /// Sends the guest a line. Returns what followed its `ok`; an `err` is [`Error::Guest`].
    pub fn send(&self, text: &str, timeout: Duration) -> Result<String, Error> {
        let answer = self.ask(text, timeout)?;
        let rest = |word| answer.strip_prefix(word).filter(|rest| rest.is_empty() || rest.starts_with(' '));
        match (rest("ok"), rest("err")) {
            (Some(rest), _) => Ok(rest.trim_start().to_owned()),
            (_, Some(rest)) => Err(Error::Guest(rest.trim_start().to_owned())),
            _ => Err(Error::Protocol("send")),
        }
    }

    /// Sends the guest a line, and returns its answer as it is: `ok …` or `err …`.
    pub fn ask(&self, text: &str, timeout: Duration) -> Result<String, Error> {
        self.tell(text, timeout)?.ok_or(Error::Protocol("send"))
    }

    /// Sends the guest a line. Returns the built-in guest's answer as it is; a Linux guest, on whose serial console the
    /// line is typed, gives none.
    pub fn tell(&self, text: &str, timeout: Duration) -> Result<Option<String>, Error> {
        let name = self.checked_name("send")?;
        if text.contains(['\n', '\r']) {
            return Err(Failure::bad_request(format!("send {name}: a line has no newline in it")).about(name).into());
        }
        let timeout_ms = timeout.as_millis().try_into().unwrap_or(u64::MAX);
        match self.client.call(&Request::Send { name, text: text.to_owned(), timeout_ms })? {
            Answer::Said(answer) => Ok(Some(answer)),
            Answer::Done => Ok(None),
            _ => Err(Error::Protocol("send")),
        }
    }

    /// Connects to a port of a Linux guest's vsock, and waits until the guest has accepted. The stream leads straight to the
    /// guest. At a fork it stays with this VM; a child has none of its parent's.
    ///
    /// # Errors
    /// Of kind `Refused` where nothing listens on that port, `TimedOut` where the guest does not answer.
    pub fn connect(&self, port: u32, timeout: Duration) -> Result<(UnixStream, Connected), Error> {
        let name = self.checked_name("connect")?;
        let timeout_ms = timeout.as_millis().try_into().unwrap_or(u64::MAX);
        self.client.call_for_socket(&Request::Connect { name, port, timeout_ms })
    }

    /// Types a line on the serial console, and waits until `pattern` is in what is printed after it. Returns the lines
    /// that it is in. The echo of the line itself does not count.
    pub fn expect(&self, text: &str, pattern: &Regex, timeout: Duration) -> Result<String, Error> {
        let console = self.console()?;
        Expectation { text, pattern, timeout }.await_on(console, &self.name)
    }

    /// Has the guest give memory back, or take some back, until it has `size` left, and waits until it has: at least 16 MiB,
    /// and not more than its memory. Of a Linux guest that is late an error of kind `TimedOut` says how far it has got; it goes on.
    pub fn balloon(&self, size: ByteSize, timeout: Duration) -> Result<Balloon, Error> {
        let name = self.checked_name("balloon")?;
        size.as_guest_memory().map_err(|e| Failure::bad_request(format!("balloon {name}: {e}")).about(&name))?;
        let timeout_ms = timeout.as_millis().try_into().unwrap_or(u64::MAX);
        answer!(self.client.call(&Request::Balloon { name, size_bytes: size.0, timeout_ms }), "balloon", Ballooned)
    }

    /// Stops its vCPUs.
    pub fn pause(&self) -> Result<(), Error> {
        answer!(self.client.call(&Request::Pause { name: self.checked_name("pause")? }), "pause")
    }

    /// Lets them run again.
    pub fn resume(&self) -> Result<(), Error> {
        answer!(self.client.call(&Request::Resume { name: self.checked_name("resume")? }), "resume")
    }

    /// Asks the guest to power off, and does not wait until it has.
    pub fn stop(&self) -> Result<(), Error> {
        answer!(self.client.call(&Request::Stop { name: self.checked_name("stop")? }), "stop")
    }

    /// Ends it at once, and keeps it listed, as dead. Its process is gone when this returns.
    pub fn kill(&self) -> Result<(), Error> {
        answer!(self.client.call(&Request::Kill { name: self.checked_name("kill")? }), "kill")
    }

    /// Waits until it is off or dead, for ever where there is no time-out.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<VmSummary, Error> {
        let name = self.checked_name("wait")?;
        let timeout_ms = timeout.map(|timeout| timeout.as_millis().try_into().unwrap_or(u64::MAX));
        answer!(self.client.call(&Request::Wait { name, timeout_ms }), "wait", Ended)
    }

    /// Ends it and forgets it.
    pub fn remove(self) -> Result<(), Error> {
        match self.client.remove([&self.name])?.missing.is_empty() {
            true => Ok(()),
            false => Err(no_such_vm(&self.name)),
        }
    }

    /// Its row of the list.
    pub fn summary(&self) -> Result<VmSummary, Error> {
        let name = self.checked_name("ls")?;
        self.client.list()?.into_iter().find(|vm| vm.name == name).ok_or_else(|| no_such_vm(&name))
    }

    /// Its figures.
    pub fn stats(&self) -> Result<VmStats, Error> {
        self.stats_and_totals()?.vms.pop().ok_or(Error::Protocol("stats"))
    }

    /// Its figures, and the server's in total.
    pub fn stats_and_totals(&self) -> Result<Stats, Error> {
        answer!(self.client.call(&Request::Stats { name: Some(self.checked_name("stats")?) }), "stats", Stats)
    }

    /// Everything about it.
    pub fn inspect(&self) -> Result<Inspection, Error> {
        let name = self.checked_name("inspect")?;
        answer!(self.client.call(&Request::Inspect { name }), "inspect", Inspected).map(|inspection| *inspection)
    }

    /// What the guest has printed, and its answers that nobody waited for: the last `tail_lines`, or all that is kept.
    pub fn logs(&self, tail_lines: Option<u64>) -> Result<Stream, Error> {
        let name = self.checked_name("logs")?;
        self.client.call_stream("logs", &Request::Logs { name, follow: false, tail_lines })
    }

    /// The same, and then what is to come, until the VM ends.
    pub fn follow_logs(&self, tail_lines: Option<u64>) -> Result<Stream, Error> {
        let name = self.checked_name("logs")?;
        self.client.call_stream("logs", &Request::Logs { name, follow: true, tail_lines })
    }

    /// Its serial console, to read and to write.
    pub fn console(&self) -> Result<Stream, Error> {
        self.client.call_stream("console", &Request::Console { name: self.checked_name("console")? })
    }

    fn checked_name(&self, operation: &str) -> Result<String, Error> {
        check_vm_name(operation, &self.name)?;
        Ok(self.name.clone())
    }
}

fn no_such_vm(name: &str) -> Error {
    Failure::new(ErrorKind::NoSuchVm, format!("there is no VM {name:?}")).about(name).into()
}

/// A VM that is removed when this is dropped.
#[derive(Debug)]
pub struct Scoped(Vm);

impl Deref for Scoped {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.0
    }
}

impl Drop for Scoped {
    fn drop(&mut self) {
        if let Err(e) = self.0.clone().remove() {
            log::warn!("remove {}: {e}", self.0.name);
        }
    }
}
