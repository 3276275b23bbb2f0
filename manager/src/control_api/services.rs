//! Services: what an operator asks for becomes a spec with nothing left to resolve, and a new version of the service.

use bulkhead_proto::wire::{
    Availability, CreateServiceRequest, DesiredState, Image, Node, RemoveRequest, Service, ServiceSpec,
    ServiceSummary, Task, TaskState, UpdateServiceRequest,
};
use bulkhead_proto::{Code, ServiceId};
use bulkhead_raft::state::{Key, State};
use tonic::Status;

use super::change::{Decision, Plan, new_id, overtaken};
use super::object::{Kept, SECRETS, SERVICES, get, label, newest};
use super::{check, images};
use crate::orchestrator::revision;
use crate::refusal::refuse;

/// A new service.
pub(super) fn create(state: &State, request: &CreateServiceRequest, now_ms: i64) -> Result<Decision, Status> {
    let id = new_id(&request.service_id)?;
    if let Some(made) = get::<Service>(state, &id).filter(|it| it.was_made_by(&request.request_id)) {
        return Ok(Decision::done(made));
    }
    let spec = resolve(state, request.spec.as_ref(), None)?;
    let service = revision::create(ServiceId::from_bytes(id), spec, now_ms);
    Ok(Plan::about(&id).create(service).into())
}

/// A new spec for a service.
pub(super) fn update(state: &State, request: &UpdateServiceRequest, now_ms: i64) -> Result<Decision, Status> {
    let service = SERVICES.find(state, &request.selector)?;
    if service.was_made_by(&request.request_id) {
        return Ok(Decision::done(service));
    }
    if request.version != service.version() {
        return Err(overtaken(&format!("service {}", label(service))));
    }
    let spec = resolve(state, request.spec.as_ref(), newest(service))?;
    let new = revision::revise(service, spec, now_ms).map_err(|error| {
        refuse(
            Code::Invalid,
            tonic::Code::FailedPrecondition,
            error.to_string(),
            format!("`bulkhead service ps {}` shows its tasks", service.name()),
        )
    })?;
    if new == *service {
        return Ok(Decision::done(service));
    }
    Ok(Plan::about(&service.id)
        .unless_changed(service)
        .replace(new)
        .into())
}

/// Asks a service to go: the leader stops its tasks and then deletes it.
pub(super) fn remove(state: &State, request: &RemoveRequest) -> Result<Decision, Status> {
    let service = SERVICES.find(state, &request.selector)?;
    if service.removing {
        return Ok(Decision::done(service));
    }
    let new = revision::remove(service);
    Ok(Plan::about(&service.id)
        .unless_changed(service)
        .replace(new)
        .into())
}

/// The spec with its image and secrets pinned. `current` is the service's own spec: what it says of an image stays
/// pinned where the request repeats it.
fn resolve(
    state: &State,
    asked: Option<&ServiceSpec>,
    current: Option<&ServiceSpec>,
) -> Result<ServiceSpec, Status> {
    let Some(asked) = asked else {
        return Err(check::invalid("spec", "it is missing"));
    };
    check::spec(asked)?;
    let mut spec = asked.clone();
    let pinned = current.filter(|it| it.image_name == spec.image_name && it.image_id == spec.image_id);
    let image = match pinned.and_then(|it| get::<Image>(state, &it.image_id)) {
        Some(image) => image,
        None => {
            images::find(state, &spec.image_name).map_err(|status| missing("image", "image load", &status))?
        }
    };
    spec.image_id.clone_from(&image.id);
    spec.image_digest.clone_from(&image.manifest_digest);
    for secret in &mut spec.secrets {
        if secret.secret_id.is_empty() {
            let found = SECRETS.find(state, &secret.name);
            let found = found.map_err(|status| missing("secret", "secret create", &status))?;
            secret.secret_id.clone_from(&found.id);
            // An id or its start finds the secret too; in the task it has its name.
            secret.name.clone_from(&found.name);
        }
    }
    check::spec(&spec)?;
    Ok(spec)
}

