//! Archives in the format of POSIX `tar`: what is written, any `tar` reads; what is read may be `ustar`, `pax` or GNU's, with
//! files, directories, and links.

use std::io::{self, Read, Write};

const BLOCK: usize = 512;
/// Longest name that is taken from an archive; Linux has 4 KiB.
const MAX_NAME: u64 = 64 << 10;
/// Longest extended header that is looked at.
const MAX_EXTENDED: u64 = 1 << 20;

/// One thing in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its path, with slashes.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Its permissions, with the bits for set-user-ID, set-group-ID and sticky.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was changed, in seconds since 1970.
    pub mtime: u64,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file with so many bytes, which follow.
    File(u64),
    /// A directory.
    Directory,
    /// A symbolic link, to this.
    Symlink(Vec<u8>),
    /// Another name of an earlier entry.
    HardLink(Vec<u8>),
    /// A device, a pipe, or something that we do not know.
    Other,
}

/// Writes an archive.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
}

impl<W: Write> Writer<W> {
    /// An archive that goes there.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Writes an entry, whose bytes are those of `data`: just as many as it says.
    ///
    /// # Errors
    /// The output fails, or `data` fails or ends early.
    pub fn entry(&mut self, entry: &Entry, data: &mut impl Read) -> io::Result<()> {
        let empty: &[u8] = &[];
        let (flag, size, target) = match &entry.kind {
            Kind::File(size) => (b'0', *size, empty),
            Kind::Directory => (b'5', 0, empty),
            Kind::Symlink(target) => (b'2', 0, target.as_slice()),
            Kind::HardLink(target) => (b'1', 0, target.as_slice()),
            Kind::Other => return Err(invalid("a device cannot be archived")),
        };
        let mut records = Vec::new();
        let mut record = |key: &str, value: &[u8], fits: bool| {
            if !fits {
                records.extend(extended_record(key, value));
            }
        };
        record("path", &entry.path, entry.path.len() <= 100);
        record("linkpath", target, target.len() <= 100);
        record("size", size.to_string().as_bytes(), size < 1 << 33);
        record("uid", entry.uid.to_string().as_bytes(), entry.uid < 1 << 21);
        record("gid", entry.gid.to_string().as_bytes(), entry.gid < 1 << 21);
        if !records.is_empty() {
            let header =
                Fields { path: b"pax", flag: b'x', size: records.len() as u64, mode: 0o644, ..Fields::default() };
            self.out.write_all(&header.block())?;
            self.padded(&mut records.as_slice(), records.len() as u64)?;
        }
        let header = Fields {
            path: &entry.path,
            target,
            flag,
            size,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
        };
        self.out.write_all(&header.block())?;
        self.padded(data, size)
    }

    fn padded(&mut self, data: &mut impl Read, size: u64) -> io::Result<()> {
        let copied = io::copy(&mut data.take(size), &mut self.out)?;
        if copied < size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter while it was read"));
        }
        self.out.write_all(&[0; BLOCK][..padding(size)])
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// The output fails.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn extended_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = 1 + key.len() + 1 + value.len() + 1;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    let mut record = format!("{len} {key}=").into_bytes();
    record.extend(value);
    record.push(b'\n');
    record
}

#[derive(Debug, Default)]
struct Fields<'a> {
    path: &'a [u8],
    target: &'a [u8],
    flag: u8,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: u64,
}

impl Fields<'_> {
    fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.path[..self.path.len().min(100)]);
        put(100, octal(self.mode.into(), 7).as_bytes());
        put(108, octal(self.uid.into(), 7).as_bytes());
        put(116, octal(self.gid.into(), 7).as_bytes());
        put(124, octal(self.size, 11).as_bytes());
        put(136, octal(self.mtime, 11).as_bytes());
        put(148, b"        ");
        put(156, &[self.flag]);
        put(157, &self.target[..self.target.len().min(100)]);
        put(257, b"ustar\x0000");
        let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
        block[148..155].copy_from_slice(format!("{}\0", octal(sum, 6)).as_bytes());
        block
    }
}

/// So many octal digits; a number that is too large is in the extended header, and here as large as can be.
fn octal(value: u64, digits: usize) -> String {
    let most = (1 << (3 * digits)) - 1;
    format!("{:0digits$o}", value.min(most))
}

/// Reads an archive.
#[derive(Debug)]
pub struct Reader<R: Read> {
    input: R,
    /// Bytes of the entry that are still to come, and zeros after them.
    left: u64,
    pad: usize,
}

impl<R: Read> Reader<R> {
    /// The archive that comes from there.
    pub fn new(input: R) -> Self {
        Self { input, left: 0, pad: 0 }
    }

