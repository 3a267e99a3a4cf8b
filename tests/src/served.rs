//! A server with options of its own.

use crate::{TEN_SECONDS, TestHome, wait_until};
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::process::Child;

/// A server in the foreground, in a home where there is none yet. Its log is where that of one in the background would
/// be. It ends with its home.
#[derive(Debug)]
pub struct Served(Child);

impl Served {
    /// Starts it, and waits until it listens.
    #[track_caller]
    pub fn new(home: &TestHome, options: &[&str]) -> Self {
        DirBuilder::new().mode(0o700).create(home.path()).expect("make the home");
        let log = File::create(home.path().join("server.log")).expect("make the log");
        let arguments = [&["serve"], options].concat();
        let server = home.command(&arguments).stderr(log).spawn().expect("start a server");
        wait_until("the server listens", TEN_SECONDS, || home.path().join("socket").exists());
        Self(server)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It ends with its home, or is the home's to complain of.
        let _ = self.0.try_wait();
    }
}
