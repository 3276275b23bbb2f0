//! What one committed transaction does to the state: all of it, or nothing with a reason.

use std::sync::Arc;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    AuditAction, AuditNote, Change, Event, JudgeWaiting, KeyRingEpoch, Kind, Meta, Node, Object, Outcome,
    Precondition, Rejection, RejectionCode as Code, Role, Sealed, Secret, Task, TaskObserved, TaskState,
    Ticket, TicketUse, Tombstone, Transaction, change::Change as Step, event, object::Object as Any,
    precondition::Precondition as Condition,
};
use prost::Message as _;

use super::{Key, State, audit, object};
use crate::planted::{Bug, planted};

/// The highest command level that this program applies.
pub const LEVEL: u32 = 1;

/// Requests that the cluster object remembers. The leader and other managers change it, too, between an operator's request and
/// its retry some seconds later.
const REQUESTS: usize = 16;

/// Removed keys that are remembered at once. They are part of the cluster object, which is written whole: 60 KB with
/// these. Beyond it the oldest key of a worker or operator is forgotten: those are served by a positive list anyway, so
/// their tombstones only add to it. A manager's is never forgotten early, since Raft methods know no other list.
pub(super) const TOMBSTONES: usize = 1_024;
/// A removed key is forgotten after this time beyond the validity of certificates: by then its certificate has expired,
/// the grace for enrolling again (30 d at most) is over, and no clock is that wrong.
const TOMBSTONE_GRACE_MS: i64 = 31 * 86_400_000;

/// Why a node with a ticket that asks for approval is not made.
const UNAPPROVED: &str = "the ticket asks for an operator's approval";

/// What an entry did. A rejected one changed nothing but the index.
#[derive(Debug)]
pub struct Applied {
    pub outcome: Outcome,
    pub events: Vec<Event>,
}

/// The replica cannot know what this entry means, and must stop before it differs from the others.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FatalApply {
    #[error("entry {index} has command level {level}; this program knows up to {LEVEL}: install a newer one")]
    UnknownLevel { index: u64, level: u32 },
    #[error("entry {index} is no transaction")]
    Undecodable { index: u64 },
}

impl State {
    /// Applies the entry at `index`, committed in `term`.
    pub fn apply(&mut self, index: u64, term: u64, bytes: &[u8]) -> Result<Applied, FatalApply> {
        let transaction = Transaction::decode(bytes).map_err(|_| FatalApply::Undecodable { index })?;
        if transaction.level == 0 || transaction.level > LEVEL {
            return Err(FatalApply::UnknownLevel {
                index,
                level: transaction.level,
            });
        }
        self.index = index;
        let mut step = Run {
            state: self.clone(),
            before: self,
            transaction: &transaction,
            index,
            events: Vec::new(),
        };
        let rejection = match step.run(term) {
            Ok(()) => {
                step.audit();
                let Run { state, events, .. } = step;
                *self = state;
                return Ok(Applied {
                    outcome: Outcome {
                        index,
                        rejection: None,
                    },
                    events,
                });
            }
            Err(rejection) => Some(rejection),
        };
        let rejection = rejection.filter(|_| !planted(Bug::CallsRefusedMade));
        Ok(Applied {
            outcome: Outcome { index, rejection },
            events: Vec::new(),
        })
    }

    /// A transaction without an entry (a blank one, a change of members) moves only the index.
    pub fn skip(&mut self, index: u64) {
        self.index = index;
    }
}

/// One transaction under way, on a copy that is dropped when it is refused.
struct Run<'a> {
    state: State,
    before: &'a State,
    transaction: &'a Transaction,
    index: u64,
    events: Vec<Event>,
}

fn reject(code: Code, key: Option<Key>, detail: &str) -> Rejection {
    Rejection {
        code: code.into(),
        object: key.map(Key::to_wire),
        detail: detail.to_owned(),
    }
}

fn invalid(detail: &str) -> Rejection {
    reject(Code::Invalid, None, detail)
}

