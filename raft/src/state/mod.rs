//! The replicated state: every object of the cluster, and what `apply` makes of one transaction.
//!
//! All of it is pure: no clock, no randomness, no I/O, so that two replicas that apply the same entries hold the same
//! state. A [`State`] is persistent maps, so a clone, which is what readers and snapshots get, is a pointer copy.

mod apply;
mod audit;
mod events;
mod object;
#[cfg(test)]
mod rules_tests;
mod snapshot;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use bulkhead_proto::StateDigest;
use bulkhead_proto::wire::{Kind, Object};
use imbl::{OrdMap, OrdSet};
use sha2::{Digest as _, Sha256};

pub use apply::{Applied, FatalApply, LEVEL};
pub use audit::AuditLog;
pub use events::{Compacted, EventRing};
pub use object::Key;
pub use snapshot::{Decoder, SnapshotError, chunks};

/// All objects at one commit index. Clone it to keep a view: the clone never changes.
#[derive(Clone, Default, Debug)]
pub struct State {
    index: u64,
    objects: OrdMap<Key, Arc<Object>>,
    /// Shared strings: a change copies the nodes of the tree that it touches.
    names: OrdMap<(Kind, Arc<str>), Key>,
    /// (target, source): who refers to an object. Tasks of a node or users of a secret are one range of it.
    references: OrdSet<(Key, Key)>,
    digest: StateDigest,
    /// Behind one pointer: most transactions write no record.
    audit: Arc<AuditLog>,
}

/// Why a name, id or prefix found no single object.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    #[error("no such object")]
    NotFound,
    #[error("more than one id starts with this prefix; give more of it")]
    Ambiguous,
}

impl State {
    /// The commit index of the last entry applied.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Equal on two replicas at one index if their objects and audit logs are. It finds faults, not attackers: replicas
    /// are trusted.
    pub fn digest(&self) -> [u8; 32] {
        let mut digest = self.digest;
        let head = self.audit.head();
        if head.sequence > 0 {
            digest.mix(&Sha256::digest(head.to_string()).into());
        }
        digest.bytes()
    }

    /// The digest of the objects alone.
    pub fn objects_digest(&self) -> [u8; 32] {
        self.digest.bytes()
    }

    /// How many objects there are.
    pub fn count(&self) -> u64 {
        self.objects.len() as u64
    }

    /// The audit log.
    pub fn audit(&self) -> &AuditLog {
        &self.audit
    }

    /// The object under this key.
    pub fn get(&self, key: Key) -> Option<&Arc<Object>> {
        self.objects.get(&key)
    }

    /// All objects of one kind, by id.
    pub fn list(&self, kind: Kind) -> impl Iterator<Item = &Arc<Object>> {
        self.objects
            .range(Key::first(kind)..=Key::last(kind))
            .map(|(_, object)| object)
    }

    /// The object of this kind that has the name.
    pub fn by_name(&self, kind: Kind, name: &str) -> Option<&Arc<Object>> {
        self.get(*self.names.get(&(kind, name.into()))?)
    }

    /// The one object of this kind whose id starts with these bytes.
    pub fn by_prefix(&self, kind: Kind, prefix: &[u8]) -> Result<&Arc<Object>, FindError> {
        let from = Key::prefix(kind, prefix).ok_or(FindError::NotFound)?;
        let mut found = self
            .objects
            .range(from..=Key::last(kind))
            .take_while(|(key, _)| key.id().starts_with(prefix));
        let (_, object) = found.next().ok_or(FindError::NotFound)?;
        match found.next() {
            Some(_) => Err(FindError::Ambiguous),
            None => Ok(object),
        }
    }

    /// The objects of kind `source` that refer to `target`: tasks of a node, services that use a secret.
    pub fn referrers(&self, target: Key, source: Kind) -> impl Iterator<Item = &Arc<Object>> {
        self.references
            .range((target, Key::first(source))..=(target, Key::last(source)))
            .filter_map(|(_, source)| self.objects.get(source))
    }

    fn is_needed(&self, target: Key) -> bool {
        self.references
            .range((target, Key::MIN)..=(target, Key::MAX))
            .filter_map(|(_, source)| self.objects.get(source))
            .any(|source| object::needs(source, target))
    }

    /// Puts an object with its index entries; the caller has checked it.
    fn insert(&mut self, key: Key, object: Arc<Object>) {
        self.remove(key);
        if let Some(name) = object::name(&object) {
            self.names.insert((key.kind(), name.into()), key);
        }
        for target in object::references(&object) {
            self.references.insert((target, key));
        }
        self.digest.toggle(&object);
        self.objects.insert(key, object);
    }

    fn remove(&mut self, key: Key) -> Option<Arc<Object>> {
        let object = self.objects.remove(&key)?;
        if let Some(name) = object::name(&object) {
            self.names.remove(&(key.kind(), name.into()));
        }
        for target in object::references(&object) {
            self.references.remove(&(target, key));
        }
        self.digest.toggle(&object);
        Some(object)
    }
}
