//! Packets: the header of the specification, as plain numbers.
//!
//! It is read and written here, and not with rust-vmm's `virtio-vsock`: that crate takes a packet that lies in one descriptor or
//! two, while the specification has a driver divide it as it likes, and drivers of newer Linux kernels put a large packet into
//! many.

use serde::{Deserialize, Serialize};

/// Length of a header.
pub const HEADER_LEN: usize = 44;
/// The host's address, which is the same for every guest.
pub const HOST_CID: u64 = 2;
/// The guest's, in every VM: connections are told apart by the process that has them, so a clone keeps its parent's.
pub const GUEST_CID: u64 = 3;
/// A connection that carries a stream of bytes: the only kind.
pub const STREAM: u16 = 1;
/// Flags of a [`Op::Shutdown`]: who sends it receives no more.
pub const NO_RECEIVE: u32 = 1;
/// Who sends it sends no more.
pub const NO_SEND: u32 = 2;

/// The two ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Pair {
    /// The host's.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

impl Pair {
    /// As one number.
    pub fn to_u64(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    /// From that number.
    pub fn from_u64(number: u64) -> Self {
        Self { host: (number >> 32) as u32, guest: number as u32 }
    }
}

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Connect.
    Request,
    /// It is connected.
    Response,
    /// It is not, or no more.
    Reset,
    /// Nothing more is sent, or taken.
    Shutdown,
    /// Bytes.
    Data,
    /// How many bytes may come.
    CreditUpdate,
    /// How many may I send?
    CreditRequest,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    fn from_u16(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }
}

/// A header. What is in it is what the guest says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Address of who sends it.
    pub source_cid: u64,
    /// Address of whom it is for.
    pub destination_cid: u64,
    /// Port of who sends it.
    pub source_port: u32,
    /// Port of whom it is for.
    pub destination_port: u32,
    /// Bytes behind it.
    pub len: u32,
    /// Kind of the connection.
    pub kind: u16,
    /// What it is for, as a number.
    pub op: u16,
    /// Flags.
    pub flags: u32,
    /// Bytes for which the sender has room.
    pub room: u32,
    /// Bytes that have left that room.
    pub taken: u32,
}

impl Header {
    /// Of a packet to the guest.
    pub fn to_guest(pair: Pair, op: Op) -> Self {
        Self {
            source_cid: HOST_CID,
            destination_cid: GUEST_CID,
            source_port: pair.host,
            destination_port: pair.guest,
            kind: STREAM,
            op: op as u16 + 1,
            ..Self::default()
        }
    }

    /// The ports of the connection that a packet of the guest's is about.
    pub fn pair_of_guest(&self) -> Pair {
        Pair { host: self.destination_port, guest: self.source_port }
    }

    /// What it is for, if that is anything.
    pub fn op(&self) -> Option<Op> {
        Op::from_u16(self.op)
    }

    /// From its bytes.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut at = 0;
        let mut number = |len: usize| {
            let mut value = [0; 8];
            value[..len].copy_from_slice(&bytes[at..at + len]);
            at += len;
            u64::from_le_bytes(value)
        };
        Self {
            source_cid: number(8),
            destination_cid: number(8),
            source_port: number(4) as u32,
            destination_port: number(4) as u32,
            len: number(4) as u32,
            kind: number(2) as u16,
            op: number(2) as u16,
            flags: number(4) as u32,
            room: number(4) as u32,
            taken: number(4) as u32,
        }
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut at = 0;
        let mut put = |value: u64, len: usize| {
            bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            at += len;
        };
        put(self.source_cid, 8);
        put(self.destination_cid, 8);
        put(self.source_port.into(), 4);
        put(self.destination_port.into(), 4);
        put(self.len.into(), 4);
        put(self.kind.into(), 2);
        put(self.op.into(), 2);
        put(self.flags.into(), 4);
        put(self.room.into(), 4);
        put(self.taken.into(), 4);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_its_fields_where_the_specification_has_them() {
        let bytes: [u8; HEADER_LEN] = std::array::from_fn(|at| at as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.source_cid, 0x0706_0504_0302_0100);
        assert_eq!((header.source_port, header.destination_port, header.len), (0x1312_1110, 0x1716_1514, 0x1b1a_1918));
        assert_eq!((header.kind, header.op, header.flags), (0x1d1c, 0x1f1e, 0x2322_2120));
        assert_eq!((header.room, header.taken), (0x2726_2524, 0x2b2a_2928));
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(header.op(), None);
        let numbers = Op::ALL.map(|op| Header::to_guest(Pair { host: 1, guest: 2 }, op).op);
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7]);
    }
}
