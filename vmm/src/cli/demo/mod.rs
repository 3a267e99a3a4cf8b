//! The whole thing in half a minute: launch, fill, fork, write, fork again, verify every page, what it took, clean up.

mod picture;
mod stage;

use super::errors::CliError;
use super::signals::Signals;
use super::{Done, SUCCESS, show};
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use stage::Stage;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use vmm::api::{Child, Stats};
use vmm::client::{ClientBuilder, ForkOptions, Forked, LaunchOptions, Vm};
use vmm::units::ByteSize;

const MEMORY: ByteSize = ByteSize::mib(256);
/// The memory in use is looked at in slots: of 4 MiB each, and 64 MiB in all.
const SLOT_PAGES: u64 = 1024;
const SLOTS: usize = 16;
const CLONES: u32 = 8;
/// How many of the clones are forked again.
const AGAIN: usize = 2;
/// What the first VM fills all slots with. The others count from here.
const SEED: u64 = 1;
/// For a guest to answer, on the slowest of hosts.
const PATIENCE: Duration = Duration::from_secs(120);

pub fn run(home: Option<&Path>, server: ClientBuilder, svg: Option<&Path>, out: &mut impl Write) -> Done {
    let bad_file = |path: &Path, error| CliError::bad_input(format!("demo: --svg {}: {error}", path.display()));
    let picture = svg.map(|path| File::create(path).map_err(|error| bad_file(path, error))).transpose()?;
    let signals = Signals::catch()?;
    let options = LaunchOptions::new().memory(MEMORY);
    options.check()?;
    let stage = Stage::set(home, server, signals)?;
    let played = play(&stage, options, picture, out);
    // Also after a failure; which is the one to tell of, if both failed.
    let cleared = stage.clear();
    played?;
    cleared?;
    writeln!(out, "cleaned up")?;
    Ok(SUCCESS)
}

/// A VM, and the seed that each of its slots was last filled with, by itself or by an ancestor.
struct Member {
    vm: Vm,
    seeds: [u64; SLOTS],
}

impl Member {
    fn forked(&self, child: &Forked) -> Self {
        Self { vm: child.vm.clone(), seeds: self.seeds }
    }

    /// Overwrites a slot, with a seed that nobody else has.
    fn write(&mut self, slot: usize) -> Result<(), CliError> {
        let seed = SEED + 1 + slot as u64;
        self.ask("fill", slot, SLOT_PAGES, seed)?;
        self.seeds[slot] = seed;
        Ok(())
    }

    fn verify(&self, slot: usize) -> Result<(), CliError> {
        self.ask("verify", slot, SLOT_PAGES, self.seeds[slot])
    }

    fn ask(&self, command: &str, slot: usize, pages: u64, seed: u64) -> Result<(), CliError> {
        let page = firmware::abi::FIRST_FREE_PAGE + slot as u64 * SLOT_PAGES;
        match self.vm.send(&format!("{command} {page} {pages} {seed}"), PATIENCE) {
            Ok(_) => Ok(()),
            Err(e) => Err(CliError::failed(format!("demo: {command} in {}: {e}", self.vm.name()))),
        }
    }
}

fn play(stage: &Stage, options: LaunchOptions, picture: Option<File>, out: &mut impl Write) -> Result<(), CliError> {
    let mut steps = Steps::new(out);
    let client = stage.client();

    let vm = steps.step("launch the built-in guest", |_| Ok(client.launch(options.name(stage.root()))?))?;
    let mut root = Member { vm, seeds: [SEED; SLOTS] };
    steps.step("fill 64 MiB of it", |_| root.ask("fill", 0, SLOTS as u64 * SLOT_PAGES, SEED))?;
    root.seeds = [SEED; SLOTS];

    let forks =
        steps.step("fork it 8 times while it runs", |_| Ok(root.vm.fork(ForkOptions::new().count(CLONES))?))?;
    let mut clones: Vec<Member> = forks.iter().map(|child| root.forked(child)).collect();
    steps.step("let each clone write 4 MiB of its own", |bar| {
        bar.set_length(u64::from(CLONES));
        clones.iter_mut().enumerate().try_for_each(|(slot, clone)| clone.write(slot).inspect(|()| bar.inc(1)))
    })?;

    let mut forks_again = Vec::new();
    let mut grandchildren = Vec::new();
    steps.step("fork two of the clones again, and let those write", |_| {
        for (index, clone) in clones.iter().take(AGAIN).enumerate() {
            let children = clone.vm.fork(ForkOptions::new())?;
            for child in &children {
                let mut member = clone.forked(child);
                member.write(clones.len() + index)?;
                grandchildren.push(member);
            }
            forks_again.push((clone.vm.name().to_owned(), children));
        }
        Ok(())
    })?;

    let members: Vec<&Member> = [&root].into_iter().chain(&clones).chain(&grandchildren).collect();
    let pages = members.len() as u64 * SLOTS as u64 * SLOT_PAGES;
    steps.step(&format!("verify {pages} pages in {} VMs", members.len()), |bar| {
        bar.set_length((members.len() * SLOTS) as u64);
        let mut slots = members.iter().flat_map(|member| (0..SLOTS).map(move |slot| (member, slot)));
        slots.try_for_each(|(member, slot)| member.verify(slot).inspect(|()| bar.inc(1)))
    })?;
    drop(steps);

    writeln!(out)?;
    let tree = of_stage(stage, client.tree()?, |row| &row.vm.name);
    show::tree(out, &tree)?;
    if let Some(mut picture) = picture {
        picture.write_all(picture::svg(&tree).as_bytes())?;
    }
    writeln!(out)?;
    let mut latencies = latency_table();
    add_latencies(&mut latencies, root.vm.name(), &forks);
    for (parent, children) in &forks_again {
        add_latencies(&mut latencies, parent, children);
    }
    writeln!(out, "microseconds: the median of the children, and the longest")?;
    show::write_table(out, &mut latencies, &[1, 2, 3, 4, 5])?;
    writeln!(out)?;
    let mut stats = client.stats()?;
    stats.vms = of_stage(stage, stats.vms, |vm| &vm.vm.name);
    costs(out, &stats)?;
    Ok(())
}

