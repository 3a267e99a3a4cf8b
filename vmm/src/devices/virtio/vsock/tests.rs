//! Connections by script, and by a guest and a host that say whatever comes to their minds.

use super::muxer::{Action, Event, FIRST_PORT, MOST, MOST_ASKED, Muxer, Next, Outcome, Readiness};
use super::packet::{GUEST_CID, HOST_CID, Header, NO_RECEIVE, NO_SEND, Op, Pair, STREAM};
use std::collections::BTreeSet;

/// Cases of the guest and the host that say whatever comes to their minds.
const CASES: usize = 1_000_000;

fn from_guest(pair: Pair, op: Op) -> Header {
    let to = Header::to_guest(pair, op);
    Header {
        source_cid: GUEST_CID,
        destination_cid: HOST_CID,
        source_port: pair.guest,
        destination_port: pair.host,
        room: 4096,
        ..to
    }
}

/// All packets that wait for the guest, where no socket has anything to read.
fn packets(muxer: &mut Muxer) -> Vec<(Pair, Op)> {
    let mut all = Vec::new();
    loop {
        match muxer.next(4096) {
            Next::Nothing => return all,
            Next::Read(pair, _) => drop(muxer.on(Event::Empty(pair))),
            Next::Packet(header) => {
                let pair = Pair { host: header.source_port, guest: header.destination_port };
                all.push((pair, header.op().expect("the device's own are right")));
            }
        }
    }
}

fn connected(muxer: &mut Muxer, tag: u64, port: u32) -> Pair {
    let adopted = muxer.on(Event::Connect { tag, port, greet: false });
    let [Action::Adopt(pair), Action::Watch(..)] = adopted[..] else { panic!("{adopted:?}") };
    assert_eq!(packets(muxer), [(pair, Op::Request)]);
    let told = muxer.on(Event::Packet(&from_guest(pair, Op::Response), &[]));
    assert_eq!(told, [Action::Tell(tag, Outcome::Accepted)]);
    pair
}

#[test]
fn a_child_resets_what_its_parent_had_before_it_begins_anything() {
    let mut parent = Muxer::default();
    let first = connected(&mut parent, 1, 52);
    let second = connected(&mut parent, 2, 53);
    // The guest has not heard of this one, and its own request nobody has answered.
    let _ = parent.on(Event::Connect { tag: 3, port: 54, greet: false });
    let asked = Pair { host: 5000, guest: 60 };
    assert_eq!(parent.on(Event::Packet(&from_guest(asked, Op::Request), &[])), [Action::Ask(asked)]);
    let saved = parent.save();
    assert_eq!(BTreeSet::from_iter(&saved.ended), BTreeSet::from([&first, &second, &asked]));

    let mut child = Muxer::default();
    child.load(saved).unwrap();
    let adopted = child.on(Event::Connect { tag: 9, port: 52, greet: false });
    let Action::Adopt(new) = adopted[0] else { panic!("{adopted:?}") };
    assert!(new.host > FIRST_PORT + 2, "its parent's ports are not used again: {new:?}");
    // The guest goes on sending on a connection of before.
    assert_eq!(child.on(Event::Packet(&from_guest(first, Op::Data), b"x")), []);
    let told = packets(&mut child);
    assert_eq!(told.len(), 5, "{told:?}");
    assert_eq!(told.iter().filter(|(pair, op)| *op == Op::Reset && *pair == first).count(), 2);
    assert_eq!(told[4], (new, Op::Request), "after all that was to be reset");
    child.check();
}

#[test]
fn a_state_that_no_parent_has_is_refused() {
    let ended = vec![Pair { host: 1, guest: 1 }; 10 * MOST];
    assert!(Muxer::default().load(super::Saved { ended, next_port: 1 }).is_err());
}

#[test]
fn there_are_so_many_connections_and_no_more() {
    let mut muxer = Muxer::default();
    for port in 0..MOST_ASKED as u32 {
        let pair = Pair { host: port, guest: 1 };
        assert_eq!(muxer.on(Event::Packet(&from_guest(pair, Op::Request), &[])), [Action::Ask(pair)]);
    }
    let more = Pair { host: 9999, guest: 1 };
    assert_eq!(muxer.on(Event::Packet(&from_guest(more, Op::Request), &[])), []);
    assert_eq!(packets(&mut muxer), [(more, Op::Reset)], "nobody has answered the others");
    for tag in 0..(MOST - MOST_ASKED) as u64 {
        connected(&mut muxer, tag, 7);
    }
    assert_eq!(muxer.on(Event::Connect { tag: 7777, port: 7, greet: false }), [Action::Tell(7777, Outcome::Full)]);
    muxer.check();
    let closed = muxer.on(Event::Reset);
    assert_eq!(closed.iter().filter(|action| matches!(action, Action::Close(_))).count(), MOST - MOST_ASKED);
    assert!(!muxer.has_next());
    muxer.check();
}

