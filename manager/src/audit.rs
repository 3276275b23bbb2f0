//! What is refused, for the audit log. A refusal changes no object, so apply cannot see it: it is noted here, gathered for
//! a moment, and committed beside everything else; who is refused does not wait for it.
//!
//! Strangers cause these records, so they must not be able to push the others out of the log: alike ones are counted in
//! one, and there is a budget. What is over it is counted until there is budget again. Strangers and known callers have
//! tables and budgets of their own: a flood from outside must not hide what a node inside was refused.

use std::collections::VecDeque;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_identity::seam::{Clock, Entropy};
use bulkhead_proto::RequestId;
use bulkhead_proto::wire::{AuditAction, AuditNote, Change, change::Change as Step};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use crate::ca::Limiter;
use crate::ca::clone::{Alarms, Shown};
use crate::proposer::{ProposeError, Proposer};

/// Refusals are gathered for so long. Halving it writes twice as many records of one attack before the budget is spent.
const GATHER: Duration = Duration::from_secs(2);
/// After a record of one kind the next ones are counted for so long: a node that was cut off asks again each second.
const QUIET: Duration = Duration::from_secs(600);
/// Kinds of refusals of strangers, and of known callers, that are gathered apart. More are counted together.
const KINDS: usize = 64;
/// Records of strangers, and of known callers, that one manager writes at once, and then one each so often: at most 288 a
/// day, so that strangers that attack three managers take more than a week to fill the log.
const BUDGET: (u32, Duration) = (32, Duration::from_secs(300));
/// Who is named where nobody proved who it is.
const STRANGER: &str = "anonymous";
/// Who is named for several known callers.
const SEVERAL: &str = "several";
/// Between attempts to commit what is not known to be committed.
const PAUSE: Duration = Duration::from_secs(1);

/// What was noted: alike ones are one record.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Noted {
    action: AuditAction,
    actor: String,
    address: String,
    detail: String,
}

/// Refusals of one kind.
#[derive(Debug)]
struct Kind {
    noted: Noted,
    /// Those that are not in the log yet.
    count: u64,
    /// From when on they may be written.
    due: Duration,
}

/// What was noted and is not in the log yet.
#[derive(Debug)]
struct Gathered {
    strangers: Table,
    known: Table,
}

impl Gathered {
    fn new() -> Self {
        Self {
            strangers: Table::new(STRANGER),
            known: Table::new(SEVERAL),
        }
    }

    fn add(&mut self, noted: Noted) {
        match (noted.action, noted.actor.as_str()) {
            // Once in the life of a program: it neither waits for others nor is only counted with them.
            (AuditAction::Unlock, _) => self.known.add_first(noted),
            (_, STRANGER) => self.strangers.add(noted),
            (_, _) => self.known.add(noted),
        }
    }

    /// What is due and within the budgets.
    fn take(&mut self, now: Duration) -> Vec<AuditNote> {
        let mut notes = self.known.take(now);
        notes.append(&mut self.strangers.take(now));
        notes
    }
}

/// What was noted of strangers, or of known callers.
#[derive(Debug)]
struct Table {
    /// Who waits longest comes first.
    kinds: VecDeque<Kind>,
    /// Of further kinds: how many, and from when on they may be written.
    others: u64,
    others_due: Duration,
    /// Who is named for them.
    others_are: &'static str,
    budget: Limiter<()>,
}

impl Table {
    fn new(others_are: &'static str) -> Self {
        Self {
            kinds: VecDeque::new(),
            others: 0,
            others_due: Duration::ZERO,
            others_are,
            budget: Limiter::new(BUDGET.0, BUDGET.1),
        }
    }

    fn add(&mut self, noted: Noted) {
        match self.kinds.iter().position(|kind| kind.noted == noted) {
            Some(at) => self.kinds[at].count += 1,
            None if self.kinds.len() < KINDS => self.kinds.push_back(Kind {
                noted,
                count: 1,
                due: Duration::ZERO,
            }),
            None => self.others += 1,
        }
    }

    fn add_first(&mut self, noted: Noted) {
        self.kinds.push_front(Kind {
            noted,
            count: 1,
            due: Duration::ZERO,
        });
    }

    /// What is due and within the budget, the longest waiting first.
    fn take(&mut self, now: Duration) -> Vec<AuditNote> {
        self.kinds.retain(|kind| kind.count > 0 || now < kind.due);
        let mut notes = Vec::new();
        while self.budget.allows((), now) {
            let Some(note) = self.next(now) else { break };
            self.budget.spend((), now);
            notes.push(note);
        }
        notes
    }

