//! `forward`: ports of this host that lead to a guest's.

use super::args::Forward;
use super::errors::{CliError, tell};
use super::reach::with_agent;
use super::signals::Signals;
use super::{Done, SUCCESS, shown};
use serde_json::{Value, json};
use std::io::Write;
use vmm::client::agent::Agent;
use vmm::client::{ClientBuilder, agent};

pub fn forward(forward: &Forward, server: ClientBuilder, out: &mut impl Write) -> Done {
    with_agent(server, &forward.name, |agent| {
        // One that cannot be reached is told at once.
        agent.notify()?;
        // Before there are other threads.
        let signals = Signals::catch()?;
        // Held until the end: when they are dropped, nobody listens.
        let forwards = listen(agent, &forward.ports)?;
        let all: Vec<Value> =
            forwards.iter().map(|one| json!({ "port": one.port(), "guest_port": one.guest_port() })).collect();
        shown(forward.output, out, &all, |out| {
            let name = agent.name();
            forwards.iter().try_for_each(|one| writeln!(out, "127.0.0.1:{} -> {name}:{}", one.port(), one.guest_port()))
        })?;
        out.flush()?;
        signals.wait()?;
        Ok(SUCCESS)
    })
}

fn listen(agent: &Agent, ports: &[(u16, u16)]) -> Result<Vec<agent::Forward>, CliError> {
    let one = |&(port, guest_port)| Ok(agent.forward(port, guest_port, |e| tell(&format!("forward: {e}")))?);
    ports.iter().map(one).collect()
}
