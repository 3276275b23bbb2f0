//! A record on its way to disk and back: sealed in place inside its frame, without another copy.

use zeroize::Zeroizing;

use super::frame::{self, ChainHash, Frame, HEADER_BYTES, RecordSizeError};
use crate::encryption::{NONCE_BYTES, OVERHEAD_BYTES, OpenError, PREFIX_BYTES, RecordKind, Sealing};
use crate::seam::{Entropy, EntropyError};

/// Bytes that a buffer holds before a record's content.
pub(crate) const ROOM_BYTES: usize = HEADER_BYTES + PREFIX_BYTES;
/// Bytes of content that one frame can carry.
pub(crate) const CONTENT_BYTES: usize = frame::RECORD_BYTES - OVERHEAD_BYTES;

/// Why a frame was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SealError {
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    #[error(transparent)]
    Size(#[from] RecordSizeError),
}

/// Makes a frame of a buffer that holds [`ROOM_BYTES`] and the content; gives the hash that the next one carries.
pub(crate) fn seal(
    sealing: &Sealing,
    entropy: &dyn Entropy,
    kind: RecordKind,
    sequence: u64,
    previous: ChainHash,
    buffer: &mut Vec<u8>,
) -> Result<ChainHash, SealError> {
    let content = buffer.len().saturating_sub(ROOM_BYTES);
    if content > CONTENT_BYTES {
        return Err(RecordSizeError(content + OVERHEAD_BYTES).into());
    }
    let mut nonce = [0; NONCE_BYTES];
    entropy.fill(&mut nonce)?;
    let place = sealing.place(kind, sequence, previous.0);
    sealing.keys.seal(&place, &nonce, buffer, HEADER_BYTES);
    Ok(frame::complete(buffer, sequence, previous)?)
}

/// The content of a frame, where the frame itself says that it stands.
pub(crate) fn open(
    sealing: &Sealing,
    kind: RecordKind,
    frame: &Frame<'_>,
) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let place = sealing.place(kind, frame.sequence, frame.previous.0);
    sealing.keys.open(&place, frame.record)
}
