//! Clients by script: what connects, says and reads is made up, and the time is ours.

use super::*;
use crate::server::clients::listener::DEAF;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

/// A listener whose arrivals are written down. The last of them is always that there is nobody.
#[derive(Clone, Debug)]
struct Script(Rc<RefCell<VecDeque<io::Result<UnixStream>>>>);

impl AsRawFd for Script {
    fn as_raw_fd(&self) -> RawFd {
        // Watched by nobody but the notes.
        0
    }
}

impl Accept for Script {
    fn accept(&self) -> io::Result<UnixStream> {
        self.0.borrow_mut().pop_front().unwrap_or_else(|| Err(io::ErrorKind::WouldBlock.into()))
    }
}

struct Desk {
    clients: Clients<Script>,
    script: Script,
    watches: Watches<Origin>,
    now: Instant,
}

impl Desk {
    fn new(most: usize) -> Self {
        let script = Script(Rc::default());
        let mut clients = Clients::new(script.clone(), most, vec!["gone".into()]);
        let mut watches = Watches::new();
        clients.listener().listen(&mut watches);
        Self { clients, script, watches, now: Instant::now() }
    }

    /// Somebody connects. Its end of the connection.
    fn connect(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        self.script.0.borrow_mut().push_back(Ok(ours));
        theirs
    }

    fn fail(&self, errno: i32) {
        self.script.0.borrow_mut().push_back(Err(io::Error::from_raw_os_error(errno)));
    }

    fn accept(&mut self) {
        self.clients.accept(self.now, &mut self.watches);
    }

    /// Whether the client asks for the list of VMs.
    fn asks(&mut self, id: ClientId) -> bool {
        self.clients.stirred(id);
        match self.clients.hear(id, &mut self.watches) {
            Some(Errand::Request(Request::List)) => true,
            Some(other) => panic!("{other:?}"),
            None => false,
        }
    }

    fn done(&mut self, id: ClientId) {
        self.clients.reply(id, Ok(crate::api::Answer::Done), &mut self.watches);
    }

    fn listens(&mut self) -> bool {
        let token = self.clients.listener().token();
        self.watches.events(token.unwrap()).unwrap() == EventSet::IN
    }
}

/// All that there is to read, and whether that is the end.
fn read(stream: &mut UnixStream) -> (String, bool) {
    let (mut text, mut buf) = (Vec::new(), [0; 1 << 16]);
    loop {
        match stream.read(&mut buf) {
            Ok(0) => return (String::from_utf8(text).unwrap(), true),
            Ok(n) => text.extend_from_slice(&buf[..n]),
            Err(_) => return (String::from_utf8(text).unwrap(), false),
        }
    }
}

const A: ClientId = ClientId(1);
const LIST: &[u8] = b"{\"verb\":\"list\"}\n";

#[test]
fn one_request_at_a_time_and_the_next_is_heard_when_it_is_answered() {
    let mut desk = Desk::new(4);
    let mut client = desk.connect();
    desk.accept();
    let (greeting, _) = read(&mut client);
    assert!(greeting.contains("gone"), "{greeting}");
    client.write_all(b"nonsense\n").unwrap();
    client.write_all(&LIST.repeat(2)).unwrap();
    assert!(desk.asks(A), "nonsense is answered at once");
    assert!(read(&mut client).0.contains("not a request"));
    assert!(!desk.asks(A), "it waits for its answer");
    desk.clients.take_pending();
    desk.done(A);
    assert_eq!(desk.clients.take_pending(), [A]);
    assert!(desk.asks(A));
    let mut other = desk.connect();
    desk.accept();
    assert!(!read(&mut other).0.contains("gone"), "the first was told");
}

