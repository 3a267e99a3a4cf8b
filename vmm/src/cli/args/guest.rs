//! What is done inside Linux guests, by their agent.

use super::Output;
use super::values::{ports, seconds, vm_name};
use clap::Args;
use std::ffi::OsString;
use std::time::Duration;

#[derive(Debug, Args)]
pub struct Exec {
    /// Give the program this command's input; without, it has none
    #[arg(short, long)]
    pub interactive: bool,
    /// Give it a terminal, on which it writes all its output
    #[arg(short, long)]
    pub tty: bool,
    /// Set a variable of its environment; KEY alone takes the value that it has here
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub env: Vec<OsString>,
    /// Its directory in the guest [default: the user's home]
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<OsString>,
    /// Whose it is: a name of the guest's /etc/passwd or a number, also USER:GROUP [default: root]
    #[arg(short, long)]
    pub user: Option<OsString>,
    /// Kill it when it has run for so long, with exit code 124
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// Leave it alone, and print its session, for `attach`
    #[arg(short, long)]
    pub detach: bool,
    #[arg(value_parser = vm_name)]
    pub name: String,
    /// The program and its arguments, to the end of the line
    #[arg(required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub struct Attach {
    /// Give the program no input
    #[arg(long)]
    pub no_stdin: bool,
    #[arg(value_parser = vm_name)]
    pub name: String,
    /// The session, of `ps NAME`
    pub session: u32,
}

#[derive(Debug, Args)]
pub struct Ps {
    /// The Linux guest whose sessions to list; without, VMs are listed
    #[arg(value_parser = vm_name)]
    pub name: Option<String>,
    /// Only their numbers, or the names of VMs, one a line
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Kill {
    #[arg(required = true, value_name = "NAME", value_parser = vm_name)]
    pub names: Vec<String>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Cp {
    /// What to copy: a path here, NAME:PATH in a guest, or - for an archive of `tar` on standard input
    #[arg(value_name = "FROM")]
    pub from: OsString,
    /// Where to: NAME:PATH, a path here, or - for an archive of `tar` on standard output
    #[arg(value_name = "TO")]
    pub to: OsString,
}

#[derive(Debug, Args)]
pub struct Forward {
    #[arg(value_parser = vm_name)]
    pub name: String,
    /// A port of this host, 0 for any that is free, and a port of the guest
    #[arg(required = true, value_name = "HOST:GUEST", value_parser = ports)]
    pub ports: Vec<(u16, u16)>,
    #[command(flatten)]
    pub output: Output,
}
