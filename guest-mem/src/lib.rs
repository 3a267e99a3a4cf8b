#![doc = include_str!("../README.md")]
//!
//! # The machine
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
//! [`local::Local`] puts all of it together in one process. [`Manager`] is for VMMs that hold windows elsewhere, and
//! [`check`] has the invariants.

pub mod addr;
pub mod check;
mod effect;
pub mod family;
pub mod ids;
pub mod local;
pub mod manager;
#[cfg(test)]
#[path = "../tests/model/rig.rs"]
#[allow(dead_code, reason = "the model test uses all of it")]
mod model;
#[doc(hidden)]
pub mod object;
pub mod ops;
pub mod reclaim;
#[cfg(test)]
#[path = "../tests/common/skip.rs"]
#[allow(dead_code, reason = "each crate's tests lack something else")]
mod skips;
pub mod space;
pub mod stage2;
pub mod stats;
mod steps;
pub mod store;
pub mod swap;
pub mod sys;
#[cfg(test)]
mod testing;
pub mod window;

/// The model's name for this crate.
#[cfg(test)]
extern crate self as guest_mem;

pub use addr::{Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, PageCount, PageIndex, PageOrigin, PageRange};
pub use ids::{Activity, Run, Source, StoreId, VmId};
pub use local::{Local, LocalVm};
pub use manager::Manager;
pub use ops::Destination;
pub use space::map::{Protection, Sharing};
pub use sys::Touch;
pub use window::{Along, Failure, Harvest, ScratchRange, Window};
