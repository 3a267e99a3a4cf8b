use super::modules::tests::module;
use super::*;
use crate::client::testing::TempDir;

/// An unpacked package: a kernel in `boot`, and modules, compressed or not.
fn package(directory: &Path) -> PathBuf {
    let kernel = directory.join("boot/vmlinuz-6.1.0-test");
    fs::create_dir_all(directory.join("boot")).unwrap();
    fs::write(&kernel, bzimage("6.1.0-test (somebody@somewhere) #1 SMP")).unwrap();
    let modules = directory.join("lib/modules/6.1.0-test");
    let put = |path: &str, bytes: &[u8]| {
        let path = modules.join("kernel").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    put("net/vmw_vsock_virtio_transport.ko.xz", include_bytes!("testdata/transport.ko.xz"));
    put("net/vsock.ko.zst", include_bytes!("testdata/vsock.ko.zst"));
    put("net/virtio-common.ko", &module("depends=vsock\0"));
    put("drivers/virtio-rng.ko", &module("depends=\0"));
    put("drivers/unrelated.ko", &module("depends=\0"));
    fs::write(modules.join("modules.builtin"), "kernel/drivers/virtio/virtio_mmio.ko\n").unwrap();
    kernel
}

fn bzimage(version: &str) -> Vec<u8> {
    let mut image = vec![0; 0x800];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x20e..0x210].copy_from_slice(&0x300u16.to_le_bytes());
    image[0x500..0x500 + version.len()].copy_from_slice(version.as_bytes());
    image
}

/// Names, modes and contents of an archive.
fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let mut entries = Vec::new();
    loop {
        let field = |n: usize| {
            let digits = std::str::from_utf8(&archive[6 + 8 * n..14 + 8 * n]).unwrap();
            u32::from_str_radix(digits, 16).unwrap() as usize
        };
        assert_eq!(&archive[..6], b"070701");
        let (mode, size, name_size) = (field(1) as u32, field(6), field(11));
        let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
        let content = (110 + name_size).next_multiple_of(4);
        if name == "TRAILER!!!" {
            assert_eq!(archive.len(), content);
            return entries;
        }
        entries.push((name, mode, archive[content..content + size].to_vec()));
        archive = &archive[(content + size).next_multiple_of(4)..];
    }
}

#[test]
fn an_initrd_has_the_agent_and_the_modules_in_order() {
    let directory = TempDir::new();
    let plan = Plan::new(&package(directory.path())).unwrap();
    assert_eq!((plan.release.as_str(), plan.has_modules()), ("6.1.0-test", true));
    let bytes = plan.build(None).unwrap();
    assert_eq!(bytes, plan.build(None).unwrap(), "the same content, the same bytes");
    let entries = entries(&bytes);
    let find = |name: &str| entries.iter().find(|(other, ..)| other == name).unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(find("init").2, AGENT.as_bytes());
    assert_eq!((find("offshoot/agent").1, find("offshoot/agent").2.as_slice()), (0o100_755, agent::IMAGE));
    let order = String::from_utf8(find("offshoot/modules/order").2.clone()).unwrap();
    assert_eq!(order, "vsock.ko\nvirtio_common.ko\nvmw_vsock_virtio_transport.ko\nvirtio_rng.ko\n");
    for name in order.lines() {
        assert!(find(&format!("offshoot/modules/{name}")).2.starts_with(b"\x7fELF"), "{name}");
    }
    // A directory stands before what is in it.
    let at = |name: &str| entries.iter().position(|(other, ..)| other == name).unwrap();
    assert!(at("offshoot") < at("offshoot/modules") && at("offshoot/modules") < at("offshoot/modules/order"));
}

#[test]
fn beside_the_users_archive_there_is_no_other_init() {
    let directory = TempDir::new();
    let plan = Plan::new(&package(directory.path())).unwrap();
    let users = directory.path().join("initrd");
    fs::write(&users, b"compressed, or whatever it is").unwrap();
    let bytes = plan.build(Some(&users)).unwrap();
    let (first, rest) = bytes.split_at(32);
    assert_eq!(first, b"compressed, or whatever it is\0\0\0");
    let names: Vec<String> = entries(rest).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names[..3], ["offshoot", "offshoot/agent", "offshoot/modules"]);
    let e = plan.build(Some(Path::new("/no/such"))).unwrap_err();
    assert_eq!(e, "initrd /no/such: No such file or directory (os error 2)");
}

#[test]
fn what_is_missing_is_named() {
    let directory = TempDir::new();
    let kernel = package(directory.path());
    let modules = directory.path().join("lib/modules/6.1.0-test");
    let why = |kernel: &Path| {
        let made = Plan::new(kernel).and_then(|plan| plan.build(None));
        made.unwrap_err().replace(&directory.path().display().to_string(), "…")
    };
    fs::write(modules.join("kernel/net/vsock.ko.zst"), "no zstd").unwrap();
    assert!(why(&kernel).starts_with("module …/lib/modules/6.1.0-test/kernel/net/vsock.ko.zst: "), "{}", why(&kernel));
    fs::write(modules.join("kernel/net/vmw_vsock_virtio_transport.ko.xz"), "no xz").unwrap();
    assert!(why(&kernel).contains("transport.ko.xz: "), "{}", why(&kernel));
    fs::remove_file(modules.join("kernel/net/vmw_vsock_virtio_transport.ko.xz")).unwrap();
    let needs = "…/lib/modules/6.1.0-test has no module vmw_vsock_virtio_transport, which the agent needs";
    assert_eq!(why(&kernel), needs);
    // A kernel without modules may have all built in.
    fs::remove_dir_all(directory.path().join("lib")).unwrap();
    assert!(!Plan::new(&kernel).unwrap().has_modules());

    for (bytes, what) in [(bzimage("6.1/../.."), "…"), (bzimage(""), "…"), (vec![0; 100], "…"), (vec![7; 0x800], "…")]
    {
        fs::write(&kernel, bytes).unwrap();
        assert_eq!(why(&kernel), format!("kernel {what}/boot/vmlinuz-6.1.0-test: it does not say which version it is"));
    }
}

#[test]
fn an_uncompressed_kernel_says_its_version_too() {
    let directory = TempDir::new();
    let kernel = directory.path().join("vmlinux");
    let mut bytes = b"\x7fELF".to_vec();
    bytes.extend(b"Linux version %s (%s)\0");
    bytes.resize((1 << 20) - 7, 0);
    bytes.extend(b"Linux version 6.12.95+deb13-cloud-amd64 (debian-kernel@lists.debian.org)\n\0");
    fs::write(&kernel, bytes).unwrap();
    assert_eq!(Plan::new(&kernel).unwrap().release, "6.12.95+deb13-cloud-amd64");
}

#[test]
fn files_that_were_made_are_kept_and_few() {
    let directory = TempDir::new();
    let kept = directory.path().join("initrds");
    let first = keep(&kept, b"one").unwrap();
    assert_eq!(first, keep(&kept, b"one").unwrap());
    let names = || fs::read_dir(&kept).unwrap().count();
    assert_eq!((names(), fs::read(&first).unwrap()), (1, b"one".to_vec()));
    // One that was spoilt is made again.
    fs::write(&first, "two").unwrap();
    assert_eq!(fs::read(keep(&kept, b"one").unwrap()).unwrap(), b"one");
    for n in 0..10u8 {
        keep(&kept, &[n; 9]).unwrap();
    }
    assert_eq!(names(), KEPT);
}