    /// The next entry, whose bytes can be read from this until the one after it is asked for. None at the archive's end.
    ///
    /// # Errors
    /// The input fails, or is no archive.
    pub fn entry(&mut self) -> io::Result<Option<Entry>> {
        let (mut long_path, mut long_target) = (None, None);
        let mut extended = Extended::default();
        loop {
            self.skip()?;
            let Some(block) = self.block()? else { return Ok(None) };
            let header = Header(&block);
            let size = extended.size.map_or_else(|| header.number(124..136), Ok)?;
            match header.flag() {
                b'L' => long_path = Some(self.name(header.number(124..136)?)?),
                b'K' => long_target = Some(self.name(header.number(124..136)?)?),
                b'x' => extended = Extended::parse(&self.whole(header.number(124..136)?, MAX_EXTENDED)?)?,
                b'g' => self.begin(header.number(124..136)?),
                flag => {
                    let path = extended.path.take().or(long_path.take()).unwrap_or_else(|| header.path());
                    let target = extended.target.take().or(long_target.take()).unwrap_or_else(|| header.target());
                    let kind = match flag {
                        b'5' => Kind::Directory,
                        b'0' | b'7' | 0 if path.ends_with(b"/") => Kind::Directory,
                        b'0' | b'7' | 0 => Kind::File(size),
                        b'1' => Kind::HardLink(target),
                        b'2' => Kind::Symlink(target),
                        _ => Kind::Other,
                    };
                    // Links may say a size that is not there.
                    self.begin(if matches!(flag, b'1' | b'2' | b'5') { 0 } else { size });
                    let id = |told: Option<u32>, at| match told {
                        Some(id) => Ok(id),
                        None => header.number(at)?.try_into().map_err(|_| invalid("an owner in the archive is none")),
                    };
                    return Ok(Some(Entry {
                        path,
                        kind,
                        mode: header.number(100..108)? as u32 & 0o7777,
                        uid: id(extended.uid, 108..116)?,
                        gid: id(extended.gid, 116..124)?,
                        mtime: header.number(136..148)?,
                    }));
                }
            }
        }
    }

    fn begin(&mut self, size: u64) {
        (self.left, self.pad) = (size, padding(size));
    }

    /// Passes over what was not read of the last entry.
    fn skip(&mut self) -> io::Result<()> {
        let rest = self.left.checked_add(self.pad as u64).ok_or_else(|| invalid("an entry's size cannot be"))?;
        let passed = io::copy(&mut (&mut self.input).take(rest), &mut io::sink())?;
        (self.left, self.pad) = (0, 0);
        if passed == rest { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// The next header; none at the archive's end, which some forget to write.
    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut got = 0;
        while got < BLOCK {
            match self.input.read(&mut block[got..]) {
                Ok(0) if got == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => got += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if block.iter().all(|&byte| byte == 0) {
            // Zeros to the end: whoever writes must be able to finish.
            io::copy(&mut self.input, &mut io::sink())?;
            return Ok(None);
        }
        let told = Header(&block).number(148..156)?;
        let sum = |at: usize| u64::from(if (148..156).contains(&at) { b' ' } else { block[at] });
        if told != (0..BLOCK).map(sum).sum::<u64>() {
            return Err(invalid("this is no tar archive, or a broken one"));
        }
        Ok(Some(block))
    }

    fn whole(&mut self, size: u64, most: u64) -> io::Result<Vec<u8>> {
        if size > most {
            return Err(invalid("a name or header in the archive is too long"));
        }
        self.begin(size);
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn name(&mut self, size: u64) -> io::Result<Vec<u8>> {
        Ok(until_nul(&self.whole(size, MAX_NAME)?).to_vec())
    }
}

/// The bytes of the entry.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(self.left.try_into().unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let count = self.input.read(&mut buffer[..most])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        Ok(count)
    }
}

#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Extended {
    fn parse(mut bytes: &[u8]) -> io::Result<Self> {
        let mut extended = Self::default();
        let broken = || invalid("an extended header of the archive is broken");
        while !bytes.is_empty() {
            let space = bytes.iter().position(|&byte| byte == b' ').ok_or_else(broken)?;
            let len: usize = number_of(&bytes[..space]).ok_or_else(broken)?;
            if len <= space + 1 || len > bytes.len() {
                return Err(broken());
            }
            let (record, rest) = bytes.split_at(len);
            bytes = rest;
            let record = &record[space + 1..len - 1];
            let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(broken)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => extended.path = Some(value.to_vec()),
                b"linkpath" => extended.target = Some(value.to_vec()),
                b"size" => extended.size = Some(number_of(value).ok_or_else(broken)?),
                b"uid" => extended.uid = Some(number_of(value).ok_or_else(broken)?),
                b"gid" => extended.gid = Some(number_of(value).ok_or_else(broken)?),
                _ if key.starts_with(b"GNU.sparse") => {
                    return Err(invalid("sparse files in archives are not supported"));
                }
                _ => {}
            }
        }
        Ok(extended)
    }
}

fn number_of<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

struct Header<'a>(&'a [u8; BLOCK]);

impl Header<'_> {
    fn flag(&self) -> u8 {
        self.0[156]
    }

    /// Octal digits, or GNU's base 256 for what they cannot hold.
    fn number(&self, at: std::ops::Range<usize>) -> io::Result<u64> {
        let field = &self.0[at];
        if field[0] & 0x80 != 0 {
            let first = u64::from(field[0] & 0x7f);
            let value =
                field[1..].iter().try_fold(first, |value, &byte| Some(value.checked_mul(256)? | u64::from(byte)));
            return value.ok_or_else(|| invalid("a number in the archive is out of range"));
        }
        // Twelve octal digits at most, which cannot overflow.
        let digits = until_nul(field).trim_ascii();
        digits.iter().try_fold(0u64, |value, &byte| match byte {
            b'0'..=b'7' => Ok(value << 3 | u64::from(byte - b'0')),
            _ => Err(invalid("this is no tar archive, or a broken one")),
        })
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.0[..100]);
        let prefix = if &self.0[257..263] == b"ustar\0" { until_nul(&self.0[345..500]) } else { &[] };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    fn target(&self) -> Vec<u8> {
        until_nul(&self.0[157..257]).to_vec()
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or(bytes)
}

fn padding(size: u64) -> usize {
    (size.wrapping_neg() % BLOCK as u64) as usize
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
