//! One connection of a client: greetings, and one request.

use crate::notice;
use crate::session::{Client, Session};
use crate::sys::{self, Half};
use crate::{System, dial};
use agent::PROTOCOL;
use agent::frame::{self, MAX_DATA};
use agent::message::{Ack, Failed, FailedKind, FromAgent, Hello, Place, ToAgent};
use agent::tree::{self, Trust};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

/// Does what a client asks. What goes wrong, it is told, if it is there still.
pub fn serve(system: &Arc<System>, connection: File) {
    // A client that is gone can be told nothing, and nothing depends on it.
    let _ = Connection { system, stream: connection }.run();
}

struct Connection<'a> {
    system: &'a Arc<System>,
    stream: File,
}

impl Connection<'_> {
    fn run(mut self) -> io::Result<()> {
        let Some(hello) = self.read()? else { return Ok(()) };
        let ToAgent::Hello(hello) = hello else {
            return self.fail(Failed::new(FailedKind::Bad, "the first message has to be a greeting"));
        };
        let identity = self.system.identity.current();
        self.send(&FromAgent::Hello(Hello { protocol: PROTOCOL, generation: identity.generation }))?;
        if hello.protocol != PROTOCOL {
            let why = format!("the agent speaks protocol {PROTOCOL}, and the client {}", hello.protocol);
            return self.fail(Failed::new(FailedKind::Version, why));
        }
        let Some(mut request) = self.read()? else { return Ok(()) };
        if let ToAgent::Forked(forked) = &request {
            let ack = notice::take(self.system, forked);
            self.send(&FromAgent::Ack(ack))?;
            match self.read()? {
                Some(next) => request = next,
                None => return Ok(()),
            }
        }
        let identity = self.system.identity.current();
        if let Err(failed) = may_serve(&identity, hello.generation) {
            return self.fail(failed);
        }
        if let Err(failed) = self.answer(request) {
            self.fail(failed)?;
        }
        Ok(())
    }

    fn answer(&mut self, request: ToAgent) -> Result<(), Failed> {
        // A connection that is over is nobody's failure.
        let gone = |_: io::Error| Failed::new(FailedKind::Guest, "the connection is over");
        match request {
            ToAgent::Start(start) => {
                let session = self.system.sessions.start(&start, self.system)?;
                if start.detached {
                    let started = FromAgent::Started { session: session.id, pid: session.pid };
                    return self.send(&started).map_err(gone);
                }
                self.follow(&session).map_err(gone)
            }
            ToAgent::Attach { session } => {
                let session = self.system.sessions.find(session)?;
                self.follow(&session).map_err(gone)
            }
            ToAgent::List => {
                for session in self.system.sessions.all() {
                    self.send(&FromAgent::Session(session)).map_err(gone)?;
                }
                self.send(&FromAgent::Done).map_err(gone)
            }
            ToAgent::Signal { session, signal } => {
                self.system.sessions.find(session)?.signal(signal)?;
                self.send(&FromAgent::Done).map_err(gone)
            }
            ToAgent::Get { path } => {
                let path = Path::new(OsStr::from_bytes(&path));
                let mut out = BufWriter::with_capacity(MAX_DATA, Archive(&mut self.stream));
                tree::pack(path, &mut out).map_err(|e| Failed::io("cp", &e))?;
                drop(out);
                self.send(&FromAgent::Done).map_err(gone)
            }
            ToAgent::Put { path, place } => self.put(Path::new(OsStr::from_bytes(&path)), place),
            ToAgent::Dial { port } => {
                let socket = dial::connect(port)?;
                self.send(&FromAgent::Connected).map_err(gone)?;
                dial::join(socket, &self.stream).map_err(gone)
            }
            ToAgent::Hello(_) | ToAgent::Data(_) | ToAgent::DataEnd | ToAgent::Resize(_) | ToAgent::Forked(_) => {
                Err(Failed::new(FailedKind::Bad, "this is no request"))
            }
        }
    }

    fn put(&mut self, path: &Path, place: Place) -> Result<(), Failed> {
        let mut archive = Incoming { stream: &mut self.stream, piece: io::Cursor::default(), over: false };
        let done = tree::unpack(&mut archive, path, place, Trust::Guest);
        // The client must be able to say all that it has, or it would not hear what went wrong.
        let rest = io::copy(&mut archive, &mut io::sink());
        done.and(rest).map_err(|e| Failed::io("cp", &e))?;
        self.send(&FromAgent::Done).map_err(|_| Failed::new(FailedKind::Guest, "the connection is over"))
    }

    /// Follows a session: what it writes goes to the client, by others; what the client says goes to it, here.
    fn follow(&mut self, session: &Arc<Session>) -> io::Result<()> {
        let client = Arc::new(Client::new(&self.stream)?);
        let followed = self.system.sessions.attach(session, &client).and_then(|()| self.listen(session));
        session.detach(&client);
        followed
    }

    fn listen(&mut self, session: &Session) -> io::Result<()> {
        while let Some(message) = self.read()? {
            match message {
                ToAgent::Data(bytes) => session.give(&bytes, &self.stream)?,
                ToAgent::DataEnd => session.end_input(),
                ToAgent::Resize(size) => session.resize(size),
                // Of its own session only, and one that has ended is told of already.
                ToAgent::Signal { session: id, signal } if id == session.id => drop(session.signal(signal)),
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<Option<ToAgent>> {
        frame::read(&mut self.stream)
    }

    fn send(&mut self, message: &FromAgent) -> io::Result<()> {
        frame::write(&mut self.stream, message)
    }

    fn fail(&mut self, failed: Failed) -> io::Result<()> {
        let why = failed.why.get(..1024).map(<[u8]>::to_vec).unwrap_or(failed.why);
        self.send(&FromAgent::Failed(Failed { why, ..failed }))?;
        // What the client sent meanwhile must not make its end of the connection lose the answer.
        sys::hang_up(&self.stream, Half::Write);
        io::copy(&mut self.stream, &mut io::sink()).map(drop)
    }
}

/// Whether a client that means the VM of this generation may be served: only by that, and if its random numbers are its own.
fn may_serve(identity: &Ack, generation: u64) -> Result<(), Failed> {
    if identity.generation != generation {
        let why = "this VM was forked, and its agent has not been told";
        return Err(Failed::new(FailedKind::NotReseeded, why));
    }
    if !identity.reseeded {
        let why =
            format!("no random numbers of its own since the fork: {}", String::from_utf8_lossy(&identity.trouble));
        return Err(Failed::new(FailedKind::NotReseeded, why));
    }
    Ok(())
}

/// Where bytes of an archive go.
struct Archive<'a>(&'a mut File);

impl Write for Archive<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(MAX_DATA)];
        frame::write(self.0, &FromAgent::Out(piece.to_vec()))?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bytes of an archive that a client puts.
struct Incoming<'a> {
    stream: &'a mut File,
    piece: io::Cursor<Vec<u8>>,
    over: bool,
}

impl Read for Incoming<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || self.over {
                return Ok(count);
            }
            match frame::read(self.stream)? {
                Some(ToAgent::Data(bytes)) => self.piece = io::Cursor::new(bytes),
                Some(ToAgent::DataEnd) => self.over = true,
                Some(_) => return Err(io::ErrorKind::InvalidData.into()),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }
}
