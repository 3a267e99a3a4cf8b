//! `send` and `exec`: where the guest's line begins, and which words are options of ours.
//!
//! People write `send VM ls -la` as well as `send VM id --timeout 5`. Words that are options of `send` are options, wherever
//! they stand; whatever else has a dash belongs to the line, and so does all that comes after `--`. `--help` is the guest's
//! once the line has begun.
//!
//! Of `exec`, options stand before the VM's name, and all that follows it is the program's, but for a `--` right after it.

use super::Cli;
use clap::{Arg, CommandFactory};
use std::ffi::OsString;

/// The words of a command line, those of a `send` and an `exec` put in an order that the parser takes: options, `--`, the rest.
pub fn in_order(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let words: Vec<OsString> = words.into_iter().collect();
    let cli = Cli::command();
    let global: Vec<Arg> = cli.get_arguments().filter(|arg| arg.is_global_set()).cloned().collect();
    let Some(verb) = verb_at(&words, &global) else { return words };
    let Some(name) = ["send", "exec"].into_iter().find(|&name| words[verb] == name) else { return words };
    let command = cli.find_subcommand(name).expect("there is such a verb");
    let own: Vec<Arg> = command.get_arguments().filter(|arg| !arg.is_positional()).chain(&global).cloned().collect();
    match name {
        "exec" => program(&words, verb, &own),
        _ => line(&words, verb, &own),
    }
}

/// The words of an `exec`.
fn program(words: &[OsString], verb: usize, own: &[Arg]) -> Vec<OsString> {
    let mut name = verb + 1;
    while let Some(word) = words.get(name).map(|word| word.to_string_lossy()).filter(|word| word.starts_with('-')) {
        name += 1;
        match &*word {
            "--" => break,
            word if option(word, own).or_else(|| cluster(word, own)) == Some(true) => name += 1,
            _ => {}
        }
    }
    let (options, rest) = words.split_at(name.min(words.len()));
    let Some((vm, rest)) = rest.split_first() else { return words.to_vec() };
    let rest = rest.strip_prefix(&[OsString::from("--")]).unwrap_or(rest);
    let mut ordered = options.to_vec();
    if ordered.last().is_none_or(|word| word != "--") {
        ordered.push("--".into());
    }
    ordered.push(vm.clone());
    ordered.extend_from_slice(rest);
    ordered
}

/// Whether the last of some short options takes the next word as its value.
fn cluster(word: &str, options: &[Arg]) -> Option<bool> {
    let letters = word.strip_prefix('-')?;
    for (at, letter) in letters.char_indices() {
        let arg = options.iter().find(|arg| arg.get_short() == Some(letter))?;
        if arg.get_action().takes_values() {
            return Some(at + letter.len_utf8() == letters.len());
        }
    }
    Some(false)
}

/// The words of a `send`.
fn line(words: &[OsString], verb: usize, own: &[Arg]) -> Vec<OsString> {
    let mut options = words[..=verb].to_vec();
    let mut line: Vec<OsString> = Vec::new();
    let mut rest = words[verb + 1..].iter();
    while let Some(word) = rest.next() {
        let text = word.to_string_lossy();
        if text == "--" {
            line.extend(rest.by_ref().cloned());
        } else if let Some(takes_value) = option(&text, own) {
            options.push(word.clone());
            options.extend(takes_value.then(|| rest.next()).flatten().cloned());
        } else if line.len() <= 1 && matches!(&*text, "-h" | "--help") || line.is_empty() && text.starts_with('-') {
            // No VM is called that: the parser knows what it is, or says that it does not.
            options.push(word.clone());
        } else {
            line.push(word.clone());
        }
    }
    if !line.is_empty() {
        options.push("--".into());
        options.extend(line);
    }
    options
}

/// Where the verb is.
fn verb_at(words: &[OsString], global: &[Arg]) -> Option<usize> {
    let mut at = 1;
    loop {
        let word = words.get(at)?.to_string_lossy();
        match option(&word, global) {
            Some(takes_value) => at += 1 + usize::from(takes_value),
            None if word.starts_with('-') => at += 1,
            None => return Some(at),
        }
    }
}

/// Whether a word is one of these options, and the next word its value.
fn option(word: &str, options: &[Arg]) -> Option<bool> {
    let (name, value) = match word.strip_prefix("--")?.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (&word[2..], None),
    };
    let arg = options.iter().find(|arg| arg.get_long() == Some(name))?;
    Some(value.is_none() && arg.get_action().takes_values())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ordered(line: &str) -> String {
        let words = in_order(line.split(' ').map(OsString::from));
        words.into_iter().map(|word| word.into_string().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_is_no_option_of_ours_belongs_to_the_line() {
        for (typed, taken) in [
            ("offshoot send a ls -la", "offshoot send -- a ls -la"),
            ("offshoot send a -x", "offshoot send -- a -x"),
            ("offshoot send a df -h --help", "offshoot send -- a df -h --help"),
            ("offshoot send a id --timeout 5", "offshoot send --timeout 5 -- a id"),
            ("offshoot send --json a id --timeout=5 -l", "offshoot send --json --timeout=5 -- a id -l"),
            ("offshoot --home /x send a ls --home /y", "offshoot --home /x send --home /y -- a ls"),
            ("offshoot send a -- x --json", "offshoot send -- a x --json"),
            ("offshoot send --fly a", "offshoot send --fly -- a"),
            ("offshoot send --help", "offshoot send --help"),
            ("offshoot send a --help", "offshoot send --help -- a"),
            ("offshoot send", "offshoot send"),
        ] {
            assert_eq!(ordered(typed), taken, "{typed}");
        }
    }

    #[test]
    fn what_follows_the_name_is_the_programs() {
        for (typed, taken) in [
            ("offshoot exec a ls -la", "offshoot exec -- a ls -la"),
            ("offshoot exec -it a sh -i --json", "offshoot exec -it -- a sh -i --json"),
            ("offshoot exec -e K=V -w /x -uroot a -x", "offshoot exec -e K=V -w /x -uroot -- a -x"),
            ("offshoot exec -itw /x a ls", "offshoot exec -itw /x -- a ls"),
            ("offshoot exec --env K --user=b --timeout 5 a ls", "offshoot exec --env K --user=b --timeout 5 -- a ls"),
            ("offshoot --home /x exec --home /y a ls --home /z", "offshoot --home /x exec --home /y -- a ls --home /z"),
            ("offshoot exec a -- ls -- -l", "offshoot exec -- a ls -- -l"),
            ("offshoot exec -- a -- ls", "offshoot exec -- a ls"),
            ("offshoot exec a", "offshoot exec -- a"),
            ("offshoot exec -h", "offshoot exec -h"),
            ("offshoot exec --fly a ls", "offshoot exec --fly -- a ls"),
            ("offshoot exec -w", "offshoot exec -w"),
        ] {
            assert_eq!(ordered(typed), taken, "{typed}");
        }
    }

    #[test]
    fn other_verbs_stay_as_they_are() {
        for line in ["offshoot", "offshoot launch send -m 16M", "offshoot --home send ls", "offshoot --fly"] {
            assert_eq!(ordered(line), line);
        }
    }
}
