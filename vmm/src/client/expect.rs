//! Waiting for what a guest prints after a line was typed on its console.

use super::{Error, Stream};
use crate::api::{ErrorKind, Failure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use regex::Regex;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// A match at the very end of what was printed may still grow: it counts when nothing followed for this long.
const QUIET: Duration = Duration::from_millis(200);

/// What is typed, and what is to come of it.
#[derive(Debug)]
pub(super) struct Expectation<'a> {
    pub text: &'a str,
    pub pattern: &'a Regex,
    pub timeout: Duration,
}

impl Expectation<'_> {
    /// Types the line, and reads until the pattern is there. Gives the lines that it is in.
    pub fn await_on(&self, mut console: Stream, name: &str) -> Result<String, Error> {
        let deadline = Instant::now() + self.timeout;
        console.write_all(format!("{}\n", self.text).as_bytes()).map_err(Error::io(format!("type on {name}")))?;
        let mut printed = Vec::new();
        loop {
            // A terminal ends its lines with both characters; patterns know one.
            let output = String::from_utf8_lossy(&printed).replace('\r', "");
            let found = find(&output, self.text, self.pattern);
            if let Some(MatchFound { lines, end: End::Final }) = found {
                return Ok(lines);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let patience = if found.is_some() { QUIET.min(left) } else { left };
            if wait(&console, patience).map_err(Error::io(format!("read the console of {name}")))? {
                let mut buffer = [0; 4096];
                match console.read(&mut buffer).map_err(Error::io(format!("read the console of {name}")))? {
                    0 => {
                        let why = format!("VM {name:?} has ended before it printed {}", self.pattern);
                        return Err(Failure::new(ErrorKind::VmEnded, why).about(name).into());
                    }
                    count => printed.extend_from_slice(&buffer[..count]),
                }
            } else if let Some(found) = found {
                return Ok(found.lines);
            } else {
                let why = format!("VM {name:?} has not printed {} in time", self.pattern);
                return Err(Failure::timed_out(why).about(name).into());
            }
        }
    }
}

/// Waits for more to read. Whether there is any.
fn wait(console: &Stream, patience: Duration) -> std::io::Result<bool> {
    if !console.buffered().is_empty() {
        return Ok(true);
    }
    // Rounded up, so that a fraction of a millisecond does not make us spin.
    let timeout = PollTimeout::try_from(patience + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut [PollFd::new(console.as_fd(), PollFlags::POLLIN)], timeout)? > 0)
}

#[derive(Debug, PartialEq, Eq)]
struct MatchFound {
    lines: String,
    end: End,
}

/// Whether more output could change a match.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Final,
    Open,
}

/// Looks for the pattern in what was printed, but not in the echo of what was typed.
fn find(output: &str, typed: &str, pattern: &Regex) -> Option<MatchFound> {
    let rest = after_echo(output, typed);
    let found = pattern.find(rest)?;
    let start = rest[..found.start()].rfind('\n').map_or(0, |at| at + 1);
    let after = &rest[found.end()..];
    // A line with its end can get no longer. Several could become more.
    let ended = found.as_str().find('\n').is_some_and(|at| at + 1 == found.len());
    let end = if ended { found.end() } else { found.end() + after.find('\n').unwrap_or(after.len()) };
    let complete = if ended || after.contains('\n') { End::Final } else { End::Open };
    Some(MatchFound { lines: rest[start..end].trim_end().to_owned(), end: complete })
}

/// What follows the echo of the typed line, or, where there is none, all but what may be the beginning of it.
fn after_echo<'a>(output: &'a str, typed: &str) -> &'a str {
    if typed.is_empty() {
        return output;
    }
    if let Some(at) = output.find(typed) {
        return &output[at + typed.len()..];
    }
    let partial = (1..typed.len()).rev().find(|&len| typed.is_char_boundary(len) && output.ends_with(&typed[..len]));
    &output[..output.len() - partial.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(output: &str, typed: &str, pattern: &str) -> Option<(String, End)> {
        find(output, typed, &Regex::new(pattern).unwrap()).map(|found| (found.lines, found.end))
    }

    #[test]
    fn the_echo_does_not_count() {
        assert_eq!(lines("~ # echo hel", "echo hello", "hel"), None);
        assert_eq!(lines("~ # echo hello\n", "echo hello", "hello"), None);
        let found = lines("~ # echo hello\nhello\n~ # ", "echo hello", "hello");
        assert_eq!(found, Some(("hello".into(), End::Final)));
    }

    #[test]
    fn the_lines_of_a_match_are_given_whole_and_only_when_they_are() {
        assert_eq!(lines("count=1", "x", r"count=\d+"), Some(("count=1".into(), End::Open)));
        assert_eq!(lines("a count=12 b\nc", "x", r"count=\d+"), Some(("a count=12 b".into(), End::Final)));
        assert_eq!(lines("tick 5\n", "", r"tick"), Some(("tick 5".into(), End::Final)));
        assert_eq!(lines("kb=2\n", "x", r"(?m)^kb=\d$"), Some(("kb=2".into(), End::Final)));
        assert_eq!(lines("nothing\n", "", r"tick"), None);
    }

    /// A guest that stalls in the middle of a line had its answer taken for whole.
    #[test]
    fn who_asks_for_the_end_of_the_line_gets_no_half_of_it() {
        assert_eq!(lines("ok ask", "x", r"(?m)^ok .*\n"), None);
        assert_eq!(lines("ok asked=4\n", "x", r"(?m)^ok .*\n"), Some(("ok asked=4".into(), End::Final)));
        assert_eq!(lines("ok asked=4\n# ", "x", r"(?m)^ok .*\n"), Some(("ok asked=4".into(), End::Final)));
        assert_eq!(lines("ok\nasked=4\n", "x", r"(?s)ok.*\n"), Some(("ok\nasked=4".into(), End::Open)));
    }
}
