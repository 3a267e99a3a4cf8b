//! How soon an idle processor takes work up.
//!
//! A processor that halts takes some microseconds to wake, and in a virtual machine some fifty: its host has to run it
//! again. A fork is a chain of hand-offs between threads, most of them to a processor that has just become idle. While
//! `/dev/cpu_dma_latency` holds a 0, processors that are idle poll instead of halting (Linux,
//! Documentation/power/pm_qos_interface.rst). That costs power, so it is asked for in short leases.

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant};

const DEVICE: &str = "/dev/cpu_dma_latency";
/// Microseconds that it may take to wake.
const NONE: i32 = 0;
/// What the kernel has where nobody asks: a lease ends by writing it, which costs less than closing and opening again.
const ANY: i32 = 2_000_000_000;

/// How long one lease is: a fork takes less, and whoever forks again and again finds the next one begun.
pub const LEASE: Duration = Duration::from_millis(2);

/// Whether [`WakeLatency`] has an effect here.
///
/// # Errors
/// Of opening the device: it is root's, and not every kernel has it.
pub fn probe() -> io::Result<()> {
    open().map(drop)
}

fn open() -> io::Result<File> {
    File::options().write(true).open(DEVICE)
}

/// What idle processors do during a fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WakeUps {
    /// As the host is set up.
    #[default]
    AsTheyAre,
    /// They poll, all of the host's.
    Fast,
}

/// Keeps idle processors awake for moments. Dropping it, or the end of the process, ends that.
#[derive(Debug, Default)]
pub struct WakeLatency {
    device: Option<File>,
    until: Option<Instant>,
}

impl WakeLatency {
    /// Opens the device, where that is wanted, which asks for nothing yet. Where it cannot be had, leases have no effect.
    pub fn open(wanted: WakeUps) -> Self {
        let device = (wanted == WakeUps::Fast).then(open).transpose();
        let device = device.inspect_err(|error| log::warn!("{DEVICE}: {error}; idle processors halt during forks"));
        Self { device: device.ok().flatten(), until: None }
    }

    /// Idle processors poll until `until`, or until a later moment that was asked for before.
    pub fn lease(&mut self, until: Instant) {
        if self.until.is_none() {
            self.write(NONE);
        }
        self.until = self.until.max(Some(until)).filter(|_| self.device.is_some());
    }

    /// Ends the lease if it is over.
    pub fn tend(&mut self, now: Instant) {
        if self.until.take_if(|until| *until <= now).is_some() {
            self.write(ANY);
        }
    }

    /// How long the lease has to go.
    pub fn until(&self) -> Option<Instant> {
        self.until
    }

    fn write(&mut self, microseconds: i32) {
        if let Some(device) = &mut self.device
            && let Err(error) = device.write_all(&microseconds.to_ne_bytes())
        {
            log::warn!("{DEVICE}: {error}; idle processors halt during forks");
            // Closing it ends what was asked for.
            self.device = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    /// It concerns the whole host: nobody gets it who has not asked.
    #[test]
    fn nothing_is_opened_unasked() {
        assert!(WakeLatency::open(WakeUps::default()).device.is_none());
    }

    fn watched() -> (WakeLatency, impl FnMut() -> Vec<i32>) {
        let file = tempfile();
        let watched = file.try_clone().unwrap();
        let written = move || {
            let mut bytes = [0; 64];
            let len = watched.read_at(&mut bytes, 0).unwrap();
            bytes[..len].chunks_exact(4).map(|word| i32::from_ne_bytes(word.try_into().unwrap())).collect()
        };
        (WakeLatency { device: Some(file), until: None }, written)
    }

    fn tempfile() -> File {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        File::from(memfd_create(c"device", MFdFlags::empty()).unwrap())
    }

    #[test]
    fn a_lease_is_asked_for_once_prolonged_and_ended_once() {
        let (mut latency, mut written) = watched();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        latency.lease(at(2));
        latency.lease(at(4));
        latency.lease(at(3));
        assert_eq!(written(), [NONE]);
        latency.tend(at(3));
        assert_eq!((written(), latency.until()), (vec![NONE], Some(at(4))));
        latency.tend(at(4));
        latency.tend(at(5));
        assert_eq!((written(), latency.until()), (vec![NONE, ANY], None));
    }

    #[test]
    fn without_the_device_nothing_is_ever_due() {
        let mut latency = WakeLatency::default();
        latency.lease(Instant::now());
        assert_eq!(latency.until(), None);
    }
}
