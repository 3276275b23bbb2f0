//! A state as bytes, in chunks that each decode alone, so that neither side holds it encoded as a whole.

use std::sync::Arc;

use bulkhead_proto::audit::Head;
use bulkhead_proto::limits;
use bulkhead_proto::wire::{AuditRecord, Object};
use prost::Message;

use super::{AuditLog, State, object};

const MAGIC: &[u8; 8] = b"BHSTATE2";
const HEADER_BYTES: usize = 104;

/// Why a snapshot is not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    #[error("this is no state snapshot of a known format")]
    Header,
    #[error("a record of the snapshot is damaged")]
    Record,
    #[error("the snapshot is incomplete or its digest differs")]
    Incomplete,
}

/// The header; then chunks of whole length-delimited objects of about [`limits::CHUNK_BYTES`] each, and as many of audit
/// records.
pub fn chunks(state: &State) -> impl Iterator<Item = Vec<u8>> + use<> {
    let mut header = MAGIC.to_vec();
    header.extend(state.index.to_le_bytes());
    header.extend((state.objects.len() as u64).to_le_bytes());
    header.extend(state.digest());
    let anchor = state.audit.anchor();
    header.extend(anchor.sequence.to_le_bytes());
    header.extend(anchor.hash);
    header.extend((state.audit.records().len() as u64).to_le_bytes());
    let objects = packed(state.objects.clone().into_iter().map(|(_, object)| object));
    let audit = state.audit.clone();
    let records: Vec<Arc<AuditRecord>> = audit.records().cloned().collect();
    std::iter::once(header)
        .chain(objects)
        .chain(packed(records.into_iter()))
}

fn packed<M: Message>(mut messages: impl Iterator<Item = Arc<M>>) -> impl Iterator<Item = Vec<u8>> {
    std::iter::from_fn(move || {
        let mut chunk = Vec::new();
        while chunk.len() < limits::CHUNK_BYTES {
            let Some(message) = messages.next() else { break };
            chunk.extend(message.encode_length_delimited_to_vec());
        }
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// Builds a state from chunks; nothing is visible before [`Decoder::finish`] has checked the whole.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    audit: AuditLog,
    /// Objects and then records that are still to come.
    objects: u64,
    records: u64,
    digest: [u8; 32],
}

impl Decoder {
    /// Starts from the first chunk.
    pub fn new(header: &[u8]) -> Result<Self, SnapshotError> {
        let header: &[u8; HEADER_BYTES] = header.try_into().map_err(|_| SnapshotError::Header)?;
        let (magic, rest) = header.split_at(8);
        let (index, rest) = rest.split_at(8);
        let (count, rest) = rest.split_at(8);
        let (digest, rest) = rest.split_at(32);
        let (sequence, rest) = rest.split_at(8);
        let (hash, records) = rest.split_at(32);
        if magic != MAGIC {
            return Err(SnapshotError::Header);
        }
        let number = |bytes: &[u8]| {
            bytes
                .try_into()
                .map(u64::from_le_bytes)
                .map_err(|_| SnapshotError::Header)
        };
        let state = State {
            index: number(index)?,
            ..State::default()
        };
        let hash_of = |bytes: &[u8]| bytes.try_into().map_err(|_| SnapshotError::Header);
        let anchor = Head {
            sequence: number(sequence)?,
            hash: hash_of(hash)?,
        };
        Ok(Self {
            state,
            audit: AuditLog::after(anchor),
            objects: number(count)?,
            records: number(records)?,
            digest: hash_of(digest)?,
        })
    }

    /// Takes the next chunk.
    pub fn push(&mut self, mut chunk: &[u8]) -> Result<(), SnapshotError> {
        while !chunk.is_empty() {
            if self.objects > 0 {
                let object =
                    Object::decode_length_delimited(&mut chunk).map_err(|_| SnapshotError::Record)?;
                let key = object::key(&object).ok_or(SnapshotError::Record)?;
                self.state.insert(key, Arc::new(object));
                self.objects -= 1;
            } else {
                let record =
                    AuditRecord::decode_length_delimited(&mut chunk).map_err(|_| SnapshotError::Record)?;
                self.audit.restore(record).map_err(|_| SnapshotError::Record)?;
                self.records = self.records.checked_sub(1).ok_or(SnapshotError::Record)?;
            }
        }
        Ok(())
    }

    /// The state, if it is whole.
    pub fn finish(mut self) -> Result<State, SnapshotError> {
        self.state.audit = Arc::new(self.audit);
        let whole = (self.objects, self.records) == (0, 0) && self.state.digest() == self.digest;
        whole.then_some(self.state).ok_or(SnapshotError::Incomplete)
    }
}
