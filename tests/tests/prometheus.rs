//! `stats --prometheus`, read by a strict reader: what collects figures refuses a page for one bad line.

use offshoot_tests::{Guest, TestHome};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use vmm::units::ByteSize;

/// A page: what each family of figures is, and each figure by its name and its labels.
#[derive(Debug, Default)]
struct Page {
    kinds: BTreeMap<String, String>,
    figures: BTreeMap<(String, Vec<(String, String)>), f64>,
}

fn is_name(text: &str) -> bool {
    text.starts_with("offshoot_") && text.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '_'))
}

impl Page {
    /// Reads one; what is wrong with it, with the line.
    fn read(text: &str) -> Result<Self, String> {
        if !text.ends_with('\n') {
            return Err("the last line has no end".into());
        }
        let mut page = Self::default();
        let (mut helped, mut family) = (BTreeSet::new(), String::new());
        for line in text.lines() {
            let wrong = |what: &str| format!("{what}: {line:?}");
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').ok_or_else(|| wrong("no help"))?;
                if !is_name(name) || help.trim().is_empty() || !helped.insert(name.to_owned()) {
                    return Err(wrong("a bad name, or told before"));
                }
                family = name.to_owned();
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').ok_or_else(|| wrong("no type"))?;
                let known = ["counter", "gauge", "histogram"].contains(&kind);
                if name != family || !known || page.kinds.insert(name.to_owned(), kind.to_owned()).is_some() {
                    return Err(wrong("a type without its help, or none, or told before"));
                }
                if (kind == "counter") != name.ends_with("_total") {
                    return Err(wrong("counters, and nothing else, are called totals"));
                }
            } else {
                page.figure(line, &family).map_err(|what| wrong(&what))?;
            }
        }
        Ok(page)
    }

    fn figure(&mut self, line: &str, family: &str) -> Result<(), String> {
        let (series, value) = line.rsplit_once(' ').ok_or("no value")?;
        let value: f64 = value.parse().map_err(|e| format!("{e}"))?;
        let (name, labels) = match series.split_once('{') {
            None => (series, ""),
            Some((name, labels)) => (name, labels.strip_suffix('}').ok_or("labels without an end")?),
        };
        let suffix = name.strip_prefix(family).ok_or("a figure outside of its family")?;
        let histogram = self.kinds.get(family).ok_or("a figure without a type")? == "histogram";
        if !is_name(name) || !histogram && !suffix.is_empty() {
            return Err("a bad name".into());
        }
        if histogram && !["_bucket", "_sum", "_count"].contains(&suffix) {
            return Err("no part of a histogram".into());
        }
        let label = |label: &str| {
            let (name, value) = label.split_once('=').ok_or("a label without a value")?;
            let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).ok_or("no quotes")?;
            let plain = value.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '+'));
            if plain { Ok((name.to_owned(), value.to_owned())) } else { Err("a label that needs to be escaped") }
        };
        let labels: Vec<_> = labels.split(',').filter(|text| !text.is_empty()).map(label).collect::<Result<_, _>>()?;
        match self.figures.insert((name.to_owned(), labels), value) {
            None => Ok(()),
            Some(_) => Err("told before".into()),
        }
    }

    fn of(&self, name: &str) -> f64 {
        *self.figures.get(&(name.to_owned(), Vec::new())).unwrap_or_else(|| panic!("no {name}"))
    }

    fn of_verb(&self, name: &str, verb: &str) -> f64 {
        let labels = vec![("verb".to_owned(), verb.to_owned())];
        *self.figures.get(&(name.to_owned(), labels)).unwrap_or_else(|| panic!("no {name} of {verb}"))
    }

    /// What a histogram's buckets go up to, and what is in each.
    fn buckets(&self, verb: &str) -> Vec<(f64, f64)> {
        let of_verb = |labels: &[(String, String)]| labels[0].1 == verb;
        let figures = self
            .figures
            .iter()
            .filter(|((name, labels), _)| name == "offshoot_request_duration_seconds_bucket" && of_verb(labels));
        let mut buckets: Vec<_> = figures
            .map(|((_, labels), answers)| {
                assert_eq!(labels[1].0, "le");
                (labels[1].1.parse::<f64>().expect("a bound"), *answers)
            })
            .collect();
        buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
        buckets
    }
}

#[test]
fn bad_pages_are_refused() {
    let good = "# HELP offshoot_a A.\n# TYPE offshoot_a gauge\noffshoot_a 1\n";
    assert_eq!(Page::read(good).expect("a page").of("offshoot_a"), 1.0);
    for bad in [
        good.trim_end().to_owned(),
        good.replace("# TYPE offshoot_a gauge\n", ""),
        good.replace("# HELP offshoot_a A.\n", ""),
        good.replace("gauge", "counter"),
        good.replace("_a 1", "_a one"),
        good.replace("_a 1", "_b 1"),
        good.replace("_a 1", "_a{x=1} 1"),
        format!("{good}offshoot_a 2\n"),
        format!("{good}{good}"),
    ] {
        assert!(Page::read(&bad).is_err(), "{bad}");
    }
}

