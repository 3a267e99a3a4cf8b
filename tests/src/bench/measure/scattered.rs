//! The parent's pause with single pages written all over its memory.

use super::pause::PLUS;
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{fork_settled, say};
use crate::reference::Reference;
use crate::stats::Samples;

const RAM: u64 = 512;
const COUNT: u64 = 4096;
/// 4,096 times this are 256 MiB.
const STEP: u64 = 16;
const FIRST: u64 = 512;

pub fn run(bench: &mut Bench) -> Result<()> {
    let home = bench.home()?;
    let [parent, other] = ["p", "o"].map(|name| home.launch_settled(name, RAM, 0));
    let (parent, other) = (parent?, other?);
    let mut reference = Reference::start("move-out", &[RAM])?;
    let [mut pause, mut first, mut together, mut moved, mut protected] = [(); 5].map(|()| Samples::default());
    for _ in bench.rounds(8, 2) {
        for page in (FIRST..).step_by(STEP as usize).take(COUNT as usize) {
            say(&parent, &format!("touch {page} 1 2"))?;
        }
        home.rest(2)?;
        let (child, times) = fork_settled(&parent)?;
        child.remove()?;
        home.rest(2)?;
        pause.push(times.pause);
        first.push(times.first);
        let figures = reference.ask(format!("scattered {COUNT} {STEP}"))?;
        moved.push(figures[0]);
        protected.push(figures[1]);
        say(&other, &format!("touch {FIRST} {COUNT} 2"))?;
        home.rest(2)?;
        let (child, times) = fork_settled(&other)?;
        child.remove()?;
        home.rest(2)?;
        together.push(times.first);
    }
    let cheaper = match moved.median() < protected.median() {
        true => ("bare move-out of each page", &moved),
        false => ("one write-protect call", &protected),
    };
    let aim = Aim::AtMostPlus { times: 2.0, plus: PLUS };
    bench.figure(&Figure { of: "pause".into(), unit: "us", subject: &pause, reference: Some(cheaper), aim });
    let moves = Some(("bare move-out of each page", &moved));
    bench.figure(&Figure { of: "pause".into(), unit: "us", subject: &pause, reference: moves, aim: Aim::Report });
    let reference = Some(("4,096 pages in one piece", &together));
    let aim = Aim::AtMost(2.0);
    bench.figure(&Figure { of: "first-instruction".into(), unit: "us", subject: &first, reference, aim });
    Ok(())
}
