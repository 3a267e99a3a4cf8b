//! `ls`, `tree`, `stats`, `check`: commands that look. They start no server: where none is, there is nothing to see.

use super::args::Output;
use super::errors::CliError;
use super::reach::{running, with_server};
use super::{Done, SUCCESS, prometheus, show, shown};
use serde_json::json;
use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::Duration;
use vmm::api::{CheckReport, ErrorKind, TreeRow};
use vmm::client::{Client, ClientBuilder};

/// Asks the server, or shows what there is without one.
fn seen<T>(
    server: ClientBuilder,
    ask: impl FnOnce(&Client) -> Result<T, vmm::client::Error>,
    nothing: T,
) -> Result<T, CliError> {
    match running(server)? {
        Ok(client) => Ok(ask(&client)?),
        Err(absent) => {
            absent.note();
            Ok(nothing)
        }
    }
}

pub fn names(server: ClientBuilder, out: &mut impl Write) -> Done {
    let vms = seen(server, Client::list, Vec::new())?;
    vms.iter().try_for_each(|vm| writeln!(out, "{}", vm.name))?;
    Ok(SUCCESS)
}

pub fn list(server: ClientBuilder, output: Output, out: &mut impl Write) -> Done {
    let vms = seen(server, Client::list, Vec::new())?;
    shown(output, out, &vms, |out| show::vms(out, &vms))
}

pub fn tree(server: ClientBuilder, name: Option<String>, output: Output, out: &mut impl Write) -> Done {
    let rows = match name {
        None => seen(server, Client::tree, Vec::new())?,
        Some(name) => {
            let mut below = Vec::new();
            with_server(server, Some(&name), |client| {
                below = show::below(client.tree()?, &name);
                if below.is_empty() {
                    return Err(CliError::of(ErrorKind::NoSuchVm, format!("there is no VM {name:?}")).about(&name));
                }
                Ok(SUCCESS)
            })?;
            below
        }
    };
    let rows: Vec<TreeRow> = rows;
    shown(output, out, &rows, |out| show::tree(out, &rows))
}

pub fn stats(server: ClientBuilder, name: Option<String>, output: Output, out: &mut impl Write) -> Done {
    let Some(name) = name else {
        let stats = seen(server, |client| client.stats().map(Some), None)?;
        return match stats {
            Some(stats) => shown(output, out, &stats, |out| show::stats(out, &stats)),
            None => shown(output, out, &json!({ "vms": [], "total": null, "requests": [] }), |_| Ok(())),
        };
    };
    with_server(server, Some(&name), |client| {
        let stats = client.vm(&name).stats_and_totals()?;
        shown(output, out, &stats, |out| show::stats_of_one(out, &stats))
    })
}

/// The server's figures, for Prometheus.
pub fn prometheus(server: ClientBuilder, out: &mut impl Write) -> Done {
    let stats = seen(server, |client| client.stats().map(Some), None)?;
    prometheus::write(out, stats.as_ref())?;
    Ok(SUCCESS)
}

/// Shows the figures again and again, on a terminal in the same place.
pub fn watch(
    server: ClientBuilder,
    name: Option<String>,
    output: Output,
    pause: Duration,
    out: &mut impl Write,
) -> Done {
    let clears = io::stdout().is_terminal() && !output.json;
    loop {
        let mut shown = Vec::new();
        if clears {
            // Home, and nothing below.
            write!(shown, "\x1b[H\x1b[2J")?;
        }
        stats(server.clone(), name.clone(), output, &mut shown)?;
        if !output.json && !clears {
            writeln!(shown)?;
        }
        out.write_all(&shown)?;
        out.flush()?;
        thread::sleep(pause);
    }
}

pub fn check(server: ClientBuilder, output: Output, out: &mut impl Write) -> Done {
    let report = seen(server, Client::check, CheckReport::default())?;
    shown(output, out, &report, |out| show::check(out, &report))?;
    match report.broken.first() {
        None => Ok(SUCCESS),
        Some(broken) => Err(CliError::failed(format!("check: {broken}"))),
    }
}
