//! `exec` and `attach`: a program in a guest, with this command's input, output, terminal and signals.

use super::args::{Attach, Exec};
use super::errors::{CliError, tell};
use super::reach::with_agent;
use super::signals::{Signals, exit_code};
use super::terminal::{self, LeaveKeys, OutputMode, RawMode};
use super::{Done, SUCCESS};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::read;
use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::process;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use vmm::client::agent::{Agent, AgentErrorKind, Event, Input, Running, Size};
use vmm::client::{ClientBuilder, Error};

/// Exit codes as docker has them: the program was not run, it cannot be executed, there is none.
const NOT_RUN: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NO_PROGRAM: u8 = 127;
/// So many signals leave a program that does not end by them.
const SIGNALS_TO_LEAVE: u32 = 3;
/// Bytes of input that are read at a time.
const INPUT: usize = 32 << 10;

pub fn exec(exec: Exec, server: ClientBuilder, out: &mut impl Write) -> Done {
    let env = variables(&exec.env)?;
    let typed = exec.interactive && !exec.detach;
    if exec.tty && typed && !io::stdin().is_terminal() {
        return Err(CliError::bad_input("exec: -i with -t takes what is typed on a terminal, and the input is none"));
    }
    let watch = Watch::begin()?;
    let done = with_agent(server, &exec.name, |agent| {
        let mut command = agent.command(&exec.command).stdin(exec.interactive);
        for (key, value) in &env {
            command = command.env(key, value);
        }
        if let Some(directory) = &exec.workdir {
            command = command.current_dir(directory);
        }
        if let Some(user) = &exec.user {
            command = command.user(user);
        }
        if let Some(timeout) = exec.timeout {
            command = command.timeout(timeout);
        }
        if exec.tty {
            command = command.terminal(size());
        }
        if exec.detach {
            writeln!(out, "{}", command.detach().map_err(not_run)?)?;
            return Ok(SUCCESS);
        }
        let running = command.spawn().map_err(not_run)?;
        let typing = if typed { Typing::Yes } else { Typing::No };
        follow(&watch, agent, running, Streams { terminal: exec.tty, typing }, out)
    });
    done.map_err(|e| e.or_ending(NOT_RUN))
}

pub fn attach(attach: Attach, server: ClientBuilder, out: &mut impl Write) -> Done {
    let watch = Watch::begin()?;
    let done = with_agent(server, &attach.name, |agent| {
        let session = agent.sessions()?.into_iter().find(|session| session.id == attach.session);
        let terminal = session.is_some_and(|session| session.terminal);
        let running = agent.attach(attach.session)?;
        let typing = if attach.no_stdin { Typing::No } else { Typing::Yes };
        follow(&watch, agent, running, Streams { terminal, typing }, out)
    });
    done.map_err(|e| e.or_ending(NOT_RUN))
}

fn variables(given: &[OsString]) -> Result<Vec<(OsString, OsString)>, CliError> {
    let mut variables = Vec::new();
    for variable in given {
        let bytes = variable.as_bytes();
        let end = bytes.iter().position(|&byte| byte == b'=');
        let key = OsStr::from_bytes(&bytes[..end.unwrap_or(bytes.len())]);
        if key.is_empty() {
            return Err(CliError::bad_input(format!("exec: {variable:?} names no variable; write KEY=VALUE")));
        }
        match end {
            Some(end) => variables.push((key.to_owned(), OsStr::from_bytes(&bytes[end + 1..]).to_owned())),
            None => variables.extend(env::var_os(key).map(|value| (key.to_owned(), value))),
        }
    }
    Ok(variables)
}

/// The size of this terminal.
fn size() -> Size {
    let terminal::Size { columns, rows } = terminal::Size::of(io::stdout());
    let number = |count: usize| count.try_into().unwrap_or(u16::MAX);
    Size { rows: number(rows), columns: number(columns) }
}

fn not_run(e: Error) -> CliError {
    let code = match &e {
        Error::Agent(e) if e.kind == AgentErrorKind::NoProgram => NO_PROGRAM,
        Error::Agent(e) if e.kind == AgentErrorKind::NotExecutable => NOT_EXECUTABLE,
        _ => NOT_RUN,
    };
    CliError::from(e).or_ending(code)
}

/// What a followed program has of ours.
#[derive(Clone, Copy, Debug)]
struct Streams {
    /// It has a terminal.
    terminal: bool,
    typing: Typing,
}

/// Whether it gets this command's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Typing {
    Yes,
    No,
}

