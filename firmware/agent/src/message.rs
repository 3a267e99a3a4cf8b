//! What a client and the agent say to each other.
//!
//! A message is a tag and its fields. Texts of the guest (paths, arguments, names) are bytes, as Linux has them.

use crate::wire::{Reader, Writer};
use std::fmt;

/// A message of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// The first.
    Hello(Hello),
    /// Run a program. Answered by `Started` or `Failed`, then `Out` and `Err` as they come, and `Exit` at last.
    Start(Start),
    /// Follow a session, and be the one that types into it. Answered as a `Start` is, by its last output first.
    Attach {
        /// Which.
        session: u32,
    },
    /// All sessions. Answered by a `Session` for each, and `Done`.
    List,
    /// Send a signal to the processes of a session. Answered by `Done`, unless this connection follows that session.
    Signal {
        /// Which.
        session: u32,
        /// Its number.
        signal: u8,
    },
    /// Input of this connection's session, or bytes of the archive that it puts.
    Data(Vec<u8>),
    /// There is no more of it.
    DataEnd,
    /// The session's terminal has another size.
    Resize(Size),
    /// Pack a tree. Answered by `Out` with the bytes of an archive, and `Done`.
    Get {
        /// What.
        path: Vec<u8>,
    },
    /// Unpack an archive, which follows as `Data`. Answered by `Done`.
    Put {
        /// Where.
        path: Vec<u8>,
        /// What the path is to the archive.
        place: Place,
    },
    /// Connect to a TCP port of the guest's loopback. Answered by `Connected`; what follows are that connection's bytes, both
    /// ways.
    Dial {
        /// Which.
        port: u16,
    },
    /// This VM is a child of a fork. Answered by `Ack`.
    Forked(Forked),
}

/// A message of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromAgent {
    /// The first.
    Hello(Hello),
    /// The program runs.
    Started {
        /// The session's number.
        session: u32,
        /// Its process.
        pid: u32,
    },
    /// What the program wrote to its standard output, or to its terminal; or bytes of an archive.
    Out(Vec<u8>),
    /// What it wrote to its standard error.
    Err(Vec<u8>),
    /// It has ended, and this was all that it wrote.
    Exit(Exit),
    /// It was not done.
    Failed(Failed),
    /// One session.
    Session(Session),
    /// It is done.
    Done,
    /// The port is connected.
    Connected,
    /// The notice of a fork was taken.
    Ack(Ack),
}

/// Who speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Version of the protocol.
    pub protocol: u32,
    /// A client says the generation of the VM it means, the agent the one it was told last: 0 if it never was.
    pub generation: u64,
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The program and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// Its environment, `KEY=VALUE` each, beside what the agent sets.
    pub env: Vec<Vec<u8>>,
    /// Its directory; the user's home without.
    pub cwd: Option<Vec<u8>>,
    /// Whose it is: `NAME`, `NAME:GROUP`, or numbers; root's without.
    pub user: Option<Vec<u8>>,
    /// It has a terminal of this size.
    pub terminal: Option<Size>,
    /// Its input comes from the client; without, it has none.
    pub stdin: bool,
    /// It is killed after so many milliseconds; 0 for never.
    pub timeout_ms: u64,
    /// The connection may end now: nobody waits for what it writes.
    pub detached: bool,
}

/// A terminal's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// What a path is to an archive that is put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A directory that all goes into.
    Into,
    /// A directory that the archive's one tree goes into; or, where there is none, that tree's new name.
    As,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(u8),
    /// By a signal.
    Signal(u8),
    /// It was killed, as its time was over.
    TimedOut,
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// What kind of failure it is.
    pub kind: FailedKind,
    /// The guest's error number; 0 if there is none.
    pub errno: i32,
    /// One line for the user.
    pub why: Vec<u8>,
}

/// Kinds of failure, for clients to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailedKind {
    /// The request makes no sense, or what it names is not there.
    Bad,
    /// There is no such program.
    NoProgram,
    /// It cannot be executed.
    NotExecutable,
    /// This VM is a child that could not be given random numbers of its own, or has not been told of its fork.
    NotReseeded,
    /// The agent speaks another version of the protocol.
    Version,
    /// The guest refused something.
    Guest,
}

impl FailedKind {
    /// All there are.
    pub const ALL: [Self; 6] =
        [Self::Bad, Self::NoProgram, Self::NotExecutable, Self::NotReseeded, Self::Version, Self::Guest];
}

/// A program that runs, or ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Its number.
    pub id: u32,
    /// Its process.
    pub pid: u32,
    /// How long ago it was started, in milliseconds.
    pub age_ms: u64,
    /// Whether a client follows it.
    pub attached: bool,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// How it ended; none while it runs.
    pub exit: Option<Exit>,
    /// The program and its arguments, the first of them where they are many.
    pub argv: Vec<Vec<u8>>,
}

