//! Where a manager program stands: in no cluster, entering one, locked, a member, or a standby.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_identity::store::Locked;

use super::member::Member;
use super::standby::Standby;

/// Where it stands.
#[derive(Clone)]
pub(super) enum Stage {
    Empty { detail: String },
    Entering { detail: String },
    Locked(Box<Locked>),
    Member(Arc<Member>),
    Standby(Arc<Standby>),
}

/// One program's stage. Only one entry is under way at a time.
pub(super) struct Stages(Mutex<Stage>);

impl Stages {
    pub(super) fn new() -> Self {
        Stages(Mutex::new(Stage::Empty {
            detail: String::new(),
        }))
    }

    /// The stage, as it is now.
    pub(super) fn view(&self) -> Stage {
        self.lock().clone()
    }

    /// Begins to enter a cluster; what stands instead where that is not possible.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Entering, Stage> {
        let otherwise = Stage::Empty {
            detail: "the last try to enter a cluster failed; the log says why".to_owned(),
        };
        self.enter_from(|stage| matches!(stage, Stage::Empty { .. }), otherwise)
    }

    /// Begins to start a member that waited for its unlock key.
    pub(super) fn unlock(self: &Arc<Self>, locked: Box<Locked>) -> Result<Entering, Stage> {
        self.enter_from(|stage| matches!(stage, Stage::Locked(_)), Stage::Locked(locked))
    }

    fn enter_from(
        self: &Arc<Self>,
        may: impl Fn(&Stage) -> bool,
        otherwise: Stage,
    ) -> Result<Entering, Stage> {
        let mut stage = self.lock();
        if !may(&stage) {
            return Err(stage.clone());
        }
        *stage = Stage::Entering {
            detail: String::new(),
        };
        Ok(Entering {
            stages: self.clone(),
            otherwise: Some(otherwise),
        })
    }

    /// The program waits for its unlock key.
    pub(super) fn locked(&self, locked: Box<Locked>) {
        *self.lock() = Stage::Locked(locked);
    }

    /// How far an entry that is under way came.
    pub(super) fn entering(&self, now: String) {
        if let Stage::Entering { detail } = &mut *self.lock() {
            *detail = now;
        }
    }

    /// The program is this now, whatever it was.
    pub(super) fn is(&self, stage: Stage) {
        *self.lock() = stage;
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
    /// Where the program stands when it is dropped; nothing once it ended well.
    otherwise: Option<Stage>,
}

impl Entering {
    pub(super) fn done(mut self, stage: Stage) {
        *self.stages.lock() = stage;
        self.otherwise = None;
    }
}

impl Drop for Entering {
    fn drop(&mut self) {
        if let Some(otherwise) = self.otherwise.take() {
            *self.stages.lock() = otherwise;
        }
    }
}
