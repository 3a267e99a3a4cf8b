//! Values of arguments: what reads as one, and what is refused.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;
use vmm::api::MIN_MEMORY;
use vmm::name::{NameError, check_name};
use vmm::units::{ByteSize, PAGE_BYTES, SizeError};

/// A budget as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget(pub Option<ByteSize>);

/// A file or a block device, and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapPlace {
    pub path: PathBuf,
    pub size: Option<ByteSize>,
}

/// The smallest swap file, and the smallest compressed tier that is one.
const MIN_SWAP: u64 = 1 << 20;

pub fn budget(text: &str) -> Result<Budget, String> {
    match text {
        "none" => Ok(Budget(None)),
        size => budget_size(size).map(|size| Budget(Some(size))),
    }
}

pub fn budget_size(text: &str) -> Result<ByteSize, String> {
    at_least(size(text)?, MIN_MEMORY, "a budget")
}

pub fn compressed(text: &str) -> Result<ByteSize, String> {
    match size(text)? {
        ByteSize(0) => Ok(ByteSize(0)),
        size => at_least(size, MIN_SWAP, "memory for compressed pages, unless it is 0,"),
    }
}

pub fn swap_place(text: &str) -> Result<SwapPlace, String> {
    let (path, size) = match text.rsplit_once(':') {
        None => (text, None),
        Some((path, size)) => {
            let size = size.parse::<ByteSize>().map_err(|e| format!("{size:?}: {e}"))?;
            (path, Some(at_least(size, MIN_SWAP, "a swap file")?))
        }
    };
    if path.is_empty() {
        return Err("no path".into());
    }
    Ok(SwapPlace { path: path.into(), size })
}

/// Something that pages can make up.
pub fn some_pages(text: &str) -> Result<ByteSize, String> {
    at_least(size(text)?, PAGE_BYTES, "what is taken out of memory")
}

fn size(text: &str) -> Result<ByteSize, String> {
    text.parse::<ByteSize>().map_err(|e| e.to_string())
}

fn at_least(size: ByteSize, least: u64, what: &str) -> Result<ByteSize, String> {
    if size.0 >= least { Ok(size) } else { Err(format!("{what} has at least {}, and this is {size}", ByteSize(least))) }
}

pub fn vm_name(text: &str) -> Result<String, NameError> {
    check_name(text).map(|()| text.to_owned())
}

pub fn guest_memory(text: &str) -> Result<ByteSize, SizeError> {
    text.parse::<ByteSize>()?.as_guest_memory()
}

pub fn seconds(text: &str) -> Result<Duration, &'static str> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|time| !time.is_zero()).ok_or("not a number of seconds above 0, like 5 or 0.5")
}

/// A time to live is no longer than that: ten years.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Seconds, or a number with a unit.
pub fn duration(text: &str) -> Result<Duration, &'static str> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(unit);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return Err(NO_DURATION),
    };
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let number = digits.parse::<f64>().ok().filter(|_| plain);
    let time = number.and_then(|number| Duration::try_from_secs_f64(number * seconds).ok());
    time.filter(|time| (Duration::from_millis(1)..=LONGEST).contains(time)).ok_or(NO_DURATION)
}

const NO_DURATION: &str =
    "not a duration from 1ms to 3650d: write seconds, or a number and ms, s, m, h or d, like 90 or 1.5h";

/// A port of the host and one of a guest.
pub fn ports(text: &str) -> Result<(u16, u16), &'static str> {
    let ports = text.split_once(':').and_then(|(host, guest)| Some((host.parse().ok()?, guest.parse().ok()?)));
    ports.filter(|&(_, guest)| guest > 0).ok_or("not two ports, like 8080:80, where the first may be 0")
}

/// A pattern that says something: an empty one is in everything.
pub fn pattern(text: &str) -> Result<regex::Regex, String> {
    if text.is_empty() {
        return Err("an empty pattern is in everything that is printed".into());
    }
    regex::Regex::new(text).map_err(|e| e.to_string())
}

/// A number of a range, which a refusal names as people do.
pub fn number<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display + Clone + Send + Sync,
{
    move |text| match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("not a number from {} to {}", range.start(), range.end())),
    }
}
