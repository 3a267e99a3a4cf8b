//! What Offshoot is measured against: small programs, each run in a process of its own, which answer lines with figures.
//!
//! This program runs itself for that, with `--as NAME` as its first arguments. A reference ends with its standard input,
//! and so with who asked for it.

mod bare_launch;
mod busy;
mod fault;
mod floor;
mod in_process;
mod move_out;
mod plain_copy;
mod qemu;
mod remapped;

pub use qemu::Qemu;

use crate::{Result, fail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader, Write, stdin, stdout};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fmt, thread};

/// A program: its name, and what runs it.
type Program = (&'static str, fn(&[u64]) -> Result<()>);

const PROGRAMS: [Program; 8] = [
    ("bare-launch", bare_launch::run),
    ("busy", busy::run),
    ("fault", fault::run),
    ("floor", floor::run),
    ("in-process", in_process::run),
    ("move-out", move_out::run),
    ("plain-copy", plain_copy::run),
    ("remapped", remapped::run),
];

/// The word that makes this program one of them.
pub const AS: &str = "--as";

/// Runs the program of that name.
pub fn run(name: &str, arguments: &[String]) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    let (_, program) = PROGRAMS.iter().find(|(known, _)| *known == name).ok_or("no such reference")?;
    let numbers: std::result::Result<Vec<u64>, _> = arguments.iter().map(|argument| argument.parse()).collect();
    program(&numbers?)
}

/// Says that it is there, then answers lines, a word and numbers, until there are no more.
fn serve(mut answer: impl FnMut(&str, &[u64]) -> Result<Vec<f64>>) -> Result<()> {
    say("ok")?;
    for line in stdin().lines() {
        let line = line?;
        let mut words = line.split(' ');
        let verb = words.next().unwrap_or_default();
        let numbers: std::result::Result<Vec<u64>, _> = words.map(str::parse).collect();
        match numbers.map_err(Into::into).and_then(|numbers| answer(verb, &numbers)) {
            Ok(figures) => {
                let figures: Vec<String> = figures.iter().map(|figure| format!(" {figure}")).collect();
                say(&format!("ok{}", figures.concat()))?;
            }
            Err(error) => say(&format!("err {}", error.to_string().replace('\n', " ")))?,
        }
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// Numbers that a program needs.
fn numbers<const N: usize>(given: &[u64]) -> Result<[u64; N]> {
    given.try_into().or_else(|_| fail(format!("{N} numbers are wanted, not {given:?}")))
}

/// A reference that runs.
#[derive(Debug)]
pub struct Reference {
    name: &'static str,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Reference {
    /// Starts one, and waits until it is there.
    pub fn start(name: &'static str, arguments: &[u64]) -> Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .args([AS, name])
            .args(arguments.iter().map(ToString::to_string))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take().ok_or("no pipe")?);
        let mut this = Self { name, child, input, output: BufReader::new(output) };
        this.hear()?;
        Ok(this)
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Asks it for something.
    pub fn ask(&mut self, line: impl fmt::Display) -> Result<Vec<f64>> {
        let input = self.input.as_mut().ok_or("no pipe")?;
        input.write_all(format!("{line}\n").as_bytes())?;
        self.hear()
    }

    /// Asks it for one figure.
    pub fn figure(&mut self, line: impl fmt::Display) -> Result<f64> {
        self.ask(line)?.first().copied().ok_or_else(|| "a reference answers nothing".into())
    }

    fn hear(&mut self) -> Result<Vec<f64>> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        match line.trim_end().strip_prefix("ok") {
            Some(figures) => Ok(figures.split_whitespace().map(str::parse).collect::<std::result::Result<_, _>>()?),
            None if line.is_empty() => fail(format!("reference {}: it has ended", self.name)),
            None => fail(format!("reference {}: {}", self.name, line.trim_end())),
        }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        self.input = None;
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                // It may be gone by now.
                let _ = self.child.kill();
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}