#[test]
fn what_a_guest_asks_for_and_gives_up_counts_until_the_host_has_answered() {
    let mut muxer = Muxer::default();
    let pair = Pair { host: 5, guest: 1 };
    for _ in 0..MOST_ASKED {
        assert_eq!(muxer.on(Event::Packet(&from_guest(pair, Op::Request), &[])), [Action::Ask(pair)]);
        assert_eq!(muxer.on(Event::Packet(&from_guest(pair, Op::Reset), &[])), []);
    }
    assert_eq!(muxer.on(Event::Packet(&from_guest(pair, Op::Request), &[])), []);
    assert_eq!(packets(&mut muxer), [(pair, Op::Reset)]);
    assert_eq!(muxer.on(Event::Answer(pair, true)), [], "nobody wants it");
    assert_eq!(muxer.on(Event::Packet(&from_guest(pair, Op::Request), &[])), [Action::Ask(pair)]);
    muxer.check();
}

#[test]
fn news_of_a_socket_of_before_is_not_of_the_next_with_the_same_ports() {
    let mut muxer = Muxer::default();
    let pair = Pair { host: 5, guest: 1 };
    for _ in 0..2 {
        assert_eq!(muxer.on(Event::Packet(&from_guest(pair, Op::Request), &[])), [Action::Ask(pair)]);
        // The second time, the main thread had written this down before the guest left the first.
        let _ = muxer.on(Event::Ready(pair, Readiness { hung_up: true, ..Readiness::default() }));
        assert_eq!(muxer.on(Event::Answer(pair, true)), [Action::Adopt(pair)]);
        assert_eq!(packets(&mut muxer), [(pair, Op::Response)]);
        let half = Readiness { read: true, ..Readiness::default() };
        assert_eq!(muxer.on(Event::Empty(pair)), [Action::Watch(pair, half)], "its end is heard of");
        assert_eq!(muxer.on(Event::Packet(&from_guest(pair, Op::Reset), &[])), [Action::Close(pair)]);
        muxer.check();
    }
}

#[test]
fn what_a_guest_sends_beyond_its_credit_costs_it_the_connection() {
    let mut muxer = Muxer::default();
    let (pair, other) = (connected(&mut muxer, 1, 7), connected(&mut muxer, 2, 7));
    let bytes = vec![0; super::ROOM as usize];
    assert_eq!(muxer.on(Event::Packet(&from_guest(pair, Op::Data), &bytes)), [Action::Write(pair)]);
    // The socket takes none of it.
    let _ = muxer.on(Event::Wrote(pair, 0));
    assert_eq!(muxer.on(Event::Packet(&from_guest(pair, Op::Data), b"x")), [Action::Close(pair)]);
    assert_eq!(packets(&mut muxer).first(), Some(&(pair, Op::Reset)));
    assert_eq!(muxer.on(Event::Packet(&from_guest(other, Op::Data), b"x")), [Action::Write(other)]);
    muxer.check();
}

#[test]
fn a_way_that_has_ended_leaves_the_other_open() {
    let mut muxer = Muxer::default();
    let pair = connected(&mut muxer, 1, 7);
    let half = Header { flags: NO_SEND, ..from_guest(pair, Op::Shutdown) };
    assert_eq!(muxer.on(Event::Packet(&half, &[])), [Action::Shut(pair, NO_SEND)]);
    assert!(matches!(muxer.next(4096), Next::Read(of, _) if of == pair), "the host may go on");
    assert!(muxer.read(pair, 10).is_some());
    let rest = Header { flags: NO_RECEIVE, ..half };
    assert!(muxer.on(Event::Packet(&rest, &[])).contains(&Action::Close(pair)));
    assert!(packets(&mut muxer).contains(&(pair, Op::Reset)), "both ways have ended");
    muxer.check();
}

/// Numbers that are the same in each run.
struct Noise(u64);

