//! The notice of a fork: what a child's device says to the agent of its guest, as soon as the guest runs, and what it hears.
//!
//! It is a connection to the agent's port like any other, but for its host's end, which is here: it takes no socket, no server
//! and no time of the fork's. So a guest that is a clone has random numbers of its own before anybody asks anything of it.

use agent::frame::{self, MAX_FRAME};
use agent::message::{Ack, Forked, FromAgent, Hello, ToAgent};
use agent::{PORT, PROTOCOL};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

/// The port that the agent listens on.
pub const AGENT_PORT: u32 = PORT;
/// Most bytes of an agent's complaint.
const TROUBLE_MAX: usize = 200;

/// Which child a guest is.
#[derive(Clone, Debug)]
pub struct Child {
    /// Its name.
    pub name: String,
    /// Its generation.
    pub generation: u64,
    /// Random numbers that only it gets.
    pub entropy: [u8; 32],
}

/// What came of a notice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Noticed {
    /// The guest has no agent.
    NoAgent,
    /// Its agent has heard it.
    Acked {
        /// Whether the kernel's random numbers are this VM's own now.
        reseeded: bool,
        /// What was not done; empty if all was.
        trouble: String,
    },
}

impl Noticed {
    fn refused(why: impl Into<String>) -> Self {
        Self::Acked { reseeded: false, trouble: why.into() }
    }
}

/// How far a notice is.
#[derive(Debug)]
pub struct Notice {
    child: Option<Child>,
    unsaid: VecDeque<u8>,
    heard: Vec<u8>,
    greeted: bool,
}

impl Notice {
    /// One of which nothing has been said.
    pub fn new(child: Child) -> Self {
        Self { child: Some(child), unsaid: VecDeque::new(), heard: Vec::new(), greeted: false }
    }

    /// The next bytes for the agent, so many at most. The time of day in them is that of the first: the guest may have stood
    /// still for long before it could hear them.
    pub fn say(&mut self, most: usize) -> Vec<u8> {
        if let Some(Child { name, generation, entropy }) = self.child.take() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let wall_ns = now.as_nanos().try_into().unwrap_or(u64::MAX);
            for message in [
                ToAgent::Hello(Hello { protocol: PROTOCOL, generation }),
                ToAgent::Forked(Forked { name: name.into_bytes(), generation, entropy, wall_ns }),
            ] {
                frame::write(&mut self.unsaid, &message).expect("a name fits into a frame");
            }
        }
        self.unsaid.drain(..most.min(self.unsaid.len())).collect()
    }

    /// The agent says something. What came of the notice, if that is known now.
    pub fn hear(&mut self, bytes: &[u8]) -> Option<Noticed> {
        self.heard.extend_from_slice(bytes);
        loop {
            let len = u32::from_le_bytes(*self.heard.first_chunk()?) as usize;
            if len > MAX_FRAME {
                return Some(Noticed::refused(format!("its agent begins a frame of {len} bytes")));
            }
            let frame: Vec<u8> = match self.heard.len() - 4 {
                there if there < len => return None,
                _ => self.heard.drain(..4 + len).collect(),
            };
            match frame::read(&mut &frame[..]) {
                Ok(Some(FromAgent::Hello(hello))) if !self.greeted && hello.protocol == PROTOCOL => self.greeted = true,
                Ok(Some(FromAgent::Hello(hello))) => {
                    return Some(Noticed::refused(format!("its agent speaks protocol {}", hello.protocol)));
                }
                Ok(Some(FromAgent::Ack(Ack { reseeded, trouble, .. }))) if self.greeted => {
                    return Some(Noticed::Acked { reseeded, trouble: text(&trouble) });
                }
                Ok(Some(FromAgent::Failed(failed))) => return Some(Noticed::refused(text(&failed.why))),
                _ => return Some(Noticed::refused("its agent says something else")),
            }
        }
    }
}

/// The beginning of what an agent has to say.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(TROUBLE_MAX)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::message::{Failed, FailedKind};

    fn notice() -> Notice {
        Notice::new(Child { name: "a-1".into(), generation: 7, entropy: [9; 32] })
    }

    fn framed(messages: &[FromAgent]) -> Vec<u8> {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| frame::write(&mut bytes, message).unwrap());
        bytes
    }

    fn hello(protocol: u32) -> FromAgent {
        FromAgent::Hello(Hello { protocol, generation: 0 })
    }

    fn ack(trouble: &str) -> FromAgent {
        FromAgent::Ack(Ack { generation: 7, reseeded: true, trouble: trouble.into() })
    }

    #[test]
    fn it_is_said_in_pieces_of_any_size_and_once() {
        let mut notice = notice();
        let mut said = Vec::new();
        while let piece @ [_, ..] = &notice.say(3)[..] {
            said.extend_from_slice(piece);
        }
        let mut said = &said[..];
        let first: ToAgent = frame::read(&mut said).unwrap().unwrap();
        assert_eq!(first, ToAgent::Hello(Hello { protocol: PROTOCOL, generation: 7 }));
        let Some(ToAgent::Forked(forked)) = frame::read(&mut said).unwrap() else { panic!("no notice") };
        assert_eq!((&forked.name[..], forked.generation, forked.entropy), (&b"a-1"[..], 7, [9; 32]));
        assert!(said.is_empty());
    }

    #[test]
    fn an_ack_is_heard_byte_by_byte() {
        let mut notice = notice();
        let bytes = framed(&[hello(PROTOCOL), ack("a hook failed")]);
        let (last, first) = bytes.split_last().unwrap();
        assert!(first.iter().all(|byte| notice.hear(&[*byte]).is_none()));
        assert_eq!(notice.hear(&[*last]), Some(Noticed::Acked { reseeded: true, trouble: "a hook failed".into() }));
    }

    #[test]
    fn an_agent_that_says_something_else_has_not_reseeded() {
        let failed = FromAgent::Failed(Failed::new(FailedKind::Guest, "no"));
        let long = "x".repeat(5000);
        for (said, why) in [
            (framed(&[hello(PROTOCOL + 1)]), format!("its agent speaks protocol {}", PROTOCOL + 1)),
            (framed(&[hello(PROTOCOL), hello(PROTOCOL)]), format!("its agent speaks protocol {PROTOCOL}")),
            (framed(&[ack("")]), "its agent says something else".into()),
            (framed(&[hello(PROTOCOL), FromAgent::Done]), "its agent says something else".into()),
            (framed(&[failed]), "no".into()),
            (vec![0xff; 4], "its agent begins a frame of 4294967295 bytes".into()),
            (vec![2, 0, 0, 0, 0xff, 0xff], "its agent says something else".into()),
        ] {
            assert_eq!(notice().hear(&said), Some(Noticed::Acked { reseeded: false, trouble: why }), "{said:?}");
        }
        let told = notice().hear(&framed(&[hello(PROTOCOL), ack(&long)]));
        assert_eq!(told, Some(Noticed::Acked { reseeded: true, trouble: "x".repeat(TROUBLE_MAX) }));
    }
}