/// What a spec refers to is not there: another refusal than that the service itself is not.
fn missing(noun: &str, make: &str, status: &Status) -> Status {
    if status.code() != tonic::Code::NotFound {
        return status.clone();
    }
    refuse(
        Code::UnknownReference,
        tonic::Code::FailedPrecondition,
        format!(
            "the service refers to what is not in the cluster: {}",
            status.message()
        ),
        format!("make the {noun} first with `bulkhead {make}`, or correct its name"),
    )
}

/// A service as lists show it.
pub(super) fn summary(state: &State, service: &Service) -> ServiceSummary {
    let tasks = service.id().try_into().map(|id| Key::new(Service::KIND, id));
    let tasks = tasks.into_iter().flat_map(|key| state.referrers(key, Task::KIND));
    let running: Vec<&Task> = tasks
        .filter_map(|it| Task::of(it))
        .filter(|it| is_running(it))
        .collect();
    let spec = newest(service);
    let mut urls: Vec<String> = running
        .iter()
        .filter_map(|task| address(get::<Node>(state, &task.node_id)?))
        .flat_map(|address| {
            let ports = spec.into_iter().flat_map(|spec| &spec.ports);
            ports.map(move |port| format!("http://{address}:{}", port.host))
        })
        .collect();
    urls.sort_unstable();
    urls.dedup();
    ServiceSummary {
        running: u32::try_from(running.len()).unwrap_or(u32::MAX),
        desired: spec.filter(|_| !service.removing).map_or(0, |spec| spec.replicas),
        urls,
        service: Some(service.clone()),
    }
}

fn is_running(task: &Task) -> bool {
    let running = task
        .status
        .as_ref()
        .is_some_and(|it| it.state() == TaskState::Running);
    running && task.desired() == DesiredState::Running
}

