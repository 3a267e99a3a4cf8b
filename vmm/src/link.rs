//! The socket between the server and a VM process: whole messages, and descriptors that travel with them.
//!
//! A message is one `SOCK_SEQPACKET` packet: a [`Header`], then the message's bytes. More bytes than a packet takes go
//! into a sealed memory file, whose descriptor comes first; more descriptors than a packet takes follow on packets of
//! their own. Nothing that arrives is trusted: what does not make sense is an error of kind `InvalidData`.
#![allow(unsafe_code)] // takes ownership of descriptors that arrived with a packet

use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use nix::sys::stat::{SFlag, fstat};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

/// More bytes than this go through a memory file.
const INLINE_MAX: usize = 64 << 10;
/// Most descriptors on one packet; the kernel's limit is 253.
const FDS_MAX: usize = 250;
/// Most descriptors with one message.
const TOTAL_FDS_MAX: usize = 1 << 16;
/// Longest message through a memory file, where the end was not told of another limit.
pub const MESSAGE_MAX: u64 = 64 << 20;
/// A peer that leaves so many packets unread does not read any more.
const QUEUE_MAX: usize = 1 << 14;

thread_local! {
    /// Where packets arrive. One for all, and cleared by the kernel: pages that no packet reaches stay untouched, or shared with the
    /// process that this one was made of.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// One end.
///
/// A send never waits on a nonblocking end: what the socket does not take is queued, in order, until
/// [`flush`](Self::flush).
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    queue: VecDeque<Packet>,
    /// A message of which descriptors are still to come.
    partial: Option<Partial>,
    /// The longest message that is taken in.
    most_bytes: u64,
    /// The most descriptors that are taken in with one.
    most_fds: usize,
    /// Bytes of all messages that were taken in.
    received: u64,
}

#[derive(Debug)]
struct Packet {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

#[derive(Debug)]
struct Partial {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    fd_count: usize,
}

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    /// A message, its bytes behind the header.
    Inline = 0,
    /// A message, its bytes in the first descriptor.
    InFile = 1,
    /// More descriptors of the message before.
    MoreFds = 2,
}

/// In front of every packet: the kind, and how many descriptors come with the whole message.
#[derive(Clone, Copy, Debug)]
struct Header {
    kind: Kind,
    fd_count: u32,
}

impl Header {
    const LEN: usize = 5;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let [a, b, c, d] = self.fd_count.to_le_bytes();
        [self.kind as u8, a, b, c, d]
    }

    fn parse(packet: &[u8]) -> io::Result<(Self, &[u8])> {
        let (header, body) =
            packet.split_first_chunk::<{ Self::LEN }>().ok_or_else(|| invalid("a packet without header"))?;
        let [kind, count @ ..] = *header;
        let kind = match kind {
            0 => Kind::Inline,
            1 => Kind::InFile,
            2 => Kind::MoreFds,
            _ => return Err(invalid("a packet of unknown kind")),
        };
        Ok((Self { kind, fd_count: u32::from_le_bytes(count) }, body))
    }
}

