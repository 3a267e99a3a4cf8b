//! Arguments in; tables, trees or JSON out. What is done in between, the client library does.

mod args;
mod balloon;
mod console;
mod copy;
mod demo;
mod each;
mod errors;
mod exec;
mod forward;
mod look;
mod make;
mod manual;
mod notify;
mod prometheus;
mod reach;
mod serve;
mod sessions;
mod show;
mod signals;
mod talk;
mod terminal;
mod top;
mod vm_process;

use args::{Cli, Output, Verb};
use clap::Parser;
use errors::CliError;
use reach::{with_client, with_server};
use serde_json::json;
use std::io::{self, Write};
use std::process::ExitCode;
use vmm::client::Client;
use vmm::host::HostReport;
use vmm::machine::Voice;
use vmm::units::ByteSize;

/// How a command ends that did not fail.
type Done = Result<ExitCode, CliError>;

const SUCCESS: ExitCode = ExitCode::SUCCESS;
/// Failed, or the guest said `err`.
const FAILED: u8 = 1;
/// Bad input, and nothing has changed.
const BAD_INPUT: u8 = 2;
/// Timed out.
const TIMED_OUT: u8 = 3;

/// How things are told: to people, or to programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Plain,
    Json,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(args::in_order(std::env::args_os())) {
        Ok(cli) => cli,
        Err(e) => return errors::usage(&e),
    };
    let mut logger = env_logger::Builder::new();
    if matches!(cli.verb, Verb::VmProcess) {
        logger.target(env_logger::Target::Pipe(Box::new(Voice)));
    }
    logger.filter_level(cli.log_level).format_timestamp_micros().init();
    let format = if cli.verb.is_json() { Format::Json } else { Format::Plain };
    let done = run(cli).and_then(|code| {
        io::stdout().flush()?;
        Ok(code)
    });
    done.unwrap_or_else(|e| e.report(format))
}

