//! What was last seen of a VM: what its process has, and whether it runs.

use std::time::{Duration, Instant};

/// What has grown is taken to have grown within this time, if we have not looked for longer.
const BURST: Duration = Duration::from_millis(20);
/// What a VM process has of its own, until its live layer was taken once and we know.
const PROCESS_BYTES: u64 = 1 << 20;
/// Whether a VM runs is told from processor time, read this often. One tick is no sign of life.
pub(super) const TICKS_EVERY: Duration = Duration::from_millis(900);
/// A guest that has nothing to do looks at its clocks all the same: less than this part of one processor, in percent, is
/// nothing to do, and takes no memory to speak of.
const BUSY_PERCENT: u64 = 5;

/// What was last seen of a VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) at: Instant,
    pub(super) bytes: u64,
    pub(super) growth: u64,
    /// What its process has beside its live layer.
    pub(super) least: u64,
    pub(super) ticks: u64,
    pub(super) ticks_at: Instant,
    pub(super) ran_at: Instant,
    /// When it last had something to do.
    pub(super) busy_at: Instant,
    /// Since when it stands still, or when it was let go.
    pub(super) held: Option<Instant>,
    pub(super) released: Option<Instant>,
    /// Its live layer has just been taken.
    pub(super) taken: bool,
}

impl Seen {
    pub(super) fn new(now: Instant, bytes: u64) -> Self {
        Self {
            at: now,
            bytes,
            growth: 0,
            least: PROCESS_BYTES.min(bytes),
            ticks: 0,
            ticks_at: now,
            ran_at: now,
            busy_at: now,
            held: None,
            released: None,
            taken: false,
        }
    }

    pub(super) fn saw(&mut self, now: Instant, bytes: u64) {
        // After a quiet time we cannot know that it has not grown in the last moments only.
        let since = now.saturating_duration_since(self.at).clamp(Duration::from_millis(1), BURST);
        let growth = (bytes.saturating_sub(self.bytes) as f64 / since.as_secs_f64()) as u64;
        // What stood still for a moment goes on as before.
        self.growth = growth.max(if self.held.is_some() { self.growth } else { self.growth / 2 });
        (self.at, self.bytes) = (now, bytes);
        self.taken = false;
        self.least = self.least.min(bytes);
    }

    pub(super) fn ran(&mut self, now: Instant, ticks: u64) {
        let since = now.saturating_duration_since(self.ticks_at);
        let no_sign = (since.as_millis() / TICKS_EVERY.as_millis()).max(1) as u64;
        if ticks > self.ticks + no_sign {
            self.ran_at = now;
        }
        // A tick is 10 ms.
        let passed = since.as_millis() as u64 / 10;
        if ticks > self.ticks + 1 + passed * BUSY_PERCENT / 100 {
            self.busy_at = now;
        }
        (self.ticks, self.ticks_at) = (ticks, now);
    }
}