impl Run<'_> {
    fn run(&mut self, term: u64) -> Result<(), Rejection> {
        let transaction = self.transaction;
        if transaction.preconditions.len() > limits::PRECONDITIONS
            || transaction.changes.len() > limits::CHANGES
        {
            return Err(invalid("too many preconditions or changes"));
        }
        if transaction.term != 0 && transaction.term != term {
            return Err(reject(Code::Term, None, "planned in an older term"));
        }
        // Before the preconditions: what this request itself changed has moved past them.
        if self.is_retry() {
            return Ok(());
        }
        transaction
            .preconditions
            .iter()
            .try_for_each(|condition| self.check(condition))?;
        transaction
            .changes
            .iter()
            .try_for_each(|change| self.change(change))?;
        self.check_key_ring()?;
        self.check_sealed()
    }

    /// Writes down what this transaction did, if that is what the audit log is for.
    fn audit(&mut self) {
        let notes = self.transaction.changes.iter();
        let notes = notes
            .filter(|it| matches!(it.change, Some(Step::Note(_))))
            .count();
        // A note leaves no object that a retry would find itself by.
        let noted = notes > 0 && self.state.audit.has_request(&self.transaction.request_id);
        if noted || (notes == 0 && self.events.is_empty()) {
            return;
        }
        let changed = self.events.iter().filter_map(|event| match &event.change {
            Some(event::Change::Put(object)) => object::key(object),
            Some(event::Change::Deleted(reference)) => Key::from_wire(reference),
            None => None,
        });
        let records = audit::records(self.before, &self.state, self.transaction, &changed.collect());
        if !records.is_empty() {
            let log = Arc::make_mut(&mut self.state.audit);
            records.into_iter().for_each(|record| log.append(record));
        }
    }

    /// A key-ring epoch that this transaction made or changed is enveloped to every manager that has registered a key:
    /// a manager that is left out could never lead. Judged at the end, since a registration is two changes.
    fn check_key_ring(&self) -> Result<(), Rejection> {
        let before = self.before.list(Kind::Cluster).next();
        let Some(after) = self.state.list(Kind::Cluster).next() else {
            return Ok(());
        };
        let known = before.map_or(&[][..], |before| key_ring(before));
        let changed = key_ring(after).iter().filter(|epoch| !known.contains(epoch));
        for epoch in changed {
            let has = |id: &[u8]| epoch.envelopes.iter().any(|envelope| envelope.node_id == id);
            let left_out = self.state.list(Kind::Node).find(|node| match &node.object {
                Some(Any::Node(node)) => {
                    node.role() == Role::Manager && !node.envelope_key.is_empty() && !has(&node.id)
                }
                _ => false,
            });
            if let Some(node) = left_out {
                return Err(reject(
                    Code::Invalid,
                    object::key(node),
                    "a key-ring epoch leaves out this manager",
                ));
            }
        }
        Ok(())
    }

    /// What is sealed stays under an epoch of the ring: nobody could open it otherwise. A value that was sealed before its
    /// epoch went is stale, and is sealed again by whoever brings it.
    fn check_sealed(&self) -> Result<(), Rejection> {
        let Some(cluster) = self.state.list(Kind::Cluster).next() else {
            return Ok(());
        };
        let ring = key_ring(cluster);
        if ring.is_empty() {
            return Ok(()); // nothing can be sealed yet
        }
        let before = self.before.list(Kind::Cluster).next();
        let known = |epoch: u32| ring.iter().any(|it| it.epoch == epoch);
        let shrunk = before.is_some_and(|before| key_ring(before).iter().any(|it| !known(it.epoch)));
        let stale = match shrunk {
            true => self.state.list(Kind::Secret).find(|it| !sealed_under(it, known)),
            false => self.written().find(|it| !sealed_under(it, known)),
        };
        match stale.or_else(|| (!sealed_under(cluster, known)).then_some(cluster)) {
            None => Ok(()),
            Some(object) => Err(reject(
                Code::Stale,
                object::key(object),
                "it is sealed under a key-ring epoch that is no more",
            )),
        }
    }

    /// What the cluster object remembers of requests, this one included unless it is a leader's step.
    fn requests(&self, before: Option<&Arc<Object>>) -> Vec<Vec<u8>> {
        let mut requests = match before.and_then(|before| before.object.as_ref()) {
            Some(Any::Cluster(before)) => before.requests.clone(),
            _ => Vec::new(),
        };
        let request = &self.transaction.request_id;
        if self.transaction.term == 0 && !request.is_empty() && !requests.contains(request) {
            requests.push(request.clone());
        }
        let surplus = requests.len().saturating_sub(REQUESTS);
        requests.drain(..surplus);
        requests
    }

    /// The objects that this transaction wrote, as they stand.
    fn written(&self) -> impl Iterator<Item = &Arc<Object>> {
        let changes = self.transaction.changes.iter();
        changes.filter_map(|change| match &change.change {
            Some(Step::Create(object) | Step::Replace(object)) => self.state.get(object::key(object)?),
            _ => None,
        })
    }

    /// A key that was removed never comes back, under whichever node.
    fn check_keys(&self, key: Key, new: &Node) -> Result<(), Rejection> {
        let cluster = self.state.list(Kind::Cluster).next();
        let removed = match cluster.and_then(|it| it.object.as_ref()) {
            Some(Any::Cluster(cluster)) => cluster.tombstones.as_slice(),
            _ => return Ok(()),
        };
        let old = match self.state.get(key).and_then(|old| old.object.as_ref()) {
            Some(Any::Node(old)) => old.keys.as_slice(),
            _ => &[],
        };
        let brought = new
            .keys
            .iter()
            .filter(|new| old.iter().all(|old| old.key_id != new.key_id));
        for new in brought {
            if removed.iter().any(|it| it.key_id == new.key_id) {
                return Err(reject(
                    Code::Invalid,
                    Some(key),
                    "this key was removed from the cluster",
                ));
            }
        }
        Ok(())
    }

    /// Transactions are whole, so one object that this request wrote last proves that all of it was done. Everything
    /// it would create must be there too: a request id comes from outside, and another transaction under a known one
    /// (a second node on a used-up ticket) must not pass for done. A ticket proves nothing, since others use it.
    fn is_retry(&self) -> bool {
        if planted(Bug::RepeatsRequest) {
            return false;
        }
        let request = &self.transaction.request_id;
        let mut wrote = false;
        for change in &self.transaction.changes {
            let (object, creates) = match &change.change {
                Some(Step::Create(object)) => (object, true),
                Some(Step::Replace(object)) => (object, false),
                _ => continue,
            };
            let found = object::key(object).and_then(|key| self.state.get(key));
            if creates && found.is_none() {
                return false;
            }
            wrote |= found.is_some_and(|found| wrote_it(found, request));
        }
        wrote && !request.is_empty()
    }

    fn check(&self, precondition: &Precondition) -> Result<(), Rejection> {
        let (reference, wanted) = match &precondition.precondition {
            Some(Condition::VersionIs(it)) => (it.object.as_ref(), Some(Some(it.version))),
            Some(Condition::Exists(it)) => (Some(it), Some(None)),
            Some(Condition::Absent(it)) => (Some(it), None),
            None => return Err(invalid("empty precondition")),
        };
        let key = reference
            .and_then(Key::from_wire)
            .ok_or_else(|| invalid("malformed reference"))?;
        let version = self
            .state
            .get(key)
            .map(|it| object::meta(it).map_or(0, |meta| meta.version));
        let holds = match wanted {
            Some(Some(_)) if planted(Bug::IgnoresPrecondition) => version.is_some(),
            Some(Some(wanted)) => version == Some(wanted),
            Some(None) => version.is_some(),
            None => version.is_none(),
        };
        if holds {
            Ok(())
        } else {
            Err(reject(Code::Stale, Some(key), "a precondition does not hold"))
        }
    }

    fn change(&mut self, change: &Change) -> Result<(), Rejection> {
        match change.change.as_ref() {
            Some(Step::Create(object)) => self.create(object),
            Some(Step::Replace(object)) => self.replace(object),
            Some(Step::Delete(reference)) => {
                self.delete(Key::from_wire(reference).ok_or_else(|| invalid("malformed reference"))?)
            }
            Some(Step::UseTicket(ticket)) => self.use_ticket(ticket),
            Some(Step::JudgeWaiting(judgement)) => self.judge_waiting(judgement),
            Some(Step::TaskObserved(report)) => self.observe(report),
            Some(Step::AddTombstone(add)) => self.add_tombstone(add.tombstone.as_ref()),
            Some(Step::Note(note)) => check_note(note),
            None => Err(invalid("empty change")),
        }
    }

    fn create(&mut self, object: &Object) -> Result<(), Rejection> {
        let key = object::key(object).ok_or_else(|| invalid("malformed object"))?;
        if self.state.get(key).is_some() {
            return Err(reject(Code::Exists, Some(key), "the id is taken"));
        }
        // A copy of a request can come late, from a manager that stood still meanwhile.
        let request = &self.transaction.request_id;
        if !request.is_empty() && self.state.audit.has_request_of(request, key) {
            return Err(reject(
                Code::NotFound,
                Some(key),
                "this request made it, and it was removed since",
            ));
        }
        let mut new = object.clone();
        if let Some(Any::Node(node)) = &mut new.object {
            self.check_ticket(key, node)?;
            node.member_id = self.new_member_id(node);
        }
        self.put(key, new)
    }

    /// A member id is never used twice, so it is the index of the entry that admits the manager. The first manager
    /// comes with the cluster object, and is member 1: entry 1 is the first membership, never a transaction.
    fn new_member_id(&self, node: &Node) -> u64 {
        let first = self.transaction.changes.iter().any(|change| {
            matches!(
                &change.change,
                Some(Step::Create(Object {
                    object: Some(Any::Cluster(_))
                }))
            )
        });
        match (node.role() == Role::Manager, first) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) => self.index,
        }
    }

    fn replace(&mut self, object: &Object) -> Result<(), Rejection> {
        let key = object::key(object).ok_or_else(|| invalid("malformed object"))?;
        let old = self.existing(key)?;
        let mut new = object.clone();
        match (old.object.as_ref(), new.object.as_mut()) {
            (Some(Any::Task(old)), Some(Any::Task(new))) => keep_observed(old, new)?,
            (Some(Any::Cluster(old)), Some(Any::Cluster(new))) => {
                if new.level < old.level || new.epoch < old.epoch {
                    return Err(reject(Code::Invalid, Some(key), "level and epoch never fall"));
                }
                // Only `AddTombstone` writes them: a plan made before one was added cannot take it back.
                new.tombstones.clone_from(&old.tombstones);
            }
            (Some(Any::Node(old)), Some(Any::Node(new))) => {
                new.member_id = match (new.role == old.role, new.store == old.store) {
                    (true, true) => old.member_id,
                    (true, false) => self.check_store(key, new)?,
                    (false, _) => self.check_role(key, old, new)?,
                };
            }
            _ => {}
        }
        self.put(key, new)
    }

    /// A standby becomes a manager, and a manager that counts for nothing any more a standby, where an operator wanted
    /// it: its member id then. No other role ever changes.
    fn check_role(&self, key: Key, old: &Node, new: &Node) -> Result<u64, Rejection> {
        let wanted = old.wanted_role == new.role;
        match (old.role(), new.role()) {
            (Role::Standby, Role::Manager) if wanted => Ok(self.index),
            (Role::Manager, Role::Standby) if wanted => {
                let cluster = self.state.list(Kind::Cluster).next();
                let counts = matches!(
                    cluster.and_then(|it| it.object.as_ref()),
                    Some(Any::Cluster(cluster)) if cluster.desired_voters.contains(&old.member_id)
                );
                match counts || !new.envelope_key.is_empty() || new.opened_epoch != 0 {
                    true => Err(reject(
                        Code::Invalid,
                        Some(key),
                        "the manager still counts for the quorum",
                    )),
                    false => Ok(0),
                }
            }
            _ => Err(reject(
                Code::Invalid,
                Some(key),
                "a node never changes its role unasked",
            )),
        }
    }

    /// A manager with another store is another member: what it acknowledged as the former one is nowhere. It proves anew
    /// that it opens the key ring before it counts.
    fn check_store(&self, key: Key, new: &Node) -> Result<u64, Rejection> {
        match new.role() == Role::Manager && new.opened_epoch == 0 {
            true => Ok(self.index),
            false => Err(reject(
                Code::Invalid,
                Some(key),
                "only a manager has a store, and a new one proves nothing yet",
            )),
        }
    }

    fn delete(&mut self, key: Key) -> Result<(), Rejection> {
        if key.kind() == Kind::Cluster {
            return Err(reject(
                Code::Invalid,
                Some(key),
                "the cluster object is never deleted",
            ));
        }
        if self.state.is_needed(key) {
            return Err(reject(Code::Referenced, Some(key), "another object refers to it"));
        }
        if self.state.remove(key).is_some() {
            self.event(event::Change::Deleted(key.to_wire()));
        }
        Ok(())
    }

    fn use_ticket(&mut self, ticket_use: &TicketUse) -> Result<(), Rejection> {
        let (key, mut ticket) = self.ticket(&ticket_use.ticket_id)?;
        if ticket.expires_at <= self.transaction.at {
            return Err(reject(Code::Ticket, Some(key), "the ticket expired"));
        }
        ticket.uses_left = ticket
            .uses_left
            .checked_sub(1)
            .ok_or_else(|| reject(Code::Ticket, Some(key), "the ticket is used up"))?;
        match (&ticket_use.waiting, ticket.approve) {
            (None, false) => {}
            (Some(waiting), true) => {
                let known = |id: &[u8]| id == waiting.key_id;
                let waits = ticket.waiting.iter().any(|it| known(&it.key_id));
                if waiting.key_id.len() != 32 || waits || ticket.rejected.iter().any(|id| known(id)) {
                    return Err(reject(
                        Code::Ticket,
                        Some(key),
                        "this key waits already, or was rejected",
                    ));
                }
                if ticket.waiting.len() >= limits::TICKET_WAITING {
                    return Err(reject(Code::Ticket, Some(key), "too many wait with this ticket"));
                }
                ticket.waiting.push(waiting.clone());
            }
            (None, true) => return Err(reject(Code::Ticket, Some(key), UNAPPROVED)),
            (Some(_), false) => return Err(invalid("the ticket asks for no approval")),
        }
        self.put(key, ticket_object(ticket))
    }

    /// An operator's word about someone who waits. Admission comes with the creation of the node.
    fn judge_waiting(&mut self, judgement: &JudgeWaiting) -> Result<(), Rejection> {
        let (key, mut ticket) = self.ticket(&judgement.ticket_id)?;
        let place = ticket.waiting.iter().position(|it| it.key_id == judgement.key_id);
        let place = place.ok_or_else(|| reject(Code::NotFound, Some(key), "nobody with this key waits"))?;
        if judgement.admit && ticket.expires_at <= self.transaction.at {
            return Err(reject(Code::Ticket, Some(key), "the ticket expired"));
        }
        let judged = ticket.waiting.remove(place);
        if !judgement.admit {
            if ticket.rejected.len() >= limits::TICKET_WAITING {
                ticket.rejected.remove(0);
            }
            ticket.rejected.push(judged.key_id);
        }
        self.put(key, ticket_object(ticket))
    }

    fn ticket(&self, id: &[u8]) -> Result<(Key, Ticket), Rejection> {
        let id = id.try_into().map_err(|_| invalid("malformed ticket id"))?;
        let key = Key::new(Kind::Ticket, id);
        match &self.existing(key)?.object {
            Some(Any::Ticket(ticket)) => Ok((key, ticket.clone())),
            _ => Err(invalid("not a ticket")),
        }
    }

    /// A node is what its ticket says: of the one name, and approved, where the ticket asks for that. A ticket that is
    /// gone asks for nothing: whoever uses it is refused before.
    fn check_ticket(&self, key: Key, node: &Node) -> Result<(), Rejection> {
        let Ok((_, ticket)) = self.ticket(&node.ticket_id) else {
            return Ok(());
        };
        if !ticket.for_node.is_empty() && ticket.for_node != node.name {
            return Err(reject(
                Code::Ticket,
                Some(key),
                "the ticket is for a node of another name",
            ));
        }
        let approved = |change: &Change| match &change.change {
            Some(Step::JudgeWaiting(it)) => {
                let [of_node] = node.keys.as_slice() else {
                    return false;
                };
                it.admit && it.ticket_id == node.ticket_id && it.key_id == of_node.key_id
            }
            _ => false,
        };
        if ticket.approve && !self.transaction.changes.iter().any(approved) {
            return Err(reject(Code::Ticket, Some(key), UNAPPROVED));
        }
        Ok(())
    }

    /// Reports come in batches from many workers, so one that does not count is passed over, not refused.
    fn observe(&mut self, report: &TaskObserved) -> Result<(), Rejection> {
        let id = report
            .task_id
            .as_slice()
            .try_into()
            .map_err(|_| invalid("malformed task id"))?;
        let key = Key::new(Kind::Task, id);
        let status = report
            .status
            .as_ref()
            .ok_or_else(|| invalid("a report without a status"))?;
        let state = TaskState::try_from(status.state).map_err(|_| invalid("unknown task state"))?;
        if state < TaskState::Preparing || state == TaskState::Lost {
            return Err(reject(
                Code::Invalid,
                Some(key),
                "not a state that a worker reports",
            ));
        }
        let Some(old) = self.state.get(key).cloned() else {
            return Ok(());
        };
        let mut object = Object::clone(&*old);
        let Some(Any::Task(task)) = &mut object.object else {
            return Ok(());
        };
        let current = observed(task);
        let owner = !task.node_id.is_empty() && task.node_id == report.node_id;
        if !owner || is_over(current) || status.state < current || task.status.as_ref() == Some(status) {
            return Ok(());
        }
        task.status = Some(status.clone());
        self.put(key, object)
    }

    fn add_tombstone(&mut self, tombstone: Option<&Tombstone>) -> Result<(), Rejection> {
        let mut tombstone = tombstone
            .filter(|it| it.key_id.len() == 32)
            .cloned()
            .ok_or_else(|| invalid("malformed tombstone"))?;
        tombstone.role = self.role_before(&tombstone.node_id).into();
        let Some(old) = self.state.list(Kind::Cluster).next().cloned() else {
            return Err(reject(Code::NotFound, None, "there is no cluster object yet"));
        };
        let mut object = Object::clone(&*old);
        let key = object::key(&object).ok_or_else(|| invalid("malformed object"))?;
        let Some(Any::Cluster(cluster)) = &mut object.object else {
            return Err(invalid("not a cluster"));
        };
        if cluster.tombstones.iter().any(|it| it.key_id == tombstone.key_id) {
            return Ok(());
        }
        let validity = cluster
            .settings
            .map_or(0, |settings| settings.node_certificate_validity_ms)
            .max(millis(limits::NODE_CERTIFICATE_VALIDITY));
        let keep = i64::try_from(validity)
            .unwrap_or(i64::MAX)
            .saturating_add(TOMBSTONE_GRACE_MS);
        let now = self.transaction.at;
        cluster
            .tombstones
            .retain(|it| it.removed_at.saturating_add(keep) > now);
        if cluster.tombstones.len() >= TOMBSTONES {
            let lesser = |it: &Tombstone| matches!(it.role(), Role::Worker | Role::Operator | Role::Standby);
            let oldest = cluster.tombstones.iter().position(lesser).ok_or_else(|| {
                reject(
                    Code::Invalid,
                    Some(key),
                    "too many managers were removed lately; the oldest must expire first",
                )
            })?;
            cluster.tombstones.remove(oldest);
        }
        cluster.tombstones.push(tombstone);
        self.put(key, object)
    }

    /// The role of a node as it was before this transaction, which may delete it.
    fn role_before(&self, node_id: &[u8]) -> Role {
        let node = node_id
            .try_into()
            .ok()
            .and_then(|id| self.before.get(Key::new(Kind::Node, id)));
        match node.and_then(|node| node.object.as_ref()) {
            Some(Any::Node(node)) => node.role(),
            _ => Role::Unspecified,
        }
    }

    fn existing(&self, key: Key) -> Result<Arc<Object>, Rejection> {
        self.state
            .get(key)
            .cloned()
            .ok_or_else(|| reject(Code::NotFound, Some(key), "no such object"))
    }

    /// The one way into the state: what holds for every object is checked here.
    fn put(&mut self, key: Key, mut new: Object) -> Result<(), Rejection> {
        let named = !matches!(key.kind(), Kind::Ticket | Kind::Task);
        match object::name(&new) {
            Some(name) if !name.is_empty() && name.len() <= limits::IMAGE_REFERENCE_CHARS => {
                let holder = self.state.names.get(&(key.kind(), name.into()));
                if holder.is_some_and(|holder| *holder != key) {
                    return Err(reject(Code::NameTaken, Some(key), "another object has this name"));
                }
            }
            None if !named => {}
            _ => {
                return Err(reject(
                    Code::Invalid,
                    Some(key),
                    "the name is missing or too long",
                ));
            }
        }
        if !object::references_well_formed(&new) {
            return Err(reject(Code::Invalid, Some(key), "malformed reference"));
        }
        let references = object::references(&new).into_iter();
        let mut needed = references.filter(|target| object::needs(&new, *target));
        if let Some(missing) = needed.find(|target| self.state.get(*target).is_none()) {
            return Err(reject(
                Code::Dangling,
                Some(missing),
                "refers to an object that is not there",
            ));
        }
        if let Some(Any::Node(node)) = &new.object {
            self.check_keys(key, node)?;
        }
        let before = self.state.get(key);
        let old = before.and_then(|old| object::meta(old));
        // Whoever made a secret still finds its own request after a new epoch sealed it anew.
        let kept = before
            .filter(|before| only_sealed_anew(before, &new))
            .and(old)
            .map(|meta| (meta.last_request.clone(), meta.last_actor.clone()));
        let (last_request, last_actor) = kept.unwrap_or_else(|| {
            let transaction = self.transaction;
            (transaction.request_id.clone(), transaction.actor.clone())
        });
        let meta = Meta {
            version: match old {
                Some(old) if planted(Bug::KeepsVersion) => old.version,
                _ => self.index,
            },
            created_index: old.map_or(self.index, |meta| meta.created_index),
            created_at: old.map_or(self.transaction.at, |meta| meta.created_at),
            updated_at: self.transaction.at,
            last_request,
            last_actor,
        };
        object::set_meta(&mut new, meta);
        if let Some(Any::Cluster(cluster)) = &mut new.object {
            cluster.requests = self.requests(before);
        }
        self.event(event::Change::Put(new.clone()));
        self.state.insert(key, Arc::new(new));
        Ok(())
    }

    /// Of one object's changes in one transaction, done in a row, only the last is told: nobody can see the others, and
    /// each would hold the whole object.
    fn event(&mut self, change: event::Change) {
        if let event::Change::Put(new) = &change {
            let last = self.events.last().and_then(|last| last.change.as_ref());
            if matches!(last, Some(event::Change::Put(old)) if object::key(old) == object::key(new)) {
                self.events.pop();
            }
        }
        let (at, actor) = (self.transaction.at, self.transaction.actor.clone());
        self.events.push(Event {
            index: self.index,
            at,
            actor,
            change: Some(change),
        });
    }
}

