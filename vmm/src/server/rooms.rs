//! The rooms of the server, held against the table in its header: each uses those above it, and none is too large to read.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines that a file may have.
const LINES: usize = 400;

fn server() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/server")
}

/// The rooms of the table, the first with the lowest number.
fn table() -> BTreeMap<String, usize> {
    let header = fs::read_to_string(server().join("mod.rs")).unwrap();
    let rows = header.lines().filter_map(|line| line.strip_prefix("//! | `")?.split(" | ").next());
    let names = rows.flat_map(|row| row.split('`').filter(|name| !name.is_empty() && !name.contains([',', ' '])));
    names.enumerate().map(|(at, name)| (name.to_owned(), at)).collect()
}

fn files(of: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(of).unwrap().map(|entry| entry.unwrap().path()) {
        match entry.is_dir() {
            true => files(&entry, all),
            false => all.push(entry),
        }
    }
}

/// All files, with their names, the room that each is in, and what they say.
fn sources() -> Vec<(String, String, String)> {
    let (server, mut all) = (server(), Vec::new());
    files(&server, &mut all);
    let source = |path: PathBuf| {
        let name = path.strip_prefix(&server).unwrap().display().to_string();
        let room = name.split('/').next().unwrap().trim_end_matches(".rs").to_owned();
        (name, room, fs::read_to_string(path).unwrap())
    };
    all.into_iter().map(source).filter(|(_, room, _)| room != "mod" && room != "rooms").collect()
}

/// The rooms that a file names, be it in a list.
fn used(text: &str, file: &str) -> Vec<String> {
    let of_root = if file.contains('/') { None } else { Some("super::") };
    let mut used = Vec::new();
    for path in ["crate::server::"].into_iter().chain(of_root) {
        for (at, _) in text.match_indices(path) {
            let rest = &text[at + path.len()..];
            let names = match rest.strip_prefix('{') {
                Some(list) => list.split('}').next().unwrap().split(',').collect(),
                None => vec![rest],
            };
            let name =
                |text: &str| text.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_owned();
            used.extend(names.into_iter().map(name).filter(|name| name.starts_with(char::is_lowercase)));
        }
    }
    used
}

#[test]
fn rooms_use_those_above_them() {
    let (table, sources) = (table(), sources());
    assert!(table.len() > 10, "{table:?}");
    let mut wrong = Vec::new();
    for (file, room, text) in &sources {
        let Some(own) = table.get(room) else {
            wrong.push(format!("{file} is in no room of the table"));
            continue;
        };
        for name in used(text, file).iter().filter(|name| *name != room) {
            match table.get(name) {
                Some(other) if other < own => {}
                Some(_) => wrong.push(format!("{file} uses {name}, which is below it")),
                None => wrong.push(format!("{file} uses {name}, which is no room of the table")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let empty: Vec<_> = table.keys().filter(|name| !sources.iter().any(|(_, room, _)| room == *name)).collect();
    assert!(empty.is_empty(), "rooms that are not there: {empty:?}");
}

#[test]
fn no_file_is_too_long_to_read() {
    let long = |(file, _, text): &(String, String, String)| {
        let lines = text.lines().count();
        (lines >= LINES).then(|| format!("{file}: {lines} lines"))
    };
    let long: Vec<String> = sources().iter().filter_map(long).collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}
