//! Arguments in; tables, trees or JSON out. What is done in between, the client library does.

mod args;
mod balloon;
mod console;
mod demo;
mod errors;
mod serve;
mod show;
mod signals;
mod vm_process;

use args::{Cli, Launch, Output, Verb};
use clap::Parser;
use errors::CliError;
use serde_json::json;
use signals::Signals;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::time::Duration;
use vmm::api::{Child, VmState};
use vmm::client::{Client, ClientBuilder, ForkOptions, LaunchOptions, Stream};
use vmm::host::HostReport;
use vmm::machine::Voice;
use vmm::plain;

/// How a command ends that did not fail.
type Done = Result<ExitCode, CliError>;

const SUCCESS: ExitCode = ExitCode::SUCCESS;
/// Failed, or the guest said `err`.
const FAILED: u8 = 1;
/// Bad input, and nothing has changed.
const BAD_INPUT: u8 = 2;
/// Timed out.
const TIMED_OUT: u8 = 3;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return errors::usage(&e),
    };
    let mut logger = env_logger::Builder::new();
    if matches!(cli.verb, Verb::VmProcess) {
        logger.target(env_logger::Target::Pipe(Box::new(Voice)));
    }
    logger.filter_level(cli.log_level).format_timestamp_micros().init();
    let done = run(cli).and_then(|code| {
        io::stdout().flush()?;
        Ok(code)
    });
    done.unwrap_or_else(|e| e.report())
}

fn run(cli: Cli) -> Done {
    let out = &mut io::stdout().lock();
    let mut server = Client::builder().log_level(cli.log_level);
    if let Some(home) = &cli.home {
        server = server.home(home);
    }
    match cli.verb {
        Verb::Launch(launch) => self::launch(launch, server, out),
        Verb::Fork(fork) => {
            let mut options = ForkOptions::new().count(fork.count).wait_settled(fork.wait_settled).paused(fork.paused);
            if let Some(prefix) = fork.prefix {
                options = options.prefix(prefix);
            }
            if let Some(ms) = fork.hint_free {
                options = options.hint_free(Duration::from_millis(ms));
            }
            with_client(server, |client| {
                let children = client.vm(fork.name).fork(options)?;
                if fork.output.json {
                    let figures: Vec<&Child> = children.iter().map(|child| &child.figures).collect();
                    show::json(out, &figures)?;
                } else {
                    children.iter().try_for_each(|child| writeln!(out, "{}", child.vm.name()))?;
                }
                Ok(SUCCESS)
            })
        }
        Verb::Send { name, text, expect, timeout } => with_client(server, |client| {
            let (vm, text) = (client.vm(name), text.join(" "));
            if let Some(pattern) = &expect {
                let found = vm.expect(&text, pattern, timeout)?;
                writeln!(out, "{}", plain::lines(&found))?;
                return Ok(SUCCESS);
            }
            let Some(answer) = vm.tell(&text, timeout)? else { return Ok(SUCCESS) };
            writeln!(out, "{}", plain::lines(&answer))?;
            let good = answer.split(' ').next() == Some("ok");
            Ok(if good { SUCCESS } else { FAILED.into() })
        }),
        Verb::Console { name } => {
            let signals = Signals::catch()?;
            with_client(server, |client| console::attach(client.vm(&name).console()?, &name, &signals, out))
        }
        Verb::Logs { name, follow } => with_client(server, |client| {
            let vm = client.vm(name);
            copy(if follow { vm.follow_logs()? } else { vm.logs()? }, out)
        }),
        Verb::Ls { output } => with_client(server, |client| {
            let vms = client.list()?;
            shown(output, out, &vms, |out| show::vms(out, &vms))
        }),
        Verb::Tree { output } => with_client(server, |client| {
            let rows = client.tree()?;
            shown(output, out, &rows, |out| show::tree(out, &rows))
        }),
        Verb::Stats { name, output } => with_client(server, |client| {
            let stats = match name {
                Some(name) => client.vm(name).stats_and_totals()?,
                None => client.stats()?,
            };
            shown(output, out, &stats, |out| show::stats(out, &stats))
        }),
        Verb::Balloon { name, size, timeout, output } => with_client(server, |client| {
            let balloon = balloon::resize(client, &name, size, timeout)?;
            shown(output, out, &balloon, |out| writeln!(out, "{name}: {}", balloon::text(&balloon)))
        }),
        Verb::Pause { name } => with_client(server, |client| Ok(client.vm(name).pause().map(|()| SUCCESS)?)),
        Verb::Resume { name } => with_client(server, |client| Ok(client.vm(name).resume().map(|()| SUCCESS)?)),
        Verb::Stop { name } => with_client(server, |client| Ok(client.vm(name).stop().map(|()| SUCCESS)?)),
        Verb::Wait { name, timeout, output } => with_client(server, |client| {
            let end = client.vm(name).wait(timeout)?;
            let word = if end.state == VmState::Dead { "dead" } else { "off" };
            shown(output, out, &end, |out| match &end.reason {
                Some(reason) => writeln!(out, "{word}: {reason}"),
                None => writeln!(out, "{word}"),
            })?;
            Ok(if end.state == VmState::Dead { FAILED.into() } else { SUCCESS })
        }),
        Verb::Rm { names, all } => with_client(server, |client| {
            if all {
                client.remove_all()?
            } else {
                client.remove(names)?
            }
            Ok(SUCCESS)
        }),
        Verb::Inspect { name, output } => with_client(server, |client| {
            let inspection = client.vm(name).inspect()?;
            shown(output, out, &inspection, |out| show::inspection(out, &inspection))
        }),
        Verb::Reclaim { name, size, all: _, output } => with_client(server, |client| {
            let done = match name {
                Some(name) => client.vm(name).reclaim(size)?,
                None => client.reclaim_all(size)?,
            };
            shown(output, out, &done, |out| writeln!(out, "reclaimed {}", done.reclaimed_bytes))
        }),
        Verb::Budget { set, output } => with_client(server, |client| {
            let budget = match set {
                Some(args::Budget(budget)) => client.set_budget(budget)?,
                None => client.budget()?,
            };
            let json = json!({ "budget_bytes": budget });
            shown(output, out, &json, |out| match budget {
                Some(size) => writeln!(out, "{size}"),
                None => writeln!(out, "none"),
            })
        }),
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
        Verb::Check { output } => with_client(server, |client| {
            let report = client.check()?;
            shown(output, out, &report, |out| show::check(out, &report))?;
            match report.broken.first() {
                None => Ok(SUCCESS),
                Some(broken) => Err(CliError::failed(format!("check: {broken}"))),
            }
        }),
        Verb::Demo => demo::run(cli.home.as_deref(), server, out),
        Verb::VmProcess => vm_process::run(),
    }
}

