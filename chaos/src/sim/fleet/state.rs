//! The objects of a run with workers: what the cluster begins with, what is asked for, and how what runs differs from it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulkhead_identity::Key as PrivateKey;
use bulkhead_identity::seam::Clock;
use bulkhead_manager::ca::genesis::{FirstManager, Wishes, genesis};
use bulkhead_manager::key_ring::{EnvelopeKey, KeyRing};
use bulkhead_manager::orchestrator::{Step as Planned, revision};
use bulkhead_manager::view;
use bulkhead_proto::wire::{
    Availability, Change, Image, ImageConfig, ImageLayer, Kind, Node, NodeStatus, Object, Role, Secret,
    SecretReference, Service, ServiceSpec, Task, TaskState, change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{NodeId, ServiceId};
use bulkhead_raft::state::{Key, State};

use super::FIRST;
use super::worker::Worker;
use crate::image;
use crate::sim::Plan;
use crate::sim::cluster::member;
use crate::sim::dice::Dice;
use crate::sim::rotation::{public, steady};

/// So many services.
pub(super) const SERVICES: usize = 2;
const IMAGE: [u8; 16] = [0xE1; 16];
const SECRET: [u8; 16] = [0xE2; 16];
const PASSWORD: &[u8] = b"the password of every service";

/// The id of a node by its number, as on the network.
pub(super) fn node_id(number: u64) -> NodeId {
    member(number).node
}

fn service_id(number: usize) -> ServiceId {
    let mut id = [0xE3; 16];
    id[15] = u8::try_from(number).unwrap_or(u8::MAX);
    ServiceId::from_bytes(id)
}

/// What a cluster begins with.
pub(super) struct Founded {
    pub(super) all: Planned,
    pub(super) rings: BTreeMap<u64, KeyRing>,
}

/// A cluster as `init` makes it, with all the nodes of the run already admitted, a secret, an image and two services.
pub(super) fn founded(plan: &Plan, clock: &dyn Clock) -> Founded {
    let now_ms = i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX);
    let ring = |number: u64| {
        let entropy = Arc::new(Dice::new(plan.seed, 80 + number));
        let key = EnvelopeKey::generate(&*entropy).expect("dice");
        KeyRing::new(node_id(number), key, entropy)
    };
    let rings: BTreeMap<u64, KeyRing> = (1..=plan.members).map(|number| (number, ring(number))).collect();
    let key = PrivateKey::generate().expect("a key");
    let made = steady(
        || {
            let first = FirstManager {
                node: node_id(1),
                name: "m1".into(),
                advertise: "m1:7443".into(),
                key: public(&key),
                envelope_key: rings[&1].public(),
                description: Default::default(),
            };
            let wishes = Wishes {
                lab: true,
                lock: None,
            };
            genesis(first, None, wishes, now_ms, &Dice::new(plan.seed, 73)).expect("a cluster")
        },
        |made| vec![made.root.as_slice(), made.manager.certificate.as_slice()],
    );
    let mut changes = made.changes;
    let Some(Step::Create(Object {
        object: Some(Any::Cluster(cluster)),
    })) = changes.first_mut().and_then(|it| it.change.as_mut())
    else {
        unreachable!("the cluster comes first")
    };
    for (number, ring) in rings.iter().skip(1) {
        cluster.key_ring = rings[&1]
            .enveloped_for(cluster, node_id(*number), &ring.public())
            .expect("the first opens its own");
    }
    cluster.desired_voters = rings.keys().copied().collect();
    let sealed = rings[&1].seal(cluster, Key::new(Kind::Secret, SECRET), PASSWORD);
    let [layer, ..] = image::blobs();
    let mut objects = vec![
        Any::Secret(Secret {
            id: SECRET.to_vec(),
            name: "password".into(),
            value: Some(sealed.expect("the newest epoch")),
            size: u32::try_from(PASSWORD.len()).unwrap_or(u32::MAX),
            ..Default::default()
        }),
        Any::Image(Image {
            id: IMAGE.to_vec(),
            name: "task:1".into(),
            layers: vec![ImageLayer {
                digest: layer.digest.as_bytes().to_vec(),
                size: layer.content.len() as u64,
                media_type: "application/vnd.oci.image.layer.v1.tar".into(),
                diff_id: layer.digest.as_bytes().to_vec(),
            }],
            config: Some(ImageConfig {
                entrypoint: vec!["/task".into()],
                ..Default::default()
            }),
            ..Default::default()
        }),
    ];
    objects.extend((2..=plan.members).map(|number| node(number, "m", Role::Manager)));
    objects.extend((FIRST..FIRST + plan.workers).map(|number| node(number, "w", Role::Worker)));
    let replicas = u32::try_from(plan.workers).unwrap_or(u32::MAX);
    objects.extend((0..SERVICES).map(|number| Any::Service(service(number, replicas, now_ms))));
    changes.extend(objects.into_iter().map(|any| Change {
        change: Some(Step::Create(view::object(any))),
    }));
    let all = Planned {
        changes,
        ..Default::default()
    };
    Founded { all, rings }
}

