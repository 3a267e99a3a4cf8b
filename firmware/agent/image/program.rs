//! A program that is to run: whose it is, where, and with what.

use crate::System;
use crate::session::file;
use crate::sys;
use crate::users;
use agent::message::{Failed, FailedKind, Start};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::{Command, Stdio};

/// Where programs are looked for. The last has what the agent gives guests.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/offshoot/bin";

/// A program that can be started.
pub struct Program {
    pub command: Command,
    pub terminal: Option<File>,
    pub input: Option<File>,
    /// Its standard output, or terminal, and its standard error.
    pub outputs: Vec<File>,
}

pub fn prepare(start: &Start, system: &System) -> Result<Program, Failed> {
    let bad = |why: String| Failed::new(FailedKind::Bad, why);
    let (Some(name), arguments) = (start.argv.first().filter(|name| !name.is_empty()), start.argv.iter().skip(1))
    else {
        return Err(bad("there is no program to run".into()));
    };
    if start.argv.iter().chain(&start.env).any(|text| text.contains(&0)) {
        return Err(bad("an argument has a zero byte in it".into()));
    }
    let who = String::from_utf8_lossy(start.user.as_deref().unwrap_or(b"0")).into_owned();
    let user = users::find(&system.root, &who)?;
    if start.user.is_some() && !sys::is_root() {
        // Never as somebody else than was asked for.
        return Err(bad(format!("the agent is not root, and cannot run a program as {who:?}")));
    }
    let mut command = Command::new(OsStr::from_bytes(name));
    command.args(arguments.map(|argument| OsStr::from_bytes(argument)));
    command.env_clear().env("PATH", PATH).env("HOME", &user.home);
    if let Some(name) = &user.name {
        command.env("USER", name);
    }
    if start.terminal.is_some() {
        command.env("TERM", "xterm");
    }
    for variable in &start.env {
        let equals = variable.iter().position(|&byte| byte == b'=').filter(|&at| at > 0);
        let equals = equals.ok_or_else(|| bad(format!("{:?} is no KEY=VALUE", String::from_utf8_lossy(variable))))?;
        command.env(OsStr::from_bytes(&variable[..equals]), OsStr::from_bytes(&variable[equals + 1..]));
    }
    let cwd = match &start.cwd {
        Some(cwd) => {
            let cwd = OsString::from_vec(cwd.clone());
            match fs::metadata(&cwd) {
                Ok(metadata) if metadata.is_dir() => cwd,
                Ok(_) => return Err(bad(format!("{cwd:?} is no directory of the guest"))),
                Err(e) => return Err(bad(format!("{cwd:?} in the guest: {e}"))),
            }
        }
        None if fs::metadata(&user.home).is_ok_and(|home| home.is_dir()) => user.home.clone().into(),
        None => "/".into(),
    };
    command.current_dir(cwd);
    let trouble = |e: io::Error| Failed::io("streams of a program", &e);
    let ids = sys::is_root().then_some(user.ids);
    match start.terminal {
        Some(size) => {
            let open = OpenOptions::new().read(true).write(true).open("/dev/ptmx");
            let master = open.map_err(|e| Failed::io("/dev/ptmx", &e))?;
            let slave = file(sys::terminal_of(&master).map_err(|e| Failed::io("a terminal", &e))?);
            sys::resize(&master, size.rows, size.columns).map_err(trouble)?;
            // One open file for both ways.
            sys::never_wait(&master).map_err(trouble)?;
            let copy = |file: &File| file.try_clone().map_err(trouble);
            command.stdin(copy(&slave)?).stdout(copy(&slave)?).stderr(slave);
            sys::detach(&mut command, true, ids);
            let (input, output) = (copy(&master)?, copy(&master)?);
            Ok(Program { command, terminal: Some(master), input: Some(input), outputs: vec![output] })
        }
        None => {
            let mut input = None;
            command.stdin(Stdio::null());
            if start.stdin {
                let (theirs, ours) = io::pipe().map_err(trouble)?;
                command.stdin(theirs);
                input = Some(file(ours));
            }
            let (out, out_end) = io::pipe().map_err(trouble)?;
            let (err, err_end) = io::pipe().map_err(trouble)?;
            command.stdout(out_end).stderr(err_end);
            sys::detach(&mut command, false, ids);
            Ok(Program { command, terminal: None, input, outputs: vec![file(out), file(err)] })
        }
    }
}

/// Why a program could not be started.
pub fn refusal(name: &[u8], e: &io::Error) -> Failed {
    const EPERM: i32 = 1;
    const EAGAIN: i32 = 11;
    const ENOMEM: i32 = 12;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const E2BIG: i32 = 7;
    let kind = match e.raw_os_error() {
        _ if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => FailedKind::NoProgram,
        Some(E2BIG) => FailedKind::Bad,
        Some(EPERM | EAGAIN | ENOMEM | ENFILE | EMFILE) => FailedKind::Guest,
        _ => FailedKind::NotExecutable,
    };
    let why = format!("{}: {e}", String::from_utf8_lossy(name));
    Failed { errno: e.raw_os_error().unwrap_or(0), ..Failed::new(kind, why) }
}
