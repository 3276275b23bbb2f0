//! What happened in a run, and what must never happen.
//!
//! Every event goes into a digest, so that two runs of one seed can be compared, and into lines for whoever reads a
//! failure, and some of it into events for the picture.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::wire::Kind;
use bulkhead_raft::state::{Key, State};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use crate::check::{self, Action, Operation, Told};
use crate::rules::{Rule, Violation};

/// How often what was tried; a run or a set of runs that tried too little proves nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
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
    /// Operations on registers that were found to fit each other.
    pub checked: u64,
    /// Registers of which that could not be said within the budget.
    pub unclear: u64,
    /// Writes that were sent again although they may have been made.
    pub repeats: u64,
    /// Programs killed.
    pub kills: u64,
    /// Power losses, each of one machine.
    pub power_losses: u64,
    /// Power losses of all machines at once; each counts above once for each machine, too.
    pub power_losses_of_all: u64,
    /// Programs that were stopped for a while.
    pub pauses: u64,
    /// Disks that stood still for a while.
    pub stalls: u64,
    /// Machines that were lost with their disks, and replaced.
    pub replacements: u64,
    /// Replicas that stopped because their disk failed.
    pub disk_failures: u64,
    /// Partitions.
    pub partitions: u64,
    /// Snapshots that went over the network.
    pub snapshots_sent: u64,
    /// Messages that came after a cut into which they had been sent.
    pub late: u64,
    /// Leaders that were asked to hand over.
    pub hand_overs: u64,
    /// Terms that had a leader.
    pub terms: u64,
    /// Rotations of the root that began.
    pub rotations: u64,
    /// Changes that watches were told.
    pub told: u64,
    /// Watches that were told to list again.
    pub compacted: u64,
    /// Workers that died, lost power or were cut off, and tasks that ended by themselves.
    pub worker_faults: u64,
    /// Runs in which what ran in the end was held against what was asked for.
    pub settled: u64,
}

impl Counts {
    /// Adds another run's.
    pub fn add(&mut self, other: &Counts) {
        self.accepted += other.accepted;
        self.refused += other.refused;
        self.unknown += other.unknown;
        self.reads += other.reads;
        self.swaps += other.swaps;
        self.repeats += other.repeats;
        self.checked += other.checked;
        self.unclear += other.unclear;
        self.kills += other.kills;
        self.power_losses += other.power_losses;
        self.power_losses_of_all += other.power_losses_of_all;
        self.pauses += other.pauses;
        self.stalls += other.stalls;
        self.replacements += other.replacements;
        self.disk_failures += other.disk_failures;
        self.partitions += other.partitions;
        self.snapshots_sent += other.snapshots_sent;
        self.late += other.late;
        self.hand_overs += other.hand_overs;
        self.terms += other.terms;
        self.rotations += other.rotations;
        self.told += other.told;
        self.compacted += other.compacted;
        self.worker_faults += other.worker_faults;
        self.settled += other.settled;
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
    pub violations: Vec<Violation>,
    /// What was tried.
    pub counts: Counts,
    /// What happened, in order.
    pub lines: Vec<String>,
    /// What of it a picture shows, in order.
    pub events: Vec<Event>,
    /// How many strikes there were, with those that were left out.
    pub strikes: u32,
    /// Simulated time from beginning to end, in microseconds.
    pub elapsed_us: u64,
}

/// Something that happened, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Microseconds since the run began.
    pub at_us: u64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum What {
    /// A member's program runs.
    Runs {
        /// Which member.
        member: u64,
    },
    /// It does not run any more.
    Ends {
        /// Which member.
        member: u64,
    },
    /// A member acts as the leader.
    Leads {
        /// Which member.
        member: u64,
        /// Of which term.
        term: u64,
    },
    /// It does so no more.
    Follows {
        /// Which member.
        member: u64,
    },
    /// The nemesis struck.
    Strike {
        /// The number of the strike in its run, from 1.
        number: u32,
        /// What it did.
        fault: Fault,
        /// To whom; nobody: to the network, or to all.
        member: Option<u64>,
    },
    /// Every fault was taken back.
    AllIsWell,
}

/// A kind of fault, or its end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// Two sides that do not hear each other.
    Split,
    /// The leader on one side alone.
    IsolateLeader,
    /// One member does not hear the others, and is heard by them.
    OneWay,
    /// Two sides that do not hear each other, and one that hears both.
    Bridge,
    /// Each hears its two neighbours alone.
    Ring,
    /// As a ring that is open at one place.
    Chain,
    /// The leader does not hear the others, and is heard by them.
    LeaderDeaf,
    /// The leader is not heard by the others, and hears them.
    LeaderMute,
    /// Links are clogged one by one, and released one by one in another order.
    Swizzle,
    /// A program is stopped for a while, as by SIGSTOP: nothing of it runs, and time goes by.
    Pause,
    /// The leader's is.
    PauseLeader,
    /// Flushes of a disk take seconds.
    DiskStall,
    /// A machine is lost with its disk; another one joins in its place.
    DiskLost,
    /// Network and disks work again, and stopped programs go on.
    Heal,
    /// A program is killed.
    Kill,
    /// The leader's is.
    KillLeader,
    /// A machine loses power: what was not flushed is gone, in any part.
    PowerLoss,
    /// All do at once.
    PowerLossOfAll,
    /// Whoever is down starts again.
    Restart,
    /// The network is slow, and loses some.
    Storm,
    /// A disk fails each write.
    DiskError,
    /// A disk is full.
    DiskFull,
    /// The leader is asked to hand over.
    HandOver,
}

