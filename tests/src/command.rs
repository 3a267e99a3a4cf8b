//! How a command line ended.

use serde_json::Value;
use std::process::Output;

/// What a command said, and its exit code.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command, for messages.
    pub command: String,
    /// Its exit code; -1 if a signal ended it, 124 if it took too long.
    pub code: i32,
    /// Its output.
    pub out: String,
    /// What it had to say beside that.
    pub err: String,
}

impl Outcome {
    /// Of a command that has ended.
    pub fn new(command: String, output: Output) -> Self {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().unwrap_or(-1);
        Self { command, code, out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// Its output, for a command that has to succeed, and quietly.
    #[track_caller]
    pub fn good(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (0, ""), "{self:?}");
        self.out
    }

    /// Its JSON, for a command that has to succeed.
    #[track_caller]
    pub fn json(self) -> Value {
        let command = self.command.clone();
        let out = self.good();
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{command}: {e}: {out}"))
    }

    /// Its one line on stderr, for a command that has to fail with `code` and say nothing else.
    #[track_caller]
    pub fn failure(self, code: i32) -> String {
        assert_eq!((self.code, self.out.as_str()), (code, ""), "{self:?}");
        assert_eq!(self.err.lines().count(), 1, "not one line: {self:?}");
        assert!(self.err.starts_with("offshoot: ") && self.err.ends_with('\n'), "{self:?}");
        self.err
    }
}
