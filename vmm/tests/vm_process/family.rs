//! What a server knows of the memory of a launched VM and its forks, kept as simply as can be.

use crate::worker::{ALL, Taken, Worker};
use guest_mem::sys::{Alias, Memfd, Userfaultfd};
use guest_mem::{Gfn, GfnRange, PAGE_SIZE, PageCount, PageIndex, PageOrigin, Run, Source, StoreId};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vmm::layout::ram_ranges;
use vmm::machine::state::{MachineState, PackedState};
use vmm::wire::{Expect, FromVm, Frozen, HostFeatures, Identity, Isolation, Origin, RunState, Start, ToVm};

struct Store {
    file: Memfd,
    alias: Alias,
    read_only: OwnedFd,
}

pub struct Family {
    ram: PageCount,
    uffd: Arc<Userfaultfd>,
    stores: BTreeMap<StoreId, Store>,
    /// Memory that all have.
    shared: Vec<Run>,
    generation: u64,
    pub isolation: Isolation,
    pub features: HostFeatures,
}

/// A VM and what its window shows.
pub struct Machine {
    pub worker: Worker,
    pub runs: Vec<Run>,
}

const IMAGE: StoreId = StoreId(0);

impl Family {
    pub fn new(mem_bytes: u64) -> Self {
        Self::with_image(mem_bytes, firmware::IMAGE)
    }

    pub fn with_image(mem_bytes: u64, image: &[u8]) -> Self {
        let ram = PageCount::covering(mem_bytes);
        let uffd = Arc::new(Userfaultfd::new().unwrap());
        let mut family = Self {
            ram,
            uffd,
            stores: BTreeMap::new(),
            shared: Vec::new(),
            generation: 100,
            isolation: Isolation::OwnUser,
            features: ALL,
        };
        family.add_store(PageCount::covering(image.len() as u64));
        family.stores[&IMAGE].alias.fill(PageIndex(0), image).unwrap();
        family
    }

    fn add_store(&mut self, pages: PageCount) -> StoreId {
        let id = StoreId(self.stores.len() as u32);
        let file = Memfd::new("test-store", pages).unwrap();
        let alias = Alias::new(&file, Arc::clone(&self.uffd)).unwrap();
        let read_only = file.read_only().unwrap();
        self.stores.insert(id, Store { file, alias, read_only });
        id
    }

    /// A store for a freeze.
    pub fn new_store(&mut self) -> StoreId {
        let end = ram_ranges(self.ram).last().unwrap().end();
        self.add_store(PageCount(end.0))
    }

    /// What is launched from now on has shared memory at these pages.
    pub fn share(&mut self, pages: GfnRange) {
        let store = self.add_store(pages.count());
        self.shared.push(Run { pages, source: Source::Shared { store, origin: PageOrigin::at(pages.start()) } });
    }