impl Fault {
    /// Whether it says who does not hear whom. There is one such fault at a time.
    pub(crate) fn is_of_network(self) -> bool {
        match self {
            Self::Split
            | Self::IsolateLeader
            | Self::OneWay
            | Self::Bridge
            | Self::Ring
            | Self::Chain
            | Self::LeaderDeaf
            | Self::LeaderMute => true,
            Self::Swizzle
            | Self::Pause
            | Self::PauseLeader
            | Self::DiskStall
            | Self::DiskLost
            | Self::Heal
            | Self::Kill
            | Self::KillLeader
            | Self::PowerLoss
            | Self::PowerLossOfAll
            | Self::Restart
            | Self::Storm
            | Self::DiskError
            | Self::DiskFull
            | Self::HandOver => false,
        }
    }
}

impl Report {
    /// The seed, the broken rules and the last of what happened before: what a failing test prints.
    pub fn explain(&self) -> String {
        let from = self.lines.len().saturating_sub(60);
        format!(
            "seed {} broke {} rules:\n{}\n--- the last lines of {}:\n{}",
            self.seed,
            self.violations.len(),
            self.violations
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("\n"),
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
    events: Vec<Event>,
    violations: Vec<Violation>,
    counts: Counts,
    digests: BTreeMap<u64, [u8; 32]>,
    leaders: BTreeMap<u64, u64>,
    accepted: BTreeMap<Id, u64>,
    refused: BTreeSet<Id>,
    newest: Option<(Id, u64)>,
    /// What watches were told of each index: objects and their versions.
    told: BTreeMap<u64, Vec<(Id, u64)>>,
    swaps: BTreeSet<(Id, u64)>,
    strikes: u32,
    /// What clients did with each register; nothing where it was surely not done.
    histories: BTreeMap<Id, Vec<Option<Operation>>>,
}

/// What came of a call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// The client was told, of this index of the log.
    Told(Told, Option<u64>),
    /// It was surely not done.
    Never,
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
            events: Vec::new(),
            violations: Vec::new(),
            counts: Counts::default(),
            digests: BTreeMap::new(),
            leaders: BTreeMap::new(),
            accepted: BTreeMap::new(),
            refused: BTreeSet::new(),
            newest: None,
            told: BTreeMap::new(),
            swaps: BTreeSet::new(),
            strikes: 0,
            histories: BTreeMap::new(),
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

    /// Something happened that a picture shows.
    pub(super) fn event(&self, what: What) {
        self.inner().event(what);
    }

    /// A rule was broken.
    pub(super) fn violation(&self, rule: Rule, what: impl fmt::Display) {
        self.inner().violation(rule, what);
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
            inner.violation(
                Rule::OneStatePerIndex,
                format_args!("m{member} at index {index} has another state"),
            );
        }
    }

    /// A strike of this number is due.
    pub(super) fn strikes(&self, number: u32) {
        self.inner().strikes = number;
    }

    /// A member acts as the leader of a term.
    pub(super) fn leads(&self, member: u64, term: u64) {
        let mut inner = self.inner();
        let first = *inner.leaders.entry(term).or_insert(member);
        inner.counts.terms = inner.leaders.len() as u64;
        inner.note(format_args!("m{member} leads term {term}"));
        inner.event(What::Leads { member, term });
        if first != member {
            inner.violation(
                Rule::OneLeaderPerTerm,
                format_args!("term {term} has two leaders: m{first} and m{member}"),
            );
        }
    }

    /// A member acts as the leader of the newest term, with a state of this index.
    pub(super) fn serves(&self, member: u64, term: u64, index: u64) {
        let mut inner = self.inner();
        if let Some((_, newest)) = inner.newest
            && index < newest
        {
            inner.violation(
                Rule::LeadersAreComplete,
                format_args!(
                    "m{member} leads term {term} with what is at {index}, and {newest} was acknowledged"
                ),
            );
        }
    }

