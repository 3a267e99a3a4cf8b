//! What the agent asks of the kernel, and the standard library has no call for. x86-64 Linux.
#![allow(unsafe_code, reason = "system calls")]

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, address: *const c_void, len: u32) -> c_int;
    fn listen(fd: c_int, backlog: c_int) -> c_int;
    fn accept4(fd: c_int, address: *mut c_void, len: *mut u32, flags: c_int) -> c_int;
    fn shutdown(fd: c_int, how: c_int) -> c_int;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn waitid(kind: c_int, id: u32, info: *mut c_void, options: c_int) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn setsid() -> c_int;
    fn setgroups(count: usize, groups: *const u32) -> c_int;
    fn setgid(group: u32) -> c_int;
    fn setuid(user: u32) -> c_int;
    fn geteuid() -> u32;
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn clock_settime(clock: c_int, time: *const [i64; 2]) -> c_int;
    fn openat(directory: c_int, path: *const c_char, flags: c_int, ...) -> c_int;
    fn fchdir(fd: c_int) -> c_int;
    fn chroot(path: *const c_char) -> c_int;
    fn reboot(command: c_int) -> c_int;
    fn sync();
}

const AF_VSOCK: c_int = 40;
const SOCK_STREAM: c_int = 1;
const SOCK_CLOEXEC: c_int = 0o2_000_000;
const O_NONBLOCK: c_int = 0o4000;
const SYS_FINIT_MODULE: c_long = 313;

/// What a call that gives -1 for a failure gave.
fn done(value: c_int) -> io::Result<c_int> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

fn text(text: &str) -> io::Result<CString> {
    Ok(CString::new(text)?)
}

/// The kernel's `sockaddr_vm`.
#[repr(C)]
#[derive(Default)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

const ADDRESS_LEN: u32 = size_of::<VsockAddress>() as u32;

impl VsockAddress {
    fn new(cid: u32, port: u32) -> Self {
        Self { family: AF_VSOCK as u16, port, cid, ..Self::default() }
    }
}

/// The host's number.
pub const CID_HOST: u32 = 2;
const CID_ANY: u32 = u32::MAX;

fn vsock() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers; what it returns is a new descriptor that nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(done(socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0))?)) }
}

