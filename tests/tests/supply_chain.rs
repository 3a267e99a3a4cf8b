//! What the product is made of: dependencies that may be used, one version of each, and `unsafe` where it is known.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace").to_owned()
}

/// What `.github/deny.toml` has between the brackets of a list, without what it says of each.
fn list(name: &str) -> Vec<String> {
    let rules = fs::read_to_string(root().join(".github/deny.toml")).expect("read the rules");
    let below = rules.lines().skip_while(|line| *line != format!("{name} = [")).skip(1);
    let items: Vec<String> = below
        .take_while(|line| *line != "]")
        .map(|line| line.split('#').next().unwrap_or_default().trim().trim_end_matches(',').to_owned())
        .collect();
    assert!(!items.is_empty(), "the rules have no list {name}");
    items
}

/// Whether an expression of SPDX can be met by these licences. Old ones write `/` for `OR`.
fn is_met(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let met = any(&mut words, allowed);
    met && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words, allowed: &BTreeSet<String>) -> bool {
    let mut met = all(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        met |= all(words, allowed);
    }
    met
}

fn all(words: &mut Words, allowed: &BTreeSet<String>) -> bool {
    let mut met = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        met &= one(words, allowed);
    }
    met
}

fn one(words: &mut Words, allowed: &BTreeSet<String>) -> bool {
    match words.next() {
        Some("(") => {
            let met = any(words, allowed);
            met && words.next() == Some(")")
        }
        Some(licence) => match words.next_if_eq(&"WITH").and_then(|_| words.next()) {
            // An exception only allows more; but nobody has looked at that one.
            Some(exception) => allowed.contains(&format!("{licence} WITH {exception}")),
            None => allowed.contains(licence),
        },
        None => false,
    }
}

#[test]
fn expressions_of_licences_are_understood() {
    let allowed = ["MIT", "Apache-2.0"].map(str::to_owned).into();
    for met in ["MIT", "MIT/GPL-3.0", "GPL-3.0 OR (MIT AND Apache-2.0)", "Apache-2.0 WITH LLVM-exception OR MIT"] {
        assert!(is_met(met, &allowed), "{met}");
    }
    for unmet in
        ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR GPL-3.0) AND BSD-3-Clause", "MIT MIT", "(MIT", "MIT WITH X"]
    {
        assert!(!is_met(unmet, &allowed), "{unmet}");
    }
}

fn packages() -> Vec<Value> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let platform = ["--filter-platform", "x86_64-unknown-linux-gnu"];
    let mut metadata = Command::new(cargo);
    metadata.args(["metadata", "--format-version", "1", "--locked", "--offline"]).args(platform).current_dir(root());
    let output = metadata.output().expect("run cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages").clone();
    assert!(packages.len() > 50, "cargo tells of {} packages", packages.len());
    packages
}

#[test]
fn dependencies_are_what_they_may_be() {
    let allowed: BTreeSet<String> = list("allow").iter().map(|licence| licence.trim_matches('"').to_owned()).collect();
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for package in packages() {
        let text = |key: &str| package[key].as_str().unwrap_or_default().to_owned();
        let (name, version, licence) = (text("name"), text("version"), text("license"));
        if !is_met(&licence, &allowed) {
            wrong.push(format!("{name} {version}: its licence is {licence:?}"));
        }
        let source = text("source");
        if !source.is_empty() && source != "registry+https://github.com/rust-lang/crates.io-index" {
            wrong.push(format!("{name} {version} comes from {source}"));
        }
        versions.entry(name).or_default().insert(version);
    }
    let skipped: BTreeSet<String> = list("skip").into_iter().collect();
    let rule = |name: &str, version: &str| format!("{{ name = \"{name}\", version = \"={version}\" }}");
    let mut met = BTreeSet::new();
    for (name, all) in versions.iter().filter(|(_, all)| all.len() > 1) {
        let known: Vec<String> =
            all.iter().map(|version| rule(name, version)).filter(|rule| skipped.contains(rule)).collect();
        if all.len() - known.len() > 1 {
            wrong.push(format!("{name} is there in several versions: {all:?}"));
        }
        met.extend(known);
    }
    wrong.extend(skipped.difference(&met).map(|rule| format!("a rule is not needed any more: {rule}")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn sources(of: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(of).expect("list a directory").map(|entry| entry.expect("an entry").path()) {
        match entry.is_dir() {
            true if !entry.ends_with("target") => sources(&entry, all),
            false if entry.extension().is_some_and(|extension| extension == "rs") => all.push(entry),
            _ => {}
        }
    }
}

/// How often the word is in code: not in a comment, and not in a text that fits a line.
fn uses(code: &str) -> usize {
    let mut uses = 0;
    for line in code.lines() {
        let (mut code, mut quoted, mut escaped, mut last) = (String::new(), false, false, ' ');
        for c in line.chars() {
            match c {
                _ if escaped => escaped = false,
                '\\' if quoted => escaped = true,
                '"' if last != '\'' => quoted = !quoted,
                '/' if !quoted && last == '/' => break,
                _ if !quoted => code.push(c),
                _ => {}
            }
            last = c;
        }
        uses += code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| *word == "unsafe").count();
    }
    uses
}

#[test]
fn uses_are_counted_in_code_alone() {
    let code = "#![allow(unsafe_code)] // unsafe\nlet a = unsafe { b(\"unsafe \\\" unsafe\") };\nunsafe fn c() {} // \"\n#[unsafe(no_mangle)]";
    assert_eq!(uses(code), 3);
    assert_eq!(uses("match c { '\"' => unsafe { d() } }"), 1);
}

/// Whoever adds some has to say why, here and in the list.
#[test]
fn unsafe_code_is_where_it_is_known_to_be() {
    let root = root();
    let mut all = Vec::new();
    ["guest-mem", "firmware", "vmm", "tests"].iter().for_each(|part| sources(&root.join(part), &mut all));
    let mut found = BTreeMap::new();
    for path in all {
        let uses = uses(&fs::read_to_string(&path).expect("read a source"));
        let name = path.strip_prefix(&root).expect("it is in the workspace").display().to_string();
        if uses > 0 && found.insert(name.clone(), uses).is_some() {
            panic!("{name} was found twice");
        }
    }
    let inventory = fs::read_to_string(root.join(".github/unsafe.md")).expect("read the inventory");
    let rows = inventory.lines().filter_map(|line| line.strip_prefix("| `"));
    let mut listed = BTreeMap::new();
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let (file, count) = (cells[0].trim_end_matches('`'), cells[1].parse::<usize>().expect("a count"));
        assert!(!cells[2].is_empty(), "{file}: why?");
        listed.insert(file.to_owned(), count);
    }
    let files: BTreeSet<&String> = found.keys().chain(listed.keys()).collect();
    let differ = files.into_iter().filter(|file| found.get(*file) != listed.get(*file));
    let told: Vec<String> =
        differ.map(|file| format!("{file}: found {:?}, listed {:?}", found.get(file), listed.get(file))).collect();
    assert!(told.is_empty(), ".github/unsafe.md is to be brought up to date:\n{}", told.join("\n"));
    assert!(found.keys().all(|file| !file.starts_with("vmm/src/server/")), "the server's code is safe");
}
