//! `ls`, `tree`, `stats`, `inspect`: what the verbs that look tell.

use crate::api::{Confinement, EntryInfo, Failure, Inspection, RunInfo, Stats, Totals, TreeRow, VmStats, VmSummary};
use crate::confinement;
use crate::server::Server;
use crate::server::aside::Holder;
use crate::server::ids::{FamilyId, Generation};
use crate::server::inspect::look::Findings;
use crate::server::procs::process::VmProcess;
use crate::server::registry::vm::Vm;
use guest_mem::{GfnRange, PAGE_SIZE, Source};
use std::collections::BTreeMap;

/// Runs that `inspect` tells of.
const RUNS_SHOWN: usize = 64;

impl Server {
    pub fn list(&self) -> Vec<VmSummary> {
        self.registry.vms.iter().map(|vm| self.summary(vm)).collect()
    }

    pub fn summary(&self, vm: &Vm) -> VmSummary {
        let process = vm.process.and_then(|id| self.procs.all.get(&id));
        let pid = process.and_then(|process| process.memory.main()).map(|pid| pid.as_raw());
        self.registry.vms.summary(vm, pid)
    }

    /// All VMs, each behind its parent and its older siblings.
    pub fn tree(&self, seen: &Findings) -> Vec<TreeRow> {
        let mut children: BTreeMap<Option<Generation>, Vec<&Vm>> = BTreeMap::new();
        for vm in self.registry.vms.iter() {
            let parent = vm.parent().filter(|&parent| self.registry.vms.get(parent).is_some());
            children.entry(parent).or_default().push(vm);
        }
        let mut rows = Vec::new();
        let mut stack: Vec<(u32, &Vm)> =
            children.remove(&None).unwrap_or_default().into_iter().map(|vm| (0, vm)).collect();
        stack.reverse();
        while let Some((depth, vm)) = stack.pop() {
            let counts = seen.counts.get(&vm.generation).copied().unwrap_or_default();
            let vm_row = self.summary(vm);
            rows.push(TreeRow { vm: vm_row, depth, private_pages: counts.private, shared_pages: counts.shared });
            let below = children.remove(&Some(vm.generation)).unwrap_or_default();
            stack.extend(below.into_iter().rev().map(|child| (depth + 1, child)));
        }
        rows
    }

    pub fn stats(&self, name: Option<&str>, seen: &Findings) -> Result<Stats, Failure> {
        let only = name.map(|name| self.find(name).map(|vm| vm.generation)).transpose()?;
        let vms = self.registry.vms.iter().filter(|vm| only.is_none_or(|only| only == vm.generation));
        let vms = vms.map(|vm| self.vm_stats(vm, seen)).collect();
        Ok(Stats { vms, total: self.totals(seen), requests: self.clients.latencies.shown() })
    }

    fn vm_stats(&self, vm: &Vm, seen: &Findings) -> VmStats {
        let counts = seen.counts.get(&vm.generation).copied().unwrap_or_default();
        let process = vm.process.and_then(|id| self.procs.all.get(&id));
        let runs = process.filter(|process| process.memory.main().is_some());
        let usage = runs.and_then(|process| seen.usage.get(&Holder::Process(process.id)));
        let books = vm.memory.map(|(family, member)| (self.memory.families[&family].family(), member));
        VmStats {
            vm: self.summary(vm),
            private_pages: counts.private,
            shared_pages: counts.shared,
            zero_pages: counts.zero,
            swapped_pages: counts.swapped,
            ballooned_pages: vm.balloon_pages,
            unsettled_pages: counts.in_flight,
            chain_depth: books.map_or(0, |(family, member)| family.chain_depth(member)),
            window_runs: books.map_or(0, |(family, member)| family.runs(member).len() as u64),
            pss_bytes: usage.map_or(0, |usage| usage.pss),
            traps: vm.traps,
            messages: process.map_or(0, |process| process.messages),
            guest_stats: vm.guest_memory.map(|said| said.shown()),
        }
    }

