//! Many forks of one running parent, and their end.

use super::PRIVATE;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{fork, say, wait};
use crate::reference::Reference;
use crate::stats::{Samples, timed};
use crate::{Result, processes};

const MIB: u64 = 256;

pub fn run(bench: &mut Bench) -> Result<()> {
    let count = bench.pick(500, 60);
    let [mut forks, mut end, mut others, mut others_end] = [(); 4].map(|()| Samples::default());
    for _ in bench.rounds(3, 1) {
        let home = bench.home()?;
        let parent = home.launch_settled("p", MIB, PRIVATE)?;
        home.rest(1)?;
        let (done, us) = timed(|| (0..count).try_for_each(|_| say(&fork(&parent)?.0, "id").map(drop)));
        done?;
        forks.push(us / 1e3);
        let (removed, us) = timed(|| home.client().remove_all());
        removed?;
        end.push(us / 1e3);
        wait("all are gone", || processes::vms_of(home.server()).is_empty().then_some(()))?;
        drop(home);
        let figures = Reference::start("in-process", &[MIB, PRIVATE, 0])?.ask(format!("crowd {count}"))?;
        others.push(figures[0] / 1e3);
        others_end.push(figures[1] / 1e3);
    }
    let of = format!("{count} forks, each answers");
    let reference = Some(("in-process", &others));
    bench.figure(&Figure { of, unit: "ms", subject: &forks, reference, aim: Aim::AtMost(0.5) });
    let of = format!("end of {count}");
    let reference = Some(("their forks", &forks));
    bench.figure(&Figure { of: of.clone(), unit: "ms", subject: &end, reference, aim: Aim::AtMost(0.3) });
    let reference = Some(("in-process", &others_end));
    bench.figure(&Figure { of, unit: "ms", subject: &end, reference, aim: Aim::Report });
    bench.note("the parent itself ends with its clones");
    Ok(())
}
