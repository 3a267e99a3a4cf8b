//! Commands that take several names: each is done, whatever becomes of the others.

use super::args::{Names, Output};
use super::errors::{CliError, tell};
use super::reach::running;
use super::{Done, FAILED, Format, SUCCESS, TIMED_OUT, show};
use serde_json::json;
use std::io::Write;
use std::time::{Duration, Instant};
use vmm::api::{ErrorKind, Removed, VmState};
use vmm::client::{Client, ClientBuilder, Error, Vm};

/// What became of names.
#[derive(Debug)]
struct Outcome {
    format: Format,
    done: usize,
    failures: Vec<u8>,
}

impl Outcome {
    fn new(output: Output) -> Self {
        Self { format: output.format(), done: 0, failures: Vec::new() }
    }

    /// Notes one, and tells what went wrong.
    fn note(&mut self, result: Result<(), CliError>) {
        match result {
            Ok(()) => self.done += 1,
            Err(e) => {
                self.failures.push(e.code());
                e.report(self.format);
            }
        }
    }

    /// The exit code: of a command that has done something, never the one for bad input that changes nothing.
    fn code(&self) -> u8 {
        match self.failures.first() {
            None => 0,
            Some(&code) if self.done == 0 => code,
            Some(_) if self.failures.iter().all(|&code| code == TIMED_OUT) => TIMED_OUT,
            Some(_) => FAILED,
        }
    }
}

/// Does something with each VM.
pub fn vm(
    server: ClientBuilder,
    Names { names, output }: Names,
    out: &mut impl Write,
    mut act: impl FnMut(Vm) -> Result<(), Error>,
) -> Done {
    let (mut outcome, mut done) = (Outcome::new(output), Vec::new());
    with_each(server, &names, &mut outcome, |client, name| {
        act(client.vm(name))?;
        done.push(name.to_owned());
        Ok(())
    })?;
    if output.json {
        show::json(out, &json!({ "done": done }))?;
    }
    Ok(outcome.code().into())
}

/// Waits for the end of each.
pub fn wait(
    server: ClientBuilder,
    names: &[String],
    timeout: Option<Duration>,
    output: Output,
    out: &mut impl Write,
) -> Done {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut outcome = Outcome::new(output);
    let mut dead = false;
    with_each(server, names, &mut outcome, |client, name| {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let end = client.vm(name).wait(left)?;
        dead |= end.state == VmState::Dead;
        if output.json {
            return Ok(show::json(out, &end)?);
        }
        let subject = if names.len() > 1 { format!("{name}: ") } else { String::new() };
        let word = if end.state == VmState::Dead { "dead" } else { "off" };
        let reason = end.reason.map_or(String::new(), |reason| format!(": {reason}"));
        Ok(writeln!(out, "{subject}{word}{reason}")?)
    })?;
    Ok(if outcome.failures.is_empty() && dead { FAILED } else { outcome.code() }.into())
}

fn with_each(
    server: ClientBuilder,
    names: &[String],
    outcome: &mut Outcome,
    mut act: impl FnMut(&Client, &str) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let client = running(server)?;
    for name in names {
        outcome.note(match &client {
            Ok(client) => act(client, name),
            Err(absent) => Err(absent.error(Some(name))),
        });
    }
    Ok(())
}

/// Removes those that are there, and says which are not.
pub fn remove(server: ClientBuilder, names: Vec<String>, output: Output, out: &mut impl Write) -> Done {
    let mut outcome = Outcome::new(output);
    let client = match running(server)? {
        Ok(client) => client,
        Err(absent) => {
            names.iter().for_each(|name| outcome.note(Err(absent.error(Some(name)))));
            return Ok(outcome.code().into());
        }
    };
    let gone = client.remove(names)?;
    outcome.done = gone.removed.len();
    for name in &gone.missing {
        let missing = CliError::of(ErrorKind::NoSuchVm, format!("rm: there is no VM {name:?}")).about(name);
        outcome.note(Err(missing));
    }
    tell_removed(&gone, output, out)?;
    Ok(outcome.code().into())
}

/// Removes all there are, which may be none.
pub fn remove_all(server: ClientBuilder, output: Output, out: &mut impl Write) -> Done {
    match running(server)? {
        Ok(client) => tell_removed(&client.remove_all()?, output, out),
        Err(_) => tell_removed(&Removed::default(), output, out),
    }
}

fn tell_removed(gone: &Removed, output: Output, out: &mut impl Write) -> Done {
    if output.json {
        show::json(out, &json!({ "removed": gone.removed, "missing": gone.missing }))?;
    }
    Ok(SUCCESS)
}

/// Takes back what was made, after its names could not be told.
pub fn undo(client: &Client, names: Vec<String>, why: CliError) -> CliError {
    let listed = names.join(", ");
    match client.remove(names) {
        Ok(_) => why.because(&format!("{listed}: removed again, since its name could not be told")),
        Err(e) => {
            tell(&e.to_string());
            why.because(&format!("made {listed}, whose name could not be told"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_has_done_something_does_not_say_that_nothing_has_changed() {
        let code = |done, failures: &[u8]| Outcome { format: Format::Plain, done, failures: failures.into() }.code();
        assert_eq!(code(2, &[]), 0);
        assert_eq!(code(0, &[2, 1]), 2);
        assert_eq!(code(1, &[2]), 1);
        assert_eq!(code(1, &[3, 3]), 3);
        assert_eq!(code(1, &[3, 2]), 1);
    }
}
