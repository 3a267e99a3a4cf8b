//! What the tests of this crate need: a directory that goes away, and a server that says what it is told to.

use super::Home;
use crate::api::{Answer, Greeting, Line, PROTOCOL, Reply, Request};
use nix::unistd::mkdtemp;
use serde::Serialize;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs, thread};

/// An empty directory, removed when this is dropped.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        Self(mkdtemp(&env::temp_dir().join("offshoot-test-XXXXXX")).expect("make a temporary directory"))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Serves `home` until the process ends: greets, answers by `answer`, and echoes bytes once that says `Stream`.
pub(crate) fn serve(home: &Home, lost: &[&str], answer: impl Fn(Request) -> Reply + Send + Sync + 'static) {
    let listener = UnixListener::bind(home.socket().unwrap()).unwrap();
    let lost = lost.iter().map(ToString::to_string).collect();
    let (protocol, version) = (PROTOCOL, env!("CARGO_PKG_VERSION").into());
    let greeting = Greeting { protocol, version, pid: std::process::id() as i32, lost };
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for connection in listener.incoming() {
            let (greeting, answer) = (greeting.clone(), answer.clone());
            thread::spawn(move || converse(connection?, greeting, &*answer));
        }
    });
}

fn converse(mut socket: UnixStream, greeting: Greeting, answer: &dyn Fn(Request) -> Reply) -> io::Result<()> {
    say(&mut socket, &Line::<_>::Ok(greeting))?;
    let mut lines = BufReader::new(socket.try_clone()?);
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 {
        let reply = answer(serde_json::from_str(&line)?);
        say(&mut socket, &Line::from(&reply))?;
        if matches!(reply, Ok(Answer::Stream)) {
            socket.write_all(b"prompt> ")?;
            return io::copy(&mut lines, &mut socket).map(drop);
        }
        line.clear();
    }
    Ok(())
}

fn say(socket: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    // In two pieces, as a stream may.
    let line = serde_json::to_string(message)? + "\n";
    let (head, tail) = line.split_at(line.len() / 2);
    socket.write_all(head.as_bytes())?;
    socket.write_all(tail.as_bytes())
}