    fn next(&mut self, now: Duration) -> Option<AuditNote> {
        let waiting = |kind: &Kind| kind.count > 0 && kind.due <= now;
        if let Some(mut kind) = self
            .kinds
            .iter()
            .position(waiting)
            .and_then(|at| self.kinds.remove(at))
        {
            let count = std::mem::take(&mut kind.count);
            kind.due = now + QUIET;
            let Noted {
                action,
                actor,
                address,
                detail,
            } = kind.noted.clone();
            self.kinds.push_back(kind);
            return Some(note(action, actor, address, detail, count));
        }
        if self.others == 0 || now < self.others_due {
            return None;
        }
        self.others_due = now + QUIET;
        let count = std::mem::take(&mut self.others);
        let detail = "further callers or reasons, too many to tell apart";
        Some(note(
            AuditAction::Refuse,
            self.others_are.into(),
            String::new(),
            detail.into(),
            count,
        ))
    }
}

fn note(action: AuditAction, actor: String, address: String, detail: String, count: u64) -> AuditNote {
    AuditNote {
        action: action.into(),
        actor,
        address,
        detail,
        count,
    }
}

/// Where refusals are noted. Clones note in the same place; [`Notes::run`] must run, and [`Alarms::run`] of its alarms.
#[derive(Debug, Clone)]
pub struct Notes {
    gathered: Arc<Mutex<Gathered>>,
    alarms: Alarms,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            gathered: Arc::new(Mutex::new(Gathered::new())),
            alarms: Alarms::default(),
        }
    }
}

impl Notes {
    /// Notes that somebody was refused. `what` and why is said in words that the caller did not choose, so that alike
    /// refusals are alike here.
    pub fn refused(&self, actor: &str, from: Option<IpAddr>, what: impl fmt::Display) {
        self.note(AuditAction::Refuse, actor, from, what.to_string());
    }

    /// Notes that this manager waited for its unlock key, and was given it.
    pub fn unlocked(&self, actor: &str, generation: u32) {
        let what = format!("with unlock key {generation}");
        self.note(AuditAction::Unlock, actor, None, what);
    }

    /// Tells of somebody with a superseded key: that changes the node's record, and is no mere note.
    pub fn saw_clone(&self, shown: Shown) {
        self.alarms.raise(shown);
    }

    /// Where clones are told of.
    pub fn alarms(&self) -> Alarms {
        self.alarms.clone()
    }

    fn note(&self, action: AuditAction, actor: &str, from: Option<IpAddr>, detail: String) {
        self.lock().add(Noted {
            action,
            actor: actor.to_owned(),
            address: from.map_or_else(String::new, |it| it.to_string()),
            detail,
        });
    }

