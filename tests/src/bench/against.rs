//! This checkout against another, by turns in one run: each takes its samples with its own bench, so that what the two tell
//! their servers may differ.
//!
//! ```text
//!   for each measure:  ours  theirs   theirs  ours   ours  theirs  …   each a run of a bench with --only and --json
//!   for each figure:   the median of ours beside the median of theirs
//! ```

use crate::args::{Options, Scale};
use crate::entry::Entry;
use crate::list::Measure;
use crate::stats::Samples;
use crate::table::number;
use crate::{Result, fail};
use comfy_table::{CellAlignment, Table, presets};
use nix::unistd::mkdtemp;
use serde::Serialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

/// A figure that is so many times as bad as the other checkout's is worse.
const WORSE: f64 = 1.1;

/// Whom to compare with, and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other {
    /// The other checkout.
    pub checkout: PathBuf,
    /// How often each of the two takes its samples.
    pub rounds: usize,
}

/// A figure of both.
#[derive(Clone, Debug, Serialize)]
struct Compared {
    /// As each tells it.
    measure: String,
    /// Of the figures.
    unit: String,
    /// The median of this checkout's.
    ours: f64,
    /// The median of the other's.
    theirs: f64,
    /// How many times as bad as theirs ours is: below 1 it is better.
    ratio: f64,
    /// The least and the greatest ratio of one round.
    ratios: [f64; 2],
    /// In how many rounds both told it.
    rounds: usize,
}

/// What a figure of both was, round by round.
#[derive(Debug)]
struct Figure {
    name: String,
    unit: String,
    more_is_better: bool,
    rounds: Vec<[f64; 2]>,
}

impl Figure {
    fn compared(&self) -> Compared {
        let side = |which: usize| self.rounds.iter().map(|round| round[which]).collect::<Samples>().median();
        let [ours, theirs] = [side(0), side(1)];
        let ratio = |[ours, theirs]: [f64; 2]| if self.more_is_better { theirs / ours } else { ours / theirs };
        let each = || self.rounds.iter().map(|&round| ratio(round));
        let ratios = [each().fold(f64::INFINITY, f64::min), each().fold(0.0, f64::max)];
        let (measure, unit) = (self.name.clone(), self.unit.clone());
        Compared { measure, unit, ours, theirs, ratio: ratio([ours, theirs]), ratios, rounds: self.rounds.len() }
    }
}

impl Compared {
    fn is_worse(&self) -> bool {
        self.ratio > WORSE
    }
}

/// The two, and where they put their figures.
struct Sides {
    ours: PathBuf,
    theirs: PathBuf,
    scale: Scale,
    directory: PathBuf,
}

/// Compares all that both can measure. Whether nothing was worse here.
pub fn run(options: &Options, other: &Other) -> Result<bool> {
    let theirs = other.checkout.join("tests/bench").canonicalize()?;
    let directory = mkdtemp(&env::temp_dir().join("offshoot-against-XXXXXX"))?;
    let sides = Sides { ours: env::current_exe()?, theirs, scale: options.scale, directory };
    let done = compare(&sides, options, other);
    let _ = fs::remove_dir_all(&sides.directory);
    done
}

fn compare(sides: &Sides, options: &Options, other: &Other) -> Result<bool> {
    // The other's script builds it, too.
    let known = sides.theirs_knows()?;
    let mut all = Vec::new();
    for &measure in &options.measures {
        if !known.contains(measure.name) {
            println!("\n== {}: the other checkout has no such measure", measure.name);
            continue;
        }
        println!("\n== {}: {}", measure.name, measure.about);
        let figures = sides.measure(measure, other.rounds)?;
        let compared: Vec<Compared> = figures.iter().map(Figure::compared).collect();
        println!("{}", table(&compared));
        all.extend(compared);
        if let Some(file) = &options.json {
            let text = serde_json::to_string_pretty(&all)? + "\n";
            fs::write(file, text).map_err(|e| format!("write {}: {e}", file.display()))?;
        }
    }
    let worse: Vec<&Compared> = all.iter().filter(|figure| figure.is_worse()).collect();
    println!("\n{} figures compared, {} of them worse here than {WORSE}× the other's", all.len(), worse.len());
    for figure in &worse {
        println!("   WORSE: {} ({:.2}×)", figure.measure, figure.ratio);
    }
    if all.is_empty() { fail("nothing that both can measure") } else { Ok(worse.is_empty()) }
}

impl Sides {
    fn theirs_knows(&self) -> Result<HashSet<String>> {
        let output = self.command(1).arg("--list").stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            return fail(format!("{} --list: {}", self.theirs.display(), output.status));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
    }

    /// Our bench, or theirs, which must find its own binary.
    fn command(&self, which: usize) -> Command {
        let mut command = Command::new(if which == 0 { &self.ours } else { &self.theirs });
        if which == 1 {
            command.env_remove("OFFSHOOT_BIN").env_remove("CARGO_TARGET_DIR");
        }
        command
    }

