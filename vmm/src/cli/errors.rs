//! Errors as the user sees them: one line on stderr, plain or JSON, and an exit code.

use super::args::Cli;
use super::{BAD_INPUT, Format, SUCCESS};
use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind as UsageKind};
use serde_json::json;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;
use vmm::api::ErrorKind;
use vmm::client::Error;
use vmm::plain;

/// Why a command failed.
#[derive(Debug)]
pub struct CliError {
    kind: ErrorKind,
    message: String,
    subject: Option<String>,
    /// Nobody reads what is written: nothing to tell, and no failure.
    silent: bool,
    /// An exit code that says more than its kind.
    code: Option<u8>,
}

impl CliError {
    pub fn of(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), subject: None, silent: false, code: None }
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::of(ErrorKind::Failed, message)
    }

    pub fn bad_input(message: impl Into<String>) -> Self {
        Self::of(ErrorKind::BadRequest, message)
    }

    /// What was to be told could not be written, which matters.
    pub fn of_output(e: io::Error) -> Self {
        Self::of(ErrorKind::Host, format!("output: {e}"))
    }

    /// The same, about something.
    pub fn about(self, subject: impl Into<String>) -> Self {
        Self { subject: Some(subject.into()), ..self }
    }

    /// The same, as the cause of something.
    pub fn because(self, what: &str) -> Self {
        Self { message: format!("{what}: {}", self.message), ..self }
    }

    /// The same, with that exit code, unless it has one of its own.
    pub fn or_ending(self, code: u8) -> Self {
        Self { code: self.code.or(Some(code)), ..self }
    }

    pub fn code(&self) -> u8 {
        self.code.unwrap_or(if self.silent { 0 } else { self.kind.exit_code() })
    }

    /// Tells the user.
    pub fn report(self, format: Format) -> ExitCode {
        match format {
            _ if self.silent => {}
            Format::Plain => tell(&self.message),
            Format::Json => {
                let Self { kind, message, subject, .. } = &self;
                let error = json!({ "error": { "kind": kind, "message": message, "subject": subject } });
                let _ = writeln!(io::stderr(), "{error}");
            }
        }
        self.code().into()
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<Error> for CliError {
    fn from(e: Error) -> Self {
        Self { subject: e.subject(), ..Self::of(e.kind(), e.to_string()) }
    }
}

/// Of reading and writing here. The end of a pipe's reader (`offshoot ls | head -1`) is no failure.
impl From<io::Error> for CliError {
    fn from(e: io::Error) -> Self {
        let silent = e.kind() == io::ErrorKind::BrokenPipe;
        Self { silent, ..Self::of(ErrorKind::Host, format!("input or output: {e}")) }
    }
}

impl From<nix::Error> for CliError {
    fn from(e: nix::Error) -> Self {
        io::Error::from(e).into()
    }
}

/// Says one line on stderr.
pub fn tell(message: &str) {
    // There is nobody left to tell if this fails.
    let message = message.trim_end().replace('\n', " ");
    let _ = writeln!(io::stderr(), "offshoot: {}", plain::lines(&message));
}

/// What the command line parser has to say: help on stdout, and errors in one line.
pub fn usage(e: &clap::Error) -> ExitCode {
    if matches!(e.kind(), UsageKind::DisplayHelp | UsageKind::DisplayVersion) {
        let _ = e.print();
        return SUCCESS;
    }
    let verb = std::env::args().skip(1).find(|word| Cli::command().find_subcommand(word).is_some());
    let json = std::env::args().skip(1).any(|word| word == "--json");
    let error = CliError::bad_input(usage_line(e, verb.as_deref()));
    error.report(if json { Format::Json } else { Format::Plain });
    BAD_INPUT.into()
}

/// The parser's message without its usage, in one line.
fn usage_line(e: &clap::Error, verb: Option<&str>) -> String {
    let command = verb.map_or("offshoot".into(), |verb| format!("offshoot {verb}"));
    let rendered = e.render().to_string();
    let cause: Vec<&str> = rendered.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let cause = match cause.join(" ") {
        // Bare `offshoot`: the parser shows its whole help.
        text if !text.starts_with("error: ") => "which command?".into(),
        text => text.trim_start_matches("error: ").trim_end_matches('.').to_owned(),
    };
    let operation = verb.map_or(String::new(), |verb| format!("{verb}: "));
    let guess = guess(e).map_or(String::new(), |word| format!("; did you mean `{word}`?"));
    format!("{operation}{cause}{guess} (see `{command} --help`)")
}

/// What was most likely meant.
fn guess(e: &clap::Error) -> Option<&str> {
    let kinds = [ContextKind::SuggestedSubcommand, ContextKind::SuggestedArg, ContextKind::SuggestedValue];
    kinds.into_iter().find_map(|kind| match e.get(kind)? {
        ContextValue::String(word) => Some(word.as_str()),
        // The likeliest is the last.
        ContextValue::Strings(words) => words.last().map(String::as_str),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use vmm::api::Failure;

    fn line(line: &str) -> String {
        let mut words = line.split(' ');
        let e = Cli::try_parse_from(line.split(' ')).unwrap_err();
        usage_line(&e, words.nth(1).filter(|word| Cli::command().find_subcommand(word).is_some()))
    }

    #[test]
    fn usage_errors_are_one_line() {
        assert_eq!(
            line("offshoot launch --mem 3"),
            "launch: invalid value '3' for '--memory <SIZE>': guest memory is at least 16M, and this is 3 bytes (see \
             `offshoot launch --help`)"
        );
        assert_eq!(
            line("offshoot send base"),
            "send: the following required arguments were not provided: <TEXT> (see `offshoot send --help`)"
        );
        assert_eq!(line("offshoot fly"), "unrecognized subcommand 'fly' (see `offshoot --help`)");
        assert_eq!(line("offshoot"), "which command? (see `offshoot --help`)");
        assert!(line("offshoot launch a/b").contains("and this has '/'"));
        let count = line("offshoot fork a --count 0");
        assert!(count.contains("not a number from 1 to 1000") && !count.contains(".."), "{count}");
    }

    #[test]
    fn what_is_mistyped_is_guessed() {
        assert!(line("offshoot lauch").ends_with("; did you mean `launch`? (see `offshoot --help`)"));
        assert!(line("offshoot launch --memroy 3").contains("did you mean `--memory`?"));
        assert!(line("offshoot completions bsh").contains("did you mean `bash`?"));
    }

    #[test]
    fn every_kind_has_its_exit_code() {
        let code = |e: Error| CliError::from(e).code();
        assert_eq!(code(Failure::bad_request("x").into()), 2);
        assert_eq!(code(Failure::timed_out("x").into()), 3);
        assert_eq!(code(Failure::failed("x").into()), 1);
        assert_eq!(CliError::from(io::Error::from(io::ErrorKind::BrokenPipe)).code(), 0);
        assert_eq!(CliError::of_output(io::ErrorKind::BrokenPipe.into()).code(), 1);
    }
}
