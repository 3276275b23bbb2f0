//! Services for the parts that need tasks, and the view of them that an operator has.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bulkhead_proto::wire::{
    Constraint, CreateServiceRequest, DesiredState, Kind, ListTasksRequest, RemoveRequest, Resources,
    ServiceSpec, Task, TaskState, TaskSummary, WatchRequest, WatchResponse, event, object::Object as Any,
};
use tokio::time::{Instant, timeout_at};
use tonic::Streaming;

use bulkhead_lab::client::{Control, new_id, until};

/// Tasks come and go far sooner.
const WAIT: Duration = Duration::from_secs(60);
/// The image of the probe.
pub(super) const IMAGE: &str = "bench:1";

/// A service of the probe, on one node or anywhere.
pub(super) fn service(
    name: &str,
    replicas: u32,
    node: Option<String>,
) -> anyhow::Result<CreateServiceRequest> {
    let constraints = node.into_iter().map(|value| Constraint {
        key: "node.id".to_owned(),
        equal: true,
        value,
    });
    let spec = ServiceSpec {
        name: name.to_owned(),
        replicas,
        image_name: IMAGE.to_owned(),
        constraints: constraints.collect(),
        limit: Some(Resources {
            memory_bytes: 32 << 20,
            ..Resources::default()
        }),
        ..ServiceSpec::default()
    };
    Ok(CreateServiceRequest {
        request_id: new_id()?,
        service_id: new_id()?,
        spec: Some(spec),
    })
}

/// Every task of a service that managers want to run.
pub(super) async fn tasks(control: &mut Control, service: &str) -> anyhow::Result<Vec<Task>> {
    let request = ListTasksRequest {
        service: service.to_owned(),
        ..ListTasksRequest::default()
    };
    let summaries: Vec<TaskSummary> = control.list_tasks(request).await?.into_inner().tasks;
    Ok(summaries.into_iter().filter_map(|it| it.task).collect())
}

/// Removes a service and waits until neither it nor a task of it is left.
pub(super) async fn remove(control: &mut Control, service: &str) -> anyhow::Result<()> {
    let request = RemoveRequest {
        request_id: new_id()?,
        selector: service.to_owned(),
        force: false,
        ..Default::default()
    };
    control.remove_service(request).await?;
    let request = ListTasksRequest {
        service: service.to_owned(),
        all: true,
        ..ListTasksRequest::default()
    };
    until("the service and its tasks are gone", WAIT, async || {
        // While it is there this lists its tasks; without it there is nothing to list.
        control
            .list_tasks(request.clone())
            .await
            .is_err_and(|status| status.code() == tonic::Code::NotFound)
    })
    .await
}

/// The changes of tasks as they are committed.
#[derive(Debug)]
pub(super) struct Watch(Streaming<WatchResponse>);

impl Watch {
    /// From now on.
    pub(super) async fn begin(control: &mut Control) -> anyhow::Result<Self> {
        let request = WatchRequest {
            after: 0,
            kinds: vec![Kind::Task.into()],
            oldest: false,
        };
        let mut stream = control.watch(request).await?.into_inner();
        stream.message().await?.context("the watch ended")?; // says from where: now it stands
        Ok(Self(stream))
    }

    /// Waits until so many different tasks for which `counts` holds were seen to run.
    pub(super) async fn running(
        &mut self,
        count: usize,
        counts: impl Fn(&Task) -> bool,
    ) -> anyhow::Result<()> {
        let end = Instant::now() + WAIT;
        let mut running = std::collections::BTreeSet::new();
        while running.len() < count {
            let message = match timeout_at(end, self.0.message()).await {
                Ok(message) => message?.context("the watch ended")?,
                Err(_) => bail!(
                    "{} of {count} tasks run after {} s",
                    running.len(),
                    WAIT.as_secs()
                ),
            };
            for event in message.events {
                let Some(event::Change::Put(object)) = event.change else {
                    continue;
                };
                if let Some(Any::Task(task)) = object.object
                    && is_running(&task)
                    && counts(&task)
                {
                    running.insert(task.id);
                }
            }
        }
        Ok(())
    }
}

/// Whether it runs, and is meant to.
pub(super) fn is_running(task: &Task) -> bool {
    let state = task.status.as_ref().map(|status| status.state());
    state == Some(TaskState::Running) && task.desired() == DesiredState::Running
}
