//! The power button, which is how the host asks a guest to power off. As the guest's init, the agent does so.

use crate::System;
use crate::sys;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long programs have to end by themselves.
const PATIENCE: Duration = Duration::from_secs(5);
const SIGTERM: u8 = 15;

/// Watches all input devices that there are, each in a thread of its own. How many they are.
pub fn watch(system: &Arc<System>) -> usize {
    let devices = fs::read_dir("/dev/input").into_iter().flatten().flatten();
    let events = devices.filter(|device| device.file_name().as_encoded_bytes().starts_with(b"event"));
    events.filter(|device| watch_one(system, &device.path())).count()
}

fn watch_one(system: &Arc<System>, path: &Path) -> bool {
    let Ok(mut device) = File::open(path) else { return false };
    let system = Arc::clone(system);
    let watched = thread::Builder::new().spawn(move || {
        // An `input_event`: a time of two 64-bit numbers, a type, a code, and a value.
        let mut event = [0; 24];
        while device.read_exact(&mut event).is_ok() {
            if is_pushed(&event) {
                power_off(&system);
            }
        }
    });
    watched.is_ok()
}

fn is_pushed(event: &[u8; 24]) -> bool {
    const EV_KEY: [u8; 2] = 1u16.to_ne_bytes();
    const KEY_POWER: [u8; 2] = 116u16.to_ne_bytes();
    const DOWN: [u8; 4] = 1i32.to_ne_bytes();
    event[16..18] == EV_KEY && event[18..20] == KEY_POWER && event[20..] == DOWN
}

/// Has programs end, for a while, and then the machine.
fn power_off(system: &System) {
    sys::signal_all(SIGTERM);
    let deadline = Instant::now() + PATIENCE;
    while system.sessions.all().iter().any(|session| session.exit.is_none()) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    if let Err(e) = sys::power_off() {
        eprintln!("offshoot-agent: power off: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_power_button_counts_and_only_when_it_is_pushed() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut event = [7; 24];
            event[16..18].copy_from_slice(&kind.to_ne_bytes());
            event[18..20].copy_from_slice(&code.to_ne_bytes());
            event[20..].copy_from_slice(&value.to_ne_bytes());
            event
        };
        assert!(is_pushed(&event(1, 116, 1)));
        assert!(!is_pushed(&event(1, 116, 0)));
        assert!(!is_pushed(&event(1, 30, 1)));
        assert!(!is_pushed(&event(0, 116, 1)));
    }
}
