//! A kernel's modules: where they are, which of them need which, and their bytes.
//!
//! A module says in itself which it needs (`depends=` in its section `.modinfo`), so that a package whose scripts never ran, and
//! which has no `modules.dep`, is as good as one that is installed.

use lzma_rust2::XzReader;
use ruzstd::decoding::StreamingDecoder;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Largest module that is taken.
const MAX_MODULE: u64 = 64 << 20;
/// Most files that are looked at in a tree.
const MAX_FILES: usize = 100_000;

/// The modules of one version of the kernel.
#[derive(Debug)]
pub struct Tree {
    directory: PathBuf,
    /// Files by their modules' names.
    files: HashMap<String, PathBuf>,
    /// What is in the kernel itself; none where nothing says.
    builtin: Option<HashSet<String>>,
}

/// A module, not compressed.
#[derive(Debug)]
pub struct Module {
    pub name: String,
    pub bytes: Vec<u8>,
}

impl Tree {
    /// Finds those of a kernel. In a package, `boot/vmlinuz-V` has its modules in `lib/modules/V`, or `usr/lib/modules/V`; some
    /// have the kernel there as well.
    pub fn find(kernel: &Path, release: &str) -> Option<Self> {
        let above: Vec<&Path> = kernel.ancestors().skip(1).take(3).collect();
        let beside = above.first().filter(|parent| parent.file_name().is_some_and(|name| name == release));
        let trees = above.iter().flat_map(|at| ["lib/modules", "usr/lib/modules"].map(|below| at.join(below)));
        let trees = trees.chain([PathBuf::from("/lib/modules")]).map(|tree| tree.join(release));
        beside.map(|parent| parent.to_path_buf()).into_iter().chain(trees).find_map(Self::at)
    }

    fn at(directory: PathBuf) -> Option<Self> {
        let mut files = HashMap::new();
        let mut todo = vec![directory.join("kernel"), directory.join("updates")];
        while let Some(next) = todo.pop() {
            for entry in fs::read_dir(next).into_iter().flatten().flatten() {
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    todo.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.entry(name).or_insert(path);
                }
                if files.len() + todo.len() > MAX_FILES {
                    return None;
                }
            }
        }
        if files.is_empty() {
            return None;
        }
        let builtin = fs::read_to_string(directory.join("modules.builtin")).ok();
        let names = |list: String| list.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Some(Self { files, builtin: builtin.map(names), directory })
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether the kernel has this, as a module or built in. Where nothing says what is built in, it may be.
    pub fn has(&self, name: &str) -> bool {
        self.files.contains_key(name) || self.builtin.as_ref().is_none_or(|builtin| builtin.contains(name))
    }

    /// These modules and all that they need, each after those it needs. What is built in is left out.
    pub fn closure<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Module>, String> {
        let mut modules = Vec::new();
        let mut seen = HashSet::new();
        for name in names {
            self.add(name, &mut seen, &mut modules)?;
        }
        Ok(modules)
    }

    fn add(&self, name: &str, seen: &mut HashSet<String>, modules: &mut Vec<Module>) -> Result<(), String> {
        // A circle ends here as well; the depth is that of a chain of distinct files.
        let Some(path) = self.files.get(name).filter(|_| seen.insert(name.to_owned())) else { return Ok(()) };
        let about = |e: io::Error| format!("module {}: {e}", path.display());
        let bytes = read(path).map_err(about)?;
        let needs = depends(&bytes).ok_or_else(|| about(io::Error::other("it is no kernel module")))?;
        for need in needs {
            self.add(&need, seen, modules)?;
        }
        modules.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

/// The name of the module in a file, as the kernel writes it.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = ["", ".xz", ".zst", ".gz"].iter().find_map(|end| file.strip_suffix(end)?.strip_suffix(".ko"))?;
    Some(stem.replace('-', "_"))
}

/// The bytes of a module, whichever way they are compressed.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = fs::read(path)?;
    let mut bytes = Vec::new();
    let mut unpack = |from: &mut dyn Read| from.take(MAX_MODULE + 1).read_to_end(&mut bytes).map(drop);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => unpack(&mut XzReader::new(file.as_slice(), true))?,
        Some("zst") => unpack(&mut StreamingDecoder::new(file.as_slice()).map_err(io::Error::other)?)?,
        Some("ko") => return Ok(file),
        _ => return Err(io::Error::other("neither plain, nor compressed by xz or zstd")),
    }
    if bytes.len() as u64 > MAX_MODULE {
        return Err(io::Error::other(format!("more than {} MiB", MAX_MODULE >> 20)));
    }
    Ok(bytes)
}