/// What a child of a fork is told.
#[derive(Clone, PartialEq, Eq)]
pub struct Forked {
    /// Its name.
    pub name: Vec<u8>,
    /// Its generation.
    pub generation: u64,
    /// Random numbers that only it gets.
    pub entropy: [u8; 32],
    /// The host's time, in nanoseconds since 1970.
    pub wall_ns: u64,
}

impl fmt::Debug for Forked {
    /// Without the entropy, which no log is to have.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = String::from_utf8_lossy(&self.name);
        f.debug_struct("Forked").field("name", &name).field("generation", &self.generation).finish_non_exhaustive()
    }
}

/// What became of a notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Which fork's it was.
    pub generation: u64,
    /// Whether the kernel's random numbers are this VM's own now.
    pub reseeded: bool,
    /// What was not done; empty if all was.
    pub trouble: Vec<u8>,
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// They end too early.
    Short,
    /// They go on after the message.
    Long,
    /// No message has this tag.
    Tag(u8),
    /// A field cannot have this value.
    Value(u8),
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short => f.write_str("a message that is too short"),
            Self::Long => f.write_str("a message that is too long"),
            Self::Tag(tag) => write!(f, "a message of the unknown kind {tag}"),
            Self::Value(value) => write!(f, "a field that cannot be {value}"),
        }
    }
}

impl std::error::Error for Malformed {}

/// A message as bytes.
pub trait Message: Sized {
    /// The bytes of a frame.
    fn encode(&self) -> Vec<u8>;

    /// The message that these bytes are.
    ///
    /// # Errors
    /// They are none.
    fn decode(bytes: &[u8]) -> Result<Self, Malformed>;
}

impl Message for ToAgent {
    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Self::Hello(hello) => hello.write(&mut w),
            Self::Start(start) => {
                w.u8(1);
                start.write(&mut w);
            }
            Self::Attach { session } => {
                w.u8(2);
                w.u32(*session);
            }
            Self::List => w.u8(3),
            Self::Signal { session, signal } => {
                w.u8(4);
                w.u32(*session);
                w.u8(*signal);
            }
            Self::Data(bytes) => {
                w.u8(5);
                w.0.extend(bytes);
            }
            Self::DataEnd => w.u8(6),
            Self::Resize(size) => {
                w.u8(7);
                size.write(&mut w);
            }
            Self::Get { path } => {
                w.u8(8);
                w.bytes(path);
            }
            Self::Put { path, place } => {
                w.u8(9);
                w.bytes(path);
                w.bool(*place == Place::Into);
            }
            Self::Dial { port } => {
                w.u8(10);
                w.u16(*port);
            }
            Self::Forked(Forked { name, generation, entropy, wall_ns }) => {
                w.u8(11);
                w.bytes(name);
                w.u64(*generation);
                w.0.extend(entropy);
                w.u64(*wall_ns);
            }
        }
        w.0
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader(bytes);
        let message = match r.u8()? {
            0 => Self::Hello(Hello::read(&mut r)?),
            1 => Self::Start(Start::read(&mut r)?),
            2 => Self::Attach { session: r.u32()? },
            3 => Self::List,
            4 => Self::Signal { session: r.u32()?, signal: r.u8()? },
            5 => Self::Data(r.rest()),
            6 => Self::DataEnd,
            7 => Self::Resize(Size::read(&mut r)?),
            8 => Self::Get { path: r.bytes()? },
            9 => Self::Put { path: r.bytes()?, place: if r.bool()? { Place::Into } else { Place::As } },
            10 => Self::Dial { port: r.u16()? },
            11 => Self::Forked(Forked { name: r.bytes()?, generation: r.u64()?, entropy: r.key()?, wall_ns: r.u64()? }),
            tag => return Err(Malformed::Tag(tag)),
        };
        r.end().map(|()| message)
    }
}