/// Pages there are bytes here.
fn expected(key: &str, value: u64) -> (String, u64) {
    let counters = ["swap_out", "swap_write", "swap_in", "clean_eviction", "discarded", "refault", "lost"];
    let counters = counters.into_iter().chain(["swap_in_live", "readahead", "readahead_hit", "writeahead"]);
    match key.strip_suffix("_pages") {
        Some(what) if counters.into_iter().any(|counter| counter == what) => {
            (format!("offshoot_{what}_bytes_total"), ByteSize::pages(value).0)
        }
        Some(what) => (format!("offshoot_{what}_bytes"), ByteSize::pages(value).0),
        None if key == "traps" => ("offshoot_traps_total".into(), value),
        None if key == "pooled" => ("offshoot_pooled_processes".into(), value),
        None => (format!("offshoot_{key}"), value),
    }
}

#[test]
fn the_page_agrees_with_the_json() {
    let Some(home) = TestHome::new() else { return };
    assert_eq!(home.cli(&["launch", "a", "--mem", "16M"]).good(), "a\n");
    home.client().vm("a").fill(1000..1400, 1);
    home.cli(&["budget", "2G"]).good();
    for _ in 0..3 {
        home.cli(&["fork", "a", "--wait-settled"]).good();
    }
    home.cli(&["reclaim", "a", "1M"]).good();
    home.client().vm("a-1").verify(1000..1400, 1);
    assert_eq!(home.cli(&["fork", "nobody"]).code, 2);
    let page = home.cli(&["stats", "--prometheus"]).good();
    let page = Page::read(&page).unwrap_or_else(|wrong| panic!("{wrong}\n{page}"));
    let json = home.cli(&["stats", "--json"]).json();
    assert_eq!(page.of("offshoot_up"), 1.0);
    // What is never still on a live host is only there.
    let restless = ["host_bytes", "accounted_bytes", "pooled"];
    for (key, value) in json["total"].as_object().expect("totals") {
        let (name, value) = expected(key, value.as_u64().unwrap_or_else(|| panic!("{key}: {value}")));
        let told = page.of(&name);
        assert!(told == value as f64 || restless.contains(&key.as_str()), "{name}: {told}, {value}");
    }
    for key in ["swap_out_bytes_total", "swap_in_bytes_total", "traps_total"] {
        assert!(page.of(&format!("offshoot_{key}")) > 0.0, "{key}");
    }
    let requests = json["requests"].as_array().expect("requests");
    let verbs: BTreeSet<&str> = requests.iter().filter_map(|request| request["kind"].as_str()).collect();
    assert!(verbs.is_superset(&["launch", "fork", "budget", "reclaim", "stats"].into()), "{verbs:?}");
    for request in requests {
        agrees(&page, request);
    }
    assert_eq!(page.of_verb("offshoot_request_duration_seconds_count", "fork"), 4.0);
    assert_eq!(page.of_verb("offshoot_request_failures_total", "fork"), 1.0);
}

fn agrees(page: &Page, request: &Value) {
    let (verb, answers) = (request["kind"].as_str().expect("a verb"), request["answers"].as_u64().expect("a count"));
    // The page itself was asked for in between, and counts only those before it.
    if verb == "stats" {
        return;
    }
    let name = "offshoot_request_duration_seconds";
    assert_eq!(page.of_verb(&format!("{name}_count"), verb), answers as f64, "{verb}");
    let sum = request["total_us"].as_u64().expect("a sum") as f64 / 1e6;
    assert!((page.of_verb(&format!("{name}_sum"), verb) - sum).abs() < 1e-9, "{verb}");
    let failures = request["failures"].as_u64().expect("a count") as f64;
    assert_eq!(page.of_verb("offshoot_request_failures_total", verb), failures, "{verb}");
    let buckets = page.buckets(verb);
    let told = request["buckets"].as_array().expect("buckets");
    assert_eq!(buckets.len(), told.len());
    assert_eq!(buckets.last(), Some(&(f64::INFINITY, answers as f64)), "{verb}");
    assert!(buckets.is_sorted_by(|one, next| one.1 <= next.1), "{verb}: {buckets:?}");
    for ((bound, within), bucket) in buckets.iter().zip(told) {
        let up_to = bucket["up_to_us"].as_u64().map_or(f64::INFINITY, |us| us as f64 / 1e6);
        assert_eq!((*bound, *within), (up_to, bucket["answers"].as_u64().expect("a count") as f64), "{verb}");
    }
}

#[test]
fn without_a_server_it_is_down() {
    let Some(home) = TestHome::new() else { return };
    let outcome = home.cli(&["stats", "--prometheus"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let page = Page::read(&outcome.out).expect("a page");
    assert_eq!((page.of("offshoot_up"), page.figures.len()), (0.0, 1));
    for with in [&["a"][..], &["--json"], &["--watch"]] {
        assert_eq!(home.cli(&[&["stats", "--prometheus"], with].concat()).code, 2, "{with:?}");
    }
}
