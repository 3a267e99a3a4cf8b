//! A fork beside QEMU's way: a guest saved to a file, and restored from it for each clone.

use super::PRIVATE;
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{fork, say};
use crate::reference::Qemu;
use crate::stats::{Samples, timed};

const MIB: u64 = 256;

pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(qemu) = Qemu::save(MIB, PRIVATE)? else {
        bench.note("SKIPPED: there is no QEMU here: apt-get install qemu-system-x86");
        return Ok(());
    };
    let home = bench.home()?;
    let parent = home.launch_settled("p", MIB, PRIVATE)?;
    let [mut ours, mut restored, mut booted] = [(); 3].map(|()| Samples::default());
    for _ in bench.rounds(20, 6) {
        home.rest(1)?;
        let (child, us) = timed(|| {
            let (child, _) = fork(&parent)?;
            say(&child, "id")?;
            Ok::<_, crate::Error>(child)
        });
        child?.remove()?;
        home.rest(1)?;
        ours.push(us / 1e3);
        restored.push(qemu.restore()? / 1e3);
        booted.push(qemu.boot()? / 1e3);
    }
    for (name, theirs) in [("QEMU microvm, -incoming", &restored), ("QEMU microvm, booted", &booted)] {
        let (of, reference) = ("fork and first answer".into(), Some((name, theirs)));
        bench.figure(&Figure { of, unit: "ms", subject: &ours, reference, aim: Aim::Report });
    }
    bench.note(
        "the client's clock, to the guest's first answer (QEMU's on its serial console, asked once its machine runs)",
    );
    Ok(())
}
