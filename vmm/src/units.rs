//! Sizes as people write them.

use crate::api::MIN_MEMORY;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

/// A number of bytes, written `268435456`, `262144K`, `256M` or `1G` (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It does not read as a number with a unit.
    #[error("not a size: write bytes, or a number and K, M, G or T, like 64M or 1G")]
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
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(SizeError::Malformed),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(SizeError::Malformed);
        }
        // Digits alone fail to parse only by being too many.
        let count: u64 = digits.parse().map_err(|_| SizeError::TooLarge)?;
        count.checked_mul(1 << shift).map(Self).ok_or(SizeError::TooLarge)
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
            bytes => write!(f, "{bytes} bytes"),
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
    fn what_is_no_size_is_refused() {
        for text in ["", "M", "-1", "+1", "1.5G", "1GB", "0x10", "1 M", " 1M", "M1", "1é", "١"] {
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
        assert_eq!(ByteSize(67_000_000).approx(), "63.9 MiB");
    }
}
