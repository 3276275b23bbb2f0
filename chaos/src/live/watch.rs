//! Looks at the cluster while it is broken: who leads, which root signs, which tasks run, what its processes take.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_lab::client::{Control, Managers};
use bulkhead_lab::status;
use bulkhead_proto::wire::{ClusterStatus, ListTasksRequest, TaskState, TaskSummary};
use tokio::time::{sleep, timeout};

use super::cluster::Node;
use super::record::{Record, Run, Sample, Seen, What};

/// Between two looks at one manager.
const LOOK: Duration = Duration::from_millis(150);
const CALL: Duration = Duration::from_secs(2);
/// No manager answers for so long only in a cluster that is down, or to an operator whom it does not know.
const SILENT_US: u64 = 2_000_000;

/// Looks at a manager until it is dropped, and has the operator follow the roots.
pub(super) async fn manager(at: usize, mut managers: Managers, nodes: Arc<Vec<Node>>, record: Arc<Record>) {
    let mut led = None;
    let (operator, endpoint) = (managers.operator().clone(), managers.endpoint(at).to_owned());
    while let Ok(mut control) = managers.control(at) {
        let leads = match status(&mut control).await {
            Ok(status) => {
                let leads = note(&status, &nodes, at, &record);
                record.seen().answered_us = record.now_us();
                // What fails now is tried at the next look.
                let _followed = operator.follow(&endpoint, &status).await;
                leads
            }
            Err(_) => {
                // Where nobody answers, it may be this operator whose certificate is of a root that was dropped.
                let silent = record.now_us().saturating_sub(record.seen().answered_us);
                if silent > SILENT_US {
                    let _back = operator.come_back(&endpoint).await; // or at the next look
                }
                None
            }
        };
        if leads != led {
            record.event(match leads {
                Some(term) => What::Leads { node: at, term },
                None => What::Follows { node: at },
            });
            let mut seen = record.seen();
            match leads {
                Some(term) if seen.leader.is_none_or(|(_, known)| known <= term) => {
                    seen.leader = Some((at, term))
                }
                None if seen.leader.is_some_and(|(known, _)| known == at) => seen.leader = None,
                _ => {}
            }
            led = leads;
        }
        sleep(LOOK).await;
    }
}

/// Keeps what a manager says; its term, if it says that it leads.
fn note(status: &ClusterStatus, nodes: &[Node], at: usize, record: &Record) -> Option<u64> {
    let mut seen = record.seen();
    if status.leader_member != 0 {
        seen.leaders
            .entry(status.term)
            .or_default()
            .insert(status.leader_member);
    }
    if let Some(head) = &status.audit {
        seen.audit
            .entry(head.sequence)
            .or_default()
            .insert(head.hash.clone());
    }
    if status.stale {
        return None;
    }
    let root: String = status
        .issuer
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let known = issuer(&seen);
    if !root.is_empty() && known != Some(root.as_str()) {
        // A manager that was away may name the one before for a moment: it was seen already.
        let before =
            |it: &super::record::Event| matches!(&it.what, What::Issuer { root: its } if *its == root);
        if !seen.events.iter().any(before) {
            let at_us = record.now_us();
            seen.events.push(super::record::Event {
                at_us,
                what: What::Issuer { root },
            });
        }
    }
    let own = status
        .members
        .iter()
        .find(|member| member.node_id == status.node_id)?;
    (own.leader && own.name == nodes[at].name).then_some(status.term)
}

fn issuer(seen: &Seen) -> Option<&str> {
    seen.events.iter().rev().find_map(|it| match &it.what {
        What::Issuer { root } => Some(root.as_str()),
        _ => None,
    })
}

/// The tasks that run, of services with these names.
pub(super) async fn running(control: &mut Control, services: &[String]) -> Option<Vec<TaskSummary>> {
    let mut all = tasks_of(control, services).await?;
    all.retain(runs);
    Some(all)
}

/// Whether a task runs.
pub(super) fn runs(task: &TaskSummary) -> bool {
    let status = task.task.as_ref().and_then(|task| task.status.as_ref());
    status.is_some_and(|it| it.state() == TaskState::Running)
}

/// All tasks of these services; nothing: no answer.
pub(super) async fn tasks_of(control: &mut Control, services: &[String]) -> Option<Vec<TaskSummary>> {
    let mut all = Vec::new();
    for service in services {
        let request = ListTasksRequest {
            service: service.clone(),
            ..ListTasksRequest::default()
        };
        let answer = timeout(CALL, control.list_tasks(request)).await.ok()?.ok()?;
        all.extend(answer.into_inner().tasks);
    }
    Some(all)
}

/// Looks at the tasks until it is dropped, at whichever manager answers.
pub(super) async fn tasks(
    mut managers: Managers,
    services: Vec<String>,
    nodes: Arc<Vec<Node>>,
    record: Arc<Record>,
) {
    let mut counts = vec![0; nodes.len()];
    for turn in 0.. {
        let Ok(mut control) = managers.control(turn % managers.count()) else {
            return;
        };
        if let Some(tasks) = running(&mut control, &services).await {
            let now = record.now_us();
            let mut next = vec![0; nodes.len()];
            for task in &tasks {
                if let Some(node) = nodes.iter().position(|node| node.name == task.node_name) {
                    next[node] += 1;
                }
            }
            {
                let mut seen = record.seen();
                keep(&mut seen, &tasks, now);
                seen.places = services
                    .iter()
                    .map(|service| (service.clone(), places(service, &tasks, &nodes)))
                    .collect();
            }
            for (node, count) in next
                .iter()
                .enumerate()
                .filter(|(node, count)| **count != counts[*node])
            {
                record.event(What::Tasks { node, count: *count });
            }
            counts = next;
        }
        sleep(2 * LOOK).await;
    }
}

