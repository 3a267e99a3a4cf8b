//! What can be written on the command line.

mod guest;
mod line;
mod values;

pub use guest::{Attach, Cp, Exec, Forward, Kill, Ps};
pub use line::in_order;
pub use values::{Budget, SwapPlace};

use super::Format;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;
use values::{
    budget, budget_size, compressed, duration, guest_memory, number, pattern, seconds, some_pages, swap_place, vm_name,
};
use vmm::api::{DEFAULT_MEMORY, MAX_CHILDREN};
use vmm::server::AutoBalloon;
use vmm::units::ByteSize;

/// Launch a microVM and fork it while it runs.
#[derive(Debug, Parser)]
#[command(name = "offshoot", version, after_help = AFTER_HELP)]
pub struct Cli {
    /// Directory of the server to talk to [default: $OFFSHOOT_HOME, else $XDG_RUNTIME_DIR/offshoot, else
    /// /tmp/offshoot-UID]
    #[arg(long, global = true, value_name = "DIR")]
    pub home: Option<PathBuf>,
    /// How much to say on stderr, and in the log of a server that is started: off, error, warn, info, debug or trace
    #[arg(long, global = true, value_name = "LEVEL", default_value = "warn")]
    pub log_level: log::LevelFilter,
    #[command(subcommand)]
    pub verb: Verb,
}

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 failed (or the guest answered `err`), 2 bad input and nothing has changed, 3 timed out. Where a
command takes several names, each is done, whatever becomes of the others: then 1 if only some failed. `exec` and `attach`
end with the exit code of the program.

Examples:
  offshoot launch base
  offshoot fork base --count 3
  offshoot tree";

