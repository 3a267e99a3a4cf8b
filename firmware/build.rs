//! Builds the guest image with the stable compiler for the host target: the library as the guest sees it, then
//! `image/main.rs` on top of it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=image");
    println!("cargo::rustc-check-cfg=cfg(monitor_image)");

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let library = out.join("libfirmware.rlib");
    rustc("src/lib.rs", &library, ["--crate-name=firmware", "--crate-type=rlib", "--cfg=monitor_image"]);

    let elf = out.join("monitor.elf");
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let args = [
        format!("--extern=firmware={}", library.display()),
        "--crate-name=monitor".into(),
        "--crate-type=bin".into(),
        "-Clto=fat".into(),
        "-Cstrip=debuginfo".into(),
        "-Clink-arg=-nostdlib".into(),
        "-Clink-arg=-static".into(),
        "-Clink-arg=-Wl,--build-id=none,--no-eh-frame-hdr,-znorelro,-znognustack".into(),
        format!("-Clink-arg=-Wl,-T,{root}/image/link.ld"),
    ];
    rustc("image/main.rs", &elf, args);

    let elf = fs::read(elf).expect("rustc has written the image");
    fs::write(out.join("monitor.bin"), flatten(&elf)).expect("OUT_DIR is writable");
}

/// Compiles for the host, whatever the target of the workspace: the image needs nothing of any system.
fn rustc(source: &str, output: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) {
    let status = Command::new(env::var_os("RUSTC").expect("cargo sets RUSTC"))
        .args(["--edition=2024", "-Cpanic=abort", "-Copt-level=3", "-Crelocation-model=static", "-Ccodegen-units=1"])
        .arg("-o")
        .arg(output)
        .args(args)
        .arg(source)
        .status()
        .expect("the compiler that runs this runs");
    assert!(status.success(), "{source} does not compile for the guest");
}

/// The bytes of the only loadable segment of a 64-bit little-endian ELF file.
fn flatten(elf: &[u8]) -> &[u8] {
    const PT_LOAD: u64 = 1;
    let field =
        |at: usize, len: usize| elf[at..at + len].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
    let headers = field(32, 8) as usize;
    let size = field(54, 2) as usize;
    let load = (0..field(56, 2) as usize)
        .map(|i| headers + i * size)
        .find(|&header| field(header, 4) == PT_LOAD)
        .expect("the linker script makes a segment");
    let (offset, len) = (field(load + 8, 8) as usize, field(load + 32, 8) as usize);
    &elf[offset..offset + len]
}
