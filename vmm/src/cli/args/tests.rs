use super::*;
use clap::CommandFactory;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(in_order(line.split(' ').map(Into::into)))
}

#[test]
fn the_command_line_makes_sense() {
    Cli::command().debug_assert();
}

#[test]
fn what_the_issue_shows_is_understood() {
    for line in [
        "offshoot launch",
        "offshoot launch base -m 1G --vcpus 1 --attach --rm",
        "offshoot launch --mem 64M --home /tmp/x",
        "offshoot --home /tmp/x --log-level debug fork base --count 3 --name w --wait-settled --paused --json",
        "offshoot fork base --hint-free",
        "offshoot fork --hint-free base",
        "offshoot fork base --hint-free=20 --json",
        "offshoot send base verify 64 10 1 --timeout 0.5",
        "offshoot logs base --follow",
        "offshoot ls --json",
        "offshoot send base ls -la",
        "offshoot send base -x",
        "offshoot ps -q",
        "offshoot fork base worker",
        "offshoot fork base w1 w2 --paused",
        "offshoot fork base -n 3 --prefix w",
        "offshoot launch --memory 0.5G",
        "offshoot launch --memory 512MiB --json",
        "offshoot stop a b",
        "offshoot kill a b",
        "offshoot wait a b --timeout 3",
        "offshoot stats --watch",
        "offshoot stats base -w=0.5",
        "offshoot tree base",
        "offshoot logs base --tail 10 -f",
        "offshoot completions zsh",
        "offshoot man fork",
        "offshoot balloon base 64M --timeout 5 --json",
        "offshoot rm a b",
        "offshoot rm --all",
        "offshoot stats base --json",
        "offshoot reclaim base 64M",
        "offshoot reclaim --all 64M --json",
        "offshoot reclaim 64M --all",
        "offshoot budget",
        "offshoot budget none",
        "offshoot budget 1G --json",
        "offshoot serve --swap /x/swap:1G --compressed 64M --memory 1G",
        "offshoot serve --swap /x/a:b:1G --compressed 0",
        "offshoot serve --swap /x/swap",
        "offshoot serve --auto-balloon off",
        "offshoot serve --auto-balloon idle --balloon-idle 2.5",
        "offshoot serve --answer-within 0.5",
        "offshoot vm-process",
    ] {
        parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
}

#[test]
fn what_makes_no_sense_is_not() {
    for line in [
        "offshoot launch a/b",
        "offshoot launch --mem 0",
        "offshoot launch --mem 3",
        "offshoot launch --mem 16777217",
        "offshoot launch --mem 99999999999G",
        "offshoot launch --initrd x",
        "offshoot launch --vcpus 256",
        "offshoot balloon base",
        "offshoot balloon base 15M",
        "offshoot fork base --count 0",
        "offshoot fork base --count -1",
        "offshoot fork base --name x/y",
        "offshoot fork",
        "offshoot fork base --hint-free=0",
        "offshoot fork base --hint-free=10001",
        "offshoot fork base --hint-free=soon",
        "offshoot send base",
        "offshoot send base hello --timeout 0",
        "offshoot send base hello --timeout nan",
        "offshoot send base hello --timeout 1e99",
        "offshoot rm",
        "offshoot rm a --all",
        "offshoot reclaim",
        "offshoot reclaim 64M",
        "offshoot reclaim base",
        "offshoot reclaim --all",
        "offshoot reclaim base 64Q",
        "offshoot reclaim base 64M --all",
        "offshoot budget x",
        "offshoot budget 3",
        "offshoot serve --swap /x/swap:y",
        "offshoot serve --swap /x/swap:",
        "offshoot serve --swap /x/swap:4K",
        "offshoot serve --swap :1G",
        "offshoot serve --compressed much",
        "offshoot serve --memory 1",
        "offshoot serve --auto-balloon maybe",
        "offshoot serve --balloon-idle 0",
        "offshoot serve --answer-within 0",
        "offshoot serve --answer-within soon",
        "offshoot launch -- -x",
        "offshoot launch -- --all",
        "offshoot launch --json --attach",
        "offshoot fork base worker --count 2",
        "offshoot fork base worker --name w",
        "offshoot fork base --count 1001",
        "offshoot send base id --expect=",
        "offshoot stop",
        "offshoot ls -q --json",
        "offshoot stats --watch=0",
        "offshoot logs base --tail x",
        "offshoot reclaim base 0",
        "offshoot reclaim base 4095",
        "offshoot serve --compressed 1",
        "offshoot completions tcl",
        "offshoot fly",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
}
