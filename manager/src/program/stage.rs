//! Where a manager program stands: in no cluster, entering one, or a member.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::member::Member;

/// How an entry may end.
pub(super) enum Stage {
    Empty { detail: String },
    Entering,
    Member(Arc<Member>),
}

/// The stage, as it is now.
pub(super) enum View {
    Empty { detail: String },
    Entering,
    Member(Arc<Member>),
}

/// One program's stage. Only one entry is under way at a time.
pub(super) struct Stages(Mutex<Stage>);

impl Stages {
    pub(super) fn new() -> Self {
        Stages(Mutex::new(Stage::Empty {
            detail: String::new(),
        }))
    }

    pub(super) fn view(&self) -> View {
        match &*self.lock() {
            Stage::Empty { detail } => View::Empty {
                detail: detail.clone(),
            },
            Stage::Entering => View::Entering,
            Stage::Member(member) => View::Member(member.clone()),
        }
    }

    /// Begins to enter a cluster; what stands instead where that is not possible.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Entering, View> {
        {
            let mut stage = self.lock();
            if matches!(*stage, Stage::Empty { .. }) {
                *stage = Stage::Entering;
                return Ok(Entering {
                    stages: self.clone(),
                    ended: false,
                });
            }
        }
        Err(self.view())
    }

    /// The member is no more: the program may enter a cluster again.
    pub(super) fn left(&self, detail: &str) {
        *self.lock() = Stage::Empty {
            detail: detail.to_owned(),
        };
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An entry under way; dropped before it is done, the program stands where it stood.
pub(super) struct Entering {
    stages: Arc<Stages>,
    ended: bool,
}

impl Entering {
    pub(super) fn done(mut self, stage: Stage) {
        *self.stages.lock() = stage;
        self.ended = true;
    }
}

impl Drop for Entering {
    fn drop(&mut self) {
        if !self.ended {
            *self.stages.lock() = Stage::Empty {
                detail: "the last try to enter a cluster failed; the log says why".to_owned(),
            };
        }
    }
}
