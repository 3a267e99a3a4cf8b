//! A connection to an agent, greeted, of a VM that knows who it is.

use super::{AgentError, Error, Identity, talk_failed, unexpected};
use agent::PROTOCOL;
use agent::frame;
use agent::message::{Ack, Failed, FailedKind, Forked, FromAgent, Hello, ToAgent};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long an agent may take to greet, and to say what takes it no work.
pub(super) const PROMPT: Duration = Duration::from_secs(10);
/// How long it may take for the notice of a fork: it runs hooks for 10 seconds at most.
const NOTICE: Duration = Duration::from_secs(20);
/// How long it may take for what it has work with: to start a program, to connect, to read or write 64 KiB of a file.
pub(super) const WORK: Duration = Duration::from_secs(60);

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
        let until = Instant::now() + PROMPT;
        talk.send_by(until, &ToAgent::Hello(Hello { protocol: PROTOCOL, generation: vm.generation }))?;
        let hello = match talk.read_by(until)? {
            FromAgent::Hello(hello) => hello,
            other => return Err(unexpected(&vm.name, other)),
        };
        if hello.protocol != PROTOCOL {
            let why = format!("its agent speaks protocol {}, and this is {PROTOCOL}", hello.protocol);
            return Err(AgentError::new(&vm.name, Failed::new(FailedKind::Version, why)).into());
        }
        if hello.generation != vm.generation {
            talk.notify(vm)?;
        }
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
        let until = Instant::now() + NOTICE;
        let forked = ToAgent::Forked(Forked {
            name: vm.name.clone().into_bytes(),
            generation: vm.generation,
            entropy,
            wall_ns: now.as_nanos().try_into().unwrap_or(u64::MAX),
        });
        self.send_by(until, &forked)?;
        let Ack { generation, reseeded, trouble } = match self.read_by(until)? {
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

    /// Sends a message of a few bytes, or a piece of a file.
    pub fn send(&mut self, message: &ToAgent) -> Result<(), Error> {
        self.send_by(Instant::now() + WORK, message)
    }

    fn send_by(&mut self, until: Instant, message: &ToAgent) -> Result<(), Error> {
        frame::write(&mut Timed { stream: &self.stream, until }, message).map_err(|e| match e.kind() {
            // Before anything was written.
            io::ErrorKind::InvalidData => Error::bad_request(format!("{}: {e}", self.name)),
            _ => talk_failed(&self.name, e),
        })
    }

    /// Waits for a message, for ever: a program may have nothing to say.
    pub fn read(&mut self) -> Result<FromAgent, Error> {
        let read = self.stream.set_read_timeout(None).and_then(|()| frame::read(&mut self.stream));
        self.read_to(read)
    }

    /// Waits for a message until then.
    pub fn read_by(&mut self, until: Instant) -> Result<FromAgent, Error> {
        let read = frame::read(&mut Timed { stream: &self.stream, until });
        self.read_to(read)
    }

    fn read_to(&self, read: io::Result<Option<FromAgent>>) -> Result<FromAgent, Error> {
        let message = read.map_err(|e| talk_failed(&self.name, e))?;
        message.ok_or_else(|| talk_failed(&self.name, io::ErrorKind::UnexpectedEof.into()))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The stream, whose reads and writes wait as long as it takes.
    pub fn into_stream(self) -> Result<UnixStream, Error> {
        let stream = self.patient()?;
        stream.set_read_timeout(None).map_err(|e| talk_failed(&self.name, e))?;
        Ok(stream)
    }

    /// Another end of the stream, to write to for as long as it takes.
    pub fn patient(&self) -> Result<UnixStream, Error> {
        let failed = |e| talk_failed(&self.name, e);
        self.stream.set_write_timeout(None).map_err(failed)?;
        self.stream.try_clone().map_err(failed)
    }
}

/// A stream on which all of a message has to come, or go, by a time: however the other side divides it.
struct Timed<'a> {
    stream: &'a UnixStream,
    until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
