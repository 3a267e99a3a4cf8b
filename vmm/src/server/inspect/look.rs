//! `tree`, `stats`, `inspect`: how the verbs that look find out what [`report`](super::report) tells.
//!
//! What processes use, and what their guests have written, is asked [aside](crate::server::aside), some processes at a time. The books
//! are looked at here, and a part of a VM's memory after the other: others are heard between.

use crate::api::{Answer, Failure};
use crate::procfs::{Usage, UsageFiles};
use crate::server::Server;
use crate::server::aside::{self, Holder, LiveLayer, Ticket};
use crate::server::ids::{ClientId, Generation};
use crate::server::registry::vm::Vm;
use guest_mem::stats::PageCounts;
use guest_mem::sys::{Pagemap, ScanMethod};
use guest_mem::{Gfn, GfnRange};
use rangemap::RangeSet;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Processes that are asked about at a time.
const ASKED: usize = 16;
/// Pages of a VM that are counted at a time: 256 MiB.
const PART: u64 = 1 << 16;
/// How long a round may count.
const SLICE: Duration = Duration::from_millis(2);

/// What somebody wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// `tree`.
    Tree,
    /// `stats`, of one VM or of all.
    Stats(Option<String>),
    /// `inspect`.
    Inspect(String),
}

/// What has been found out of processes and of VMs.
#[derive(Debug, Default)]
pub struct Findings {
    pub usage: BTreeMap<Holder, Usage>,
    pub counts: BTreeMap<Generation, PageCounts>,
}

/// Looks under way.
#[derive(Debug, Default)]
pub struct Looks(Vec<Look>);

#[derive(Debug)]
struct Look {
    client: ClientId,
    wanted: Wanted,
    /// Whose use is still to be asked for.
    holders: VecDeque<Holder>,
    /// VMs whose live layers are.
    vms: VecDeque<Generation>,
    asked: Option<Ticket>,
    counting: VecDeque<Counting>,
    seen: Findings,
}

/// How far the pages of a VM have been counted.
#[derive(Debug)]
struct Counting {
    vm: Generation,
    live: RangeSet<u64>,
    next: Gfn,
    counts: PageCounts,
}

impl Server {
    /// Begins to look; the client is answered when all has been found out.
    pub fn begin_look(&mut self, client: ClientId, wanted: Wanted) {
        let name = match &wanted {
            Wanted::Tree | Wanted::Stats(None) => None,
            Wanted::Stats(Some(name)) | Wanted::Inspect(name) => Some(name.as_str()),
        };
        let only = match name.map(|name| self.find(name).map(|vm| vm.generation)).transpose() {
            Ok(only) => only,
            Err(failure) => return self.reply(client, Err(failure)),
        };
        let vms =
            self.registry.vms.iter().map(|vm| vm.generation).filter(|vm| only.is_none_or(|only| only == *vm)).collect();
        let all = || self.procs.all.keys().map(|&id| Holder::Process(id));
        let holders = match wanted {
            Wanted::Tree => VecDeque::new(),
            // What everything uses is among the totals.
            Wanted::Stats(_) => std::iter::once(Holder::Server).chain(all()).collect(),
            Wanted::Inspect(_) => all().filter(|id| only.and_then(|vm| self.holder_of(vm)) == Some(*id)).collect(),
        };
        let (asked, counting, seen) = (None, VecDeque::new(), Findings::default());
        self.inspect.looks.0.push(Look { client, wanted, holders, vms, asked, counting, seen });
    }

    fn holder_of(&self, vm: Generation) -> Option<Holder> {
        self.registry.vms.get(vm)?.process.map(Holder::Process)
    }

    /// Goes on with looks for a moment. Whether there is more to do at once.
    pub fn tend_looks(&mut self) -> bool {
        let until = Instant::now() + SLICE;
        let mut looks = std::mem::take(&mut self.inspect.looks.0);
        looks.retain_mut(|look| {
            self.go_on_looking(look, until);
            let done = look.is_done();
            if done {
                let answer = self.look_answer(&look.wanted, &look.seen);
                self.reply(look.client, answer);
            }
            !done
        });
        looks.append(&mut self.inspect.looks.0);
        self.inspect.looks.0 = looks;
        self.inspect.looks.0.iter().any(|look| !look.counting.is_empty())
    }

