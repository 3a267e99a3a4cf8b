//! Sockets by which programs of the host reach guests, and are reached by them, in the way of Firecracker: `launch --vsock PATH`.
//!
//! Who connects to PATH and says `CONNECT PORT` is connected to that port of the guest's; the VM's process answers `OK` and the
//! port that it has on the host's side, or hangs up. A guest that connects to port N of the host's is connected to `PATH_N`.
//!
//! A PATH with `{name}` in it is one for each VM that descends from the launched one, with that VM's name; without, only the
//! launched VM has it.
//!
//! A program that connects is listened to until the end of that line, and no further: what follows is for the guest.

use crate::api::{ErrorKind, Failure};
use crate::server::ids::{Generation, VisitorId};
use crate::server::watch::{Origin, Token, Watches};
use event_manager::EventSet;
use nix::sys::socket::{MsgFlags, recv};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a program may take for its line.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many programs may be about to say theirs to one guest.
const MOST: usize = 64;
/// `CONNECT 4294967295` and the end of the line.
const LINE_MAX: usize = 19;
/// How long nobody is let in where descriptors are short.
const REST: Duration = Duration::from_secs(1);

/// A socket that is listened on. It goes with this value.
#[derive(Debug)]
pub struct Door {
    path: PathBuf,
    listener: UnixListener,
}

impl Door {
    /// Listens.
    ///
    /// # Errors
    /// There is something at that path, or it can be no socket's.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let bad = |why: &dyn std::fmt::Display| {
            let path = path.display();
            Failure::new(ErrorKind::BadRequest, format!("vsock {path}: {why}")).about(path.to_string())
        };
        if !path.is_absolute() {
            return Err(bad(&"not an absolute path"));
        }
        let listener = UnixListener::bind(path).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => bad(&"there is something at that path already"),
            _ => bad(&error),
        })?;
        // From here on it is removed again if something fails.
        let door = Self { path: path.to_owned(), listener };
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(|error| bad(&error))?;
        door.listener.set_nonblocking(true).map_err(|error| bad(&error))?;
        Ok(door)
    }

    /// Where its guest's connections to this port of the host's go.
    pub fn outward(&self, port: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::debug!("remove {}: {error}", self.path.display());
        }
    }
}

/// What stands for the name of a VM in the path of its socket.
const NAME: &str = "{name}";

/// Whether a path is a different one for each VM.
pub fn is_pattern(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.contains(NAME))
}

/// Where the socket of a VM is.
pub fn place(pattern: &Path, name: &str) -> PathBuf {
    pattern.to_str().map_or_else(|| pattern.to_owned(), |path| path.replace(NAME, name).into())
}

/// A program that has connected, and not said to which port.
#[derive(Debug)]
struct Visitor {
    vm: Generation,
    stream: UnixStream,
    token: Token,
    until: Instant,
}

/// A program has said where it wants to go.
#[derive(Debug)]
pub struct Visit {
    /// The guest's VM.
    pub vm: Generation,
    /// Its port.
    pub port: u32,
    /// The connection.
    pub stream: UnixStream,
}

#[derive(Debug)]
struct Watched {
    door: Door,
    token: Token,
    /// Nobody is let in until then.
    shut_until: Option<Instant>,
}

/// All doors, and who is about to come in.
#[derive(Debug, Default)]
pub struct Doors {
    doors: BTreeMap<Generation, Watched>,
    visitors: HashMap<VisitorId, Visitor>,
    last: u64,
}

impl Doors {
    /// Listens on behalf of a VM from now on.
    pub fn add(&mut self, vm: Generation, door: Door, watches: &mut Watches<Origin>) {
        let token = watches.add(&door.listener, EventSet::IN, Origin::Door(vm));
        self.doors.insert(vm, Watched { door, token, shut_until: None });
    }

    /// The same, for a child, whose socket is where its family's are. One that cannot be made is missed.
    pub fn add_like(&mut self, pattern: &Path, (vm, name): (Generation, &str), watches: &mut Watches<Origin>) {
        match Door::open(&place(pattern, name)) {
            Ok(door) => self.add(vm, door, watches),
            Err(failure) => log::warn!("VM {name:?} has no socket: {failure}"),
        }
    }

    /// The door of a VM.
    pub fn of(&self, vm: Generation) -> Option<&Path> {
        self.doors.get(&vm).map(|watched| watched.door.path.as_path())
    }

