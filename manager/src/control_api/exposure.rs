//! Which nodes hold which secrets, and by which rule: a node is sent a secret when a task of a service that uses it is
//! assigned to that node, and forgets it when the task is over. Managers hold all of them, sealed.

use bulkhead_proto::wire::{ExposedSecret, Exposure, GetExposureRequest, Node, Secret, Service, Task};
use bulkhead_raft::state::State;
use tonic::Status;

use super::check;
use super::object::{Kept, NODES, SECRETS, TASKS, get, newest};
use crate::dispatcher::assignments::may_still_run;
use crate::view;

/// As far as tasks are kept: a service's history bounds how far back it goes.
pub(super) fn exposure(state: &State, request: &GetExposureRequest) -> Result<Exposure, Status> {
    let secret = match request.secret.as_str() {
        "" => None,
        selector => Some(SECRETS.find(state, selector)?.id.clone()),
    };
    let node = match request.node.as_str() {
        "" => None,
        selector => Some(NODES.find(state, selector)?.id.clone()),
    };
    if secret.is_none() && node.is_none() {
        return Err(check::invalid("secret", "name a secret or a node"));
    }
    let mut secrets: Vec<ExposedSecret> = TASKS
        .all(state)
        .filter(|task| !task.node_id.is_empty() && node.as_ref().is_none_or(|node| *node == task.node_id))
        .flat_map(|task| of_task(state, task))
        .filter(|it| secret.as_ref().is_none_or(|secret| *secret == it.secret_id))
        .collect();
    secrets.sort_by_key(|it| {
        (
            it.until != 0,
            it.secret_name.clone(),
            it.node_name.clone(),
            it.since,
        )
    });
    Ok(Exposure {
        index: state.index(),
        secrets,
    })
}

fn of_task<'a>(state: &'a State, task: &'a Task) -> impl Iterator<Item = ExposedSecret> + 'a {
    let used = view::spec_of(state, task);
    let secrets = used.map_or(&[][..], |(_, spec)| &spec.secrets);
    let service = used.and_then(|(service, _): (&Service, _)| newest(service));
    let until = match may_still_run(task) {
        true => 0,
        false => task
            .status
            .as_ref()
            .map_or(task.desired_since, |status| status.at),
    };
    secrets.iter().map(move |it| ExposedSecret {
        secret_id: it.secret_id.clone(),
        secret_name: get::<Secret>(state, &it.secret_id).map_or_else(String::new, |it| it.name.clone()),
        node_id: task.node_id.clone(),
        node_name: get::<Node>(state, &task.node_id).map_or_else(String::new, |it| it.name.clone()),
        service_name: service.map_or_else(String::new, |spec| spec.name.clone()),
        task_id: task.id.clone(),
        slot: task.slot,
        since: task.meta().map_or(0, |meta| meta.created_at),
        until,
    })
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::Code;
    use bulkhead_proto::wire::{DesiredState, Role, SecretReference, TaskState, TaskStatus};

    use super::super::testing::{node, refused, secret, service, state, task};
    use super::*;

    fn placed(id: u8, service: u8, slot: u32, node: u8, ended: bool) -> bulkhead_proto::wire::Object {
        task(id, service, |task| {
            task.node_id = vec![node; 16];
            task.slot = slot;
            task.spec_version = 1;
            task.set_desired(match ended {
                true => DesiredState::Shutdown,
                false => DesiredState::Running,
            });
            let mut status = TaskStatus {
                at: 77,
                ..Default::default()
            };
            status.set_state(match ended {
                true => TaskState::Shutdown,
                false => TaskState::Running,
            });
            task.status = Some(status);
        })
    }

    #[test]
    fn a_secret_is_traced_to_the_nodes_of_the_tasks_that_use_it() {
        let uses = |secrets: &'static [u8]| {
            move |spec: &mut bulkhead_proto::wire::ServiceSpec| {
                spec.secrets = secrets
                    .iter()
                    .map(|id| SecretReference {
                        secret_id: vec![*id; 16],
                        ..Default::default()
                    })
                    .collect();
            }
        };
        let state = state([
            node(1, "one", Role::Worker),
            node(2, "two", Role::Worker),
            secret(11, "password"),
            secret(12, "other"),
            service(21, "web", 2, uses(&[11])),
            service(22, "db", 1, uses(&[11, 12])),
            placed(31, 21, 1, 1, false),
            placed(32, 21, 2, 2, true),
            placed(33, 22, 1, 2, false),
            task(34, 22, |task| task.spec_version = 1),
        ]);
        let ask = |secret: &str, node: &str| {
            let request = GetExposureRequest {
                secret: secret.into(),
                node: node.into(),
            };
            let found = exposure(&state, &request).expect("found").secrets;
            found
                .into_iter()
                .map(|it| (it.secret_name, it.node_name, it.service_name, it.slot, it.until))
                .collect::<Vec<_>>()
        };
        let line = |secret: &str, node: &str, service: &str, slot, until| {
            (
                secret.to_owned(),
                node.to_owned(),
                service.to_owned(),
                slot,
                until,
            )
        };
        assert_eq!(
            ask("password", ""),
            [
                line("password", "one", "web", 1, 0),
                line("password", "two", "db", 1, 0),
                line("password", "two", "web", 2, 77),
            ]
        );
        assert_eq!(ask("other", "one"), []);
        assert_eq!(
            ask("", "two"),
            [
                line("other", "two", "db", 1, 0),
                line("password", "two", "db", 1, 0),
                line("password", "two", "web", 2, 77),
            ]
        );
        let nothing = exposure(&state, &GetExposureRequest::default()).expect_err("of nothing");
        refused(&nothing, Code::BadField, "name a secret or a node", "");
    }
}
