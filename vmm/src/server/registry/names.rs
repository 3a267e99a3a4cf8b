//! The names of VMs, and which are free.

use crate::server::registry::vm::Generation;
use rangemap::RangeSet;
use std::collections::{BTreeMap, HashMap};

/// Who has which name.
#[derive(Debug, Default)]
pub struct Names {
    taken: HashMap<String, Generation>,
    /// Of names `PREFIX-N` the numbers, by prefix: a VM that has been forked a thousand times is not to have a thousand names
    /// looked up for the next.
    numbers: BTreeMap<String, RangeSet<u64>>,
}

impl Names {
    /// Gives a name to a VM, if nobody has it. Whether nobody had.
    pub fn take(&mut self, name: &str, by: Generation) -> bool {
        if self.taken.contains_key(name) {
            return false;
        }
        self.taken.insert(name.to_owned(), by);
        if let Some((prefix, number)) = numbered(name) {
            self.numbers.entry(prefix.to_owned()).or_default().insert(number..number + 1);
        }
        true
    }

    /// A name is free again.
    pub fn free(&mut self, name: &str) {
        self.taken.remove(name);
        let Some((prefix, number)) = numbered(name) else { return };
        if let Some(numbers) = self.numbers.get_mut(prefix) {
            numbers.remove(number..number + 1);
            if numbers.is_empty() {
                self.numbers.remove(prefix);
            }
        }
    }

    /// Who has a name.
    pub fn whose(&self, name: &str) -> Option<Generation> {
        self.taken.get(name).copied()
    }

    /// The first names `PREFIX-1`, `PREFIX-2`, … that nobody has.
    pub fn first_free(&self, prefix: &str, count: usize) -> Vec<String> {
        let none = RangeSet::new();
        let free = self.numbers.get(prefix).unwrap_or(&none).gaps(&(1..u64::MAX)).flatten();
        free.take(count).map(|number| format!("{prefix}-{number}")).collect()
    }
}

/// The two parts of a name that could be a child's.
fn numbered(name: &str) -> Option<(&str, u64)> {
    let (prefix, digits) = name.rsplit_once('-')?;
    let number: u64 = digits.parse().ok()?;
    // `07` and `+7` are other names than `7`.
    (number > 0 && number < u64::MAX && number.to_string() == digits).then_some((prefix, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(taken: &[&str]) -> Names {
        let mut names = Names::default();
        for (name, generation) in taken.iter().zip(1..) {
            assert!(names.take(name, Generation(generation)), "{name}");
        }
        names
    }

    #[test]
    fn the_first_free_names_are_found_between_those_that_are_taken() {
        let mut names =
            names(&["a", "a-1", "a-2", "a-4", "a-1-1", "a-07", "a-0", "b-1", "a-x", "a-99999999999999999999"]);
        assert_eq!(names.first_free("a", 3), ["a-3", "a-5", "a-6"]);
        assert_eq!(names.first_free("a-1", 1), ["a-1-2"]);
        assert_eq!(names.first_free("c", 2), ["c-1", "c-2"]);
        names.free("a-1");
        names.free("b-1");
        assert_eq!(names.first_free("a", 2), ["a-1", "a-3"]);
        assert_eq!(names.first_free("b", 1), ["b-1"]);
        assert_eq!((names.whose("a-1"), names.whose("a-2")), (None, Some(Generation(3))));
    }

    #[test]
    fn a_name_is_given_once() {
        let mut names = names(&["a-1"]);
        assert!(!names.take("a-1", Generation(9)));
        assert_eq!(names.whose("a-1"), Some(Generation(1)));
    }

    /// Each fork looked up the names of all of the parent's children: with 500 of them that took longer than all else.
    #[test]
    fn every_name_that_is_found_is_free_whatever_came_and_went() {
        let mut names = Names::default();
        for round in 0..50_u64 {
            for name in names.first_free("vm", 7) {
                assert!(names.take(&name, Generation(round)), "{name}");
            }
            let gone = names.first_free("vm", 1)[0].rsplit_once('-').map(|(_, n)| n.parse::<u64>().unwrap() / 2 + 1);
            names.free(&format!("vm-{}", gone.unwrap()));
        }
        assert_eq!(names.taken.len() as u64, names.numbers["vm"].iter().map(|n| n.end - n.start).sum::<u64>());
    }
}
