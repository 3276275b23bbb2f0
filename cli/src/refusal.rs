//! Refusals that a person can act on.

use std::fmt;

use bulkhead_proto::{CODE_KEY, HINT_KEY};
pub use bulkhead_proto::{Code, Exit};
use tonic::Status;

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

    /// Why.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Whether its reason has these words.
    pub(crate) fn says(&self, words: &str) -> bool {
        self.reason.contains(words)
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
pub(crate) fn printable(text: &str) -> String {
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

/// The code that a manager's refusal carries.
pub(crate) fn code_of(status: &Status) -> Option<Code> {
    status
        .metadata()
        .get(CODE_KEY)?
        .to_str()
        .ok()
        .and_then(Code::parse)
}

/// A manager's refusal, or a failed connection, as ours. `place` is what the request was about.
pub(crate) fn from_status(status: &Status, place: &str) -> Refusal {
    use tonic::Code as Grpc;
    let (code, help) = match status.code() {
        Grpc::NotFound => (Code::NotFound, "the noun's 'ls' shows what there is"),
        Grpc::AlreadyExists => (Code::NameTaken, "choose another name"),
        Grpc::PermissionDenied => (Code::Denied, "use a context that may, see 'bulkhead context ls'"),
        Grpc::Unauthenticated => (
            Code::UnknownCaller,
            "ask for a new certificate: 'bulkhead operator issue'",
        ),
        Grpc::FailedPrecondition => (Code::InUse, "remove what stands against it first"),
        Grpc::Aborted => (Code::Conflict, "look at the object and try again"),
        Grpc::InvalidArgument => (Code::Invalid, "correct it and try again"),
        Grpc::ResourceExhausted => (Code::OverLimit, "ask for less at once"),
        Grpc::Unimplemented => (
            Code::Unsupported,
            "'bulkhead health' with the same --socket says what the program there waits for; check the versions, too",
        ),
        Grpc::Unavailable | Grpc::DeadlineExceeded => (
            Code::NoQuorum,
            "'bulkhead cluster status' shows which managers are up",
        ),
        _ => (Code::Internal, "the manager's log says more"),
    };
    let hint = status
        .metadata()
        .get_bin(HINT_KEY)
        .and_then(|hint| hint.to_bytes().ok());
    let hint = hint.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    // What serves none of our methods at all says nothing more.
    let why = match (status.code(), status.message()) {
        (Grpc::Unimplemented, "") => "this program does not serve that, or not yet",
        (_, message) => message,
    };
    Refusal::new(
        code_of(status).unwrap_or(code),
        place,
        why,
        hint.filter(|hint| !hint.is_empty())
            .unwrap_or_else(|| help.to_owned()),
    )
}

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
    fn a_program_that_does_not_serve_it_is_not_quoted_with_nothing() {
        let refusal = from_status(&Status::unimplemented(""), "cluster status").to_string();
        assert!(refusal.contains("does not serve that"), "{refusal}");
        assert!(refusal.contains("bulkhead health"), "{refusal}");
    }

    #[test]
    fn a_status_keeps_its_code_and_next_step() {
        let mut status = Status::failed_precondition("service web uses it");
        status
            .metadata_mut()
            .insert(CODE_KEY, "BH-E0064".parse().expect("ASCII"));
        let hint = tonic::metadata::MetadataValue::from_bytes("remove 'web' – first".as_bytes());
        status.metadata_mut().insert_bin(HINT_KEY, hint);
        let refusal = from_status(&status, "secret db");
        assert_eq!(
            refusal.to_string(),
            "error[BH-E0064]: still in use\n  where: secret db\n  why:   service web uses it\n  help:  remove 'web' – first"
        );
        assert_eq!(
            from_status(&Status::unauthenticated("x"), "x").exit(),
            Exit::Denied
        );
        assert_eq!(from_status(&Status::unavailable("x"), "x").exit(), Exit::NoQuorum);
    }
}
