//! Clusters as they are on the disk.
//!
//! ```text
//!   0  checksum  u32   CRC-32 of all that follows, up to the end of the payload
//!   4  magic     u32
//!   8  run       u64   another number for every store that was ever opened
//!  16  sequence  u64   of the put: no two clusters of a run have the same
//!  24  slot      u64   the cluster's first
//!  32  lengths   16 × u16
//!  64  payload: the pages' stored bytes; then zeros up to a whole block
//! ```

use super::extents::BLOCK;
use super::packed::{Lengths, Packed};
use crate::addr::cluster::CLUSTER;
use crate::ids::SwapSlot;
use std::io;

const MAGIC: u32 = u32::from_le_bytes(*b"swp1");
const LENGTHS: usize = 32;
const HEADER: usize = LENGTHS + 2 * CLUSTER.0 as usize;

/// Whose frame it is. A read that finds another's, or an older one of the same place, finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The store's number.
    pub run: u64,
    /// The put's.
    pub sequence: u64,
    /// The cluster's first slot.
    pub slot: SwapSlot,
}

/// How many blocks the cluster takes on the disk: 1 to 17.
pub fn blocks(packed: &Packed) -> u64 {
    (HEADER + packed.bytes().len()).div_ceil(BLOCK) as u64
}

/// Writes the frame into a buffer of that many blocks.
pub fn encode(packed: &Packed, tag: Tag, buf: &mut [u8]) {
    let end = HEADER + packed.bytes().len();
    buf[4..8].copy_from_slice(&MAGIC.to_le_bytes());
    for (field, number) in buf[8..LENGTHS].chunks_exact_mut(8).zip([tag.run, tag.sequence, tag.slot.0]) {
        field.copy_from_slice(&number.to_le_bytes());
    }
    for (field, length) in buf[LENGTHS..HEADER].chunks_exact_mut(2).zip(packed.lengths()) {
        field.copy_from_slice(&length.to_le_bytes());
    }
    buf[HEADER..end].copy_from_slice(packed.bytes());
    buf[end..].fill(0);
    let checksum = crc32fast::hash(&buf[4..end]);
    buf[..4].copy_from_slice(&checksum.to_le_bytes());
}

/// Reads a frame that must be `tag`'s.
///
/// # Errors
/// `InvalidData`: it is not, or not whole.
pub fn decode(buf: &[u8], tag: Tag) -> io::Result<Packed> {
    let bad = |what: &str| {
        let message = format!("swap slots {:#x}+{}: {what}", tag.slot.0, CLUSTER.0);
        io::Error::new(io::ErrorKind::InvalidData, message)
    };
    let mut lengths = Lengths::default();
    for (length, field) in lengths.iter_mut().zip(buf[LENGTHS..HEADER].chunks_exact(2)) {
        *length = u16::from_le_bytes(field.try_into().expect("two bytes"));
    }
    let end = HEADER + lengths.iter().copied().map(usize::from).sum::<usize>();
    let summed = buf.get(4..end).ok_or_else(|| bad("the lengths are impossible"))?;
    if buf[..4] != crc32fast::hash(summed).to_le_bytes() {
        return Err(bad("the checksum differs"));
    }
    let mut expected = [0; LENGTHS - 4];
    expected[..4].copy_from_slice(&MAGIC.to_le_bytes());
    for (field, number) in expected[4..].chunks_exact_mut(8).zip([tag.run, tag.sequence, tag.slot.0]) {
        field.copy_from_slice(&number.to_le_bytes());
    }
    if buf[4..LENGTHS] != expected {
        return Err(bad("the disk has another cluster's data here"));
    }
    Packed::from_parts(lengths, &buf[HEADER..end]).ok_or_else(|| bad("the lengths are impossible"))
}

#[cfg(test)]
mod tests {
    use super::super::packed::Packer;
    use super::*;
    use crate::addr::PAGE_SIZE;

    const TAG: Tag = Tag { run: 1, sequence: 2, slot: SwapSlot(48) };

    fn frame() -> (Packed, Vec<u8>) {
        let packed = Packer::default().pack(&[3; 5 * PAGE_SIZE]);
        let mut buf = vec![0xee; blocks(&packed) as usize * BLOCK];
        encode(&packed, TAG, &mut buf);
        (packed, buf)
    }

    #[test]
    fn a_frame_comes_back() {
        let (packed, buf) = frame();
        assert_eq!(decode(&buf, TAG).unwrap(), packed);
        assert_eq!(blocks(&Packer::default().pack(&[0; PAGE_SIZE])), 1);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let (packed, mut buf) = frame();
        for bit in 0..(HEADER + packed.bytes().len()) * 8 {
            buf[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&buf, TAG).unwrap_err().kind(), io::ErrorKind::InvalidData, "bit {bit}");
            buf[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn other_data_is_noticed() {
        let (_, buf) = frame();
        let others = [Tag { run: 9, ..TAG }, Tag { sequence: 9, ..TAG }, Tag { slot: SwapSlot(9), ..TAG }];
        for other in others {
            assert!(decode(&buf, other).unwrap_err().to_string().contains("another cluster"));
        }
        assert!(decode(&vec![0; BLOCK], TAG).is_err());
    }
}