    /// A watch was told these changes, each with its index, and nothing else after the first index up to the other.
    pub(super) fn told(&self, after: u64, upto: u64, changes: &[(u64, Id, u64)]) {
        let mut inner = self.inner();
        inner.counts.told += changes.len() as u64;
        let mut by_index: BTreeMap<u64, Vec<(Id, u64)>> = BTreeMap::new();
        for (index, id, version) in changes {
            by_index.entry(*index).or_default().push((*id, *version));
        }
        let mut others = inner.told.range(after + 1..=upto);
        let missed = others.find(|(index, told)| by_index.get(*index) != Some(*told));
        if let Some(index) = missed.map(|(index, _)| *index) {
            inner.violation(
                Rule::WatchesTellAll,
                format_args!("of index {index} a watch was told something else than another"),
            );
        }
        inner.told.append(&mut by_index);
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
            inner.violation(
                Rule::FreshReads,
                format_args!(
                    "a read at m{member} with index {read_index} missed the write acknowledged at {index}"
                ),
            );
        }
    }

    /// A conditional write on this version of an object won.
    pub(super) fn swapped(&self, id: Id, version: u64) {
        let mut inner = self.inner();
        inner.counts.swaps += 1;
        if !inner.swaps.insert((id, version)) {
            inner.violation(
                Rule::OneSuccessor,
                format_args!("two conditional writes on version {version} won"),
            );
        }
    }

    pub(super) fn now_us(&self) -> u64 {
        self.inner().now_us()
    }

    /// A client asks for something of a register. Until its answer comes the outcome is unknown.
    pub(super) fn called(&self, register: Id, action: Action) -> usize {
        let mut inner = self.inner();
        let called = inner.now_us();
        let history = inner.histories.entry(register).or_default();
        history.push(Some(Operation {
            called,
            returned: called,
            action,
            told: Told::Unknown,
            index: None,
        }));
        history.len() - 1
    }

    /// Its answer came.
    pub(super) fn returned(&self, register: Id, number: usize, answer: Answer) {
        let mut inner = self.inner();
        let returned = inner.now_us();
        let Some(slot) = inner
            .histories
            .get_mut(&register)
            .and_then(|it| it.get_mut(number))
        else {
            return;
        };
        match (answer, slot.as_mut()) {
            (Answer::Told(told, index), Some(operation)) => {
                (operation.told, operation.index, operation.returned) = (told, index, returned);
            }
            (Answer::Never, _) => *slot = None,
            (Answer::Told(..), None) => {}
        }
    }

    /// A register was seen with a value, in a state of this index.
    pub(super) fn looked(&self, register: Id, called: u64, value: Option<u64>, index: u64) {
        let mut inner = self.inner();
        let returned = inner.now_us();
        inner.histories.entry(register).or_default().push(Some(Operation {
            called,
            returned,
            action: Action::Read { value },
            told: Told::Done,
            index: Some(index),
        }));
    }

    /// Whether each register behaved like one, by both checkers.
    pub(super) fn check_registers(&self) {
        let mut inner = self.inner();
        for history in std::mem::take(&mut inner.histories).into_values() {
            let judged = check::both(history.into_iter().flatten().collect());
            inner.counts.checked += judged.checked;
            inner.counts.unclear += judged.unclear;
            for evidence in judged.broken {
                inner.violation(Rule::Linearizable, evidence);
            }
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
            inner.violation(
                Rule::AcknowledgedIsKept,
                format_args!("m{member} lost the write acknowledged at {index}"),
            );
        }
        if ghost {
            inner.violation(
                Rule::RefusedNeverAppears,
                format_args!("m{member} has a write that was refused"),
            );
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
            events: std::mem::take(&mut inner.events),
            strikes: inner.strikes,
            elapsed_us: inner.now_us(),
        }
    }
}

impl Inner {
    fn now_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn note(&mut self, what: impl fmt::Display) {
        let line = format!("{:>9} µs  {what}", self.now_us());
        self.hash.update(line.as_bytes());
        self.lines.push(line);
    }

    fn event(&mut self, what: What) {
        let at_us = self.now_us();
        self.events.push(Event { at_us, what });
    }

    fn violation(&mut self, rule: Rule, what: impl fmt::Display) {
        self.note(format_args!("VIOLATION: {what}"));
        self.violations.push(Violation {
            rule,
            at_us: self.now_us(),
            evidence: what.to_string(),
        });
    }
}