/// Lines for the end of a verb's help. A test runs each of them, on VMs that are called `base`, `base-1` and `base-2`.
fn examples(lines: &[&str]) -> String {
    format!("Examples:\n  offshoot {}", lines.join("\n  offshoot "))
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Launch a VM and print its name
    #[command(after_help = examples(&["launch", "launch web --memory 0.5G --ttl 10m", "launch --rm --json"]))]
    Launch(Launch),
    /// Fork a VM while it runs, and print its children, one a line
    ///
    /// Children are called after the first VM of their family: those of base, of base-1 and of base-2 are all base-N, in the
    /// order of their birth. `offshoot tree` shows who descends from whom.
    #[command(after_help = examples(&["fork base", "fork base worker --ttl 90", "fork base-1 --count 10 --name job --json"]))]
    Fork(Fork),
    /// Send a line to the guest and print its answer: exit code 0 for `ok`, 1 for `err`, 3 on time-out
    ///
    /// A Linux guest gives no answer: the line is typed on its serial console, and --expect waits for what it prints.
    ///
    /// Words that are options of this command are options wherever they stand; all others are the line's, those that begin
    /// with a dash too, and everything after `--`.
    #[command(after_help = examples(&["send base fill 1000 16 7", "send base id --timeout 5 --json", "send base -- id"]))]
    Send {
        #[arg(value_parser = vm_name)]
        name: String,
        /// The line; several words are joined by spaces
        #[arg(required = true)]
        text: Vec<String>,
        /// Type the line on the serial console, wait until this pattern (a regular expression) is in what is printed after
        /// it, and print the lines it is in; the echo of the line itself does not count
        #[arg(long, value_name = "REGEX", value_parser = pattern)]
        expect: Option<regex::Regex>,
        /// How long to wait for the answer
        #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
        timeout: Duration,
        #[command(flatten)]
        output: Output,
    },
    /// Attach the terminal to a VM's serial console; Ctrl-] leaves
    ///
    /// With a pipe as input there is no key to leave: the console is left when the input has ended and the guest has
    /// been quiet for a second.
    #[command(after_help = examples(&["console base"]))]
    Console {
        #[arg(value_parser = vm_name)]
        name: String,
    },
    /// Run a program in a Linux guest, and end with its exit code
    ///
    /// Its output and its errors come here as it writes them. What follows NAME is the program's, also what begins with a dash.
    ///
    /// The exit code is the program's, 128 and the number of the signal that ended it, or 124 if its time was over; 127 where there
    /// is no such program, 126 where it cannot be executed, and 125 where it was not run for another reason. SIGINT, SIGTERM,
    /// SIGHUP and SIGQUIT are passed on to it; the third leaves it. With -i and -t, Ctrl-P Ctrl-Q leaves it. A program that is
    /// left runs on: `offshoot attach` follows it again.
    #[command(after_help = examples(&["exec base uname -r", "exec -w /tmp -e LEVEL=3 base sh -c true", "exec -d base sleep 60"]))]
    Exec(Exec),
    /// Follow a program that runs in a Linux guest, in place of whoever does; the last 64 KiB that it wrote come first
    ///
    /// Exit codes, signals and keys are those of `exec`.
    #[command(after_help = examples(&["attach --no-stdin base 1"]))]
    Attach(Attach),
    /// List the programs that `exec` started in a Linux guest: those that run, and those whose end nobody has seen
    ///
    /// A VM that was forked has those that its parent had. Without a name, this is `offshoot ls`.
    #[command(after_help = examples(&["ps base", "ps base --json", "ps"]))]
    Ps(Ps),
    /// Copy files and directories to or from a Linux guest
    ///
    /// What is copied goes below TO if that is a directory, and becomes TO otherwise, in a directory that there must be. Of a
    /// directory whose path ends with /. the contents are copied. Symbolic links are copied as such. Modes and times stay, owners
    /// too if root writes. Nothing is written outside of TO, whatever the guest sends.
    #[command(after_help = examples(&["cp /etc/hosts base:/var/hosts", "cp base:/etc/passwd /var/passwd", "cp base:/etc/passwd -"]))]
    Cp(Cp),
    /// Have TCP ports of this host's loopback lead to ports of a Linux guest's, until Ctrl-C or another signal
    ///
    /// The ports are printed, one a line, when connections are taken. Those that are open at the end are cut.
    #[command(after_help = examples(&["forward base 0:80", "forward base 0:80 0:5432 --json"]))]
    Forward(Forward),
    /// Print what the guest has printed, and its answers that nobody waited for
    #[command(after_help = examples(&["logs base", "logs base --tail 10"]))]
    Logs {
        #[arg(value_parser = vm_name)]
        name: String,
        /// Go on with what comes, until the VM ends
        #[arg(short, long)]
        follow: bool,
        /// Only the last LINES of what there is
        #[arg(short = 'n', long, value_name = "LINES", value_parser = number(0..=u64::MAX))]
        tail: Option<u64>,
    },
    /// List the VMs
    #[command(visible_alias = "list", after_help = examples(&["ls", "ls -q", "ls --json"]))]
    Ls {
        /// Only their names, one a line
        #[arg(short, long, conflicts_with = "json")]
        quiet: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Draw the fork tree with what each VM has in memory: of its own, shared with others, and in all
    #[command(after_help = examples(&["tree", "tree base-1", "tree --json"]))]
    Tree {
        /// Only this VM and those that descend from it
        #[arg(value_parser = vm_name)]
        name: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Print the figures of all VMs, or all the figures of one, and of the server
    #[command(after_help = examples(&["stats", "stats base --json", "stats --prometheus"]))]
    Stats {
        #[arg(value_parser = vm_name)]
        name: Option<String>,
        /// Again and again, every so many seconds, until Ctrl-C
        #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "1",
              value_parser = seconds)]
        watch: Option<Duration>,
        /// The server's totals, and how long its answers took by verb, in the text format of Prometheus
        #[arg(long, conflicts_with_all = ["name", "watch", "json"])]
        prometheus: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Show the tree with what each VM has of memory and how often it faults, until q or Ctrl-C
    #[command(after_help = examples(&["top --once", "top --once --interval 0.5"]))]
    Top {
        /// How often to look
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
        interval: Duration,
        /// Print what has happened in one interval, and end
        #[arg(long)]
        once: bool,
    },
    /// Have a guest give memory back until it has SIZE left, and print what it has; exit code 3 on time-out
    ///
    /// The same takes memory out of the balloon again. What the guest gives back reads zero when it uses it again. A Linux
    /// guest does this in its own time, and goes on after a time-out.
    #[command(after_help = examples(&["balloon base 64M"]))]
    Balloon {
        #[arg(value_parser = vm_name)]
        name: String,
        /// What it is to have left: at least 16M, and not more than its memory
        #[arg(value_parser = guest_memory)]
        size: ByteSize,
        /// How long to wait
        #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
        timeout: Duration,
        #[command(flatten)]
        output: Output,
    },
    /// Stop the vCPUs of VMs
    #[command(after_help = examples(&["pause base", "pause base-1 base-2"]))]
    Pause(Names),
    /// Let them run again
    #[command(visible_alias = "unpause", after_help = examples(&["resume base", "resume base-1 base-2"]))]
    Resume(Names),
    /// Ask guests to power off, without waiting for it
    #[command(after_help = examples(&["stop base", "stop base-1 base-2"]))]
    Stop(Names),
    /// End VMs at once, without asking their guests; or send a signal to a program in a Linux guest
    ///
    /// VMs stay listed, as dead, until `rm`.
    ///
    /// Where the second word is a number, it names one that `ps NAME` lists: the signal, KILL if none is named, goes to all its
    /// processes, and the VM goes on.
    #[command(override_usage = "offshoot kill NAME...\n       offshoot kill NAME SESSION [SIGNAL]",
              after_help = examples(&["kill base-1 base-2", "kill base 1 HUP"]))]
    Kill(Kill),
    /// Wait until VMs are off; exit code 1 if one died instead, 3 on time-out
    #[command(after_help = examples(&["stop base", "wait base --timeout 10"]))]
    Wait {
        #[arg(required = true, value_name = "NAME", value_parser = vm_name)]
        names: Vec<String>,
        /// How long to wait for all of them [default: for ever]
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        timeout: Option<Duration>,
        #[command(flatten)]
        output: Output,
    },
    /// End VMs at once, and forget them
    ///
    /// Those that are there are removed, whatever other names there are: exit code 1 if some were not there, 2 if none was.
    #[command(after_help = examples(&["rm base-1", "rm base-2 base", "rm --all"]))]
    Rm {
        #[arg(value_parser = vm_name, required_unless_present = "all", conflicts_with = "all")]
        names: Vec<String>,
        /// All there are
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Print everything about a VM
    #[command(after_help = examples(&["inspect base", "inspect base --json"]))]
    Inspect {
        #[arg(value_parser = vm_name)]
        name: String,
        #[command(flatten)]
        output: Output,
    },
    /// Take memory of VMs out to swap, cold pages first, and print how much it came to
    ///
    /// Frozen pages, which clones share, go first, the oldest before others; then what VMs have written themselves: they
    /// stand still for it as for a fork. Pages come back when they are touched. It is no error if it came to less.
    #[command(allow_missing_positional = true, after_help = examples(&["reclaim base 64M", "reclaim --all 64M"]))]
    Reclaim {
        /// The VM; its whole family counts
        #[arg(value_parser = vm_name, required_unless_present = "all", conflicts_with = "all")]
        name: Option<String>,
        /// How much
        #[arg(required = true, value_parser = some_pages)]
        size: ByteSize,
        /// Of all VMs
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Print the memory budget of the server, or set it: a size, or `none`
    ///
    /// What counts is what VMs have in memory, compressed or not. When it comes near the budget, memory is reclaimed, that
    /// of paused and idle VMs first; VMs that write faster than that are stopped for moments.
    #[command(after_help = examples(&["budget", "budget 1G", "budget none"]))]
    Budget {
        #[arg(value_name = "SIZE", value_parser = budget)]
        set: Option<Budget>,
        #[command(flatten)]
        output: Output,
    },
    /// Run the server in the foreground; the first command starts one in the background otherwise
    ///
    /// It ends as by `offshoot shutdown` on SIGTERM, SIGINT and SIGHUP, also as process 1 of a container, and tells systemd
    /// when it is ready (Type=notify).
    #[command(after_help = examples(&["serve", "serve --swap /var/swapfile:8G --compressed 512M --memory 1G"]))]
    Serve(Serve),
    /// End all VMs and the server
    #[command(after_help = examples(&["shutdown"]))]
    Shutdown,
    /// Print the version
    #[command(after_help = examples(&["version", "version --json"]))]
    Version {
        #[command(flatten)]
        output: Output,
    },
    /// Tell what this host allows, and what follows; exit code 1 if it cannot run VMs
    #[command(after_help = examples(&["doctor", "doctor --json"]))]
    Doctor {
        #[command(flatten)]
        output: Output,
    },
    /// Check the live server's invariants; exit code 1 if one does not hold
    #[command(after_help = examples(&["check", "check --json"]))]
    Check {
        #[command(flatten)]
        output: Output,
    },
    /// Launch, fill, fork, write, fork again, verify every page, show what it cost, clean up
    ///
    /// Uses a server of its own, unless --home is given.
    #[command(after_help = examples(&["demo", "demo --svg tree.svg"]))]
    Demo {
        /// Draw the tree of its VMs, and whose the memory of each is, into this file
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    /// Print what a shell needs to complete commands
    #[command(after_help = examples(&["completions bash", "completions zsh", "completions fish"]))]
    Completions {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Print a man page, or write those of all commands into a directory
    #[command(after_help = examples(&["man", "man fork", "man --dir man1"]))]
    Man {
        /// The command [default: offshoot itself]
        verb: Option<String>,
        /// Write offshoot.1, offshoot-launch.1 and so on there
        #[arg(long, value_name = "DIR", conflicts_with = "verb")]
        dir: Option<PathBuf>,
    },
    /// The zygote, which makes the process of each VM; the server starts it, with a socket as standard input
    #[command(hide = true)]
    VmProcess,
}

impl Verb {
    /// Whether the answer is to be JSON, and with it what goes wrong.
    pub fn is_json(&self) -> bool {
        match self {
            Self::Launch(Launch { output, .. }) | Self::Fork(Fork { output, .. }) => output.json,
            Self::Send { output, .. } | Self::Ls { output, .. } | Self::Tree { output, .. } => output.json,
            Self::Stats { output, .. } | Self::Balloon { output, .. } | Self::Wait { output, .. } => output.json,
            Self::Rm { output, .. } | Self::Inspect { output, .. } | Self::Reclaim { output, .. } => output.json,
            Self::Budget { output, .. } | Self::Version { output } | Self::Doctor { output } => output.json,
            Self::Check { output } => output.json,
            Self::Pause(names) | Self::Resume(names) | Self::Stop(names) => names.output.json,
            Self::Kill(Kill { output, .. }) => output.json,
            Self::Ps(Ps { output, .. }) | Self::Forward(Forward { output, .. }) => output.json,
            Self::Exec(_) | Self::Attach(_) | Self::Cp(_) => false,
            Self::Console { .. }
            | Self::Logs { .. }
            | Self::Top { .. }
            | Self::Serve(_)
            | Self::Shutdown
            | Self::Demo { .. } => false,
            Self::Completions { .. } | Self::Man { .. } | Self::VmProcess => false,
        }
    }
}

#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// Print JSON, on stderr too: what fails is an object {"error": {"kind", "message", "subject"}} on a line of its own
    #[arg(long)]
    pub json: bool,
}

impl Output {
    pub fn format(self) -> Format {
        if self.json { Format::Json } else { Format::Plain }
    }
}

#[derive(Debug, Args)]
pub struct Names {
    #[arg(required = true, value_name = "NAME", value_parser = vm_name)]
    pub names: Vec<String>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Launch {
    /// Its name: letters, digits, '.', '_' and '-', 64 at most, '.' and '-' not as the first [default: vm-1, vm-2, …]
    #[arg(value_parser = vm_name)]
    pub name: Option<String>,
    /// Its memory: bytes, or with K, M or G, like 256M, 256MiB or 0.25G; at least 16M, and a multiple of 4K
    #[arg(short, long, alias = "mem", value_name = "SIZE", default_value_t = ByteSize(DEFAULT_MEMORY),
          value_parser = guest_memory)]
    pub memory: ByteSize,
    /// Its virtual CPUs; the built-in guest has one, a Linux guest from 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = number(0..=u8::MAX))]
    pub vcpus: u8,
    /// Attach the terminal to its console; Ctrl-] leaves
    #[arg(long, conflicts_with = "json")]
    pub attach: bool,
    /// Remove it when it is off
    #[arg(long)]
    pub rm: bool,
    /// A Linux kernel instead of the built-in guest: a bzImage, as distributions ship it, or an ELF file
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line [default: console=ttyS0 panic=-1]
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub cmdline: Option<String>,
    /// Put the agent into the Linux guest, with the modules of its kernel that it takes: those beside the kernel, as in an
    /// unpacked package, or this host's of that version. Without --initrd it is the guest's init, otherwise it runs beside that
    #[arg(long, requires = "kernel")]
    pub agent: bool,
    /// End it after so long, whether it runs or not: seconds, or a number with ms, s, m, h or d. What is forked from it ends
    /// with it, unless the fork says otherwise
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub ttl: Option<Duration>,
    /// How many VMs may descend from it at a time, whoever forks them; those that have ended count until `rm`
    #[arg(long, value_name = "N", value_parser = number(0..=u32::MAX))]
    pub max_children: Option<u32>,
    /// Make a socket by which programs of the host reach ports of the Linux guest's vsock, in the way of Firecracker: `CONNECT
    /// PORT`; the guest's own connections to port N of the host go to PATH_N. With {name} in it, each VM that descends from this
    /// one has one, with its name there
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub vsock: Option<PathBuf>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Fork {
    /// The parent, running or paused
    #[arg(value_parser = vm_name)]
    pub name: String,
    /// What the child is to be called, or each of several
    #[arg(value_name = "CHILD", value_parser = vm_name, conflicts_with_all = ["count", "prefix"])]
    pub children: Vec<String>,
    /// How many children
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = number(1..=MAX_CHILDREN))]
    pub count: u32,
    /// Children are called PREFIX-1, PREFIX-2, … [default: the name of the first VM of the family]
    #[arg(long = "name", visible_alias = "prefix", value_name = "PREFIX", value_parser = vm_name)]
    pub prefix: Option<String>,
    /// Return when all moved pages have settled; `copied_pages` and `gap_pages` are known then
    #[arg(long)]
    pub wait_settled: bool,
    /// Leave the children paused
    #[arg(long)]
    pub paused: bool,
    /// Have a Linux guest tell of its free pages first, which are neither copied nor shared then; the fork waits for that for
    /// MS milliseconds at most
    #[arg(long, value_name = "MS", num_args = 0..=1, require_equals = true, default_missing_value = "100",
          value_parser = number(1..=HINT_MS_MAX))]
    pub hint_free: Option<u64>,
    /// Return when the agents of the children, Linux guests, have heard that these are children and have random numbers, names
    /// and clocks of their own; after MS milliseconds at most, and with exit code 3 if not all have
    #[arg(long, value_name = "MS", num_args = 0..=1, require_equals = true, default_missing_value = "10000",
          value_parser = number(1..=AGENT_MS_MAX), conflicts_with = "paused")]
    pub wait_agent: Option<u64>,
    /// End each child after so long, like 90, 1.5h or 2d [default: when the parent ends by its own --ttl]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub ttl: Option<Duration>,
    #[command(flatten)]
    pub output: Output,
}

