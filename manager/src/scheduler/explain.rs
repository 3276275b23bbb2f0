//! Why a task has no node: each node with every filter that refused it, and the nearest fix.

use std::collections::BTreeMap;

use super::constraint::{Attribute, Constraint, Relation};
use super::filter::{Refusal, refusals};
use super::{NodeInfo, Request, View};

/// Lines that a task keeps. A cluster of many nodes refuses in few ways; the rest is for [`explain`].
const SUMMARY_LINES: usize = 8;

/// The answer to "why is it pending".
#[derive(Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Nodes that refuse for the same reasons, by name, with those reasons. No reasons: these nodes would take it.
    pub groups: Vec<(Vec<Refusal>, Vec<String>)>,
    /// The least that would have to change for it to be placed now. None: some node would take it, or nothing simple
    /// helps.
    pub nearest_fix: Option<String>,
    /// Whether some node could take it once it is ready, available and empty. If not, waiting is in vain.
    pub ever: bool,
}

/// Asks every worker.
pub fn explain(view: &View<'_>, request: &Request<'_>) -> Explanation {
    let infos = NodeInfo::of_workers(view);
    let ever = infos.values().any(|info| {
        let capacity = NodeInfo::empty(info.node);
        refusals(info, request)
            .iter()
            .all(|refusal| refusal.is_passing(&capacity))
    });
    let groups = group(infos.values(), request);
    Explanation {
        nearest_fix: nearest_fix(&groups),
        groups,
        ever,
    }
}

/// The same in a few lines, for the task's own record.
pub(super) fn summary<'a>(
    infos: impl Iterator<Item = &'a NodeInfo<'a>>,
    request: &Request<'_>,
) -> Vec<String> {
    let groups = group(infos, request);
    if groups.is_empty() {
        return vec!["the cluster has no worker".to_owned()];
    }
    let line = |(reasons, nodes): &(Vec<Refusal>, Vec<String>)| {
        let reasons: Vec<_> = reasons.iter().map(ToString::to_string).collect();
        let (count, noun) = (nodes.len(), if nodes.len() == 1 { "node" } else { "nodes" });
        format!("{count} {noun}: {}", reasons.join("; "))
    };
    groups.iter().take(SUMMARY_LINES).map(line).collect()
}

/// Largest group first, then by reasons: the order does not depend on how the state was built.
fn group<'a>(
    infos: impl Iterator<Item = &'a NodeInfo<'a>>,
    request: &Request<'_>,
) -> Vec<(Vec<Refusal>, Vec<String>)> {
    let mut groups: BTreeMap<Vec<Refusal>, Vec<String>> = BTreeMap::new();
    for info in infos {
        groups
            .entry(refusals(info, request))
            .or_default()
            .push(info.node.name.clone());
    }
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by_key(|(_, nodes)| std::cmp::Reverse(nodes.len()));
    groups
}

/// The least that would have to change for some node to take the task now.
fn nearest_fix(groups: &[(Vec<Refusal>, Vec<String>)]) -> Option<String> {
    if groups.is_empty() {
        return Some(
            "would fit once a worker has joined: bulkhead cluster ticket create --role worker".to_owned(),
        );
    }
    if groups.iter().any(|(reasons, _)| reasons.is_empty()) {
        return None;
    }
    let fixes = groups.iter().filter_map(|(reasons, nodes)| {
        let node = nodes.first()?;
        let steps: Option<Vec<_>> = reasons.iter().map(|reason| Fix::of(reason, node)).collect();
        steps
    });
    let nearest = fixes.min_by_key(|steps| {
        let effort: u32 = steps.iter().map(|fix| fix.effort).sum();
        (effort, std::cmp::Reverse(steps.iter().map(|fix| fix.left).max()))
    })?;
    let told = |when: When| {
        let steps = nearest.iter().filter(|fix| fix.when == when);
        steps.map(|fix| &fix.text[..]).collect::<Vec<_>>().join(" and ")
    };
    let parts = [("if ", told(When::Asked)), ("after ", told(When::Done))];
    let parts = parts.iter().filter(|(_, text)| !text.is_empty());
    let parts: Vec<_> = parts.map(|(word, text)| format!("{word}{text}")).collect();
    Some(format!("would fit {}", parts.join(", ")))
}

/// What lifts one refusal.
struct Fix {
    when: When,
    /// Asking for less is nearer than a change of a node, that nearer than a change of what the service is.
    effort: u32,
    /// How much is free where less is to be asked for.
    left: u64,
    text: String,
}

/// Whether the service asks for something else, or something is done to a node.
#[derive(PartialEq)]
enum When {
    Asked,
    Done,
}

impl Fix {
    fn of(refusal: &Refusal, node: &str) -> Option<Self> {
        let (when, effort, left, text) = match refusal {
            Refusal::Memory { free_bytes, .. } => {
                let mebibytes = free_bytes >> 20;
                let text = format!("--reserve-memory <= {mebibytes}MiB");
                (When::Asked, 1, (mebibytes > 0).then_some(mebibytes)?, text)
            }
            Refusal::Cpu { free_millis, .. } => {
                let text = format!("--reserve-cpu <= {free_millis}m");
                (When::Asked, 1, (*free_millis > 0).then_some(*free_millis)?, text)
            }
            Refusal::Paused | Refusal::Draining => {
                (When::Done, 2, 0, format!("bulkhead node activate {node}"))
            }
            Refusal::Constraint(constraint) => match label_command(constraint, node) {
                Some(command) => (When::Done, 3, 0, command),
                None => (
                    When::Asked,
                    4,
                    0,
                    format!("the constraint {constraint} is dropped"),
                ),
            },
            Refusal::SelfReported(constraint) => {
                let text = format!("the constraint {constraint} names the node by node.id or a label");
                (When::Asked, 4, 0, text)
            }
            Refusal::HostPort(port) => (
                When::Asked,
                4,
                0,
                format!("another host port than {port} is published"),
            ),
            Refusal::NotReady => (When::Done, 8, 0, format!("the worker of {node} is started")),
        };
        Some(Self {
            when,
            effort,
            left,
            text,
        })
    }
}

/// The command that makes a node satisfy a constraint on a label.
fn label_command(constraint: &str, node: &str) -> Option<String> {
    let constraint: Constraint = constraint.parse().ok()?;
    let Attribute::Label(key) = &constraint.attribute else {
        return None;
    };
    let flag = match constraint.relation {
        Relation::Equal => format!("--label-add {key}={}", constraint.value),
        Relation::NotEqual => format!("--label-rm {key}"),
    };
    Some(format!("bulkhead node update {node} {flag}"))
}