    /// Commits what was noted until it is stopped. What was noted in the last moment before a crash is lost.
    pub async fn run(
        self,
        proposer: Proposer,
        own: String,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        stop: CancellationToken,
    ) {
        let mut ticks = interval(GATHER);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let notes = self.lock().take(clock.monotonic());
            if notes.is_empty() {
                continue;
            }
            let mut request = [0; 16];
            while entropy.fill(&mut request).is_err() {
                sleep(PAUSE).await; // nothing else works then either
            }
            let commit = commit(&proposer, &own, RequestId::from_bytes(request), notes);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = commit => {}
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Gathered> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Commits again and again while nothing is known: apply passes over the notes of a request that it has.
async fn commit(proposer: &Proposer, own: &str, request: RequestId, notes: Vec<AuditNote>) {
    let changes: Vec<Change> = notes
        .into_iter()
        .map(|note| Change {
            change: Some(Step::Note(note)),
        })
        .collect();
    loop {
        match proposer.client(own, request, Vec::new(), changes.clone()).await {
            Ok(outcome) => {
                if let Some(rejection) = outcome.rejection {
                    tracing::error!(detail = rejection.detail, "a note for the audit log was rejected");
                }
                return;
            }
            Err(ProposeError::TooLarge { bytes }) => {
                tracing::error!(bytes, "notes for the audit log do not fit a transaction");
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "notes for the audit log are not committed yet");
                sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(actor: &str, address: impl ToString, detail: &str) -> Noted {
        Noted {
            action: AuditAction::Refuse,
            actor: actor.into(),
            address: address.to_string(),
            detail: detail.into(),
        }
    }

    fn gathered(refusals: &[(u32, &str)]) -> Gathered {
        let mut gathered = Gathered::new();
        for (address, detail) in refusals {
            gathered.add(refusal(STRANGER, address, detail));
        }
        gathered
    }

    fn taken(gathered: &mut Gathered, now: Duration) -> Vec<(String, u64)> {
        let notes = gathered.take(now).into_iter();
        notes
            .map(|it| {
                (
                    format!("{} {}", it.address, it.detail).trim().to_owned(),
                    it.count,
                )
            })
            .collect()
    }

    #[test]
    fn alike_refusals_are_one_note_and_each_is_counted_once() {
        let mut gathered = gathered(&[(1, "join"), (1, "join"), (2, "join"), (1, "call"), (1, "join")]);
        let expected = |all: &[(&str, u64)]| -> Vec<(String, u64)> {
            all.iter()
                .map(|(what, count)| ((*what).to_owned(), *count))
                .collect()
        };
        let first = taken(&mut gathered, Duration::ZERO);
        assert_eq!(first, expected(&[("1 join", 3), ("2 join", 1), ("1 call", 1)]));
        // What goes on is counted, and written once a while.
        let again = || refusal(STRANGER, 1, "join");
        gathered.add(again());
        gathered.add(again());
        assert_eq!(taken(&mut gathered, QUIET - Duration::from_secs(1)), []);
        gathered.add(again());
        assert_eq!(taken(&mut gathered, QUIET), expected(&[("1 join", 3)]));
        assert_eq!(taken(&mut gathered, 3 * QUIET), []);
        assert_eq!(gathered.strangers.kinds.len(), 0, "what stopped is forgotten");
    }

    #[test]
    fn an_attacker_neither_fills_the_log_nor_goes_uncounted() {
        let mut gathered = gathered(&[]);
        let (mut refused, mut written, mut counted) = (0, 0, 0);
        let hours = 4;
        for second in 0..hours * 3_600_u64 {
            // From a new address each time.
            for n in 0..10 {
                gathered.add(refusal(STRANGER, format!("{second}.{n}"), "join"));
                refused += 1;
            }
            let notes = gathered.take(Duration::from_secs(second));
            written += notes.len();
            counted += notes.iter().map(|it| it.count).sum::<u64>();
            assert!(gathered.strangers.kinds.len() <= KINDS);
        }
        assert!(written <= 32 + 4 * 12, "{written} records");
        let waiting = &gathered.strangers;
        let waiting = waiting.kinds.iter().map(|kind| kind.count).sum::<u64>() + waiting.others;
        assert_eq!(counted + waiting, refused);
        assert!(counted > 0);
    }

    #[test]
    fn a_flood_of_strangers_hides_no_known_caller() {
        let mut gathered = gathered(&[]);
        for n in 0..10 * KINDS {
            gathered.add(refusal(STRANGER, n, "join"));
        }
        assert_eq!(gathered.take(Duration::ZERO).len(), 32, "the strangers' budget");
        for n in 0..10 * KINDS {
            gathered.add(refusal(STRANGER, n, "join"));
        }
        gathered.add(refusal("worker/x", "10.0.0.2", "call: denied"));
        let notes = gathered.take(Duration::ZERO);
        let said: Vec<_> = notes
            .iter()
            .map(|it| (it.actor.as_str(), it.detail.as_str()))
            .collect();
        assert_eq!(said, [("worker/x", "call: denied")]);
    }

    #[test]
    fn an_unlock_is_told_apart_however_many_known_callers_are_refused() {
        let mut gathered = gathered(&[]);
        for n in 0..2 * KINDS {
            gathered.add(refusal(&format!("worker/{n}"), "", "call: denied"));
        }
        gathered.add(Noted {
            action: AuditAction::Unlock,
            ..refusal("operator/x", "", "with unlock key 2")
        });
        let mut notes = gathered.take(Duration::ZERO);
        assert_eq!(
            (notes[0].action(), notes[0].actor.as_str()),
            (AuditAction::Unlock, "operator/x")
        );
        for n in 1..100 {
            notes.extend(gathered.take(BUDGET.1 * n));
        }
        let unlocks = notes.iter().filter(|it| it.action() == AuditAction::Unlock);
        assert_eq!(unlocks.count(), 1);
        let others = notes.iter().find(|it| it.actor == SEVERAL).map(|it| it.count);
        assert_eq!(others, Some(u64::try_from(KINDS).expect("few")));
    }
}
