//! What children wait for first.

use super::vm::FamilyId;
use guest_mem::Gfn;
use std::collections::{BTreeMap, BTreeSet};

/// Frames that children of a family waited for before their first sign of life. The next fork settles them first: a
/// trap costs its child more than the copy.
#[derive(Debug, Default)]
pub struct EarlyTouches(BTreeMap<FamilyId, BTreeSet<Gfn>>);

impl EarlyTouches {
    /// Clusters remembered per family.
    const MOST: usize = 64;

    /// A child waited at `gfn`.
    pub fn note(&mut self, family: FamilyId, gfn: Gfn) {
        let seen = self.0.entry(family).or_default();
        if seen.len() < Self::MOST {
            seen.insert(gfn);
        }
    }

    /// Forgets families that are gone.
    pub fn retain<T>(&mut self, families: &BTreeMap<FamilyId, T>) {
        self.0.retain(|family, _| families.contains_key(family));
    }

    /// What is known of a family.
    pub fn of(&self, family: FamilyId) -> impl Iterator<Item = Gfn> {
        self.0.get(&family).into_iter().flatten().copied()
    }
}
