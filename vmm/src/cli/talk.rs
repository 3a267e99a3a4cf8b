//! `send` and `logs`.

use super::args::Output;
use super::{Done, FAILED, SUCCESS, shown};
use regex::Regex;
use serde::Serialize;
use std::io::{Read, Write};
use std::time::Duration;
use vmm::client::{Stream, Vm};
use vmm::plain;

/// A line for a guest, and what is waited for.
pub struct Line {
    pub text: String,
    pub expect: Option<Regex>,
    pub timeout: Duration,
}

/// `send --json`.
#[derive(Debug, Serialize)]
struct Said<'a> {
    name: &'a str,
    /// Whether the guest answered `ok`, or what was expected came; null for a guest that gives no answers.
    ok: Option<bool>,
    /// What the guest answered, or the lines that what was expected is in.
    answer: Option<&'a str>,
}

pub fn send(vm: &Vm, line: Line, output: Output, out: &mut impl Write) -> Done {
    let Line { text, expect, timeout } = line;
    let (ok, answer) = match &expect {
        Some(pattern) => (Some(true), Some(vm.expect(&text, pattern, timeout)?)),
        None => match vm.tell(&text, timeout)? {
            Some(answer) => (Some(answer.split(' ').next() == Some("ok")), Some(answer)),
            None => (None, None),
        },
    };
    let said = Said { name: vm.name(), ok, answer: answer.as_deref() };
    shown(output, out, &said, |out| match said.answer {
        Some(answer) => writeln!(out, "{}", plain::lines(answer)),
        None => Ok(()),
    })?;
    Ok(if ok == Some(false) { FAILED.into() } else { SUCCESS })
}

/// Prints a stream, each piece as it comes.
pub fn copy(mut stream: Stream, out: &mut impl Write) -> Done {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(SUCCESS),
            count => out.write_all(&buffer[..count]).and_then(|()| out.flush())?,
        }
    }
}
