//! `task`: the attempts to fill the slots of services.

use bulkhead_proto::wire::{DesiredState, ListTasksRequest, TaskState, TaskStatus, TaskSummary};
use clap::Subcommand;
use serde_json::{Value, json};

use crate::app::App;
use crate::connection::{absent, pages};
use crate::explain;
use crate::output::{Filters, Listing, Row, text};
use crate::refusal::{Exit, Refusal};
use crate::service::spec_json;

/// What can be done with tasks.
#[derive(Debug, Subcommand)]
pub(crate) enum TaskVerb {
    /// Lists the tasks
    #[command(visible_alias = "list")]
    Ls {
        /// Ended ones, too
        #[arg(short, long)]
        all: bool,
        /// Only those of this service
        #[arg(long)]
        service: Option<String>,
        /// Only those of this node
        #[arg(long)]
        node: Option<String>,
        #[command(flatten)]
        filters: Filters,
    },
    /// Shows tasks whole
    Inspect {
        /// Ids or unique prefixes of ids
        #[arg(required = true, value_name = "TASK")]
        tasks: Vec<String>,
    },
    /// Says why a task is where it is, or nowhere
    Explain {
        /// Id or unique prefix of an id
        task: String,
    },
}

pub(crate) async fn run(verb: TaskVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        TaskVerb::Ls {
            all,
            service,
            node,
            filters,
        } => {
            let request = ListTasksRequest {
                service: service.unwrap_or_default(),
                node: node.unwrap_or_default(),
                all,
                ..Default::default()
            };
            let mut connection = app.connect()?;
            let tasks = pages!(connection, "tasks", list_tasks, request, tasks);
            let listing = listing(app, &tasks);
            app.list(listing, &filters)?;
        }
        TaskVerb::Inspect { tasks } => {
            let mut connection = app.connect()?;
            let mut found = Vec::new();
            for selector in tasks {
                let place = format!("task {selector}");
                let request = ListTasksRequest {
                    selector,
                    all: true,
                    ..Default::default()
                };
                let tasks = pages!(connection, &place, list_tasks, request, tasks);
                found.push(json(tasks.first().ok_or_else(|| absent(&place, "task"))?));
            }
            app.inspect(&found)?;
        }
        TaskVerb::Explain { task } => explain::run(app, String::new(), task).await?,
    }
    Ok(Exit::Done)
}

/// Tasks as a list, the newest attempt of each slot first.
pub(crate) fn listing(app: &App<'_>, tasks: &[TaskSummary]) -> Listing {
    let mut sorted: Vec<&TaskSummary> = tasks.iter().collect();
    sorted.sort_by_key(|t| {
        let task = t.task.as_ref();
        (
            t.service_name.clone(),
            task.map_or(0, |t| t.slot),
            std::cmp::Reverse(task.map_or(0, |t| t.attempt)),
        )
    });
    let now = text::now_ms();
    let resolve = !app.global.no_resolve;
    let row = |summary: &&TaskSummary| {
        let json = json(summary);
        let task = summary.task.clone().unwrap_or_default();
        let id = text::id(&task.id);
        let node = if resolve && !summary.node_name.is_empty() {
            summary.node_name.clone()
        } else {
            app.id_cell(&text::id(&task.node_id))
        };
        let since = task.status.as_ref().map_or(0, |s| s.at);
        Row {
            cells: vec![
                app.id_cell(&id),
                title(summary),
                summary.image_name.clone(),
                node,
                desired(task.desired()).into(),
                format!("{} {}", state(task.status.as_ref()), text::distance(since, now)),
                reason(summary),
            ],
            id,
            json,
        }
    };
    Listing {
        headers: &["ID", "NAME", "IMAGE", "NODE", "DESIRED", "STATE", "REASON"],
        keys: &["id", "name", "service", "node", "state", "desired"],
        rows: sorted.iter().map(row).collect(),
    }
}

/// What a person calls a task: its service and slot.
pub(crate) fn title(summary: &TaskSummary) -> String {
    format!(
        "{}.{}",
        summary.service_name,
        summary.task.as_ref().map_or(0, |t| t.slot)
    )
}