fn launch(launch: Launch, server: ClientBuilder, out: &mut impl Write) -> Done {
    let signals = launch.attach.then(Signals::catch).transpose()?;
    let mut options = LaunchOptions::new().memory(launch.mem).vcpus(launch.vcpus).remove_when_off(launch.rm);
    if let Some(name) = launch.name {
        options = options.name(name);
    }
    if let Some(kernel) = launch.kernel {
        options = options.kernel(kernel)?;
    }
    if let Some(initrd) = launch.initrd {
        options = options.initrd(initrd)?;
    }
    if let Some(cmdline) = launch.cmdline {
        options = options.cmdline(cmdline)?;
    }
    options.check()?;
    with_client(server, |client| {
        let vm = client.launch(options)?;
        writeln!(out, "{}", vm.name())?;
        out.flush()?;
        match signals {
            Some(signals) => console::attach(vm.console()?, vm.name(), &signals, out),
            None => Ok(SUCCESS),
        }
    })
}

/// Connects, starting a server if there is none, and does something with it. If that fails, a server that was started
/// for it is shut down again.
fn with_client(server: ClientBuilder, act: impl FnOnce(&Client) -> Done) -> Done {
    let client = connect(server)?;
    let done = act(&client);
    if done.is_err()
        && let Err(e) = client.undo_start()
    {
        // What failed first is what to tell; a server that is gone needs no shutting down.
        log::info!("shut down the server that was started: {e}");
    }
    done
}

fn connect(server: ClientBuilder) -> Result<Client, CliError> {
    let client = server.connect()?;
    let lost = client.take_lost();
    if !lost.is_empty() {
        errors::tell(&format!("an earlier server of this home died; lost: {}", lost.join(", ")));
    }
    Ok(client)
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

/// Prints a stream, each piece as it comes.
fn copy(mut stream: Stream, out: &mut impl Write) -> Done {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(SUCCESS),
            count => out.write_all(&buffer[..count]).and_then(|()| out.flush())?,
        }
    }
}
