//! Guest memory for virtual machines that fork while they run.
//!
//! A fork shares every page with its parent until one of them writes it, to any depth; a page that many clones share is
//! found, moved and freed once. The crate is a library for any rust-vmm VMM. It knows nothing of KVM and of processes.
//!
//! ```text
//!          Manager: one family (the VMs of one launch), single owner, no locks, never waits
//!          ┌───────────────────────── Family: the books ─────────────────────────┐
//!          │  AddressMap ──► Object ──► Object ──► Object          Stage2 tables  │
//!          │  (per VM)       (top)      (backing)                  (shared) + rmap│
//!          └──────┬───────────── operations: ops/*.rs ───────────────────┬───────┘
//!                 │ collect Effects, which the manager carries out        │
//!          ┌──────▼───────┐                                       ┌──────▼──────┐
//!          │ Store: bytes │  ◄── private mappings, traps ───────  │   Window    │  one per VM
//!          └──────────────┘                                       └─────────────┘
//! ```
//!
//! * A running VM writes into private pages of its window's process: the kernel's own copy-on-write, no code of ours.
//!   These pages are its **live layer**.
//! * A **freeze** moves the live layer out of the guest's sight, makes of it an [object](object) on top of the VM's
//!   chain, and puts that object's empty [store] in its place. The pages **settle** into the store behind the VM's back;
//!   a touch of one that has not traps, and it settles first.
//! * A **fork** shares the parent's [stage-2](stage2) root and objects: O(1) at any size. Both sides go on, as equals.
//! * An **exit** frees what only that VM saw, page by page: the [reverse map](rmap) tells. Objects that nobody needs are
//!   [collapsed](object) into their neighbours.
//!
//! * What a guest gives back (a **balloon**) becomes zero for its VM alone, and is freed with its last viewer.
//! * **Eviction** takes stored pages to [swap] and leaves holes. Nothing that VMs share is changed by it: a page
//!   that a thousand see is written once, traps whoever touches it, is read once, and is shared again. Only what one VM
//!   alone sees, and is about to write, comes back into its live layer.
//!
//! [`local::Local`] puts all of it together in one process; the doc example there runs. [`Manager`] is for VMMs that
//! hold windows elsewhere, and [`check`] has the invariants.
//!
//! # Holes
//! * What evicts pages knows their age, and not whether guests use them.
//! * One freeze of a VM at a time, and its vCPUs and devices must stand still for the window's part of it.
//! * Linux with userfaultfd. Without it windows work, but whoever freezes must keep the VM still until all has settled.

pub mod addr;
pub mod check;
pub mod effect;
pub mod family;
pub mod local;
pub mod manager;
pub mod map;
#[cfg(test)]
#[path = "../tests/model/rig.rs"]
#[allow(dead_code, reason = "the model test uses all of it")]
mod model;
pub mod object;
pub mod ops;
mod pages;
mod ranges;
mod reclaim;
pub mod rmap;
pub mod stage2;
pub mod stats;
pub mod store;
mod stream;
pub mod swap;
pub mod sys;
#[cfg(test)]
mod testing;
pub mod window;

/// The model's name for this crate.
#[cfg(test)]
extern crate self as guest_mem;

pub use addr::{Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, PageCount, PageIndex};
pub use family::{Pace, VmId};
pub use manager::Manager;
pub use map::Protection;
pub use ops::Destination;
pub use sys::Touch;
pub use window::{Harvest, Run, ScratchRange, Source, StoreId, Window};
