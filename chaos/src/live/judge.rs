//! What was seen, against the rules. Pure: the same record has the same verdict.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::fault::{Fault, Target};
use super::micros;
use super::record::{Seen, What};
use super::scenario::Expect;
use crate::check::{linearize, order};
use crate::rules::{Rule, Violation};

/// Configurations that the search for an order looks at, of each register.
const BUDGET: usize = 5_000_000;
/// For so long after a fault of its node a task may still end for its sake: the node is called down, comes back, and
/// hears that another task has taken the place.
const GRACE_US: u64 = 45_000_000;
/// For so long after its disk had room again a manager may still end for its sake.
const FULL_US: u64 = 5_000_000;

/// A panic ends a Rust program with this.
const PANICKED: [&str; 2] = ["exit status: 101", "signal: 6 (SIGABRT)"];

/// A fault as it was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Done {
    /// From 1.
    pub(super) number: usize,
    pub(super) fault: Fault,
    /// Whom it was for.
    pub(super) target: Target,
    /// Who that was: names of nodes. Nobody: the cluster.
    pub(super) nodes: Vec<String>,
    /// Workers that it could reach: their tasks may end.
    pub(super) workers: BTreeSet<String>,
    pub(super) start_us: u64,
    pub(super) end_us: u64,
    /// Why it was not done; nothing: it was.
    pub(super) skipped: Option<String>,
    /// How it was taken back.
    pub(super) undo: &'static str,
    /// From its beginning to the answer to the first write that was sent after it.
    pub(super) gap_us: Option<u64>,
}

/// What the end of a run showed, once every fault was taken back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct End {
    /// The secrets that are there.
    pub(super) secrets: BTreeSet<String>,
    /// Why the final look failed; nothing: it did not.
    pub(super) unseen: Option<String>,
}

/// The gap of each fault.
pub(super) fn gaps(done: &mut [Done], seen: &Seen) {
    for one in done.iter_mut().filter(|one| one.skipped.is_none()) {
        let after = seen.acks.iter().filter(|ack| ack.sent_us >= one.start_us);
        one.gap_us = after.map(|ack| ack.done_us).min().map(|at| at - one.start_us);
    }
}

/// The rules that were broken, as far as the record shows, and those that were not put to the test.
pub(super) fn judge(
    seen: &Seen,
    done: &[Done],
    nodes: &[String],
    end: &End,
    end_us: u64,
) -> (Vec<Violation>, BTreeSet<Rule>) {
    let mut broken = Vec::new();
    let mut unknown = BTreeSet::new();
    let mut broke = |rule, at_us, evidence| {
        broken.push(Violation {
            rule,
            at_us,
            evidence,
        })
    };
    for (register, operations) in &seen.registers {
        match linearize::check(operations, BUDGET) {
            linearize::Verdict::Linearizable => {}
            linearize::Verdict::Broken(at) => {
                let operation = &operations[at];
                broke(
                    Rule::Linearizable,
                    operation.returned,
                    format!("register {register}: nothing explains {operation:?}"),
                );
            }
            linearize::Verdict::Unknown => drop(unknown.insert(Rule::Linearizable)),
        }
        match order::check(operations) {
            Ok(()) => {}
            Err(order::Broken::Answer(at)) => {
                broke(
                    Rule::FreshReads,
                    operations[at].returned,
                    format!("register {register}: by its index {:?} is wrong", operations[at]),
                );
            }
            Err(order::Broken::Time(later, at)) => broke(
                Rule::FreshReads,
                operations[at].returned,
                format!(
                    "register {register}: {:?} began after {:?} was answered, and is before it",
                    operations[at], operations[later]
                ),
            ),
        }
    }
    if seen.registers.values().all(Vec::is_empty) {
        unknown.extend([Rule::Linearizable, Rule::FreshReads]);
    }
    for (term, leaders) in seen.leaders.iter().filter(|(_, leaders)| leaders.len() > 1) {
        broke(
            Rule::OneLeaderPerTerm,
            end_us,
            format!("term {term} was led by members {leaders:?}"),
        );
    }
    for (sequence, hashes) in seen.audit.iter().filter(|(_, hashes)| hashes.len() > 1) {
        broke(
            Rule::OneStatePerIndex,
            end_us,
            format!("record {sequence} of the audit log has {} hashes", hashes.len()),
        );
    }
    match &end.unseen {
        Some(why) => {
            unknown.insert(Rule::AcknowledgedIsKept);
            broke(Rule::ServesAgain, end_us, why.clone());
        }
        None => lost(seen, end, |evidence| {
            broke(Rule::AcknowledgedIsKept, end_us, evidence)
        }),
    }
    for (rule, at_us, evidence) in ended(seen, done, nodes) {
        broke(rule, at_us, evidence);
    }
    for (gone, evidence) in restarted(seen, done) {
        broke(Rule::TasksRunOn, gone, evidence);
    }
    if seen.runs.is_empty() {
        unknown.insert(Rule::TasksRunOn);
    }
    let rotates = |it: &Done| it.fault == Fault::RotateRoot && it.skipped.is_none();
    if !done.iter().any(rotates) {
        unknown.insert(Rule::RotationEnds);
    }
    (broken, unknown)
}