/// A fork waits no longer than this for agents.
const AGENT_MS_MAX: u64 = 600_000;
/// A fork waits no longer than this for free pages.
const HINT_MS_MAX: u64 = 10_000;

#[derive(Debug, Args)]
pub struct Serve {
    /// Where evicted pages go once they do not fit into memory: a file, which must be empty or an earlier server's, or a
    /// block device; SIZE is how much of it to use [default: a file in the home, while the server runs; as large as the host's memory twice, if
    /// the disk has room]
    #[arg(long, value_name = "PATH[:SIZE]", value_parser = swap_place)]
    pub swap: Option<SwapPlace>,
    /// Take --swap's file or device even if it holds something that is no server's, which is lost then
    #[arg(long, requires = "swap")]
    pub force: bool,
    /// How much memory compressed pages may take before they go to the disk; 0 for none [default: a quarter of the host's
    /// memory]
    #[arg(long, value_name = "SIZE", value_parser = compressed)]
    pub compressed: Option<ByteSize>,
    /// The memory budget, as of `offshoot budget` [default: none]
    #[arg(short, long, visible_alias = "budget", alias = "mem", value_name = "SIZE", value_parser = budget_size)]
    pub memory: Option<ByteSize>,
    /// When idle Linux guests give what they can spare to their balloons, until they run again
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = WhenIdle::Pressure)]
    pub auto_balloon: WhenIdle,
    /// A VM that has used next to no processor time for so long is idle
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub balloon_idle: Duration,
    /// What becomes of VMs where their processes cannot be kept apart from the host and from each other
    #[arg(long, value_name = "HOW", value_enum, default_value_t = IsolationWanted::Strict)]
    pub isolation: IsolationWanted,
    /// A VM whose process does not answer for so long, or a few times as long where the host is behind, is dead
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub answer_within: Duration,
    /// Have idle processors of the host poll instead of halting during forks, which makes these faster in a virtual machine;
    /// takes /dev/cpu_dma_latency
    #[arg(long)]
    pub low_latency: bool,
    /// How many VMs there may be, those that have ended and are still listed included [default: any number]
    #[arg(long, value_name = "N", value_parser = number(1..=u32::MAX))]
    pub max_vms: Option<u32>,
    /// Leave the terminal, and leave quietly where there is a server already
    #[arg(long, hide = true)]
    pub background: bool,
}

/// What becomes of VMs where their processes cannot be kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IsolationWanted {
    /// They are not launched
    Strict,
    /// They run with as much of it as can be had
    Weaker,
}

impl From<IsolationWanted> for vmm::server::Strictness {
    fn from(wanted: IsolationWanted) -> Self {
        match wanted {
            IsolationWanted::Strict => Self::Strict,
            IsolationWanted::Weaker => Self::Weaker,
        }
    }
}

/// When balloons of idle VMs are inflated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WhenIdle {
    /// Never
    Off,
    /// When memory comes near the budget, or the host is short of it
    Pressure,
    /// Always
    Idle,
}

impl From<WhenIdle> for AutoBalloon {
    fn from(when: WhenIdle) -> Self {
        match when {
            WhenIdle::Off => Self::Off,
            WhenIdle::Pressure => Self::Pressure,
            WhenIdle::Idle => Self::Idle,
        }
    }
}

#[cfg(test)]
mod tests;
