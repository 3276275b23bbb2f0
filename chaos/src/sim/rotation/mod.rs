//! Rotations of the root in the simulated cluster: real replicas, the real decisions of the authority and of who follows
//! it, real certificates; what moves between nodes beside Raft is simulated.
//!
//! One rotation after the other, each under partitions, kills, power losses, full disks and stopped programs, and with a
//! leader that dies after a step. Then the faults stop, but for one node that stays away or does nothing, and the rotation
//! must end by its deadline; then that node is back, and must find its way by itself.
//!
//! The rules, checked whenever anything changed: managers always meet over Raft; nodes that are current, and nodes that were
//! through when the phase began, always meet; the issuing root's key opens at every manager; no certificate of a dropped
//! root is committed.

mod manager;
mod worker;
mod world;

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::{Bundle, Certificate, Credentials, Key as PrivateKey};
use bulkhead_manager::ca::genesis::{FirstManager, Wishes, genesis};
use bulkhead_manager::ca::rotation::{self, Order};
use bulkhead_manager::key_ring::{EnvelopeKey, KeyRing};
use bulkhead_manager::view;
use bulkhead_proto::wire::{
    Change, Cluster as ClusterObject, Node, NodeStatus, Rotation, change::Change as Step,
    object::Object as Any,
};
use bulkhead_proto::{NodeId, Role, limits};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use self::world::{Number, WORKERS, World, replace};
pub(super) use self::world::{public, steady};
use super::Plan;
use super::cluster::{Cluster, Ending, member};
use super::dice::Dice;
use super::nemesis::{Nemesis, heal};
use super::record::{Record, Report};
use crate::rules::Rule;

/// Workers of a run.
const FAKES: u64 = 3;
/// What the cluster is like.
const WISHES: Wishes<'static> = Wishes {
    lab: true,
    lock: None,
};
/// A rotation that nobody holds up ends within this time once all is well; and all who were away are back.
const SOON: Duration = Duration::from_secs(60);

/// How often what was tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rotations that ended.
    pub rotations: u64,
    /// Of these, those that ended with a manager, or a worker, that was down.
    pub without_somebody: u64,
    /// And with a worker that missed the one before it, too.
    pub missed_again: u64,
    /// And those whose deadline ended the wait for a node that does nothing.
    pub by_deadline: u64,
    /// Handshakes of workers that succeeded.
    pub handshakes: u64,
    /// And those that were refused: of who was away.
    pub refused: u64,
    /// Nodes that came back by their key.
    pub returns: u64,
    /// Leaders that were killed right after a step of a rotation.
    pub killed_after_a_step: u64,
    /// Programs that were stopped for a while.
    pub stopped: u64,
    /// Stalls between deciding and committing.
    pub stalls: u64,
}

/// Runs this many rotations in a row from one seed.
pub fn run(seed: u64, rotations: u64) -> (Report, Tally) {
    super::alone(seed, simulate(seed, rotations))
}

async fn simulate(seed: u64, rotations: u64) -> (Report, Tally) {
    let plan = Plan {
        members: 3,
        ..Plan::of(seed)
    };
    // States hold keys, which are drawn anew: what a run compares is what happened.
    let record = Record::without_states();
    let mut cluster = Cluster::new(plan.clone(), record.clone());
    cluster.found().await;
    let world = World::new(
        cluster.live.clone(),
        cluster.switch.clone(),
        record.clone(),
        Dice::new(seed, 40),
    );
    found(&world, seed).await;
    let actors = actors(&world, seed);
    let mut course = Course {
        nemesis: Nemesis::of_rotation(&plan, record.clone()),
        dice: Dice::new(seed, 41),
        world: world.clone(),
        cluster,
        gone: None,
    };
    while world.tally().rotations < rotations && !record.violated() {
        course.rotation().await;
    }
    for actor in actors {
        actor.abort();
        let _cancelled = actor.await;
    }
    for id in course.cluster.live.members() {
        course.cluster.stop(id, Ending::Killed).await;
    }
    (record.report(seed), world.tally())
}

