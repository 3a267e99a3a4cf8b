//! The agent's child processes: who is told when one ends. As process 1 it has all orphans too, which nobody asks after.

use crate::sys::{self, Ended};
use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// What is to be done when a process ends.
pub type Then = Box<dyn FnOnce(Ended) + Send>;

/// Children that run.
#[derive(Default)]
pub struct Children {
    running: Mutex<HashMap<u32, Then>>,
    started: Condvar,
}

impl Children {
    /// Starts a program. Nothing is lost of one that ends at once: it is not reaped before `then` has made its `Then`.
    pub fn spawn<T>(&self, command: &mut Command, then: impl FnOnce(u32) -> (T, Then)) -> io::Result<T> {
        // Held while the program starts: if it cannot be executed the standard library reaps the child itself.
        let mut running = crate::lock(&self.running);
        let pid = command.spawn()?.id();
        let (value, on_end) = then(pid);
        running.insert(pid, on_end);
        self.started.notify_one();
        Ok(value)
    }

    /// Reaps children for ever.
    pub fn reap(&self) -> ! {
        loop {
            match sys::ended_child() {
                Ok(pid) => {
                    let mut running = crate::lock(&self.running);
                    if let Some(ended) = sys::reap(pid) {
                        let then = running.remove(&pid);
                        drop(running);
                        if let Some(then) = then {
                            then(ended);
                        }
                    }
                }
                // There is none. An orphan is not told of, but its parent was a child.
                Err(_) => {
                    let running = crate::lock(&self.running);
                    let none = |running: &mut HashMap<u32, Then>| running.is_empty();
                    drop(self.started.wait_timeout_while(running, Duration::from_secs(60), none));
                }
            }
        }
    }
}