fn run(cli: Cli) -> Done {
    let out = &mut io::stdout().lock();
    // Whatever this binary is called, and whatever became of its file since.
    let mut server = Client::builder().log_level(cli.log_level).binary("/proc/self/exe");
    if let Some(home) = &cli.home {
        server = server.home(home);
    }
    match cli.verb {
        Verb::Launch(launch) => make::launch(launch, server, out),
        Verb::Fork(fork) => make::fork(fork, server, out),
        Verb::Send { name, text, expect, timeout, output } => {
            let line = talk::Line { text: text.join(" "), expect, timeout };
            with_server(server, Some(&name), |client| talk::send(&client.vm(&name), line, output, out))
        }
        Verb::Console { name } => {
            let signals = signals::Signals::catch()?;
            with_server(server, Some(&name), |client| console::attach(&client.vm(&name), &signals, out))
        }
        Verb::Exec(exec) => exec::exec(exec, server, out),
        Verb::Attach(attach) => exec::attach(attach, server, out),
        Verb::Ps(ps) => sessions::ps(ps, server, out),
        Verb::Cp(cp) => copy::cp(&cp, server, out),
        Verb::Forward(forward) => forward::forward(&forward, server, out),
        Verb::Logs { name, follow, tail } => with_server(server, Some(&name), |client| {
            let vm = client.vm(&name);
            talk::copy(if follow { vm.follow_logs(tail)? } else { vm.logs(tail)? }, out)
        }),
        Verb::Ls { quiet: true, output: _ } => look::names(server, out),
        Verb::Ls { quiet: false, output } => look::list(server, output, out),
        Verb::Tree { name, output } => look::tree(server, name, output, out),
        Verb::Stats { prometheus: true, .. } => look::prometheus(server, out),
        Verb::Stats { name, watch: None, output, .. } => look::stats(server, name, output, out),
        Verb::Stats { name, watch: Some(pause), output, .. } => look::watch(server, name, output, pause, out),
        Verb::Top { interval, once } => top::run(server, interval, once, out),
        Verb::Inspect { name, output } => with_server(server, Some(&name), |client| {
            let inspection = client.vm(&name).inspect()?;
            shown(output, out, &inspection, |out| show::inspection(out, &inspection))
        }),
        Verb::Check { output } => look::check(server, output, out),
        Verb::Balloon { name, size, timeout, output } => with_server(server, Some(&name), |client| {
            let balloon = balloon::resize(client, &name, size, timeout)?;
            let (size, given) = (balloon.size_bytes, balloon.balloon_bytes);
            shown(output, out, &balloon, |out| writeln!(out, "{name}: {}", balloon::text(size, given)))
        }),
        Verb::Pause(names) => each::vm(server, names, out, |vm| vm.pause()),
        Verb::Resume(names) => each::vm(server, names, out, |vm| vm.resume()),
        Verb::Stop(names) => each::vm(server, names, out, |vm| vm.stop()),
        Verb::Kill(kill) => sessions::kill(kill, server, out),
        Verb::Wait { names, timeout, output } => each::wait(server, &names, timeout, output, out),
        Verb::Rm { names, all: false, output } => each::remove(server, names, output, out),
        Verb::Rm { all: true, output, .. } => each::remove_all(server, output, out),
        Verb::Reclaim { name, size, all: _, output } => with_server(server, name.as_deref(), |client| {
            let done = match &name {
                Some(name) => client.vm(name).reclaim(size)?,
                None => client.reclaim_all(size)?,
            };
            shown(output, out, &done, |out| writeln!(out, "reclaimed {}", done.reclaimed_bytes))
        }),
        Verb::Budget { set, output } => {
            let act = |client: &Client| {
                let budget = match set {
                    Some(args::Budget(budget)) => client.set_budget(budget)?,
                    None => client.budget()?,
                };
                let floor = ByteSize(budget.floor_bytes).approx();
                let tight = budget.budget_bytes.filter(|bytes| budget.floor_bytes > bytes / 4 * 3);
                // Whoever reads JSON has both numbers, and takes a line on stderr for an error.
                if let Some(bytes) = tight.filter(|_| !output.json) {
                    eprintln!("offshoot: budget: {floor} of {} cannot be taken out of memory", ByteSize(bytes));
                }
                shown(output, out, &budget, |out| match budget.budget_bytes.map(ByteSize) {
                    Some(size) if set.is_none() => writeln!(out, "{size} (floor {floor})"),
                    Some(size) => writeln!(out, "{size}"),
                    None => writeln!(out, "none"),
                })
            };
            // What is set is to stay: for that there must be a server.
            if set.is_some() { with_client(server, act) } else { with_server(server, None, act) }
        }
        Verb::Serve(serve) => serve::run(cli.home.as_deref(), serve),
        Verb::Shutdown => match server.start_server(false).connect() {
            // What is asked for is so.
            Err(vmm::client::Error::NoServer(_)) => Ok(SUCCESS),
            client => Ok(client?.shutdown().map(|()| SUCCESS)?),
        },
        Verb::Version { output } => {
            let version = env!("CARGO_PKG_VERSION");
            shown(output, out, &json!({ "version": version }), |out| writeln!(out, "offshoot {version}"))
        }
        Verb::Doctor { output } => {
            let report = HostReport::probe(vmm::server::try_jail);
            shown(output, out, &report, |out| show::host(out, &report))?;
            Ok(if report.can_run { SUCCESS } else { FAILED.into() })
        }
        Verb::Demo { svg } => demo::run(cli.home.as_deref(), server, svg.as_deref(), out),
        Verb::Completions { shell } => manual::completions(shell, out),
        Verb::Man { verb, dir: None } => manual::page(verb.as_deref(), out),
        Verb::Man { dir: Some(dir), .. } => manual::pages(&dir),
        Verb::VmProcess => vm_process::run(),
    }
}

/// Prints a value as it was asked for.
fn shown<W: Write>(
    output: Output,
    out: &mut W,
    value: &impl serde::Serialize,
    plain: impl FnOnce(&mut W) -> io::Result<()>,
) -> Done {
    if output.json { show::json(out, value) } else { plain(out) }?;
    Ok(SUCCESS)
}
