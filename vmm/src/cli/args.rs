//! What can be written on the command line.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;
use vmm::api::{DEFAULT_MEMORY, MIN_MEMORY};
use vmm::name::{NameError, check_name};
use vmm::server::AutoBalloon;
use vmm::units::{ByteSize, SizeError};

/// Launch a microVM and fork it while it runs.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
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

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed (or the guest answered `err`), 2 bad input and nothing has \
                          changed, 3 timed out.";

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Launch a VM and print its name
    Launch(Launch),
    /// Fork a VM while it runs, and print its children, one a line
    Fork(Fork),
    /// Send a line to the guest and print its answer: exit code 0 for `ok`, 1 for `err`, 3 on time-out
    ///
    /// A Linux guest gives no answer: the line is typed on its serial console, and --expect waits for what it prints.
    Send {
        #[arg(value_parser = vm_name)]
        name: String,
        /// The line; several words are joined by spaces
        #[arg(required = true)]
        text: Vec<String>,
        /// Type the line on the serial console, wait until this pattern (a regular expression) is in what is printed after
        /// it, and print the lines it is in; the echo of the line itself does not count
        #[arg(long, value_name = "REGEX", value_parser = regex::Regex::new)]
        expect: Option<regex::Regex>,
        /// How long to wait for the answer
        #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
        timeout: Duration,
    },
    /// Attach the terminal to a VM's serial console; Ctrl-] leaves
    ///
    /// With a pipe as input there is no key to leave: the console is left when the input has ended and the guest has
    /// been quiet for a second.
    Console {
        #[arg(value_parser = vm_name)]
        name: String,
    },
    /// Print what the guest has printed, and its answers that nobody waited for
    Logs {
        #[arg(value_parser = vm_name)]
        name: String,
        /// Go on with what comes, until the VM ends
        #[arg(short, long)]
        follow: bool,
    },
    /// List the VMs
    Ls {
        #[command(flatten)]
        output: Output,
    },
    /// Draw the fork tree with each VM's private, shared and total pages
    Tree {
        #[command(flatten)]
        output: Output,
    },
    /// Print the figures of all VMs, or of one, and of the server
    Stats {
        #[arg(value_parser = vm_name)]
        name: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Have a guest give memory back until it has SIZE left, and print what it has; exit code 3 on time-out
    ///
    /// The same takes memory out of the balloon again. What the guest gives back reads zero when it uses it again. A Linux
    /// guest does this in its own time, and goes on after a time-out.
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
    /// Stop a VM's vCPUs
    Pause {
        #[arg(value_parser = vm_name)]
        name: String,
    },
    /// Let them run again
    Resume {
        #[arg(value_parser = vm_name)]
        name: String,
    },
    /// Ask the guest to power off, without waiting for it
    Stop {
        #[arg(value_parser = vm_name)]
        name: String,
    },
    /// Wait until a VM is off; exit code 1 if it died instead, 3 on time-out
    Wait {
        #[arg(value_parser = vm_name)]
        name: String,
        /// How long to wait [default: for ever]
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        timeout: Option<Duration>,
        #[command(flatten)]
        output: Output,
    },
    /// End VMs and forget them
    Rm {
        #[arg(value_parser = vm_name, required_unless_present = "all", conflicts_with = "all")]
        names: Vec<String>,
        /// All there are
        #[arg(long)]
        all: bool,
    },
    /// Print everything about a VM
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
    #[command(allow_missing_positional = true)]
    Reclaim {
        /// The VM; its whole family counts
        #[arg(value_parser = vm_name, required_unless_present = "all", conflicts_with = "all")]
        name: Option<String>,
        /// How much
        #[arg(required = true)]
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
    Budget {
        #[arg(value_name = "SIZE", value_parser = budget)]
        set: Option<Budget>,
        #[command(flatten)]
        output: Output,
    },
    /// Run the server in the foreground; the first command starts one in the background otherwise
    Serve(Serve),
    /// End all VMs and the server
    Shutdown,
    /// Print the version
    Version {
        #[command(flatten)]
        output: Output,
    },
    /// Tell what this host allows, and what follows; exit code 1 if it cannot run VMs
    Doctor {
        #[command(flatten)]
        output: Output,
    },
    /// Check the live server's invariants; exit code 1 if one does not hold
    Check {
        #[command(flatten)]
        output: Output,
    },
    /// Launch, fill, fork, write, fork again, verify every page, show what it cost, clean up
    ///
    /// Uses a server of its own, unless --home is given.
    Demo,
    /// The zygote, which makes the process of each VM; the server starts it, with a socket as standard input
    #[command(hide = true)]
    VmProcess,
}

#[derive(Debug, Args)]
pub struct Output {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Launch {
    /// Its name: letters, digits, '.', '_' and '-', 64 at most [default: vm-1, vm-2, …]
    #[arg(value_parser = vm_name)]
    pub name: Option<String>,
    /// Its memory: bytes, or with K, M or G; at least 16M, and a multiple of 4K
    #[arg(short, long, value_name = "SIZE", default_value_t = ByteSize(DEFAULT_MEMORY), value_parser = guest_memory)]
    pub mem: ByteSize,
    /// Its virtual CPUs; the built-in guest has one, a Linux guest from 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vcpus: u8,
    /// Attach the terminal to its console; Ctrl-] leaves
    #[arg(long)]
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
}

#[derive(Debug, Args)]
pub struct Fork {
    /// The parent, running or paused
    #[arg(value_parser = vm_name)]
    pub name: String,
    /// How many children
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub count: u32,
    /// Children are called PREFIX-1, PREFIX-2, … [default: the parent's name]
    #[arg(long = "name", value_name = "PREFIX", value_parser = vm_name)]
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
          value_parser = clap::value_parser!(u64).range(1..=HINT_MS_MAX))]
    pub hint_free: Option<u64>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Serve {
    /// Where evicted pages go once they do not fit into memory: a file, which is emptied, or a block device; SIZE is how
    /// much of it to use [default: a file in the home, while the server runs; as large as the host's memory twice, if
    /// the disk has room]
    #[arg(long, value_name = "PATH[:SIZE]", value_parser = swap_place)]
    pub swap: Option<SwapPlace>,
    /// How much memory compressed pages may take before they go to the disk [default: a quarter of the host's memory]
    #[arg(long, value_name = "SIZE")]
    pub compressed: Option<ByteSize>,
    /// The memory budget, as of `offshoot budget` [default: none]
    #[arg(long, value_name = "SIZE", value_parser = budget_size)]
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

/// A budget as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget(pub Option<ByteSize>);

/// A file or a block device, and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapPlace {
    pub path: PathBuf,
    pub size: Option<ByteSize>,
}

fn budget(text: &str) -> Result<Budget, String> {
    match text {
        "none" => Ok(Budget(None)),
        size => budget_size(size).map(|size| Budget(Some(size))),
    }
}

fn budget_size(text: &str) -> Result<ByteSize, String> {
    let size = text.parse::<ByteSize>().map_err(|e| e.to_string())?;
    at_least(size, MIN_MEMORY, "a budget")
}

fn swap_place(text: &str) -> Result<SwapPlace, String> {
    let (path, size) = match text.rsplit_once(':') {
        None => (text, None),
        Some((path, size)) => {
            let size = size.parse::<ByteSize>().map_err(|e| format!("{size:?}: {e}"))?;
            (path, Some(at_least(size, MIN_SWAP, "a swap file")?))
        }
    };
    if path.is_empty() {
        return Err("no path".into());
    }
    Ok(SwapPlace { path: path.into(), size })
}

/// A fork waits no longer than this for free pages.
const HINT_MS_MAX: u64 = 10_000;

/// The smallest swap file.
const MIN_SWAP: u64 = 1 << 20;

fn at_least(size: ByteSize, least: u64, what: &str) -> Result<ByteSize, String> {
    if size.0 >= least { Ok(size) } else { Err(format!("{what} has at least {}, and this is {size}", ByteSize(least))) }
}

fn vm_name(text: &str) -> Result<String, NameError> {
    check_name(text).map(|()| text.to_owned())
}

fn guest_memory(text: &str) -> Result<ByteSize, SizeError> {
    text.parse::<ByteSize>()?.as_guest_memory()
}

fn seconds(text: &str) -> Result<Duration, &'static str> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|time| !time.is_zero()).ok_or("not a number of seconds above 0, like 5 or 0.5")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_makes_sense() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_the_issue_shows_is_understood() {
        for line in [
            "offshoot launch",
            "offshoot launch base -m 1G --vcpus 1 --attach --rm",
            "offshoot launch --mem 64M --home /tmp/x",
            "offshoot --home /tmp/x --log-level debug fork base --count 3 --name w --wait-settled --paused --json",
            "offshoot fork base --hint-free",
            "offshoot fork --hint-free base",
            "offshoot fork base --hint-free=20 --json",
            "offshoot send base verify 64 10 1 --timeout 0.5",
            "offshoot logs base --follow",
            "offshoot ls --json",
            "offshoot balloon base 64M --timeout 5 --json",
            "offshoot rm a b",
            "offshoot rm --all",
            "offshoot stats base --json",
            "offshoot reclaim base 64M",
            "offshoot reclaim --all 64M --json",
            "offshoot reclaim 64M --all",
            "offshoot budget",
            "offshoot budget none",
            "offshoot budget 1G --json",
            "offshoot serve --swap /x/swap:1G --compressed 64M --memory 1G",
            "offshoot serve --swap /x/a:b:1G --compressed 0",
            "offshoot serve --swap /x/swap",
            "offshoot serve --auto-balloon off",
            "offshoot serve --auto-balloon idle --balloon-idle 2.5",
            "offshoot serve --answer-within 0.5",
            "offshoot vm-process",
        ] {
            parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }

    #[test]
    fn what_makes_no_sense_is_not() {
        for line in [
            "offshoot launch a/b",
            "offshoot launch --mem 0",
            "offshoot launch --mem 3",
            "offshoot launch --mem 16777217",
            "offshoot launch --mem 99999999999G",
            "offshoot launch --initrd x",
            "offshoot launch --vcpus 256",
            "offshoot balloon base",
            "offshoot balloon base 15M",
            "offshoot fork base --count 0",
            "offshoot fork base --count -1",
            "offshoot fork base --name x/y",
            "offshoot fork",
            "offshoot fork base --hint-free=0",
            "offshoot fork base --hint-free=10001",
            "offshoot fork base --hint-free=soon",
            "offshoot send base",
            "offshoot send base hello --timeout 0",
            "offshoot send base hello --timeout nan",
            "offshoot send base hello --timeout 1e99",
            "offshoot rm",
            "offshoot rm a --all",
            "offshoot reclaim",
            "offshoot reclaim 64M",
            "offshoot reclaim base",
            "offshoot reclaim --all",
            "offshoot reclaim base 64Q",
            "offshoot reclaim base 64M --all",
            "offshoot budget x",
            "offshoot budget 3",
            "offshoot serve --swap /x/swap:y",
            "offshoot serve --swap /x/swap:",
            "offshoot serve --swap /x/swap:4K",
            "offshoot serve --swap :1G",
            "offshoot serve --compressed much",
            "offshoot serve --memory 1",
            "offshoot serve --auto-balloon maybe",
            "offshoot serve --balloon-idle 0",
            "offshoot serve --answer-within 0",
            "offshoot serve --answer-within soon",
            "offshoot fly",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
