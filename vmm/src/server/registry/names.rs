//! The names of VMs, and which are free.

use crate::server::ids::Generation;
use rangemap::RangeSet;
use std::collections::{BTreeMap, HashMap};

/// Who has which name.
#[derive(Debug, Default)]
pub struct Names {
    taken: HashMap<String, Generation>,
    /// Of names `PREFIX-N` the numbers, by prefix: a VM that has been forked a thousand times is not to have a thousand names
    /// looked up for the next.
    numbers: BTreeMap<String, RangeSet<u64>>,
    /// The highest number that was drawn, by prefix: who holds on to the name of a VM that is gone is not to find another one.
    drawn: HashMap<String, u64>,
}

/// Prefixes of which the numbers are remembered when nobody has such a name any more.
const PREFIXES: usize = 4096;

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

    /// The next names `PREFIX-1`, `PREFIX-2`, … that nobody has, and that were not drawn before.
    pub fn draw(&mut self, prefix: &str, count: usize) -> Vec<String> {
        let none = RangeSet::new();
        let first = self.drawn.get(prefix).map_or(1, |last| last + 1);
        let from = first..u64::MAX;
        let free = self.numbers.get(prefix).unwrap_or(&none).gaps(&from).flatten();
        let numbers: Vec<u64> = free.take(count).collect();
        if let Some(&last) = numbers.last() {
            if self.drawn.len() >= PREFIXES && !self.drawn.contains_key(prefix) {
                let in_use = &self.numbers;
                self.drawn.retain(|prefix, _| in_use.contains_key(prefix));
            }
            self.drawn.insert(prefix.to_owned(), last);
        }
        numbers.into_iter().map(|number| format!("{prefix}-{number}")).collect()
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
    fn names_are_found_between_those_that_are_taken() {
        let mut names =
            names(&["a", "a-1", "a-2", "a-4", "a-1-1", "a-07", "a-0", "b-1", "a-x", "a-99999999999999999999"]);
        assert_eq!(names.draw("a", 3), ["a-3", "a-5", "a-6"]);
        assert_eq!(names.draw("a-1", 1), ["a-1-2"]);
        assert_eq!(names.draw("c", 2), ["c-1", "c-2"]);
        names.free("a-1");
        names.free("b-1");
        assert_eq!(names.draw("b", 1), ["b-1"]);
        assert_eq!((names.whose("a-1"), names.whose("a-2")), (None, Some(Generation(3))));
    }

    /// Names of VMs that were removed were given to others at once: a script that came late removed somebody else's.
    #[test]
    fn a_name_that_was_drawn_is_not_drawn_again() {
        let mut names = names(&["a-2"]);
        assert_eq!(names.draw("a", 2), ["a-1", "a-3"]);
        assert!(names.take("a-1", Generation(7)));
        names.free("a-1");
        assert_eq!(names.draw("a", 1), ["a-4"]);
        // Nobody draws names without end: what nobody has any more is forgotten some time.
        for prefix in 0..2 * PREFIXES {
            names.draw(&format!("other{prefix}"), 1);
        }
        assert!(names.drawn.len() <= PREFIXES);
        assert_eq!(names.draw("a", 1), ["a-5"]);
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
            for name in names.draw("vm", 7) {
                assert!(names.take(&name, Generation(round)), "{name}");
            }
            let gone = round * 7 / 2 + 1;
            names.free(&format!("vm-{gone}"));
        }
        assert_eq!(names.taken.len() as u64, names.numbers["vm"].iter().map(|n| n.end - n.start).sum::<u64>());
    }
}
