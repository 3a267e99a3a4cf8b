//! `launch`: a new VM of a new family.

use crate::api::{ErrorKind, Failure, Launch, Linux, MAX_VCPUS, MIN_MEMORY};
use crate::boot::linux::{self, Plan};
use crate::layout::ram_ranges;
use crate::name::check_name;
use crate::server::clients::doors::{Door, is_pattern, place};
use crate::server::freeze::queue::FreezeQueue;
use crate::server::guest::idle::IdleBalloon;
use crate::server::ids::{ClientId, FamilyId, Generation, ProcessId};
use crate::server::procs::process::{Parcel, Role};
use crate::server::registry::phase::Phase;
use crate::server::registry::quota::{self, Lineage};
use crate::server::registry::run::RunOrder;
use crate::server::registry::vm::{Ancestry, Log, Vm};
use crate::server::{FamilyManager, Server};
use crate::units::ByteSize;
use crate::wire::{self, FEW, Identity, Machine, MachineShape, RunState, Start, ToVm};
use firmware::abi;
use guest_mem::stage2;
use guest_mem::store::file::MemfdFile;
use guest_mem::window::are_apart;
use guest_mem::{Gfn, GfnRange, Manager, PAGE_SIZE, PageCount, Protection, Run, StoreId, VmId};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

/// How a VM begins.
#[derive(Debug)]
pub struct Beginning {
    pub origin: wire::Origin,
    /// The file of a Linux guest's kernel.
    pub kernel: Option<OwnedFd>,
    pub activity: RunState,
    /// Pages to copy ahead.
    pub ahead: Vec<GfnRange>,
}

impl Beginning {
    fn monitor() -> Self {
        Self { origin: wire::Origin::Monitor, kernel: None, activity: RunState::Running, ahead: Vec::new() }
    }

    fn linux(plan: Plan, kernel: File) -> Self {
        let origin = wire::Origin::Linux(Box::new(plan));
        Self { origin, kernel: Some(kernel.into()), activity: RunState::Running, ahead: Vec::new() }
    }
}

/// The files of a Linux guest, looked at.
#[derive(Debug)]
pub struct Guest {
    plan: Plan,
    kernel: File,
    initrd: Option<File>,
}

impl Guest {
    fn open(linux: &Linux, shape: MachineShape) -> Result<Self, Failure> {
        let (kernel, initrd) = linux.open().map_err(Failure::bad_request)?;
        let request =
            linux::Request { ram: shape.ram, kernel: &kernel, initrd: initrd.as_ref(), cmdline: &linux.cmdline };
        let plan = Plan::new(request).map_err(|e| Failure::bad_request(e.to_string()))?;
        Ok(Self { plan, kernel, initrd })
    }
}

impl Server {
    pub fn launch(&mut self, client: ClientId, launch: Launch) {
        if let Err(failure) = self.try_launch(client, launch) {
            self.reply(client, Err(failure));
        }
    }

    fn try_launch(&mut self, client: ClientId, launch: Launch) -> Result<(), Failure> {
        let shape = self.check_launch(&launch)?;
        let mut guest = launch.linux.as_ref().map(|linux| Guest::open(linux, shape)).transpose()?;
        let initrd = guest.as_mut().and_then(|guest| Some((guest.initrd.take()?, guest.plan.initrd.as_ref()?.len)));
        match (guest, initrd) {
            (Some(guest), Some(initrd)) => {
                self.launch_when_read(client, launch, guest, initrd);
                Ok(())
            }
            (guest, _) => self.launch_checked(client, launch, shape, guest.map(|guest| (guest, None))),
        }
    }

    /// Launches a Linux guest, whose initrd has been read. Other VMs may have come meanwhile.
    pub fn launch_read(
        &mut self,
        client: ClientId,
        launch: Launch,
        guest: Guest,
        initrd: Rc<MemfdFile>,
    ) -> Result<(), Failure> {
        let shape = self.check_launch(&launch)?;
        self.launch_checked(client, launch, shape, Some((guest, Some(initrd))))
    }

