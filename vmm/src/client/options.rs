//! What a launch and a fork can be told.

use super::{Error, check_vm_name, initrd};
use crate::api::{DEFAULT_MEMORY, ErrorKind, Failure, Fork, Launch, Linux, MAX_CHILDREN, MAX_VCPUS};
use crate::boot::linux::{self, DEFAULT_CMDLINE, Plan};
use crate::host;
use crate::units::ByteSize;
use guest_mem::PageCount;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A launch: the built-in guest with 256 MiB and one vCPU, where nothing else is asked for.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    pub(super) launch: Launch,
    agent: bool,
}

impl Default for LaunchOptions {
    fn default() -> Self {
        let launch = Launch {
            name: None,
            mem_bytes: DEFAULT_MEMORY,
            vcpus: 1,
            remove_when_off: false,
            linux: None,
            shared: Vec::new(),
            ttl_ms: None,
            max_children: None,
            vsock: None,
        };
        Self { launch, agent: false }
    }
}

impl LaunchOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The VM's name; without it, the server makes one.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.launch.name = Some(name.into());
        self
    }

    /// Its memory: at least 16 MiB, whole pages of 4 KiB, and no more than the host can give.
    pub fn memory(mut self, size: ByteSize) -> Self {
        self.launch.mem_bytes = size.0;
        self
    }

    /// A Linux guest instead of the built-in one, with the command line `console=ttyS0 panic=-1` if it gets no other.
    ///
    /// # Errors
    /// There is no current directory that the path could be relative to.
    pub fn kernel(mut self, path: impl AsRef<Path>) -> Result<Self, Error> {
        let kernel = absolute("kernel", path.as_ref())?;
        self.launch.linux = Some(Linux { kernel, initrd: None, cmdline: DEFAULT_CMDLINE.into() });
        Ok(self)
    }

    /// The Linux guest's initial RAM disk.
    ///
    /// # Errors
    /// As above, or no kernel was given.
    pub fn initrd(mut self, path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = absolute("initrd", path.as_ref())?;
        self.linux("an initrd")?.initrd = Some(path);
        Ok(self)
    }

    /// The Linux guest's command line.
    ///
    /// # Errors
    /// No kernel was given.
    pub fn cmdline(mut self, text: impl Into<String>) -> Result<Self, Error> {
        self.linux("a command line")?.cmdline = text.into();
        Ok(self)
    }

    /// Gives the Linux guest the agent, with the modules of its kernel that it takes to talk to it: those that lie beside the
    /// kernel as in an unpacked package, or this host's of the same version. Without an initial RAM disk of the user's, the
    /// agent is the guest's init; with one, it runs beside the init in that.
    ///
    /// # Errors
    /// No kernel was given.
    pub fn agent(mut self, agent: bool) -> Result<Self, Error> {
        if agent {
            self.linux("the agent")?;
        }
        self.agent = agent;
        Ok(self)
    }

    /// What is to go into the guest's initial RAM disk.
    fn plan_of_initrd(&self, guest: &Linux) -> Result<initrd::Plan, String> {
        if guest.initrd.is_some() && guest.cmdline.split_whitespace().any(|word| word.starts_with("rdinit=")) {
            return Err("a command line with rdinit= does not go with the agent, which is that itself".into());
        }
        initrd::Plan::new(&guest.kernel)
    }

    /// The same with the initial RAM disk that has the agent, which is made and kept in the home.
    pub(super) fn prepared(mut self, home: &Path) -> Result<Self, Error> {
        let (true, Some(guest)) = (self.agent, &self.launch.linux) else { return Ok(self) };
        let about = |e: String| Error::bad_request(format!("{}: {e}", self.operation()));
        let plan = self.plan_of_initrd(guest).map_err(about)?;
        if !plan.has_modules() {
            log::warn!(
                "no modules of kernel {} are found: the agent works if it has virtio-vsock built in",
                plan.release
            );
        }
        let bytes = plan.build(guest.initrd.as_deref()).map_err(about)?;
        let path = initrd::keep(&home.join("initrds"), &bytes).map_err(Error::io("write an initial RAM disk"))?;
        let mut guest = guest.clone();
        if guest.initrd.is_some() {
            guest.cmdline = format!("{} rdinit={}", guest.cmdline, initrd::AGENT);
        }
        guest.initrd = Some(path);
        self.launch.linux = Some(guest);
        self.agent = false;
        Ok(self)
    }

    fn operation(&self) -> String {
        self.launch.name.as_ref().map_or("launch".into(), |name| format!("launch {name}"))
    }

    fn linux(&mut self, what: &str) -> Result<&mut Linux, Error> {
        self.launch.linux.as_mut().ok_or_else(|| Error::bad_request(format!("launch: {what} needs a kernel")))
    }

    /// Its virtual CPUs. The built-in guest has one, a Linux guest from 1 to 8.
    pub fn vcpus(mut self, count: u8) -> Self {
        self.launch.vcpus = count;
        self
    }

    /// Guest-physical memory (whole pages of its RAM, in ascending order) that all VMs which descend from this one share: what
    /// one of them writes there, all see. For the built-in guest.
    pub fn share(mut self, bytes: Range<u64>) -> Self {
        self.launch.shared.push(bytes);
        self
    }

    /// Removes the VM once its guest has powered off.
    pub fn remove_when_off(mut self, remove: bool) -> Self {
        self.launch.remove_when_off = remove;
        self
    }

    /// Has the server end it after so long, whether it runs or not. Who is forked from it ends with it, unless the fork says
    /// otherwise.
    pub fn ttl(mut self, time: Duration) -> Self {
        self.launch.ttl_ms = Some(milliseconds(time));
        self
    }

    /// A socket by which programs of the host connect to ports of the Linux guest's vsock, in Firecracker's way: `CONNECT PORT`.
    /// `{name}` in its path is the name of the VM; then all that descend from this one have such a socket.
    ///
    /// # Errors
    /// There is no current directory that the path could be relative to.
    pub fn vsock(mut self, path: impl AsRef<Path>) -> Result<Self, Error> {
        self.launch.vsock = Some(absolute("vsock", path.as_ref())?);
        Ok(self)
    }

    /// How many VMs may descend from it at a time: children, their children and so on, whoever forks them. Those that have
    /// ended count until they are removed. The limit stays when this VM is removed.
    pub fn max_children(mut self, count: u32) -> Self {
        self.launch.max_children = Some(count);
        self
    }

    /// Checks all that needs no server: the name, the sizes, and whether this host has KVM and the memory.
    /// [`Client::launch`](super::Client::launch) does so too.
    pub fn check(&self) -> Result<(), Error> {
        let operation = self.operation();
        let failure = |kind, cause: &dyn std::fmt::Display| {
            Err(Failure { kind, message: format!("{operation}: {cause}"), subject: self.launch.name.clone() }.into())
        };
        let bad = |cause: &dyn std::fmt::Display| failure(ErrorKind::BadRequest, cause);
        if let Some(name) = &self.launch.name {
            check_vm_name("launch", name)?;
        }
        let memory = ByteSize(self.launch.mem_bytes);
        if let Err(e) = memory.as_guest_memory() {
            return bad(&e);
        }
        match &self.launch.linux {
            None if self.launch.vcpus != 1 => {
                return bad(&format_args!("the built-in guest has 1 vCPU, not {}", self.launch.vcpus));
            }
            Some(_) if !(1..=MAX_VCPUS).contains(&self.launch.vcpus) => {
                return bad(&format_args!("a Linux guest has from 1 to {MAX_VCPUS} vCPUs, not {}", self.launch.vcpus));
            }
            _ => {}
        }
        if let Some(guest) = &self.launch.linux {
            if self.agent
                && let Err(e) = self.plan_of_initrd(guest)
            {
                return bad(&e);
            }
            let (kernel, initrd) = match guest.open() {
                Ok(files) => files,
                Err(e) => return bad(&e),
            };
            let ram = PageCount::covering(memory.0);
            let request = linux::Request { ram, kernel: &kernel, initrd: initrd.as_ref(), cmdline: &guest.cmdline };
            if let Err(e) = Plan::new(request) {
                return bad(&e);
            }
        }
        if let Err(e) = host::open_kvm() {
            return failure(ErrorKind::Unsupported, &e);
        }
        let available = host::available_memory().map_err(Error::io(format!("{operation}: read available memory")))?;
        if memory.0 > available {
            let available = ByteSize(available).approx();
            return failure(
                ErrorKind::Limit,
                &format_args!("{memory} of memory is more than the {available} this host can give"),
            );
        }
        Ok(())
    }
}

