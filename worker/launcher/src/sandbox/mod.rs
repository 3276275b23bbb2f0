//! What a task may see and do, built from kernel features one by one.
//!
//! [`mounts`] and [`namespaces`] are used by the supervisor before there is a task; [`confine`] is
//! the sequence that the task's own process goes through, privileges only shrinking,
//! until it executes the image's program.

pub(crate) mod capabilities;
pub(crate) mod cgroup;
pub(crate) mod confine;
pub(crate) mod landlock;
pub(crate) mod mounts;
pub(crate) mod namespaces;
pub(crate) mod seccomp;
pub(crate) mod sys;
pub(crate) mod user;

use crate::message::{Refusal, RefusalCode};
use std::io;

/// A step that failed, in words that name no host path.
#[derive(Debug, thiserror::Error)]
#[error("could not {step}")]
pub struct SetupError {
    code: RefusalCode,
    step: &'static str,
    source: io::Error,
}

impl From<SetupError> for Refusal {
    fn from(error: SetupError) -> Refusal {
        Refusal::new(error.code, format!("{error}: {}", error.source))
    }
}

/// Names the step that a result belongs to.
pub(crate) trait Step<T> {
    /// The same result, its error wrapped with what was being done.
    fn step(self, step: &'static str) -> Result<T, SetupError>;
    /// The same, with another code than `StartFailed`.
    fn step_as(self, code: RefusalCode, step: &'static str) -> Result<T, SetupError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, SetupError> {
        self.step_as(RefusalCode::StartFailed, step)
    }
    fn step_as(self, code: RefusalCode, step: &'static str) -> Result<T, SetupError> {
        self.map_err(|error| SetupError {
            code,
            step,
            source: error.into(),
        })
    }
}
