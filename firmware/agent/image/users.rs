//! Who a program is to run as: `/etc/passwd` and `/etc/group`, as they are.

use crate::sys::Ids;
use agent::message::{Failed, FailedKind};
use std::fs;
use std::path::Path;

/// A user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub ids: Ids,
    /// Its name, where it has one.
    pub name: Option<String>,
    pub home: String,
}

/// The user that `who` (`NAME`, `UID`, `NAME:GROUP`, …) is in the system below `root`.
pub fn find(root: &Path, who: &str) -> Result<User, Failed> {
    let read = |file: &str| {
        // A system may have neither.
        let bytes = fs::read(root.join(file)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    of(&read("etc/passwd"), &read("etc/group"), who)
}

fn of(passwd: &str, group: &str, who: &str) -> Result<User, Failed> {
    let bad =
        |what: &str, name: &str| Failed::new(FailedKind::Bad, format!("there is no {what} {name:?} in the guest"));
    let (name, group_name) = match who.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (who, None),
    };
    let number = name.parse::<u32>().ok();
    let entries = || passwd.lines().map(fields).filter(|entry| entry.len() >= 6);
    let entry = entries()
        .find(|entry| entry[0] == name)
        .or_else(|| entries().find(|entry| number.is_some() && entry[2].parse().ok() == number));
    let (name, user, own_group, home) = match &entry {
        Some(entry) => {
            let id = |field: &str| field.parse::<u32>().map_err(|_| bad("user", name));
            (Some(entry[0].to_owned()), id(entry[2])?, id(entry[3])?, entry[5].to_owned())
        }
        // A number needs no entry.
        None => match number {
            Some(0) => (Some("root".to_owned()), 0, 0, "/root".to_owned()),
            Some(number) => (None, number, number, "/".to_owned()),
            None if name == "root" => (Some("root".to_owned()), 0, 0, "/root".to_owned()),
            None => return Err(bad("user", name)),
        },
    };
    let groups = || group.lines().map(fields).filter(|entry| entry.len() >= 3);
    let group = match group_name {
        None => own_group,
        Some(wanted) => {
            let found = groups().find(|entry| entry[0] == wanted).and_then(|entry| entry[2].parse().ok());
            found.or_else(|| wanted.parse().ok()).ok_or_else(|| bad("group", wanted))?
        }
    };
    let is_member = |entry: &Vec<&str>| {
        entry.get(3).zip(name.as_deref()).is_some_and(|(members, name)| members.split(',').any(|member| member == name))
    };
    let mut all = vec![group];
    all.extend(groups().filter(is_member).filter_map(|entry| entry[2].parse::<u32>().ok()).filter(|&id| id != group));
    Ok(User { ids: Ids { user, group, groups: all }, name, home })
}

fn fields(line: &str) -> Vec<&str> {
    line.split(':').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\n::\nana:x:1000:1000:Ana,,,:/home/ana:/bin/bash\n7:x:50:60::/h:/x\n";
    const GROUP: &str = "root:x:0:\nana:x:1000:\naudio:x:29:bob,ana\nempty:x:30:\nbad:x:y:ana\n";

    fn ids(who: &str) -> (u32, u32, Vec<u32>) {
        let ids = of(PASSWD, GROUP, who).unwrap().ids;
        (ids.user, ids.group, ids.groups)
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        assert_eq!(ids("root"), (0, 0, vec![0]));
        assert_eq!(ids("ana"), (1000, 1000, vec![1000, 29]));
        assert_eq!(ids("1000"), (1000, 1000, vec![1000, 29]));
        assert_eq!(ids("ana:empty"), (1000, 30, vec![30, 29]));
        assert_eq!(ids("ana:77"), (1000, 77, vec![77, 29]));
        assert_eq!(ids("4242"), (4242, 4242, vec![4242]));
        // A name that is a number is a name first.
        assert_eq!(ids("7"), (50, 60, vec![60]));
        assert_eq!(of(PASSWD, GROUP, "ana").unwrap().home, "/home/ana");
        assert_eq!(of("", "", "root").unwrap().ids.user, 0);
    }

    #[test]
    fn who_is_not_there_is_named() {
        let why = |who| String::from_utf8(of(PASSWD, GROUP, who).unwrap_err().why).unwrap();
        assert_eq!(why("bob"), "there is no user \"bob\" in the guest");
        assert_eq!(why("ana:none"), "there is no group \"none\" in the guest");
        assert_eq!(why(""), "there is no user \"\" in the guest");
    }
}
