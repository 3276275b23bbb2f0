//! The latest changes, for watches that resume where they stopped.

use std::collections::VecDeque;
use std::sync::Arc;

use bulkhead_proto::wire::Event;

use crate::planted::{Bug, planted};

/// A bounded memory of events. Whoever asks for what fell out of it must list again.
#[derive(Debug)]
pub struct EventRing {
    events: VecDeque<Arc<Event>>,
    /// Every event above this index is here.
    floor: u64,
    capacity: usize,
}

/// The changes after the asked index are no longer all known: list, then watch from `floor` or later.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("changes up to index {floor} are compacted; list again and watch from there")]
pub struct Compacted {
    pub floor: u64,
}

impl EventRing {
    /// An empty ring over a state at `index`, as after a start or a snapshot.
    pub fn new(index: u64, capacity: usize) -> Self {
        Self {
            events: VecDeque::new(),
            floor: index,
            capacity,
        }
    }

    /// Adds the events of one entry. Entries leave whole, so that nobody sees half of a transaction.
    pub fn push(&mut self, events: Vec<Event>) {
        self.events.extend(events.into_iter().map(Arc::new));
        while self.events.len() > self.capacity {
            let Some(first) = self.events.front() else { return };
            let gone = first.index;
            while self.events.front().is_some_and(|event| event.index <= gone) {
                self.events.pop_front();
            }
            if !planted(Bug::WatchLosesEvent) {
                self.floor = gone;
            }
        }
    }

    /// Every event above this index is here.
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// All events above `index`, in order.
    pub fn since(&self, index: u64) -> Result<Vec<Arc<Event>>, Compacted> {
        let from = match planted(Bug::WatchSkipsFirst) {
            true => index + 1,
            false => index,
        };
        if from < self.floor {
            return Err(Compacted { floor: self.floor });
        }
        let told = match planted(Bug::WatchRepeatsEvent) {
            true => index.saturating_sub(1),
            false => index,
        };
        let start = self.events.partition_point(|event| event.index <= told);
        Ok(self.events.range(start..).cloned().collect())
    }
}
