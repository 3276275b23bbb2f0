use bulkhead_proto::wire::{self, change, object};

use super::*;

const MIB: u64 = 1 << 20;

fn node(id: u8, memory_mib: u64) -> wire::Node {
    wire::Node {
        id: vec![id; 16],
        name: format!("n{id}"),
        role: wire::Role::Worker as i32,
        status: wire::NodeStatus::Ready as i32,
        availability: wire::Availability::Active as i32,
        description: Some(wire::NodeDescription {
            cpu_millis: 4_000,
            memory_bytes: memory_mib * MIB,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn service(id: u8, memory_mib: u64, ports: &[u32]) -> wire::Service {
    let spec = wire::ServiceSpec {
        reservation: Some(wire::Resources {
            memory_bytes: memory_mib * MIB,
            ..Default::default()
        }),
        ports: ports
            .iter()
            .map(|&host| wire::PublishedPort { host, target: 80 })
            .collect(),
        ..Default::default()
    };
    let version = wire::ServiceVersion {
        number: 1,
        spec: Some(spec),
        created_at: 0,
    };
    wire::Service {
        id: vec![id; 16],
        versions: vec![version],
        ..Default::default()
    }
}

fn pending(service: u8, slot: u8) -> wire::Task {
    let mut id = vec![service; 16];
    id[15] = slot;
    wire::Task {
        id,
        service_id: vec![service; 16],
        slot: slot.into(),
        spec_version: 1,
        desired: wire::DesiredState::Running as i32,
        ..Default::default()
    }
}

struct World {
    nodes: Vec<wire::Node>,
    services: Vec<wire::Service>,
    tasks: Vec<wire::Task>,
}

impl World {
    fn view(&self) -> View<'_> {
        View {
            nodes: self.nodes.iter().map(|it| (&it.id[..], it)).collect(),
            services: self.services.iter().map(|it| (&it.id[..], it)).collect(),
            tasks: self.tasks.iter().collect(),
            ..View::default()
        }
    }

    /// Applies one pass; how many tasks it changed.
    fn pass(&mut self) -> usize {
        let steps = plan(&self.view(), 1).steps;
        let changes: Vec<_> = steps.into_iter().flat_map(|step| step.changes).collect();
        for change in &changes {
            let Some(change::Change::Replace(wire::Object {
                object: Some(object::Object::Task(new)),
            })) = &change.change
            else {
                panic!("the scheduler only replaces tasks: {change:?}");
            };
            let old = self
                .tasks
                .iter_mut()
                .find(|task| task.id == new.id)
                .expect("a known task");
            *old = new.clone();
        }
        changes.len()
    }

    fn nodes_of_tasks(&self) -> Vec<Option<u8>> {
        self.tasks
            .iter()
            .map(|task| task.node_id.first().copied())
            .collect()
    }
}

#[track_caller]
fn check(mut world: World, expected: &[Option<u8>]) -> World {
    world.pass();
    assert_eq!(world.nodes_of_tasks(), expected);
    assert_eq!(world.pass(), 0, "a second pass finds nothing to do");
    world
}

#[test]
fn replicas_spread_and_ties_go_to_the_smaller_id() {
    let tasks = (1..=4).map(|slot| pending(9, slot)).collect();
    let world = World {
        nodes: vec![node(2, 1024), node(1, 1024)],
        services: vec![service(9, 10, &[])],
        tasks,
    };
    check(world, &[Some(1), Some(2), Some(1), Some(2)]);
}

#[test]
fn memory_is_not_overcommitted_and_the_rest_says_why() {
    let tasks = (1..=3).map(|slot| pending(9, slot)).collect();
    let world = World {
        nodes: vec![node(1, 700)],
        services: vec![service(9, 300, &[])],
        tasks,
    };
    let world = check(world, &[Some(1), Some(1), None]);
    assert_eq!(
        world.tasks[2].refusals,
        ["1 node: memory: 300MiB wanted, 100MiB free"]
    );
}

#[test]
fn a_stopping_task_holds_its_memory_until_it_ended() {
    let mut stopping = pending(9, 1);
    stopping.node_id = vec![1; 16];
    stopping.desired = wire::DesiredState::Shutdown as i32;
    stopping.status = Some(wire::TaskStatus {
        state: wire::TaskState::Running as i32,
        ..Default::default()
    });
    let mut ended = stopping.clone();
    ended.status = Some(wire::TaskStatus {
        state: wire::TaskState::Shutdown as i32,
        ..Default::default()
    });
    let world = |first| World {
        nodes: vec![node(1, 400)],
        services: vec![service(9, 300, &[])],
        tasks: vec![first, pending(9, 2)],
    };
    check(world(stopping), &[Some(1), None]);
    check(world(ended), &[Some(1), Some(1)]);
}

#[test]
fn a_host_port_is_shared_by_replicas_but_not_by_services() {
    let world = World {
        nodes: vec![node(1, 400)],
        services: vec![service(8, 1, &[80]), service(9, 1, &[80])],
        tasks: vec![pending(8, 1), pending(8, 2), pending(9, 1)],
    };
    let world = check(world, &[Some(1), Some(1), None]);
    assert_eq!(
        world.tasks[2].refusals,
        ["1 node: host port 80 is taken by another service"]
    );
}

#[test]
fn nodes_that_are_not_for_tasks_get_none() {
    let mut down = node(1, 400);
    down.status = wire::NodeStatus::Down as i32;
    let mut paused = node(2, 400);
    paused.availability = wire::Availability::Pause as i32;
    let mut draining = node(3, 400);
    draining.availability = wire::Availability::Drain as i32;
    let mut manager = node(4, 400);
    manager.role = wire::Role::Manager as i32;
    let nodes = vec![down, paused, draining, manager];
    let world = check(
        World {
            nodes,
            services: vec![service(9, 1, &[])],
            tasks: vec![pending(9, 1)],
        },
        &[None],
    );
    let explanation = explain(&world.view(), &Request::new(&[9; 16], spec_of_first(&world)));
    let reasons: Vec<_> = explanation
        .groups
        .iter()
        .map(|(reasons, _)| reasons.clone())
        .collect();
    assert_eq!(
        reasons,
        [[Refusal::NotReady], [Refusal::Paused], [Refusal::Draining]]
    );
    assert!(explanation.ever);
}

#[test]
fn a_self_reported_name_does_not_attract_a_secret() {
    let mut liar = node(1, 400);
    liar.description.as_mut().expect("described").hostname = "vault".into();
    let mut wanted = service(9, 1, &[]);
    let spec = wanted.versions[0].spec.as_mut().expect("a spec");
    spec.constraints = vec![wire::Constraint {
        key: "node.hostname".into(),
        equal: true,
        value: "vault".into(),
    }];
    let world = World {
        nodes: vec![liar],
        services: vec![wanted],
        tasks: vec![pending(9, 1)],
    };
    let mut guarded = World {
        services: world.services.clone(),
        nodes: world.nodes.clone(),
        tasks: world.tasks.clone(),
    };
    check(world, &[Some(1)]);
    let spec = guarded.services[0].versions[0].spec.as_mut().expect("a spec");
    spec.secrets = vec![wire::SecretReference {
        secret_id: vec![1; 16],
        name: "s".into(),
    }];
    let guarded = check(guarded, &[None]);
    assert!(!explain(&guarded.view(), &Request::new(&[9; 16], spec_of_first(&guarded))).ever);
}

#[test]
fn explain_groups_nodes_and_names_the_nearest_fix() {
    let nodes = vec![node(1, 310), node(2, 310), node(3, 200)];
    let world = World {
        nodes,
        services: vec![service(9, 400, &[])],
        tasks: vec![],
    };
    let explanation = explain(&world.view(), &Request::new(&[9; 16], spec_of_first(&world)));
    assert_eq!(explanation.groups[0].1, ["n1", "n2"]);
    assert_eq!(
        explanation.nearest_fix.as_deref(),
        Some("would fit if --reserve-memory <= 310MiB")
    );
    assert!(!explanation.ever);
}

/// What `explain` advises for a service on these nodes.
#[track_caller]
fn check_fix(nodes: Vec<wire::Node>, wanted: wire::Service, others: Vec<wire::Task>, fix: Option<&str>) {
    let world = World {
        nodes,
        services: vec![wanted, service(8, 1, &[80])],
        tasks: others,
    };
    let explanation = explain(&world.view(), &Request::new(&[9; 16], spec_of_first(&world)));
    assert_eq!(explanation.nearest_fix.as_deref(), fix);
}

#[test]
fn the_nearest_fix_is_the_least_effort() {
    let available = |id, memory, availability: wire::Availability| wire::Node {
        availability: availability.into(),
        ..node(id, memory)
    };
    let down = |id| wire::Node {
        status: wire::NodeStatus::Down.into(),
        ..node(id, 900)
    };
    let with_constraint = |key: &str, equal| {
        let mut wanted = service(9, 100, &[]);
        wanted.versions[0].spec.as_mut().expect("a spec").constraints = vec![wire::Constraint {
            key: key.into(),
            equal,
            value: "eu".into(),
        }];
        wanted
    };
    let labelled = || wire::Node {
        labels: vec![wire::Label {
            key: "zone".into(),
            value: "eu".into(),
        }],
        ..node(1, 400)
    };
    let on_node = |task: wire::Task| wire::Task {
        node_id: vec![1; 16],
        ..task
    };
    let drain = wire::Availability::Drain;
    let cases = [
        (vec![node(1, 400)], service(9, 100, &[]), vec![], None),
        (
            vec![],
            service(9, 100, &[]),
            vec![],
            Some("would fit once a worker has joined: bulkhead cluster ticket create --role worker"),
        ),
        (
            vec![down(1), available(2, 400, drain)],
            service(9, 100, &[]),
            vec![],
            Some("would fit after bulkhead node activate n2"),
        ),
        (
            vec![down(1), available(2, 50, drain)],
            service(9, 100, &[]),
            vec![],
            Some("would fit if --reserve-memory <= 50MiB, after bulkhead node activate n2"),
        ),
        (
            vec![down(1)],
            service(9, 100, &[]),
            vec![],
            Some("would fit after the worker of n1 is started"),
        ),
        (
            vec![node(1, 400)],
            with_constraint("node.labels.zone", true),
            vec![],
            Some("would fit after bulkhead node update n1 --label-add zone=eu"),
        ),
        (
            vec![labelled()],
            with_constraint("node.labels.zone", false),
            vec![],
            Some("would fit after bulkhead node update n1 --label-rm zone"),
        ),
        (
            vec![node(1, 400)],
            with_constraint("node.hostname", true),
            vec![],
            Some("would fit if the constraint node.hostname==eu is dropped"),
        ),
        (
            vec![node(1, 400)],
            service(9, 100, &[80]),
            vec![on_node(pending(8, 1))],
            Some("would fit if another host port than 80 is published"),
        ),
        // Nothing is left of the only node: no number helps.
        (vec![node(1, 0)], service(9, 100, &[]), vec![], None),
    ];
    for (nodes, wanted, others, fix) in cases {
        check_fix(nodes, wanted, others, fix);
    }
}

#[test]
fn a_node_where_a_service_keeps_failing_comes_last() {
    let failed = |slot, at| wire::Task {
        meta: Some(wire::Meta {
            updated_at: at,
            ..Default::default()
        }),
        node_id: vec![1; 16],
        desired: wire::DesiredState::Shutdown as i32,
        status: Some(wire::TaskStatus {
            state: wire::TaskState::Rejected as i32,
            ..Default::default()
        }),
        ..pending(9, slot)
    };
    let world = |failures: u8, at| {
        let mut tasks: Vec<_> = (10..10 + failures).map(|slot| failed(slot, at)).collect();
        tasks.push(pending(9, 1));
        World {
            nodes: vec![node(1, 400), node(2, 400)],
            services: vec![service(9, 1, &[])],
            tasks,
        }
    };
    let placed = |mut world: World| {
        world.pass();
        world.nodes_of_tasks().pop().expect("the last one waits")
    };
    assert_eq!(placed(world(2, 0)), Some(1));
    assert_eq!(placed(world(3, 0)), Some(2));
    assert_eq!(placed(world(3, -300_000)), Some(1), "long ago");
    let mut alone = world(3, 0);
    alone.nodes.pop();
    assert_eq!(placed(alone), Some(1), "better there than nowhere");
}

#[test]
fn a_pass_is_bounded_and_the_next_one_goes_on() {
    let mut tasks: Vec<_> = (0..2)
        .flat_map(|_| (0..=255).map(|slot| pending(9, slot)))
        .collect();
    for (number, task) in tasks.iter_mut().enumerate() {
        task.id[0] = u8::try_from(number / 256).expect("two rounds");
    }
    let mut world = World {
        nodes: vec![node(1, 4096)],
        services: vec![service(9, 1, &[])],
        tasks,
    };
    assert_eq!(
        [world.pass(), world.pass(), world.pass()],
        [PLACEMENTS_PER_PASS, PLACEMENTS_PER_PASS, 0]
    );
}

fn spec_of_first(world: &World) -> &wire::ServiceSpec {
    world.services[0].versions[0].spec.as_ref().expect("a spec")
}
