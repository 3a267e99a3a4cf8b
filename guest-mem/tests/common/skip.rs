//! A test that cannot run here fails: who sees green believes that all of it was tried. Whoever knows better says what may be
//! left out, in `OFFSHOOT_SKIPS`: words of [`LACKS`] with commas between them, or `all`. What was left out is said on stderr,
//! past the test runner's capture, in a line that begins with `SKIPPED`, and counted by `tests/run`.
//!
//! Every crate's tests include this file: `guest-mem`, which is published, can depend on no crate that is for tests only.

use std::env;
use std::fmt::Display;
use std::io::{self, Write};

/// What hosts may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// `/dev/kvm`.
    Kvm,
    /// Traps for pages that are not there.
    Userfaultfd,
    /// The rights of root.
    Root,
    /// A second processor.
    Processors,
    /// Files that the kernel has at a place of its own, and that a test has to write or to cover.
    Proc,
    /// Control groups that bound memory.
    Cgroups,
    /// User namespaces for ordinary users.
    UserNamespaces,
    /// File systems whose disk a test can make fail, loop devices, and file systems on them.
    Disks,
    /// The security module Landlock, of a kernel that is not too old.
    Landlock,
}

/// The words for it. `tests/run` knows one more, `lab`.
const LACKS: [(&str, Lack); 9] = [
    ("kvm", Lack::Kvm),
    ("userfaultfd", Lack::Userfaultfd),
    ("root", Lack::Root),
    ("processors", Lack::Processors),
    ("proc", Lack::Proc),
    ("cgroups", Lack::Cgroups),
    ("userns", Lack::UserNamespaces),
    ("disks", Lack::Disks),
    ("landlock", Lack::Landlock),
];

/// The test that runs, or a part of it, needs what this host lacks: fails, unless that is allowed.
///
/// # Panics
///
/// If it is not, and says how to allow it.
#[track_caller]
pub fn skip(lack: Lack, why: impl Display) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let allowed = env::var("OFFSHOOT_SKIPS").unwrap_or_default();
    match allows(&allowed, lack) {
        // A closed stderr changes nothing about the test.
        Ok(true) => drop(writeln!(io::stderr(), "SKIPPED: {test}: {why}")),
        Ok(false) => panic!("{test} cannot run here: {why}. OFFSHOOT_SKIPS={} lets such tests be skipped", word(lack)),
        Err(unknown) => {
            let words: Vec<_> = LACKS.iter().map(|(word, _)| *word).collect();
            panic!("OFFSHOOT_SKIPS={allowed}: {unknown} is none of {}, lab, all", words.join(", "))
        }
    }
}

/// Whether a list of words lets a test be skipped; otherwise the word that is none.
pub fn allows(words: &str, lack: Lack) -> Result<bool, &str> {
    let words = || words.split(',').map(str::trim).filter(|word| !word.is_empty());
    let known = |word: &str| word == "all" || word == "lab" || LACKS.iter().any(|(known, _)| *known == word);
    match words().find(|word| !known(word)) {
        Some(unknown) => Err(unknown),
        None => Ok(words().any(|allowed| allowed == "all" || allowed == word(lack))),
    }
}

fn word(lack: Lack) -> &'static str {
    LACKS.iter().find(|(_, known)| *known == lack).expect("every lack has a word").0
}