/// Whether everything sealed in an object is under an epoch that `known` knows.
fn sealed_under(object: &Object, known: impl Fn(u32) -> bool) -> bool {
    let known = |sealed: &Option<Sealed>| sealed.as_ref().is_none_or(|sealed| known(sealed.epoch));
    match &object.object {
        Some(Any::Secret(secret)) => known(&secret.value),
        Some(Any::Cluster(cluster)) => {
            let lock = cluster.autolock.iter().flat_map(|lock| &lock.keys);
            known(&cluster.root_key)
                && cluster.rotation.as_ref().is_none_or(|it| known(&it.root_key))
                && lock.into_iter().all(|it| known(&it.key))
        }
        _ => true,
    }
}

/// Whether this request wrote the object: last of all, or, of the cluster object, lately.
fn wrote_it(object: &Object, request: &Vec<u8>) -> bool {
    match &object.object {
        Some(Any::Cluster(cluster)) => cluster.requests.contains(request),
        _ => object::meta(object).is_some_and(|meta| meta.last_request == *request),
    }
}

/// Whether a secret differs in the epoch that seals it, and in nothing that anybody asked for.
fn only_sealed_anew(before: &Object, after: &Object) -> bool {
    let (Some(Any::Secret(before)), Some(Any::Secret(after))) = (&before.object, &after.object) else {
        return false;
    };
    let epoch = |secret: &Secret| secret.value.as_ref().map_or(0, |sealed| sealed.epoch);
    let rest = |secret: &Secret| Secret {
        meta: None,
        value: None,
        ..secret.clone()
    };
    epoch(after) > epoch(before) && rest(before) == rest(after)
}