/// The modules that one needs, as its section `.modinfo` says.
fn depends(elf: &[u8]) -> Option<Vec<String>> {
    let number = |at: usize, len: usize| {
        let field = elf.get(at..at.checked_add(len)?)?;
        Some(field.iter().rev().fold(0usize, |value, &byte| value << 8 | usize::from(byte)))
    };
    // 64 bits, little-endian.
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (headers, size, count, names) = (number(40, 8)?, number(58, 2)?, number(60, 2)?, number(62, 2)?);
    let header = |index: usize| headers.checked_add(index.checked_mul(size)?);
    let section = |index: usize| {
        let at = header(index)?;
        let (offset, len) = (number(at.checked_add(24)?, 8)?, number(at.checked_add(32)?, 8)?);
        elf.get(offset..offset.checked_add(len)?)
    };
    let texts = section(names)?;
    let is_info = |&index: &usize| {
        let name = header(index).and_then(|at| number(at, 4)).and_then(|at| texts.get(at..));
        name.is_some_and(|name| name.starts_with(b".modinfo\0"))
    };
    let info = section((0..count).find(is_info)?)?;
    let lines = info.split(|&byte| byte == 0);
    let depends = lines.filter_map(|line| line.strip_prefix(b"depends=")).next().unwrap_or_default();
    let names = String::from_utf8_lossy(depends).replace('-', "_");
    Some(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An object file with nothing but a section `.modinfo`.
    pub(in super::super) fn module(info: &str) -> Vec<u8> {
        let texts = b"\0.modinfo\0.names\0";
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(64, 0);
        let info_at = elf.len();
        elf.extend(info.as_bytes());
        let texts_at = elf.len();
        elf.extend(texts);
        let headers = elf.len();
        for (name, at, len) in [(0, 0, 0), (1, info_at, info.len()), (10, texts_at, texts.len())] {
            let start = elf.len();
            elf.extend((name as u32).to_le_bytes());
            elf.resize(start + 24, 0);
            elf.extend((at as u64).to_le_bytes());
            elf.extend((len as u64).to_le_bytes());
            elf.resize(start + 64, 0);
        }
        elf[40..48].copy_from_slice(&(headers as u64).to_le_bytes());
        for (at, value) in [(58, 64u16), (60, 3), (62, 2)] {
            elf[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        elf
    }

    #[test]
    fn a_module_says_what_it_needs() {
        assert_eq!(
            depends(&module("license=GPL\0depends=virtio,virtio-ring\0name=x\0")).unwrap(),
            ["virtio", "virtio_ring"]
        );
        assert_eq!(depends(&module("depends=\0")).unwrap(), Vec::<String>::new());
        assert_eq!(depends(&module("")).unwrap(), Vec::<String>::new());
        assert_eq!(depends(b"no module"), None);
        let good = module("depends=a\0");
        // Cut or spoilt anywhere, it is taken for something or nothing, and that is all.
        for at in 0..good.len() {
            let _ = depends(&good[..at]);
            let mut spoilt = good.clone();
            for value in [0, 1, 0x7f, 0xff] {
                spoilt[at] = value;
                let _ = depends(&spoilt);
            }
        }
    }

    #[test]
    fn names_are_the_kernels() {
        let name = |path: &str| module_name(Path::new(path));
        assert_eq!(name("a/virtio-rng.ko.xz").as_deref(), Some("virtio_rng"));
        assert_eq!(name("b.ko").as_deref(), Some("b"));
        assert_eq!(name("modules.order"), None);
    }
}
