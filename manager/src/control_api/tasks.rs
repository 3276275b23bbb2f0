//! Tasks with the names of what they belong to, and why one has no node.

use bulkhead_proto::wire::{
    DesiredState, ExplainRequest, ExplainResponse, Image, ListTasksRequest, Node, NodeVerdict,
    Refusal as Reason, Service, ServiceSpec, Task, TaskState, TaskSummary,
};
use bulkhead_raft::state::State;
use tonic::Status;

use super::check;
use super::object::{Kept, NODES, SERVICES, TASKS, get, label, newest, page};
use crate::scheduler::{self, Refusal, Request, View};

/// One page of the tasks that a request asks for.
pub(super) fn list(state: &State, request: &ListTasksRequest) -> Result<(Vec<TaskSummary>, Vec<u8>), Status> {
    if !request.selector.is_empty() {
        let task = TASKS.find(state, &request.selector)?;
        return Ok((vec![summary(state, task)], Vec::new()));
    }
    let service = optional(&request.service, |it| {
        SERVICES.find(state, it).map(|it| it.id.clone())
    })?;
    let node = optional(&request.node, |it| NODES.find(state, it).map(|it| it.id.clone()))?;
    let tasks = TASKS
        .all(state)
        .filter(|task| service.as_ref().is_none_or(|id| task.service_id == *id))
        .filter(|task| node.as_ref().is_none_or(|id| task.node_id == *id))
        .filter(|task| request.all || is_current(task));
    Ok(page(tasks, &request.after, |task| summary(state, task)))
}

fn optional<T>(selector: &str, find: impl FnOnce(&str) -> Result<T, Status>) -> Result<Option<T>, Status> {
    if selector.is_empty() {
        Ok(None)
    } else {
        find(selector).map(Some)
    }
}

/// What should run, and what still does.
fn is_current(task: &Task) -> bool {
    let ended = task
        .status
        .as_ref()
        .is_some_and(|it| it.state >= TaskState::Complete.into());
    task.desired() <= DesiredState::Running || !ended
}

fn summary(state: &State, task: &Task) -> TaskSummary {
    let service = get::<Service>(state, &task.service_id);
    let spec = service.and_then(|it| spec_of(it, task.spec_version));
    let image = spec.and_then(|spec| get::<Image>(state, &spec.image_id));
    TaskSummary {
        service_name: service.map_or_else(String::new, |it| it.name().to_owned()),
        node_name: get::<Node>(state, &task.node_id).map_or_else(String::new, |it| it.name.clone()),
        image_name: image.map_or_else(String::new, |it| it.name.clone()),
        spec: spec.cloned(),
        task: Some(task.clone()),
    }
}

fn spec_of(service: &Service, number: u64) -> Option<&ServiceSpec> {
    service
        .versions
        .iter()
        .find(|it| it.number == number)?
        .spec
        .as_ref()
}

/// Which nodes could take one more task, and what stands against the others.
pub(super) fn explain(state: &State, request: &ExplainRequest) -> Result<ExplainResponse, Status> {
    let (service, spec, subject) = match (request.service.as_str(), request.task.as_str()) {
        (name, "") if !name.is_empty() => {
            let service = SERVICES.find(state, name)?;
            (service, newest(service), format!("service {}", service.name()))
        }
        ("", id) if !id.is_empty() => {
            let task = TASKS.find(state, id)?;
            let service = SERVICES.find(state, &super::object::id_text(&task.service_id))?;
            let spec = spec_of(service, task.spec_version);
            (
                service,
                spec,
                format!("task {} of service {}", label(task), service.name()),
            )
        }
        _ => return Err(check::invalid("service, task", "name one of them")),
    };
    let Some(spec) = spec else {
        return Err(check::invalid("task", "the spec that it was made from is gone"));
    };
    let explanation = scheduler::explain(&View::of(state), &Request::new(&service.id, spec));
    let mut nodes: Vec<NodeVerdict> = Vec::new();
    for (reasons, names) in &explanation.groups {
        nodes.extend(names.iter().map(|name| {
            NodeVerdict {
                node_id: state
                    .by_name(Node::KIND, name)
                    .and_then(|it| Node::of(it))
                    .map_or_else(Vec::new, |it| it.id.clone()),
                node_name: name.clone(),
                refusals: reasons.iter().map(|it| reason(it, name)).collect(),
            }
        }));
    }
    let waits = |task: &&Task| {
        task.service_id == service.id && task.node_id.is_empty() && task.desired() <= DesiredState::Running
    };
    let waiting = TASKS.all(state).filter(waits);
    let (pending, _) = page(waiting, &[], |task| TaskSummary {
        spec: None,
        ..summary(state, task)
    });
    Ok(ExplainResponse {
        index: state.index(),
        placeable: nodes.iter().any(|it| it.refusals.is_empty()),
        nodes,
        nearest_fix: explanation.nearest_fix.unwrap_or_default(),
        ever: explanation.ever,
        subject,
        pending,
    })
}

