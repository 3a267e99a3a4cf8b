//! Memory: what is written back, what is taken out, when, and where it goes.

pub mod balloon;
pub mod budget;
pub mod dedup;
pub mod files;
pub mod idle;
pub mod pace;
pub mod reclaim;
pub mod request;
pub mod swap;
mod swap_place;
pub mod writeback;

use crate::server::FamilyManager;
use crate::server::guest::balloon::Balloons;
use crate::server::ids::FamilyId;
use budget::Budget;
use dedup::Dedups;
use files::Files;
use guest_mem::manager::SwapCounts;
use guest_mem::store::memfd::MemfdStores;
use idle::IdlePolicy;
use pace::Pace;
use reclaim::Reclaims;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;
use swap::HostSwap;

/// The memory of all families, and what is done to keep it small.
pub struct MemoryPolicy {
    pub families: BTreeMap<FamilyId, FamilyManager>,
    pub stores: MemfdStores,
    pub swap: Rc<RefCell<HostSwap>>,
    pub reclaims: Reclaims,
    pub budget: Budget,
    pub idle: IdlePolicy,
    /// What families that are gone have counted.
    pub past: SwapCounts,
    /// Traps of guests that have been served.
    pub traps: u64,
    pub files: Files,
    /// What is to leave windows.
    pub dedups: Dedups,
    pub balloons: Balloons,
    /// When families do again what failed, or could not be done yet.
    pub retries: BTreeMap<FamilyId, Instant>,
    pub pace: Pace,
}
