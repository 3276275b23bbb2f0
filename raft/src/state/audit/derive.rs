//! Which records a transaction makes, from the state before and after it.
//!
//! A field of a node or of the cluster that is not named here as ordinary makes a record when it changes: what somebody
//! adds to those objects is audited until somebody decides that it need not be.
//!
//! Every word here, the order of the records and each limit (`limits::AUDIT_*`) is replicated behaviour: a manager that
//! writes another record of the same transaction has another log from there on, and is taken for one that was tampered
//! with. So they change only with the command level, and never for transactions of a level that was released.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_proto::wire::{
    AuditAction as Action, AuditNote, AuditRecord, Autolock, Cluster, Kind, Node, NodeKey, Role, Rotation,
    Secret, Service, ServiceSpec, Task, Ticket, Transaction, change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{NodeId, limits};
use sha2::{Digest as _, Sha256};

use super::super::{Key, State, object};

/// The records of a transaction that changed `before` into `after`. `changed` is every key whose object it wrote or
/// deleted, each once, by kind and id.
pub(in super::super) fn records(
    before: &State,
    after: &State,
    transaction: &Transaction,
    changed: &BTreeSet<Key>,
) -> Vec<AuditRecord> {
    let mut derived = Derived {
        before,
        after,
        transaction,
        folded: Folded::of(before, after, changed),
        records: Vec::new(),
        sealed_anew: BTreeMap::new(),
        accesses: BTreeSet::new(),
        further: BTreeMap::new(),
    };
    for key in changed {
        derived.object(*key);
    }
    derived.resealed();
    derived.accessed_further();
    for change in &transaction.changes {
        if let Some(Step::Note(note)) = &change.change {
            derived.note(note);
        }
    }
    derived.records
}

/// What one thing that happened changes beside its main object: told by that object's record alone.
struct Folded {
    /// Tickets by which a node was admitted.
    tickets: BTreeSet<Vec<u8>>,
    /// Keys died with their node's removal or quarantine.
    tombstones: bool,
    /// Envelopes were made for a manager that registered its key.
    envelopes: bool,
}

impl Folded {
    fn of(before: &State, after: &State, changed: &BTreeSet<Key>) -> Self {
        let mut folded = Self {
            tickets: BTreeSet::new(),
            tombstones: false,
            envelopes: false,
        };
        for key in changed.iter().filter(|key| key.kind() == Kind::Node) {
            match (node(before, *key), node(after, *key)) {
                (None, Some(new)) => {
                    folded.tickets.insert(new.ticket_id.clone());
                }
                (Some(old), Some(new)) => {
                    folded.tombstones |= old.quarantined_at == 0 && new.quarantined_at != 0;
                    folded.envelopes |= old.envelope_key != new.envelope_key;
                }
                (_, None) => folded.tombstones = true,
            }
        }
        folded
    }
}

struct Derived<'a> {
    before: &'a State,
    after: &'a State,
    transaction: &'a Transaction,
    folded: Folded,
    records: Vec<AuditRecord>,
    /// Secrets by the epoch that they were sealed under anew.
    sealed_anew: BTreeMap<u32, u64>,
    /// Each secret with each node that may be sent it now.
    accesses: BTreeSet<(Key, Key)>,
    /// Secrets by how many more nodes may be sent them than are named one by one.
    further: BTreeMap<Key, u64>,
}