fn actors(world: &World, seed: u64) -> Vec<JoinHandle<()>> {
    let mut actors = vec![tokio::spawn(watch(world.clone()))];
    for number in world.numbers() {
        let dice = |part| Dice::new(seed, part + number);
        if number >= WORKERS {
            actors.push(tokio::spawn(worker::run(world.clone(), number, dice(1_000))));
        } else {
            actors.push(tokio::spawn(manager::ask(world.clone(), number)));
            actors.push(tokio::spawn(manager::follow(world.clone(), number, dice(2_000))));
            actors.push(tokio::spawn(manager::lead(world.clone(), number, dice(3_000))));
        }
    }
    actors
}

/// Looks at each new state.
async fn watch(world: World) {
    let mut seen = 0;
    loop {
        sleep(Duration::from_millis(1)).await;
        if let Some(state) = world.newest().filter(|state| state.index() > seen) {
            seen = state.index();
            world.check_state(&state);
        }
    }
}

fn node_id(number: Number) -> NodeId {
    member(number).node
}

/// The first transaction: a cluster as `init` makes it, with all the nodes of the run already admitted.
async fn found(world: &World, seed: u64) {
    let managers: Vec<Number> = world.live.members();
    let rings: Vec<KeyRing> = managers
        .iter()
        .map(|number| {
            let entropy = Arc::new(Dice::new(seed, 50 + number));
            let key = EnvelopeKey::generate(&*entropy).expect("dice");
            KeyRing::new(node_id(*number), key, entropy)
        })
        .collect();
    let key = PrivateKey::generate().expect("a key");
    let made = steady(
        || {
            let first = FirstManager {
                node: node_id(1),
                name: "m1".into(),
                advertise: "m1:7443".into(),
                key: public(&key),
                envelope_key: rings[0].public(),
                description: Default::default(),
            };
            // The same dice each time: what is not a key is the seed's to say.
            genesis(first, None, WISHES, world.now_ms(), &Dice::new(seed, 42)).expect("a cluster")
        },
        |made| vec![made.root.as_slice(), made.manager.certificate.as_slice()],
    );
    let credentials = |key: PrivateKey, certificate: &[u8]| Credentials {
        key,
        certificate: Certificate::from_der(certificate).expect("our own"),
        chain: Vec::new(),
        bundle: Bundle::from_ders(vec![made.root.clone()]).expect("our own"),
    };
    world.add(
        1,
        credentials(key, &made.manager.certificate),
        Some(rings[0].clone()),
    );
    let mut changes = made.changes.clone();
    let Some(Step::Create(first)) = &mut changes[0].change else {
        unreachable!("the cluster comes first")
    };
    let Some(Any::Cluster(cluster)) = &mut first.object else {
        unreachable!("the cluster comes first")
    };
    for (number, ring) in managers.iter().zip(&rings).skip(1) {
        cluster.key_ring = rings[0]
            .enveloped_for(cluster, node_id(*number), &ring.public())
            .expect("the first opens its own");
    }
    cluster.desired_voters.clone_from(&managers);
    let cluster: ClusterObject = cluster.clone();
    let others = managers[1..].iter().map(|number| (*number, Role::Manager));
    let workers = (0..FAKES).map(|number| (WORKERS + number, Role::Worker));
    for (number, role) in others.chain(workers) {
        let key = PrivateKey::generate().expect("a key");
        let signed = world.issue(1, &cluster, node_id(number), role, &public(&key));
        let ring = managers.iter().position(|it| *it == number);
        world.add(
            number,
            credentials(key, &signed.certificate),
            ring.map(|at| rings[at].clone()),
        );
        let record = Node {
            id: node_id(number).to_wire(),
            name: format!("n{number}"),
            role: view::wire_role(role).into(),
            keys: vec![signed],
            status: NodeStatus::Ready.into(),
            member_id: if role == Role::Manager { number } else { 0 },
            ..Default::default()
        };
        changes.push(Change {
            change: Some(Step::Create(view::object(Any::Node(record)))),
        });
    }
    let outcome = world.propose(1, 0, Vec::new(), changes).await;
    if outcome.is_none_or(|it| it.rejection.is_some()) {
        world
            .record
            .violation(Rule::RotationEnds, "there is no cluster object");
    }
}

/// Who stays away while a rotation ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Absent {
    Nobody,
    Down(Number),
    /// It is up and does nothing.
    Deaf(Number),
}

