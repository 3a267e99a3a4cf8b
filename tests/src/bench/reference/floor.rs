//! **Floor**: the least a fork can be. A prepared process has a KVM VM, a vCPU and a memory slot over an empty range of
//! addresses; on request it maps the parent's memory there, sets the registers, and runs to the guest's first exit.
//!
//! The clock starts where the request for a fork is received (here, before the prepared process is told) and ends at that
//! exit.

use super::{numbers, serve};
use crate::bare::memory::Show;
use crate::bare::vm::span;
use crate::bare::{Platform, Snapshot, Vm, Window, now_ns};
use crate::{Result, fail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// RAM in MiB, and pages that the parent has written. Answers `fork` (µs: all, from the prepared process's receipt on, of
/// that `mmap`, registers, `KVM_RUN`), `writes FIRST COUNT` (µs: all, and until the child has written those pages), and
/// `hold N` (makes N children that live on; their process ids).
pub fn run(arguments: &[u64]) -> Result<()> {
    let [mib, pages] = numbers(arguments)?;
    let platform = Platform::open()?;
    let parent = Snapshot::make(&platform, mib << 20, pages)?;
    let mut next = Prepared::new(&platform, &parent)?;
    let mut held = Vec::new();
    serve(|verb, given| {
        let mut fork = |request: [u64; 2]| {
            let figures = next.fork(request)?;
            Ok::<_, crate::Error>((std::mem::replace(&mut next, Prepared::new(&platform, &parent)?), figures))
        };
        match verb {
            "fork" => Ok(fork([0, 0])?.1),
            "writes" => Ok(fork(numbers(given)?)?.1),
            "hold" => {
                let [count] = numbers(given)?;
                for _ in 0..count {
                    held.push(fork([0, 0])?.0);
                }
                Ok(held.iter().map(|child| child.pid.as_raw().into()).collect())
            }
            _ => fail("fork, writes or hold"),
        }
    })
}

/// A prepared process, or what became of it. It ends when this is dropped.
struct Prepared {
    pid: Pid,
    socket: UnixStream,
}

/// What a child answers: nanoseconds of `CLOCK_MONOTONIC`.
const TIMES: usize = 6;

impl Prepared {
    #[allow(unsafe_code)] // fork
    fn new(platform: &Platform, parent: &Snapshot) -> Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        // SAFETY: This process has one thread.
        match unsafe { nix::unistd::fork() }? {
            ForkResult::Parent { child } => {
                let mut this = Self { pid: child, socket };
                this.socket.read_exact(&mut [0])?;
                Ok(this)
            }
            ForkResult::Child => {
                drop(socket);
                let code = match prepared(platform, parent, theirs) {
                    Ok(()) => 0,
                    Err(error) => {
                        eprintln!("floor: {error}");
                        1
                    }
                };
                std::process::exit(code)
            }
        }
    }

    fn fork(&mut self, request: [u64; 2]) -> Result<Vec<f64>> {
        let asked = now_ns();
        self.socket.write_all(&bytes(&request))?;
        let mut answer = [0; TIMES * 8];
        self.socket.read_exact(&mut answer)?;
        let times: Vec<u64> = answer.chunks_exact(8).map(word).collect();
        let us = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e3;
        let &[received, mapped, loaded, first, written, _] = &times[..] else { return fail("a short answer") };
        Ok(match request {
            [_, 0] => {
                vec![us(asked, first), us(received, first), us(received, mapped), us(mapped, loaded), us(loaded, first)]
            }
            _ => vec![us(asked, first), us(asked, written)],
        })
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // It has ended, or is ended now.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// The life of a prepared process.
fn prepared(platform: &Platform, parent: &Snapshot, mut socket: UnixStream) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    let len = span(parent.ram);
    let mut vm = Vm::new(platform, Window::reserve(len)?, parent.ram)?;
    vm.window().vacate()?;
    vm.warm();
    socket.write_all(&[0])?;
    let mut request = [0; 16];
    socket.read_exact(&mut request)?;
    let received = now_ns();
    vm.window().map(0, len, Show::Private(&parent.file))?;
    let mapped = now_ns();
    vm.load(&parent.state)?;
    let loaded = now_ns();
    vm.run()?;
    let first = now_ns();
    let [page, count] = [word(&request[..8]), word(&request[8..])];
    if count > 0 {
        vm.send(&format!("touch {page} {count} 2"))?;
    }
    socket.write_all(&bytes(&[received, mapped, loaded, first, now_ns(), 0]))?;
    // It lives on until it is ended.
    let _ = socket.read(&mut [0]);
    Ok(())
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}
