//! `top`: the tree of VMs again and again, with what each has of memory and how often it faults.

mod frame;

use super::errors::CliError;
use super::reach::running;
use super::signals::{self, Signals};
use super::terminal::{OutputMode, OwnScreen, RawMode, Size};
use super::{Done, SUCCESS};
use frame::Sample;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;
use std::io::{self, IsTerminal, Stdin, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};
use vmm::client::{Client, ClientBuilder};

/// Ctrl-C, where it is a key like others.
const INTERRUPT: u8 = 3;
/// How soon we look whether the terminal has another size, in milliseconds.
const LOOK: u64 = 200;

/// Shows frames until somebody has seen enough, or one frame.
pub fn run(server: ClientBuilder, pause: Duration, once: bool, out: &mut impl Write) -> Done {
    let stdin = io::stdin();
    let (to_terminal, from_terminal) = (io::stdout().is_terminal(), stdin.is_terminal());
    if !once && !to_terminal {
        return Err(CliError::bad_input("top: standard output is no terminal; --once prints one frame"));
    }
    let client = match running(server)? {
        Ok(client) => client,
        Err(absent) => {
            absent.note();
            return Ok(SUCCESS);
        }
    };
    let before = sample(&client)?;
    if once {
        thread::sleep(pause);
        let size = if to_terminal { Size::of(io::stdout()) } else { Size::USUAL };
        let size = Size { rows: usize::MAX, ..size };
        let lines = frame::lines(&before, &sample(&client)?, size);
        lines.iter().try_for_each(|line| writeln!(out, "{line}"))?;
        return Ok(SUCCESS);
    }
    let signals = Signals::catch()?;
    // Dropped in the opposite order, on whatever way out.
    let _raw = from_terminal.then(|| RawMode::enter(OutputMode::AsItWas)).transpose()?;
    let _screen = OwnScreen::enter(out)?;
    show(&client, before, pause, Keys { signals: &signals, stdin: from_terminal.then_some(&stdin) }, out)
}

/// What ends it.
struct Keys<'a> {
    signals: &'a Signals,
    /// None once there is nothing to be read.
    stdin: Option<&'a Stdin>,
}

fn sample(client: &Client) -> Result<Sample, CliError> {
    Ok(Sample { stats: client.stats()?, at: Instant::now() })
}

fn show(client: &Client, mut before: Sample, pause: Duration, mut keys: Keys, out: &mut impl Write) -> Done {
    let mut now = before.clone();
    loop {
        let drawn = Size::of(io::stdout());
        draw(out, &frame::lines(&before, &now, drawn))?;
        let next = now.at + pause;
        while Instant::now() < next && Size::of(io::stdout()) == drawn {
            if let Some(end) = keys.wait(next.saturating_duration_since(Instant::now()))? {
                return Ok(end);
            }
        }
        // A terminal of another size shows the same figures at once.
        if Instant::now() >= next {
            before = std::mem::replace(&mut now, sample(client)?);
        }
    }
}

/// Line over line, so that nothing flickers; what else was there goes.
fn draw(out: &mut impl Write, lines: &[String]) -> io::Result<()> {
    let mut all = String::from("\x1b[H");
    for (at, line) in lines.iter().enumerate() {
        all += if at > 0 { "\n" } else { "" };
        all += line;
        all += "\x1b[K";
    }
    out.write_all(all.as_bytes())?;
    out.write_all(b"\x1b[J")?;
    out.flush()
}

impl Keys<'_> {
    /// Waits for a moment. The exit code, if that is the end.
    fn wait(&mut self, patience: Duration) -> Result<Option<ExitCode>, CliError> {
        let mut watched = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        watched.extend(self.stdin.map(|stdin| PollFd::new(stdin.as_fd(), PollFlags::POLLIN)));
        let patience = (patience.as_millis() as u64 + 1).min(LOOK) as u16;
        poll(&mut watched, PollTimeout::from(patience))?;
        let stirred: Vec<bool> = watched.iter().map(|fd| fd.any() == Some(true)).collect();
        if stirred[0]
            && let Some(signal) = self.signals.take()?
        {
            return Ok(Some(signals::exit(signal)));
        }
        if stirred.get(1) == Some(&true)
            && let Some(stdin) = self.stdin
        {
            let mut typed = [0; 64];
            match read(stdin, &mut typed)? {
                0 => self.stdin = None,
                count if typed[..count].iter().any(|&key| matches!(key, b'q' | b'Q' | INTERRUPT)) => {
                    return Ok(Some(SUCCESS));
                }
                _ => {}
            }
        }
        Ok(None)
    }
}
