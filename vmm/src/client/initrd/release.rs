//! Which version a kernel file is.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// How far into an uncompressed kernel its version is looked for.
const LOOKED_AT: u64 = 256 << 20;

/// What `uname -r` would say: a bzImage has it in its header, a `vmlinux` in a text.
pub fn of(kernel: &Path) -> io::Result<String> {
    let file = File::open(kernel)?;
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0)?;
    let text = if magic == *b"\x7fELF" { in_text(BufReader::new(file))? } else { in_header(&file)? };
    let release = text.split_whitespace().next().unwrap_or("");
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+' | '~');
    if release.is_empty() || release.starts_with('.') || !release.chars().all(is_plain) {
        return Err(none());
    }
    Ok(release.to_owned())
}

fn none() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it does not say which version it is")
}

fn in_header(file: &File) -> io::Result<String> {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0x202).map_err(|_| none())?;
    let mut pointer = [0; 2];
    file.read_exact_at(&mut pointer, 0x20e).map_err(|_| none())?;
    if magic != *b"HdrS" || pointer == [0; 2] {
        return Err(none());
    }
    let mut text = [0; 256];
    let count = file.read_at(&mut text, 0x200 + u64::from(u16::from_le_bytes(pointer)))?;
    Ok(up_to_zero(&text[..count]))
}

fn in_text(mut file: impl Read) -> io::Result<String> {
    const MARK: &[u8] = b"Linux version ";
    const AFTER: usize = 128;
    let (mut buffer, mut left) = (Vec::new(), LOOKED_AT);
    loop {
        let got = (&mut file).take(left.min(1 << 20)).read_to_end(&mut buffer)?;
        left -= got as u64;
        let marks = buffer.windows(MARK.len()).enumerate().filter(|(_, window)| *window == MARK);
        for at in marks.map(|(at, _)| at + MARK.len()) {
            let end = (at + AFTER).min(buffer.len());
            // A format of the same text is no version.
            if (end - at == AFTER || got == 0) && buffer[at].is_ascii_digit() {
                return Ok(up_to_zero(&buffer[at..end]));
            }
        }
        if got == 0 {
            return Err(none());
        }
        buffer.drain(..buffer.len().saturating_sub(MARK.len() + AFTER));
    }
}

fn up_to_zero(text: &[u8]) -> String {
    let text = text.split(|&byte| byte == 0).next().unwrap_or(text);
    String::from_utf8_lossy(text).into_owned()
}
