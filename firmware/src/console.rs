//! A line typed on the serial port.

use crate::monitor::LINE_MAX;

/// The line so far, and how bytes from a terminal change it.
pub struct Console {
    line: [u8; LINE_MAX],
    len: usize,
    after_return: bool,
}

/// What a typed byte does.
#[derive(Debug, PartialEq, Eq)]
pub enum Edit {
    /// Show it.
    Echo(u8),
    /// Take the last character back from the screen.
    Erase,
    /// The line is complete: see [`Console::line`].
    Enter,
    /// Nothing.
    Ignore,
}

impl Console {
    /// An empty line.
    pub const fn new() -> Self {
        Self { line: [0; LINE_MAX], len: 0, after_return: false }
    }

    /// Takes one byte from the terminal. Enter is CR, LF or both; what does not fit the line is ignored.
    pub fn push(&mut self, byte: u8) -> Edit {
        let second_half = byte == b'\n' && self.after_return;
        self.after_return = byte == b'\r';
        match byte {
            b'\n' if second_half => Edit::Ignore,
            b'\r' | b'\n' => Edit::Enter,
            0x08 | 0x7f if self.len > 0 => {
                self.len -= 1;
                Edit::Erase
            }
            b' '..=b'~' if self.len < LINE_MAX => {
                self.line[self.len] = byte;
                self.len += 1;
                Edit::Echo(byte)
            }
            _ => Edit::Ignore,
        }
    }

    /// What was typed since the last [`clear`](Self::clear).
    pub fn line(&self) -> &[u8] {
        &self.line[..self.len]
    }

    /// Starts a new line.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits() {
        let mut console = Console::new();
        assert_eq!(console.push(0x7f), Edit::Ignore);
        assert_eq!(console.push(b'i'), Edit::Echo(b'i'));
        assert_eq!(console.push(b'x'), Edit::Echo(b'x'));
        assert_eq!(console.push(0x08), Edit::Erase);
        assert_eq!(console.push(0x1b), Edit::Ignore);
        assert_eq!(console.push(b'd'), Edit::Echo(b'd'));
        assert_eq!(console.push(b'\r'), Edit::Enter);
        assert_eq!(console.line(), b"id");
        console.clear();
        assert_eq!(console.push(b'\n'), Edit::Ignore);
        assert_eq!(console.push(b'\n'), Edit::Enter);
        assert_eq!(console.line(), b"");
    }

    #[test]
    fn an_endless_line_stays_in_its_buffer() {
        let mut console = Console::new();
        for _ in 0..LINE_MAX {
            assert_eq!(console.push(b'a'), Edit::Echo(b'a'));
        }
        assert_eq!(console.push(b'a'), Edit::Ignore);
        assert_eq!(console.line().len(), LINE_MAX);
    }
}