/// A socket that listens on a vsock port.
pub fn vsock_listen(port: u32) -> io::Result<OwnedFd> {
    let fd = vsock()?;
    let address = VsockAddress::new(CID_ANY, port);
    // SAFETY: the address lives during the call and has that length.
    done(unsafe { bind(fd.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
    // SAFETY: takes no pointers.
    done(unsafe { listen(fd.as_raw_fd(), 128) })?;
    Ok(fd)
}

/// The next connection, and whose it is.
pub fn vsock_accept(listener: &OwnedFd) -> io::Result<(OwnedFd, u32)> {
    let mut address = VsockAddress::default();
    let mut len = ADDRESS_LEN;
    // SAFETY: the address lives during the call and is as long as it is said to be; the descriptor is a new one.
    let fd = unsafe {
        OwnedFd::from_raw_fd(done(accept4(
            listener.as_raw_fd(),
            (&raw mut address).cast(),
            &raw mut len,
            SOCK_CLOEXEC,
        ))?)
    };
    Ok((fd, address.cid))
}

/// Which half of a connection ends.
#[derive(Clone, Copy, Debug)]
pub enum Half {
    Write = 1,
    Both = 2,
}

/// Ends a half of a connection, or all of it; one that is over already is fine.
pub fn hang_up(socket: impl AsFd, half: Half) {
    // SAFETY: takes no pointers.
    let _ = unsafe { shutdown(socket.as_fd().as_raw_fd(), half as c_int) };
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PollFd {
    fd: RawFd,
    events: i16,
    found: i16,
}

pub const READABLE: i16 = 1;
pub const WRITABLE: i16 = 4;
/// The other side is gone, or an error. Of these, only the last has to be asked for.
pub const HANGUP: i16 = 8 | 16 | PEER_DONE;
/// The other side sends nothing more.
const PEER_DONE: i16 = 0x2000;

impl PollFd {
    pub fn new(fd: impl AsFd, events: i16) -> Self {
        Self { fd: fd.as_fd().as_raw_fd(), events, found: 0 }
    }

    /// Whether one of these was found.
    pub fn is(&self, events: i16) -> bool {
        self.found & events != 0
    }
}

/// Waits until something is found, or so many milliseconds; -1 for ever.
pub fn wait_for(fds: &mut [PollFd], timeout: i32) -> io::Result<()> {
    loop {
        // SAFETY: the slice lives during the call and has that length.
        match done(unsafe { poll(fds.as_mut_ptr(), fds.len() as c_ulong, timeout) }) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(drop),
        }
    }
}

/// Reads and writes of this open file do not wait from now on.
pub fn never_wait(file: impl AsFd) -> io::Result<()> {
    const F_GETFL: c_int = 3;
    const F_SETFL: c_int = 4;
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: takes no pointers.
    let flags = done(unsafe { fcntl(fd, F_GETFL) })?;
    // SAFETY: takes no pointers.
    done(unsafe { fcntl(fd, F_SETFL, flags | O_NONBLOCK) }).map(drop)
}

/// The other end of a terminal, which a program gets.
pub fn terminal_of(master: impl AsFd) -> io::Result<OwnedFd> {
    const TIOCSPTLCK: c_ulong = 0x4004_5431;
    const TIOCGPTPEER: c_ulong = 0x5441;
    const O_RDWR_NOCTTY_CLOEXEC: c_int = 0o2 | 0o400 | 0o2_000_000;
    let unlocked: c_int = 0;
    let fd = master.as_fd().as_raw_fd();
    // SAFETY: the number lives during the call.
    done(unsafe { ioctl(fd, TIOCSPTLCK, &raw const unlocked) })?;
    // SAFETY: takes no pointers; the descriptor is a new one.
    unsafe { Ok(OwnedFd::from_raw_fd(done(ioctl(fd, TIOCGPTPEER, O_RDWR_NOCTTY_CLOEXEC))?)) }
}

/// A terminal is so large from now on.
pub fn resize(terminal: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    const TIOCSWINSZ: c_ulong = 0x5414;
    let size = [rows, columns, 0, 0];
    // SAFETY: the kernel reads a `winsize`, four 16-bit numbers, which live during the call.
    done(unsafe { ioctl(terminal.as_fd().as_raw_fd(), TIOCSWINSZ, &raw const size) }).map(drop)
}

/// Has the kernel mix these bytes into its random numbers, count them as random, and begin anew with them.
pub fn reseed(device: impl AsFd, entropy: &[u8; 32]) -> io::Result<()> {
    const RNDADDENTROPY: c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: c_ulong = 0x5207;
    #[repr(C)]
    struct Pool {
        bits: c_int,
        bytes: c_int,
        data: [u8; 32],
    }
    let pool = Pool { bits: 256, bytes: 32, data: *entropy };
    let fd = device.as_fd().as_raw_fd();
    // SAFETY: the kernel reads a `rand_pool_info`, which says its own length and lives during the call.
    done(unsafe { ioctl(fd, RNDADDENTROPY, &raw const pool) })?;
    // SAFETY: takes no pointers.
    done(unsafe { ioctl(fd, RNDRESEEDCRNG) }).map(drop)
}

/// Loads a kernel module.
pub fn load_module(file: impl AsFd) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the parameters are an empty text.
    done(unsafe { syscall(SYS_FINIT_MODULE, fd, c"".as_ptr(), 0) } as c_int).map(drop)
}

/// Mounts a file system.
pub fn mount_at(kind: &str, target: &str, data: &str) -> io::Result<()> {
    let (kind, target, data) = (text(kind)?, text(target)?, text(data)?);
    // SAFETY: all texts live during the call.
    done(unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, data.as_ptr().cast()) }).map(drop)
}

/// Has a network interface come up.
pub fn interface_up(name: &str) -> io::Result<()> {
    const AF_INET: c_int = 2;
    const SOCK_DGRAM: c_int = 2;
    const SIOCSIFFLAGS: c_ulong = 0x8914;
    const IFF_UP: u16 = 1;
    // An `ifreq`: a name of 16 bytes with a zero at its end, and 24 bytes, here the flags.
    let mut request = [0u8; 40];
    let name = name.as_bytes();
    request
        .get_mut(..15)
        .and_then(|room| room.get_mut(..name.len()))
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(name);
    request[16..18].copy_from_slice(&IFF_UP.to_ne_bytes());
    // SAFETY: takes no pointers; the descriptor is a new one.
    let socket = unsafe { OwnedFd::from_raw_fd(done(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0))?) };
    // SAFETY: the request lives during the call, and is as long as the kernel's.
    done(unsafe { ioctl(socket.as_raw_fd(), SIOCSIFFLAGS, request.as_mut_ptr()) }).map(drop)
}

