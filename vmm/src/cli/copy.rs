//! `cp`: files and trees to and from a guest.

use super::args::Cp;
use super::errors::CliError;
use super::reach::with_agent;
use super::{Done, SUCCESS};
use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use vmm::client::{ClientBuilder, Error};
use vmm::name::check_name;

pub fn cp(cp: &Cp, server: ClientBuilder, out: &mut impl Write) -> Done {
    let bad = |why: &str| Err(CliError::bad_input(format!("cp: {why}")));
    match (Place::of(&cp.from)?, Place::of(&cp.to)?) {
        (Place::There { .. }, Place::There { .. }) => {
            bad("both are in guests: copy to this host, and from here to the other guest")
        }
        (Place::There { name, path }, Place::Stream) => {
            if io::stdout().is_terminal() {
                return bad("an archive is nothing to write to a terminal");
            }
            with_agent(server, &name, |agent| match agent.archive(path)?.copy_to(out) {
                // Nobody reads on, which is no failure.
                Err(Error::Io { source, .. }) => Err(source.into()),
                done => Ok(done.map(|()| SUCCESS)?),
            })
        }
        (Place::There { name, path }, Place::Here(to)) => {
            with_agent(server, &name, |agent| Ok(agent.copy_out(path, Path::new(to)).map(|()| SUCCESS)?))
        }
        (Place::Stream, Place::There { name, path }) => {
            if io::stdin().is_terminal() {
                return bad("an archive is nothing to type on a terminal");
            }
            with_agent(server, &name, |agent| Ok(agent.unpack(io::stdin().lock(), path).map(|()| SUCCESS)?))
        }
        (Place::Here(from), Place::There { name, path }) => {
            with_agent(server, &name, |agent| Ok(agent.copy_in(Path::new(from), path).map(|()| SUCCESS)?))
        }
        (Place::Here(_) | Place::Stream, Place::Here(_) | Place::Stream) => {
            bad("neither is in a guest: write NAME:PATH for what is")
        }
    }
}

/// Where something is.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Here(&'a OsStr),
    There { name: String, path: &'a OsStr },
    Stream,
}

impl<'a> Place<'a> {
    /// A word means a guest if what stands before its first colon can be the name of one: other paths with a colon are written
    /// with a slash before it, `./a:b`.
    fn of(word: &'a OsString) -> Result<Self, CliError> {
        let bytes = word.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        if bytes.is_empty() {
            return Err(CliError::bad_input("cp: an empty path"));
        }
        let colon = bytes.iter().position(|&byte| byte == b':');
        let name = colon.and_then(|at| std::str::from_utf8(&bytes[..at]).ok()).filter(|name| check_name(name).is_ok());
        let (Some(at), Some(name)) = (colon, name) else { return Ok(Self::Here(word)) };
        if at + 1 == bytes.len() {
            return Err(CliError::bad_input(format!("cp: {name}: there is no path after the colon")).about(name));
        }
        Ok(Self::There { name: name.to_owned(), path: OsStr::from_bytes(&bytes[at + 1..]) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_here_or_there() {
        let place = |word: &str| match Place::of(&OsString::from(word)) {
            Ok(Place::Here(path)) => format!("here {}", path.display()),
            Ok(Place::There { name, path }) => format!("{name} {}", path.display()),
            Ok(Place::Stream) => "stream".into(),
            Err(e) => e.to_string(),
        };
        for (word, means) in [
            ("a:/b", "a /b"),
            ("base-1:b:c", "base-1 b:c"),
            ("./a:b", "here ./a:b"),
            ("/x/a:b", "here /x/a:b"),
            (":b", "here :b"),
            ("a b:c", "here a b:c"),
            ("file", "here file"),
            ("-", "stream"),
            ("--", "here --"),
            ("", "cp: an empty path"),
            ("a:", "cp: a: there is no path after the colon"),
        ] {
            assert_eq!(place(word), means, "{word}");
        }
    }
}