/// Passes everything on until the program has ended.
fn follow(watch: &Watch, agent: &Agent, mut running: Running, streams: Streams, out: &mut impl Write) -> Done {
    let (session, input) = (running.session(), running.input());
    let at_terminal = streams.terminal && streams.typing == Typing::Yes && io::stdin().is_terminal();
    let raw = at_terminal.then(|| RawMode::enter(OutputMode::Raw)).transpose()?;
    let (resized, resizes) = mpsc::channel();
    if streams.terminal {
        // Its size may have changed while it was set up, and that of one that is attached to is another's.
        let _ = resized.send(());
        let input = input.clone();
        // A thread of its own, since a program that does not read holds up whoever writes to it.
        thread::Builder::new().spawn(move || resizes.iter().try_for_each(|()| input.resize(size())))?;
    }
    let followed = Followed { agent: agent.clone(), session, raw: raw.clone(), resized };
    watch.follow(followed.clone());
    if streams.typing == Typing::Yes {
        let keys = at_terminal.then(LeaveKeys::default);
        let leaving = followed.clone();
        thread::Builder::new().spawn(move || type_in(input, keys, &leaving))?;
    }
    loop {
        let written = match running.next_event()? {
            Event::Out(bytes) => out.write_all(&bytes).and_then(|()| out.flush()),
            Event::Err(bytes) => io::stderr().write_all(&bytes),
            Event::Exit(status) => return Ok(status.shell().into()),
        };
        match written {
            Ok(()) => {}
            // As on one machine: who writes where nobody reads is told so by a signal.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                let _ = agent.signal(session, Signal::SIGPIPE as u8);
                return Err(CliError::from(e).or_ending(exit_code(Signal::SIGPIPE)));
            }
            Err(e) => return Err(CliError::of_output(e)),
        }
    }
}

/// Passes on what is typed, to its end, or until the keys that leave.
fn type_in(mut input: Input, mut keys: Option<LeaveKeys>, followed: &Followed) {
    let stdin = io::stdin();
    let mut buffer = vec![0; INPUT];
    loop {
        let typed = match read(&stdin, &mut buffer) {
            Ok(0) => break,
            Ok(count) => &buffer[..count],
            Err(Errno::EINTR) => continue,
            // Whoever has it too made it so.
            Err(Errno::EAGAIN) => {
                let _ = poll(&mut [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
                continue;
            }
            Err(_) => break,
        };
        let (typed, leave) = match keys {
            None => (typed.to_vec(), false),
            Some(before) => {
                let (after, typed, leave) = before.on(typed);
                keys = Some(after);
                (typed, leave)
            }
        };
        // A program that has ended takes no more, and this command ends with it.
        if input.write_all(&typed).is_err() {
            return;
        }
        if leave {
            followed.leave(0);
        }
    }
    let _ = input.end();
}

/// The program that is followed, for those who see to signals and input.
#[derive(Clone)]
struct Followed {
    agent: Agent,
    session: u32,
    raw: Option<RawMode>,
    resized: Sender<()>,
}

impl Followed {
    /// Ends this command, and leaves the program.
    fn leave(&self, code: u8) -> ! {
        self.restore();
        let (name, session) = (self.agent.name(), self.session);
        tell(&format!("{name}: session {session} goes on (offshoot attach {name} {session})"));
        process::exit(code.into())
    }

    fn restore(&self) {
        self.raw.iter().for_each(RawMode::leave);
    }

    /// Passes a signal on, on a connection of its own: the one of the program may be full of input.
    fn signal(self, signal: Signal) {
        let passed = self.agent.signal(self.session, signal as u8);
        // One that has ended by now needs none: its end is on its way here.
        if let Err(e) = passed
            && !matches!(e, Error::Agent(_))
        {
            self.restore();
            tell(&e.to_string());
            process::exit(exit_code(signal).into());
        }
    }
}

/// Sees to signals: before there is a program they end this command, and then they are the program's.
struct Watch(Arc<Mutex<Option<Followed>>>);

impl Watch {
    /// From now on. To be called while there is one thread.
    fn begin() -> io::Result<Self> {
        let signals = Signals::catch_and_resizes()?;
        let watch = Self(Arc::default());
        let followed = Arc::clone(&watch.0);
        thread::Builder::new().spawn(move || {
            let mut count = 0;
            while let Ok(signal) = signals.wait() {
                let followed = followed.lock().unwrap_or_else(PoisonError::into_inner).clone();
                match (signal, followed) {
                    (Signal::SIGWINCH, followed) => drop(followed.map(|followed| followed.resized.send(()))),
                    (signal, None) => process::exit(exit_code(signal).into()),
                    (signal, Some(followed)) => {
                        count += 1;
                        if count == SIGNALS_TO_LEAVE {
                            followed.leave(exit_code(signal));
                        }
                        // An agent that does not answer must not keep the next one waiting.
                        thread::spawn(move || followed.signal(signal));
                    }
                }
            }
        })?;
        Ok(watch)
    }

    fn follow(&self, followed: Followed) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(followed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_have_names() {
        let given = |words: &[&str]| variables(&words.iter().map(OsString::from).collect::<Vec<_>>());
        let pair = |key: &str, value: &str| (OsString::from(key), OsString::from(value));
        assert_eq!(given(&["A=b=c", "B="]).unwrap(), [pair("A", "b=c"), pair("B", "")]);
        assert_eq!(given(&["NOBODY_HAS_SET_THIS"]).unwrap(), []);
        assert_eq!(given(&["PATH"]).unwrap()[0].0, "PATH");
        assert!(given(&["=x"]).unwrap_err().to_string().contains("names no variable"));
        assert!(given(&[""]).is_err());
    }
}
