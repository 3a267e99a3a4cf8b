//! A run: what was measured so far, and where it goes.

use super::args::{Options, Scale};
use super::entry::{Entry, Figure};
use super::home::Home;
use super::host::Host;
use super::janitor::Janitor;
use super::list::Measure;
use super::rounds::Rounds;
use super::stats::timed;
use super::svg::Curve;
use super::{Result, readme, table};
use std::cell::RefCell;
use std::fs;
use std::rc::Rc;
use std::time::Duration;

/// A run under way.
pub struct Bench {
    options: Options,
    host: Host,
    janitor: Rc<RefCell<Janitor>>,
    measure: &'static str,
    entries: Vec<Entry>,
    curves: Vec<Curve>,
    notes: Vec<String>,
}

impl Bench {
    /// One that has measured nothing.
    pub fn new(options: Options) -> Result<Self> {
        let janitor = Rc::new(RefCell::new(Janitor::start()?));
        let (entries, curves, notes) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { options, host: Host::this(), janitor, measure: "", entries, curves, notes })
    }

    /// Measures all that is asked for, and tells. Whether all could be measured.
    pub fn run(mut self) -> Result<bool> {
        let mut whole = true;
        for measure in self.options.measures.clone() {
            whole &= self.measure(measure);
            // What there is survives whatever comes.
            self.write()?;
        }
        let met = |met| self.entries.iter().filter(|entry| entry.met == Some(met)).count();
        println!("\n{} aims met, {} not met", met(true), met(false));
        Ok(whole)
    }

    fn measure(&mut self, measure: &'static Measure) -> bool {
        println!("\n== {}: {}\n   {}", measure.name, measure.about, self.host.line());
        self.measure = measure.name;
        let before = self.entries.len();
        let (done, us) = timed(|| (measure.run)(self));
        if self.entries.len() > before {
            println!("{}", table::table(&self.entries[before..]));
        }
        self.notes.drain(..).for_each(|note| println!("   {note}"));
        println!("   {:.1} s", us / 1e6);
        if let Err(error) = &done {
            println!("== {}: FAILED: {error}", measure.name);
        }
        done.is_ok()
    }

    fn write(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.entries)? + "\n";
        if let Some(file) = &self.options.json {
            fs::write(file, &text).map_err(|e| format!("write {}: {e}", file.display()))?;
        }
        if let Some(directory) = &self.options.svg {
            fs::create_dir_all(directory).map_err(|e| format!("make {}: {e}", directory.display()))?;
            for curve in &self.curves {
                let file = directory.join(format!("{}.svg", curve.file));
                fs::write(&file, curve.svg(&self.host.line())).map_err(|e| format!("write {}: {e}", file.display()))?;
            }
        }
        if self.options.readme {
            readme::put(&self.entries, &self.host, self.pick("", "; a quick run, of few samples"))?;
        }
        Ok(())
    }

    /// One of two, by how much is to be measured.
    pub fn pick<T>(&self, full: T, quick: T) -> T {
        match self.options.scale {
            Scale::Full => full,
            Scale::Quick => quick,
        }
    }

    /// Rounds of sampling: so many of a full run, and so many of a quick one.
    pub fn rounds(&self, full: usize, quick: usize) -> Rounds {
        Rounds::new(self.pick(full, quick), Duration::from_secs(self.pick(20, 3)))
    }

    /// A home of its own for a server.
    pub fn home(&self) -> Result<Home> {
        self.home_with(&[])
    }

    /// The same, whose server gets these options.
    pub fn home_with(&self, options: &[&str]) -> Result<Home> {
        Home::new(&self.janitor, options)
    }

    /// A figure is known.
    pub fn figure(&mut self, figure: &Figure<'_>) {
        self.entries.push(Entry::new(self.measure, figure, &self.host));
    }

    /// A curve is known.
    pub fn curve(&mut self, curve: Curve) {
        self.curves.push(curve);
    }

    /// Something that a reader of the figures should know.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}
