//! How a manager says no: a gRPC status whose metadata names the refusal and the next step.

use bulkhead_proto::{CODE_KEY, Code, HINT_KEY};
use tonic::Status;
use tonic::metadata::{AsciiMetadataValue, BinaryMetadataValue};

use crate::proposer::ProposeError;

/// Characters of a message or hint. Both travel as HTTP/2 headers, whose list is bounded by the receiver.
const TEXT_CHARS: usize = 1_024;

/// A refusal for the wire: `message` says what, where and why, `hint` what to do next.
pub fn refuse(code: Code, grpc: tonic::Code, message: impl AsRef<str>, hint: impl AsRef<str>) -> Status {
    let mut status = Status::new(grpc, bounded(message.as_ref()));
    let metadata = status.metadata_mut();
    metadata.insert(CODE_KEY, AsciiMetadataValue::from_static(code.as_str()));
    metadata.insert_bin(
        HINT_KEY,
        BinaryMetadataValue::from_bytes(bounded(hint.as_ref()).as_bytes()),
    );
    status
}

/// Which refusal a manager's answer is; none where it is no refusal of ours.
pub fn code(status: &Status) -> Option<Code> {
    let named = status.metadata().get(CODE_KEY)?.to_str().ok()?;
    Code::parse(named)
}

/// Names from requests end up in messages, so a long one must not push out the reason's own headers.
fn bounded(text: &str) -> String {
    match text.char_indices().nth(TEXT_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// An error with its causes, for the local log: the wire says less.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// A change that has no outcome.
pub fn not_proposed(error: &ProposeError) -> Status {
    let (code, grpc, hint) = match error {
        ProposeError::NoLeader | ProposeError::TermOver => (
            Code::NoQuorum,
            tonic::Code::Unavailable,
            "try again; `bulkhead cluster status` says who is missing",
        ),
        ProposeError::Busy => (Code::Busy, tonic::Code::ResourceExhausted, "try again shortly"),
        ProposeError::Full => (
            Code::StorageFull,
            tonic::Code::ResourceExhausted,
            "free some space under the data folder of the leading manager",
        ),
        ProposeError::TooLarge { .. } => (Code::OverLimit, tonic::Code::InvalidArgument, "make it smaller"),
        ProposeError::Unknown => (
            Code::OutcomeUnknown,
            tonic::Code::Unavailable,
            "ask again with the same request id, or look whether it was made",
        ),
    };
    refuse(code, grpc, error.to_string(), hint)
}

/// What went wrong is in this manager's log; a caller can do nothing with it.
pub fn internal(what: &'static str, error: &dyn std::error::Error) -> Status {
    tracing::error!(error = chain(error), "{what}");
    refuse(
        Code::Internal,
        tonic::Code::Internal,
        format!("this manager {what}"),
        "see this manager's log, and try another manager",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_its_code_and_next_step() {
        let status = refuse(
            Code::NotFound,
            tonic::Code::NotFound,
            "no node 'ä'",
            "`bulkhead node ls` – all",
        );
        assert_eq!(status.code(), tonic::Code::NotFound);
        assert_eq!(status.message(), "no node 'ä'");
        let code = status.metadata().get(CODE_KEY).expect("a code");
        assert_eq!(code.as_bytes(), Code::NotFound.as_str().as_bytes());
        let hint = status.metadata().get_bin(HINT_KEY).expect("a hint");
        assert_eq!(
            hint.to_bytes().expect("base64"),
            "`bulkhead node ls` – all".as_bytes()
        );
    }

    #[test]
    fn a_foreign_name_cannot_make_it_long() {
        let status = refuse(
            Code::NotFound,
            tonic::Code::NotFound,
            "x".repeat(1 << 20),
            "é".repeat(1 << 20),
        );
        assert_eq!(status.message().chars().count(), TEXT_CHARS + 1);
    }
}
