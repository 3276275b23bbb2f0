//! What happened in a run, and what must never happen.
//!
//! Every event goes into a digest, so that two runs of one seed can be compared, and into lines for whoever reads a
//! failure. The rules: an acknowledged write is never lost; what was surely refused never appears; replicas at one
//! index have one state; a term has one leader; of one version there is one successor; a read sees what was
//! acknowledged before it began; consensus never panics.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::wire::Kind;
use bulkhead_raft::state::{Key, State};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

/// How often what was tried; a run or a set of runs that tried too little proves nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Writes that were acknowledged.
    pub accepted: u64,
    /// Writes that were surely not made.
    pub refused: u64,
    /// Writes whose outcome nobody knows.
    pub unknown: u64,
    /// Reads that were confirmed by a quorum.
    pub reads: u64,
    /// Conditional writes that won.
    pub swaps: u64,
    /// Programs killed.
    pub kills: u64,
    /// Power losses, each of one machine.
    pub power_losses: u64,
    /// Replicas that stopped because their disk failed.
    pub disk_failures: u64,
    /// Partitions.
    pub partitions: u64,
    /// Snapshots that went over the network.
    pub snapshots_sent: u64,
    /// Leaders that were asked to hand over.
    pub hand_overs: u64,
    /// Terms that had a leader.
    pub terms: u64,
}

impl Counts {
    /// Adds another run's.
    pub fn add(&mut self, other: &Counts) {
        self.accepted += other.accepted;
        self.refused += other.refused;
        self.unknown += other.unknown;
        self.reads += other.reads;
        self.swaps += other.swaps;
        self.kills += other.kills;
        self.power_losses += other.power_losses;
        self.disk_failures += other.disk_failures;
        self.partitions += other.partitions;
        self.snapshots_sent += other.snapshots_sent;
        self.hand_overs += other.hand_overs;
        self.terms += other.terms;
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// SHA-256 of everything that happened, as hex: equal for two runs of one seed.
    pub digest: String,
    /// Rules that were broken; empty is good.
    pub violations: Vec<String>,
    /// What was tried.
    pub counts: Counts,
    /// What happened, in order.
    pub lines: Vec<String>,
}

impl Report {
    /// The seed, the broken rules and the last of what happened before: what a failing test prints.
    pub fn explain(&self) -> String {
        let from = self.lines.len().saturating_sub(60);
        format!(
            "seed {} broke {} rules:\n{}\n--- the last lines of {}:\n{}",
            self.seed,
            self.violations.len(),
            self.violations.join("\n"),
            self.lines.len(),
            self.lines[from..].join("\n")
        )
    }
}

/// An object's id.
pub(super) type Id = [u8; 16];

#[derive(Debug)]
struct Inner {
    every_message: bool,
    /// Whether states belong to what two runs of one seed share.
    states: bool,
    start: Instant,
    hash: Sha256,
    lines: Vec<String>,
    violations: Vec<String>,
    counts: Counts,
    digests: BTreeMap<u64, [u8; 32]>,
    leaders: BTreeMap<u64, u64>,
    accepted: BTreeMap<Id, u64>,
    refused: BTreeSet<Id>,
    newest: Option<(Id, u64)>,
    swaps: BTreeSet<(Id, u64)>,
}

/// The record of a run under way. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Record(Arc<Mutex<Inner>>);

fn secret(id: Id) -> Key {
    Key::new(Kind::Secret, id)
}

impl Record {
    pub(super) fn new(every_message: bool) -> Self {
        Self::of(every_message, true)
    }

    /// A record of a run whose states differ from those of another run of its seed.
    pub(super) fn without_states() -> Self {
        Self::of(false, false)
    }

    fn of(every_message: bool, states: bool) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            every_message,
            states,
            start: Instant::now(),
            hash: Sha256::new(),
            lines: Vec::new(),
            violations: Vec::new(),
            counts: Counts::default(),
            digests: BTreeMap::new(),
            leaders: BTreeMap::new(),
            accepted: BTreeMap::new(),
            refused: BTreeSet::new(),
            newest: None,
            swaps: BTreeSet::new(),
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something happened.
    pub(super) fn note(&self, what: impl fmt::Display) {
        self.inner().note(what);
    }