/// A state's word.
pub(crate) fn state(status: Option<&TaskStatus>) -> &'static str {
    match status.map(TaskStatus::state).unwrap_or_default() {
        TaskState::Unspecified | TaskState::Pending => "pending",
        TaskState::Assigned => "assigned",
        TaskState::Preparing => "preparing",
        TaskState::Starting => "starting",
        TaskState::Running => "running",
        TaskState::Complete => "complete",
        TaskState::Shutdown => "shutdown",
        TaskState::Failed => "failed",
        TaskState::Rejected => "rejected",
        TaskState::Lost => "lost",
    }
}

fn desired(desired: DesiredState) -> &'static str {
    match desired {
        DesiredState::Unspecified => "-",
        DesiredState::Ready => "ready",
        DesiredState::Running => "running",
        DesiredState::Shutdown => "shutdown",
        DesiredState::Remove => "remove",
    }
}

/// Why a task is in its state: why no node fits, or how it ended.
pub(crate) fn reason(summary: &TaskSummary) -> String {
    let Some(task) = &summary.task else {
        return String::new();
    };
    let status = task.status.clone().unwrap_or_default();
    if status.state() <= TaskState::Pending {
        return task.refusals.join("; ");
    }
    let mut parts = Vec::new();
    if status.out_of_memory {
        parts.push("out of memory: raise --limit-memory".to_owned());
    } else if let Some(signal) = status.signal {
        parts.push(format!("ended by signal {signal}"));
    } else if let Some(code) = status.exit_code.filter(|_| status.state() >= TaskState::Complete) {
        parts.push(format!("exit code {code}"));
    }
    if !status.message.is_empty() {
        parts.push(status.message);
    }
    parts.join("; ")
}

/// A task as scripts read it.
pub(crate) fn json(summary: &TaskSummary) -> Value {
    let task = summary.task.clone().unwrap_or_default();
    let status = task.status.clone().unwrap_or_default();
    let profile: Value = serde_json::from_slice(&status.profile).unwrap_or(Value::Null);
    json!({
        "id": text::id(&task.id),
        "name": title(summary),
        "service": summary.service_name,
        "service_id": text::id(&task.service_id),
        "slot": task.slot,
        "attempt": task.attempt,
        "spec_version": task.spec_version,
        "node": summary.node_name,
        "node_id": text::id(&task.node_id),
        "image": summary.image_name,
        "desired": desired(task.desired()),
        "desired_since": text::time(task.desired_since),
        "state": state(Some(&status)),
        "since": text::time(status.at),
        "reason": reason(summary),
        "message": status.message,
        "refusals": task.refusals,
        "exit_code": status.exit_code,
        "signal": status.signal,
        "out_of_memory": status.out_of_memory,
        "pid": (status.pid != 0).then_some(status.pid),
        "fence": task.fence,
        "start_after": text::time(task.start_after),
        "created_at": text::time(task.meta.as_ref().map_or(0, |m| m.created_at)),
        "spec": summary.spec.as_ref().map(spec_json),
        "sandbox": profile,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::wire::Task;

    fn summary(status: TaskStatus, refusals: &[&str]) -> TaskSummary {
        TaskSummary {
            task: Some(Task {
                slot: 2,
                status: Some(status),
                refusals: refusals.iter().map(|r| (*r).to_owned()).collect(),
                ..Default::default()
            }),
            service_name: "web".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_reason_is_what_helps_in_that_state() {
        let status = |state: TaskState| TaskStatus {
            state: state.into(),
            ..Default::default()
        };
        let cases = [
            (
                summary(status(TaskState::Pending), &["w1: paused", "w2: down"]),
                "w1: paused; w2: down",
            ),
            (summary(status(TaskState::Running), &["old"]), ""),
            (
                summary(
                    TaskStatus {
                        exit_code: Some(3),
                        message: "panicked".into(),
                        ..status(TaskState::Failed)
                    },
                    &[],
                ),
                "exit code 3; panicked",
            ),
            (
                summary(
                    TaskStatus {
                        signal: Some(9),
                        out_of_memory: true,
                        ..status(TaskState::Failed)
                    },
                    &[],
                ),
                "out of memory: raise --limit-memory",
            ),
        ];
        for (task, want) in cases {
            assert_eq!(reason(&task), want);
            assert_eq!(title(&task), "web.2");
        }
    }
}
