//! A line of text into a [`Command`].

use core::fmt;

/// Pages `first` to `first + count - 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// The first page.
    pub first: u64,
    /// How many pages.
    pub count: u64,
}

/// Which words of a page a command is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Every 8-byte word.
    Whole,
    /// The first word.
    FirstWord,
}

/// What the monitor can be told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// List the commands.
    Help,
    /// Say who this VM is.
    Id,
    /// Say which pages there are.
    Mem,
    /// `fill`, `touch`: write the pattern.
    Write(Pages, u64, Extent),
    /// `verify`, `verify-touch`: check the pattern.
    Verify(Pages, u64, Extent),
    /// Clear pages.
    Zero(Pages),
    /// Add up all words.
    Sum(Pages),
    /// Give pages to the balloon.
    Inflate(Pages),
    /// Take pages back from the balloon.
    Deflate(Pages),
    /// Have this VM forked so many times.
    Fork(u32),
    /// Watch the clock for so many milliseconds.
    Gap(u64),
    /// Loop so many times.
    Spin(u64),
    /// Power off.
    Halt,
}

/// All commands with their arguments, as `help` prints them.
pub const USAGE: [&str; 15] = [
    "help",
    "id",
    "mem",
    "fill PAGE COUNT SEED",
    "touch PAGE COUNT SEED",
    "verify PAGE COUNT SEED",
    "verify-touch PAGE COUNT SEED",
    "zero PAGE COUNT",
    "sum PAGE COUNT",
    "inflate PAGE COUNT",
    "deflate PAGE COUNT",
    "fork [COUNT]",
    "gap MS",
    "spin N",
    "halt",
];

/// Why a line is no command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError<'l> {
    /// The line is empty or not UTF-8.
    NotText,
    /// No command has this name.
    Unknown(&'l str),
    /// The arguments are not those of this line of [`USAGE`].
    Usage(&'static str),
}

impl fmt::Display for ParseError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotText => f.write_str("no command"),
            Self::Unknown(name) => write!(f, "unknown command {}", name.escape_default()),
            Self::Usage(usage) => write!(f, "usage: {usage}"),
        }
    }
}

impl Command {
    /// Reads one line.
    pub fn parse(line: &[u8]) -> Result<Self, ParseError<'_>> {
        let line = core::str::from_utf8(line).map_err(|_| ParseError::NotText)?;
        let mut words = line.split_ascii_whitespace();
        let name = words.next().ok_or(ParseError::NotText)?;
        let usage =
            USAGE.into_iter().find(|usage| usage.split(' ').next() == Some(name)).ok_or(ParseError::Unknown(name))?;
        let mut args = Args(words);
        Self::with_args(name, &mut args).filter(|_| args.0.next().is_none()).ok_or(ParseError::Usage(usage))
    }

    fn with_args(name: &str, args: &mut Args<'_>) -> Option<Self> {
        Some(match name {
            "help" => Self::Help,
            "id" => Self::Id,
            "mem" => Self::Mem,
            "fill" => Self::Write(args.pages()?, args.number()?, Extent::Whole),
            "touch" => Self::Write(args.pages()?, args.number()?, Extent::FirstWord),
            "verify" => Self::Verify(args.pages()?, args.number()?, Extent::Whole),
            "verify-touch" => Self::Verify(args.pages()?, args.number()?, Extent::FirstWord),
            "zero" => Self::Zero(args.pages()?),
            "sum" => Self::Sum(args.pages()?),
            "inflate" => Self::Inflate(args.pages()?),
            "deflate" => Self::Deflate(args.pages()?),
            "fork" => Self::Fork(args.count_or_one()?),
            "gap" => Self::Gap(args.number()?),
            "spin" => Self::Spin(args.number()?),
            "halt" => Self::Halt,
            _ => return None,
        })
    }
}

/// The words after a command's name.
struct Args<'l>(core::str::SplitAsciiWhitespace<'l>);

impl Args<'_> {
    fn number(&mut self) -> Option<u64> {
        self.0.next()?.parse().ok()
    }

    fn pages(&mut self) -> Option<Pages> {
        Some(Pages { first: self.number()?, count: self.number()? })
    }

    fn count_or_one(&mut self) -> Option<u32> {
        self.0.next().map_or(Some(1), |word| word.parse().ok()).filter(|&count| count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_usage_line_is_a_command() {
        extern crate std;
        for usage in USAGE {
            let numbers = usage.split(' ').skip(1).map(|_| " 9").collect::<std::string::String>();
            let line = std::format!("{} {numbers}", usage.split(' ').next().unwrap());
            assert!(Command::parse(line.as_bytes()).is_ok(), "{line}");
            let line = std::format!("{line} 1");
            assert_eq!(Command::parse(line.as_bytes()), Err(ParseError::Usage(usage)));
        }
    }

    #[test]
    fn arguments_are_checked() {
        let pages = Pages { first: 64, count: 2 };
        assert_eq!(
            Command::parse(b" fill  64 2 18446744073709551615 "),
            Ok(Command::Write(pages, u64::MAX, Extent::Whole))
        );
        assert_eq!(Command::parse(b"fork"), Ok(Command::Fork(1)));
        for line in ["fork 0", "fork x", "fork 4294967296"] {
            assert_eq!(Command::parse(line.as_bytes()), Err(ParseError::Usage("fork [COUNT]")));
        }
        for line in ["zero 64", "zero -1 2", "zero 1 0x10", "zero 1 18446744073709551616"] {
            assert_eq!(Command::parse(line.as_bytes()), Err(ParseError::Usage("zero PAGE COUNT")));
        }
        assert_eq!(Command::parse(b"boot x"), Err(ParseError::Unknown("boot")));
        assert_eq!(Command::parse(b"  "), Err(ParseError::NotText));
        assert_eq!(Command::parse(b"\xff"), Err(ParseError::NotText));
    }
}
