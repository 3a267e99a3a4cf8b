//! Whatever bytes come, reading a message neither panics nor takes more memory than a small multiple of a frame.

use agent::frame::{self, MAX_FRAME};
use agent::message::{
    Ack, Exit, Failed, FailedKind, Forked, FromAgent, Hello, Malformed, Message, Place, Session, Size, Start, ToAgent,
};
use std::cell::Cell;
use std::io::{Cursor, ErrorKind};

/// What this thread has allocated since it last asked.
#[allow(unsafe_code, reason = "an allocator that counts")]
mod counting {
    use super::Cell;
    use std::alloc::{GlobalAlloc, Layout, System};

    thread_local!(static BYTES: Cell<usize> = const { Cell::new(0) });

    pub struct Counting;

    // SAFETY: all is the system allocator's; only a number is kept beside.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            BYTES.with(|bytes| bytes.set(bytes.get() + layout.size()));
            // SAFETY: the caller's promise is passed on.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: as above.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    pub fn taken() -> usize {
        BYTES.with(|bytes| bytes.replace(0))
    }
}

/// xorshift64*: the same cases in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let len = self.below(most + 1);
        (0..len).map(|_| self.next() as u8).collect()
    }

    fn list(&mut self) -> Vec<Vec<u8>> {
        let len = self.below(5);
        (0..len).map(|_| self.bytes(12)).collect()
    }

    fn exit(&mut self) -> Exit {
        match self.below(3) {
            0 => Exit::Code(self.next() as u8),
            1 => Exit::Signal(self.next() as u8),
            _ => Exit::TimedOut,
        }
    }
}

fn to_agent(r: &mut Random) -> ToAgent {
    let size = Size { rows: r.next() as u16, columns: r.next() as u16 };
    match r.below(12) {
        0 => ToAgent::Hello(Hello { protocol: agent::PROTOCOL, generation: r.next() }),
        1 => ToAgent::Start(Start {
            argv: r.list(),
            env: r.list(),
            cwd: (r.below(2) == 0).then(|| r.bytes(20)),
            user: (r.below(2) == 0).then(|| r.bytes(20)),
            terminal: (r.below(2) == 0).then_some(size),
            stdin: r.below(2) == 0,
            timeout_ms: r.next(),
            detached: r.below(2) == 0,
        }),
        2 => ToAgent::Attach { session: r.next() as u32 },
        3 => ToAgent::List,
        4 => ToAgent::Signal { session: r.next() as u32, signal: r.next() as u8 },
        5 => ToAgent::Data(r.bytes(50)),
        6 => ToAgent::DataEnd,
        7 => ToAgent::Resize(size),
        8 => ToAgent::Get { path: r.bytes(30) },
        9 => ToAgent::Put { path: r.bytes(30), place: if r.below(2) == 0 { Place::Into } else { Place::As } },
        10 => ToAgent::Dial { port: r.next() as u16 },
        _ => ToAgent::Forked(Forked {
            name: r.bytes(64),
            generation: r.next(),
            entropy: std::array::from_fn(|_| r.next() as u8),
            wall_ns: r.next(),
        }),
    }
}

fn from_agent(r: &mut Random) -> FromAgent {
    match r.below(10) {
        0 => FromAgent::Hello(Hello { protocol: agent::PROTOCOL, generation: r.next() }),
        1 => FromAgent::Started { session: r.next() as u32, pid: r.next() as u32 },
        2 => FromAgent::Out(r.bytes(50)),
        3 => FromAgent::Err(r.bytes(50)),
        4 => FromAgent::Exit(r.exit()),
        5 => FromAgent::Failed(Failed {
            kind: FailedKind::ALL[r.below(FailedKind::ALL.len())],
            errno: r.next() as i32,
            why: r.bytes(40),
        }),
        6 => FromAgent::Session(Session {
            id: r.next() as u32,
            pid: r.next() as u32,
            age_ms: r.next(),
            attached: r.below(2) == 0,
            terminal: r.below(2) == 0,
            exit: (r.below(2) == 0).then(|| r.exit()),
            argv: r.list(),
        }),
        7 => FromAgent::Done,
        8 => FromAgent::Connected,
        _ => FromAgent::Ack(Ack { generation: r.next(), reseeded: r.below(2) == 0, trouble: r.bytes(40) }),
    }
}

fn framed(message: &impl Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::write(&mut bytes, message).unwrap();
    bytes
}

/// Spoils bytes in a way that leaves some of them meaningful.
fn spoil(bytes: &mut Vec<u8>, r: &mut Random) {
    for _ in 0..r.below(4) {
        let at = r.below(bytes.len());
        match (r.below(6), bytes.get_mut(at)) {
            (0, Some(byte)) => *byte = r.next() as u8,
            (1, Some(byte)) => *byte ^= 1 << r.below(8),
            (2, Some(byte)) => *byte = [0, 1, 0x7f, 0x80, 0xff][r.below(5)],
            (3, _) => bytes.truncate(at),
            (4, _) => bytes.extend(r.bytes(20)),
            _ => {
                // A length, wherever it is.
                let word = [u32::MAX, 1 << 16, 1 << 20, 0x7fff_ffff, 3][r.below(5)].to_le_bytes();
                let end = (at + 4).min(bytes.len());
                bytes.splice(at..end, word);
            }
        }
    }
}

fn read_all<M: Message>(bytes: &[u8]) -> usize {
    let mut stream = Cursor::new(bytes);
    let mut read = 0;
    while let Ok(Some(_)) = frame::read::<M>(&mut stream) {
        read += 1;
    }
    read
}