    fn launch_checked(
        &mut self,
        client: ClientId,
        launch: Launch,
        shape: MachineShape,
        guest: Option<(Guest, Option<Rc<MemfdFile>>)>,
    ) -> Result<(), Failure> {
        let expires = quota::expires(launch.ttl_ms, Instant::now())?;
        let name = match launch.name {
            Some(name) => name,
            None => self.registry.vms.draw_names("vm", 1).pop().expect("names do not end"),
        };
        let door = launch.vsock.as_deref().map(|path| Door::open(&place(path, &name))).transpose()?;
        let failed = |what: &'static str| move |e: io::Error| Failure::host(format!("{what}: {e}"));
        let (files, beginning) = match guest {
            None => {
                let image =
                    self.memory.files.builtin(firmware::IMAGE).map_err(failed("put the firmware into memory"))?;
                let place = GfnRange::new(Gfn::of_gpa(abi::IMAGE_BASE), image.pages());
                (vec![(place, image)], Beginning::monitor())
            }
            Some((Guest { plan, kernel, .. }, initrd)) => {
                let initrd = plan.initrd.as_ref().map(|placed| placed.pages()).zip(initrd);
                (initrd.into_iter().collect(), Beginning::linux(plan, kernel))
            }
        };
        let process = self.take_process(shape, None).map_err(failed("start a VM process"))?;

        let ram = ram_ranges(shape.ram);
        let span = PageCount(ram.last().expect("a VM has memory").end().0);
        let mut manager = Manager::new(stage2::Shape::X86_64, span, self.memory.stores.clone())
            .with_max_runs(self.host.max_runs as usize);
        if !self.host.features.userfaultfd {
            manager = manager.without_holes();
        }
        let shared: Vec<GfnRange> = launch.shared.iter().map(pages_of).collect();
        let window = self.window_of(process);
        let vm = manager.launch(&ram, &files, &shared, window);
        let vm = vm.map_err(|e| failed("memory that is shared")(io::Error::other(e)))?;
        let family = self.registry.vms.fresh_family();
        self.memory.families.insert(family, manager);

        let ancestry =
            Ancestry::none(Lineage::new(&name, launch.max_children, launch.vsock.filter(|path| is_pattern(path))));
        let generation = self.add_vm(name, ancestry, shape, Phase::Launching(Some(client)), process, (family, vm));
        let record = self.registry.vms.get_mut(generation).expect("added above");
        record.remove_when_off = launch.remove_when_off;
        if let Some(door) = door {
            self.clients.doors.add(generation, door, &mut self.watches);
        }
        self.live_until(generation, expires);
        self.start(generation, beginning);
        Ok(())
    }

    fn check_launch(&self, launch: &Launch) -> Result<MachineShape, Failure> {
        let bad = |why: String| Err(Failure::bad_request(why));
        if let Some(name) = &launch.name {
            self.check_new_name(name)?;
        }
        self.check_quotas(None, 1)?;
        let machine = if launch.linux.is_some() { Machine::Linux } else { Machine::Monitor };
        if launch.vsock.is_some() && machine == Machine::Monitor {
            return bad("the built-in guest has no sockets: vsock is for Linux guests".into());
        }
        match machine {
            Machine::Monitor if launch.vcpus != 1 => {
                return bad(format!("the built-in guest has 1 vCPU, not {}", launch.vcpus));
            }
            Machine::Linux if !(1..=MAX_VCPUS).contains(&launch.vcpus) => {
                return bad(format!("a Linux guest has from 1 to {MAX_VCPUS} vCPUs, not {}", launch.vcpus));
            }
            _ => {}
        }
        if launch.mem_bytes < MIN_MEMORY || !launch.mem_bytes.is_multiple_of(PAGE_SIZE as u64) {
            return bad(format!("memory of {}: at least 16M, and a multiple of 4K", ByteSize(launch.mem_bytes)));
        }
        check_shared(&launch.shared, PageCount::covering(launch.mem_bytes), machine).map_err(Failure::bad_request)?;
        crate::host::open_kvm().map_err(|e| Failure::new(ErrorKind::Unsupported, e.to_string()))?;
        let available = crate::host::available_memory().map_err(|e| Failure::host(format!("host memory: {e}")))?;
        if launch.mem_bytes > available {
            let [memory, available] = [launch.mem_bytes, available].map(|bytes| ByteSize(bytes).approx());
            return Err(Failure::new(ErrorKind::Limit, format!("{memory} of memory: this host can give {available}")));
        }
        Ok(MachineShape { ram: PageCount::covering(launch.mem_bytes), vcpus: launch.vcpus, machine })
    }

    /// Checks the name that a new VM is to have.
    pub fn check_new_name(&self, name: &str) -> Result<(), Failure> {
        check_name(name).map_err(|e| Failure::bad_request(e.to_string()).about(name))?;
        match self.registry.vms.find(name) {
            None => Ok(()),
            Some(_) => Err(Failure::new(ErrorKind::NameTaken, format!("there is a VM {name:?} already")).about(name)),
        }
    }

    /// Lists a VM whose process is chosen.
    pub fn add_vm(
        &mut self,
        name: String,
        ancestry: Ancestry,
        shape: MachineShape,
        phase: Phase,
        process: ProcessId,
        memory: impl Into<Option<(FamilyId, VmId)>>,
    ) -> Generation {
        let generation = self.registry.vms.fresh_generation();
        self.procs.pool.used(shape, Instant::now());
        let taken = self.procs.all.get_mut(&process).expect("a process just taken");
        (taken.role, taken.vm) = (Role::Vm(generation), Some(generation));
        self.registry.vms.insert(Vm {
            fresh: ancestry.parent.is_none(),
            name,
            ancestry,
            generation,
            shape,
            phase,
            run: RunOrder::default(),
            memory: memory.into(),
            process: Some(process),
            freezes: FreezeQueue::default(),
            deduping: None,
            log: Log::default(),
            sends: HashMap::new(),
            waiters: Vec::new(),
            viewers: Vec::new(),
            remove_when_off: false,
            balloon_pages: 0,
            asked_balloon: 0,
            idle: IdleBalloon::default(),
            traps: 0,
            born: None,
            forked_ns: None,
            agent: None,
            guest_memory: None,
            expires: None,
        });
        generation
    }