    /// Something happened that only a search for the first difference of two runs wants to see.
    pub(super) fn trace(&self, what: impl FnOnce() -> String) {
        let mut inner = self.inner();
        if inner.every_message {
            inner.note(what());
        }
    }

    /// A rule was broken.
    pub(super) fn violation(&self, what: impl fmt::Display) {
        self.inner().violation(what);
    }

    pub(super) fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.inner().counts);
    }

    pub(super) fn violated(&self) -> bool {
        !self.inner().violations.is_empty()
    }

    /// A replica has this state.
    pub(super) fn state(&self, member: u64, state: &State) {
        let (index, digest) = (state.index(), state.digest());
        let mut inner = self.inner();
        let known = *inner.digests.entry(index).or_insert(digest);
        inner.hash.update(index.to_be_bytes());
        if inner.states {
            inner.hash.update(digest);
        }
        if known != digest {
            inner.violation(format_args!("m{member} at index {index} has another state"));
        }
    }

    /// A member acts as the leader of a term.
    pub(super) fn leads(&self, member: u64, term: u64) {
        let mut inner = self.inner();
        let first = *inner.leaders.entry(term).or_insert(member);
        inner.counts.terms = inner.leaders.len() as u64;
        inner.note(format_args!("m{member} leads term {term}"));
        if first != member {
            inner.violation(format_args!(
                "term {term} has two leaders: m{first} and m{member}"
            ));
        }
    }

    /// A write was acknowledged at this index.
    pub(super) fn accepted(&self, id: Id, index: u64) {
        let mut inner = self.inner();
        inner.counts.accepted += 1;
        inner.accepted.insert(id, index);
        if inner.newest.is_none_or(|(_, newest)| newest < index) {
            inner.newest = Some((id, index));
        }
    }

    /// A write was surely not made.
    pub(super) fn refused(&self, id: Id) {
        let mut inner = self.inner();
        inner.counts.refused += 1;
        inner.refused.insert(id);
    }

    /// The newest acknowledged write: what a read that begins now must see.
    pub(super) fn newest(&self) -> Option<(Id, u64)> {
        self.inner().newest
    }

    /// A read that began when `newest` was acknowledged saw this state.
    pub(super) fn read(&self, member: u64, newest: Option<(Id, u64)>, read_index: u64, state: &State) {
        let mut inner = self.inner();
        inner.counts.reads += 1;
        let Some((id, index)) = newest else { return };
        if read_index < index || state.get(secret(id)).is_none() {
            inner.violation(format_args!(
                "a read at m{member} with index {read_index} missed the write acknowledged at {index}"
            ));
        }
    }

    /// A conditional write on this version of an object won.
    pub(super) fn swapped(&self, id: Id, version: u64) {
        let mut inner = self.inner();
        inner.counts.swaps += 1;
        if !inner.swaps.insert((id, version)) {
            inner.violation(format_args!("two conditional writes on version {version} won"));
        }
    }

    /// Whether a state holds all that was acknowledged and nothing that was refused.
    pub(super) fn check_history(&self, member: u64, state: &State) {
        let mut inner = self.inner();
        let lost = inner
            .accepted
            .iter()
            .find(|(id, _)| state.get(secret(**id)).is_none());
        let lost = lost.map(|(_, index)| *index);
        let ghost = inner.refused.iter().any(|id| state.get(secret(*id)).is_some());
        if let Some(index) = lost {
            inner.violation(format_args!("m{member} lost the write acknowledged at {index}"));
        }
        if ghost {
            inner.violation(format_args!("m{member} has a write that was refused"));
        }
    }

    /// Closes the record.
    pub(super) fn report(&self, seed: u64) -> Report {
        let mut inner = self.inner();
        let digest = std::mem::take(&mut inner.hash).finalize();
        Report {
            seed,
            digest: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            violations: inner.violations.clone(),
            counts: inner.counts,
            lines: std::mem::take(&mut inner.lines),
        }
    }
}

impl Inner {
    fn note(&mut self, what: impl fmt::Display) {
        let line = format!("{:>9} µs  {what}", self.start.elapsed().as_micros());
        self.hash.update(line.as_bytes());
        self.lines.push(line);
    }

    fn violation(&mut self, what: impl fmt::Display) {
        self.note(format_args!("VIOLATION: {what}"));
        self.violations.push(what.to_string());
    }
}
