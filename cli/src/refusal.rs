//! Refusals that a person can act on.

use std::fmt;

pub use bulkhead_proto::{Code, Exit};

/// Why a command was refused: what, where, why and the next step. Never cut when printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    code: Code,
    place: String,
    reason: String,
    help: String,
}

impl Refusal {
    /// A refusal at `place` (a flag, a file, an object) for `reason`; `help` is what to do next.
    pub fn new(
        code: Code,
        place: impl Into<String>,
        reason: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Self {
            code,
            place: place.into(),
            reason: reason.into(),
            help: help.into(),
        }
    }

    /// The kind of refusal.
    pub fn code(&self) -> Code {
        self.code
    }

    /// How the command ends.
    pub fn exit(&self) -> Exit {
        self.code.exit()
    }

    /// The refusal on one line, for messages that stand inside another (a flag's value).
    pub fn one_line(&self) -> String {
        format!("{} ({}; {})", self.reason, self.help, self.code.as_str())
    }
}

/// Text from outside may hold escape sequences; a terminal must not obey what an archive says.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let shown: Vec<char> = if c.is_control() {
                c.escape_default().collect()
            } else {
                vec![c]
            };
            shown
        })
        .collect()
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error[{}]: {}", self.code.as_str(), self.code.title())?;
        writeln!(f, "  where: {}", printable(&self.place))?;
        writeln!(f, "  why:   {}", printable(&self.reason))?;
        write!(f, "  help:  {}", printable(&self.help))
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_where_why_and_the_next_step() {
        let refusal = Refusal::new(
            Code::Unreadable,
            "a.tar",
            "it is a folder\u{1b}[2J",
            "name a file",
        );
        assert_eq!(
            refusal.to_string(),
            "error[BH-E0010]: cannot read\n  where: a.tar\n  why:   it is a folder\\u{1b}[2J\n  help:  name a file"
        );
    }
}
