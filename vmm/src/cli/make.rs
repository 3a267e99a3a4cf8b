//! `launch` and `fork`. Where the names of what they made cannot be told, nobody would find it: it goes again.

use super::args::{Fork, Launch};
use super::console;
use super::each::undo;
use super::errors::CliError;
use super::reach::{with_client, with_server};
use super::signals::Signals;
use super::{Done, SUCCESS, show};
use std::io::Write;
use std::time::Duration;
use vmm::api::{Child, Failure};
use vmm::client::{ClientBuilder, Error, ForkOptions, LaunchOptions};

pub fn launch(launch: Launch, server: ClientBuilder, out: &mut impl Write) -> Done {
    let signals = launch.attach.then(Signals::catch).transpose()?;
    let output = launch.output;
    let options = options_of(launch)?;
    options.check()?;
    with_client(server, |client| {
        let (vm, summary) = client.launch_told(options)?;
        let told = if output.json { show::json(out, &summary) } else { writeln!(out, "{}", vm.name()) };
        if let Err(e) = told.and_then(|()| out.flush()) {
            return Err(undo(client, vec![vm.name().to_owned()], CliError::of_output(e)));
        }
        match signals {
            Some(signals) => console::attach(&vm, &signals, out),
            None => Ok(SUCCESS),
        }
    })
}

fn options_of(launch: Launch) -> Result<LaunchOptions, vmm::client::Error> {
    let mut options = LaunchOptions::new().memory(launch.memory).vcpus(launch.vcpus).remove_when_off(launch.rm);
    if let Some(name) = launch.name {
        options = options.name(name);
    }
    if let Some(ttl) = launch.ttl {
        options = options.ttl(ttl);
    }
    if let Some(most) = launch.max_children {
        options = options.max_children(most);
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
    if launch.agent {
        options = options.agent(true)?;
    }
    if let Some(path) = launch.vsock {
        options = options.vsock(path)?;
    }
    Ok(options)
}

pub fn fork(fork: Fork, server: ClientBuilder, out: &mut impl Write) -> Done {
    let mut options = ForkOptions::new().count(fork.count).wait_settled(fork.wait_settled).paused(fork.paused);
    if !fork.children.is_empty() {
        options = options.children(fork.children);
    }
    if let Some(prefix) = fork.prefix {
        options = options.prefix(prefix);
    }
    if let Some(ms) = fork.hint_free {
        options = options.hint_free(Duration::from_millis(ms));
    }
    if let Some(ms) = fork.wait_agent {
        options = options.wait_agent(Duration::from_millis(ms));
    }
    if let Some(ttl) = fork.ttl {
        options = options.ttl(ttl);
    }
    with_server(server, Some(&fork.name), |client| {
        let children = client.vm(&fork.name).fork(options)?;
        let told = if fork.output.json {
            let figures: Vec<&Child> = children.iter().map(|child| &child.figures).collect();
            show::json(out, &figures)
        } else {
            children.iter().try_for_each(|child| writeln!(out, "{}", child.vm.name()))
        };
        let silent = children.iter().filter(|child| fork.wait_agent.is_some() && child.figures.acked_us.is_none());
        let silent: Vec<&str> = silent.map(|child| child.vm.name()).collect();
        match told.and_then(|()| out.flush()) {
            Ok(()) if silent.is_empty() => Ok(SUCCESS),
            Ok(()) => {
                let why = format!("forked, but no agent has heard of it in {}", silent.join(", "));
                Err(Error::from(Failure::timed_out(why).about(silent[0])).into())
            }
            Err(e) => {
                let names = children.iter().map(|child| child.vm.name().to_owned()).collect();
                Err(undo(client, names, CliError::of_output(e)))
            }
        }
    })
}
