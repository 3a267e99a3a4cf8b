//! `top`, in a real pseudo terminal: it fits, and whatever ends it, the terminal is as it was.

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use offshoot_tests::process::children_of;
use offshoot_tests::{TEN_SECONDS, TestHome, wait_until};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

/// `offshoot top` on a terminal.
struct Top {
    child: Child,
    keyboard: File,
    /// Kept open, so that what is left of the terminal can be looked at.
    terminal: OwnedFd,
    before: Termios,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Top {
    fn start(home: &TestHome, columns: u16, rows: u16) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave: terminal } = openpty(Some(&size), None).expect("make a terminal");
        let before = tcgetattr(&terminal).expect("a terminal has a mode");
        let side = || Stdio::from(terminal.try_clone().expect("duplicate a descriptor"));
        let mut top = home.command(&["top", "--interval", "0.1"]);
        let child = top.stdin(side()).stdout(side()).stderr(side()).spawn().expect("start a command");
        let mut screen = File::from(master.try_clone().expect("duplicate a descriptor"));
        let shown = Arc::new(Mutex::new(Vec::new()));
        let of_reader = Arc::clone(&shown);
        // It ends with the terminal's last user.
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                of_reader.lock().expect("nobody panics").extend_from_slice(&buffer[..count]);
            }
        });
        Self { child, keyboard: master.into(), terminal, before, shown }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().expect("nobody panics")).into_owned()
    }

    fn wait_for(&self, what: &str) {
        wait_until(what, TEN_SECONDS, || self.text().contains(what));
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).expect("a mode").local_flags.contains(LocalFlags::ICANON)
    }

    fn key(&mut self, key: u8) {
        self.keyboard.write_all(&[key]).expect("press a key");
    }

    /// Waits for its end: its exit code, and that nothing of it is left on the terminal. What it has shown.
    #[track_caller]
    fn ends(mut self, code: i32) -> String {
        let mut ended = None;
        wait_until("top ends", TEN_SECONDS, || {
            ended = self.child.try_wait().expect("wait for a command");
            ended.is_some()
        });
        self.wait_for("\x1b[?1049l");
        let text = self.text();
        assert_eq!(ended.and_then(|status| status.code()), Some(code), "{text:?}");
        assert_eq!(tcgetattr(&self.terminal).expect("a mode"), self.before);
        for (on, off) in [("\x1b[?1049h", "\x1b[?1049l"), ("\x1b[?25l", "\x1b[?25h")] {
            assert!(text.find(on) < text.rfind(off) && text.matches(on).count() == 1, "{text:?}");
            assert_eq!(text.matches(off).count(), 1, "{text:?}");
        }
        text
    }
}

/// What each frame has in its lines, without what only moves the cursor.
fn frames(text: &str) -> Vec<Vec<String>> {
    let frames = text.split("\x1b[H").skip(1).map(|frame| frame.split("\x1b[J").next().unwrap_or_default());
    frames.map(|frame| frame.split("\r\n").map(|line| line.replace("\x1b[K", "")).collect()).collect()
}

fn family() -> Option<TestHome> {
    let home = TestHome::new()?;
    home.cli(&["launch", "a", "--memory", "32M"]).good();
    home.cli(&["fork", "a", "--count", "3"]).good();
    home.cli(&["fork", "a-1"]).good();
    Some(home)
}

/// By keys and by signals, and when the server is gone.
#[test]
fn whatever_ends_it_the_terminal_is_as_it_was() {
    let Some(home) = family() else { return };
    for key in *b"q\x03" {
        let mut top = Top::start(&home, 100, 24);
        top.wait_for("a-3");
        assert!(top.is_raw());
        top.key(b'x');
        top.key(key);
        top.ends(0);
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        let top = Top::start(&home, 100, 24);
        top.wait_for("a-3");
        // The child is `timeout`, and the command its child.
        let pid = children_of(top.child.id() as i32)[0];
        kill(Pid::from_raw(pid), signal).expect("send a signal");
        top.ends(128 + signal as i32);
    }
    let top = Top::start(&home, 100, 24);
    top.wait_for("a-3");
    home.cli(&["shutdown"]).good();
    let text = top.ends(1);
    let (_, after) = text.rsplit_once("\x1b[?1049l").expect("the screen is left");
    assert!(after.contains("offshoot: "), "what went wrong is told where it stays: {text:?}");
}

#[test]
fn it_fits_the_terminal() {
    let Some(home) = family() else { return };
    for (columns, rows) in [(120, 30), (80, 24), (40, 10), (20, 6), (5, 2)] {
        let mut top = Top::start(&home, columns, rows);
        wait_until("some frames", TEN_SECONDS, || frames(&top.text()).len() > 3);
        top.key(b'q');
        let text = top.ends(0);
        for frame in frames(&text) {
            assert!(frame.len() <= rows.into(), "{columns}×{rows}: {frame:?}");
            for line in &frame {
                assert!(line.chars().count() < columns.into(), "{columns}×{rows}: {line:?}");
                assert!(!line.chars().any(char::is_control), "{columns}×{rows}: {line:?}");
            }
        }
    }
}

/// New VMs come into the tree, and those that are gone leave it.
#[test]
fn it_goes_on_with_what_happens() {
    let Some(home) = family() else { return };
    let mut top = Top::start(&home, 100, 24);
    top.wait_for("a-3");
    home.cli(&["fork", "a-2", "--name", "late"]).good();
    top.wait_for("late-1");
    home.cli(&["rm", "late-1"]).good();
    let is_last = |top: &Top| {
        frames(&top.text()).iter().rev().nth(1).is_some_and(|frame| frame.iter().all(|line| !line.contains("late-1")))
    };
    wait_until("it is gone", TEN_SECONDS, || is_last(&top));
    top.key(b'q');
    let text = top.ends(0);
    let forks = frames(&text).iter().any(|frame| frame[0].contains("forks ") && !frame[0].contains("forks 0/s"));
    assert!(forks, "the fork is among the figures: {text:?}");
}

#[test]
fn once_goes_into_a_pipe() {
    let Some(home) = family() else { return };
    let out = home.cli(&["top", "--once", "--interval", "0.1"]).good();
    assert!(out.lines().all(|line| line.chars().count() < 80), "{out}");
    assert!(!out.contains('\x1b'), "{out:?}");
    for what in ["5 VMs", "forks 0/s", "in stores", "├─ a-1", "│  └─ a-4", "└─ a-3", "FAULTS/s"] {
        assert!(out.contains(what), "{what}: {out}");
    }
    assert!(home.cli(&["top"]).failure(2).contains("--once"));
}
