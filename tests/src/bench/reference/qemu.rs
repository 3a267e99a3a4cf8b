//! **QEMU**: Debian's `qemu-system-x86`, machine `microvm`, with the same guest: booted by its PVH note, saved to a file,
//! restored with `-incoming`.

use crate::home::wait;
use crate::stats::us;
use crate::{Result, fail};
use nix::unistd::mkdtemp;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(30);
/// How often QEMU is asked whether it has restored its guest.
const LOOK: Duration = Duration::from_millis(1);

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
        let mut machine = this.start(&[])?;
        machine.hear("> ")?;
        machine.input.write_all(format!("fill 64 {pages} 1\r").as_bytes())?;
        machine.hear(&format!("ok filled={pages}\r\n> ")).map_err(|e| format!("save: {e}"))?;
        this.control()?.save(&this.path("saved"))?;
        Ok(Some(this))
    }

    /// Boots a guest of the same size: µs to its prompt.
    pub fn boot(&self) -> Result<f64> {
        let start = Instant::now();
        let mut machine = self.start(&[])?;
        machine.hear("> ").map_err(|e| format!("boot: {e}"))?;
        Ok(us(start.elapsed()))
    }

    /// Restores the saved guest: µs to its first answer. What is typed before it runs would be lost.
    pub fn restore(&self) -> Result<f64> {
        let start = Instant::now();
        let mut machine = self.start(&["-incoming", &format!("exec:cat {}", self.path("saved"))])?;
        self.control()?.await_running()?;
        machine.input.write_all(b"\r")?;
        machine.hear("> ").map_err(|e| format!("restore: {e}"))?;
        Ok(us(start.elapsed()))
    }

    fn start(&self, more: &[&str]) -> Result<Machine> {
        // The socket of the one before, which may not have been there.
        let _ = fs::remove_file(self.path("qmp"));
        let mut child = Command::new(PROGRAM)
            .args(["-M", "microvm,x-option-roms=off,isa-serial=on", "-accel", "kvm", "-nodefaults", "-no-user-config"])
            // A feature that some hosts' KVM tells of and does not take.
            .args(["-cpu", "host,-arch-capabilities", "-display", "none", "-monitor", "none", "-serial", "stdio"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", self.path("qmp"))])
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

    /// The machine protocol of the QEMU that was started last.
    fn control(&self) -> Result<Control> {
        let stream = wait("QEMU listens", || UnixStream::connect(self.path("qmp")).ok())?;
        let mut control = Control(BufReader::new(stream));
        control.ask("qmp_capabilities", json!({}))?;
        Ok(control)
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
    /// Waits until the guest has printed that.
    fn hear(&mut self, what: &str) -> Result<()> {
        let mut text = String::new();
        while !text.contains(what) {
            match self.screen.recv_timeout(PATIENCE) {
                Ok(bytes) => text += &String::from_utf8_lossy(&bytes),
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
    fn await_running(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.ask("query-status", json!({}))?["running"] != true {
            if Instant::now() > deadline {
                return fail("QEMU does not restore its guest");
            }
            thread::sleep(LOOK);
        }
        Ok(())
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
