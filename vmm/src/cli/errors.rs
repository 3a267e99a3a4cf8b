//! Errors as the user sees them: one line on stderr, and an exit code.

use super::args::Cli;
use super::{BAD_INPUT, FAILED, SUCCESS, TIMED_OUT};
use clap::CommandFactory;
use clap::error::ErrorKind;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;
use vmm::client::Error;
use vmm::plain;

/// Why a command failed.
#[derive(Debug)]
pub struct CliError {
    code: u8,
    message: String,
    /// Nobody reads what is written: nothing to tell.
    silent: bool,
}

impl CliError {
    pub fn failed(message: impl Into<String>) -> Self {
        Self { code: FAILED, message: message.into(), silent: false }
    }

    pub fn bad_input(message: impl Into<String>) -> Self {
        Self { code: BAD_INPUT, ..Self::failed(message) }
    }

    /// Tells the user.
    pub fn report(self) -> ExitCode {
        if !self.silent {
            tell(&self.message);
        }
        self.code.into()
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<Error> for CliError {
    fn from(e: Error) -> Self {
        let code = match e {
            Error::BadInput(_) | Error::Home(_) => BAD_INPUT,
            Error::TimedOut(_) => TIMED_OUT,
            _ => FAILED,
        };
        Self { code, ..Self::failed(e.to_string()) }
    }
}

/// Of reading and writing here. The end of a pipe's reader (`offshoot ls | head -1`) is no failure.
impl From<io::Error> for CliError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Self { code: 0, message: String::new(), silent: true },
            _ => Self::failed(format!("input or output: {e}")),
        }
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
    if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = e.print();
        return SUCCESS;
    }
    let verb = std::env::args().skip(1).find(|word| Cli::command().find_subcommand(word).is_some());
    tell(&usage_line(&e.render().to_string(), verb.as_deref()));
    BAD_INPUT.into()
}

/// The parser's message without its usage, in one line.
fn usage_line(rendered: &str, verb: Option<&str>) -> String {
    let command = verb.map_or("offshoot".into(), |verb| format!("offshoot {verb}"));
    let cause: Vec<&str> = rendered.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let cause = match cause.join(" ") {
        // Bare `offshoot`: the parser shows its whole help.
        text if !text.starts_with("error: ") => "which command?".into(),
        text => text.trim_start_matches("error: ").trim_end_matches('.').to_owned(),
    };
    let operation = verb.map_or(String::new(), |verb| format!("{verb}: "));
    format!("{operation}{cause} (see `{command} --help`)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn line(line: &str) -> String {
        let mut words = line.split(' ');
        let e = Cli::try_parse_from(line.split(' ')).unwrap_err();
        usage_line(&e.render().to_string(), words.nth(1).filter(|word| Cli::command().find_subcommand(word).is_some()))
    }

    #[test]
    fn usage_errors_are_one_line() {
        assert_eq!(
            line("offshoot launch --mem 3"),
            "launch: invalid value '3' for '--mem <SIZE>': guest memory is at least 16M, and this is 3 bytes (see \
             `offshoot launch --help`)"
        );
        assert_eq!(
            line("offshoot send base"),
            "send: the following required arguments were not provided: <TEXT> (see `offshoot send --help`)"
        );
        assert_eq!(line("offshoot fly"), "unrecognized subcommand 'fly' (see `offshoot --help`)");
        assert_eq!(line("offshoot"), "which command? (see `offshoot --help`)");
        assert!(line("offshoot launch a/b").contains("and this has '/'"));
    }

    #[test]
    fn every_kind_has_its_exit_code() {
        let code = |e: Error| CliError::from(e).code;
        assert_eq!(code(Error::BadInput("x".into())), 2);
        assert_eq!(code(Error::TimedOut("x".into())), 3);
        assert_eq!(code(Error::Failed("x".into())), 1);
        assert_eq!(CliError::from(io::Error::from(io::ErrorKind::BrokenPipe)).code, 0);
    }
}
