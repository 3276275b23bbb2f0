//! How the command ends: exit codes for scripts, and refusals that a person can act on.
//!
//! Both are interfaces: a number or a code that was published keeps its meaning.

use std::fmt;

macro_rules! exits {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $meaning:literal;)*) => {
        /// How a command ended, as its exit code.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Exit { $($(#[$doc])* $name = $number,)* }

        impl Exit {
            /// Every exit code, in order.
            pub const ALL: &[Exit] = &[$(Exit::$name,)*];

            /// What the code means, as the help topic prints it.
            pub const fn meaning(self) -> &'static str {
                match self { $(Exit::$name => $meaning,)* }
            }
        }
    };
}

exits! {
    /// It was done.
    Done = 0, "done, and converged if the command waits";
    /// What no other code says.
    Failed = 1, "any other error";
    /// The command line itself is wrong.
    Usage = 2, "wrong usage";
    /// No such object, or several.
    NotFound = 3, "not found, or ambiguous";
    /// The cluster goes on; the wait is over.
    NotConverged = 4, "accepted, but not converged before the timeout";
    /// An update stopped half-way.
    Paused = 5, "update paused";
    /// An update went back by itself.
    RolledBack = 6, "update rolled back";
    /// No node can take the task as things stand.
    Unplaceable = 7, "cannot be placed: no node can ever fit as things stand";
    /// The caller may not.
    Denied = 8, "denied: authentication, authorisation or policy";
    /// The cluster cannot decide now.
    NoQuorum = 9, "no quorum, no leader, or the cluster is locked";
    /// The object changed meanwhile.
    Conflict = 10, "conflict: the object changed meanwhile";
    /// `plan --exit-code` found something to do.
    Changes = 11, "the plan found changes";
    /// Ctrl-C.
    Interrupted = 130, "interrupted; the operation goes on in the cluster";
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $exit:ident, $title:literal;)*) => {
        /// The stable name of one kind of refusal.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code { $($(#[$doc])* $name,)* }

        impl Code {
            /// Every code, in order.
            pub const ALL: &[Code] = &[$(Code::$name,)*];

            /// The code as it is printed and documented.
            pub const fn as_str(self) -> &'static str {
                match self { $(Code::$name => $number,)* }
            }

            /// What happened, in a few words.
            pub const fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)* }
            }

            /// The exit code of a command that this refusal ends.
            pub const fn exit(self) -> Exit {
                match self { $(Code::$name => Exit::$exit,)* }
            }
        }
    };
}

codes! {
    /// A duration, size or number of CPUs.
    BadQuantity = "BH-E0001", Usage, "not a quantity";
    /// A name, label, port, constraint, tmpfs or variable.
    BadField = "BH-E0002", Usage, "not a valid value";
    /// More than a limit allows.
    OverLimit = "BH-E0003", Usage, "over a limit";
    /// A file could not be read.
    Unreadable = "BH-E0010", Failed, "cannot read";
    /// A file could not be written.
    Unwritable = "BH-E0011", Failed, "cannot write";
    /// `image pack` takes static programs only.
    NotStaticProgram = "BH-E0020", Failed, "not a static program";
    /// The archive or folder is no OCI layout.
    NotOciLayout = "BH-E0021", Failed, "not an OCI image layout";
    /// Content and digest or size differ.
    DamagedBlob = "BH-E0022", Failed, "content does not match its descriptor";
    /// An image that this cluster cannot run.
    UnsupportedImage = "BH-E0023", Failed, "image not supported";
    /// A layout with several images, and nothing says which.
    AmbiguousImage = "BH-E0024", NotFound, "which image is meant?";
    /// A help topic or command that does not exist.
    UnknownTopic = "BH-E0030", NotFound, "no such help topic";
}

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

    #[test]
    fn every_code_and_exit_is_documented_once() {
        let errors = include_str!("../../docs/reference/errors.md");
        for code in Code::ALL {
            let row = format!(
                "| `{}` | {} | {} |",
                code.as_str(),
                code.exit() as u8,
                code.title()
            );
            assert_eq!(errors.matches(&row).count(), 1, "{row}");
        }
        let exits = include_str!("../../docs/reference/exit-codes.md");
        for exit in Exit::ALL {
            let row = format!("| {} | {} |", *exit as u8, exit.meaning());
            assert_eq!(exits.matches(&row).count(), 1, "{row}");
        }
    }
}