/// The demo's own rows: the home may be one with other VMs.
fn of_stage<T>(stage: &Stage, rows: Vec<T>, name: impl Fn(&T) -> &String) -> Vec<T> {
    rows.into_iter().filter(|row| stage.owns(name(row))).collect()
}

fn latency_table() -> Table {
    show::table(["FORK OF", "CHILDREN", "PAUSE", "READY", "FIRST EXIT", "MOVED PAGES"])
}

/// One fork: its pause, and the median and longest of its children's times.
fn add_latencies(table: &mut Table, parent: &str, children: &[Forked]) {
    let column = |pick: fn(&Child) -> Option<u64>| {
        let mut values: Vec<u64> = children.iter().filter_map(|child| pick(&child.figures)).collect();
        values.sort_unstable();
        match (values.get(values.len() / 2), values.last()) {
            (Some(median), Some(longest)) if median < longest => format!("{median}…{longest}"),
            (Some(value), _) => value.to_string(),
            _ => "-".into(),
        }
    };
    let moved = column(|child| Some(child.moved_pages));
    let times = [column(|child| child.pause_us), column(|child| child.ready_us), column(|child| child.first_exit_us)];
    table.add_row([parent.to_owned(), children.len().to_string()].into_iter().chain(times).chain([moved]));
}

/// What the VMs' pages would take if each had its own, and what they take.
fn costs(out: &mut impl Write, stats: &Stats) -> io::Result<()> {
    let unshared = ByteSize::pages(stats.vms.iter().map(|vm| vm.private_pages + vm.shared_pages).sum());
    let measured = ByteSize(stats.total.host_bytes);
    writeln!(out, "unshared, the pages of these {} VMs would take {}", stats.vms.len(), unshared.approx())?;
    writeln!(
        out,
        "they take {}, {:.1} times less, with everything:\nserver, VM processes, {} prepared ones, page tables",
        measured.approx(),
        unshared.0 as f64 / measured.0.max(1) as f64,
        stats.total.pooled
    )?;
    let total = &stats.total;
    writeln!(
        out,
        "stage-2 tables: {}, and {} if none were shared",
        total.stage2_tables, total.stage2_tables_unshared_equivalent
    )
}

/// What is going on: a bar on a terminal, and a line for each step that is done.
struct Steps<'a, W> {
    out: &'a mut W,
    bar: ProgressBar,
}

impl<'a, W: Write> Steps<'a, W> {
    fn new(out: &'a mut W) -> Self {
        let bar = if io::stderr().is_terminal() { ProgressBar::no_length() } else { ProgressBar::hidden() };
        Self { out, bar }
    }

    fn step<T>(&mut self, what: &str, act: impl FnOnce(&ProgressBar) -> Result<T, CliError>) -> Result<T, CliError> {
        self.bar.reset();
        self.bar.unset_length();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {pos}") {
            self.bar.set_style(style);
        }
        self.bar.set_message(what.to_owned());
        self.bar.enable_steady_tick(Duration::from_millis(100));
        let start = Instant::now();
        let result = act(&self.bar);
        self.bar.disable_steady_tick();
        let millis = start.elapsed().as_secs_f64() * 1000.0;
        let result = result?;
        self.bar.suspend(|| writeln!(self.out, "{what}: {millis:.1} ms").and_then(|()| self.out.flush()))?;
        Ok(result)
    }
}

impl<W> Drop for Steps<'_, W> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_writer_has_a_slot_of_its_own() {
        assert!(CLONES as usize + AGAIN <= SLOTS);
        assert!((firmware::abi::FIRST_FREE_PAGE + SLOTS as u64 * SLOT_PAGES) * vmm::units::PAGE_BYTES <= MEMORY.0);
    }
}
