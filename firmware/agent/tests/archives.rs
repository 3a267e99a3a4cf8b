//! Trees travel whole, also to and from the system's `tar`, and no archive reaches beyond the directory that it is for.

use agent::message::Place;
use agent::tar::{Entry, Kind, Reader, Writer};
use agent::tree::{self, Trust};
use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that goes when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("offshoot-agent-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A tree with something of everything.
fn plant(root: &Path) {
    let deep = root.join("a directory/below/".to_owned() + &"x".repeat(90));
    fs::create_dir_all(&deep).unwrap();
    fs::write(root.join("empty"), "").unwrap();
    fs::write(root.join("large"), (0..300_000u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    fs::write(deep.join("y".repeat(120)), "long").unwrap();
    fs::write(root.join("script"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(root.join("script"), Permissions::from_mode(0o755)).unwrap();
    fs::hard_link(root.join("script"), root.join("script again")).unwrap();
    symlink("a directory", root.join("link")).unwrap();
    symlink("z".repeat(200), root.join("long link")).unwrap();
    fs::set_permissions(root.join("a directory"), Permissions::from_mode(0o555)).unwrap();
}

/// All that matters of a tree.
fn describe(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().display();
        let what = match () {
            () if metadata.is_dir() => {
                todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                format!("directory {:o}", metadata.mode() & 0o7777)
            }
            () if metadata.is_symlink() => format!("link to {}", fs::read_link(&path).unwrap().display()),
            () => {
                let bytes = fs::read(&path).unwrap();
                let sum = bytes.iter().fold(0u64, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
                let (mode, links, time) = (metadata.mode() & 0o7777, metadata.nlink(), metadata.mtime());
                format!("file {mode:o} {links} {time} {} {sum:x}", bytes.len())
            }
        };
        lines.push(format!("{name}: {what}"));
    }
    lines.sort();
    lines
}

fn packed(path: &Path) -> Vec<u8> {
    tree::pack(path, Vec::new()).unwrap()
}

fn unpack(archive: &[u8], path: &Path, place: Place, trust: Trust) -> io::Result<()> {
    tree::unpack(archive, path, place, trust)
}

#[test]
fn a_tree_travels_whole() {
    let scratch = Scratch::new();
    let from = scratch.at("from");
    plant(&{
        fs::create_dir(&from).unwrap();
        from.clone()
    });
    let archive = packed(&from);
    for trust in [Trust::Guest, Trust::Host] {
        let to = scratch.at(&format!("{trust:?}"));
        // There is no such directory: the tree gets this name.
        unpack(&archive, &to, Place::As, trust).unwrap();
        assert_eq!(describe(&from), describe(&to));
        // And again, over what is there: now it goes into it, beside what is there.
        unpack(&archive, &to, Place::As, trust).unwrap();
        assert_eq!(describe(&from), describe(&to.join("from")));
        unpack(&archive, &to, Place::Into, trust).unwrap();
        assert_eq!(describe(&from), describe(&to.join("from")));
    }
    // The content of a directory alone.
    let to = scratch.at("content");
    unpack(&packed(&from.join(".")), &to, Place::As, Trust::Host).unwrap();
    assert_eq!(describe(&from), describe(&to));
    // One file, under another name, in place of another file.
    fs::write(scratch.at("other"), "old").unwrap();
    unpack(&packed(&from.join("large")), &scratch.at("other"), Place::As, Trust::Host).unwrap();
    assert_eq!(fs::read(from.join("large")).unwrap(), fs::read(scratch.at("other")).unwrap());
}

#[test]
fn archives_are_those_of_tar() {
    let scratch = Scratch::new();
    let from = scratch.at("from");
    fs::create_dir(&from).unwrap();
    plant(&from);
    if Command::new("tar").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("SKIPPED: there is no tar");
        return;
    }
    // All that has long names, and what `ustar` can say: a long path, in two halves.
    let split = scratch.at("split");
    fs::create_dir_all(split.join("x".repeat(90))).unwrap();
    fs::write(split.join("x".repeat(90)).join("y".repeat(60)), "halves").unwrap();
    for (format, tree) in [("gnu", &from), ("pax", &from), ("posix", &from), ("ustar", &split)] {
        let mut tar = Command::new("tar");
        tar.args(["-c", &format!("--format={format}"), "-C"]).arg(&scratch.0).arg(tree.file_name().unwrap());
        let archive = tar.output().unwrap();
        assert!(archive.status.success(), "{}", String::from_utf8_lossy(&archive.stderr));
        let to = scratch.at(format);
        unpack(&archive.stdout, &to, Place::As, Trust::Host).unwrap();
        assert_eq!(describe(tree), describe(&to), "{format}");
    }
    let (file, to) = (scratch.at("ours.tar"), scratch.at("unpacked"));
    fs::write(&file, packed(&from)).unwrap();
    fs::create_dir(&to).unwrap();
    let status = Command::new("tar").arg("-xpf").arg(&file).arg("-C").arg(&to).status().unwrap();
    assert!(status.success());
    assert_eq!(describe(&from), describe(&to.join("from")));
}

fn entry(path: &str, kind: Kind) -> Entry {
    Entry { path: path.into(), kind, mode: 0o4755, uid: 0, gid: 0, mtime: 1 }
}

fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    for entry in entries {
        writer.entry(entry, &mut io::repeat(b'x')).unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn no_archive_of_a_guest_leaves_its_directory() {
    let link = |path: &str, target: &str| entry(path, Kind::Symlink(target.into()));
    let hard = |path: &str, target: &str| entry(path, Kind::HardLink(target.into()));
    let file = |path: &str| entry(path, Kind::File(3));
    let directory = |path: &str| entry(path, Kind::Directory);
    let cases: Vec<(Vec<Entry>, &str)> = vec![
        (vec![file("../out")], "goes up"),
        (vec![file("a/../../out")], "goes up"),
        (vec![link("a", ".."), file("a/out")], "symbolic link"),
        (vec![link("a", "/"), directory("a/out")], "symbolic link"),
        (vec![link("a", "../out"), directory("a"), file("a/b")], "File exists"),
        (vec![hard("a", "../outside"), file("a")], "goes up"),
        (vec![link("a", "../outside"), hard("b", "a")], "no file"),
        (vec![link("d", ".."), hard("b", "d/outside")], "symbolic link"),
        (vec![hard("b", "nothing")], "No such file"),
        (vec![directory("d"), link("d", "..")], "Is a directory"),
        (vec![file("")], "no name"),
    ];
    for (entries, why) in cases {
        let scratch = Scratch::new();
        let to = scratch.at("to");
        fs::create_dir(&to).unwrap();
        fs::write(scratch.at("outside"), "untouched").unwrap();
        let e = unpack(&archive(&entries), &to, Place::Into, Trust::Host).unwrap_err();
        assert!(e.to_string().contains(why), "{entries:?}: {e}");
        assert_eq!(fs::read(scratch.at("outside")).unwrap(), b"untouched");
        assert!(!scratch.at("out").exists(), "{entries:?}");
    }

    // What looks like it and is none: an absolute path is below the directory, and a file in place of a link replaces it.
    let scratch = Scratch::new();
    let to = scratch.at("to");
    fs::create_dir(&to).unwrap();
    fs::write(scratch.at("outside"), "untouched").unwrap();
    let entries = [file("/etc/x"), link("l", "../outside"), file("l"), directory("d/")];
    unpack(&archive(&entries), &to, Place::Into, Trust::Host).unwrap();
    assert_eq!(fs::read(to.join("etc/x")).unwrap(), b"xxx");
    assert_eq!(fs::read(to.join("l")).unwrap(), b"xxx");
    assert_eq!(fs::read(scratch.at("outside")).unwrap(), b"untouched");
    // And nothing runs as somebody else.
    assert_eq!(fs::metadata(to.join("l")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn an_archive_for_a_guest_follows_its_links() {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.at("usr/lib")).unwrap();
    symlink("usr/lib", scratch.at("lib")).unwrap();
    let entries = [entry("lib", Kind::Directory), entry("lib/x", Kind::File(3))];
    unpack(&archive(&entries), &scratch.0, Place::Into, Trust::Guest).unwrap();
    assert_eq!(fs::read(scratch.at("usr/lib/x")).unwrap(), b"xxx");
    assert!(fs::symlink_metadata(scratch.at("lib")).unwrap().is_symlink());
}

#[test]
fn paths_that_cannot_be_are_named() {
    let scratch = Scratch::new();
    fs::write(scratch.at("file"), "").unwrap();
    let archive = archive(&[entry("a", Kind::File(3))]);
    let why = |path: &str, place| {
        let path = scratch.at(path);
        let why = unpack(&archive, &path, place, Trust::Host).unwrap_err().to_string();
        why.replace(&scratch.0.display().to_string(), "…")
    };
    assert_eq!(why("none", Place::Into), "…/none: No such file or directory (os error 2)");
    assert_eq!(why("none/", Place::As), "…/none/: entity not found");
    assert_eq!(why("none/b", Place::As), "…/none/b: No such file or directory (os error 2)");
    assert_eq!(why("file", Place::Into), "…/file: not a directory");
    let e = tree::pack(&scratch.at("none"), Vec::new()).unwrap_err().to_string();
    assert!(e.ends_with("/none: No such file or directory (os error 2)"), "{e}");
}

#[test]
fn broken_archives_are_refused_and_cost_little() {
    let good = archive(&[
        entry("a", Kind::Directory),
        entry(&"long/".repeat(60), Kind::Symlink(b"y".repeat(150))),
        entry("f", Kind::File(1000)),
        entry("h", Kind::HardLink(b"f".to_vec())),
    ]);
    let mut state = 7u64;
    let mut random = |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    };
    let mut refused = 0;
    for _ in 0..30_000 {
        let mut bytes = good.clone();
        let at = random(bytes.len());
        match random(3) {
            0 => bytes.truncate(at),
            _ => bytes[at] = random(256) as u8,
        }
        // Where a header is spoiled, its sum is mended half of the time, so that its fields are looked at.
        let block = at / 512 * 512;
        if random(2) == 0 && bytes.len() >= block + 512 {
            bytes[block + 148..block + 156].fill(b' ');
            let sum: u32 = bytes[block..block + 512].iter().map(|&byte| u32::from(byte)).sum();
            bytes[block + 148..block + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let mut reader = Reader::new(bytes.as_slice());
        let outcome = loop {
            match reader.entry() {
                Ok(Some(_)) => {
                    if let Err(e) = (&mut reader).take(64).read_to_end(&mut Vec::new()) {
                        break Err(e);
                    }
                }
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        refused += usize::from(outcome.is_err());
    }
    assert!(refused > 5_000, "{refused}");
    assert!(Reader::new(b"no archive at all, but some text".repeat(40).as_slice()).entry().is_err());
}
