//! The nodes of a run with what each has on its disk, whether two of them believe each other, and the rules.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_identity::authority::Authority;
use bulkhead_identity::bundle::VerifyError;
use bulkhead_identity::csr::{self, PublicKey};
use bulkhead_identity::tls::{ALPN_ENROL, ALPN_H2};
use bulkhead_identity::{Bundle, Certificate, Credentials, Key as PrivateKey};
use bulkhead_manager::ca::{Ca, Validity, trust};
use bulkhead_manager::key_ring::KeyRing;
use bulkhead_manager::{Freshness, view};
use bulkhead_proto::wire::{
    Change, Cluster, Kind, Node, NodeKey, Outcome, Precondition, RotationPhase, Transaction,
    change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{NodeId, Role};
use bulkhead_raft::Replica;
use bulkhead_raft::state::{Key, LEVEL, State};
use prost::Message as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::time::{Instant, sleep, timeout};

use super::Tally;
use crate::rules::Rule;
use crate::sim::cluster::Live;
use crate::sim::dice::Dice;
use crate::sim::network::Switch;
use crate::sim::record::Record;

/// The wall clock when a run begins, in milliseconds since 1970.
const START_MS: i64 = 1_700_000_000_000;
/// A manager proposes, and is answered, within this time, or does not know.
const PROPOSE: Duration = Duration::from_secs(5);

/// A node by its number: managers by their member id, workers from [`WORKERS`] on.
pub(super) type Number = u64;
/// The number of the first worker.
pub(super) const WORKERS: Number = 100;

/// One node.
struct Machine {
    node: NodeId,
    /// What its key file holds: it outlives the program.
    credentials: Arc<Credentials>,
    /// Counts what was taken up, in the whole run: names these credentials.
    version: u64,
    /// Whether a worker's program runs; a manager's is its machine's to say.
    up: bool,
    /// It hears what the cluster trusts, and does nothing about it.
    deaf: bool,
    /// When somebody last heard of it.
    heard: Instant,
    freshness: Freshness,
    ring: Option<KeyRing>,
}

struct Inner {
    machines: BTreeMap<Number, Machine>,
    versions: u64,
    requests: u64,
    tally: Tally,
    /// Caller, manager, and whether by the ordinary protocol: did they believe each other?
    meets: BTreeMap<(u64, u64, bool), bool>,
    root_ids: BTreeMap<Vec<u8>, Vec<u8>>,
    known_keys: BTreeSet<Vec<u8>>,
    /// The version of the cluster object that the rules were last checked with.
    checked: Option<u64>,
}

/// Everything that the nodes of a run share. Clones are the same one.
#[derive(Clone)]
pub(super) struct World {
    inner: Arc<Mutex<Inner>>,
    start: Instant,
    pub(super) live: Live,
    pub(super) switch: Switch,
    pub(super) record: Record,
    dice: Dice,
}

/// What a key's signatures say of its length: two of one length make certificates of one length, and nothing else of
/// them is seen by the disks and the network of a run. So a run repeats although its keys are drawn anew.
fn is_steady(certificate: &[u8]) -> bool {
    // BIT STRING of 71 bytes: a SEQUENCE of 69.
    let from = certificate.len().checked_sub(74);
    from.is_some_and(|from| certificate[from..].starts_with(&[0x03, 72, 0, 0x30, 69]))
}

/// Makes something until all its certificates are steady.
pub(in crate::sim) fn steady<T>(mut make: impl FnMut() -> T, certificates: impl Fn(&T) -> Vec<&[u8]>) -> T {
    loop {
        let made = make();
        if certificates(&made).into_iter().all(is_steady) {
            return made;
        }
    }
}

/// The key of a certificate request for this key.
pub(in crate::sim) fn public(key: &PrivateKey) -> PublicKey {
    let csr = key.csr().expect("a key signs");
    csr::public_key(&csr).expect("our own request")
}

impl World {
    pub(super) fn new(live: Live, switch: Switch, record: Record, dice: Dice) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                machines: BTreeMap::new(),
                versions: 0,
                requests: 0,
                tally: Tally::default(),
                meets: BTreeMap::new(),
                root_ids: BTreeMap::new(),
                known_keys: BTreeSet::new(),
                checked: None,
            })),
            start: Instant::now(),
            live,
            switch,
            record,
            dice,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, number: Number, act: impl FnOnce(&mut Machine) -> T) -> T {
        act(self
            .inner()
            .machines
            .get_mut(&number)
            .expect("a node of this run"))
    }

    pub(super) fn add(&self, number: Number, credentials: Credentials, ring: Option<KeyRing>) {
        let mut inner = self.inner();
        inner.versions += 1;
        let machine = Machine {
            node: credentials.certificate.subject().node,
            credentials: credentials.into(),
            version: inner.versions,
            up: true,
            deaf: false,
            heard: Instant::now(),
            freshness: Freshness::default(),
            ring,
        };
        inner.machines.insert(number, machine);
    }

    pub(super) fn now_ms(&self) -> i64 {
        START_MS + i64::try_from(self.start.elapsed().as_millis()).unwrap_or(i64::MAX)
    }

    /// A monotonic reading, as freshness counts.
    pub(super) fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn tally(&self) -> Tally {
        self.inner().tally
    }

    pub(super) fn count(&self, count: impl FnOnce(&mut Tally)) {
        count(&mut self.inner().tally);
    }

    pub(super) fn numbers(&self) -> Vec<Number> {
        self.inner().machines.keys().copied().collect()
    }

    pub(super) fn node(&self, number: Number) -> NodeId {
        self.with(number, |it| it.node)
    }

    pub(super) fn credentials(&self, number: Number) -> (u64, Arc<Credentials>) {
        self.with(number, |it| (it.version, it.credentials.clone()))
    }

    pub(super) fn ring(&self, manager: Number) -> KeyRing {
        self.with(manager, |it| it.ring.clone())
            .expect("a manager has a ring")
    }

    pub(super) fn set_up(&self, worker: Number, up: bool) {
        self.with(worker, |it| it.up = up);
    }

    pub(super) fn set_deaf(&self, number: Number, deaf: bool) {
        self.with(number, |it| it.deaf = deaf);
    }

    pub(super) fn is_deaf(&self, number: Number) -> bool {
        self.with(number, |it| it.deaf)
    }

    /// Whether its program runs now and is not stopped.
    pub(super) fn runs(&self, number: Number) -> bool {
        let up = self.with(number, |it| it.up);
        let lives = number >= WORKERS || self.live.get(number).is_some();
        up && lives && !self.switch.is_frozen(number)
    }

    pub(super) fn hear(&self, number: Number) {
        self.with(number, |it| it.heard = Instant::now());
    }

    pub(super) fn silent_for(&self, number: Number) -> Duration {
        self.with(number, |it| it.heard.elapsed())
    }

    pub(super) fn fresh<T>(&self, manager: Number, act: impl FnOnce(&mut Freshness) -> T) -> T {
        self.with(manager, |it| act(&mut it.freshness))
    }

    pub(super) fn is_fresh(&self, manager: Number) -> bool {
        let now = self.monotonic();
        self.fresh(manager, |it| it.is_fresh(now))
    }

    /// Takes up new credentials: at once on its disk and in each new handshake.
    pub(super) fn adopt(&self, number: Number, credentials: Credentials, why: &str) {
        let mut inner = self.inner();
        inner.versions += 1;
        let version = inner.versions;
        if let Some(machine) = inner.machines.get_mut(&number) {
            machine.credentials = credentials.into();
            machine.version = version;
        }
        drop(inner);
        self.record.note(format_args!("n{number} {why}"));
        self.check();
    }

    /// The state of the replica that is furthest.
    pub(super) fn newest(&self) -> Option<State> {
        let members = self.live.members().into_iter();
        let states = members.filter_map(|member| Some(self.live.get(member)?.state()));
        states.max_by_key(State::index)
    }

    /// Whether a caller and a manager believe each other: as two ends of a handshake do.
    pub(super) fn meets(&self, caller: Number, manager: Number, ordinary: bool) -> bool {
        let (calling, caller) = self.credentials(caller);
        let (serving, manager) = self.credentials(manager);
        let key = (calling, serving, ordinary);
        if let Some(known) = self.inner().meets.get(&key) {
            return *known;
        }
        let met = self.shake(&caller, &manager, ordinary).is_ok();
        self.inner().meets.insert(key, met);
        met
    }

    fn shake(&self, caller: &Credentials, manager: &Credentials, ordinary: bool) -> Result<(), VerifyError> {
        let protocol = if ordinary { ALPN_H2 } else { ALPN_ENROL };
        let chain = |of: &Credentials| -> Vec<CertificateDer<'static>> {
            let ders = of.presented(protocol);
            ders.map(|der| CertificateDer::from(der.to_vec())).collect()
        };
        let now = UnixTime::since_unix_epoch(Duration::from_millis(self.now_ms().unsigned_abs()));
        let (shows, presents) = (chain(manager), chain(caller));
        match ordinary {
            true => caller.bundle.verify_manager(&shows[0], &shows[1..], now)?,
            false => caller.bundle.verify_member(&shows[0], &shows[1..], now)?,
        };
        // A worker that asks to be taken back shows none.
        if ordinary || caller.certificate.subject().role == Role::Manager {
            manager.bundle.verify_client(&presents[0], &presents[1..], now)?;
        }
        Ok(())
    }

    /// The id of a root's key; roots are read once.
    fn root_id(&self, root: &[u8]) -> Vec<u8> {
        if let Some(known) = self.inner().root_ids.get(root) {
            return known.clone();
        }
        let id = trust::key_id(root).expect("a root of the cluster").to_wire();
        self.inner().root_ids.insert(root.to_vec(), id.clone());
        id
    }

    /// Whether a node's record fulfils what the last phase was for.
    pub(super) fn is_through(&self, cluster: &Cluster, record: &Node) -> bool {
        match &cluster.rotation {
            Some(rotation) if rotation.phase() == RotationPhase::Issue => {
                record.trusts.contains(&self.root_id(&rotation.root))
            }
            _ => record.issuer == self.root_id(&cluster.root_certificate),
        }
    }

    /// The rules, as they hold at any time.
    pub(super) fn check(&self) {
        let Some(state) = self.newest() else { return };
        let Some(cluster) = view::cluster(&state) else {
            return;
        };
        let roots = trust::roots(cluster);
        let all: Vec<(Number, Role, bool, bool)> = self
            .numbers()
            .into_iter()
            .filter_map(|number| {
                let (_, credentials) = self.credentials(number);
                let subject = credentials.certificate.subject();
                let record = view::node(&state, subject.node)?;
                let bundle = &credentials.bundle;
                let current = bundle.ders() == roots && bundle.issuer_of(&credentials.certificate).is_some();
                Some((number, subject.role, current, self.is_through(cluster, record)))
            })
            .collect();
        for (caller, role, current, through) in &all {
            let managers = all
                .iter()
                .filter(|other| other.1 == Role::Manager && other.0 != *caller);
            for (manager, _, also_current, also_through) in managers {
                let broken = |rule: Rule, why: &str| {
                    let (phase, issuer) = (
                        cluster.rotation.as_ref().map(|it| it.phase()),
                        trust::issuer(cluster).root,
                    );
                    let issuer = &self.root_id(issuer)[..2];
                    self.record.violation(rule, format_args!(
                        "n{caller} and n{manager} do not believe each other, and {why}: {phase:?}, root {issuer:02x?}"
                    ));
                };
                if *role == Role::Manager && !self.meets(*caller, *manager, false) {
                    broken(Rule::ManagersMeet, "both are managers");
                }
                if *current && *also_current && !self.meets(*caller, *manager, true) {
                    broken(Rule::CurrentNodesMeet, "both are current");
                }
                if *through && *also_through && !self.meets(*caller, *manager, true) {
                    broken(Rule::CurrentNodesMeet, "both are through");
                }
            }
        }
    }

    /// The rules about what is committed; called at each new index.
    pub(super) fn check_state(&self, state: &State) {
        let Some(cluster) = view::cluster(state) else {
            return;
        };
        let mut fresh: Vec<(&str, &NodeKey)> = Vec::new();
        for node in view::nodes(state) {
            let mut inner = self.inner();
            let unknown = node
                .keys
                .iter()
                .filter(|key| inner.known_keys.insert(key.key_id.clone()));
            fresh.extend(unknown.map(|key| (node.name.as_str(), key)));
        }
        if !fresh.is_empty() {
            let bundle = Bundle::from_ders(trust::roots(cluster)).expect("roots of the cluster");
            for (name, key) in fresh {
                let certificate = Certificate::from_der(&key.certificate).expect("our own");
                if bundle.issuer_of(&certificate).is_none() {
                    self.record.violation(
                        Rule::NothingOfADroppedRoot,
                        format_args!("a certificate of a dropped root was committed for {name}"),
                    );
                }
            }
        }
        let version = cluster.meta.as_ref().map_or(0, |meta| meta.version);
        if self.inner().checked.replace(version) == Some(version) {
            return;
        }
        self.check();
        for manager in self.numbers().into_iter().filter(|number| *number < WORKERS) {
            let (root, sealed) = (trust::issuer(cluster).root, trust::issuer(cluster).key);
            let place = Key::new(
                Kind::Cluster,
                cluster.id.as_slice().try_into().unwrap_or_default(),
            );
            let opened = sealed.and_then(|sealed| self.ring(manager).open(cluster, place, sealed).ok());
            if opened.is_none_or(|pkcs8| Authority::from_parts(root, &pkcs8).is_err()) {
                self.record.violation(
                    Rule::RootKeyOpens,
                    format_args!("the issuing root's key does not open at n{manager}"),
                );
            }
        }
    }

    /// Signs as the authority does, of the right length.
    pub(super) fn issue(
        &self,
        manager: Number,
        cluster: &Cluster,
        node: NodeId,
        role: Role,
        key: &PublicKey,
    ) -> NodeKey {
        let ca = Ca::new(self.ring(manager));
        let validity = Validity::of_role(role, cluster, self.now_ms());
        steady(
            || {
                ca.issue_here(cluster, node, role, key, validity)
                    .expect("the root's key opens")
            },
            |key| vec![key.certificate.as_slice()],
        )
    }

    /// Sometimes a program is held up between deciding and committing, and then for long.
    pub(super) async fn stall(&self) {
        if self.dice.percent(3) {
            self.count(|tally| tally.stalls += 1);
            sleep(self.dice.micros(500_000, 6_000_000)).await;
        }
    }

    /// A transaction of one change, by a manager; through whoever leads.
    pub(super) async fn propose(
        &self,
        from: Number,
        term: u64,
        preconditions: Vec<Precondition>,
        changes: Vec<Change>,
    ) -> Option<Outcome> {
        let transaction = Transaction {
            level: LEVEL,
            request_id: self.request_id(),
            at: self.now_ms(),
            proposer: from,
            preconditions,
            changes,
            term,
            ..Default::default()
        };
        let bytes = transaction.encode_to_vec();
        let proposed = async {
            let (leader, replica): (Number, Replica) = match self.live.get(from) {
                Some(own) if own.leadership().borrow().leading.is_some() => (from, own),
                _ => self.live.leader()?,
            };
            let elsewhere = leader != from;
            if elsewhere && !(self.switch.carries(from, leader).await && self.meets(from, leader, false)) {
                return None;
            }
            let outcome = replica.propose(bytes.into()).await.ok()?;
            (!elsewhere || self.switch.carries(leader, from).await).then_some(outcome)
        };
        timeout(PROPOSE, proposed).await.ok()?
    }

    pub(super) fn request_id(&self) -> Vec<u8> {
        let mut inner = self.inner();
        inner.requests += 1;
        let mut id = [0xAA; 16];
        id[8..].copy_from_slice(&inner.requests.to_be_bytes());
        id.to_vec()
    }
}

/// A change that replaces an object.
pub(super) fn replace(any: Any) -> Change {
    Change {
        change: Some(Step::Replace(view::object(any))),
    }
}

/// Credentials with a new certificate, as a manager hands it out.
pub(super) fn handed_out(
    state: &State,
    node: NodeId,
    key: PrivateKey,
    former: Option<&[u8]>,
) -> Option<Credentials> {
    let cluster = view::cluster(state)?;
    let keys = &view::node(state, node)?.keys;
    let committed = keys.iter().find(|it| it.key_id == key.key_id().as_bytes())?;
    Some(Credentials {
        certificate: Certificate::from_der(&committed.certificate).ok()?,
        key,
        chain: trust::chain(cluster),
        bundle: Bundle::from_ders(trust::roots(cluster))
            .ok()?
            .with_former(former)
            .ok()?,
    })
}
