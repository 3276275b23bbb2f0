//! What clients did and what was seen, while it happens.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::time::Instant;

use crate::check::{Action, Operation, Told};

/// What became of a secret that was to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fate {
    /// Whether its creation was acknowledged: certainly there from then on.
    pub(super) created: bool,
    /// Whether its removal was asked for, and acknowledged.
    pub(super) removed: Option<bool>,
}

/// A write: when it was sent first, and when it was acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ack {
    pub(super) sent_us: u64,
    pub(super) done_us: u64,
}

/// A request to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// The node that was asked, by number; nobody: the service ran nowhere.
    pub(super) node: Option<usize>,
    pub(super) at_us: u64,
    pub(super) answered: bool,
}

/// A task of one of the run's services, from when to when it was seen to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) service: String,
    /// The name of its node.
    pub(super) node: String,
    pub(super) from_us: u64,
    /// Last seen.
    pub(super) seen_us: u64,
    /// When it was seen to run no more.
    pub(super) gone_us: Option<u64>,
}

/// What happened that a picture shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub(super) enum What {
    /// A node's program runs.
    Runs { node: usize },
    /// It does not: it was ended, or ended by itself.
    Ends { node: usize, how: String },
    /// A manager says that it leads.
    Leads { node: usize, term: u64 },
    /// It does not any more.
    Follows { node: usize },
    /// A root signs, by the key's id.
    Issuer { root: String },
    /// So many tasks run on a worker.
    Tasks { node: usize, count: usize },
    /// A manager and whoever came from this address did not believe each other.
    HandshakeFailed { node: usize, address: String },
    /// All faults are taken back.
    AllIsWell,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Event {
    pub(super) at_us: u64,
    #[serde(flatten)]
    pub(super) what: What,
}

/// How many operations had which outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    /// Writes that were acknowledged.
    pub(super) accepted: u64,
    /// Writes that were refused: something else was there.
    pub(super) refused: u64,
    /// Writes whose outcome nobody knows.
    pub(super) unknown: u64,
    /// Writes that were sent again.
    pub(super) repeats: u64,
    /// Reads that were answered.
    pub(super) reads: u64,
    /// Reads that were not.
    pub(super) unread: u64,
    /// Requests to services.
    pub(super) requests: u64,
    /// Those that were not answered.
    pub(super) unanswered: u64,
}

/// What a process takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Sample {
    pub(super) at_us: u64,
    pub(super) resident_kib: u64,
    pub(super) descriptors: u64,
    pub(super) threads: u64,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) counts: Counts,
    /// Of each register, what was done with it.
    pub(super) registers: BTreeMap<usize, Vec<Operation>>,
    pub(super) secrets: BTreeMap<String, Fate>,
    pub(super) acks: Vec<Ack>,
    pub(super) requests: Vec<Request>,
    /// Tasks, by their ids.
    pub(super) runs: BTreeMap<Vec<u8>, Run>,
    pub(super) events: Vec<Event>,
    /// Of each term, the members that were said to lead it.
    pub(super) leaders: BTreeMap<u64, BTreeSet<u64>>,
    /// Of each place in the audit log, the hashes that managers had there.
    pub(super) audit: BTreeMap<u64, BTreeSet<Vec<u8>>>,
    /// Of each node, what its processes took.
    pub(super) samples: BTreeMap<usize, Vec<Sample>>,
    /// Of each service, the nodes on which tasks of it were seen to run last.
    pub(super) places: BTreeMap<String, Vec<usize>>,
    /// When a manager answered last.
    pub(super) answered_us: u64,
    /// The manager that leads, by number, and its term.
    pub(super) leader: Option<(usize, u64)>,
}

impl Seen {
    /// A register is about to be changed: from now on that may have been done, whatever becomes of the client.
    pub(super) fn sends(&mut self, register: usize, called: u64, (from, to): (u64, u64)) {
        self.registers.entry(register).or_default().push(Operation {
            called,
            returned: called,
            action: Action::Swap { from: Some(from), to },
            told: Told::Unknown,
            index: None,
        });
    }

    /// What the client was told of the change to `to`, which no other one makes: it was made, perhaps at a known index; or
    /// it surely was not, and then it is no part of the history.
    pub(super) fn heard(&mut self, register: usize, to: u64, returned: u64, made: Option<Option<u64>>) {
        let operations = self.registers.entry(register).or_default();
        let is_it = |it: &Operation| matches!(it.action, Action::Swap { to: its, .. } if its == to);
        let Some(at) = operations.iter().rposition(is_it) else {
            return;
        };
        match made {
            Some(index) => {
                operations[at] = Operation {
                    returned,
                    told: Told::Done,
                    index,
                    ..operations[at]
                };
            }
            None => drop(operations.remove(at)),
        }
    }
}

/// The record of a run, which all that run in it share.
#[derive(Debug)]
pub(super) struct Record {
    start: Instant,
    seen: Mutex<Seen>,
}

impl Record {
    pub(super) fn begin() -> Self {
        Self {
            start: Instant::now(),
            seen: Mutex::default(),
        }
    }

    /// Microseconds since the run began.
    pub(super) fn now_us(&self) -> u64 {
        super::micros(self.start.elapsed())
    }

    /// When the run began.
    pub(super) fn start(&self) -> Instant {
        self.start
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn event(&self, what: What) {
        let at_us = self.now_us();
        self.seen().events.push(Event { at_us, what });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{linearize, order};

    fn read(called: u64, value: u64, index: u64) -> Operation {
        Operation {
            called,
            returned: called + 1,
            action: Action::Read { value: Some(value) },
            told: Told::Done,
            index: Some(index),
        }
    }

    /// At the end of a run clients are stopped wherever they are; another one may have read what they wrote.
    #[test]
    fn a_write_whose_client_was_stopped_explains_who_reads_it() {
        let mut seen = Seen::default();
        let first = Operation {
            action: Action::Swap { from: None, to: 1 },
            ..read(0, 1, 1)
        };
        seen.registers.insert(0, vec![first]);
        seen.sends(0, 10, (1, 2));
        seen.sends(0, 11, (1, 3));
        seen.heard(0, 3, 12, None);
        seen.registers.entry(0).or_default().push(read(13, 2, 5));
        seen.sends(0, 20, (2, 4));
        seen.heard(0, 4, 21, Some(Some(6)));
        seen.registers.entry(0).or_default().push(read(22, 4, 6));
        let operations = &seen.registers[&0];
        assert_eq!(operations.len(), 5, "what was surely not made is no part of it");
        assert_eq!(order::check(operations), Ok(()));
        assert_eq!(
            linearize::check(operations, 1_000),
            linearize::Verdict::Linearizable
        );
    }
}
