//! The process of one VM. The server starts it with their socket as standard input.

use super::Done;
use super::errors::CliError;
use nix::sys::socket::{UnixAddr, getsockname};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

pub fn run() -> Done {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let is_socket = getsockname::<UnixAddr>(socket.as_raw_fd());
    if is_socket.is_err() {
        return Err(CliError::bad_input("vm-process: standard input is no socket: only the server can start this"));
    }
    vmm::machine::vm_process_main(socket)
}