    /// Where connections of a VM's guest to this port of the host's go.
    pub fn outward(&self, vm: Generation, port: u32) -> Option<PathBuf> {
        self.doors.get(&vm).map(|watched| watched.door.outward(port))
    }

    /// A VM has ended.
    pub fn ended(&mut self, vm: Generation, watches: &mut Watches<Origin>) {
        if let Some(watched) = self.doors.remove(&vm) {
            watches.remove(watched.token, watched.door);
            for (_, visitor) in self.visitors.extract_if(|_, visitor| visitor.vm == vm) {
                watches.remove(visitor.token, visitor.stream);
            }
        }
    }

    /// Lets in who has come to a VM's door.
    pub fn accept(&mut self, vm: Generation, now: Instant, watches: &mut Watches<Origin>) {
        let Some(watched) = self.doors.get_mut(&vm) else { return };
        let mut there = self.visitors.values().filter(|visitor| visitor.vm == vm).count();
        loop {
            match watched.door.listener.accept() {
                Ok((stream, _)) if there < MOST && stream.set_nonblocking(true).is_ok() => {
                    self.last += 1;
                    let id = VisitorId(self.last);
                    let token = watches.add(&stream, EventSet::IN, Origin::Visitor(id));
                    self.visitors.insert(id, Visitor { vm, stream, token, until: now + PATIENCE });
                    there += 1;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    log::warn!("{}: {error}", watched.door.path.display());
                    watched.shut_until = Some(now + REST);
                    return watches.modify(watched.token, EventSet::empty());
                }
            }
        }
    }

    /// A program has said something. Where it wants to go, when it has said that. One that says something else is gone.
    pub fn hear(&mut self, id: VisitorId, watches: &mut Watches<Origin>) -> Option<Visit> {
        let said = said(&self.visitors.get(&id)?.stream);
        if said == Said::Part {
            return None;
        }
        let Visitor { vm, stream, token, .. } = self.visitors.remove(&id)?;
        // Its descriptor is watched until the next round; then it is the VM's.
        let visit = match (said, stream.try_clone()) {
            (Said::Port(port), Ok(stream)) => Some(Visit { vm, port, stream }),
            _ => None,
        };
        watches.remove(token, stream);
        visit
    }

    /// Those who take too long are gone, and doors that were shut are opened.
    pub fn tend(&mut self, now: Instant, watches: &mut Watches<Origin>) {
        for (_, visitor) in self.visitors.extract_if(|_, visitor| visitor.until <= now) {
            watches.remove(visitor.token, visitor.stream);
        }
        for watched in self.doors.values_mut() {
            if watched.shut_until.take_if(|until| *until <= now).is_some() {
                watches.modify(watched.token, EventSet::IN);
            }
        }
    }

    /// When there is something to tend to.
    pub fn next_look(&self) -> Option<Instant> {
        let late = self.visitors.values().map(|visitor| visitor.until);
        late.chain(self.doors.values().filter_map(|watched| watched.shut_until)).min()
    }
}

/// What a program has said so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// Not all of its line.
    Part,
    /// The port.
    Port(u32),
    /// Nothing that we know, or it has hung up.
    Nonsense,
}

/// Takes the line from a connection, when it is there.
fn said(stream: &UnixStream) -> Said {
    let mut line = [0; LINE_MAX];
    let flags = MsgFlags::MSG_DONTWAIT;
    let there = match recv(stream.as_raw_fd(), &mut line, flags | MsgFlags::MSG_PEEK) {
        Ok(0) => return Said::Nonsense,
        Ok(there) => there,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Said::Part,
        Err(_) => return Said::Nonsense,
    };
    let Some(len) = line[..there].iter().position(|&byte| byte == b'\n') else {
        let may_go_on = there < LINE_MAX && b"CONNECT ".iter().zip(&line[..there]).all(|(a, b)| a == b);
        return if may_go_on { Said::Part } else { Said::Nonsense };
    };
    let Some(port) = port_of(&line[..len]) else { return Said::Nonsense };
    match recv(stream.as_raw_fd(), &mut line[..=len], flags) {
        Ok(taken) if taken == len + 1 => Said::Port(port),
        _ => Said::Nonsense,
    }
}