/// What a scenario expects and did not come true.
pub(super) fn unexpected(seen: &Seen, done: &[Done], expect: &Expect, end_us: u64) -> Vec<Violation> {
    let mut broken = Vec::new();
    let mut broke = |at_us, evidence| {
        broken.push(Violation {
            rule: Rule::Expected,
            at_us,
            evidence,
        });
    };
    if let Some(wanted) = expect.answered {
        let (all, failed) = (seen.counts.requests, seen.counts.unanswered);
        let share = (all - failed) as f64 / all.max(1) as f64;
        if all == 0 || share < wanted.share() {
            broke(
                end_us,
                format!(
                    "{} of {all} requests were answered, {wanted} expected",
                    all - failed
                ),
            );
        }
    }
    if let Some(wanted) = expect.recovery {
        for one in done.iter().filter(|it| it.skipped.is_none()) {
            match one.gap_us {
                Some(gap) if gap <= micros(wanted) => {}
                gap => {
                    let gap = gap.map_or("never".to_owned(), |gap| format!("after {} ms", gap / 1_000));
                    broke(
                        one.start_us,
                        format!("#{} {}: the next write was answered {gap}", one.number, one.fault),
                    );
                }
            }
        }
    }
    if let Some(wanted) = expect.restarts {
        let ended = seen.runs.values().filter(|run| run.gone_us.is_some()).count();
        if ended as u64 > wanted {
            broke(end_us, format!("{ended} tasks ended, {wanted} expected at most"));
        }
    }
    broken
}

fn lost(seen: &Seen, end: &End, mut broke: impl FnMut(String)) {
    for (name, fate) in &seen.secrets {
        let there = end.secrets.contains(name);
        match (fate.created, fate.removed) {
            (true, None) if !there => broke(format!("{name} was acknowledged, and is not there")),
            (_, Some(true)) if there => {
                broke(format!("the removal of {name} was acknowledged, and it is there"))
            }
            _ => {}
        }
    }
    let ours = end.secrets.iter().filter(|name| name.starts_with("chaos-"));
    for name in ours.filter(|name| !seen.secrets.contains_key(*name) && name.matches('-').count() == 2) {
        broke(format!("{name} is there, and nobody asked for it"));
    }
}

/// Programs that panicked, or ended by themselves otherwise, but for managers that could not write their log a moment ago: on a
/// full disk, or where they could open no new part of it.
fn ended(seen: &Seen, done: &[Done], nodes: &[String]) -> Vec<(Rule, u64, String)> {
    let cannot_write = |name: &String, at: u64| {
        done.iter().any(|it| {
            matches!(it.fault, Fault::DiskFull | Fault::NoDescriptors)
                && it.nodes.contains(name)
                && (it.start_us..it.end_us.saturating_add(FULL_US)).contains(&at)
        })
    };
    let by_itself = |how: &str| !["killed", "stopped", "exit status: 0"].contains(&how);
    seen.events
        .iter()
        .filter_map(|event| match &event.what {
            What::Ends { node, how } if PANICKED.contains(&how.as_str()) => Some((
                Rule::NoPanic,
                event.at_us,
                format!("{} ended by a panic: its log says more", nodes[*node]),
            )),
            What::Ends { node, how } if by_itself(how) && !cannot_write(&nodes[*node], event.at_us) => {
                Some((
                    Rule::StartsAgain,
                    event.at_us,
                    format!("{} ended by itself: {how}", nodes[*node]),
                ))
            }
            _ => None,
        })
        .collect()
}

