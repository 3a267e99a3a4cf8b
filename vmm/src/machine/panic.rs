//! Sees on the serial console that a Linux guest has panicked.
//!
//! A kernel says so on its console, if that is the serial port, and then, with `panic=` on its command line, resets the
//! machine, or else says that this was the end. A device for it would need a module that is not loaded that early.

const PANIC: &str = "Kernel panic - not syncing: ";
const END: &str = "---[ end Kernel panic - not syncing";
/// Longest line that is looked at.
const LINE_MAX: usize = 256;

/// Reads along.
#[derive(Debug, Default)]
pub(super) struct PanicWatch {
    line: Vec<u8>,
    reason: Option<String>,
}

impl PanicWatch {
    /// The guest printed something. Whether that was the end of its last words.
    pub fn printed(&mut self, bytes: &[u8]) -> bool {
        // All of them are read: no shortcut at the end.
        bytes.iter().filter(|byte| self.ends_at(**byte)).count() > 0
    }

    fn ends_at(&mut self, byte: u8) -> bool {
        if byte != b'\n' {
            if self.line.len() < LINE_MAX {
                self.line.push(byte);
            }
            return false;
        }
        let line = std::mem::take(&mut self.line);
        let line = String::from_utf8_lossy(&line);
        if line.contains(END) {
            return true;
        }
        if let Some((_, why)) = line.split_once(PANIC) {
            self.reason.get_or_insert_with(|| why.trim().to_owned());
        }
        false
    }

    /// Why the guest's kernel panicked, if it did.
    pub fn reason(&self) -> Option<String> {
        self.reason.as_ref().map(|why| format!("the guest's kernel panicked: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_seen_and_its_end() {
        let mut watch = PanicWatch::default();
        let mut print = |text: &str| watch.printed(text.as_bytes());
        assert!(!print("[    1.0] Run /init\r\n[    1.1] Kernel panic - not syncing: No working init found.\r\n"));
        assert!(!print("[    1.2] CPU: 0 PID: 1\r\n"));
        assert!(print("[    1.3] ---[ end Kernel panic - not syncing: No working init found. ]---\r\n"));
        assert_eq!(watch.reason().unwrap(), "the guest's kernel panicked: No working init found.");
        assert_eq!(PanicWatch::default().reason(), None);
    }
}
