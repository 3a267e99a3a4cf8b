//! `ps` and `kill` of programs in a Linux guest, beside those of VMs.

use super::args::{Kill, Names, Ps};
use super::each;
use super::errors::CliError;
use super::reach::{running, with_agent};
use super::{Done, SUCCESS, look, show, shown};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::time::Duration;
use vmm::client::ClientBuilder;
use vmm::client::agent::{Exit, Session};
use vmm::plain;

/// Lists the sessions of a guest, or VMs.
pub fn ps(ps: Ps, server: ClientBuilder, out: &mut impl Write) -> Done {
    let Ps { name, quiet, output } = ps;
    let Some(name) = name else {
        return if quiet { look::names(server, out) } else { look::list(server, output, out) };
    };
    with_agent(server, &name, |agent| {
        let sessions = agent.sessions()?;
        if quiet {
            sessions.iter().try_for_each(|session| writeln!(out, "{}", session.id))?;
            return Ok(SUCCESS);
        }
        let all: Vec<Value> = sessions.iter().map(told).collect();
        shown(output, out, &all, |out| table(out, &sessions))
    })
}

/// What a session is to programs.
fn told(session: &Session) -> Value {
    let argv: Vec<_> = session.argv.iter().map(|word| String::from_utf8_lossy(word)).collect();
    let (code, signal, timed_out) = match session.exit {
        None => (None, None, false),
        Some(Exit::Code(code)) => (Some(code), None, false),
        Some(Exit::Signal(signal)) => (None, Some(signal), false),
        Some(Exit::TimedOut) => (None, None, true),
    };
    json!({
        "session": session.id,
        "pid": session.pid,
        "age_ms": session.age_ms,
        "attached": session.attached,
        "terminal": session.terminal,
        "running": session.exit.is_none(),
        "exit_code": code,
        "exit_signal": signal,
        "timed_out": timed_out,
        "argv": argv,
    })
}

fn table(out: &mut impl Write, sessions: &[Session]) -> io::Result<()> {
    let mut table = show::table(["SESSION", "PID", "AGE", "STATE", "TTY", "COMMAND"]);
    for session in sessions {
        let words: Vec<String> =
            session.argv.iter().map(|word| plain::line(&String::from_utf8_lossy(word), plain::REASON_MAX)).collect();
        let tty = if session.terminal { "yes" } else { "-" };
        table.add_row([
            session.id.to_string(),
            session.pid.to_string(),
            age(Duration::from_millis(session.age_ms)),
            state(session),
            tty.into(),
            words.join(" "),
        ]);
    }
    show::write_table(out, &mut table, &[0, 1, 2])
}

fn state(session: &Session) -> String {
    match session.exit {
        None if session.attached => "attached".into(),
        None => "running".into(),
        Some(Exit::Code(code)) => format!("exit {code}"),
        Some(Exit::Signal(signal)) => format!("signal {signal}"),
        Some(Exit::TimedOut) => "timed out".into(),
    }
}

/// In the largest unit that it has at least one of.
fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    let units = [(86_400, "d"), (3600, "h"), (60, "m")];
    match units.into_iter().find(|&(unit, _)| seconds >= unit) {
        Some((unit, name)) => format!("{}{name}", seconds / unit),
        None => format!("{seconds}s"),
    }
}

/// Ends VMs, or sends a signal to a session in one.
pub fn kill(Kill { names, output }: Kill, server: ClientBuilder, out: &mut impl Write) -> Done {
    let Some(target) = Target::of(&names)? else {
        return each::vm(server, Names { names, output }, out, |vm| vm.kill());
    };
    let Target { name, session, signal } = target;
    // Numbers are names, too. Whoever meant that VM must not be told that all is well.
    if let Ok(client) = running(server.clone())?
        && client.list()?.iter().any(|vm| vm.name == names[1])
    {
        let why =
            format!("kill: {session} means a session in {name}, but is also the name of a VM: kill that by itself");
        return Err(CliError::bad_input(why).about(name));
    }
    with_agent(server, &name, |agent| {
        agent.signal(session, signal)?;
        if output.json {
            show::json(out, &json!({ "done": [name] }))?;
        }
        Ok(SUCCESS)
    })
}

/// A session, and what is sent to it.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    name: String,
    session: u32,
    signal: u8,
}

impl Target {
    /// The session that these words mean, if they do not mean VMs.
    fn of(words: &[String]) -> Result<Option<Self>, CliError> {
        let [name, session, rest @ ..] = words else { return Ok(None) };
        if !session.bytes().all(|byte| byte.is_ascii_digit()) {
            return Ok(None);
        }
        let bad = |why: String| Err(CliError::bad_input(format!("kill: {why}")).about(name));
        let Ok(session) = session.parse() else { return bad(format!("{session} is no session")) };
        let signal = match rest {
            [] => Signal::SIGKILL as u8,
            [signal] => match signal_of(signal) {
                Some(signal) => signal,
                None => return bad(format!("{signal:?} is no signal; write TERM, SIGTERM or 15")),
            },
            _ => return bad(format!("a session in {name} gets one signal at a time")),
        };
        Ok(Some(Self { name: name.clone(), session, signal }))
    }
}

fn signal_of(text: &str) -> Option<u8> {
    if let Ok(number) = text.parse() {
        return Some(number).filter(|number| (1..=64).contains(number));
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    name.parse::<Signal>().ok().map(|signal| signal as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(line: &str) -> Result<Option<(String, u32, u8)>, String> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let told = |target: Target| (target.name, target.session, target.signal);
        Target::of(&words).map(|target| target.map(told)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_number_after_a_name_is_a_session() {
        for vms in ["a", "a b", "a b 3", "3", "a b-1 TERM"] {
            assert_eq!(target(vms), Ok(None), "{vms}");
        }
        assert_eq!(target("a 3"), Ok(Some(("a".into(), 3, 9))));
        for signal in ["15", "TERM", "SIGTERM", "term"] {
            assert_eq!(target(&format!("a 3 {signal}")), Ok(Some(("a".into(), 3, 15))), "{signal}");
        }
        for wrong in ["a 3 b", "a 3 0", "a 3 65", "a 3 TERM INT", "a 99999999999", "a 3 4 5"] {
            assert!(target(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_a_guest_calls_its_programs_does_nothing_to_a_terminal() {
        let session = Session {
            id: 1,
            pid: 2,
            age_ms: 7_300_000,
            attached: false,
            terminal: true,
            exit: None,
            argv: vec![b"sh\x1b]0;owned\x07".to_vec(), b"a\nb\xff".to_vec()],
        };
        let mut out = Vec::new();
        table(&mut out, &[session]).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("1    2   2h  running  yes  sh\\u{1b}]0;owned\\u{7} a\\nb\u{fffd}"), "{text}");
        assert_eq!(text.lines().count(), 2);
    }
}
