//! What every request's fields are held against.

use bulkhead_proto::wire::{Label, ServiceSpec};
use bulkhead_proto::{Code, limits};
use tonic::Status;

use crate::refusal::refuse;
use crate::validate::{self, Mistake};

/// A field that says what it must not.
pub(super) fn invalid(field: &str, why: &str) -> Status {
    refuse(
        Code::BadField,
        tonic::Code::InvalidArgument,
        format!("{field}: {why}"),
        "correct the field and send the request again",
    )
}

/// More than a limit allows.
pub(super) fn over(field: &str, why: &str) -> Status {
    refuse(
        Code::OverLimit,
        tonic::Code::InvalidArgument,
        format!("{field}: {why}"),
        "stay within the limit",
    )
}

/// All mistakes of a request in one refusal.
fn mistaken(mistakes: &[Mistake]) -> Status {
    let each: Vec<String> = mistakes
        .iter()
        .map(|it| format!("{}: {}", it.field, it.what))
        .collect();
    let mut hints: Vec<&str> = mistakes.iter().map(|it| it.hint).collect();
    hints.dedup();
    refuse(
        Code::BadField,
        tonic::Code::InvalidArgument,
        each.join("; "),
        hints.join("; "),
    )
}

fn none(mistakes: &[Mistake]) -> Result<(), Status> {
    if mistakes.is_empty() {
        Ok(())
    } else {
        Err(mistaken(mistakes))
    }
}

/// An object's name.
pub(super) fn name(text: &str) -> Result<(), Status> {
    validate::name("name", text).map_err(|mistake| mistaken(&[mistake]))
}

/// The labels of one object.
pub(super) fn labels(labels: &[Label]) -> Result<(), Status> {
    none(&validate::labels("labels", labels))
}

/// A service's spec, as far as it can be judged without the state.
pub(super) fn spec(spec: &ServiceSpec) -> Result<(), Status> {
    validate::spec(spec).map_err(|mistakes| mistaken(&mistakes))
}

/// An image's name as `repository:tag`; without a tag it is `latest`.
pub(super) fn image_name(text: &str) -> Result<String, Status> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    let bounded = (1..=limits::IMAGE_REFERENCE_CHARS - ":latest".len()).contains(&text.len());
    let ends = |c: char| c.is_ascii_alphanumeric();
    if !bounded
        || !text.chars().all(plain)
        || !text.starts_with(ends)
        || !text.ends_with(ends)
        || text.contains("//")
    {
        let why = format!(
            "'{}' is not an image's name: write REPOSITORY:TAG, at most {} characters",
            text.chars().take(80).collect::<String>(),
            limits::IMAGE_REFERENCE_CHARS - ":latest".len()
        );
        return Err(invalid("name", &why));
    }
    let last = text.rsplit('/').next().unwrap_or(text);
    Ok(if last.contains(':') {
        text.to_owned()
    } else {
        format!("{text}:latest")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_names_get_a_tag() {
        for (given, kept) in [
            ("web", "web:latest"),
            ("web:1", "web:1"),
            ("host:5000/team/web", "host:5000/team/web:latest"),
        ] {
            assert_eq!(image_name(given).expect(given), kept);
        }
        for bad in ["", "a b", "/a", "a//b", "a:", "a\n", &"x".repeat(255)] {
            assert!(image_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let wrong = ServiceSpec {
            name: "Not A Name".into(),
            replicas: limits::REPLICAS + 1,
            ..Default::default()
        };
        let status = spec(&wrong).expect_err("two mistakes");
        super::super::testing::refused(&status, Code::BadField, "name: ", "a-z");
        super::super::testing::refused(&status, Code::BadField, "replicas: ", "");
    }
}
