//! Completions for shells, and man pages, both made from what the parser knows.

use super::args::Cli;
use super::errors::CliError;
use super::{Done, SUCCESS};
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

pub fn completions(shell: Shell, out: &mut impl Write) -> Done {
    let mut script = Vec::new();
    // All that people type: the generators know of nothing that is hidden.
    let whole = Cli::command();
    let mut typed = Command::new("offshoot").args(whole.get_arguments().cloned()).subcommands(verbs(&whole));
    clap_complete::generate(shell, &mut typed, "offshoot", &mut script);
    out.write_all(&script)?;
    Ok(SUCCESS)
}

/// Prints the page of one command, or of offshoot itself.
pub fn page(verb: Option<&str>, out: &mut impl Write) -> Done {
    let offshoot = Cli::command();
    let command = match verb {
        None => offshoot,
        Some(verb) => {
            let found = verbs(&offshoot).find(|command| command.get_name() == verb).map(|command| own_page(&command));
            found.ok_or_else(|| CliError::bad_input(format!("man: there is no command {verb:?}")))?
        }
    };
    out.write_all(&rendered(command)?)?;
    Ok(SUCCESS)
}

/// Writes all pages into a directory, which is made.
pub fn pages(directory: &Path) -> Done {
    let write = |command: Command| {
        let path = directory.join(format!("{}.1", command.get_name()));
        rendered(command).and_then(|page| fs::write(&path, page)).map_err(|e| (path, e))
    };
    let offshoot = Cli::command();
    let pages: Vec<Command> = verbs(&offshoot).map(|command| own_page(&command)).collect();
    fs::create_dir_all(directory)
        .map_err(|e| (directory.to_owned(), e))
        .and_then(|()| [offshoot].into_iter().chain(pages).try_for_each(write))
        .map_err(|(path, e)| CliError::failed(format!("man: {}: {e}", path.display())))?;
    Ok(SUCCESS)
}

fn verbs(offshoot: &Command) -> impl Iterator<Item = Command> + '_ {
    offshoot.get_subcommands().filter(|command| !command.is_hide_set()).cloned()
}

fn own_page(verb: &Command) -> Command {
    let name = format!("offshoot-{}", verb.get_name());
    verb.clone().name(&*name.leak()).bin_name(format!("offshoot {}", verb.get_name()))
}

fn rendered(command: Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    Ok(page)
}