    /// Has a VM's process become the VM, now or as soon as it is prepared.
    pub fn start(&mut self, generation: Generation, beginning: Beginning) {
        let vm = self.registry.vms.get(generation).expect("a VM that is to start is listed");
        let (family, member) = vm.memory.expect("a VM that is to start has memory");
        let process = vm.process.expect("a VM that is to start has a process");
        let identity = Identity { name: vm.name.clone(), generation: generation.0 };
        let manager = &self.memory.families[&family];
        let expectation = &mut self.procs.all.get_mut(&process).expect("a VM's process").expectation;
        let Beginning { origin, kernel, activity, ahead } = beginning;
        let runs = manager.family().runs(member);
        let runs = match origin {
            wire::Origin::Fork { .. } => expectation.news(family, runs),
            wire::Origin::Monitor | wire::Origin::Linux(_) => runs.to_vec(),
        };
        let ahead = expectation.left_ahead(&ahead, &runs);
        expectation.forget_window();
        match stores_of(manager, &runs) {
            Ok((stores, mut descriptors)) => {
                let read_only = manager.family().vm(member).map().protected(Protection::ReadOnly).collect();
                let start = Start { identity, runs, stores, read_only, origin, activity, ahead };
                descriptors.extend(kernel);
                let message = ToVm::Start(Box::new(start));
                let process = self.procs.all.get_mut(&process).expect("a VM's process");
                process.send_when_ready(Parcel { message, descriptors });
            }
            Err(e) => self.start_failed(generation, &format!("descriptors of its memory: {e}")),
        }
    }

    /// A VM cannot go on, or never came to life: then nothing of it stays.
    pub fn start_failed(&mut self, generation: Generation, why: &str) {
        let launching = self.registry.vms.get(generation).is_some_and(|vm| matches!(vm.phase, Phase::Launching(_)));
        self.end_vm(generation, Phase::Dead(why.to_owned()));
        if launching {
            self.registry.vms.remove(generation);
        }
    }
}

/// The pages of a stretch of bytes.
fn pages_of(bytes: &Range<u64>) -> GfnRange {
    GfnRange::between(Gfn::of_gpa(bytes.start), Gfn::of_gpa(bytes.end))
}

/// Whether guests can share this: what the built-in guest needs for itself, each of them has for itself. A Linux guest would
/// have to be told to keep out.
fn check_shared(shared: &[Range<u64>], ram: PageCount, machine: Machine) -> Result<(), String> {
    let Some(first) = shared.first() else { return Ok(()) };
    if machine != Machine::Monitor {
        return Err("only the built-in guest knows of memory that is shared".into());
    }
    let own = abi::FIRST_FREE_PAGE * PAGE_SIZE as u64;
    if first.start < own {
        return Err(format!("memory that is shared from {:#x} on: the guest needs all up to {own:#x}", first.start));
    }
    let whole = |bytes: &Range<u64>| [bytes.start, bytes.end].iter().all(|at| at.is_multiple_of(PAGE_SIZE as u64));
    let pages: Vec<GfnRange> = shared.iter().map(pages_of).collect();
    if shared.len() > FEW || !shared.iter().all(whole) || !are_apart(&pages, &ram_ranges(ram)) {
        return Err(format!(
            "memory that is shared: at most {FEW} stretches of whole pages of RAM, in ascending order"
        ));
    }
    Ok(())
}

/// The stores that supply `runs`, and a descriptor of each.
pub fn stores_of(manager: &FamilyManager, runs: &[Run]) -> io::Result<(Vec<StoreId>, Vec<OwnedFd>)> {
    let stores: BTreeSet<StoreId> = runs.iter().filter_map(|run| run.source.store()).map(|(store, _)| store).collect();
    let descriptors = stores.iter().map(|&id| descriptor(manager, id)).collect::<io::Result<_>>()?;
    Ok((stores.into_iter().collect(), descriptors))
}

/// A duplicate, which can be written through where the store is shared memory: a store may be gone by the time a process is
/// prepared, and its descriptor with it.
fn descriptor(manager: &FamilyManager, id: StoreId) -> io::Result<OwnedFd> {
    if let Some(store) = manager.store(id) {
        return store.for_windows().try_clone_to_owned();
    }
    match manager.file(id) {
        Some(file) => file.read_only().try_clone_to_owned(),
        None => Err(io::Error::new(io::ErrorKind::NotFound, format!("{id:?} is gone"))),
    }
}
