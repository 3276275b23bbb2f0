//! The audit log: made by `apply` from what a transaction really changed, so that no way to a change can forget its record.
//!
//! The log is a chain of hashes ([`bulkhead_proto::audit`]). The state keeps its newest records and the head of those that
//! are gone, so that what is kept can be followed from there; its digest covers the head.

mod derive;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use bulkhead_proto::audit::{Broken, Head};
use bulkhead_proto::limits;
use bulkhead_proto::wire::{AuditAction, AuditRecord};
use imbl::{OrdMap, Vector};

use super::Key;

pub(super) use derive::records;

/// The records that are kept, oldest first. A clone is a pointer copy.
#[derive(Clone, Debug, Default)]
pub struct AuditLog {
    /// The newest record that is kept no more.
    anchor: Head,
    head: Head,
    records: Vector<Arc<AuditRecord>>,
    /// (secret, node): time and number of the newest record of its access that is kept.
    accesses: OrdMap<(Key, Key), (i64, u64)>,
    /// (request, object): number of the newest record of both that is kept.
    requests: OrdMap<(Vec<u8>, Option<Key>), u64>,
}

impl AuditLog {
    /// A log whose records up to `anchor` are kept no more.
    pub(super) fn after(anchor: Head) -> Self {
        Self {
            anchor,
            head: anchor,
            ..Self::default()
        }
    }

    /// The newest record that is kept no more: the first one kept follows it.
    pub fn anchor(&self) -> Head {
        self.anchor
    }

    /// The newest record.
    pub fn head(&self) -> Head {
        self.head
    }

    /// The records that are kept, oldest first.
    pub fn records(&self) -> impl ExactSizeIterator<Item = &Arc<AuditRecord>> {
        self.records.iter()
    }

    /// The kept records after this one, oldest first.
    pub fn since(&self, sequence: u64) -> impl Iterator<Item = &Arc<AuditRecord>> {
        // Numbers have no gap, so a record's place follows from its number.
        let skip = sequence.saturating_sub(self.anchor.sequence);
        let skip = usize::try_from(skip).map_or(self.records.len(), |skip| skip.min(self.records.len()));
        self.records.iter().skip(skip)
    }

    /// Whether a kept record is this request's.
    pub(super) fn has_request(&self, request: &[u8]) -> bool {
        let first = self.requests.range((request.to_vec(), None)..).next();
        first.is_some_and(|((it, _), _)| it == request)
    }

    /// Whether a kept record says what this request did to this object.
    pub(super) fn has_request_of(&self, request: &[u8], key: Key) -> bool {
        self.requests.contains_key(&(request.to_vec(), Some(key)))
    }

    /// Whether the node's access to the secret was recorded so short a time before `at` that it is not said again.
    pub(super) fn knows_access(&self, secret: Key, node: Key, at: i64) -> bool {
        let quiet = i64::try_from(limits::AUDIT_ACCESS.as_millis()).unwrap_or(i64::MAX);
        // One that was recorded later than now says nothing: a clock that ran ahead once must not hide what comes after.
        self.accesses
            .get(&(secret, node))
            .is_some_and(|(recorded, _)| (0..quiet).contains(&at.saturating_sub(*recorded)))
    }

    /// Writes a record down.
    pub(super) fn append(&mut self, record: AuditRecord) {
        let record = self.head.append(record);
        self.keep(record);
    }

    /// Takes a record over that was written down before.
    pub(super) fn restore(&mut self, record: AuditRecord) -> Result<(), Broken> {
        self.head.follow(&record)?;
        self.keep(record);
        Ok(())
    }

    fn keep(&mut self, record: AuditRecord) {
        if let Some(pair) = access(&record) {
            self.accesses.insert(pair, (record.at, record.sequence));
        }
        if !record.request_id.is_empty() {
            self.requests.insert(request(&record), record.sequence);
        }
        self.records.push_back(Arc::new(record));
        while self.records.len() > limits::AUDIT_RECORDS {
            let Some(oldest) = self.records.pop_front() else {
                return;
            };
            self.forget(&oldest);
        }
    }

    fn forget(&mut self, oldest: &AuditRecord) {
        let hash = oldest
            .hash
            .as_slice()
            .try_into()
            .expect("append and follow set it");
        self.anchor = Head {
            sequence: oldest.sequence,
            hash,
        };
        let request = request(oldest);
        if self.requests.get(&request) == Some(&oldest.sequence) {
            self.requests.remove(&request);
        }
        if let Some(pair) = access(oldest)
            && self
                .accesses
                .get(&pair)
                .is_some_and(|(_, newest)| *newest == oldest.sequence)
        {
            self.accesses.remove(&pair);
        }
    }
}

/// The request and the object of a record.
fn request(record: &AuditRecord) -> (Vec<u8>, Option<Key>) {
    let key = record.object.as_ref().and_then(Key::from_wire);
    (record.request_id.clone(), key)
}

/// The secret and the node of a record of access.
fn access(record: &AuditRecord) -> Option<(Key, Key)> {
    if record.action() != AuditAction::Access {
        return None;
    }
    let key = |reference: &Option<_>| reference.as_ref().and_then(Key::from_wire);
    key(&record.object).zip(key(&record.related))
}
