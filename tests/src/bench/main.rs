//! Benchmarks that tell the truth: what Offshoot does, beside what the host could do, in one run.
//!
//! ```text
//!   list ── the measures, one file each in `measure/`
//!    │        take a sample of Offshoot (a server of its own in a `home`, asked through the client library),
//!    │        then one of each reference, then the next of Offshoot, …
//!    │      references, one file each in `reference/`: this program again, in processes of their own
//!    │        a VMM of few lines (`bare/`) with the same guest image on the same KVM
//!    ▼
//!   bench ── entries (medians, 99th percentiles, ratios, aims) and curves ──► tables, JSON, SVG, the README's block
//!
//!   against ── runs of this bench and of another checkout's by turns ──► a table of ratios
//! ```
//!
//! Nothing here decides by absolute times. What an aim says is a ratio of two medians of one run.

mod against;
mod aim;
mod args;
mod bare;
mod bench;
mod books;
mod entry;
mod home;
mod host;
mod janitor;
mod list;
mod measure;
mod processes;
mod readme;
mod reference;
mod rounds;
mod stats;
mod svg;
mod table;

use args::Asked;
use bench::Bench;
use std::process::ExitCode;

/// Whatever went wrong, to be told in one line.
type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

fn fail<T>(why: impl Into<String>) -> Result<T> {
    Err(why.into().into())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, name, rest @ ..] = &arguments[..]
        && word == reference::AS
    {
        let done = if name == janitor::NAME { janitor::run() } else { reference::run(name, rest) };
        return told(done);
    }
    match args::parse(&arguments) {
        Err(line) => {
            eprintln!("bench: {line}");
            ExitCode::from(2)
        }
        Ok(Asked::Help(text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Ok(Asked::List) => {
            list::MEASURES.iter().for_each(|measure| println!("{:<18} {}", measure.name, measure.about));
            ExitCode::SUCCESS
        }
        Ok(Asked::Run(options)) => {
            if let Err(error) = vmm::host::open_kvm() {
                eprintln!("bench: {error}");
                return ExitCode::from(2);
            }
            let done = match options.against.clone() {
                Some(other) => against::run(&options, &other),
                None => Bench::new(options).and_then(Bench::run),
            };
            match done {
                Ok(true) => ExitCode::SUCCESS,
                Ok(false) => ExitCode::FAILURE,
                Err(error) => told(Err(error)),
            }
        }
    }
}

fn told(done: Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
