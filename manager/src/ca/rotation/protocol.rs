//! Every order in which one rotation of three managers and two workers can go: what each node hears, does and says may be
//! late or lost, and whoever leads may die after each step that is kept.
//!
//! The steps are those of the real code: [`next`] decides, [`due`] says what a node does, and whether two nodes meet is
//! for their bundles to say. The rules hold in each state, and from each the rotation comes to its end.

use std::collections::BTreeMap;

use bulkhead_identity::authority::Authority;
use bulkhead_identity::bundle::Root;
use bulkhead_identity::follow::{self, Due};
use bulkhead_identity::tls::{ALPN_ENROL, ALPN_H2};
use bulkhead_identity::{Bundle, Certificate, Credentials, Key as NodeKeyPair, Subject, csr};
use bulkhead_proto::{NodeId, Role as NodeRole};
use rustls::pki_types::{CertificateDer, UnixTime};

use super::tests::{At, DEADLINE, Here, NOW, cluster, id, rotation, state};
use super::*;

/// What a node trusts.
const OLD: u8 = 0;
const BOTH: u8 = 1;
const NEW: u8 = 2;
/// The phases; the last one is the end.
const BUNDLE: u8 = 0;
const ENDED: u8 = 2;
/// Ways to stand: what is trusted, and whether the certificate is of the new root.
const STANDS: usize = 6;

/// Which of two roles.
const MANAGER: usize = 1;

/// One node: what it has, and what its record says. A record never says more than is so, and what it says only grows.
#[derive(Clone, Copy, Debug)]
struct One {
    trusts: u8,
    renewed: bool,
    said: At,
    up: bool,
}

impl One {
    fn at(self) -> At {
        match (self.renewed, self.trusts) {
            (true, _) => At::Uses,
            (false, OLD) => At::Old,
            (false, _) => At::Trusts,
        }
    }

    fn stand(self) -> usize {
        usize::from(self.trusts) * 2 + usize::from(self.renewed)
    }

    fn packed(self) -> u64 {
        (self.stand() as u64) << 3 | (self.said as u64) << 1 | u64::from(self.up)
    }
}

/// The deadline is over from the beginning: a leader that need not wait can do all that one which waits can.
#[derive(Clone, Copy, Debug)]
struct World {
    phase: u8,
    /// Sorted, as one manager is like the other.
    managers: [One; 3],
    workers: [One; 2],
}

impl World {
    fn new() -> Self {
        let one = One {
            trusts: OLD,
            renewed: false,
            said: At::Old,
            up: true,
        };
        Self {
            phase: BUNDLE,
            managers: [one; 3],
            workers: [one; 2],
        }
    }

    /// Equal for equal worlds, and for no others.
    fn packed(&self) -> u64 {
        let nodes = self.nodes().fold(0, |sum, (_, one)| sum << 6 | one.packed());
        nodes << 2 | u64::from(self.phase)
    }

    fn nodes(&self) -> impl Iterator<Item = (usize, One)> {
        let all = self.managers.iter().chain(&self.workers);
        all.copied().enumerate()
    }

    /// The same with one node changed.
    fn with(&self, at: usize, change: impl FnOnce(&mut One)) -> Self {
        let mut new = *self;
        match at.checked_sub(3) {
            None => change(&mut new.managers[at]),
            Some(worker) => change(&mut new.workers[worker]),
        }
        new.managers.sort_unstable_by_key(|one| one.packed());
        new.workers.sort_unstable_by_key(|one| one.packed());
        new
    }

    fn is_manager(at: usize) -> bool {
        at < 3
    }

    fn is_final(&self) -> bool {
        let done = |one: One| one.up && one.renewed && one.trusts == NEW;
        self.phase == ENDED && self.nodes().all(|(_, one)| done(one))
    }
}

/// What the real code says of each way to stand.
struct Facts {
    old: Vec<u8>,
    new: Vec<u8>,
    /// The cluster object in each phase.
    clusters: [Cluster; 3],
    /// What a manager or worker does when it is told of a phase.
    due: [[[Option<Due>; 3]; STANDS]; 2],
    /// Of a worker or a manager that calls a manager: by the ordinary protocol, and by the other one.
    meets: [[[[bool; 2]; STANDS]; STANDS]; 2],
    /// Whether the leader has a step to make, by phase and what the records say.
    steps: BTreeMap<(u8, [At; 5]), bool>,
}

