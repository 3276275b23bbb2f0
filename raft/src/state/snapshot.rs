//! A state as bytes, in chunks that each decode alone, so that neither side holds it encoded as a whole.

use std::sync::Arc;

use bulkhead_proto::{limits, wire::Object};
use prost::Message as _;

use super::{State, object};

const MAGIC: &[u8; 8] = b"BHSTATE1";
const HEADER_BYTES: usize = 56;

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

/// The header, then chunks of whole length-delimited objects of about [`limits::CHUNK_BYTES`] each.
pub fn chunks(state: &State) -> impl Iterator<Item = Vec<u8>> + use<> {
    let mut header = MAGIC.to_vec();
    header.extend(state.index.to_le_bytes());
    header.extend((state.objects.len() as u64).to_le_bytes());
    header.extend(state.digest);
    let mut objects = state.objects.clone().into_iter();
    let bodies = std::iter::from_fn(move || {
        let mut chunk = Vec::new();
        while chunk.len() < limits::CHUNK_BYTES {
            let Some((_, object)) = objects.next() else { break };
            chunk.extend(object.encode_length_delimited_to_vec());
        }
        (!chunk.is_empty()).then_some(chunk)
    });
    std::iter::once(header).chain(bodies)
}

/// Builds a state from chunks; nothing is visible before [`Decoder::finish`] has checked the whole.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    count: u64,
    digest: [u8; 32],
}

impl Decoder {
    /// Starts from the first chunk.
    pub fn new(header: &[u8]) -> Result<Self, SnapshotError> {
        let header: &[u8; HEADER_BYTES] = header.try_into().map_err(|_| SnapshotError::Header)?;
        let (magic, rest) = header.split_at(8);
        let (index, rest) = rest.split_at(8);
        let (count, digest) = rest.split_at(8);
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
        let digest = digest.try_into().map_err(|_| SnapshotError::Header)?;
        Ok(Self {
            state,
            count: number(count)?,
            digest,
        })
    }

    /// Takes the next chunk.
    pub fn push(&mut self, mut chunk: &[u8]) -> Result<(), SnapshotError> {
        while !chunk.is_empty() {
            let object = Object::decode_length_delimited(&mut chunk).map_err(|_| SnapshotError::Record)?;
            let key = object::key(&object).ok_or(SnapshotError::Record)?;
            self.state.insert(key, Arc::new(object));
        }
        Ok(())
    }

    /// The state, if it is whole.
    pub fn finish(self) -> Result<State, SnapshotError> {
        let whole = self.state.objects.len() as u64 == self.count && self.state.digest == self.digest;
        whole.then_some(self.state).ok_or(SnapshotError::Incomplete)
    }
}
