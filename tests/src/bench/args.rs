//! The command line.

use super::against::Other;
use super::list::{MEASURES, Measure};
use clap::Parser;
use clap::error::ErrorKind;
use std::path::PathBuf;

/// Measures Offshoot against what the host itself can do, in one run.
#[derive(Debug, Parser)]
#[command(name = "tests/bench", version)]
struct Line {
    /// Measure only this; may be given several times (see --list)
    #[arg(long, value_name = "MEASURE")]
    only: Vec<String>,
    /// Fewer samples and smaller curves: two minutes on two cores
    #[arg(long)]
    quick: bool,
    /// Write all figures to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the curves into DIR
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Put the figures that have an aim into the README's block; of all measures only
    #[arg(long)]
    readme: bool,
    /// Compare with CHECKOUT: its own bench, built in release, takes every second round, and each figure is told beside
    /// its; exit code 1 if one is worse than 1.1 times the other's
    #[arg(long, value_name = "CHECKOUT", conflicts_with_all = ["svg", "readme"])]
    against: Option<PathBuf>,
    /// With --against: how often each of the two measures
    #[arg(long, value_name = "N", requires = "against", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// List the measures
    #[arg(long)]
    list: bool,
}

/// What to do.
#[derive(Debug)]
pub enum Asked {
    /// Print this.
    Help(String),
    /// List the measures.
    List,
    /// Measure.
    Run(Options),
}

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// As long as it takes.
    Full,
    /// Two minutes.
    Quick,
}

/// What to measure, and where to put it.
#[derive(Debug)]
pub struct Options {
    pub measures: Vec<&'static Measure>,
    pub scale: Scale,
    pub json: Option<PathBuf>,
    pub svg: Option<PathBuf>,
    pub readme: bool,
    pub against: Option<Other>,
}

/// What these words ask for; otherwise, in one line, what is wrong with them.
pub fn parse(arguments: &[String]) -> Result<Asked, String> {
    let words = std::iter::once("tests/bench").chain(arguments.iter().map(String::as_str));
    let line = match Line::try_parse_from(words) {
        Ok(line) => line,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Asked::Help(e.to_string()));
        }
        Err(e) => {
            let text = e.to_string();
            let line = text.lines().next().unwrap_or("bad arguments");
            return Err(format!("{} (see --help)", line.trim_start_matches("error: ")));
        }
    };
    if line.list {
        return Ok(Asked::List);
    }
    let find = |name: &String| {
        MEASURES.iter().find(|measure| measure.name == name).ok_or_else(|| {
            let known: Vec<_> = MEASURES.iter().map(|measure| measure.name).collect();
            format!("--only {name}: there is no such measure, but {}", known.join(", "))
        })
    };
    let named: Vec<&Measure> = line.only.iter().map(find).collect::<Result<_, _>>()?;
    let measures = if named.is_empty() { MEASURES.iter().collect() } else { named };
    if let Some(file) = &line.json
        && !file.parent().is_some_and(|parent| parent.as_os_str().is_empty() || parent.is_dir())
    {
        return Err(format!("--json {}: there is no such directory", file.display()));
    }
    if let Some(directory) = &line.svg
        && directory.exists()
        && !directory.is_dir()
    {
        return Err(format!("--svg {}: not a directory", directory.display()));
    }
    if line.readme && !line.only.is_empty() {
        return Err("--readme: the README has all figures, not those of --only".into());
    }
    let scale = if line.quick { Scale::Quick } else { Scale::Full };
    let against = line.against.map(|checkout| Other { checkout, rounds: line.rounds.into() });
    if let Some(other) = &against
        && !other.checkout.join("tests/bench").is_file()
    {
        return Err(format!("--against {}: there is no tests/bench", other.checkout.display()));
    }
    Ok(Asked::Run(Options { measures, scale, json: line.json, svg: line.svg, readme: line.readme, against }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Asked, String> {
        parse(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn all_is_measured_unless_told_otherwise() {
        let Ok(Asked::Run(options)) = parsed(&[]) else { panic!("a run") };
        assert_eq!((options.measures.len(), options.scale), (MEASURES.len(), Scale::Full));
        let Ok(Asked::Run(options)) = parsed(&["--only", "fork", "--quick"]) else { panic!("a run") };
        assert_eq!((options.measures[0].name, options.scale), ("fork", Scale::Quick));
        assert!(matches!(parsed(&["--list"]), Ok(Asked::List)));
        assert!(matches!(parsed(&["--help"]), Ok(Asked::Help(_))));
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for words in [
            &["--only", "nothing"][..],
            &["--only"],
            &["--fast"],
            &["more"],
            &["--json", "/no/such/directory/x.json"],
            &["--svg", "/dev/null"],
            &["--readme", "--only", "fork"],
            &["--against", "/no/such/directory"],
            &["--against", "/", "--readme"],
            &["--rounds", "3"],
        ] {
            let line = parsed(words).expect_err("bad input");
            assert!(!line.is_empty() && !line.contains('\n'), "{line:?}");
        }
    }
}
