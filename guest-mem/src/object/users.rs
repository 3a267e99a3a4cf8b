//! Who uses an object.

use super::Objects;
use crate::addr::PageRange;
use crate::ids::ObjectId;
use std::collections::btree_set;

/// An object that was looked at for who sees pages of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub object: ObjectId,
    /// The same pages, as they count in it; none if it hides them all, and so do all that are stacked on it.
    pub pages: Option<PageRange>,
}

/// Looks up the forest from an object, from shadow to shadow, no further than pages are hidden.
pub(crate) struct Users<'a> {
    objects: &'a Objects,
    /// From where we are down to where we came from: shadows not looked at yet, and the pages, as they count beneath.
    path: Vec<(btree_set::Iter<'a, ObjectId>, PageRange)>,
    first: Option<User>,
}

impl Objects {
    /// The objects through which VMs may see these pages of `id`: itself, and what is stacked on it and does not hide them.
    /// Whoever takes one step at a time pays for no more.
    pub(crate) fn users(&self, id: ObjectId, pages: PageRange) -> Users<'_> {
        let first = Some(User { object: id, pages: Some(pages) });
        Users { objects: self, path: vec![(self.get(id).shadows.iter(), pages)], first }
    }
}

impl Iterator for Users<'_> {
    type Item = User;

    fn next(&mut self) -> Option<User> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        loop {
            let (shadows, below) = self.path.last_mut()?;
            let Some(&object) = shadows.next() else {
                self.path.pop();
                continue;
            };
            let shadow = self.objects.get(object);
            let origin = shadow.backing.expect("a shadow has a backing object").origin;
            let pages = origin.over(*below);
            if shadow.slots.covers(pages) {
                return Some(User { object, pages: None });
            }
            self.path.push((shadow.shadows.iter(), pages));
            return Some(User { object, pages: Some(pages) });
        }
    }
}