/// The nodes on which a service has tasks.
fn places(service: &str, tasks: &[TaskSummary], nodes: &[Node]) -> Vec<usize> {
    let of_it = tasks.iter().filter(|it| it.service_name == service);
    let mut found: Vec<usize> = of_it
        .filter_map(|it| nodes.iter().position(|node| node.name == it.node_name))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn keep(seen: &mut Seen, tasks: &[TaskSummary], now: u64) {
    for summary in tasks {
        let Some(task) = &summary.task else { continue };
        let run = seen.runs.entry(task.id.clone()).or_insert_with(|| Run {
            service: summary.service_name.clone(),
            node: summary.node_name.clone(),
            from_us: now,
            seen_us: now,
            gone_us: None,
        });
        run.seen_us = now;
        run.gone_us = None;
    }
    for run in seen.runs.values_mut().filter(|run| run.seen_us < now) {
        run.gone_us.get_or_insert(now);
    }
}

/// What a process takes now.
pub(super) fn sample(pids: &[u32], at_us: u64) -> Option<Sample> {
    let mut sum = Sample {
        at_us,
        resident_kib: 0,
        descriptors: 0,
        threads: 0,
    };
    for pid in pids {
        let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/status")) else {
            continue; // it ended just now
        };
        let field = |name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
                .unwrap_or_default()
        };
        sum.resident_kib += field("VmRSS:");
        sum.threads += field("Threads:");
        sum.descriptors += std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |it| it.count() as u64);
    }
    (sum.resident_kib > 0).then_some(sum)
}

/// The lines of a log that are errors, or said before or after it was one, up to so many bytes.
pub(super) fn errors(log: &str, most: usize) -> String {
    let ordinary = [" INFO ", " WARN ", " DEBUG ", " TRACE "];
    let mut errors = String::new();
    for line in log.lines() {
        let level: String = line.chars().skip_while(|it| *it != ' ').take(8).collect();
        let is_ordinary = ordinary.iter().any(|it| level.contains(it));
        if !is_ordinary && errors.len() + line.len() < most {
            errors.push_str(line);
            errors.push('\n');
        }
    }
    errors
}

/// Handshakes that a node refused, or was refused, for a certificate's sake: when, and who was at the other end.
pub(super) fn refused(log: &str) -> Vec<(jiff::Timestamp, String)> {
    let of_line = |line: &str| {
        let rest = line.split_once("handshake refused address=")?.1;
        let certificate = ["UnknownCA", "UnknownIssuer", "certificate"]
            .iter()
            .any(|it| rest.contains(it));
        let at = line.split(' ').next()?.parse().ok()?;
        let address = rest.split(' ').next()?.rsplit_once(':')?.0;
        certificate.then(|| (at, address.to_owned()))
    };
    log.lines().filter_map(of_line).collect()
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::Task;

    use super::*;

    fn summary(id: u8) -> TaskSummary {
        TaskSummary {
            task: Some(Task {
                id: vec![id; 16],
                ..Task::default()
            }),
            node_name: "worker-1".into(),
            ..TaskSummary::default()
        }
    }

    #[test]
    fn a_task_runs_from_when_it_is_seen_until_it_is_not() {
        let mut seen = Seen::default();
        keep(&mut seen, &[summary(1), summary(2)], 10);
        keep(&mut seen, &[summary(2)], 20);
        keep(&mut seen, &[summary(2)], 30);
        let one = &seen.runs[&vec![1; 16]];
        assert_eq!((one.from_us, one.seen_us, one.gone_us), (10, 10, Some(20)));
        let other = &seen.runs[&vec![2; 16]];
        assert_eq!((other.from_us, other.seen_us, other.gone_us), (10, 30, None));
    }

    #[test]
    fn errors_are_told_from_what_is_ordinary() {
        let log = "2026-11-29T02:47:16.8Z  INFO audit: an ERROR that is none\n\
                   2026-11-29T02:47:17.8Z ERROR raft: it stopped\n\
                   2026-11-29T02:47:18.8Z  WARN raft: late\n\
                   bulkhead-manager: the replica stopped\n";
        let wanted = "2026-11-29T02:47:17.8Z ERROR raft: it stopped\nbulkhead-manager: the replica stopped\n";
        assert_eq!(errors(log, 1_000), wanted);
        assert_eq!(
            errors(log, 60),
            wanted.lines().next().unwrap_or_default().to_owned() + "\n"
        );
    }

    #[test]
    fn a_refused_handshake_is_read_off_a_log() {
        let log = "2026-11-29T02:47:16.8Z  INFO audit: handshake refused address=10.77.0.6:41030 error=received fatal alert: UnknownCA\n\
                   2026-11-29T02:47:17.8Z  INFO audit: handshake refused address=10.77.0.6:41030 error=connection reset\n\
                   2026-11-29T02:47:18.8Z  INFO other: UnknownCA\n";
        let found = refused(log);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].0.to_string().as_str(), found[0].1.as_str()),
            ("2026-11-29T02:47:16.8Z", "10.77.0.6")
        );
    }

    #[test]
    fn this_process_takes_something() {
        let sample = sample(&[std::process::id()], 7).expect("it runs");
        assert!(
            sample.resident_kib > 100 && sample.descriptors > 2 && sample.threads > 0,
            "{sample:?}"
        );
        assert_eq!(super::sample(&[u32::MAX], 7), None);
    }
}
