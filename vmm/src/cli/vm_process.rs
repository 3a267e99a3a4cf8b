//! The zygote and, by way of it, the process of each VM. The server starts it with their socket as standard input.

use super::Done;
use super::errors::CliError;
use super::serve::close_all_but_standard;
use nix::sys::socket::{UnixAddr, getsockname};
use nix::unistd::dup2_stdin;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

pub fn run() -> Done {
    // A crate that the server uses leaves its descriptors open.
    close_all_but_standard()?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let is_socket = getsockname::<UnixAddr>(socket.as_raw_fd());
    if is_socket.is_err() {
        return Err(CliError::bad_input("vm-process: standard input is no socket: only the server can start this"));
    }
    // No VM process is to have the zygote's socket.
    dup2_stdin(io::stdout())?;
    vmm::machine::zygote_main(socket)
}