/// One rotation after the other.
struct Course {
    nemesis: Nemesis,
    dice: Dice,
    world: World,
    cluster: Cluster,
    /// A worker that stays down for so many rotations more.
    gone: Option<(Number, usize)>,
}

impl Course {
    async fn rotation(&mut self) {
        if !self.settled().await {
            return;
        }
        let again = self.gone.is_some();
        let absent = self.absent();
        self.world.record.note(format_args!("a rotation: {absent:?}"));
        if let Absent::Deaf(number) = absent {
            self.world.set_deaf(number, true);
        }
        let deadline = Duration::from_secs(10 + self.dice.below(10) as u64);
        let Some((root, ends)) = self.begin(deadline).await else {
            return;
        };
        self.trouble().await;
        self.heal(absent).await;
        let patience = ends.max(Instant::now()) + SOON / 2;
        let ended = self.until(patience, |world| {
            let state = world.newest()?;
            let cluster = view::cluster(&state)?;
            cluster.rotation.is_none().then(|| cluster.clone())
        });
        match ended.await {
            None => self.world.record.violation(
                Rule::RotationEnds,
                format_args!("the rotation did not end by its deadline: {absent:?}"),
            ),
            Some(cluster) => {
                self.world.record.note("the rotation ended");
                let roots = bulkhead_manager::ca::roots(&cluster);
                if roots != [root] {
                    self.world.record.violation(
                        Rule::RotationEnds,
                        format_args!("it ended with {} roots, or another", roots.len()),
                    );
                }
            }
        }
        let late = Instant::now() >= ends;
        self.world.count(|tally| {
            tally.rotations += 1;
            match absent {
                Absent::Nobody => {}
                Absent::Down(_) => {
                    tally.without_somebody += 1;
                    tally.missed_again += u64::from(again);
                }
                Absent::Deaf(_) => tally.by_deadline += u64::from(late),
            }
        });
        if let Absent::Deaf(number) = absent {
            self.world.set_deaf(number, false);
        }
        self.heal(self.still_gone()).await;
    }

    fn still_gone(&self) -> Absent {
        self.gone
            .map_or(Absent::Nobody, |(number, _)| Absent::Down(number))
    }

    fn absent(&mut self) -> Absent {
        if let Some((number, left)) = self.gone {
            self.gone = (left > 1).then(|| (number, left - 1));
            return Absent::Down(number);
        }
        let anybody = self.dice.pick(&self.world.numbers()).unwrap_or(WORKERS);
        let worker = WORKERS + self.dice.below(3) as u64 % FAKES;
        match self.dice.below(4) {
            0 | 1 => Absent::Nobody,
            2 => {
                // A manager that missed one holds the next one up.
                let more = self.dice.below(limits::FORMER_ROOTS);
                self.gone = (anybody >= WORKERS && more > 0).then_some((anybody, more));
                Absent::Down(anybody)
            }
            _ => Absent::Deaf(worker),
        }
    }

    async fn until<T>(&self, until: Instant, mut look: impl FnMut(&World) -> Option<T>) -> Option<T> {
        while Instant::now() < until && !self.world.record.violated() {
            if let Some(found) = look(&self.world) {
                return Some(found);
            }
            sleep(Duration::from_millis(20)).await;
        }
        None
    }

    /// Everyone is here, and uses the one root, but for who stays away.
    async fn settled(&self) -> bool {
        let settled = self.until(Instant::now() + SOON, |world| {
            let state = world.newest()?;
            let cluster = view::cluster(&state)?;
            let gone = self.gone.map(|(number, _)| number);
            let numbers = world.numbers().into_iter().filter(|it| Some(*it) != gone);
            let numbers: Vec<Number> = numbers.collect();
            let mut managers = numbers.iter().filter(|number| **number < WORKERS);
            let here = numbers.iter().all(|number| {
                view::node(&state, world.node(*number)).is_some_and(|record| {
                    world.is_through(cluster, record) && record.status() != NodeStatus::Down
                })
            });
            (cluster.rotation.is_none() && here && managers.all(|it| world.is_fresh(*it))).then_some(())
        });
        if settled.await.is_none() && !self.world.record.violated() {
            let state = self.world.newest();
            let stands: Vec<String> = state
                .iter()
                .flat_map(|state| view::nodes(state).map(|it| format!("{} {:?}", it.name, it.status())))
                .collect();
            self.world.record.violation(
                Rule::EveryoneComesBack,
                format_args!("not everyone came back: {stands:?}"),
            );
        }
        !self.world.record.violated()
    }

