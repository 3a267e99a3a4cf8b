//! Builds the guest's program with the stable compiler for the host target, linked statically: the library without the
//! image, then `image/main.rs` on top of it.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=image");

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let library = out.join("libagent.rlib");
    rustc("src/lib.rs", &library, ["--crate-name=agent", "--crate-type=rlib", "--cfg=agent_image"]);
    let args = [
        format!("--extern=agent={}", library.display()),
        "--crate-name=offshoot_agent".into(),
        "--crate-type=bin".into(),
        "-Clto=fat".into(),
        "-Cstrip=symbols".into(),
    ];
    rustc("image/main.rs", &out.join("offshoot-agent"), args);
}

/// Compiles for x86-64 Linux with the C library inside: whatever the guest has of its own, the program needs none of it.
fn rustc(source: &str, output: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) {
    let status = Command::new(env::var_os("RUSTC").expect("cargo sets RUSTC"))
        .args(["--edition=2024", "-Cpanic=abort", "-Copt-level=s", "-Ccodegen-units=1"])
        .args(["-Ctarget-feature=+crt-static", "-Crelocation-model=static"])
        .arg("-o")
        .arg(output)
        .args(args)
        .arg(source)
        .status()
        .expect("the compiler that runs this runs");
    assert!(
        status.success(),
        "{source} does not compile for the guest: is the C library's static half (libc.a) there?"
    );
}
