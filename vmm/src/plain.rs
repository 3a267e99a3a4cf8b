//! Text of guests and VM processes, made fit to be shown: whatever it is, a terminal prints it, and does nothing else.

/// Most characters of a reason.
pub const REASON_MAX: usize = 500;

/// One line of at most `most` characters: what a terminal would obey is escaped.
#[must_use]
pub fn line(text: &str, most: usize) -> String {
    let mut plain: String = text.chars().take(most).flat_map(|c| escaped(c, |_| false)).collect();
    if text.chars().nth(most).is_some() {
        plain.push('…');
    }
    plain
}

/// The same, all of it, with its lines and tabs as they are.
#[must_use]
pub fn lines(text: &str) -> String {
    text.chars().flat_map(|c| escaped(c, |c| matches!(c, '\n' | '\t'))).collect()
}

fn escaped(c: char, stays: impl Fn(char) -> bool) -> impl Iterator<Item = char> {
    // Beside what is called control, characters that turn the rest of a line around.
    let obeyed =
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let escape = (obeyed && !stays(c)).then(|| c.escape_default());
    let plain = escape.is_none().then_some(c);
    escape.into_iter().flatten().chain(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        assert_eq!(line("it halted: ä … 漢", 100), "it halted: ä … 漢");
        assert_eq!(
            line("\u{1b}]0;owned\u{7}\nrow\u{9b}\u{202e}x", 100),
            "\\u{1b}]0;owned\\u{7}\\nrow\\u{9b}\\u{202e}x"
        );
        assert_eq!(line("12345", 5), "12345");
        assert_eq!(line("123456", 5), "12345…");
        assert_eq!(lines("a\tb\nc\u{1b}[2J"), "a\tb\nc\\u{1b}[2J");
    }
}
