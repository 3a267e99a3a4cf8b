//! A fork, step by step, idle and beside a busy loop.

use super::{PRIVATE, clones};
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{FIRST_PAGE, Home, fork, say};
use crate::reference::Reference;
use crate::rounds::Rounds;
use crate::stats::{Samples, timed};
use vmm::client::{LaunchOptions, Vm};
use vmm::units::ByteSize;

const MIB: u64 = 256;
/// Live clones beside each fork.
const LIVE: usize = 10;
/// Pages that a child writes first.
const FIRST_WRITES: u64 = 16;

#[derive(Default)]
struct Taken {
    pause: Samples,
    ready: Samples,
    first: Samples,
    answered: Samples,
    writes: Samples,
    floor: Samples,
    floor_receipt: Samples,
    floor_writes: Samples,
    in_process: Samples,
    boot: Samples,
}

struct References {
    floor: Reference,
    in_process: Reference,
}

pub fn run(bench: &mut Bench) -> Result<()> {
    let home = bench.home()?;
    let parent = home.launch_settled("p", MIB, PRIVATE)?;
    let _clones = clones(&parent, LIVE)?;
    let mut references = References {
        floor: Reference::start("floor", &[MIB, PRIVATE])?,
        in_process: Reference::start("in-process", &[MIB, PRIVATE, LIVE as u64])?,
    };
    let idle = sample(&home, &parent, &mut references, bench.rounds(200, 25))?;
    tell(bench, "", &idle);
    let busy = Reference::start("busy", &[0])?;
    let beside = sample(&home, &parent, &mut references, bench.rounds(200, 25))?;
    drop(busy);
    tell(bench, "busy/", &beside);
    bench.note("pause, ready, first-instruction: the server's clock, from its receipt of the request; answered, first-writes: the client's");
    bench.note("first-writes: from the request for the fork until the child has written 16 shared pages and said so");
    bench.note("busy: the same beside a busy loop on one core");
    Ok(())
}

fn sample(home: &Home, parent: &Vm, references: &mut References, rounds: Rounds) -> Result<Taken> {
    let mut taken = Taken::default();
    for _ in rounds {
        home.rest(1 + LIVE)?;
        let (child, times) = fork(parent)?;
        child.remove()?;
        home.rest(1 + LIVE)?;
        taken.pause.push(times.pause);
        taken.ready.push(times.ready);
        taken.first.push(times.first);
        taken.answered.push(times.answered);
        let floor = references.floor.ask("fork")?;
        taken.floor.push(floor[0]);
        taken.floor_receipt.push(floor[1]);
        taken.in_process.push(references.in_process.figure("fork")?);

        let (child, us) = timed(|| {
            let (child, _) = fork(parent)?;
            say(&child, &format!("touch {FIRST_PAGE} {FIRST_WRITES} 2"))?;
            Ok::<_, crate::Error>(child)
        });
        child?.remove()?;
        home.rest(1 + LIVE)?;
        taken.writes.push(us);
        taken.floor_writes.push(references.floor.ask(format!("writes {FIRST_PAGE} {FIRST_WRITES}"))?[1]);

        let options = LaunchOptions::new().name("booted").memory(ByteSize::mib(MIB));
        let (booted, us) = timed(|| home.client().launch(options));
        booted?.remove()?;
        taken.boot.push(us);
    }
    Ok(taken)
}

fn tell(bench: &mut Bench, how: &str, taken: &Taken) {
    let floor = Aim::AtMostOrFloor { times: 0.6, floor: taken.floor.median() };
    let receipt = "floor, from the prepared process's receipt";
    for (what, subject, name, reference, aim) in [
        ("first-instruction", &taken.first, "floor", &taken.floor, Aim::AtMost(1.3)),
        ("first-instruction", &taken.first, receipt, &taken.floor_receipt, Aim::Report),
        ("first-instruction", &taken.first, "in-process, 10 live", &taken.in_process, floor),
        ("answered", &taken.answered, "launch (boot)", &taken.boot, Aim::Report),
        ("first-writes", &taken.writes, "floor", &taken.floor_writes, Aim::Report),
    ] {
        // Beside a busy loop figures are told, not judged.
        let aim = if how.is_empty() { aim } else { Aim::Report };
        let of = format!("{how}{what}");
        bench.figure(&Figure { of, unit: "us", subject, reference: Some((name, reference)), aim });
    }
    for (what, subject) in [("pause", &taken.pause), ("ready", &taken.ready)] {
        bench.figure(&Figure { of: format!("{how}{what}"), unit: "us", subject, reference: None, aim: Aim::Report });
    }
}
