//! Clusters in compressed form.

use crate::addr::PAGE_SIZE;
use crate::addr::cluster::CLUSTER;
use std::io;
use std::ops::Range;

/// Stored lengths of a cluster's pages: 0 is a page of zeros, [`PAGE_SIZE`] one that is stored as it is.
pub type Lengths = [u16; CLUSTER.0 as usize];

/// The pages of a cluster, each compressed by itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Packed {
    lengths: Lengths,
    bytes: Box<[u8]>,
}

/// Makes [`Packed`] clusters, in a buffer that it keeps.
#[derive(Debug, Default)]
pub struct Packer {
    buffer: Vec<u8>,
}

/// Stored as it is if compression saves less than this.
const WORTHWHILE: usize = PAGE_SIZE / 16;

impl Packer {
    /// Compresses 1 to 16 whole pages.
    pub fn pack(&mut self, pages: &[u8]) -> Packed {
        let mut lengths = Lengths::default();
        self.buffer.clear();
        for (page, length) in pages.chunks_exact(PAGE_SIZE).zip(&mut lengths) {
            *length = self.append(page) as u16;
        }
        Packed { lengths, bytes: self.buffer.as_slice().into() }
    }

    /// Puts a page's stored form at the buffer's end and returns its length.
    fn append(&mut self, page: &[u8]) -> usize {
        if page == [0; PAGE_SIZE] {
            return 0;
        }
        let at = self.buffer.len();
        self.buffer.resize(at + lz4_flex::block::get_maximum_output_size(PAGE_SIZE), 0);
        let length = match lz4_flex::block::compress_into(page, &mut self.buffer[at..]) {
            Ok(length) if length <= PAGE_SIZE - WORTHWHILE => length,
            _ => {
                self.buffer[at..at + PAGE_SIZE].copy_from_slice(page);
                PAGE_SIZE
            }
        };
        self.buffer.truncate(at + length);
        length
    }
}

impl Packed {
    /// What a frame has: `None` if the lengths are impossible or not those of `bytes`.
    pub fn from_parts(lengths: Lengths, bytes: &[u8]) -> Option<Self> {
        let possible = lengths.iter().all(|&length| usize::from(length) <= PAGE_SIZE);
        let sum: usize = lengths.iter().copied().map(usize::from).sum();
        (possible && sum == bytes.len()).then(|| Self { lengths, bytes: bytes.into() })
    }

    /// The stored lengths, of all 16 pages.
    pub fn lengths(&self) -> &Lengths {
        &self.lengths
    }

    /// The stored pages, without gaps.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The memory it takes.
    pub fn footprint(&self) -> u64 {
        (size_of::<Self>() + self.bytes.len()) as u64
    }

    /// Whether all pages are zeros.
    pub fn is_zero(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes of the pages that `live` has a bit for.
    pub fn live_bytes(&self, live: u16) -> usize {
        self.stored().filter(|(page, _)| live & 1 << page != 0).map(|(_, range)| range.len()).sum()
    }

    /// The cluster without the bytes of pages that `live` has no bit for.
    pub fn retain(&self, live: u16) -> Self {
        let mut lengths = Lengths::default();
        let mut bytes = Vec::with_capacity(self.live_bytes(live));
        for (page, range) in self.stored().filter(|(page, _)| live & 1 << page != 0) {
            lengths[page] = self.lengths[page];
            bytes.extend_from_slice(&self.bytes[range]);
        }
        Self { lengths, bytes: bytes.into() }
    }

    /// Fills `buf` with the pages from `first` on.
    ///
    /// # Errors
    /// `InvalidData`: what is stored cannot be decompressed.
    pub fn unpack(&self, first: usize, buf: &mut [u8]) -> io::Result<()> {
        for ((_, range), page) in self.stored().skip(first).zip(buf.chunks_exact_mut(PAGE_SIZE)) {
            let stored = &self.bytes[range];
            match stored.len() {
                0 => page.fill(0),
                PAGE_SIZE => page.copy_from_slice(stored),
                _ => match lz4_flex::block::decompress_into(stored, page) {
                    Ok(PAGE_SIZE) => {}
                    _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a page of swap does not decompress")),
                },
            }
        }
        Ok(())
    }

    /// All 16 pages and where their bytes are.
    fn stored(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let mut end = 0;
        self.lengths.iter().enumerate().map(move |(page, &length)| {
            let start = end;
            end += usize::from(length);
            (page, start..end)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Zeros, something to compress, and noise.
    fn mixed() -> Vec<u8> {
        let mut pages = vec![0; 3 * PAGE_SIZE];
        pages[PAGE_SIZE..2 * PAGE_SIZE].fill(9);
        let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
        for byte in &mut pages[2 * PAGE_SIZE..] {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (noise >> 56) as u8;
        }
        pages
    }

    #[test]
    fn pages_come_back_alone_and_together() {
        let pages = mixed();
        let packed = Packer::default().pack(&pages);
        assert_eq!(packed.lengths()[0], 0);
        assert!(packed.lengths()[1] < 100);
        assert_eq!(usize::from(packed.lengths()[2]), PAGE_SIZE);
        let mut all = vec![1; pages.len()];
        packed.unpack(0, &mut all).unwrap();
        assert_eq!(all, pages);
        for (index, page) in pages.chunks(PAGE_SIZE).enumerate() {
            let mut one = vec![1; PAGE_SIZE];
            packed.unpack(index, &mut one).unwrap();
            assert_eq!(one, page);
        }
    }

    #[test]
    fn dead_pages_take_no_bytes() {
        let pages = mixed();
        let packed = Packer::default().pack(&pages);
        let rest = packed.retain(0b010);
        assert_eq!(rest.bytes().len(), packed.live_bytes(0b010));
        let mut one = vec![1; PAGE_SIZE];
        rest.unpack(1, &mut one).unwrap();
        assert_eq!(one, pages[PAGE_SIZE..2 * PAGE_SIZE]);
        assert!(packed.retain(0b001).is_zero());
    }

    #[test]
    fn impossible_lengths_are_refused() {
        let mut lengths = Lengths::default();
        lengths[0] = 4097;
        assert_eq!(Packed::from_parts(lengths, &[1; 4097]), None);
        lengths[0] = 5;
        assert_eq!(Packed::from_parts(lengths, &[1; 4]), None);
        let garbled = Packed::from_parts(lengths, &[0xff; 5]).unwrap();
        let error = garbled.unpack(0, &mut [0; PAGE_SIZE]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
