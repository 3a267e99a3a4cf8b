//! The roll: a file in the home that names the VMs, so that the next server can say what was lost if this one dies.
//!
//! Each VM that comes or goes is a line at its end. Replacing the whole file would have the file system write it out, and
//! the server wait for the disk after each fork.

use crate::server::registry::vm::News;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The file is written anew when it has so many lines for each name, and [`SPARE`] more.
const LINES_PER_NAME: usize = 4;
const SPARE: usize = 1024;

/// The file, and its length. There is none before the first VM.
#[derive(Debug)]
pub struct Roll {
    path: PathBuf,
    file: Option<File>,
    lines: usize,
}

impl Roll {
    /// A roll that is empty, and has no file yet.
    pub fn at(path: PathBuf) -> Self {
        Self { path, file: None, lines: 0 }
    }

    /// The names that a server left which did not get to remove its file. A line that it did not finish does not count.
    pub fn left_at(path: &Path) -> Vec<String> {
        let text = fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut names = BTreeSet::new();
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            match (line.strip_prefix('+'), line.strip_prefix('-')) {
                (Some(name), _) => drop(names.insert(name.to_owned())),
                (_, Some(name)) => drop(names.remove(name)),
                _ => {}
            }
        }
        names.into_iter().collect()
    }

    /// Notes who came and who went; `all` are there now.
    ///
    /// # Errors
    /// The file cannot be written: it is begun anew next time.
    pub fn note<'a>(&mut self, news: &[News], all: impl ExactSizeIterator<Item = &'a str>) -> io::Result<()> {
        let anew = self.file.is_none() || self.lines + news.len() > LINES_PER_NAME * all.len() + SPARE;
        let lines: Vec<String> = match anew {
            true => all.map(came).collect(),
            false => news.iter().map(line).collect(),
        };
        let done = if anew { self.begin(&lines) } else { self.append(&lines) };
        if done.is_err() {
            self.file = None;
        }
        done
    }

    fn append(&mut self, lines: &[String]) -> io::Result<()> {
        self.lines += lines.len();
        self.file.as_mut().map_or(Ok(()), |file| file.write_all(lines.concat().as_bytes()))
    }

    fn begin(&mut self, lines: &[String]) -> io::Result<()> {
        let new = self.path.with_extension("new");
        self.file = Some(File::create(&new)?);
        self.lines = 0;
        self.append(lines)?;
        fs::rename(&new, &self.path)
    }
}

fn line(news: &News) -> String {
    match news {
        News::Came(name) => came(name),
        News::Went(name) => format!("-{name}\n"),
    }
}

fn came(name: &str) -> String {
    format!("+{name}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Replays what happens to a roll, with the list of names that it should have.
    struct Story {
        directory: PathBuf,
        roll: Roll,
        names: Vec<String>,
    }

    impl Story {
        fn new() -> Self {
            let directory = nix::unistd::mkdtemp(&std::env::temp_dir().join("offshoot-roll-XXXXXX")).unwrap();
            Self { roll: Roll::at(directory.join("vms")), directory, names: Vec::new() }
        }

        fn came(&mut self, name: &str) {
            self.names.push(name.into());
            self.note(News::Came(name.into()));
        }

        fn went(&mut self, name: &str) {
            self.names.retain(|other| other != name);
            self.note(News::Went(name.into()));
        }

        fn note(&mut self, news: News) {
            self.roll.note(&[news], self.names.iter().map(String::as_str)).unwrap();
        }

        fn left(&self) -> Vec<String> {
            Roll::left_at(&self.roll.path)
        }
    }

    impl Drop for Story {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.directory).unwrap();
        }
    }

    #[test]
    fn a_dead_servers_names_are_those_that_came_and_did_not_go() {
        let mut story = Story::new();
        assert_eq!(story.left(), [""; 0]);
        for name in ["a", "b", "a-1"] {
            story.came(name);
        }
        story.went("b");
        assert_eq!(story.left(), ["a", "a-1"]);
        story.went("a");
        story.came("b");
        assert_eq!(story.left(), ["a-1", "b"]);
    }

    #[test]
    fn a_line_that_was_cut_off_names_nobody() {
        let mut story = Story::new();
        story.came("base");
        story.roll.file.as_mut().unwrap().write_all(b"+base-1").unwrap();
        assert_eq!(story.left(), ["base"]);
    }

    #[test]
    fn the_file_does_not_grow_for_ever() {
        let mut story = Story::new();
        story.came("base");
        for _ in 0..3 * SPARE {
            story.came("base-1");
            story.went("base-1");
        }
        assert_eq!(story.left(), ["base"]);
        let lines = fs::read_to_string(&story.roll.path).unwrap().lines().count();
        assert!(lines <= SPARE + 2 * LINES_PER_NAME, "{lines}");
    }
}
