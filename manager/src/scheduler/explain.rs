//! Why a task has no node: each node with every filter that refused it, and the nearest fix.

use std::collections::BTreeMap;

use super::filter::{Refusal, refusals};
use super::{NodeInfo, Request, View};

/// Lines that a task keeps. A cluster of many nodes refuses in few ways; the rest is for [`explain`].
const SUMMARY_LINES: usize = 8;

/// The answer to "why is it pending".
#[derive(Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Nodes that refuse for the same reasons, by name, with those reasons. No reasons: these nodes would take it.
    pub groups: Vec<(Vec<Refusal>, Vec<String>)>,
    /// The smallest change of the spec that would place it now, where one number is all that is wrong.
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

fn nearest_fix(groups: &[(Vec<Refusal>, Vec<String>)]) -> Option<String> {
    if groups.iter().any(|(reasons, _)| reasons.is_empty()) {
        return None;
    }
    let only = |pick: fn(&Refusal) -> Option<u64>| {
        let single = groups.iter().filter_map(|(reasons, _)| match &reasons[..] {
            [reason] => pick(reason),
            _ => None,
        });
        single.max().filter(|free| *free > 0)
    };
    let memory = only(|reason| match reason {
        Refusal::Memory { free_bytes, .. } => Some(free_bytes >> 20),
        _ => None,
    });
    let cpu = only(|reason| match reason {
        Refusal::Cpu { free_millis, .. } => Some(*free_millis),
        _ => None,
    });
    memory
        .map(|mebibytes| format!("would fit if --reserve-memory <= {mebibytes}MiB"))
        .or_else(|| cpu.map(|millis| format!("would fit if --reserve-cpu <= {millis}m")))
}