impl Link {
    /// A pair of ends: ours, which never waits, and one for a child process, which does. Both are close-on-exec.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let link = Self::new(ours);
        link.never_wait()?;
        Ok((link, theirs))
    }

    /// An end that somebody else made.
    pub fn new(socket: OwnedFd) -> Self {
        let (most_bytes, most_fds) = (MESSAGE_MAX, TOTAL_FDS_MAX);
        Self { socket, queue: VecDeque::new(), partial: None, most_bytes, most_fds, received: 0 }
    }

    /// The same, which takes in no message that is longer, or brings more descriptors.
    #[must_use]
    pub fn limited(self, bytes: u64, fds: usize) -> Self {
        Self { most_bytes: bytes.min(MESSAGE_MAX), most_fds: fds.min(TOTAL_FDS_MAX), ..self }
    }

    /// Bytes of all messages that were taken in.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Makes this end nonblocking.
    ///
    /// # Errors
    /// Of `fcntl`.
    pub fn never_wait(&self) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(&self.socket, FcntlArg::F_GETFL)?);
        fcntl(&self.socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// Sends a message and duplicates of `fds`, or queues it.
    ///
    /// # Errors
    /// The peer is gone or does not read any more; the message cannot be encoded; no descriptors are left.
    pub fn send(&mut self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if fds.len() > TOTAL_FDS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
        }
        let header = |kind| Header { kind, fd_count: fds.len() as u32 };
        let mut bytes = header(Kind::Inline).to_bytes().to_vec();
        bytes = postcard::to_extend(message, bytes).map_err(io::Error::other)?;
        let file;
        let mut first: Vec<BorrowedFd<'_>> = Vec::with_capacity(FDS_MAX);
        if bytes.len() > INLINE_MAX {
            file = sealed_file(&bytes[Header::LEN..])?;
            bytes = header(Kind::InFile).to_bytes().to_vec();
            first.push(file.as_fd());
        }
        let (with_first, rest) = fds.split_at(fds.len().min(FDS_MAX - first.len()));
        first.extend(with_first);
        self.send_packet(bytes, &first)?;
        for more in rest.chunks(FDS_MAX) {
            self.send_packet(header(Kind::MoreFds).to_bytes().to_vec(), more)?;
        }
        Ok(())
    }

    fn send_packet(&mut self, bytes: Vec<u8>, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if self.queue.is_empty() && self.offer(&bytes, fds)? {
            return Ok(());
        }
        if self.queue.len() >= QUEUE_MAX {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read its messages"));
        }
        let fds = fds.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
        self.queue.push_back(Packet { bytes, fds });
        Ok(())
    }

    /// Whether the socket took the packet.
    fn offer(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(bytes)];
        loop {
            let sent = sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None);
            match sent {
                Ok(_) => return Ok(true),
                Err(Errno::EINTR) => {}
                // ETOOMANYREFS: too many descriptors are on their way already.
                Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ETOOMANYREFS) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether something is queued.
    pub fn is_backed_up(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Sends what is queued, as far as the socket takes it; tells whether something is left.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn flush(&mut self) -> io::Result<bool> {
        while let Some(packet) = self.queue.front() {
            let fds: Vec<BorrowedFd<'_>> = packet.fds.iter().map(AsFd::as_fd).collect();
            if !self.offer(&packet.bytes, &fds)? {
                return Ok(true);
            }
            self.queue.pop_front();
        }
        Ok(false)
    }

    /// Waits until the socket has taken all that is queued: from then on it outlives this process.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn await_sent(&mut self) -> io::Result<()> {
        while self.flush()? {
            let mut room = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut room, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next message and its descriptors; `None` if none is there yet (a blocking end waits).
    ///
    /// # Errors
    /// `UnexpectedEof` at the end, `InvalidData` for what is no message: the peer is broken or hostile, and what comes
    /// after means nothing.
    pub fn recv<M: DeserializeOwned>(&mut self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        loop {
            let Some(packet) = self.recv_packet()? else { return Ok(None) };
            let Some(message) = self.assemble(packet)? else { continue };
            self.received += message.bytes.len() as u64;
            let decoded = postcard::from_bytes(&message.bytes)
                .map_err(|error| invalid(format!("a message that cannot be decoded: {error}")))?;
            return Ok(Some((decoded, message.fds)));
        }
    }

    /// Takes a packet in; gives the message that it completes.
    fn assemble(&mut self, packet: Packet) -> io::Result<Option<Partial>> {
        let (header, body) = Header::parse(&packet.bytes)?;
        let fd_count = header.fd_count as usize;
        let mut message = match (header.kind, self.partial.take()) {
            (Kind::MoreFds, Some(mut partial)) if !packet.fds.is_empty() => {
                partial.fds.extend(packet.fds);
                partial
            }
            (Kind::Inline, None) => Partial { bytes: body.to_vec(), fds: packet.fds, fd_count },
            (Kind::InFile, None) => {
                let mut fds = packet.fds;
                if fds.is_empty() {
                    return Err(invalid("a message in a file without a file"));
                }
                let bytes = read_sealed_file(fds.remove(0), self.most_bytes)?;
                Partial { bytes, fds, fd_count }
            }
            _ => return Err(invalid("a packet out of order")),
        };
        if message.fd_count > self.most_fds || message.fds.len() > message.fd_count {
            return Err(invalid("a wrong count of descriptors"));
        }
        if message.fds.len() < message.fd_count {
            message.fds.reserve(message.fd_count - message.fds.len());
            self.partial = Some(message);
            return Ok(None);
        }
        Ok(Some(message))
    }

    fn recv_packet(&self) -> io::Result<Option<Packet>> {
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.is_empty() {
                *buffer = vec![0; INLINE_MAX + Header::LEN];
            }
            self.recv_packet_with(buffer)
        })
    }

    fn recv_packet_with(&self, buffer: &mut [u8]) -> io::Result<Option<Packet>> {
        let mut control = cmsg_space!([RawFd; FDS_MAX + 3]);
        let mut parts = [IoSliceMut::new(buffer)];
        let received = loop {
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
                Ok(received) => break received,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::ECONNRESET) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => return Err(error.into()),
            }
        };
        let mut fds = Vec::new();
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: The kernel made these descriptors for us just now; nobody else owns them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(invalid("a packet that is too long, or descriptors that found no room"));
        }
        let len = received.bytes;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some(Packet { bytes: buffer[..len].to_vec(), fds }))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Sends a short message without descriptors, if the socket takes it at once.
///
/// # Errors
/// It does not, or the message is too long.
pub fn send_now(socket: BorrowedFd<'_>, message: &impl Serialize) -> io::Result<()> {
    let bytes = Header { kind: Kind::Inline, fd_count: 0 }.to_bytes().to_vec();
    let bytes = postcard::to_extend(message, bytes).map_err(io::Error::other)?;
    if bytes.len() > INLINE_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], &[], flags, None)?;
    Ok(())
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Nobody can change the bytes once they are sent.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_WRITE);

fn sealed_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create(c"offshoot-message", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(file.into())
}

/// Only from a sealed memory file: reading one never waits for anybody, and it does not change underneath.
fn read_sealed_file(fd: OwnedFd, most: u64) -> io::Result<Vec<u8>> {
    let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| invalid("a message in a file of a wrong kind"))?;
    let stat = fstat(&fd)?;
    let regular = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFREG;
    if !regular || !SealFlag::from_bits_retain(seals).contains(SEALS) {
        return Err(invalid("a message in a file that is not sealed"));
    }
    let len = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    if len > most {
        return Err(invalid("a message that is too long"));
    }
    let mut bytes = vec![0; len as usize];
    File::from(fd).read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
