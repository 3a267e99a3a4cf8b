//! `tests/bench`: what it measures gets into its JSON, and what it cannot do it says.

use offshoot_tests::{Lack, offshoot_binary, skip};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "120", env!("CARGO_BIN_EXE_offshoot-bench")]).args(arguments);
    command.env("OFFSHOOT_BIN", offshoot_binary());
    command.output().expect("run the benchmarks")
}

/// A directory that is gone with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        let path = std::env::temp_dir().join("offshoot-bench-test-XXXXXX");
        Self(nix::unistd::mkdtemp(&path).expect("make a temporary directory"))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One of the quick ones, on real KVM, with all that must be known of a figure.
#[test]
fn a_quick_measure_gets_into_the_json() {
    if let Err(e) = vmm::host::open_kvm() {
        return skip(Lack::Kvm, e);
    }
    let directory = Directory::new();
    let (json, svg) = (directory.0.join("figures.json"), directory.0.join("curves"));
    let arguments = ["--quick", "--only", "depth", "--json", json.to_str().unwrap(), "--svg", svg.to_str().unwrap()];
    let output = bench(&arguments);
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let entries: Value = serde_json::from_str(&fs::read_to_string(&json).expect("the JSON")).expect("JSON");
    let entries = entries.as_array().expect("a list");
    let mut wanted =
        ["measure", "unit", "value", "p99", "samples", "reference", "reference_value", "ratio", "aim", "met", "host"];
    wanted.sort_unstable();
    for entry in entries {
        let mut fields: Vec<&str> = entry.as_object().expect("an object").keys().map(String::as_str).collect();
        fields.sort_unstable();
        assert_eq!(fields, wanted);
        assert!(entry["measure"].as_str().is_some_and(|name| name.starts_with("depth/")), "{entry}");
        assert!(entry["value"].as_f64().is_some_and(|value| value > 0.0), "{entry}");
        assert!(entry["p99"].as_f64() >= entry["value"].as_f64(), "{entry}");
        assert!(entry["samples"].as_u64().is_some_and(|samples| samples > 0), "{entry}");
        let ratio = entry["value"].as_f64().unwrap() / entry["reference_value"].as_f64().unwrap();
        assert!((entry["ratio"].as_f64().unwrap() - ratio).abs() < 1e-9, "{entry}");
        assert!(entry["host"]["kernel"].is_string() && entry["host"]["kvm"].is_string(), "{entry}");
    }
    // Whether its aim is met is for people to read, and no reason to fail.
    let flat = entries.last().expect("figures");
    assert!(flat["met"].is_boolean() && flat["aim"] == "≤ 1.2×", "{flat}");
    assert!(entries[0]["met"].is_null() && entries[0]["aim"].is_null(), "{}", entries[0]);
    assert!(fs::read_to_string(svg.join("depth.svg")).expect("the curve").contains("<polyline"));
}

#[test]
fn bad_arguments_are_refused() {
    for arguments in [&["--only", "nothing"][..], &["--only"], &["--fast"], &["--json", "/no/such/directory/x"], &["x"]]
    {
        let output = bench(arguments);
        let line = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{arguments:?}: {line}");
        assert!(line.starts_with("bench: ") && output.stdout.is_empty(), "{line}");
    }
}

#[test]
fn the_list_has_all_measures() {
    let output = bench(&["--list"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.lines().count() > 10, "{text}");
    assert!(text.lines().any(|line| line.starts_with("fork ")), "{text}");
}

/// Another checkout is whatever has a `tests/bench` that knows `--list`, `--only` and `--json`.
#[test]
fn what_another_checkout_does_better_is_told() {
    if let Err(e) = vmm::host::open_kvm() {
        return skip(Lack::Kvm, e);
    }
    let directory = Directory::new();
    let (json, script) = (directory.0.join("compared.json"), directory.0.join("tests/bench"));
    let against = |us: &str| {
        let figure = format!(
            r#"[{{"measure": "victim/1,000 VMs, all run", "unit": "us", "value": {us}, "p99": null, "samples": 1,
                "reference": null, "reference_value": null, "ratio": null, "aim": null, "met": null,
                "host": {{"machine": "", "kvm": "", "kernel": "", "cores": 1}}}}]"#
        );
        let text = format!(
            "#!/bin/sh\n[ \"$*\" != --list ] || exec echo victim\n[ \"$1 $2 $3\" = '--only victim --json' ] || exit 1\n\
             cat >\"$4\" <<'END'\n{figure}\nEND\n"
        );
        fs::create_dir_all(script.parent().unwrap()).unwrap();
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
        let checkout = directory.0.to_str().unwrap();
        let words = ["--quick", "--only", "victim", "--only", "fork", "--rounds", "1", "--against", checkout, "--json"];
        let output = bench(&[&words[..], &[json.to_str().unwrap()]].concat());
        let compared: Value = serde_json::from_str(&fs::read_to_string(&json).expect("the JSON")).expect("JSON");
        assert_eq!(compared.as_array().map(Vec::len), Some(1), "what both have told: {compared}");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), compared[0]["ratio"].as_f64())
    };
    let (code, said, ratio) = against("1e-6");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("WORSE: victim/1,000 VMs, all run") && ratio.is_some_and(|ratio| ratio > 1.1), "{said}");
    assert!(said.contains("fork: the other checkout has no such measure"), "{said}");
    let (code, said, ratio) = against("1e9");
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains("WORSE") && ratio.is_some_and(|ratio| ratio < 1.0), "{said}");
}