fn port_of(line: &[u8]) -> Option<u32> {
    let number = std::str::from_utf8(line.strip_prefix(b"CONNECT ")?).ok()?;
    let number = number.strip_suffix('\r').unwrap_or(number);
    number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::TempDir;
    use std::io::{Read, Write};

    const VM: Generation = Generation(7);

    struct House {
        _directory: TempDir,
        path: PathBuf,
        doors: Doors,
        watches: Watches<Origin>,
        now: Instant,
    }

    impl House {
        fn new() -> Self {
            let directory = TempDir::new();
            let path = directory.path().join("v.sock");
            let (mut doors, mut watches) = (Doors::default(), Watches::new());
            doors.add(VM, Door::open(&path).unwrap(), &mut watches);
            Self { _directory: directory, path, doors, watches, now: Instant::now() }
        }

        /// Comes in and says something.
        fn come(&mut self, line: &[u8]) -> (UnixStream, VisitorId) {
            let mut stream = UnixStream::connect(&self.path).unwrap();
            self.doors.accept(VM, self.now, &mut self.watches);
            stream.write_all(line).unwrap();
            (stream, VisitorId(self.doors.last))
        }

        fn hear(&mut self, id: VisitorId) -> Option<Visit> {
            let visit = self.doors.hear(id, &mut self.watches);
            // What is watched no more is let go of.
            self.watches = Watches::new();
            visit
        }
    }

    #[test]
    fn a_program_says_where_it_wants_to_go_and_what_follows_is_left_for_the_guest() {
        let mut house = House::new();
        let (mut stream, id) = house.come(b"CONN");
        assert!(house.hear(id).is_none());
        stream.write_all(b"ECT 52\nhello").unwrap();
        let mut visit = house.hear(id).unwrap();
        assert_eq!((visit.vm, visit.port), (VM, 52));
        let mut rest = [0; 5];
        visit.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
        assert!(house.hear(id).is_none(), "it has come in");
    }

    #[test]
    fn who_says_something_else_or_nothing_is_gone() {
        let mut house = House::new();
        let nonsense: [&[u8]; 8] = [
            b"HELLO\n",
            b"CONNECT \n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 52 53\n",
            b"GET / HTTP/1.1",
            b"CONNECT 00000000000000000000052\n",
        ];
        for line in nonsense {
            let (mut stream, id) = house.come(line);
            assert!(house.hear(id).is_none(), "{line:?}");
            assert!(house.doors.visitors.is_empty(), "{line:?}");
            assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "{line:?}");
        }
        let (stream, id) = house.come(b"");
        drop(stream);
        assert!(house.hear(id).is_none());
        let (_stream, id) = house.come(b"CONNECT 5");
        assert!(house.hear(id).is_none());
        assert_eq!(house.doors.next_look(), Some(house.now + PATIENCE));
        house.doors.tend(house.now + PATIENCE, &mut house.watches);
        assert!(house.doors.visitors.is_empty());
        assert_eq!(house.doors.next_look(), None);
    }

    #[test]
    fn a_flood_finds_the_door_full() {
        let mut house = House::new();
        let mut all: Vec<_> = (0..MOST + 5).map(|_| house.come(b"").0).collect();
        assert_eq!(house.doors.visitors.len(), MOST);
        assert_eq!(all.last_mut().unwrap().read(&mut [0]).unwrap(), 0, "it was told at once");
    }

    #[test]
    fn a_door_goes_with_its_vm() {
        let mut house = House::new();
        assert_eq!(house.doors.outward(VM, 1024).unwrap(), house.path.with_file_name("v.sock_1024"));
        let taken = Door::open(&house.path).unwrap_err();
        assert_eq!(taken.kind, ErrorKind::BadRequest);
        assert!(taken.message.contains("already"), "{}", taken.message);
        assert!(house.path.exists(), "somebody else's stays");
        house.come(b"CONNECT ");
        house.doors.ended(VM, &mut house.watches);
        house.watches = Watches::new();
        assert!(!house.path.exists());
        assert!(house.doors.visitors.is_empty() && house.doors.of(VM).is_none());
    }

    #[test]
    fn a_path_that_is_none_is_refused() {
        for path in ["relative", "/no/such/directory/v.sock", &format!("/tmp/{}", "x".repeat(200))] {
            assert_eq!(Door::open(Path::new(path)).unwrap_err().kind, ErrorKind::BadRequest, "{path}");
        }
    }
}