    /// What both told in so many rounds.
    fn measure(&self, measure: &Measure, rounds: usize) -> Result<Vec<Figure>> {
        let mut figures: Vec<Figure> = Vec::new();
        for round in 0..rounds {
            let mut told = [Vec::new(), Vec::new()];
            // Whoever comes second finds another machine: they take turns at that, too.
            for which in [round % 2, 1 - round % 2] {
                told[which] = self.entries(which, measure)?;
            }
            pair(&mut figures, told);
        }
        Ok(figures)
    }

    fn entries(&self, which: usize, measure: &Measure) -> Result<Vec<Entry>> {
        let file = self.directory.join("figures.json");
        let mut command = self.command(which);
        command.args(["--only", measure.name, "--json"]).arg(&file);
        if self.scale == Scale::Quick {
            command.arg("--quick");
        }
        let output = command.stdin(Stdio::null()).output()?;
        let whose = if which == 0 { Path::new("our bench") } else { &self.theirs };
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            return fail(format!("{} --only {}: {}\n{said}", whose.display(), measure.name, output.status));
        }
        Ok(serde_json::from_str(&fs::read_to_string(&file)?)?)
    }
}

/// Puts the figures of a round to those of others, where both sides told them.
fn pair(figures: &mut Vec<Figure>, [ours, theirs]: [Vec<Entry>; 2]) {
    for entry in ours {
        let name = plain(&entry.measure).to_owned();
        let same = theirs.iter().find(|other| plain(&other.measure) == name && other.unit == entry.unit);
        let Some(round) = same.and_then(|other| Some([entry.value?, other.value?])) else { continue };
        match figures.iter_mut().find(|figure| figure.name == name && figure.unit == entry.unit) {
            Some(figure) => figure.rounds.push(round),
            None => {
                let more_is_better = entry.aim.is_some_and(|aim| aim.starts_with('≥'));
                figures.push(Figure { name, unit: entry.unit, more_is_better, rounds: vec![round] });
            }
        }
    }
}

/// A figure's name without what was found out when it was measured: `flat (most: 50)`.
fn plain(name: &str) -> &str {
    name.split_once(" (most").map_or(name, |(name, _)| name)
}

fn table(figures: &[Compared]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["measure", "unit", "ours", "theirs", "ratio", "of one round", "n", ""]);
    for figure in figures {
        table.add_row([
            figure.measure.clone(),
            figure.unit.clone(),
            number(figure.ours),
            number(figure.theirs),
            format!("{:.2}", figure.ratio),
            format!("{:.2} to {:.2}", figure.ratios[0], figure.ratios[1]),
            figure.rounds.to_string(),
            if figure.is_worse() { format!("WORSE than {WORSE}×") } else { String::new() },
        ]);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if (2..7).contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;

    fn entry(measure: &str, value: f64, aim: Option<&str>) -> Entry {
        let host = Host { machine: "m".into(), kvm: "k".into(), kernel: "6".into(), cores: 2 };
        let (reference, reference_value, ratio, met) = (None, None, None, None);
        let (unit, aim, value) = ("us".to_owned(), aim.map(str::to_owned), Some(value));
        let measure = measure.to_owned();
        Entry { measure, unit, value, p99: value, samples: 1, reference, reference_value, ratio, aim, met, host }
    }

    fn compared(rounds: &[[Vec<Entry>; 2]]) -> Vec<Compared> {
        let mut figures = Vec::new();
        rounds.iter().cloned().for_each(|round| pair(&mut figures, round));
        figures.iter().map(Figure::compared).collect()
    }

    #[test]
    fn a_figure_is_the_median_of_its_rounds() {
        let round = |ours, theirs| [vec![entry("fork", ours, None)], vec![entry("fork", theirs, None)]];
        let found = compared(&[round(12.0, 10.0), round(90.0, 10.0), round(10.0, 10.0)]);
        let [fork] = &found[..] else { panic!("one figure") };
        assert_eq!((fork.ours, fork.theirs, fork.ratio, fork.rounds), (12.0, 10.0, 1.2, 3));
        assert_eq!(fork.ratios, [1.0, 9.0]);
        assert!(fork.is_worse());
        assert!(!compared(&[round(11.0, 10.0)])[0].is_worse(), "as much as it may be");
    }

    #[test]
    fn where_more_is_better_less_is_worse() {
        let speed = |value| vec![entry("swap-read", value, Some("≥ 0.7×"))];
        assert!(compared(&[[speed(10.0), speed(20.0)]])[0].is_worse());
        assert!(!compared(&[[speed(20.0), speed(10.0)]])[0].is_worse());
    }

    #[test]
    fn what_only_one_side_tells_is_not_compared() {
        let ours = vec![entry("depth/flat (most: 5)", 1.0, None), entry("new", 1.0, None)];
        let found = compared(&[[ours, vec![entry("depth/flat (most: 50)", 1.0, None)]]]);
        assert_eq!(found.iter().map(|figure| &figure.measure[..]).collect::<Vec<_>>(), ["depth/flat"]);
    }
}