/// The host part of where a worker's published ports are reached.
fn address(node: &Node) -> Option<String> {
    let said = node.description.as_ref().map(|it| it.publish_address.as_str());
    let address = said.filter(|it| !it.is_empty()).unwrap_or(&node.address);
    let host = match address.parse::<std::net::SocketAddr>() {
        Ok(address) => address.ip().to_string(),
        Err(_) => address.to_owned(),
    };
    match host.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V6(ip)) => Some(format!("[{ip}]")),
        _ if host.is_empty() || node.availability() == Availability::Unspecified => None,
        _ => Some(host),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::{PublishedPort, Role, SecretReference, TaskStatus};

    use super::super::testing::{applied, image, node, plan, refused, secret, service, state, task};
    use super::*;

    fn spec() -> ServiceSpec {
        ServiceSpec {
            name: "shop".into(),
            replicas: 2,
            image_name: "web:1".into(),
            secrets: vec![SecretReference {
                name: "db".into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn creation(spec: ServiceSpec) -> CreateServiceRequest {
        CreateServiceRequest {
            request_id: vec![5; 16],
            service_id: vec![9; 16],
            spec: Some(spec),
        }
    }

    fn update_of(state: &State, spec: ServiceSpec, request: u8) -> UpdateServiceRequest {
        UpdateServiceRequest {
            request_id: vec![request; 16],
            selector: "shop".into(),
            spec: Some(spec),
            version: SERVICES.find(state, "shop").expect("there").version(),
        }
    }

    #[test]
    fn a_spec_is_pinned_and_a_retry_is_done() {
        let mut state = state([image(1, "web:1"), secret(2, "db")]);
        let request = creation(spec());
        let decided = plan(create(&state, &request, 7).expect("planned"));
        applied(&mut state, &request.request_id, decided);
        let made = SERVICES.find(&state, "shop").expect("there").clone();
        let kept = newest(&made).expect("a spec");
        assert_eq!(
            (&kept.image_id[..], &kept.image_digest[..]),
            (&[1; 16][..], &[1; 32][..])
        );
        assert_eq!(kept.secrets[0].secret_id, [2; 16]);
        let again = create(&state, &request, 8).expect("a retry");
        assert!(matches!(again, Decision::Done { version, .. } if version == made.version()));
    }

    #[test]
    fn a_scale_adds_no_version_and_another_image_does() {
        let mut state = state([image(1, "web:1"), image(3, "web:2"), secret(2, "db")]);
        let decided = plan(create(&state, &creation(spec()), 7).expect("planned"));
        applied(&mut state, &[5; 16], decided);
        let kept = newest(SERVICES.find(&state, "shop").expect("there"))
            .expect("a spec")
            .clone();

        let mut scaled = kept.clone();
        scaled.replicas = 5;
        let request = update_of(&state, scaled, 6);
        let decided = plan(update(&state, &request, 8).expect("planned"));
        applied(&mut state, &request.request_id, decided);
        assert_eq!(SERVICES.find(&state, "shop").expect("there").versions.len(), 1);

        let mut moved = kept.clone();
        moved.image_name = "web:2".into();
        let request = update_of(&state, moved, 7);
        let decided = plan(update(&state, &request, 9).expect("planned"));
        applied(&mut state, &request.request_id, decided);
        let now = SERVICES.find(&state, "shop").expect("there");
        assert_eq!(
            (now.versions.len(), &newest(now).expect("a spec").image_id[..]),
            (2, &[3; 16][..])
        );

        let mut stale = update_of(&state, kept, 8);
        stale.version -= 1;
        let status = update(&state, &stale, 9).expect_err("overtaken");
        refused(&status, Code::Conflict, "service shop", "look at it again");
    }

    #[test]
    fn what_a_spec_refers_to_must_be_there() {
        let state = state([image(1, "web:1"), secret(2, "db")]);
        let check = |edit: fn(&mut ServiceSpec), code, message: &str, hint: &str| {
            let mut spec = spec();
            edit(&mut spec);
            let status = create(&state, &creation(spec), 7).expect_err(message);
            refused(&status, code, message, hint);
        };
        check(
            |it| it.image_name = "web:9".into(),
            Code::UnknownReference,
            "no image 'web:9'",
            "image load",
        );
        check(
            |it| it.secrets[0].name = "nope".into(),
            Code::UnknownReference,
            "no secret 'nope'",
            "secret create",
        );
        let request = CreateServiceRequest {
            spec: None,
            ..creation(spec())
        };
        refused(
            &create(&state, &request, 7).expect_err("none"),
            Code::BadField,
            "spec: it is missing",
            "",
        );
    }

    #[test]
    fn a_removal_marks_and_a_second_one_is_done() {
        let mut state = state([
            image(1, "web:1"),
            service(9, "shop", 2, |spec| spec.image_id = vec![1; 16]),
        ]);
        let request = RemoveRequest {
            selector: "shop".into(),
            ..Default::default()
        };
        let decided = plan(remove(&state, &request).expect("planned"));
        applied(&mut state, &[4; 16], decided);
        let marked = SERVICES.find(&state, "shop").expect("still there");
        assert!(marked.removing);
        assert_eq!(summary(&state, marked).desired, 0);
        assert!(matches!(remove(&state, &request), Ok(Decision::Done { .. })));
    }

    #[test]
    fn urls_are_those_of_nodes_that_run_a_replica() {
        let mut here = node(4, "here", Role::Worker);
        let mut six = node(5, "six", Role::Worker);
        for (object, address) in [(&mut here, "127.77.0.4:555"), (&mut six, "::1")] {
            if let Some(bulkhead_proto::wire::object::Object::Node(node)) = &mut object.object {
                node.address = address.into();
                node.set_availability(Availability::Active);
            }
        }
        let running = |id: u8, node: u8, run: TaskState| {
            task(id, 9, |task| {
                task.node_id = vec![node; 16];
                task.set_desired(DesiredState::Running);
                task.status = Some(TaskStatus {
                    state: run.into(),
                    ..Default::default()
                });
            })
        };
        let state = state([
            here,
            six,
            image(1, "web:1"),
            service(9, "shop", 3, |spec| {
                spec.image_id = vec![1; 16];
                spec.ports = vec![PublishedPort {
                    host: 8080,
                    target: 80,
                }];
            }),
            running(20, 4, TaskState::Running),
            running(21, 4, TaskState::Running),
            running(22, 5, TaskState::Running),
            running(23, 5, TaskState::Starting),
        ]);
        let summary = summary(&state, SERVICES.find(&state, "shop").expect("there"));
        assert_eq!((summary.running, summary.desired), (3, 3));
        assert_eq!(summary.urls, ["http://127.77.0.4:8080", "http://[::1]:8080"]);
    }
}
