//! What the monitor needs of the machine it runs on.

use core::sync::atomic::AtomicU64;

use crate::abi::{BalloonPage, Doorbell, EventPage, Inbox, Outbox};
use crate::pattern::PAGE_WORDS;

/// A page of RAM. Atomics, because page 15 is the monitor's own stack and a device may write to any page.
pub type Page = [AtomicU64; PAGE_WORDS];

/// The machine: ports, the pages shared with the VMM, RAM and a clock.
///
/// [`wait`](Self::wait) and [`event_page`](Self::event_page) must write no memory, not even a return address: a fork
/// that happens while the monitor waits dirties nothing.
pub trait Machine {
    /// What the VMM says about this VM.
    fn event_page(&self) -> &EventPage;
    /// Where lines arrive.
    fn inbox(&self) -> &Inbox;
    /// Where answers go.
    fn outbox(&self) -> &Outbox;
    /// What has been given back.
    fn balloon_page(&self) -> &BalloonPage;
    /// Linear page `page` of RAM, which must be below [`EventPage::mem_pages`].
    fn page(&self, page: u64) -> &Page;
    /// Sleeps until there is something to do: bits of [`wake`](crate::abi::wake). 0 means nothing; call again.
    fn wait(&self) -> u32;
    /// Notifies the VMM. What was written to shared pages before is visible to it.
    fn ring(&self, doorbell: Doorbell);
    /// A byte typed on the serial port, if there is one.
    fn serial_read(&self) -> Option<u8>;
    /// Sends a byte to the serial port.
    fn serial_write(&self, byte: u8);
    /// The time stamp counter, in ticks.
    fn tsc(&self) -> u64;
}
