//! When a service is where it was told to be: a pure judgement, and the loop that looks.

use std::collections::BTreeMap;
use std::time::Duration;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    DesiredState, ExplainRequest, ExplainResponse, ListTasksRequest, ServiceSpec, ServiceSummary, Task,
    TaskState, TaskSummary, UpdateState,
};
use tokio::time::Instant;

use crate::connection::{Connection, pages};
use crate::explain;
use crate::output::Progress;
use crate::refusal::{Code, Refusal};
use crate::task;
use crate::wait;

/// How often a pending replica is explained.
const EXPLAIN: Duration = Duration::from_secs(1);

/// What one look at a service says.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    /// A line for each replica.
    lines: Vec<(u32, String)>,
    verdict: Verdict,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// All replicas run and stayed up.
    Converged,
    /// Some do not yet; `pending`: one of them has no node.
    Waiting { pending: bool },
    /// An update stopped, for this reason.
    Paused(String),
}

/// Since when each task was seen running.
type Seen = BTreeMap<Vec<u8>, Instant>;

/// Judges what is there. `seen` is this command's own clock: those of the nodes may differ from ours.
fn judge(summary: &ServiceSummary, tasks: &[TaskSummary], seen: &mut Seen, now: Instant) -> Look {
    let service = summary.service.clone().unwrap_or_default();
    let spec = super::newest(&service.versions);
    let monitor = Duration::from_millis(spec.update.map_or(0, |u| u.monitor_ms));
    let mut lines = Vec::new();
    let (mut settled, mut pending) = (0, false);
    for slot in 1..=spec.replicas {
        let current = newest_of(tasks, slot);
        let line = match current {
            None => "waiting".to_owned(),
            Some((task, summary)) => {
                let status = task.status.clone().unwrap_or_default();
                let place = match summary.node_name.as_str() {
                    "" => String::new(),
                    node => format!(" on {node}"),
                };
                let mut line = format!("{}{place}", task::state(task.status.as_ref()));
                if status.state() == TaskState::Running && task.desired() == DesiredState::Running {
                    let since = *seen.entry(task.id.clone()).or_insert(now);
                    let current = summary.spec.as_ref().is_none_or(|s| same_template(s, &spec));
                    if !current {
                        line.push_str(", to be replaced");
                    } else if now - since >= monitor {
                        settled += 1;
                    } else {
                        line.push_str(", watched");
                    }
                }
                pending |= status.state() <= TaskState::Pending;
                let reason = task::reason(summary);
                if reason.is_empty() {
                    line
                } else {
                    format!("{line}: {reason}")
                }
            }
        };
        lines.push((slot, line));
    }
    let live = |t: &&TaskSummary| {
        t.task
            .as_ref()
            .is_some_and(|t| alive(t) && t.slot > spec.replicas)
    };
    let surplus = tasks.iter().filter(live).count();
    let update = service.update.unwrap_or_default();
    let verdict = match update.state() {
        UpdateState::Paused => Verdict::Paused(update.message),
        UpdateState::Updating => Verdict::Waiting { pending },
        UpdateState::Unspecified | UpdateState::Completed => {
            if settled == spec.replicas && surplus == 0 {
                Verdict::Converged
            } else {
                Verdict::Waiting { pending }
            }
        }
    };
    Look { lines, verdict }
}

fn alive(task: &Task) -> bool {
    task.status
        .as_ref()
        .is_none_or(|s| s.state() < TaskState::Complete)
}

/// The newest attempt of a slot.
fn newest_of(tasks: &[TaskSummary], slot: u32) -> Option<(&Task, &TaskSummary)> {
    tasks
        .iter()
        .filter_map(|summary| Some((summary.task.as_ref()?, summary)))
        .filter(|(task, _)| task.slot == slot)
        .max_by_key(|(task, _)| task.attempt)
}