#[test]
fn there_are_no_more_clients_than_there_may_be() {
    let mut desk = Desk::new(1);
    let (mut first, mut second) = (desk.connect(), desk.connect());
    desk.accept();
    assert!(read(&mut first).0.contains("protocol"));
    let (told, over) = read(&mut second);
    assert!(told.contains("too many connections") && over, "{told}");
    drop(first);
    assert!(!desk.asks(A));
    let mut third = desk.connect();
    desk.accept();
    let (told, over) = read(&mut third);
    assert!(told.contains("protocol") && !over, "{told}");
}

/// The kernel told of the client that waited again and again.
#[test]
fn without_descriptors_clients_are_told_or_wait() {
    let mut desk = Desk::new(4);
    desk.fail(libc::EMFILE);
    let mut told = desk.connect();
    desk.accept();
    assert!(read(&mut told).0.contains("too many connections"), "with the descriptor that was kept");
    assert!(desk.listens());

    (0..2).for_each(|_| desk.fail(libc::ENFILE));
    let mut waits = desk.connect();
    desk.accept();
    assert!(!desk.listens());
    assert_eq!(desk.clients.next_look(), Some(desk.now + DEAF));
    assert_eq!(read(&mut waits), (String::new(), false));
    desk.now += DEAF - Duration::from_millis(1);
    desk.clients.listener().tend(desk.now, &mut desk.watches);
    assert!(!desk.listens());
    desk.now += Duration::from_millis(1);
    desk.clients.listener().tend(desk.now, &mut desk.watches);
    assert!(desk.listens());
    assert_eq!(desk.clients.next_look(), None);
    desk.accept();
    assert!(read(&mut waits).0.contains("protocol"));
}

#[test]
fn who_hangs_up_is_forgotten_when_its_answer_is_there() {
    let mut desk = Desk::new(1);
    let mut client = desk.connect();
    desk.accept();
    client.write_all(LIST).unwrap();
    drop(client);
    assert!(desk.asks(A));
    assert!(!desk.asks(A));
    assert!(desk.clients.connected.contains_key(&A), "its request is under way");
    desk.done(A);
    desk.clients.take_pending().into_iter().for_each(|id| assert!(!desk.asks(id)));
    assert!(desk.clients.connected.is_empty());
    assert!(desk.clients.has_read_all(A), "there is nobody to wait for");
    desk.done(A);
}

/// It was not shown anything more, and not told that this was the end: it read on for ever.
#[test]
fn a_viewer_that_never_reads_is_dropped() {
    let mut desk = Desk::new(2);
    let (mut slow, mut quick) = (desk.connect(), desk.connect());
    desk.accept();
    let mut viewers = vec![A, ClientId(2), ClientId(3)];
    for viewer in &viewers {
        desk.clients.stream(*viewer, Mode::Viewer, b"before\n");
    }
    let line = [b'x'; 1 << 16];
    for _ in 0..200 {
        desk.clients.show(&mut viewers, &line, &mut desk.watches);
        desk.clients.stirred(ClientId(2));
        read(&mut quick);
        for id in desk.clients.take_pending() {
            assert_eq!(id, A);
            assert!(!desk.asks(id));
        }
    }
    assert_eq!(viewers, [ClientId(2)]);
    // The loop has let go of what is not watched any more.
    desk.watches = Watches::new();
    let (shown, over) = read(&mut slow);
    assert!(shown.contains("before") && over, "{} bytes", shown.len());
    assert!(!read(&mut quick).1);
}

#[test]
fn what_is_closed_ends_when_all_is_read() {
    let mut desk = Desk::new(1);
    let mut client = desk.connect();
    desk.accept();
    desk.clients.stream(A, Mode::Viewer, &[b'x'; 4 << 20]);
    desk.clients.close(A);
    assert!(!desk.asks(A));
    assert!(!desk.clients.has_read_all(A));
    let mut read_bytes = 0;
    for _ in 0..1000 {
        let (text, over) = read(&mut client);
        read_bytes += text.matches('x').count();
        if over {
            break;
        }
        assert!(!desk.asks(A));
        desk.watches = Watches::new();
    }
    assert_eq!((read_bytes, desk.clients.connected.len()), (4 << 20, 0));
}