    fn go_on_looking(&mut self, look: &mut Look, until: Instant) {
        while Instant::now() < until
            && let Some(counting) = look.counting.front_mut()
        {
            if self.count_part(counting) {
                let Counting { vm, counts, .. } = look.counting.pop_front().expect("looked at above");
                look.seen.counts.insert(vm, counts);
            }
        }
        if look.asked.is_some() || !look.counting.is_empty() {
            return;
        }
        if !look.holders.is_empty() {
            let some = look.holders.drain(..look.holders.len().min(ASKED));
            let open = |holder| Some((holder, UsageFiles::open(self.pid_of(holder)?).ok()?));
            let files: Vec<(Holder, UsageFiles)> = some.filter_map(open).collect();
            look.asked = Some(self.inspect.aside.ask(move || aside::usage(files)));
        } else if !look.vms.is_empty() {
            let some: Vec<Generation> = look.vms.drain(..look.vms.len().min(ASKED)).collect();
            look.asked = Some(self.ask_live_layers(&some));
        }
    }

    /// Has the live layers of these VMs read.
    pub fn ask_live_layers(&mut self, vms: &[Generation]) -> Ticket {
        let layer = |&vm: &Generation| (vm, self.registry.vms.get(vm).and_then(|vm| self.live_layer(vm)));
        let layers: Vec<(Generation, Option<LiveLayer>)> = vms.iter().map(layer).collect();
        self.inspect.aside.ask(move || aside::layers(layers))
    }

    fn pid_of(&self, holder: Holder) -> Option<i32> {
        let memory = match holder {
            Holder::Server => return Some(std::process::id() as i32),
            Holder::Process(id) => &self.procs.all.get(&id)?.memory,
        };
        memory.main().or(memory.keeper.get()).map(|pid| pid.as_raw())
    }

    /// The private pages of a VM's window, to be read; none of one whose process is not ready, or has gone.
    pub fn live_layer(&self, vm: &Vm) -> Option<LiveLayer> {
        let process = vm.process.and_then(|id| self.procs.all.get(&id)).filter(|process| process.ready)?;
        let pid = process.memory.main()?;
        let method = if self.host.features.pagemap_scan { ScanMethod::Scan } else { ScanMethod::Read };
        let pagemap = Pagemap::open_process(pid.as_raw(), method);
        let pagemap = pagemap.inspect_err(|error| log::debug!("pagemap of {pid}: {error}")).ok()?;
        Some(LiveLayer { pagemap, base: process.memory.base.get(), ram: crate::layout::ram_ranges(vm.shape.ram) })
    }

    /// Counts the next part of a VM's pages. Whether that was the last.
    fn count_part(&self, counting: &mut Counting) -> bool {
        let Some((family, member)) = self.registry.vms.get(counting.vm).and_then(|vm| vm.memory) else { return true };
        let family = self.memory.families[&family].family();
        let end = family.vm(member).map().iter().last().map_or(Gfn(0), |(pages, _)| pages.end());
        let part = GfnRange::between(counting.next, Gfn(counting.next.0 + PART));
        counting.counts += family.page_counts_within(member, part, &counting.live);
        counting.next = part.end();
        counting.next >= end
    }

    /// What processes use has been found out.
    pub fn usage_came(&mut self, ticket: Ticket, usage: Vec<(Holder, Usage)>) {
        if let Some(look) = self.inspect.looks.take_asked(ticket) {
            look.seen.usage.extend(usage);
        }
    }

    /// What VMs have written has been found out. Whether it was asked for by a look.
    pub fn layers_came(&mut self, ticket: Ticket, layers: Vec<(Generation, RangeSet<u64>)>) {
        let Some(look) = self.inspect.looks.take_asked(ticket) else { return self.sizes_came(ticket, layers) };
        let counting = |(vm, live)| Counting { vm, live, next: Gfn(0), counts: PageCounts::default() };
        look.counting.extend(layers.into_iter().map(counting));
    }

    fn look_answer(&self, wanted: &Wanted, seen: &Findings) -> Result<Answer, Failure> {
        match wanted {
            Wanted::Tree => Ok(Answer::Tree(self.tree(seen))),
            Wanted::Stats(name) => self.stats(name.as_deref(), seen).map(Answer::Stats),
            Wanted::Inspect(name) => self.inspect(name, seen).map(|said| Answer::Inspected(Box::new(said))),
        }
    }
}

impl Looks {
    /// The look that asked this; it waits no longer.
    fn take_asked(&mut self, ticket: Ticket) -> Option<&mut Look> {
        let look = self.0.iter_mut().find(|look| look.asked == Some(ticket))?;
        look.asked = None;
        Some(look)
    }
}

impl Look {
    fn is_done(&self) -> bool {
        self.asked.is_none() && self.holders.is_empty() && self.vms.is_empty() && self.counting.is_empty()
    }
}