fn node(number: u64, letter: &str, role: Role) -> Any {
    Any::Node(Node {
        id: node_id(number).to_wire(),
        name: format!("{letter}{number}"),
        role: role.into(),
        status: NodeStatus::Ready.into(),
        availability: Availability::Active.into(),
        member_id: if role == Role::Manager { number } else { 0 },
        ..Default::default()
    })
}

fn service(number: usize, replicas: u32, now_ms: i64) -> Service {
    let spec = ServiceSpec {
        name: format!("service-{number}"),
        replicas,
        image_id: IMAGE.to_vec(),
        image_name: "task:1".into(),
        secrets: vec![SecretReference {
            secret_id: SECRET.to_vec(),
            name: "password".into(),
        }],
        ..Default::default()
    };
    revision::create(service_id(number), spec, now_ms)
}

fn services(state: &State, number: usize) -> Option<Service> {
    let key = Key::new(Kind::Service, *service_id(number).as_bytes());
    match state.get(key)?.object.clone()? {
        Any::Service(service) => Some(service),
        _ => None,
    }
}

fn tasks(state: &State, service: ServiceId) -> impl Iterator<Item = &Task> {
    let service = Key::new(Kind::Service, *service.as_bytes());
    let referring = state.referrers(service, Kind::Task);
    referring.filter_map(|object| match &object.object {
        Some(Any::Task(task)) => Some(task),
        _ => None,
    })
}

/// The tasks that do not run, and why as far as it is known.
fn others(state: &State, service: ServiceId) -> String {
    let of = |task: &Task| {
        let status = task.status.as_ref();
        let (now, why) = status.map_or((TaskState::Unspecified, ""), |it| (it.state(), &it.message));
        let node = NodeId::try_from(task.node_id.as_slice()).map(|it| it.to_string());
        (now != TaskState::Running).then(|| {
            format!(
                "slot {} {now:?} {why} {:?} at {node:?} shall {:?}",
                task.slot,
                task.refusals,
                task.desired()
            )
        })
    };
    let all: Vec<String> = tasks(state, service).filter_map(of).take(5).collect();
    all.join("; ")
}

/// A service with another number of replicas, on the condition that it is as it was; nothing where it has that many, or is gone.
pub(super) fn asked(state: &State, number: usize, replicas: usize, clock: &dyn Clock) -> Option<Planned> {
    let service = services(state, number)?;
    let spec = ServiceSpec {
        replicas: u32::try_from(replicas).unwrap_or(u32::MAX),
        ..service.versions.last()?.spec.clone()?
    };
    let now_ms = i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX);
    let revised = revision::revise(&service, spec, now_ms).ok()?;
    let mut planned = Planned::default();
    planned.unless_changed(&service);
    planned.replace(revised);
    Some(planned)
}

/// How what runs differs from what was asked for.
pub(super) fn gap(state: &State, workers: &BTreeMap<u64, Worker>) -> Option<String> {
    let mut wanted: BTreeMap<NodeId, BTreeSet<String>> = BTreeMap::new();
    for number in 0..SERVICES {
        let Some(service) = services(state, number) else {
            return Some(format!("service {number} is gone"));
        };
        let replicas = service
            .versions
            .last()
            .and_then(|it| it.spec.as_ref())
            .map_or(0, |it| it.replicas);
        let mut slots = BTreeSet::new();
        for task in tasks(state, service_id(number)) {
            let state = task.status.as_ref().map(|it| it.state());
            if state != Some(TaskState::Running) {
                continue;
            }
            let (Ok(node), Ok(id)) = (
                NodeId::try_from(task.node_id.as_slice()),
                bulkhead_proto::TaskId::try_from(task.id.as_slice()),
            ) else {
                return Some("a task runs nowhere".into());
            };
            if !slots.insert(task.slot) {
                return Some(format!("slot {} of service {number} runs twice", task.slot));
            }
            wanted.entry(node).or_default().insert(id.to_string());
        }
        if slots.len() != replicas as usize {
            return Some(format!(
                "{} of {replicas} tasks of service {number} run: {}",
                slots.len(),
                others(state, service_id(number))
            ));
        }
    }
    for (number, worker) in workers {
        let node = node_id(*number);
        let wanted = wanted.remove(&node).unwrap_or_default();
        let runs: BTreeSet<String> = worker
            .sandbox()
            .running()
            .iter()
            .map(ToString::to_string)
            .collect();
        if runs != wanted {
            return Some(format!("on w{number} runs {runs:?}, and not {wanted:?}"));
        }
        let secrets = worker.sandbox().secrets();
        let has = |task: &String| {
            secrets
                .iter()
                .any(|(of, name, value)| of.to_string() == *task && name == "password" && value == PASSWORD)
        };
        if let Some(task) = wanted.iter().find(|task| !has(task)) {
            return Some(format!("task {task} on w{number} has no password, or another"));
        }
    }
    None
}
