//! Holds `vmm/docs/protocol.md` and the types together: what one has, the other has.

use super::*;
use serde_json::Value;
use std::collections::BTreeSet;

const PAGE: &str = include_str!("../../docs/protocol.md");

type Names = BTreeSet<String>;

/// The rows of the first table below a heading, as cells.
fn table(heading: &str) -> Vec<Vec<String>> {
    let mut below = PAGE.lines().skip_while(|line| *line != heading).skip(1);
    assert!(below.next().is_some(), "the page has no {heading:?}");
    let section = below.take_while(|line| !line.starts_with('#'));
    let rows = section.skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|')).skip(2);
    let cells = |row: &str| row.trim_matches('|').split(" | ").map(|cell| cell.trim().replace('`', "")).collect();
    rows.map(cells).collect()
}

fn fields(section: &str) -> Names {
    table(&format!("### {section}")).into_iter().map(|mut row| row.remove(0)).collect()
}

fn keys(value: &Value) -> Names {
    value.as_object().expect("an object").keys().cloned().collect()
}

fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("plain data")
}

fn fork() -> Fork {
    Fork {
        name: String::new(),
        count: 1,
        children: Vec::new(),
        prefix: None,
        wait_settled: false,
        wait_agent_ms: None,
        paused: false,
        hint_free_ms: None,
        ttl_ms: None,
    }
}

fn linux() -> Linux {
    Linux { kernel: "/k".into(), initrd: None, cmdline: String::new() }
}

fn launch() -> Launch {
    Launch {
        name: None,
        mem_bytes: MIN_MEMORY,
        vcpus: 1,
        remove_when_off: false,
        linux: Some(linux()),
        shared: Vec::new(),
        ttl_ms: None,
        max_children: None,
        vsock: None,
    }
}

/// One request of each verb.
fn requests() -> Vec<Request> {
    let name = String::new();
    vec![
        Request::Launch(launch()),
        Request::Fork(fork()),
        Request::Send { name: name.clone(), text: String::new(), timeout_ms: 1 },
        Request::Console { name: name.clone() },
        Request::Logs { name: name.clone(), follow: true, tail_lines: None },
        Request::Connect { name: name.clone(), port: 1, timeout_ms: 1 },
        Request::List,
        Request::Tree,
        Request::Stats { name: None },
        Request::Pause { name: name.clone() },
        Request::Resume { name: name.clone() },
        Request::Stop { name: name.clone() },
        Request::Kill { name: name.clone() },
        Request::Wait { name: name.clone(), timeout_ms: None },
        Request::Balloon { name: name.clone(), size_bytes: 1, timeout_ms: 1 },
        Request::Remove { names: Vec::new(), all: true },
        Request::Inspect { name },
        Request::Reclaim { name: None, size_bytes: 1 },
        Request::Budget { set: None },
        Request::Check,
        Request::Shutdown,
    ]
}

/// One answer of each kind.
fn answers() -> Vec<Answer> {
    vec![
        Answer::Launched(VmSummary::default()),
        Answer::Forked(Vec::new()),
        Answer::Said(String::new()),
        Answer::Connected(Connected { name: String::new(), generation: 0 }),
        Answer::Stream,
        Answer::Vms(Vec::new()),
        Answer::Tree(Vec::new()),
        Answer::Stats(Stats::default()),
        Answer::Removed(Removed::default()),
        Answer::Ended(VmSummary::default()),
        Answer::Ballooned(Balloon::default()),
        Answer::Inspected(Box::default()),
        Answer::Reclaimed(Reclaimed::default()),
        Answer::Budget(BudgetReport::default()),
        Answer::Checked(CheckReport::default()),
        Answer::Done,
    ]
}

/// The headings of a chapter.
fn sections(chapter: &str) -> Names {
    let below = PAGE.lines().skip_while(|line| *line != chapter).skip(1);
    let chapter = below.take_while(|line| !line.starts_with("## "));
    chapter.filter_map(|line| line.strip_prefix("### ")).map(str::to_owned).collect()
}