impl Noise {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    /// A number that is near one that matters, or anywhere.
    fn number(&mut self) -> u32 {
        let near = [0, 1, 4096, super::ROOM, u32::MAX][self.below(5) as usize];
        if self.below(4) == 0 { self.below(1 << 31) as u32 } else { near.wrapping_add(self.below(3) as u32) }
    }

    fn pair(&mut self) -> Pair {
        let host = if self.below(2) == 0 { FIRST_PORT + self.below(300) as u32 } else { self.below(80) as u32 };
        Pair { host, guest: self.below(4) as u32 }
    }
}

/// Whatever a guest and the host's sockets say, the rules hold: see [`Muxer::check`]. What is asked for is closed or refused in
/// the end, once.
#[test]
fn random_guests_and_hosts_break_no_rule() {
    let (mut noise, mut muxer) = (Noise(20), Muxer::default());
    let (mut sockets, mut asked) = (BTreeSet::new(), BTreeSet::new());
    let mut unanswered = Vec::new();
    let bytes = vec![7; super::ROOM as usize + 1];
    for case in 0..CASES {
        let pair = noise.pair();
        let header = Header {
            op: noise.below(9) as u16,
            len: noise.number(),
            flags: noise.below(5) as u32,
            room: noise.number(),
            taken: noise.number(),
            kind: if noise.below(50) == 0 { 2 } else { STREAM },
            source_cid: if noise.below(50) == 0 { noise.below(5) } else { GUEST_CID },
            ..from_guest(pair, Op::Data)
        };
        let ready = Readiness { read: noise.below(2) == 0, write: noise.below(2) == 0, hung_up: noise.below(8) == 0 };
        let event = match noise.below(24) {
            // Otherwise its packets stay in its ring.
            0..=11 if muxer.listens() => Event::Packet(&header, &bytes[..noise.below(200) as usize]),
            12 if muxer.listens() => Event::Packet(&header, &bytes[..noise.below(bytes.len() as u64) as usize]),
            13 | 14 => {
                asked.insert(case as u64);
                Event::Connect { tag: case as u64, port: pair.guest, greet: noise.below(2) == 0 }
            }
            15 | 16 if !unanswered.is_empty() => {
                let of = unanswered.swap_remove(noise.below(unanswered.len() as u64) as usize);
                Event::Answer(of, noise.below(3) != 0)
            }
            17 | 18 => Event::Ready(pair, ready),
            19 => Event::Empty(pair),
            20 => Event::End(pair),
            21 => Event::Broken(pair),
            22 if noise.below(3000) == 0 => Event::Reset,
            _ => {
                match muxer.next(1 + noise.below(8192) as usize) {
                    Next::Read(of, most) if noise.below(4) != 0 => {
                        assert!(most <= super::ROOM as usize && sockets.contains(&of), "case {case}");
                        let _ = muxer.read(of, 1 + noise.below(most as u64) as usize);
                    }
                    Next::Read(of, _) => drop(muxer.on(Event::Empty(of))),
                    Next::Packet(_) | Next::Nothing => {}
                }
                continue;
            }
        };
        let mut actions = muxer.on(event);
        while let Some(action) = actions.pop() {
            match action {
                Action::Adopt(of) => assert!(sockets.insert(of), "case {case}: {of:?} has a socket"),
                Action::Close(of) => assert!(sockets.remove(&of), "case {case}: {of:?} has none"),
                Action::Tell(tag, _) => assert!(asked.remove(&tag), "case {case}: {tag} is told twice"),
                Action::Write(of) => {
                    let unsent = muxer.unsent(of).len() as u64;
                    if unsent > 0 {
                        actions.extend(muxer.on(Event::Wrote(of, noise.below(unsent + 1) as usize)));
                    }
                }
                Action::Greet(of) | Action::Shut(of, _) | Action::Watch(of, _) => {
                    assert!(sockets.contains(&of) || actions.contains(&Action::Adopt(of)), "case {case}: {of:?}");
                }
                Action::Ask(of) => unanswered.push(of),
            }
        }
        if case % 64 == 0 {
            muxer.check();
        }
    }
    assert!(sockets.len() <= MOST && asked.len() <= MOST);
    for action in muxer.on(Event::Reset) {
        match action {
            Action::Close(of) => assert!(sockets.remove(&of)),
            Action::Tell(tag, _) => assert!(asked.remove(&tag)),
            _ => {}
        }
    }
    assert!(sockets.is_empty() && asked.is_empty(), "{} sockets, {} requests", sockets.len(), asked.len());
    muxer.check();
}
