//! A clone's write to a page it shares.

use super::{PRIVATE, clones};
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{FIRST_PAGE, fork, say};
use crate::reference::Reference;
use crate::stats::Samples;

const MIB: u64 = 256;
/// Pages that a sample writes.
const COUNT: u64 = 2048;
/// Pages that are not read before.
const UNREAD: u64 = FIRST_PAGE + 4 * COUNT;

pub fn run(bench: &mut Bench) -> Result<()> {
    let home = bench.home()?;
    let parent = home.launch_settled("p", MIB, PRIVATE)?;
    let mut plain = Reference::start("plain-copy", &[MIB, PRIVATE])?;
    let mut live = 0;
    for count in [1, bench.pick(500, 50)] {
        // The clone that writes is one of them.
        clones(&parent, count - 1 - live)?;
        live = count - 1;
        let [mut read, mut unread, mut plain_read, mut plain_unread] = [(); 4].map(|()| Samples::default());
        for _ in bench.rounds(20, 6) {
            home.rest(1 + live)?;
            let (child, _) = fork(&parent)?;
            home.rest(2 + live)?;
            say(&child, &format!("verify-touch {FIRST_PAGE} {COUNT} 1"))?;
            read.push(say(&child, &format!("touch {FIRST_PAGE} {COUNT} 2"))?);
            plain_read.push(plain.figure(format!("read {FIRST_PAGE} {COUNT}"))?);
            unread.push(say(&child, &format!("touch {UNREAD} {COUNT} 2"))?);
            plain_unread.push(plain.figure(format!("unread {UNREAD} {COUNT}"))?);
            child.remove()?;
            home.rest(1 + live)?;
        }
        for (what, ours, theirs) in [("read", &read, &plain_read), ("not read", &unread, &plain_unread)] {
            let [ours, theirs] = [ours, theirs].map(|samples| samples.scaled(1.0 / COUNT as f64));
            let of = format!("{what} before/{count} live");
            let reference = Some(("plain copy-on-write in a lone VM", &theirs));
            bench.figure(&Figure { of, unit: "us/page", subject: &ours, reference, aim: Aim::AtMost(1.1) });
        }
    }
    bench.note("Offshoot's figures hold a request and its answer between client and guest besides, per 2,048 pages");
    Ok(())
}