    /// Begins as the leader does that an operator asks.
    async fn begin(&self, deadline: Duration) -> Option<(Vec<u8>, Instant)> {
        let order = Order {
            deadline,
            compromised: false,
        };
        let ends = Instant::now() + deadline;
        for _ in 0..100 {
            if let Some((leader, replica)) = self.world.live.leader() {
                let state = replica.state();
                let cluster = view::cluster(&state)?;
                if let Some(rotation) = &cluster.rotation {
                    return Some((rotation.root.clone(), ends));
                }
                let (ring, now) = (self.world.ring(leader), self.world.now_ms());
                let rotation: Rotation = steady(
                    || rotation::begin(cluster, order, &ring, now).expect("a root"),
                    |made| vec![made.root.as_slice(), made.cross.as_slice()],
                );
                let unchanged = vec![view::unchanged_cluster(cluster)];
                let change = vec![replace(Any::Cluster(rotation::begun(cluster, rotation)))];
                let _looked_at_again = self.world.propose(leader, 0, unchanged, change).await;
            }
            sleep(Duration::from_millis(50)).await;
        }
        self.world
            .record
            .violation(Rule::RotationEnds, "no rotation begins");
        None
    }

    /// Things go wrong.
    async fn trouble(&mut self) {
        let over = Instant::now() + self.dice.micros(500_000, 4_000_000);
        let kills = self.dice.percent(60);
        let mut phase = self.phase();
        let mut strike = Instant::now();
        while Instant::now() < over && !self.world.record.violated() {
            sleep(Duration::from_millis(2)).await;
            let now = self.phase();
            if now != phase {
                phase = now;
                if kills && let Some((leader, _)) = self.world.live.leader() {
                    self.world
                        .record
                        .note(format_args!("m{leader} dies after a step"));
                    self.world.count(|tally| tally.killed_after_a_step += 1);
                    self.cluster.stop(leader, Ending::Killed).await;
                }
            }
            if Instant::now() >= strike {
                strike = Instant::now() + self.dice.micros(50_000, 700_000);
                self.strike().await;
            }
        }
    }

    fn phase(&self) -> Option<i32> {
        let state = self.world.newest()?;
        let rotation = view::cluster(&state)?.rotation.as_ref();
        Some(rotation.map_or(0, |it| it.phase))
    }

    async fn strike(&mut self) {
        let anybody = self.dice.pick(&self.world.numbers()).unwrap_or(WORKERS);
        let worker = WORKERS + self.dice.below(3) as u64 % FAKES;
        match self.dice.below(8) {
            0 => {
                self.world.record.note(format_args!("n{anybody} is stopped"));
                self.world.count(|tally| tally.stopped += 1);
                self.world.switch.freeze(anybody, true);
            }
            1 => {
                for number in self.world.numbers() {
                    self.world.switch.freeze(number, false);
                }
            }
            2 => {
                let up = self.dice.percent(50);
                self.world.record.note(format_args!("n{worker} runs: {up}"));
                self.world.set_up(worker, up);
            }
            _ => self.nemesis.strike(&mut self.cluster).await,
        }
    }

    /// All is well again, but for who is absent.
    async fn heal(&mut self, absent: Absent) {
        heal(&mut self.cluster);
        for number in self.world.numbers() {
            self.world.switch.freeze(number, false);
            if number >= WORKERS {
                self.world.set_up(number, absent != Absent::Down(number));
            }
        }
        if let Absent::Down(manager) = absent
            && self.cluster.live.get(manager).is_some()
        {
            self.cluster.stop(manager, Ending::Killed).await;
        }
        for id in self.cluster.down() {
            if absent != Absent::Down(id) {
                self.cluster.restart(id).await;
            }
        }
        self.world
            .record
            .note(format_args!("all is well but for {absent:?}"));
    }
}
