//! Messages on a stream: each is a frame, its length (a 32-bit number) and then its bytes.

use crate::message::{Malformed, Message};
use std::io::{self, Read, Write};

/// Most bytes of a frame, without its length.
pub const MAX_FRAME: usize = 64 << 10;
/// Most bytes of a stream in one message: a frame has its tag beside them.
pub const MAX_DATA: usize = MAX_FRAME - 1;

/// Reads one message. None if the stream ended before it began.
///
/// # Errors
/// The stream fails or ends in the middle of a frame; the frame is too long (nothing of it is read then), or no message.
pub fn read<M: Message>(stream: &mut impl Read) -> io::Result<Option<M>> {
    let mut len = [0; 4];
    let mut got = 0;
    while got < len.len() {
        match stream.read(&mut len[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => got += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_FRAME {
        return Err(invalid(format!("a frame of {len} bytes: there are {MAX_FRAME} at most")));
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    M::decode(&bytes).map(Some).map_err(|e: Malformed| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Writes one message, all at once.
///
/// # Errors
/// It is too long for a frame (nothing is written then), or the stream fails.
pub fn write(stream: &mut impl Write, message: &impl Message) -> io::Result<()> {
    let bytes = message.encode();
    if bytes.len() > MAX_FRAME {
        return Err(invalid(format!("a message of {} bytes: there are {MAX_FRAME} at most", bytes.len())));
    }
    let mut frame = Vec::with_capacity(4 + bytes.len());
    frame.extend((bytes.len() as u32).to_le_bytes());
    frame.extend(bytes);
    stream.write_all(&frame)
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
