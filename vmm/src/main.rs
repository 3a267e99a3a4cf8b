//! `offshoot`: launch a microVM and fork it while it runs.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
