//! What happened in a run of whole programs, and what must never happen.
//!
//! What goes into the digest is what two runs of one seed share. Keys are drawn from the system's random source, so whatever
//! depends on one, like the state of a replica, is compared within a run only.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use bulkhead_raft::state::State;
use sha2::{Digest as _, Sha256};

use super::world::passed;
use crate::check::{self, Operation};
use crate::rules::{Rule, Violation};
use crate::sim::{Counts, Event, Report, What};

#[derive(Default)]
struct Inner {
    hash: Sha256,
    lines: Vec<String>,
    events: Vec<Event>,
    violations: Vec<Violation>,
    counts: Counts,
    digests: BTreeMap<u64, [u8; 32]>,
    leaders: BTreeMap<u64, u64>,
    /// Secrets whose creation was acknowledged, and those whose creation was surely refused.
    created: BTreeMap<String, bool>,
    /// The index of the newest acknowledged write.
    newest: u64,
    histories: BTreeMap<usize, Vec<Option<Operation>>>,
    /// How often the guest was served before it was revoked, and refused after.
    guest: (u64, u64),
    strikes: u32,
}

/// The record of a run under way. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Record(Rc<RefCell<Inner>>);

pub(super) fn now_us() -> u64 {
    u64::try_from(passed().as_micros()).unwrap_or(u64::MAX)
}

impl Record {
    /// Something happened that each run of the seed has.
    pub(super) fn note(&self, what: impl fmt::Display) {
        let mut inner = self.0.borrow_mut();
        let line = format!("{:>9} µs  {what}", now_us());
        inner.hash.update(line.as_bytes());
        inner.lines.push(line);
    }

    /// Something for whoever reads a failure, with what differs from run to run.
    pub(super) fn remark(&self, what: impl fmt::Display) {
        let line = format!("{:>9} µs    {what}", now_us());
        self.0.borrow_mut().lines.push(line);
    }

    /// Something happened that a picture shows.
    pub(super) fn event(&self, what: What) {
        let event = Event {
            at_us: now_us(),
            what,
        };
        self.0.borrow_mut().events.push(event);
    }

    /// A rule was broken.
    pub(super) fn violation(&self, rule: Rule, what: impl fmt::Display) {
        self.remark(format_args!("VIOLATION: {what}"));
        self.0.borrow_mut().violations.push(Violation {
            rule,
            at_us: now_us(),
            evidence: what.to_string(),
        });
    }

    pub(super) fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.0.borrow_mut().counts);
    }

    pub(super) fn violated(&self) -> bool {
        !self.0.borrow().violations.is_empty()
    }

    /// A replica has this state.
    pub(super) fn state(&self, member: u64, state: &State) {
        let (index, digest) = (state.index(), state.digest());
        let known = *self.0.borrow_mut().digests.entry(index).or_insert(digest);
        if known != digest {
            self.violation(
                Rule::OneStatePerIndex,
                format_args!("m{member} at index {index} has another state"),
            );
        }
    }

    /// A manager acts as the leader of a term.
    pub(super) fn leads(&self, member: u64, term: u64) {
        self.note(format_args!("m{member} leads term {term}"));
        self.event(What::Leads { member, term });
        let mut inner = self.0.borrow_mut();
        let first = *inner.leaders.entry(term).or_insert(member);
        inner.counts.terms = inner.leaders.len() as u64;
        drop(inner);
        if first != member {
            self.violation(
                Rule::OneLeaderPerTerm,
                format_args!("term {term} has two leaders: m{first} and m{member}"),
            );
        }
    }

    /// A strike of this number is due.
    pub(super) fn strikes(&self, number: u32) {
        self.0.borrow_mut().strikes = number;
    }

    /// The creation of a secret was acknowledged at this index.
    pub(super) fn created(&self, name: &str, index: u64) {
        let mut inner = self.0.borrow_mut();
        inner.created.insert(name.to_owned(), true);
        inner.newest = inner.newest.max(index);
    }

    /// It was surely not made.
    pub(super) fn refused(&self, name: &str) {
        self.0.borrow_mut().created.insert(name.to_owned(), false);
    }

    /// The index of the newest acknowledged write: what a read that begins now must have.
    pub(super) fn newest(&self) -> u64 {
        self.0.borrow().newest
    }

    /// The guest was served, or refused once it was revoked.
    pub(super) fn guest(&self, count: impl FnOnce(&mut (u64, u64))) {
        count(&mut self.0.borrow_mut().guest);
    }

    /// A client did something with a register, or sends it now: until [`Record::heard`] says what came of it, or where its
    /// client is stopped before, its outcome is unknown. Its number.
    pub(super) fn operation(&self, register: usize, operation: Operation) -> usize {
        let mut inner = self.0.borrow_mut();
        let history = inner.histories.entry(register).or_default();
        history.push(Some(operation));
        history.len() - 1
    }

    /// What came of an operation that was sent; nothing where it was surely not done.
    pub(super) fn heard(&self, register: usize, number: usize, operation: Option<Operation>) {
        let mut inner = self.0.borrow_mut();
        let history = inner.histories.entry(register).or_default();
        if let Some(sent) = history.get_mut(number) {
            *sent = operation;
        }
    }

    /// Whether these secrets are all that were acknowledged, and none that was refused.
    pub(super) fn check_secrets(&self, member: u64, names: &BTreeSet<String>) {
        let created = self.0.borrow().created.clone();
        for (name, made) in created {
            match (made, names.contains(&name)) {
                (true, false) => self.violation(
                    Rule::AcknowledgedIsKept,
                    format_args!("m{member} lost the secret '{name}', which was acknowledged"),
                ),
                (false, true) => self.violation(
                    Rule::RefusedNeverAppears,
                    format_args!("m{member} has the secret '{name}', which was refused"),
                ),
                (true, true) | (false, false) => {}
            }
        }
    }

    /// Whether each register behaved like one, by both checkers.
    pub(super) fn check_registers(&self) {
        let histories = std::mem::take(&mut self.0.borrow_mut().histories);
        for history in histories.into_values() {
            let judged = check::both(history.into_iter().flatten().collect());
            self.count(|counts| {
                counts.checked += judged.checked;
                counts.unclear += judged.unclear;
            });
            for evidence in judged.broken {
                self.violation(Rule::Linearizable, evidence);
            }
        }
    }

    /// Closes the record.
    pub(super) fn report(&self, seed: u64) -> Report {
        let (served, refused) = self.0.borrow().guest;
        self.note(format_args!(
            "the guest was served {served} times before it was revoked, and refused {refused} times after"
        ));
        let mut inner = self.0.borrow_mut();
        let digest = std::mem::take(&mut inner.hash).finalize();
        Report {
            seed,
            digest: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            violations: inner.violations.clone(),
            counts: inner.counts,
            lines: std::mem::take(&mut inner.lines),
            events: std::mem::take(&mut inner.events),
            strikes: inner.strikes,
            elapsed_us: now_us(),
        }
    }
}
