//! Niceness: how readily a thread gives way to others.
#![allow(unsafe_code)] // getpriority(2) and setpriority(2), which have no safe wrapper

use std::io;

/// How much sooner than guests the server runs. What it does is short, and guests wait for it.
const AHEAD: i32 = 5;

/// This thread's niceness.
pub fn get() -> i32 {
    // SAFETY: The call takes numbers and touches no memory. The caller is there: it cannot fail.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

/// Sets this thread's, and that of threads and processes it makes from now on.
///
/// # Errors
/// `EACCES`: it is lower, and this user may only make it higher.
pub fn set(niceness: i32) -> io::Result<()> {
    // SAFETY: The call takes numbers and touches no memory.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, niceness) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts this thread ahead of guests that have the niceness it had so far, if it may. What that was.
pub fn go_ahead() -> i32 {
    let before = get();
    if let Err(error) = set(before - AHEAD) {
        log::debug!("guests run as soon as the server: {error}");
    }
    before
}
