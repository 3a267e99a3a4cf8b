//! A connection to an agent, greeted, of a VM that knows who it is.

use super::{AgentError, Error, Identity, talk_failed, unexpected};
use agent::PROTOCOL;
use agent::frame;
use agent::message::{Ack, Failed, FailedKind, Forked, FromAgent, Hello, ToAgent};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long an agent may take to greet.
const GREETING: Duration = Duration::from_secs(10);
/// How long it may take for the notice of a fork: it runs hooks for 10 seconds at most.
const NOTICE: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct Talk {
    stream: UnixStream,
    /// The VM's name, for errors.
    name: String,
    /// What the notice that was brought here left undone.
    pub trouble: Option<String>,
}

impl Talk {
    /// Greets, and tells a child that it is one if nobody has.
    pub fn open(stream: UnixStream, vm: &Identity) -> Result<Self, Error> {
        let mut talk = Self { stream, name: vm.name.clone(), trouble: None };
        talk.patience(Some(GREETING))?;
        talk.send(&ToAgent::Hello(Hello { protocol: PROTOCOL, generation: vm.generation }))?;
        let hello = match talk.read()? {
            FromAgent::Hello(hello) => hello,
            other => return Err(unexpected(&vm.name, other)),
        };
        if hello.protocol != PROTOCOL {
            let why = format!("its agent speaks protocol {}, and this is {PROTOCOL}", hello.protocol);
            return Err(AgentError::new(&vm.name, Failed::new(FailedKind::Version, why)).into());
        }
        if hello.generation != vm.generation {
            talk.patience(Some(NOTICE))?;
            talk.notify(vm)?;
        }
        talk.patience(None)?;
        Ok(talk)
    }

    fn notify(&mut self, vm: &Identity) -> Result<(), Error> {
        if vm.generation == 0 {
            let why = "its agent takes it for a child of a fork, and it was launched";
            return Err(AgentError::new(&vm.name, Failed::new(FailedKind::NotReseeded, why)).into());
        }
        let mut entropy = [0; 32];
        File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut entropy))
            .map_err(Error::io("read /dev/urandom"))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.send(&ToAgent::Forked(Forked {
            name: vm.name.clone().into_bytes(),
            generation: vm.generation,
            entropy,
            wall_ns: now.as_nanos().try_into().unwrap_or(u64::MAX),
        }))?;
        let Ack { generation, reseeded, trouble } = match self.read()? {
            FromAgent::Ack(ack) => ack,
            other => return Err(unexpected(&vm.name, other)),
        };
        let trouble = String::from_utf8_lossy(&trouble).into_owned();
        if !reseeded || generation != vm.generation {
            let why = format!("no random numbers of its own since the fork: {trouble}");
            return Err(AgentError::new(&vm.name, Failed::new(FailedKind::NotReseeded, why)).into());
        }
        self.trouble = Some(trouble);
        Ok(())
    }

    pub fn send(&mut self, message: &ToAgent) -> Result<(), Error> {
        frame::write(&mut self.stream, message).map_err(|e| match e.kind() {
            // Before anything was written.
            io::ErrorKind::InvalidData => Error::bad_request(format!("{}: {e}", self.name)),
            _ => talk_failed(&self.name, e),
        })
    }

    pub fn read(&mut self) -> Result<FromAgent, Error> {
        let message = frame::read(&mut self.stream).map_err(|e| talk_failed(&self.name, e))?;
        message.ok_or_else(|| talk_failed(&self.name, io::ErrorKind::UnexpectedEof.into()))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    fn patience(&self, patience: Option<Duration>) -> Result<(), Error> {
        self.stream.set_read_timeout(patience).map_err(|e| talk_failed(&self.name, e))
    }
}