    fn totals(&self, seen: &Findings) -> Totals {
        let mut sum = guest_mem::stats::FamilyTotals::default();
        for manager in self.memory.families.values() {
            let family = manager.family().totals();
            sum.objects += family.objects;
            sum.stores += family.stores;
            sum.resident += family.resident;
            sum.swapped += family.swapped;
            sum.in_flight += family.in_flight;
            sum.tables += family.tables;
            sum.unshared_tables += family.unshared_tables;
        }
        let swap = self.memory.swap.borrow().stats();
        let unneeded: u64 = self.memory.families.values().map(|manager| manager.unneeded_slots().0).sum();
        let counts =
            self.memory.families.values().map(|manager| manager.counts()).fold(self.memory.past, std::ops::Add::add);
        Totals {
            server_pid: std::process::id() as i32,
            vms: self.registry.vms.iter().count() as u64,
            objects: sum.objects,
            stores: sum.stores,
            resident_pages: sum.resident,
            swapped_pages: sum.swapped,
            unsettled_pages: sum.in_flight,
            stage2_tables: sum.tables,
            stage2_tables_unshared_equivalent: sum.unshared_tables,
            pooled: self.pooled(),
            host_bytes: self.host_bytes(sum.resident, seen),
            budget_bytes: self.memory.budget.limit(),
            accounted_bytes: self.accounted_bytes(&seen.usage),
            compressed_bytes: swap.compressed_bytes,
            disk_bytes: swap.disk_bytes,
            swap_slots: swap.slots_used - unneeded,
            swap_out_pages: counts.swap_out_pages,
            swap_write_pages: swap.swap_write_pages,
            swap_in_pages: counts.swap_in_pages,
            clean_eviction_pages: counts.clean_evictions,
            discarded_pages: counts.discarded_pages,
            refault_pages: counts.refaults,
            lost_pages: counts.lost_pages,
            swap_in_live_pages: counts.swap_in_live_pages,
            readahead_pages: swap.readahead_pages,
            readahead_hit_pages: swap.readahead_hits,
            writeahead_pages: swap.writeahead_pages,
            traps: self.memory.traps,
        }
    }

    /// What everything uses: processes without their shares of stores, and the stores.
    fn host_bytes(&self, resident: u64, seen: &Findings) -> u64 {
        let used = seen.usage.values().map(|usage| usage.pss - usage.pss_shared.min(usage.pss) + usage.page_tables);
        used.sum::<u64>() + resident * PAGE_SIZE as u64 + self.memory.files.resident().bytes() + self.shared_bytes()
    }

    pub fn inspect(&self, name: &str, seen: &Findings) -> Result<Inspection, Failure> {
        let vm = self.find(name)?;
        let process = vm.process.and_then(|id| self.procs.all.get(&id));
        let (entries, runs) = match vm.memory {
            Some((family, member)) => self.address_space(family, member),
            None => Default::default(),
        };
        Ok(Inspection {
            stats: self.vm_stats(vm, seen),
            generation: vm.generation.0,
            keeper_pid: process.and_then(|process| process.memory.keeper.get()).map(|pid| pid.as_raw()),
            isolation: self.host.isolation.to_string(),
            confinement: process.filter(|process| process.ready).and_then(|process| self.confinement(process)),
            vsock: self.clients.doors.of(vm.generation).map(ToOwned::to_owned),
            agent: vm.agent.clone(),
            children: self.children(vm).map(|child| child.name.clone()).collect(),
            child_ids: self.children(vm).map(|child| child.generation.0).collect(),
            entries,
            runs,
        })
    }

    /// What keeps a process apart; none if it is just ending.
    fn confinement(&self, process: &VmProcess) -> Option<Confinement> {
        let pid = process.memory.main()?;
        let found = confinement::of(pid.as_raw(), self.host.isolation);
        found.inspect_err(|error| log::warn!("what keeps process {pid} apart: {error}")).ok()
    }

    fn children(&self, of: &Vm) -> impl Iterator<Item = &Vm> {
        let parent = of.generation;
        self.registry.vms.iter().filter(move |vm| vm.parent() == Some(parent))
    }

    fn address_space(&self, family: FamilyId, member: guest_mem::VmId) -> (Vec<EntryInfo>, Vec<RunInfo>) {
        let family = self.memory.families[&family].family();
        let vm = family.vm(member);
        let bounds = |pages: GfnRange| (pages.start().gpa(), pages.end().gpa());
        let entries = vm.map().iter().map(|(pages, entry)| {
            let (start, end) = bounds(pages);
            let chain = family.objects().chain(entry.object).map(|object| object.0).collect();
            EntryInfo { start, end, copy_on_write: entry.copy_on_write(), needs_copy: entry.needs_copy, chain }
        });
        let runs = family.runs(member).iter().take(RUNS_SHOWN).map(|run| {
            let (start, end) = bounds(run.pages);
            let source = match run.source {
                Source::Anonymous => "anonymous".to_owned(),
                Source::Store { store, .. } => format!("store {}", store.0),
                Source::Shared { store, .. } => format!("shared memory, store {}", store.0),
            };
            RunInfo { start, end, source }
        });
        (entries.collect(), runs.collect())
    }
}