impl Facts {
    fn new() -> Self {
        let cluster_id = ClusterId::from_bytes([9; 16]);
        let authority = || Authority::generate(cluster_id, NOW).expect("a root");
        let (old, new) = (authority(), authority());
        let next_root = Root::from_der(new.root_der()).expect("a root");
        let cross = old.cross(&next_root, NOW).expect("certified");
        let roots = super::tests::Roots {
            old: old.root_der().to_vec(),
            new: new.root_der().to_vec(),
        };
        let ids = (id(&roots.old), id(&roots.new));
        let through = [Here {
            role: Role::Manager,
            at: At::Uses,
            down: false,
        }];
        let step = |from: &Cluster| {
            let state = state(from.clone(), &through, &ids.1, &ids.0);
            next(&state, from, Signer::Signs, NOW).expect("all are through").0
        };
        let begun = cluster(&roots, Some(rotation(&roots, RotationPhase::Bundle, &cross)));
        let issuing = step(&begun);
        let ended = step(&issuing);
        let clusters = [begun, issuing, ended];

        let credentials = |role: NodeRole, trusts: u8, renewed: bool| {
            let key = NodeKeyPair::generate().expect("a key");
            let public = csr::public_key(&key.csr().expect("a request")).expect("our own");
            let subject = Subject {
                cluster: cluster_id,
                node: NodeId::from_bytes([1; 16]),
                role,
            };
            let issuer = if renewed { &new } else { &old };
            let der = issuer
                .issue(&subject, &public, NOW, NOW + 3_600_000)
                .expect("a certificate");
            let ders = match trusts {
                OLD => vec![roots.old.clone()],
                BOTH => vec![roots.old.clone(), roots.new.clone()],
                _ => vec![roots.new.clone()],
            };
            let former = (trusts == NEW && role == NodeRole::Manager).then_some(roots.old.as_slice());
            let bundle = Bundle::from_ders(ders).and_then(|it| it.with_former(former));
            Credentials {
                key,
                certificate: Certificate::from_der(&der).expect("our own"),
                chain: if renewed { vec![cross.clone()] } else { Vec::new() },
                bundle: bundle.expect("roots"),
            }
        };
        let all = |role| -> Vec<Credentials> {
            [OLD, BOTH, NEW]
                .into_iter()
                .flat_map(|trusts| [false, true].map(|renewed| credentials(role, trusts, renewed)))
                .collect()
        };
        let (managers, workers) = (all(NodeRole::Manager), all(NodeRole::Worker));
        let mut due = [[[None; 3]; STANDS]; 2];
        let mut meets = [[[[false; 2]; STANDS]; STANDS]; 2];
        for (role, own) in [&workers, &managers].into_iter().enumerate() {
            for (has, credentials) in own.iter().enumerate() {
                for (phase, cluster) in clusters.iter().enumerate() {
                    let says = trust::told(cluster, |told| {
                        let former = told.former.filter(|_| role == MANAGER);
                        follow::due(credentials, &follow::Told { former, ..*told })
                    });
                    due[role][has][phase] = says.expect("a root");
                }
                for (serves, manager) in managers.iter().enumerate() {
                    for ordinary in [false, true] {
                        meets[role][has][serves][usize::from(ordinary)] =
                            meet(credentials, manager, ordinary);
                    }
                }
            }
        }
        Self {
            old: ids.0,
            new: ids.1,
            clusters,
            due,
            meets,
            steps: BTreeMap::new(),
        }
    }

    /// Whether the leader has a step to make.
    fn step(&mut self, world: &World) -> bool {
        let mut said = [At::Old; 5];
        for (at, one) in world.nodes() {
            said[at] = one.said;
        }
        let key = (world.phase, said);
        if let Some(known) = self.steps.get(&key) {
            return *known;
        }
        let here = |(at, at_most): (usize, At)| Here {
            role: match World::is_manager(at) {
                true => Role::Manager,
                false => Role::Worker,
            },
            at: at_most,
            down: false,
        };
        let here: Vec<Here> = said.into_iter().enumerate().map(here).collect();
        let cluster = &self.clusters[usize::from(world.phase)];
        let state = state(cluster.clone(), &here, &self.new, &self.old);
        let next = next(&state, cluster, Signer::Signs, DEADLINE);
        let found = next.is_some_and(|(next, _)| next.rotation != cluster.rotation);
        self.steps.insert(key, found);
        found
    }

    fn meets(&self, (caller, one): (usize, One), manager: One, ordinary: bool) -> bool {
        let role = usize::from(World::is_manager(caller));
        self.meets[role][one.stand()][manager.stand()][usize::from(ordinary)]
    }

    /// All that can happen next.
    fn moves(&mut self, world: &World) -> Vec<World> {
        let mut moves = Vec::new();
        for (at, one) in world.nodes() {
            let manages = World::is_manager(at);
            if !one.up {
                moves.push(world.with(at, |one| one.up = true));
                continue;
            }
            // At most one manager and one worker at a time: more, and nobody decides or nothing is left to see.
            let mut others = world
                .nodes()
                .filter(|(other, _)| World::is_manager(*other) == manages);
            if others.all(|(_, other)| other.up) {
                moves.push(world.with(at, |one| one.up = false));
            }
            if one.said != one.at() {
                moves.push(world.with(at, |one| one.said = one.at()));
            }
            // Of this phase, or of the one before: whom it hears may lag.
            for phase in world.phase.saturating_sub(1)..=world.phase {
                match self.due[usize::from(manages)][one.stand()][usize::from(phase)] {
                    Some(Due::Trust) => moves.push(world.with(at, |one| one.trusts = trusted(phase))),
                    // What is signed is committed only while the cluster is as the signer saw it; and what a dropped
                    // certificate opened is closed.
                    Some(Due::Renew) if phase == world.phase && phase != ENDED => {
                        if self.reaches(world, at, one, true) {
                            moves.push(world.with(at, |one| one.renewed = true));
                        }
                    }
                    Some(Due::Renew) | None => {}
                }
            }
            if world.phase == ENDED && !one.renewed && self.reaches(world, at, one, false) {
                moves.push(world.with(at, |one| {
                    one.renewed = true;
                    one.trusts = NEW;
                }));
            }
        }
        // What a leader planned earlier, or one that died since, is committed only if the cluster is as it was: then it is
        // this same step, since what records say only grows.
        if world.phase != ENDED && self.step(world) {
            moves.push(World {
                phase: world.phase + 1,
                ..*world
            });
        }
        moves
    }