#[test]
fn a_million_frames_that_may_be_spoiled() {
    let mut r = Random(0x0ff5_4007);
    let mut good = 0;
    for _ in 0..500_000 {
        let (to, from) = (to_agent(&mut r), from_agent(&mut r));
        let (mut to_bytes, mut from_bytes) = (framed(&to), framed(&from));
        assert_eq!(frame::read::<ToAgent>(&mut to_bytes.as_slice()).unwrap().as_ref(), Some(&to));
        assert_eq!(frame::read::<FromAgent>(&mut from_bytes.as_slice()).unwrap().as_ref(), Some(&from));
        spoil(&mut to_bytes, &mut r);
        spoil(&mut from_bytes, &mut r);
        counting::taken();
        good += read_all::<ToAgent>(&to_bytes) + read_all::<FromAgent>(&from_bytes);
        // Each may announce one frame that does not come, and an empty text of four bytes is a vector in memory.
        let taken = counting::taken();
        let bound = 2 * MAX_FRAME + 16 * (to_bytes.len() + from_bytes.len()) + 4096;
        assert!(taken <= bound, "{taken} bytes for {to_bytes:?} and {from_bytes:?}");
    }
    // Most are spoiled, and not all.
    assert!((200_000..900_000).contains(&good), "{good}");
}

/// The kinds of fields that the table in the README gives a message, with a value for each that cannot be taken for another's.
fn sample(fields: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in fields.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()) {
        match word {
            "u8" => bytes.push(1),
            "u16" => bytes.extend(7u16.to_le_bytes()),
            // The protocol has to be ours.
            "u32" => bytes.extend(agent::PROTOCOL.to_le_bytes()),
            "i32" => bytes.extend((-7i32).to_le_bytes()),
            "u64" => bytes.extend(9u64.to_le_bytes()),
            "option" => bytes.push(1),
            "list" => bytes.extend([1, 0, 0, 0, 2, 0, 0, 0, b'a', b'b']),
            "bytes" if fields.contains("entropy 32 bytes") && bytes.len() > 8 => bytes.extend([5; 32]),
            "bytes" => bytes.extend([3, 0, 0, 0, b'x', b'y', b'z']),
            "rest" => bytes.extend(b"all of it"),
            _ => {}
        }
    }
    bytes
}

#[test]
fn the_readme_tells_every_message() {
    let readme = include_str!("../README.md");
    let rows = readme.lines().skip_while(|line| !line.starts_with("| tag |")).skip(2);
    let (mut of_client, mut of_agent) = (0, 0);
    for row in rows.take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let said = |cells: &[&str]| {
            let mut bytes = vec![cells[0].parse::<u8>().unwrap()];
            bytes.extend(sample(cells[2]));
            (cells[1].trim_matches('`').to_owned(), bytes)
        };
        let (name, bytes) = said(&cells[1..4]);
        let message = ToAgent::decode(&bytes).unwrap_or_else(|e| panic!("{row}: {e}"));
        assert!(format!("{message:?}").starts_with(&name), "{row}: {message:?}");
        assert_eq!(message.encode(), bytes, "{row}");
        of_client += 1;
        if !cells[5].is_empty() {
            let (name, bytes) = said(&cells[5..8]);
            let message = FromAgent::decode(&bytes).unwrap_or_else(|e| panic!("{row}: {e}"));
            assert!(format!("{message:?}").starts_with(&name), "{row}: {message:?}");
            assert_eq!(message.encode(), bytes, "{row}");
            of_agent += 1;
        }
    }
    // There are no others.
    assert_eq!(ToAgent::decode(&[of_client]), Err(Malformed::Tag(of_client)));
    assert_eq!(FromAgent::decode(&[of_agent]), Err(Malformed::Tag(of_agent)));
}

#[test]
fn the_greediest_frame_takes_a_bounded_multiple() {
    // As many empty arguments as a frame has room for.
    let count = (MAX_FRAME - 64) / 4;
    let start = ToAgent::Start(Start { argv: vec![Vec::new(); count], ..Start::default() });
    let bytes = framed(&start);
    counting::taken();
    assert_eq!(read_all::<ToAgent>(&bytes), 1);
    let taken = counting::taken();
    assert!(taken <= 20 * MAX_FRAME, "{taken}");
}

#[test]
fn frames_have_bounds() {
    let long = ToAgent::Data(vec![0; frame::MAX_DATA + 1]);
    assert_eq!(frame::write(&mut Vec::new(), &long).unwrap_err().kind(), ErrorKind::InvalidData);
    let most = ToAgent::Data(vec![7; frame::MAX_DATA]);
    assert_eq!(frame::read(&mut framed(&most).as_slice()).unwrap(), Some(most));
    let bytes = (MAX_FRAME as u32 + 1).to_le_bytes();
    let e = frame::read::<ToAgent>(&mut bytes.as_slice()).unwrap_err();
    assert_eq!(e.to_string(), "a frame of 65537 bytes: there are 65536 at most");
    assert_eq!(frame::read::<ToAgent>(&mut [0u8; 0].as_slice()).unwrap(), None);
    assert_eq!(frame::read::<ToAgent>(&mut [1u8, 0].as_slice()).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert!(frame::read::<ToAgent>(&mut [1u8, 0, 0, 0, 99].as_slice()).unwrap_err().to_string().contains("99"));
}

#[test]
fn a_greeting_of_another_version_is_understood() {
    let mut bytes = ToAgent::Hello(Hello { protocol: 99, generation: 5 }).encode();
    bytes.extend(b"and whatever it says more");
    assert_eq!(ToAgent::decode(&bytes), Ok(ToAgent::Hello(Hello { protocol: 99, generation: 5 })));
    let mut ours = ToAgent::Hello(Hello { protocol: agent::PROTOCOL, generation: 5 }).encode();
    ours.push(0);
    assert!(ToAgent::decode(&ours).is_err());
}