impl Derived<'_> {
    fn object(&mut self, key: Key) {
        let old = self.before.get(key).and_then(|it| it.object.as_ref());
        let new = self.after.get(key).and_then(|it| it.object.as_ref());
        match (old, new) {
            (old, Some(Any::Cluster(new))) => self.cluster(key, as_cluster(old), new),
            (Some(Any::Node(old)), Some(Any::Node(new))) => self.node(key, old, new),
            (_, Some(Any::Node(new))) => self.admitted(key, new),
            (Some(Any::Node(old)), _) => self.add(AuditRecord {
                role: old.role,
                ..self.about(Action::Remove, key, &old.name)
            }),
            (old, Some(Any::Ticket(new))) => self.ticket(key, as_ticket(old), new),
            (Some(Any::Ticket(old)), _) => self.add(AuditRecord {
                role: old.role,
                ..self.about(Action::Remove, key, "")
            }),
            (old, Some(Any::Secret(new))) => self.secret(key, as_secret(old), new),
            (Some(Any::Secret(old)), _) => self.add(self.about(Action::Remove, key, &old.name)),
            (old, Some(Any::Service(new))) => self.granted(key, as_service(old), new),
            (old, Some(Any::Task(new))) => self.placed(as_task(old), new),
            // What runs, and with what, is for the watch: it changes too often for a log that keeps what matters.
            (Some(Any::Service(_) | Any::Task(_) | Any::Image(_) | Any::Cluster(_)) | None, None)
            | (_, Some(Any::Image(_))) => {}
        }
    }

    fn cluster(&mut self, key: Key, old: Option<&Cluster>, new: &Cluster) {
        let Some(old) = old else {
            let root = fingerprint(&new.root_certificate);
            return self.add(AuditRecord {
                key_id: root,
                ..self.about(Action::Create, key, "")
            });
        };
        self.rotation(key, old, new);
        if old.key_ring != new.key_ring && !self.folded.envelopes {
            let epochs = |cluster: &Cluster| cluster.key_ring.iter().map(|it| it.epoch).collect::<Vec<_>>();
            let detail = match (epochs(old), epochs(new)) {
                (old, new) if old == new => "enveloped anew".to_owned(),
                (_, new) => format!("live epochs: {}", joined(&new)),
            };
            self.say(Action::KeyRing, key, detail);
        }
        if old.desired_voters != new.desired_voters {
            let detail = format!("members {}", joined(&new.desired_voters));
            self.say(Action::Voters, key, detail);
        }
        let rest = |cluster: &Cluster| Cluster {
            meta: None,
            root_certificate: Vec::new(),
            root_key: None,
            external_signer: None,
            rotation: None,
            former: Vec::new(),
            key_ring: Vec::new(),
            desired_voters: Vec::new(),
            requests: Vec::new(),
            tombstones: match self.folded.tombstones {
                true => Vec::new(),
                false => cluster.tombstones.clone(),
            },
            // Which keys there are; that a new epoch seals them anew is the key ring's record.
            autolock: cluster.autolock.as_ref().map(|lock| Autolock {
                keys: Vec::new(),
                ..lock.clone()
            }),
            ..cluster.clone()
        };
        let (old, new) = (rest(old), rest(new));
        if old != new {
            let lock = new.autolock.clone().unwrap_or_default();
            let state = if lock.on { "on" } else { "off" };
            let lock = format!(
                "autolock {state}, unlock key {}, confirmed {}",
                lock.generation, lock.confirmed
            );
            let said = [
                (old.autolock != new.autolock, lock.as_str()),
                (old.reseal != new.reseal, "stores are to be sealed anew"),
                (
                    old.root_exposed != new.root_exposed,
                    "the root is due to be rotated",
                ),
                (old.settings != new.settings, "settings"),
                (old.recovery_key != new.recovery_key, "the recovery key"),
                (old.tombstones != new.tombstones, "removed keys"),
                (old.level != new.level, "command level"),
                (old.epoch != new.epoch, "epoch"),
            ];
            self.say(Action::Change, key, what(&said));
        }
    }

    fn rotation(&mut self, key: Key, old: &Cluster, new: &Cluster) {
        let unsealed =
            |rotation: &Option<Rotation>| rotation.clone().map(|it| Rotation { root_key: None, ..it });
        let (was, is) = (&unsealed(&old.rotation), &unsealed(&new.rotation));
        let (detail, root) = match (was, is) {
            (None, Some(begun)) if begun.cross.is_empty() => ("begun, as compromised", &begun.root),
            (None, Some(begun)) => ("begun", &begun.root),
            (Some(was), Some(is)) if was.root != is.root => ("begun anew", &is.root),
            (Some(was), Some(is)) if was.phase != is.phase => ("the new root signs", &is.root),
            (_, _) if old.root_certificate != new.root_certificate => (
                "ended: the old root is dropped, and its key",
                &new.root_certificate,
            ),
            (Some(was), None) => ("cancelled", &was.root),
            (_, _) if was != is => ("changed", &new.root_certificate),
            (_, _) if old.external_signer != new.external_signer => {
                ("the root's external signer is elsewhere", &new.root_certificate)
            }
            (_, _) if old.former != new.former => ("a former root is forgotten", &new.root_certificate),
            (_, _) if old.root_key != new.root_key || old.rotation != new.rotation => {
                return self.say(Action::KeyRing, key, "the root's key is sealed anew".into());
            }
            (_, _) => return,
        };
        self.add(AuditRecord {
            key_id: fingerprint(root),
            detail: detail.into(),
            ..self.about(Action::Rotate, key, "")
        });
    }

    fn admitted(&mut self, key: Key, new: &Node) {
        let issued = new.role() == Role::Operator && new.ticket_id.is_empty();
        let action = if issued { Action::Issue } else { Action::Join };
        let ticket = new.ticket_id.as_slice().try_into().ok();
        self.add(AuditRecord {
            related: ticket.map(|id| Key::new(Kind::Ticket, id).to_wire()),
            ..self.certified(action, key, new)
        });
    }

    fn node(&mut self, key: Key, old: &Node, new: &Node) {
        if let (None, Some(clone)) = (&old.clone_seen, &new.clone_seen) {
            let mut detail = "a superseded key of it was shown".to_owned();
            if !clone.address.is_empty() {
                detail += &format!(" from {}", clone.address);
            }
            if old.quarantined_at == 0 && new.quarantined_at != 0 {
                detail += "; it is in quarantine";
            }
            return self.add(AuditRecord {
                role: new.role,
                key_id: clone.key_id.clone(),
                detail,
                ..self.about(Action::Clone, key, &new.name)
            });
        }
        if old.quarantined_at == 0 && new.quarantined_at != 0 {
            return self.add(AuditRecord {
                role: new.role,
                ..self.about(Action::Quarantine, key, &new.name)
            });
        }
        if (old.role, old.wanted_role) != (new.role, new.wanted_role) {
            let detail = match (old.role == new.role, new.wanted_role()) {
                (false, _) => format!("was {}", word(old.role())),
                (true, Role::Unspecified) => "stays what it is".to_owned(),
                (true, wanted) => format!("is to be {}", word(wanted)),
            };
            return self.add(AuditRecord {
                detail,
                ..self.certified(Action::Role, key, new)
            });
        }
        if new.keys.iter().any(|key| !old.keys.contains(key)) {
            return self.add(self.certified(Action::Renew, key, new));
        }
        if new.store != old.store {
            return self.add(AuditRecord {
                role: new.role,
                detail: format!(
                    "its store was lost: member {} is {} now",
                    old.member_id, new.member_id
                ),
                ..self.about(Action::Role, key, &new.name)
            });
        }
        let detail = match (old.envelope_key != new.envelope_key, new.opened_epoch) {
            (true, _) => "registered: every live epoch is enveloped to it".to_owned(),
            (false, epoch) if epoch != old.opened_epoch => format!("opens epoch {epoch}"),
            (false, _) => String::new(),
        };
        if !detail.is_empty() {
            return self.add(AuditRecord {
                role: new.role,
                detail,
                ..self.about(Action::KeyRing, key, &new.name)
            });
        }
        let kept = |node: &Node| Node {
            // A worker's is where its connection comes from.
            address: match node.role() {
                Role::Manager => node.address.clone(),
                Role::Worker | Role::Standby | Role::Operator | Role::Unspecified => String::new(),
            },
            ..without_ordinary(node)
        };
        let (was, is) = (kept(old), kept(new));
        if was != is {
            let labels: Vec<String> = is
                .labels
                .iter()
                .map(|it| format!("{}={}", it.key, it.value))
                .collect();
            let said = [
                (was.labels != is.labels, &*format!("labels {}", labels.join(","))),
                (was.name != is.name, "name"),
                (was.address != is.address, "address"),
                (was.keys != is.keys, "keys"),
                (
                    was.locked_with != is.locked_with,
                    "the unlock key of its key file",
                ),
                (was.resealed != is.resealed, "its store is sealed anew"),
                (
                    was.clone_seen != is.clone_seen,
                    "the alarm about a clone was cleared",
                ),
            ];
            self.add(AuditRecord {
                role: new.role,
                detail: what(&said),
                ..self.about(Action::Change, key, &new.name)
            });
        }
    }

    fn ticket(&mut self, key: Key, old: Option<&Ticket>, new: &Ticket) {
        if old.is_some() && self.folded.tickets.contains(&new.id) {
            return;
        }
        let action = if old.is_some() {
            Action::Change
        } else {
            Action::Create
        };
        let mut detail = format!("uses left: {}", new.uses_left);
        for (of, these, word) in [
            (old, new, "waits"),
            (Some(new), old.unwrap_or(new), "waits no more"),
        ] {
            let known = |key: &[u8]| of.is_some_and(|it| it.waiting.iter().any(|one| one.key_id == key));
            for one in these.waiting.iter().filter(|one| !known(&one.key_id)) {
                detail.push_str(&format!("; {} {word}", one.name));
            }
        }
        self.add(AuditRecord {
            role: new.role,
            until: new.expires_at,
            detail,
            ..self.about(action, key, "")
        });
    }

    fn secret(&mut self, key: Key, old: Option<&Secret>, new: &Secret) {
        let Some(old) = old else {
            return self.add(self.about(Action::Create, key, &new.name));
        };
        let epoch = |secret: &Secret| secret.value.as_ref().map_or(0, |it| it.epoch);
        let same_but_sealed = Secret {
            meta: old.meta.clone(),
            value: old.value.clone(),
            ..new.clone()
        } == *old;
        if same_but_sealed && epoch(new) > epoch(old) {
            *self.sealed_anew.entry(epoch(new)).or_default() += 1;
        } else {
            self.add(self.about(Action::Change, key, &new.name));
        }
    }

    /// A new epoch seals every secret anew, in few transactions: one record for all that one of them sealed.
    fn resealed(&mut self) {
        let cluster = self.after.list(Kind::Cluster).next();
        let Some(key) = cluster.and_then(|it| object::key(it)) else {
            return;
        };
        for (epoch, count) in std::mem::take(&mut self.sealed_anew) {
            self.add(AuditRecord {
                count,
                detail: format!("secrets sealed anew under epoch {epoch}"),
                ..self.about(Action::KeyRing, key, "")
            });
        }
    }

    /// Each secret that the service may use from now on.
    fn granted(&mut self, key: Key, old: Option<&Service>, new: &Service) {
        let secrets = |service: &Service| -> BTreeSet<Vec<u8>> {
            let spec = newest(service).map_or(&[][..], |spec| &spec.secrets);
            spec.iter().map(|it| it.secret_id.clone()).collect()
        };
        let had = old.map(secrets).unwrap_or_default();
        let name = newest(new).map_or("", |spec| &spec.name);
        for secret in secrets(new).difference(&had) {
            let Some(secret) = key_of(Kind::Secret, secret) else {
                continue;
            };
            self.add(AuditRecord {
                related: Some(key.to_wire()),
                related_name: name.into(),
                ..self.about(Action::Grant, secret, self.name(secret))
            });
        }
    }

    /// Each secret that a node may be sent now, since a task that uses it was placed there.
    fn placed(&mut self, old: Option<&Task>, new: &Task) {
        if old.is_some_and(|old| old.node_id == new.node_id) {
            return;
        }
        let Some(node) = key_of(Kind::Node, &new.node_id) else {
            return;
        };
        let service = key_of(Kind::Service, &new.service_id).and_then(|key| self.after.get(key));
        let Some(Any::Service(service)) = service.and_then(|it| it.object.as_ref()) else {
            return;
        };
        let version = service.versions.iter().find(|it| it.number == new.spec_version);
        let Some(spec) = version.and_then(|it| it.spec.as_ref()) else {
            return;
        };
        for secret in &spec.secrets {
            let Some(secret) = key_of(Kind::Secret, &secret.secret_id) else {
                continue;
            };
            if self.after.audit.knows_access(secret, node, self.transaction.at)
                || !self.accesses.insert((secret, node))
            {
                continue;
            }
            if self.accesses.len() > limits::AUDIT_ACCESSES {
                *self.further.entry(secret).or_default() += 1;
                continue;
            }
            self.add(AuditRecord {
                related: Some(node.to_wire()),
                related_name: self.name(node).into(),
                detail: format!("service {}", spec.name),
                ..self.about(Action::Access, secret, self.name(secret))
            });
        }
    }

    /// Accesses beyond those that are named: by secret with the number of nodes, and beyond that in one record, so that one
    /// transaction does not push everything else out of the log.
    fn accessed_further(&mut self) {
        let mut further = std::mem::take(&mut self.further).into_iter();
        for (secret, count) in further.by_ref().take(limits::AUDIT_ACCESSES) {
            self.add(AuditRecord {
                count,
                detail: "further nodes, too many at once to name".into(),
                ..self.about(Action::Access, secret, self.name(secret))
            });
        }
        let cluster = self.after.list(Kind::Cluster).next();
        let (Some(key), count @ 1..) = (
            cluster.and_then(|it| object::key(it)),
            further.map(|(_, count)| count).sum::<u64>(),
        ) else {
            return;
        };
        self.add(AuditRecord {
            count,
            detail: "further secrets and nodes, too many at once to name".into(),
            ..self.about(Action::Access, key, "")
        });
    }

    fn note(&mut self, note: &AuditNote) {
        let reporter = principal(&self.transaction.actor);
        self.records.push(AuditRecord {
            action: note.action,
            actor: cut(&note.actor),
            actor_name: principal(&note.actor).map_or_else(String::new, |it| self.name(it).into()),
            related: reporter.map(Key::to_wire),
            related_name: reporter.map_or_else(String::new, |it| self.name(it).into()),
            address: cut(&note.address),
            detail: cut(&note.detail),
            count: note.count,
            ..self.of_transaction()
        });
    }

    fn certified(&self, action: Action, key: Key, node: &Node) -> AuditRecord {
        let newest = node.keys.last().cloned().unwrap_or_default();
        let NodeKey {
            key_id, not_after, ..
        } = newest;
        AuditRecord {
            role: node.role,
            key_id,
            until: not_after,
            ..self.about(action, key, &node.name)
        }
    }

    fn say(&mut self, action: Action, key: Key, detail: String) {
        self.add(AuditRecord {
            detail,
            ..self.about(action, key, "")
        });
    }

    fn about(&self, action: Action, key: Key, name: &str) -> AuditRecord {
        let actor = &self.transaction.actor;
        AuditRecord {
            action: action.into(),
            actor: cut(actor),
            actor_name: principal(actor).map_or_else(String::new, |it| self.name(it).into()),
            object: Some(key.to_wire()),
            name: cut(name),
            count: 1,
            ..self.of_transaction()
        }
    }

    fn of_transaction(&self) -> AuditRecord {
        AuditRecord {
            index: self.after.index(),
            at: self.transaction.at,
            request_id: self.transaction.request_id.clone(),
            ..Default::default()
        }
    }

    fn add(&mut self, mut record: AuditRecord) {
        record.detail = cut(&record.detail);
        record.related_name = cut(&record.related_name);
        self.records.push(record);
    }

    /// The name of an object, also of one that this transaction removed.
    fn name(&self, key: Key) -> &str {
        let found = self.after.get(key).or_else(|| self.before.get(key));
        found.and_then(|it| object::name(it)).unwrap_or_default()
    }
}