    /// Whether a manager is there that this node meets; a manager asks itself first.
    fn reaches(&self, world: &World, at: usize, one: One, ordinary: bool) -> bool {
        let mut managers = world.managers.iter().enumerate();
        managers.any(|(other, manager)| {
            let own = other == at && ordinary;
            manager.up && (own || other != at && self.meets((at, one), *manager, ordinary))
        })
    }

    fn check(&self, world: &World) {
        for (at, one) in world.nodes() {
            for (other, manager) in world.managers.iter().copied().enumerate() {
                if at == other {
                    continue;
                }
                let who = || format!("{one:?} and {manager:?} in {world:#?}");
                if World::is_manager(at) {
                    // Whatever each of them missed: else nobody would be left to decide.
                    assert!(self.meets((at, one), manager, false), "Raft: {}", who());
                }
                // What the last phase was for.
                let needs = [At::Old, At::Trusts, At::Uses][usize::from(world.phase)];
                if one.said >= needs && manager.said >= needs {
                    assert!(
                        self.meets((at, one), manager, true),
                        "both are through: {}",
                        who()
                    );
                }
                let current = |one: One| {
                    let known = one.renewed || world.phase != ENDED;
                    one.trusts == trusted(world.phase) && known
                };
                if current(one) && current(manager) {
                    assert!(
                        self.meets((at, one), manager, true),
                        "both are current: {}",
                        who()
                    );
                }
            }
        }
    }
}

/// What a node trusts that heard of this phase.
fn trusted(phase: u8) -> u8 {
    if phase == ENDED { NEW } else { BOTH }
}

/// Whether a caller and a manager believe each other.
fn meet(caller: &Credentials, manager: &Credentials, ordinary: bool) -> bool {
    let protocol = if ordinary { ALPN_H2 } else { ALPN_ENROL };
    let chain = |of: &Credentials| -> Vec<CertificateDer<'static>> {
        let ders = of.presented(protocol);
        ders.map(|der| CertificateDer::from(der.to_vec())).collect()
    };
    let now = UnixTime::since_unix_epoch(Duration::from_millis(NOW.unsigned_abs() + 60_000));
    let (shows, presents) = (chain(manager), chain(caller));
    let believed = match ordinary {
        true => caller.bundle.verify_manager(&shows[0], &shows[1..], now),
        false => caller.bundle.verify_member(&shows[0], &shows[1..], now),
    };
    let admitted = manager.bundle.verify_client(&presents[0], &presents[1..], now);
    // Who comes back shows no certificate; only managers show one by that protocol.
    let anonymous = !ordinary && caller.certificate.subject().role == NodeRole::Worker;
    believed.is_ok() && (anonymous || admitted.is_ok())
}

#[test]
fn in_every_order_a_rotation_ends_with_one_root_and_nodes_that_are_through_meet() {
    let mut facts = Facts::new();
    let first = World::new();
    let mut numbers = BTreeMap::from([(first.packed(), 0_u32)]);
    let mut worlds = vec![first];
    let mut before: Vec<Vec<u32>> = vec![Vec::new()];
    let mut at = 0;
    while let Some(world) = worlds.get(at).copied() {
        facts.check(&world);
        let from = u32::try_from(at).expect("fewer than 4 billion");
        for next in facts.moves(&world) {
            let fresh = u32::try_from(worlds.len()).expect("fewer than 4 billion");
            let number = *numbers.entry(next.packed()).or_insert(fresh);
            if number == fresh {
                worlds.push(next);
                before.push(Vec::new());
            }
            before[number as usize].push(from);
        }
        at += 1;
    }
    // Backwards from the ends: no state leads nowhere.
    let finals = (0_u32..).zip(&worlds).filter(|(_, world)| world.is_final());
    let mut ends: Vec<u32> = finals.map(|(number, _)| number).collect();
    assert!(!ends.is_empty());
    let mut good = vec![false; worlds.len()];
    for end in &ends {
        good[*end as usize] = true;
    }
    while let Some(number) = ends.pop() {
        for from in &before[number as usize] {
            if !std::mem::replace(&mut good[*from as usize], true) {
                ends.push(*from);
            }
        }
    }
    let stuck = good.iter().position(|good| !good).map(|at| worlds[at]);
    assert!(stuck.is_none(), "it never ends from {stuck:#?}");
    println!("{} states", worlds.len());
    assert!(worlds.len() > 5_000, "{} states", worlds.len());
}