/// Whether two specs make the same task: all but name, labels and replicas.
fn same_template(one: &ServiceSpec, other: &ServiceSpec) -> bool {
    let bare = |spec: &ServiceSpec| ServiceSpec {
        name: String::new(),
        labels: Vec::new(),
        replicas: 0,
        ..spec.clone()
    };
    bare(one) == bare(other)
}

/// Waits until a service converged; refuses once it is clear that it will not by itself.
pub(super) async fn wait(
    connection: &mut Connection,
    name: &str,
    progress: &mut Progress<'_>,
) -> Result<(), Refusal> {
    let place = format!("service {name}");
    let mut seen = Seen::new();
    let (mut pending_since, mut explained): (Option<Instant>, Option<Instant>) = (None, None);
    loop {
        let summary = super::one(connection, name).await?;
        let request = ListTasksRequest {
            service: name.to_owned(),
            all: true,
            ..Default::default()
        };
        let tasks = pages!(connection, &place, list_tasks, request, tasks);
        let now = Instant::now();
        let look = judge(&summary, &tasks, &mut seen, now);
        for (slot, line) in &look.lines {
            progress.set(&format!("{name}.{slot}"), line);
        }
        match look.verdict {
            Verdict::Converged => return Ok(()),
            Verdict::Paused(reason) => {
                let help = format!("look with 'bulkhead service ps {name}', then update again");
                return Err(Refusal::new(Code::UpdatePaused, place, reason, help));
            }
            Verdict::Waiting { pending: false } => pending_since = None,
            Verdict::Waiting { pending: true } => {
                let since = *pending_since.get_or_insert(now);
                if explained.is_none_or(|at| now - at >= EXPLAIN) {
                    explained = Some(now);
                    let request = ExplainRequest {
                        service: name.to_owned(),
                        task: String::new(),
                    };
                    let answer = connection
                        .ask(&place, async |mut c| c.explain(request.clone()).await)
                        .await?;
                    if !answer.ever && now - since >= limits::UNPLACEABLE_WAIT {
                        progress.note(explain::grid(&answer).trim_end());
                        return Err(unplaceable(name, &answer));
                    }
                    if answer.ever {
                        pending_since = None;
                    }
                }
            }
        }
        tokio::time::sleep(wait::POLL).await;
    }
}