fn absolute(what: &str, path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|e| Error::bad_request(format!("launch: {what} {}: {e}", path.display())))
}

fn milliseconds(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap_or(u64::MAX)
}

/// A fork: one child that runs, where nothing else is asked for.
#[derive(Clone, Debug)]
pub struct ForkOptions(pub(super) Fork);

impl Default for ForkOptions {
    fn default() -> Self {
        Self(Fork {
            name: String::new(),
            count: 1,
            children: Vec::new(),
            prefix: None,
            wait_settled: false,
            wait_agent_ms: None,
            paused: false,
            hint_free_ms: None,
            ttl_ms: None,
        })
    }
}

impl ForkOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many children.
    pub fn count(mut self, count: u32) -> Self {
        self.0.count = count;
        self
    }

    /// What the child is called, or each of several, which then are as many as there are names.
    pub fn children(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.0.children = names.into_iter().map(Into::into).collect();
        self.0.count = self.0.children.len().try_into().unwrap_or(u32::MAX);
        self
    }

    /// Children are called PREFIX-1, PREFIX-2, …; without it, the name of the first VM of the parent's family is the prefix.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.0.prefix = Some(prefix.into());
        self
    }

    /// Returns only when all moved pages have settled: then the counts of copied and gap pages are known.
    pub fn wait_settled(mut self, wait: bool) -> Self {
        self.0.wait_settled = wait;
        self
    }

    /// Leaves the children paused.
    pub fn paused(mut self, paused: bool) -> Self {
        self.0.paused = paused;
        self
    }

    /// Has a Linux guest tell of its free pages first, and waits for that no longer than `bound`: these are neither copied
    /// nor shared. A guest without a balloon driver tells nothing, and is waited for in vain.
    pub fn hint_free(mut self, bound: Duration) -> Self {
        self.0.hint_free_ms = Some(milliseconds(bound));
        self
    }

    /// Returns only when the agents of the children, Linux guests, have heard that these are children, or after `bound`: then
    /// [`acked_us`](crate::api::Child::acked_us) is known of those that have.
    pub fn wait_agent(mut self, bound: Duration) -> Self {
        self.0.wait_agent_ms = Some(milliseconds(bound));
        self
    }

    /// Has the server end each child after so long, be it sooner or later than the parent.
    pub fn ttl(mut self, time: Duration) -> Self {
        self.0.ttl_ms = Some(milliseconds(time));
        self
    }

    pub(super) fn of(self, parent: &str) -> Result<Fork, Error> {
        check_vm_name("fork", parent)?;
        if let Some(prefix) = &self.0.prefix {
            check_vm_name("fork: prefix", prefix)?;
        }
        self.0.children.iter().try_for_each(|name| check_vm_name("fork: child", name))?;
        if !(1..=MAX_CHILDREN).contains(&self.0.count) {
            let why = format!("fork {parent}: {} children: from 1 to {MAX_CHILDREN} at a time", self.0.count);
            return Err(Failure::bad_request(why).about(parent).into());
        }
        Ok(Fork { name: parent.to_owned(), ..self.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_launches_are_refused() {
        let refusal = |options: LaunchOptions| match options.check() {
            Err(Error::Failure(Failure { kind: ErrorKind::BadRequest, message, .. })) => message,
            other => panic!("{other:?}"),
        };
        let new = LaunchOptions::new;
        assert!(refusal(new().name("a/b")).starts_with("launch \"a/b\": a VM name has"));
        assert_eq!(
            refusal(new().name("a").memory(ByteSize(3))),
            "launch a: guest memory is at least 16M, and this is 3 bytes"
        );
        assert_eq!(refusal(new().vcpus(2)), "launch: the built-in guest has 1 vCPU, not 2");
    }

    #[test]
    fn bad_forks_are_refused() {
        let new = ForkOptions::new;
        for bad in [new().count(0), new().count(1001), new().prefix("x/y"), new().children(["b", "-c"])] {
            assert_eq!(bad.of("a").unwrap_err().kind(), ErrorKind::BadRequest);
        }
        assert_eq!(new().of("a").unwrap().name, "a");
        assert_eq!(new().children(["b", "c"]).of("a").unwrap().count, 2);
    }
}