    /// The descriptor of a store for a window. Only shared memory can be written through it.
    pub fn file(&self, store: StoreId) -> BorrowedFd<'_> {
        let Store { file, read_only, .. } = &self.stores[&store];
        let is_shared = self.shared.iter().any(|run| run.source.store().is_some_and(|(shared, _)| shared == store));
        if is_shared { file.as_fd() } else { read_only.as_fd() }
    }

    pub fn prepare(&self) -> Worker {
        Worker::prepare(self.ram, self.isolation, self.features)
    }

    /// Everything that starts a VM, and the stores' descriptors.
    pub fn start(
        &mut self,
        name: &str,
        runs: &[Run],
        origin: Origin,
        activity: RunState,
    ) -> (Start, Vec<BorrowedFd<'_>>) {
        self.generation += 1;
        let mut stores: Vec<StoreId> =
            runs.iter().filter_map(|run| run.source.page(run.pages.start())).map(|(store, _)| store).collect();
        stores.sort_unstable();
        stores.dedup();
        let identity = Identity { name: name.into(), generation: self.generation };
        let fds = stores.iter().map(|store| self.file(*store)).collect();
        let (read_only, ahead) = (Vec::new(), Vec::new());
        (Start { identity, runs: runs.to_vec(), stores, read_only, origin, activity, ahead }, fds)
    }

    /// Tells a prepared process what to expect, and waits until it does.
    pub fn expect(&mut self, worker: &mut Worker, runs: &[Run], ahead: Vec<GfnRange>, state: &MachineState) {
        let (Start { runs, stores, .. }, fds) = self.start("nobody", runs, Origin::Monitor, RunState::Running);
        let expected = Expect { runs, stores, ahead, state: Some(PackedState::pack(state)) };
        worker.tell(&ToVm::Expect(Box::new(expected)), &fds);
        worker.expect(|message| matches!(message, FromVm::Expecting).then_some(()));
    }

    pub fn launch_runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> =
            ram_ranges(self.ram).into_iter().map(|pages| Run { pages, source: Source::Anonymous }).collect();
        let first = Gfn::of_gpa(firmware::abi::IMAGE_BASE);
        let image = Source::Store { store: IMAGE, origin: PageOrigin::at(first) };
        overlay(&mut runs, GfnRange::new(first, self.stores[&IMAGE].file.pages()), image);
        self.shared.iter().for_each(|shared| overlay(&mut runs, shared.pages, shared.source));
        runs
    }

    pub fn launch(&mut self) -> Machine {
        let mut worker = self.prepare();
        let runs = self.launch_runs();
        let (start, fds) = self.start("root", &runs, Origin::Monitor, RunState::Running);
        worker.start(start, &fds);
        worker.running();
        worker.first_sign();
        Machine { worker, runs }
    }

    /// Freezes the machine; its pages have not settled.
    pub fn freeze(&mut self, machine: &mut Machine) -> Taken {
        let store = self.new_store();
        machine.worker.freeze(store, self.file(store))
    }

    /// Settles a freeze: private pages from scratch, those moved along from what lies beneath.
    pub fn settle(&self, machine: &mut Machine, frozen: &Frozen) {
        let store = &self.stores[&frozen.store];
        for pages in &frozen.harvest.private() {
            let bytes = machine.worker.read_scratch(frozen.scratch_base, *pages);
            store.alias.fill(PageIndex(pages.start().0), &bytes).unwrap();
        }
        let private = |gfn| frozen.harvest.private().iter().any(|range| range.contains(gfn));
        for gfn in frozen.harvest.moved.iter().flat_map(|moved| moved.iter()).filter(|gfn| !private(*gfn)) {
            let run = machine.runs.iter().find(|run| run.pages.contains(gfn)).unwrap();
            let mut page = [0; PAGE_SIZE];
            if let Some((below, index)) = run.source.page(gfn) {
                let file = std::fs::File::from(self.file(below).try_clone_to_owned().unwrap());
                file.read_exact_at(&mut page, index.offset()).unwrap();
            }
            store.alias.fill(PageIndex(gfn.0), &page).unwrap();
            store.alias.forget(PageIndex(gfn.0), PageCount(1));
        }
        let source = Source::Store { store: frozen.store, origin: PageOrigin(0) };
        for moved in &frozen.harvest.moved {
            overlay(&mut machine.runs, *moved, source);
            machine.worker.wake(*moved);
        }
        machine.worker.tell(&vmm::wire::ToVm::DropScratch(frozen.store), &[]);
    }

    pub fn child(&mut self, name: &str, runs: &[Run], state: &MachineState, index: u32) -> Machine {
        let mut worker = self.prepare();
        let (start, fds) = self.start(name, runs, Origin::Fork { index }, RunState::Running);
        worker.start(start, &fds);
        worker.load(state);
        worker.running();
        worker.first_sign();
        Machine { worker, runs: runs.to_vec() }
    }

    pub fn fork(&mut self, parent: &mut Machine, name: &str) -> Machine {
        let frozen = self.freeze(parent);
        if !frozen.harvest.moved.is_empty() {
            self.settle(parent, &frozen);
        }
        self.child(name, &parent.runs, &frozen.state, 1)
    }
}

fn overlay(runs: &mut Vec<Run>, pages: GfnRange, source: Source) {
    let mut cut: Vec<Run> = Vec::new();
    for run in runs.iter() {
        let before = GfnRange::between(run.pages.start(), run.pages.end().min(pages.start()));
        let after = GfnRange::between(run.pages.start().max(pages.end()), run.pages.end());
        let rest = [before, after].into_iter().filter(|part| !part.is_empty());
        cut.extend(rest.map(|pages| Run { pages, source: run.source }));
    }
    cut.push(Run { pages, source });
    cut.sort_by_key(|run| run.pages.start());
    *runs = cut;
}
