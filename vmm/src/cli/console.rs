//! A VM's serial console on this terminal.

use super::errors::tell;
use super::signals::{self, Signals};
use super::terminal::{OutputMode, RawMode};
use super::{Done, SUCCESS};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use vmm::api::VmState;
use vmm::client::Vm;

/// Ctrl-]: leaves the console.
const LEAVE: u8 = 0x1d;
/// How long the guest must be quiet, in milliseconds, before a console whose input has ended is left.
const QUIET: u16 = 1000;

/// What is typed goes to the guest, and what it says is shown, until the leave key, a signal, or the VM's end.
pub fn attach(vm: &Vm, signals: &Signals, out: &mut impl Write) -> Done {
    let mut console = vm.console()?;
    let stdin = io::stdin();
    let is_terminal = stdin.is_terminal();
    let name = vm.name();
    if is_terminal {
        tell(&format!("console of {name}; Ctrl-] leaves"));
    }
    if vm.summary()?.state == VmState::Paused {
        tell(&format!("{name} is paused: it reads what is typed after `offshoot resume {name}`"));
    }
    let _raw = is_terminal.then(|| RawMode::enter(OutputMode::AsItWas)).transpose()?;
    let _line = is_terminal.then(|| NewLine);
    let mut typing = true;
    let mut buffer = [0; 4096];
    loop {
        let poll_in = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut ready = vec![poll_in(console.as_fd()), poll_in(signals.as_fd())];
        if typing {
            ready.push(poll_in(stdin.as_fd()));
        }
        let patience = match () {
            () if !console.buffered().is_empty() => PollTimeout::ZERO,
            () if typing => PollTimeout::NONE,
            () => QUIET.into(),
        };
        let count = poll(&mut ready, patience)?;
        let is_ready = |index: usize| ready.get(index).is_some_and(|fd| fd.any() == Some(true));
        let (output, signal, input) = (is_ready(0) || !console.buffered().is_empty(), is_ready(1), is_ready(2));
        if count == 0 && !output {
            return Ok(SUCCESS);
        }
        if signal && let Some(signal) = signals.take()? {
            return Ok(signals::exit(signal));
        }
        if output {
            match console.read(&mut buffer)? {
                0 => return Ok(SUCCESS),
                count => out.write_all(&buffer[..count]).and_then(|()| out.flush())?,
            }
        }
        if input {
            let count = read(&stdin, &mut buffer)?;
            let typed = &buffer[..count];
            typing = !typed.is_empty();
            let (typed, leave) = match typed.iter().position(|&byte| is_terminal && byte == LEAVE) {
                Some(end) => (&typed[..end], true),
                None => (typed, false),
            };
            console.write_all(typed)?;
            if leave {
                return Ok(SUCCESS);
            }
        }
    }
}

/// Ends the line that the guest was in, when this is dropped.
struct NewLine;

impl Drop for NewLine {
    fn drop(&mut self) {
        let _ = writeln!(io::stderr());
    }
}