#[test]
fn every_request_is_on_the_page() {
    let mut verbs = Names::new();
    for request in requests() {
        let value = json(&request);
        assert_eq!(value["verb"], request.kind().word());
        assert_eq!(json(&request.kind()), request.kind().word());
        let mut fields_sent = keys(&value);
        fields_sent.remove("verb");
        assert_eq!(fields(request.kind().word()), fields_sent, "{}", request.kind().word());
        verbs.insert(request.kind().word().to_owned());
    }
    assert_eq!(verbs.len(), RequestKind::ALL.len(), "one of each");
    assert_eq!(fields("linux"), keys(&json(&linux())));
    verbs.insert("linux".into());
    assert_eq!(sections("## Requests"), verbs);
}

#[test]
fn every_answer_is_on_the_page() {
    let listed: Names = table("## Answers").into_iter().map(|mut row| row.remove(0)).collect();
    let told = answers().iter().map(|answer| json(answer)["answer"].as_str().expect("a kind").to_owned()).collect();
    assert_eq!(listed, told);
    assert_eq!(fields("greeting"), keys(&json(&Greeting::default())));
    assert_eq!(fields("error"), keys(&json(&Failure::failed("x"))));
    assert_eq!(table("### greeting")[0][2], format!("version of the protocol: {PROTOCOL}"));
}

#[test]
fn every_field_is_on_the_page() {
    let vm = keys(&json(&VmSummary::default()));
    assert_eq!(fields("VM"), vm);
    let beside_vm = |value: Value| keys(&value).difference(&vm).cloned().collect::<Names>();
    assert_eq!(fields("row of the tree"), beside_vm(json(&TreeRow::default())));
    assert_eq!(fields("figures of a VM"), beside_vm(json(&VmStats::default())));
    for (section, value) in [
        ("connected", json(&Connected { name: String::new(), generation: 0 })),
        ("child", json(&Child::default())),
        ("agent", json(&AgentNotice::default())),
        ("removed", json(&Removed::default())),
        ("balloon's value", json(&Balloon::default())),
        ("reclaimed", json(&Reclaimed::default())),
        ("budget's value", json(&BudgetReport::default())),
        ("report of a check", json(&CheckReport::default())),
        ("stats' value", json(&Stats::default())),
        ("guest_stats", json(&GuestStats::default())),
        ("requests of a kind", json(&RequestLatency::default())),
        ("bucket", json(&LatencyBucket::default())),
        ("figures of the server", json(&Totals::default())),
        ("inspection", json(&Inspection::default())),
        ("confinement", json(&Confinement::default())),
        ("limits", json(&Limits::default())),
        ("entry", json(&EntryInfo::default())),
        ("run", json(&RunInfo::default())),
    ] {
        assert_eq!(fields(section), keys(&value), "{section}");
    }
}

#[test]
fn every_kind_of_error_is_on_the_page_with_its_exit_code() {
    let kind = |kind: &ErrorKind| json(kind).as_str().expect("a word").to_owned();
    let kinds: Vec<_> = ErrorKind::ALL.iter().map(|of| (kind(of), of.exit_code().to_string())).collect();
    let rows = table("## Kinds of error").into_iter();
    let listed: Vec<_> = rows.map(|row| (row[0].clone(), row[1].clone())).collect();
    assert_eq!(listed, kinds);
}

/// Numbers that are neither bytes, pages nor durations: counts of something else, ids and addresses.
const UNITLESS: [&str; 41] = [
    "answers",
    "failures",
    "protocol",
    "pid",
    "vcpus",
    "count",
    "tail_lines",
    "port",
    "id",
    "parent_id",
    "depth",
    "max_children",
    "user",
    "group",
    "root_entries",
    "open_files",
    "processes",
    "window_runs",
    "vms",
    "mappings",
    "pages",
    "chain_depth",
    "traps",
    "messages",
    "major_faults",
    "minor_faults",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "alloc_stalls",
    "server_pid",
    "objects",
    "stores",
    "stage2_tables",
    "stage2_tables_unshared_equivalent",
    "pooled",
    "swap_slots",
    "generation",
    "keeper_pid",
    "start",
    "end",
];

/// Whoever reads a figure knows its unit.
#[test]
fn figures_are_called_by_their_units() {
    let rows = PAGE.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    for (field, _) in rows.filter(|(_, rest)| rest.starts_with("integer")) {
        let unit = ["_bytes", "_pages", "_us", "_ms"].iter().any(|unit| field.ends_with(unit));
        assert!(unit || UNITLESS.contains(&field), "what is {field} counted in?");
    }
}
