//! Every command that the README and the help show works as it is shown.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use offshoot_tests::process::children_of;
use offshoot_tests::{AgentHost, Outcome, TestHome};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

/// The words after `offshoot` of a line as a shell would take them apart. There is nothing to quote in examples.
fn words(line: &str) -> Vec<String> {
    let command = line.split("  #").next().unwrap().trim();
    let words = command.strip_prefix("offshoot").unwrap_or_else(|| panic!("{line:?} is no command of ours"));
    words.split_whitespace().map(str::to_owned).collect()
}

/// Runs a command in the directory of a home, whose VMs have this host's agent. A file in `/var` is one of that directory's.
fn run(home: &TestHome, agent: &AgentHost, words: &[String]) -> Outcome {
    let directory = home.path().parent().unwrap().to_owned();
    let words: Vec<String> =
        words.iter().map(|word| word.replace("/var/", &format!("{}/", directory.display()))).collect();
    let arguments: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut command = home.command(&arguments);
    command
        .current_dir(directory)
        .env("OFFSHOOT_AGENT_SOCKET", agent.socket())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let first = match words.first().map_or("", String::as_str) {
        "serve" => "Listening on ",
        "forward" => {
            if words.contains(&"--json".into()) {
                "["
            } else {
                "127.0.0.1:"
            }
        }
        _ => return Outcome::new(arguments.join(" "), command.output().unwrap()),
    };
    // These go on until they are told to end.
    if first == "Listening on " {
        home.cli(&["shutdown"]).good();
    }
    let mut server = command.spawn().unwrap();
    let mut out = BufReader::new(server.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert!(line.starts_with(first), "{words:?}: {line}");
    // The child is `timeout`, and the server its child.
    kill(Pid::from_raw(children_of(server.id() as i32)[0]), Signal::SIGTERM).unwrap();
    let mut outcome = Outcome::new(arguments.join(" "), server.wait_with_output().unwrap());
    outcome.out = line;
    outcome
}

/// The VMs that examples are about, with nothing done to them.
fn set(home: &TestHome) {
    home.cli(&["rm", "--all"]).good();
    home.cli(&["launch", "base"]).good();
    home.cli(&["fork", "base", "base-1", "base-2"]).good();
}

fn verbs(home: &TestHome) -> Vec<String> {
    let help = home.cli(&["--help"]).good();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    listed.map(|line| line.split_whitespace().next().unwrap().to_owned()).filter(|verb| verb != "help").collect()
}

#[test]
fn every_example_of_the_help_works() {
    let Some(home) = TestHome::new() else { return };
    let verbs = verbs(&home);
    assert!(verbs.len() > 25, "{verbs:?}");
    for verb in verbs.iter().map(String::as_str).chain([""]) {
        let asked: Vec<&str> = [verb, "--help"].into_iter().filter(|word| !word.is_empty()).collect();
        let help = home.cli(&asked).good();
        let examples: Vec<&str> =
            help.lines().skip_while(|line| *line != "Examples:").filter_map(|line| line.strip_prefix("  ")).collect();
        assert!((1..=3).contains(&examples.len()), "{verb}: {help}");
        match verb {
            // It makes what others have.
            "" => drop(home.cli(&["rm", "--all"]).good()),
            _ => set(&home),
        }
        // The session that some are about.
        let agent = AgentHost::new();
        match verb {
            "attach" => assert_eq!(agent.cli(&["exec", "-d", "base", "true"]).good(), "1\n"),
            "kill" => assert_eq!(agent.cli(&["exec", "-d", "base", "sleep", "60"]).good(), "1\n"),
            _ => {}
        }
        for example in examples {
            let outcome = run(&home, &agent, &words(example));
            assert_eq!((outcome.code, outcome.err.as_str()), (0, ""), "{outcome:?}");
        }
    }
}

/// What differs from run to run: numbers, and with them units and spaces.
fn shape(text: &str) -> String {
    let mut shape = String::new();
    for word in text.split_whitespace() {
        let digits = word.trim_matches(|c: char| matches!(c, '(' | ')' | ',' | ':'));
        let number = digits.trim_end_matches(['K', 'M', 'G', 'B']).parse::<f64>().is_ok();
        shape.push_str(if number || matches!(digits, "B" | "KiB" | "MiB" | "GiB" | "null") { "N" } else { word });
        shape.push(' ');
    }
    while shape.contains("N N ") {
        shape = shape.replace("N N ", "N ");
    }
    shape
}

/// The blocks of a page that show what is typed and what comes: each a list of commands with their output.
fn consoles(page: &str) -> Vec<Vec<(String, String)>> {
    let mut blocks = Vec::new();
    let mut lines = page.lines();
    while lines.by_ref().any(|line| line == "```console") {
        let mut block: Vec<(String, String)> = Vec::new();
        for line in lines.by_ref().take_while(|line| *line != "```") {
            match (line.strip_prefix("$ "), block.last_mut()) {
                (Some(command), _) => block.push((command.to_owned(), String::new())),
                (None, Some((_, output))) => *output += &format!("{line}\n"),
                (None, None) => panic!("what does {line:?} answer?"),
            }
        }
        blocks.push(block);
    }
    blocks
}

#[test]
fn every_command_of_the_readmes_works() {
    let blocks = |page: &str| {
        let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
        let blocks = consoles(&page);
        assert!(!blocks.is_empty(), "{page}");
        blocks
    };
    let agent = AgentHost::new();
    for block in ["../README.md", "../vmm/README.md"].into_iter().flat_map(blocks) {
        let Some(home) = TestHome::new() else { return };
        // A block that begins with a launch has what it needs.
        if !block[0].0.starts_with("offshoot launch") {
            set(&home);
        }
        for (command, shown) in block {
            let outcome = run(&home, &agent, &words(&command));
            assert_eq!((outcome.code, outcome.err.as_str()), (0, ""), "{outcome:?}");
            if !shown.is_empty() {
                assert_eq!(shape(&outcome.out), shape(&shown), "{command}: {}", outcome.out);
            }
        }
    }
}