impl Message for FromAgent {
    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Self::Hello(hello) => hello.write(&mut w),
            Self::Started { session, pid } => {
                w.u8(1);
                w.u32(*session);
                w.u32(*pid);
            }
            Self::Out(bytes) => {
                w.u8(2);
                w.0.extend(bytes);
            }
            Self::Err(bytes) => {
                w.u8(3);
                w.0.extend(bytes);
            }
            Self::Exit(exit) => {
                w.u8(4);
                exit.write(&mut w);
            }
            Self::Failed(Failed { kind, errno, why }) => {
                w.u8(5);
                w.u8(FailedKind::ALL.iter().position(|other| other == kind).unwrap_or_default() as u8);
                w.i32(*errno);
                w.bytes(why);
            }
            Self::Session(session) => {
                w.u8(6);
                session.write(&mut w);
            }
            Self::Done => w.u8(7),
            Self::Connected => w.u8(8),
            Self::Ack(Ack { generation, reseeded, trouble }) => {
                w.u8(9);
                w.u64(*generation);
                w.bool(*reseeded);
                w.bytes(trouble);
            }
        }
        w.0
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader(bytes);
        let message = match r.u8()? {
            0 => Self::Hello(Hello::read(&mut r)?),
            1 => Self::Started { session: r.u32()?, pid: r.u32()? },
            2 => Self::Out(r.rest()),
            3 => Self::Err(r.rest()),
            4 => Self::Exit(Exit::read(&mut r)?),
            5 => {
                let kind = r.u8()?;
                let kind = *FailedKind::ALL.get(usize::from(kind)).ok_or(Malformed::Value(kind))?;
                Self::Failed(Failed { kind, errno: r.i32()?, why: r.bytes()? })
            }
            6 => Self::Session(Session::read(&mut r)?),
            7 => Self::Done,
            8 => Self::Connected,
            9 => Self::Ack(Ack { generation: r.u64()?, reseeded: r.bool()?, trouble: r.bytes()? }),
            tag => return Err(Malformed::Tag(tag)),
        };
        r.end().map(|()| message)
    }
}

impl Hello {
    fn write(&self, w: &mut Writer) {
        w.u8(0);
        w.u32(self.protocol);
        w.u64(self.generation);
    }

    /// Whatever else a later version says in its greeting is not looked at: that it is another version must be told.
    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let hello = Self { protocol: r.u32()?, generation: r.u64()? };
        if hello.protocol != crate::PROTOCOL {
            r.rest();
        }
        Ok(hello)
    }
}

impl Start {
    fn write(&self, w: &mut Writer) {
        w.list(&self.argv);
        w.list(&self.env);
        w.option(self.cwd.as_ref(), |w, cwd| w.bytes(cwd));
        w.option(self.user.as_ref(), |w, user| w.bytes(user));
        w.option(self.terminal.as_ref(), |w, size| size.write(w));
        w.bool(self.stdin);
        w.u64(self.timeout_ms);
        w.bool(self.detached);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            argv: r.list()?,
            env: r.list()?,
            cwd: r.option(Reader::bytes)?,
            user: r.option(Reader::bytes)?,
            terminal: r.option(Size::read)?,
            stdin: r.bool()?,
            timeout_ms: r.u64()?,
            detached: r.bool()?,
        })
    }
}

impl Size {
    fn write(self, w: &mut Writer) {
        w.u16(self.rows);
        w.u16(self.columns);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self { rows: r.u16()?, columns: r.u16()? })
    }
}

impl Exit {
    fn write(self, w: &mut Writer) {
        let (kind, value) = match self {
            Self::Code(code) => (0, code),
            Self::Signal(signal) => (1, signal),
            Self::TimedOut => (2, 0),
        };
        w.u8(kind);
        w.u8(value);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        match (r.u8()?, r.u8()?) {
            (0, code) => Ok(Self::Code(code)),
            (1, signal) => Ok(Self::Signal(signal)),
            (2, 0) => Ok(Self::TimedOut),
            (kind, _) => Err(Malformed::Value(kind)),
        }
    }

    /// As shells tell it: the code, or 128 and the signal's number; 124 for time that was over, as `timeout` does.
    pub fn status(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 | signal,
            Self::TimedOut => 124,
        }
    }
}

impl Session {
    fn write(&self, w: &mut Writer) {
        w.u32(self.id);
        w.u32(self.pid);
        w.u64(self.age_ms);
        w.bool(self.attached);
        w.bool(self.terminal);
        w.option(self.exit.as_ref(), |w, exit| exit.write(w));
        w.list(&self.argv);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            id: r.u32()?,
            pid: r.u32()?,
            age_ms: r.u64()?,
            attached: r.bool()?,
            terminal: r.bool()?,
            exit: r.option(Exit::read)?,
            argv: r.list()?,
        })
    }
}

impl Failed {
    /// A failure of some kind, with its reason.
    pub fn new(kind: FailedKind, why: impl Into<String>) -> Self {
        Self { kind, errno: 0, why: why.into().into_bytes() }
    }

    /// What the guest's kernel refused.
    pub fn io(what: impl fmt::Display, e: &std::io::Error) -> Self {
        let kind = match e.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidInput => FailedKind::Bad,
            _ => FailedKind::Guest,
        };
        Self { errno: e.raw_os_error().unwrap_or(0), ..Self::new(kind, format!("{what}: {e}")) }
    }
}
