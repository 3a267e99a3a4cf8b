//! **QEMU**: Debian's `qemu-system-x86`, machine `microvm`, with the same guest: booted by its PVH note, saved to a file,
//! restored with `-incoming`.

use crate::stats::us;
use crate::{Result, fail};
use nix::unistd::mkdtemp;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a restored guest is asked: what is typed before it is there, is lost.
const KNOCK: Duration = Duration::from_millis(1);

/// A guest of QEMU's, saved.
pub struct Qemu {
    directory: PathBuf,
    mib: u64,
}

impl Qemu {
    /// Boots a guest of so many MiB, has it write `pages` pages, and saves it. None where there is no QEMU.
    pub fn save(mib: u64, pages: u64) -> Result<Option<Self>> {
        let found = Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if found.is_err_and(|error| error.kind() == ErrorKind::NotFound) {
            return Ok(None);
        }
        // A saved guest does not belong into memory.
        let directory = mkdtemp("/var/tmp/offshoot-bench-XXXXXX")?;
        let this = Self { directory, mib };
        fs::write(this.path("guest.elf"), firmware::ELF)?;
        let socket = this.path("qmp");
        let mut machine = this.start(&["-qmp", &format!("unix:{socket},server=on,wait=off")])?;
        machine.hear("> ", None)?;
        machine.input.write_all(format!("fill 64 {pages} 1\r").as_bytes())?;
        machine.hear("ok filled", None)?;
        machine.hear("> ", None)?;
        Control::connect(&socket)?.save(&this.path("saved"))?;
        Ok(Some(this))
    }

    /// Boots a guest of the same size: µs to its prompt.
    pub fn boot(&self) -> Result<f64> {
        let start = Instant::now();
        let mut machine = self.start(&[])?;
        machine.hear("> ", None)?;
        Ok(us(start.elapsed()))
    }

    /// Restores the saved guest: µs to its first answer.
    pub fn restore(&self) -> Result<f64> {
        let start = Instant::now();
        let mut machine = self.start(&["-incoming", &format!("exec:cat {}", self.path("saved"))])?;
        machine.hear("> ", Some("\r"))?;
        Ok(us(start.elapsed()))
    }

    fn start(&self, more: &[&str]) -> Result<Machine> {
        let mut child = Command::new(PROGRAM)
            .args(["-M", "microvm,x-option-roms=off,isa-serial=on", "-accel", "kvm", "-nodefaults", "-no-user-config"])
            // A feature that some hosts' KVM tells of and does not take.
            .args(["-cpu", "host,-arch-capabilities", "-display", "none", "-monitor", "none", "-serial", "stdio"])
            .args(["-m", &self.mib.to_string(), "-kernel", &self.path("guest.elf")])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let input = child.stdin.take().ok_or("no pipe")?;
        let mut output = child.stdout.take().ok_or("no pipe")?;
        let (sender, screen) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 256];
            while let Ok(len @ 1..) = output.read(&mut bytes) {
                if sender.send(bytes[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Machine { child, input, screen })
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A QEMU that runs. It ends when this is dropped.
struct Machine {
    child: Child,
    input: ChildStdin,
    screen: Receiver<Vec<u8>>,
}

impl Machine {
    /// Waits until the guest has printed that; types something again and again meanwhile.
    fn hear(&mut self, what: &str, knock: Option<&str>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut text = String::new();
        while !text.contains(what) {
            if let Some(knock) = knock {
                self.input.write_all(knock.as_bytes())?;
            }
            match self.screen.recv_timeout(if knock.is_some() { KNOCK } else { PATIENCE }) {
                Ok(bytes) => text += &String::from_utf8_lossy(&bytes),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(_) => return fail(format!("QEMU's guest does not say {what:?}, but {text:?}")),
            }
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended, or is ended now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// QEMU's machine protocol.
struct Control(BufReader<UnixStream>);

impl Control {
    fn connect(socket: &str) -> Result<Self> {
        let mut this = Self(BufReader::new(UnixStream::connect(socket)?));
        this.ask("qmp_capabilities", json!({}))?;
        Ok(this)
    }

    fn save(&mut self, file: &str) -> Result<()> {
        self.ask("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 34 }))?;
        self.ask("migrate", json!({ "uri": format!("exec:cat > {file}") }))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.ask("query-migrate", json!({}))?["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => return fail("QEMU cannot save its guest"),
                _ if Instant::now() > deadline => return fail("QEMU does not save its guest"),
                _ => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// What a command returns; events on the way do not matter.
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{request}")?;
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return fail(format!("QEMU has ended before {command}"));
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                return fail(format!("QEMU: {command}: {error}"));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}