/// Sets the clock: nanoseconds since 1970.
pub fn set_clock(nanoseconds: u64) -> io::Result<()> {
    let time = [(nanoseconds / 1_000_000_000) as i64, (nanoseconds % 1_000_000_000) as i64];
    // SAFETY: a `timespec` of x86-64 is two 64-bit numbers; they live during the call.
    done(unsafe { clock_settime(0, &raw const time) }).map(drop)
}

/// Makes the root of process 1, as this `/proc` has it, the root of this process.
pub fn enter_root_of_init(proc: impl AsFd) -> io::Result<()> {
    const O_PATH_DIRECTORY_CLOEXEC: c_int = 0o10_000_000 | 0o200_000 | 0o2_000_000;
    // SAFETY: the text lives during the call; the descriptor is a new one.
    let root = unsafe {
        OwnedFd::from_raw_fd(done(openat(proc.as_fd().as_raw_fd(), c"1/root".as_ptr(), O_PATH_DIRECTORY_CLOEXEC))?)
    };
    // SAFETY: takes no pointers.
    done(unsafe { fchdir(root.as_raw_fd()) })?;
    // SAFETY: the text lives during the call.
    done(unsafe { chroot(c".".as_ptr()) }).map(drop)
}

/// Powers the machine off, once everything is written back.
pub fn power_off() -> io::Result<()> {
    const RB_POWER_OFF: c_int = 0x4321_fedc;
    // SAFETY: neither takes pointers.
    unsafe {
        sync();
        done(reboot(RB_POWER_OFF)).map(drop)
    }
}

/// Sends a signal to a group of processes.
pub fn signal_group(group: u32, signal: u8) -> io::Result<()> {
    let group = c_int::try_from(group).ok().filter(|&group| group > 1).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: takes no pointers.
    done(unsafe { kill(-group, signal.into()) }).map(drop)
}

/// Sends a signal to all processes but this one. There may be none.
pub fn signal_all(signal: u8) {
    // SAFETY: takes no pointers.
    let _ = unsafe { kill(-1, signal.into()) };
}

/// Waits until a child has ended, and leaves it to be reaped.
pub fn ended_child() -> io::Result<u32> {
    const P_ALL: c_int = 0;
    const WEXITED: c_int = 4;
    const WNOWAIT: c_int = 0x0100_0000;
    // A `siginfo_t`: 128 bytes, the process after three words and one that aligns it.
    let mut info = [0u32; 32];
    // SAFETY: the kernel writes a `siginfo_t`, and there is room for it.
    done(unsafe { waitid(P_ALL, 0, (&raw mut info).cast(), WEXITED | WNOWAIT) })?;
    Ok(info[4])
}

/// Reaps a child that has ended. None if somebody else has.
pub fn reap(pid: u32) -> Option<Ended> {
    const WNOHANG: c_int = 1;
    let mut status = 0;
    // SAFETY: the status lives during the call.
    let reaped = done(unsafe { waitpid(pid as c_int, &raw mut status, WNOHANG) }).ok()?;
    let signal = status & 0x7f;
    let ended = if signal == 0 { Ended::Code((status >> 8) as u8) } else { Ended::Signal(signal as u8) };
    (reaped > 0).then_some(ended)
}

/// How a child ended.
#[derive(Clone, Copy, Debug)]
pub enum Ended {
    Code(u8),
    Signal(u8),
}

/// Whose a program is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ids {
    pub user: u32,
    pub group: u32,
    pub groups: Vec<u32>,
}

/// Whether this process may become somebody else.
pub fn is_root() -> bool {
    // SAFETY: takes no pointers and cannot fail.
    unsafe { geteuid() == 0 }
}

/// Has a command begin a session, with its standard input as the terminal if it has one, and somebody's.
pub fn detach(command: &mut Command, terminal: bool, ids: Option<Ids>) {
    const TIOCSCTTY: c_ulong = 0x540e;
    // SAFETY: the closure makes system calls, and neither allocates nor takes locks.
    unsafe {
        command.pre_exec(move || {
            done(setsid())?;
            if terminal {
                done(ioctl(0, TIOCSCTTY, 0))?;
            }
            if let Some(Ids { user, group, groups }) = &ids {
                done(setgroups(groups.len(), groups.as_ptr()))?;
                done(setgid(*group))?;
                done(setuid(*user))?;
            }
            Ok(())
        });
    }
}