/// Tasks that ended although nothing that they need was struck.
fn restarted(seen: &Seen, done: &[Done]) -> Vec<(u64, String)> {
    let mut struck: BTreeMap<&str, Vec<(u64, u64)>> = BTreeMap::new();
    for one in done.iter().filter(|one| one.skipped.is_none()) {
        for worker in &one.workers {
            let span = (one.start_us, one.end_us.saturating_add(GRACE_US));
            struck.entry(worker.as_str()).or_default().push(span);
        }
    }
    let excused = |node: &str, from: u64, to: u64| {
        struck
            .get(node)
            .is_some_and(|spans| spans.iter().any(|(start, end)| *start <= to && from <= *end))
    };
    let mut found = Vec::new();
    for run in seen.runs.values() {
        if let Some(gone) = run.gone_us.filter(|gone| !excused(&run.node, run.seen_us, *gone)) {
            found.push((gone, format!("a task of {} on {} ended", run.service, run.node)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Action, Operation, Told};
    use crate::live::record::{Ack, Event, Fate, Run};

    fn done(fault: Fault, workers: &[&str], start_us: u64, end_us: u64) -> Done {
        Done {
            number: 1,
            fault,
            target: Target::Leader,
            nodes: Vec::new(),
            workers: workers.iter().map(|it| (*it).to_owned()).collect(),
            start_us,
            end_us,
            skipped: None,
            undo: "a start",
            gap_us: None,
        }
    }

    fn rules(seen: &Seen, done: &[Done], end: &End) -> Vec<Rule> {
        judge(seen, done, &[], end, 99)
            .0
            .into_iter()
            .map(|it| it.rule)
            .collect()
    }

    #[test]
    fn a_task_may_end_for_a_fault_of_its_own_node_alone() {
        let mut seen = Seen::default();
        let run = Run {
            service: "web".into(),
            node: "worker-1".into(),
            from_us: 0,
            seen_us: 50,
            gone_us: Some(60),
        };
        seen.runs.insert(vec![1], run);
        let end = End::default();
        assert_eq!(rules(&seen, &[], &end), [Rule::TasksRunOn]);
        assert_eq!(
            rules(&seen, &[done(Fault::Kill, &["worker-2"], 10, 70)], &end),
            [Rule::TasksRunOn]
        );
        assert_eq!(
            rules(&seen, &[done(Fault::Kill, &["worker-1"], 61, 70)], &end),
            [Rule::TasksRunOn]
        );
        assert_eq!(
            rules(&seen, &[done(Fault::Kill, &["worker-1"], 55, 70)], &end),
            []
        );
        assert_eq!(
            rules(&seen, &[done(Fault::Kill, &["worker-1"], 10, 20)], &end),
            []
        );
        seen.runs.values_mut().for_each(|run| run.gone_us = None);
        assert_eq!(rules(&seen, &[], &end), []);
    }

    #[test]
    fn what_was_acknowledged_is_there_and_what_was_removed_is_not() {
        let mut seen = Seen::default();
        let mut fate = |name: &str, created, removed| {
            seen.secrets.insert(name.into(), Fate { created, removed });
        };
        fate("chaos-1-1", true, None);
        fate("chaos-1-2", false, None);
        fate("chaos-1-3", true, Some(true));
        fate("chaos-1-4", true, Some(false));
        let end = |names: &[&str]| End {
            secrets: names.iter().map(|it| (*it).to_owned()).collect(),
            unseen: None,
        };
        assert_eq!(rules(&seen, &[], &end(&["chaos-1-1"])), []);
        assert_eq!(
            rules(&seen, &[], &end(&["chaos-1-1", "chaos-1-2", "chaos-1-4", "db"])),
            []
        );
        assert_eq!(rules(&seen, &[], &end(&[])), [Rule::AcknowledgedIsKept]);
        assert_eq!(
            rules(&seen, &[], &end(&["chaos-1-1", "chaos-1-3"])),
            [Rule::AcknowledgedIsKept]
        );
        assert_eq!(
            rules(&seen, &[], &end(&["chaos-1-1", "chaos-2-9"])),
            [Rule::AcknowledgedIsKept]
        );
        let unseen = End {
            unseen: Some("nobody answers".into()),
            ..End::default()
        };
        let (broken, unknown) = judge(&seen, &[], &[], &unseen, 99);
        assert_eq!(broken[0].rule, Rule::ServesAgain);
        assert!(unknown.contains(&Rule::AcknowledgedIsKept));
    }

    #[test]
    fn a_program_ends_by_itself_on_a_full_disk_alone() {
        let mut seen = Seen::default();
        for (at_us, how) in [
            (10, "killed"),
            (20, "exit status: 0"),
            (30, "exit status: 74"),
            (31, "exit status: 101"),
        ] {
            seen.events.push(Event {
                at_us,
                what: What::Ends {
                    node: 0,
                    how: how.into(),
                },
            });
        }
        let names = ["manager-1".to_owned()];
        let rules =
            |done: &[Done]| -> Vec<Rule> { ended(&seen, done, &names).iter().map(|it| it.0).collect() };
        for fault in [Fault::DiskFull, Fault::NoDescriptors] {
            let mut one = done(fault, &[], 25, 28);
            assert_eq!(rules(&[one.clone()]), [Rule::StartsAgain, Rule::NoPanic]);
            one.nodes = names.to_vec();
            assert_eq!(rules(&[one]), [Rule::NoPanic], "{fault} excuses no panic");
        }
    }

    #[test]
    fn two_leaders_of_a_term_two_states_and_a_stale_read_are_seen() {
        let mut seen = Seen::default();
        seen.leaders.insert(3, BTreeSet::from([1, 2]));
        seen.leaders.insert(4, BTreeSet::from([2]));
        seen.audit.insert(9, BTreeSet::from([vec![1], vec![2]]));
        let operation = |called, returned, action, index| Operation {
            called,
            returned,
            action,
            told: Told::Done,
            index: Some(index),
        };
        let swap = |from, to| Action::Swap { from, to };
        seen.registers.insert(
            0,
            vec![
                operation(1, 2, swap(None, 1), 5),
                operation(3, 4, swap(Some(1), 2), 6),
                operation(5, 6, Action::Read { value: Some(1) }, 5),
            ],
        );
        let found: BTreeSet<Rule> = rules(&seen, &[], &End::default()).into_iter().collect();
        let wanted = [
            Rule::OneLeaderPerTerm,
            Rule::OneStatePerIndex,
            Rule::FreshReads,
            Rule::Linearizable,
        ];
        assert_eq!(found, BTreeSet::from(wanted));
    }

    #[test]
    fn what_a_scenario_expects_is_held_against_what_was_seen() {
        let mut seen = Seen::default();
        (seen.counts.requests, seen.counts.unanswered) = (1_000, 11);
        let mut one = done(Fault::Kill, &[], 10, 20);
        one.gap_us = Some(2_000_001);
        let broken = |expect| unexpected(&seen, &[one.clone()], &expect, 99).len();
        let answered = |text: &str| Expect {
            answered: serde_json::from_str(text).ok(),
            ..Expect::default()
        };
        let recovery = |seconds| Expect {
            recovery: Some(std::time::Duration::from_secs(seconds)),
            ..Expect::default()
        };
        assert_eq!((broken(answered("\"98%\"")), broken(answered("\"99%\""))), (0, 1));
        assert_eq!((broken(recovery(3)), broken(recovery(2))), (0, 1));
        let nobody_asked = unexpected(&Seen::default(), &[], &answered("\"1%\""), 99);
        assert_eq!(nobody_asked.len(), 1, "no request is no success");
    }

    #[test]
    fn a_gap_ends_with_a_write_that_was_sent_after_the_fault() {
        let acks = [(5, 40), (12, 35), (20, 31)].map(|(sent_us, done_us)| Ack { sent_us, done_us });
        let seen = Seen {
            acks: acks.to_vec(),
            ..Seen::default()
        };
        let mut all = [done(Fault::Kill, &[], 10, 20), done(Fault::Kill, &[], 30, 40)];
        gaps(&mut all, &seen);
        assert_eq!(all.map(|it| it.gap_us), [Some(21), None]);
    }
}
