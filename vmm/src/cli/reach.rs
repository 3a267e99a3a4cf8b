//! Reaching the server: commands that make something start one, and all others only ask the one that is there.

use super::Done;
use super::errors::{self, CliError};
use std::env;
use vmm::api::ErrorKind;
use vmm::client::agent::{Agent, Identity};
use vmm::client::{Client, ClientBuilder, Error, Home};

/// Connects, starting a server if there is none, and does something with it. If that fails, a server that was started
/// for it is shut down again.
pub fn with_client(server: ClientBuilder, act: impl FnOnce(&Client) -> Done) -> Done {
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

/// Does something with the server that is there, or with its VM of that name. Without a server there is no VM.
pub fn with_server(server: ClientBuilder, vm: Option<&str>, act: impl FnOnce(&Client) -> Done) -> Done {
    match running(server)? {
        Ok(client) => act(&client),
        Err(absent) => Err(absent.error(vm)),
    }
}

/// Where an agent listens that is taken for every VM's: for tests of what is done inside guests, on hosts that run none.
const AGENT_SOCKET: &str = "OFFSHOOT_AGENT_SOCKET";

/// Does something with the agent of that VM.
pub fn with_agent(server: ClientBuilder, name: &str, act: impl FnOnce(&Agent) -> Done) -> Done {
    if let Some(socket) = env::var_os(AGENT_SOCKET).filter(|socket| !socket.is_empty()) {
        return act(&Agent::at_socket(Identity { name: name.to_owned(), generation: 0 }, socket));
    }
    with_server(server, Some(name), |client| act(&client.vm(name).agent()))
}

/// The server that is there, if one is.
pub fn running(server: ClientBuilder) -> Result<Result<Client, Absent>, CliError> {
    match server.start_server(false).connect() {
        Ok(client) => {
            tell_lost(&client);
            Ok(Ok(client))
        }
        Err(Error::NoServer(home)) => Ok(Err(Absent(Home::at(home)?))),
        Err(e) => Err(e.into()),
    }
}

/// There is no server at this home.
#[derive(Debug)]
pub struct Absent(Home);

impl Absent {
    fn text(&self) -> String {
        let lost = vmm::server::lost_vms(&self.0);
        let lost =
            if lost.is_empty() { String::new() } else { format!("; an earlier one died, with {}", lost.join(", ")) };
        format!("no server at {}{lost}", self.0.path().display())
    }

    /// For a command that needs one, for a VM or for itself.
    pub fn error(&self, vm: Option<&str>) -> CliError {
        let (why, home) = (self.text(), self.0.path().display().to_string());
        match vm {
            Some(name) => CliError::of(ErrorKind::NoSuchVm, format!("there is no VM {name:?}: {why}")).about(name),
            None => CliError::of(ErrorKind::NoServer, why).about(home),
        }
    }

    /// For a command that lists what there is, which is nothing.
    pub fn note(&self) {
        errors::tell(&self.text());
    }
}

/// Connects, starting a server if there is none.
pub fn connect(server: ClientBuilder) -> Result<Client, CliError> {
    let client = server.connect()?;
    tell_lost(&client);
    Ok(client)
}

fn tell_lost(client: &Client) {
    let lost = client.take_lost();
    if !lost.is_empty() {
        errors::tell(&format!("an earlier server of this home died; lost: {}", lost.join(", ")));
    }
}