fn reason(refusal: &Refusal, node: &str) -> Reason {
    let (filter, fix) = match refusal {
        Refusal::NotReady => ("ready", format!("start the worker on {node}")),
        Refusal::Paused | Refusal::Draining => ("availability", format!("bulkhead node activate {node}")),
        Refusal::Cpu { free_millis, .. } => ("cpu", format!("--reserve-cpu {free_millis}m or less")),
        Refusal::Memory { free_bytes, .. } => (
            "memory",
            format!("--reserve-memory {}MiB or less", free_bytes >> 20),
        ),
        Refusal::Constraint(_) => (
            "constraint",
            "change the --constraint or the node's labels".to_owned(),
        ),
        Refusal::SelfReported(_) => ("constraint", "use node.id or node.labels".to_owned()),
        Refusal::HostPort(_) => ("port", "publish another host port".to_owned()),
    };
    Reason {
        filter: filter.to_owned(),
        reason: refusal.to_string(),
        fix,
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::Code;
    use bulkhead_proto::wire::{Availability, NodeDescription, NodeStatus, Resources, Role, TaskStatus};

    use super::super::testing::{image, node, refused, service, state, task};
    use super::*;

    fn world() -> State {
        let mut worker = node(4, "here", Role::Worker);
        if let Some(bulkhead_proto::wire::object::Object::Node(it)) = &mut worker.object {
            it.set_status(NodeStatus::Ready);
            it.set_availability(Availability::Active);
            it.description = Some(NodeDescription {
                cpu_millis: 2_000,
                memory_bytes: 1 << 30,
                ..Default::default()
            });
        }
        let of = |id: u8, state: TaskState, desired: DesiredState, node: Option<u8>| {
            task(id, 9, |task| {
                task.spec_version = 1;
                task.set_desired(desired);
                task.node_id = node.map_or_else(Vec::new, |it| vec![it; 16]);
                task.status = Some(TaskStatus {
                    state: state.into(),
                    ..Default::default()
                });
            })
        };
        state([
            worker,
            image(1, "web:1"),
            service(9, "shop", 3, |spec| {
                spec.image_id = vec![1; 16];
                spec.reservation = Some(Resources {
                    memory_bytes: 900 << 30,
                    ..Default::default()
                });
            }),
            of(20, TaskState::Running, DesiredState::Running, Some(4)),
            of(21, TaskState::Failed, DesiredState::Shutdown, Some(4)),
            of(22, TaskState::Pending, DesiredState::Running, None),
        ])
    }

    #[test]
    fn tasks_carry_names_and_ended_ones_are_for_those_who_ask() {
        let state = world();
        let ask = |service: &str, node: &str, all| ListTasksRequest {
            service: service.into(),
            node: node.into(),
            all,
            ..Default::default()
        };
        let ids = |request: &ListTasksRequest| -> Vec<u8> {
            let (tasks, _) = list(&state, request).expect("listed");
            tasks
                .iter()
                .map(|it| it.task.as_ref().expect("a task").id[0])
                .collect()
        };
        assert_eq!(ids(&ask("", "", false)), [20, 22]);
        assert_eq!(ids(&ask("shop", "", true)), [20, 21, 22]);
        assert_eq!(ids(&ask("shop", "here", false)), [20]);
        let (tasks, _) = list(&state, &ask("", "", false)).expect("listed");
        assert_eq!(
            (
                &tasks[0].service_name[..],
                &tasks[0].node_name[..],
                &tasks[0].image_name[..]
            ),
            ("shop", "here", "web:1")
        );
        assert!(list(&state, &ask("nope", "", false)).is_err());
    }

    #[test]
    fn what_cannot_be_placed_says_which_node_refuses_and_how_to_fix_it() {
        let state = world();
        let answer = explain(
            &state,
            &ExplainRequest {
                service: "shop".into(),
                task: String::new(),
            },
        )
        .expect("explained");
        assert!(!answer.placeable && !answer.ever);
        assert_eq!((answer.nodes.len(), answer.pending.len()), (1, 1));
        let verdict = &answer.nodes[0];
        assert_eq!(
            (&verdict.node_name[..], &verdict.node_id[..]),
            ("here", &[4; 16][..])
        );
        assert_eq!(verdict.refusals[0].filter, "memory");
        assert!(verdict.refusals[0].fix.contains("--reserve-memory"));
        for (service, task) in [("", ""), ("shop", "x")] {
            let request = ExplainRequest {
                service: service.into(),
                task: task.into(),
            };
            refused(
                &explain(&state, &request).expect_err("one"),
                Code::BadField,
                "name one of them",
                "",
            );
        }
    }
}