/// A node without what changes all the time, and with what an operator does to its tasks alone.
fn without_ordinary(node: &Node) -> Node {
    Node {
        meta: None,
        description: None,
        status: 0,
        status_reason: String::new(),
        status_since: 0,
        availability: 0,
        trusts: Vec::new(),
        issuer: Vec::new(),
        clock_ahead_ms: 0,
        clock_measured_at: 0,
        // What they tell of has a record: the renewal.
        superseded: Vec::new(),
        ..node.clone()
    }
}

/// The node of a principal, which is written as `role/id`.
fn principal(actor: &str) -> Option<Key> {
    let (_, id) = actor.split_once('/')?;
    let id: NodeId = id.parse().ok()?;
    Some(Key::new(Kind::Node, *id.as_bytes()))
}

fn key_of(kind: Kind, id: &[u8]) -> Option<Key> {
    Some(Key::new(kind, id.try_into().ok()?))
}

fn node(state: &State, key: Key) -> Option<&Node> {
    match state.get(key)?.object.as_ref()? {
        Any::Node(node) => Some(node),
        _ => None,
    }
}

macro_rules! typed {
    ($($name:ident: $kind:ident;)*) => {$(
        fn $name(object: Option<&Any>) -> Option<&$kind> {
            match object {
                Some(Any::$kind(it)) => Some(it),
                _ => None,
            }
        }
    )*};
}

typed! {
    as_cluster: Cluster;
    as_secret: Secret;
    as_service: Service;
    as_task: Task;
    as_ticket: Ticket;
}

fn newest(service: &Service) -> Option<&ServiceSpec> {
    service.versions.last()?.spec.as_ref()
}

fn word(role: Role) -> &'static str {
    match role {
        Role::Manager => "a manager",
        Role::Standby => "a standby",
        Role::Worker => "a worker",
        Role::Operator => "an operator",
        Role::Unspecified => "nothing",
    }
}

fn fingerprint(root: &[u8]) -> Vec<u8> {
    Sha256::digest(root).to_vec()
}

fn joined<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// What changed of what is known by a word; a field without one is "other".
fn what(said: &[(bool, &str)]) -> String {
    let words: Vec<&str> = said
        .iter()
        .filter(|(changed, _)| *changed)
        .map(|(_, word)| *word)
        .collect();
    match words[..] {
        [] => "other".to_owned(),
        [..] => words.join(", "),
    }
}

fn cut(text: &str) -> String {
    text.chars().take(limits::AUDIT_TEXT_CHARS).collect()
}
