//! Sizes as people write them.

use crate::api::MIN_MEMORY;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

/// A number of bytes, written `268435456`, `262144K`, `256M`, `256MiB`, `0.25G` or `1G` (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

/// Digits that a fraction of a size may have.
const FRACTION_DIGITS: usize = 12;

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It does not read as a number with a unit.
    #[error("not a size: write bytes, or a number and K, M, G or T (powers of 1024), like 64M, 64MiB or 0.5G")]
    Malformed,
    /// It does not fit 64 bits.
    #[error("more bytes than 64 bits can count")]
    TooLarge,
    /// No guest runs in that little.
    #[error("guest memory is at least {least}, and this is {0}", least = ByteSize(MIN_MEMORY))]
    TooSmall(ByteSize),
    /// Memory comes in pages.
    #[error("guest memory is a multiple of 4K, and this is {0}")]
    NotPages(ByteSize),
}

impl ByteSize {
    /// So many MiB. Panics past 64 bits of bytes, like any arithmetic on constants.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// So many pages of 4 KiB, at most what 64 bits can count.
    pub const fn pages(count: u64) -> Self {
        Self(count.saturating_mul(PAGE_BYTES))
    }

    /// This size, if a guest can have it as memory: at least 16 MiB and whole pages.
    pub fn as_guest_memory(self) -> Result<Self, SizeError> {
        match self {
            Self(bytes) if bytes < MIN_MEMORY => Err(SizeError::TooSmall(self)),
            Self(bytes) if !bytes.is_multiple_of(PAGE_BYTES) => Err(SizeError::NotPages(self)),
            size => Ok(size),
        }
    }

    /// For eyes: `63.9 MiB`.
    pub fn approx(self) -> String {
        let bytes = self.0 as f64;
        match self.0 {
            0..0x400 => format!("{} B", self.0),
            0x400..0x10_0000 => format!("{:.1} KiB", bytes / 1024.0),
            0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes / 1_048_576.0),
            _ => format!("{:.1} GiB", bytes / 1_073_741_824.0),
        }
    }

    /// For eyes, and columns: `63.9M`.
    pub fn short(self) -> String {
        match self.0 {
            0 => "0".into(),
            _ => self.approx().replace("iB", "").replace(' ', ""),
        }
    }
}

/// So many of something that is called this, one or more of it: `1 VM`, `2 VMs`.
pub fn count(number: u64, noun: &str) -> String {
    let end = match noun {
        _ if number == 1 => "",
        _ if noun.ends_with('s') => "es",
        _ => "s",
    };
    format!("{number} {noun}{end}")
}

impl FromStr for ByteSize {
    type Err = SizeError;

    /// A fraction of a unit comes to whole bytes, one of M, G or T to whole pages: nobody who writes 1.2G wants to hear of
    /// multiples of 4K.
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let number = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = text[number.len()..].to_ascii_uppercase();
        let shift = match unit.strip_suffix("IB").unwrap_or(&unit) {
            "" if unit.is_empty() => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(SizeError::Malformed),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let fine = fraction.len() <= FRACTION_DIGITS && (shift > 0 || !number.contains('.'));
        if !digits(whole) || !digits(fraction) || !fine {
            return Err(SizeError::Malformed);
        }
        // Digits alone fail to parse only by being too many.
        let count: u64 = whole.parse().map_err(|_| SizeError::TooLarge)?;
        let whole = count.checked_mul(1 << shift).ok_or(SizeError::TooLarge)?;
        let parts: u64 = fraction.parse().map_err(|_| SizeError::Malformed)?;
        let part = (u128::from(parts) << shift) / 10_u128.pow(fraction.len() as u32);
        let grain = if shift >= 20 { PAGE_BYTES } else { 1 };
        // Less than one unit.
        let part = part as u64 / grain * grain;
        whole.checked_add(part).map(Self).ok_or(SizeError::TooLarge)
    }
}

/// Exact: in the largest unit that divides it.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0"),
            bytes if bytes.trailing_zeros() >= 30 => write!(f, "{}G", bytes >> 30),
            bytes if bytes.trailing_zeros() >= 20 => write!(f, "{}M", bytes >> 20),
            bytes if bytes.trailing_zeros() >= 10 => write!(f, "{}K", bytes >> 10),
            bytes => f.write_str(&count(bytes, "byte")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in
            [("64M", 64 << 20), ("1G", 1 << 30), ("512k", 512 << 10), ("0", 0), ("3", 3), ("2T", 2 << 40)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn units_may_be_written_out_and_have_fractions() {
        for (text, bytes) in [
            ("512MiB", 512 << 20),
            ("1GiB", 1 << 30),
            ("4kib", 4 << 10),
            ("0.5G", 512 << 20),
            ("1.5GiB", 1536 << 20),
            ("0.5K", 512),
            ("0.0625T", 64 << 30),
            // Whole pages.
            ("1.2G", 1_288_486_912),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "M",
            "-1",
            "+1",
            "1.5",
            "1.",
            ".5G",
            "1..5G",
            "1.5.5G",
            "1.0000000000000G",
            "1GB",
            "1iB",
            "1Mi",
            "0x10",
            "1 M",
            " 1M",
            "M1",
            "1é",
            "١",
        ] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::Malformed), "{text}");
        }
        for text in ["18446744073709551616", "16777216T", "99999999999999999999999G"] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn guest_memory_has_a_least_size_and_whole_pages() {
        let check = |text: &str| text.parse::<ByteSize>().unwrap().as_guest_memory();
        assert_eq!(check("16M"), Ok(ByteSize::mib(16)));
        assert_eq!(check("3"), Err(SizeError::TooSmall(ByteSize(3))));
        assert_eq!(check("0"), Err(SizeError::TooSmall(ByteSize(0))));
        assert_eq!(check("16777217"), Err(SizeError::NotPages(ByteSize(16_777_217))));
        assert_eq!(check("3").unwrap_err().to_string(), "guest memory is at least 16M, and this is 3 bytes");
    }

    #[test]
    fn sizes_are_shown_as_they_are_written() {
        for text in ["0", "12K", "256M", "3G"] {
            assert_eq!(text.parse::<ByteSize>().unwrap().to_string(), text);
        }
        assert_eq!(ByteSize(1536 << 20).to_string(), "1536M");
        assert_eq!((ByteSize(1).to_string(), ByteSize(3).to_string()), ("1 byte".into(), "3 bytes".into()));
        assert_eq!(ByteSize(67_000_000).approx(), "63.9 MiB");
        assert_eq!(ByteSize(67_000_000).short(), "63.9M");
        assert_eq!([0, 3, 12 << 10].map(|bytes| ByteSize(bytes).short()), ["0", "3B", "12.0K"]);
        assert_eq!(
            (count(1, "VM"), count(2, "VM"), count(0, "page")),
            ("1 VM".into(), "2 VMs".into(), "0 pages".into())
        );
    }
}