fn unplaceable(name: &str, answer: &ExplainResponse) -> Refusal {
    let reason = format!(
        "no node can ever take it as things stand ({} nodes looked at)",
        answer.nodes.len()
    );
    let fix = match answer.nearest_fix.as_str() {
        "" => String::new(),
        fix => format!("nearest fix: {fix}; "),
    };
    let help = format!(
        "{fix}the service stays and starts when a node fits; 'bulkhead service rm {name}' removes it"
    );
    Refusal::new(Code::Unplaceable, format!("service {name}"), reason, help)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::wire::{Service, ServiceVersion, TaskStatus, UpdatePolicy, UpdateStatus};

    const MONITOR: Duration = Duration::from_secs(5);

    fn spec(image: &str, replicas: u32) -> ServiceSpec {
        ServiceSpec {
            name: "web".into(),
            image_name: image.into(),
            replicas,
            update: Some(UpdatePolicy {
                parallelism: 1,
                monitor_ms: 5_000,
            }),
            ..Default::default()
        }
    }

    fn service(spec: ServiceSpec, update: UpdateState) -> ServiceSummary {
        ServiceSummary {
            service: Some(Service {
                versions: vec![ServiceVersion {
                    number: 1,
                    spec: Some(spec),
                    created_at: 0,
                }],
                update: Some(UpdateStatus {
                    state: update.into(),
                    message: "web.1 failed".into(),
                    since: 0,
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn task(slot: u32, attempt: u32, state: TaskState, image: &str) -> TaskSummary {
        TaskSummary {
            task: Some(Task {
                id: vec![u8::try_from(slot * 10 + attempt).expect("small")],
                slot,
                attempt,
                desired: DesiredState::Running.into(),
                status: Some(TaskStatus {
                    state: state.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            node_name: if state > TaskState::Pending {
                "w1".into()
            } else {
                String::new()
            },
            spec: Some(spec(image, 9)),
            ..Default::default()
        }
    }

    fn after(summary: &ServiceSummary, tasks: &[TaskSummary], waited: Duration) -> Verdict {
        let (mut seen, start) = (Seen::new(), Instant::now());
        judge(summary, tasks, &mut seen, start);
        judge(summary, tasks, &mut seen, start + waited).verdict
    }

    #[tokio::test]
    async fn a_service_converged_when_all_replicas_stayed_up() {
        use TaskState::{Failed, Pending, Running, Starting};
        let two = service(spec("a", 2), UpdateState::Unspecified);
        let waiting = |pending| Verdict::Waiting { pending };
        let cases = [
            (
                "both stayed",
                vec![task(1, 1, Running, "a"), task(2, 1, Running, "a")],
                MONITOR,
                Verdict::Converged,
            ),
            (
                "too early",
                vec![task(1, 1, Running, "a"), task(2, 1, Running, "a")],
                MONITOR - Duration::from_millis(1),
                waiting(false),
            ),
            (
                "one is missing",
                vec![task(1, 1, Running, "a")],
                MONITOR,
                waiting(false),
            ),
            (
                "one starts",
                vec![task(1, 1, Running, "a"), task(2, 1, Starting, "a")],
                MONITOR,
                waiting(false),
            ),
            (
                "one has no node",
                vec![task(1, 1, Running, "a"), task(2, 1, Pending, "a")],
                MONITOR,
                waiting(true),
            ),
            (
                "the newest attempt counts",
                vec![
                    task(1, 1, Running, "a"),
                    task(2, 1, Failed, "a"),
                    task(2, 2, Running, "a"),
                ],
                MONITOR,
                Verdict::Converged,
            ),
            (
                "an old one still runs",
                vec![task(1, 1, Running, "a"), task(2, 1, Running, "old")],
                MONITOR,
                waiting(false),
            ),
            (
                "one too many",
                vec![
                    task(1, 1, Running, "a"),
                    task(2, 1, Running, "a"),
                    task(3, 1, Running, "a"),
                ],
                MONITOR,
                waiting(false),
            ),
        ];
        for (name, tasks, waited, want) in cases {
            assert_eq!(after(&two, &tasks, waited), want, "{name}");
        }
        let none = service(spec("a", 0), UpdateState::Unspecified);
        assert_eq!(after(&none, &[], Duration::ZERO), Verdict::Converged);
    }

    #[tokio::test]
    async fn an_update_that_stopped_is_no_convergence() {
        let up = [task(1, 1, TaskState::Running, "a")];
        let paused = service(spec("a", 1), UpdateState::Paused);
        assert_eq!(
            after(&paused, &up, MONITOR),
            Verdict::Paused("web.1 failed".into())
        );
        let updating = service(spec("a", 1), UpdateState::Updating);
        assert_eq!(
            after(&updating, &up, MONITOR),
            Verdict::Waiting { pending: false }
        );
    }

    #[test]
    fn a_line_says_state_node_and_reason() {
        let two = service(spec("a", 2), UpdateState::Unspecified);
        let mut failed = task(2, 3, TaskState::Failed, "a");
        if let Some(status) = failed.task.as_mut().and_then(|t| t.status.as_mut()) {
            status.exit_code = Some(1);
        }
        let look = judge(
            &two,
            &[task(1, 1, TaskState::Running, "a"), failed],
            &mut Seen::new(),
            Instant::now(),
        );
        assert_eq!(
            look.lines,
            [
                (1, "running on w1, watched".to_owned()),
                (2, "failed on w1: exit code 1".to_owned())
            ]
        );
    }
}