fn ticket_object(ticket: Ticket) -> Object {
    Object {
        object: Some(Any::Ticket(ticket)),
    }
}

/// Only what leaves no object behind is noted: everything else is recorded from what it changed.
fn check_note(note: &AuditNote) -> Result<(), Rejection> {
    match note.action() {
        // An access without an object: an operator was shown the unlock key.
        AuditAction::Refuse | AuditAction::Unlock | AuditAction::Access if note.count > 0 => Ok(()),
        _ => Err(invalid("not what a note tells of")),
    }
}

fn key_ring(cluster: &Object) -> &[KeyRingEpoch] {
    match &cluster.object {
        Some(Any::Cluster(cluster)) => &cluster.key_ring,
        _ => &[],
    }
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn observed(task: &Task) -> i32 {
    task.status.as_ref().map_or(0, |status| status.state)
}

fn is_over(state: i32) -> bool {
    state >= i32::from(TaskState::Complete)
}

/// A manager moves what is desired and places a task once; what was observed stays the worker's, but for *lost*.
fn keep_observed(old: &Task, new: &mut Task) -> Result<(), Rejection> {
    if new.service_id != old.service_id || (!old.node_id.is_empty() && new.node_id != old.node_id) {
        return Err(invalid("a task never changes its service or its node"));
    }
    if new.desired < old.desired {
        return Err(invalid("the desired state of a task never falls"));
    }
    let (before, after) = (observed(old), observed(new));
    let lost = after == i32::from(TaskState::Lost) && !is_over(before);
    if !old.node_id.is_empty() && !lost {
        new.status.clone_from(&old.status);
    } else if after < before {
        return Err(invalid("the state of a task never falls"));
    }
    Ok(())
}
