//! `balloon`: waits for a guest, and tells how it gets on.

use super::errors::{CliError, tell};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;
use vmm::api::Balloon;
use vmm::client::Client;
use vmm::units::{ByteSize, PAGE_BYTES};

/// A guest that takes longer than this is looked at as often.
const LOOK: Duration = Duration::from_secs(1);

pub fn resize(client: &Client, name: &str, size: ByteSize, timeout: Duration) -> Result<Balloon, CliError> {
    let (done, outcome) = channel();
    let vm = client.vm(name);
    thread::scope(|scope| {
        scope.spawn(move || done.send(vm.balloon(size, timeout)));
        loop {
            match outcome.recv_timeout(LOOK) {
                Ok(outcome) => return Ok(outcome?),
                Err(RecvTimeoutError::Timeout) => tell_progress(client, name),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(CliError::failed(format!("balloon {name}: no answer")));
                }
            }
        }
    })
}

/// What a guest has, in words.
pub fn text(size_bytes: u64, balloon_bytes: u64) -> String {
    format!("{} left, {} in the balloon", ByteSize(size_bytes), ByteSize(balloon_bytes))
}

fn tell_progress(client: &Client, name: &str) {
    let vms = client.list().unwrap_or_default();
    if let Some(vm) = vms.iter().find(|vm| vm.name == name) {
        let (memory, given) = (vm.mem_pages * PAGE_BYTES, vm.balloon_bytes);
        tell(&format!("balloon {name}: {} so far", text(memory.saturating_sub(given), given)));
    }
}
