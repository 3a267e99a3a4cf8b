//! Ports, shared pages and RAM of the machine.

use core::arch::asm;
use core::marker::PhantomData;
use core::ptr::with_exposed_provenance;

use firmware::abi::{
    BALLOON, BalloonPage, COM1, DOORBELL, Doorbell, EVENT_PAGE, EventPage, INBOX, Inbox, MAX_PAGES,
    OUTBOX, Outbox, RAM_VIEW, WAIT, page_to_gpa, wake,
};
use firmware::machine::{Machine, Page};

/// Line status register of the serial port, and its bit that says a byte is there.
const LSR: u16 = COM1 + 5;
const LSR_DATA_READY: u8 = 1 << 0;

/// The machine this image runs on.
pub struct Pc {
    _only_new: PhantomData<()>,
}

impl Pc {
    /// # Safety
    /// The processor runs on the page tables and the I/O bitmap of [`crate::tables`].
    pub unsafe fn new() -> Self {
        Self {
            _only_new: PhantomData,
        }
    }

    /// The page of RAM at guest physical address `gpa`, a multiple of the page size. An address that is no RAM shuts
    /// the machine down when it is used.
    pub fn page_at(&self, gpa: u64) -> &Page {
        // SAFETY: the page tables show RAM there, and `Pc` exists only if they are loaded. The type is valid for any
        // bytes and allows others to write.
        unsafe { &*with_exposed_provenance(RAM_VIEW as usize + gpa as usize) }
    }
}

impl Machine for Pc {
    #[inline(always)]
    fn event_page(&self) -> &EventPage {
        // SAFETY: the page is mapped (as in `page_at`), used for nothing else, and the type is valid for any bytes.
        unsafe { &*with_exposed_provenance(EVENT_PAGE as usize) }
    }

    fn inbox(&self) -> &Inbox {
        // SAFETY: as for the event page.
        unsafe { &*with_exposed_provenance(INBOX as usize) }
    }

    fn outbox(&self) -> &Outbox {
        // SAFETY: as for the event page.
        unsafe { &*with_exposed_provenance(OUTBOX as usize) }
    }

    fn balloon_page(&self) -> &BalloonPage {
        // SAFETY: as for the event page.
        unsafe { &*with_exposed_provenance(BALLOON as usize) }
    }

    #[inline(always)]
    fn page(&self, page: u64) -> &Page {
        assert!(page < MAX_PAGES);
        self.page_at(page_to_gpa(page))
    }

    #[inline(always)]
    fn wait(&self) -> u32 {
        let bits: u32;
        // SAFETY: reads a port that the I/O bitmap allows. The VMM may write to the shared pages meanwhile, which the
        // compiler must assume, as it does without `nomem`.
        unsafe {
            asm!("in eax, dx", out("eax") bits, in("dx") WAIT, options(nostack, preserves_flags))
        };
        match bits {
            // No such device: another VMM. The serial port is all there is.
            u32::MAX => u32::from(inb(LSR) & LSR_DATA_READY) * wake::SERIAL,
            bits => bits,
        }
    }

    #[inline(always)]
    fn ring(&self, doorbell: Doorbell) {
        // SAFETY: writes a port that the I/O bitmap allows; without `nomem`, earlier stores come first.
        unsafe {
            asm!("out dx, eax", in("dx") DOORBELL, in("eax") doorbell as u32, options(nostack, preserves_flags))
        };
    }

    fn serial_read(&self) -> Option<u8> {
        (inb(LSR) & LSR_DATA_READY != 0).then(|| inb(COM1))
    }

    fn serial_write(&self, byte: u8) {
        // SAFETY: writes a port that the I/O bitmap allows, and no memory.
        unsafe {
            asm!("out dx, al", in("dx") COM1, in("al") byte, options(nomem, nostack, preserves_flags))
        };
    }

    #[inline(always)]
    fn tsc(&self) -> u64 {
        // SAFETY: CR4.TSD is clear.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
}

/// Reads one of the ports of the serial console.
#[inline(always)]
fn inb(port: u16) -> u8 {
    let byte: u8;
    // SAFETY: the I/O bitmap allows the port; reading it changes no memory.
    unsafe {
        asm!("in al, dx", out("al") byte, in("dx") port, options(nomem, nostack, preserves_flags))
    };
    byte
}
