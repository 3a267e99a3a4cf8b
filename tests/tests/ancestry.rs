//! Names and ids: who descends from whom stays so, whatever VMs are called and whichever are gone.

use offshoot_tests::process::{is_alive, kill};
use offshoot_tests::{TEN_SECONDS, TestHome, wait_until};
use serde_json::Value;

fn row(rows: &Value, name: &str) -> Value {
    rows.as_array().unwrap().iter().find(|row| row["name"] == name).cloned().unwrap_or_default()
}

/// A new VM of an old name was drawn as the parent of the old one's children.
#[test]
fn a_new_vm_of_an_old_name_has_no_children_of_the_old_one() {
    let Some(home) = TestHome::new() else { return };
    let first = home.cli(&["launch", "base", "-m", "16M", "--json"]).json();
    let child = home.cli(&["fork", "base", "--json"]).json()[0].clone();
    home.cli(&["rm", "base"]).good();
    let second = home.cli(&["launch", "base", "-m", "16M", "--json"]).json();
    assert!(first["id"].as_u64() < child["id"].as_u64() && child["id"].as_u64() < second["id"].as_u64());

    let tree = home.cli(&["tree", "--json"]).json();
    let (parent, orphan) = (row(&tree, "base"), row(&tree, "base-1"));
    assert_eq!((&parent["depth"], &orphan["depth"]), (&Value::from(0), &Value::from(0)), "{tree}");
    assert_eq!((&orphan["parent"], &orphan["parent_id"]), (&Value::from("base"), &first["id"]), "{tree}");
    assert_eq!(orphan["parent_is_gone"], true);
    assert!(home.cli(&["tree"]).good().contains("of base (gone)"));
    assert!(home.cli(&["ls"]).good().contains("base (gone)"));
    let inspection = home.cli(&["inspect", "base", "--json"]).json();
    assert_eq!((&inspection["children"], &inspection["child_ids"]), (&Value::Array(vec![]), &Value::Array(vec![])));

    // The family of the new one is another, and its children are not called like those of the old one.
    let next = home.cli(&["fork", "base", "--json"]).json()[0].clone();
    assert_eq!(next["name"], "base-2");
    let inspection = home.cli(&["inspect", "base", "--json"]).json();
    assert_eq!((&inspection["children"][0], &inspection["child_ids"][0]), (&next["name"], &next["id"]));
}

/// Names grew with each generation, and the 31st had none.
#[test]
fn names_do_not_grow_with_depth() {
    let Some(home) = TestHome::new() else { return };
    home.cli(&["launch", "base", "-m", "16M"]).good();
    let mut last = "base".to_owned();
    for generation in 1..=40 {
        let child = home.cli(&["fork", &last]).good().trim().to_owned();
        assert_eq!(child, format!("base-{generation}"));
        home.cli(&["rm", &last]).good();
        last = child;
    }
    home.cli(&["fork", "base-40", "worker"]).good();
    assert_eq!(home.cli(&["fork", "worker", "--count", "2"]).good(), "base-41\nbase-42\n");
    assert_eq!(home.cli(&["fork", "worker", "--name", "job"]).good(), "job-1\n");
    // Nobody gets the name of one that is gone, unless it is asked for.
    home.cli(&["rm", "base-42", "job-1"]).good();
    assert_eq!(home.cli(&["fork", "base-41"]).good(), "base-43\n");
    assert_eq!(home.cli(&["fork", "base-41", "--name", "job"]).good(), "job-2\n");
    assert_eq!(home.cli(&["fork", "base-41", "base-42"]).good(), "base-42\n");
    // A guest that forks itself has its children called so, too.
    assert_eq!(home.cli(&["send", "worker", "fork"]).good(), "ok parent child=base-44\n");
    let tree = home.cli(&["tree", "worker"]).good();
    assert!(tree.contains("├─ base-41") && tree.contains("└─ base-44"), "{tree}");
}

/// Ids go on where an earlier server of the home stopped, however it ended.
#[test]
fn no_id_is_given_twice_by_servers_one_after_the_other() {
    let Some(home) = TestHome::new() else { return };
    let mut highest = 0;
    for round in 0..3 {
        assert_eq!(home.cli(&["launch", "a", "-m", "16M"]).code, 0);
        let ids: Vec<u64> = home
            .cli(&["fork", "a", "--count", "3", "--json"])
            .json()
            .as_array()
            .unwrap()
            .iter()
            .map(|child| child["id"].as_u64().expect("an id"))
            .collect();
        assert!(ids.iter().all(|&id| id > highest), "{ids:?} after {highest}");
        highest = *ids.last().unwrap();
        let server = home.server().expect("a server");
        match round {
            0 => kill(server),
            1 => drop(home.cli(&["shutdown"]).good()),
            _ => return,
        }
        wait_until("it has ended", TEN_SECONDS, || !is_alive(server));
    }
}
