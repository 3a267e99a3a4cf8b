//! What the server runs while nothing happens.

use super::{PRIVATE, clones};
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::processes::run_seconds;
use crate::stats::Samples;
use std::thread;
use std::time::{Duration, Instant};

pub fn run(bench: &mut Bench) -> Result<()> {
    let count = bench.pick(200, 50);
    let home = bench.home()?;
    let parent = home.launch_settled("p", 256, PRIVATE)?;
    clones(&parent, count)?;
    home.rest(1 + count)?;
    thread::sleep(Duration::from_secs(bench.pick(12, 2)));
    let everybody: Vec<i32> = home.processes().into_iter().filter(|&pid| pid != home.server()).collect();
    let of_all = || everybody.iter().map(|&pid| run_seconds(pid)).sum::<f64>();
    let [mut server, mut vms] = [(); 2].map(|()| Samples::default());
    for _ in bench.rounds(10, 3) {
        let (start, ran, all_ran) = (Instant::now(), run_seconds(home.server()), of_all());
        thread::sleep(Duration::from_secs(2));
        let passed = start.elapsed().as_secs_f64();
        server.push((run_seconds(home.server()) - ran) / passed * 100.0);
        vms.push((of_all() - all_ran) / passed * 100.0);
    }
    let of = format!("server, {count} idle clones");
    bench.figure(&Figure { of, unit: "% of a core", subject: &server, reference: None, aim: Aim::Below(0.5) });
    let of = format!("all VM processes, {count} idle clones");
    bench.figure(&Figure { of, unit: "% of a core", subject: &vms, reference: None, aim: Aim::Report });
    Ok(())
}
