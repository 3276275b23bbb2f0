//! One frame of a log segment: length, CRC32C (RFC 3720 appendix B.4), sequence, the previous frame's hash, a sealed
//! record.
//!
//! ```text
//! offset  bytes  what
//! 0       4      length of the record, little endian; 0 where the preallocated zeros begin
//! 4       4      CRC32C of all other bytes of the frame, little endian
//! 8       8      sequence, little endian: 1 for the first frame of a store, then one more for each
//! 16      16     hash of the previous frame: SHA-256 of its header and its record's tag, cut to 128 bits
//! 32      n      the sealed record
//! ```
//!
//! The checksum finds damage without a key, so a tool can check a disk that it cannot read. The sequence and the hash
//! tell a frame that was left from an earlier use of a recycled segment, whole by itself, from the next one; the
//! cipher binds both. The hash need not cover the record: the tag does, under a nonce that does not repeat.

use sha2::{Digest as _, Sha256};

use crate::encryption::TAG_BYTES;

/// Bytes before the record.
pub const HEADER_BYTES: usize = 32;
/// Bytes of the largest record: a transaction, its envelope and the cipher's overhead fit many times over.
pub const RECORD_BYTES: usize = 8 << 20;

/// What chains a frame to the one before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChainHash(pub [u8; 16]);

impl ChainHash {
    /// The hash before a first frame, of one purpose in one store: two stores never share a chain.
    pub fn origin(purpose: &str, store: &[u8; 16]) -> Self {
        Self::cut(Sha256::new().chain_update(purpose).chain_update(store))
    }

    fn of(header: &[u8; HEADER_BYTES], record: &[u8]) -> Self {
        let tag = &record[record.len().saturating_sub(TAG_BYTES)..];
        Self::cut(Sha256::new().chain_update(header).chain_update(tag))
    }

    fn cut(hash: Sha256) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.finalize()[..16]);
        Self(bytes)
    }
}

/// A record that no frame can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a record has 1 to {RECORD_BYTES} bytes, this one has {0}")]
pub struct RecordSizeError(pub usize);

/// Makes a frame of a buffer that holds [`HEADER_BYTES`] of room and then the record. Gives the hash that the next
/// frame carries.
///
/// # Errors
/// [`RecordSizeError`] where the record is empty or too large; the buffer is as it was.
pub fn complete(buffer: &mut [u8], sequence: u64, previous: ChainHash) -> Result<ChainHash, RecordSizeError> {
    let size_error = RecordSizeError(buffer.len().saturating_sub(HEADER_BYTES));
    let Some((header, record)) = buffer.split_first_chunk_mut::<HEADER_BYTES>() else {
        return Err(size_error);
    };
    let length = match u32::try_from(record.len()) {
        Ok(length) if (1..=RECORD_BYTES).contains(&record.len()) => length,
        _ => return Err(size_error),
    };
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[8..16].copy_from_slice(&sequence.to_le_bytes());
    header[16..].copy_from_slice(&previous.0);
    let sum = checksum(header, record);
    header[4..8].copy_from_slice(&sum.to_le_bytes());
    Ok(ChainHash::of(header, record))
}

/// A frame that is whole by itself. Whether it is the next one, its reader checks.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its number.
    pub sequence: u64,
    /// The hash of the frame before it.
    pub previous: ChainHash,
    /// The sealed record.
    pub record: &'a [u8],
    /// The hash that the next frame carries.
    pub next: ChainHash,
}

impl Frame<'_> {
    /// Bytes of the frame.
    pub fn bytes(&self) -> usize {
        HEADER_BYTES + self.record.len()
    }
}

/// What stands there is no frame. Whether that is the end of the log, a torn tail, which is cut, or damage, which
/// stops the manager, depends on what was acknowledged; only the store knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Zeros: nothing was written here.
    #[error("nothing was written here")]
    Blank,
    /// The segment ends inside the frame.
    #[error("the frame is cut off")]
    CutOff,
    /// No frame is that long.
    #[error("a frame cannot hold {0} bytes")]
    Length(u32),
    /// The content is not what was written.
    #[error("the frame's checksum does not match")]
    Checksum,
}

/// Reads the frame at the start of `bytes`.
///
/// # Errors
/// [`FrameError`]; never panics, whatever the bytes.
pub fn decode(bytes: &[u8]) -> Result<Frame<'_>, FrameError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(FrameError::CutOff);
    };
    if header.iter().all(|byte| *byte == 0) {
        return Err(FrameError::Blank);
    }
    let [
        l0,
        l1,
        l2,
        l3,
        c0,
        c1,
        c2,
        c3,
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        previous @ ..,
    ] = *header;
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if !(1..=RECORD_BYTES).contains(&size) {
        return Err(FrameError::Length(length));
    }
    let record = rest.get(..size).ok_or(FrameError::CutOff)?;
    if checksum(header, record) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Err(FrameError::Checksum);
    }
    Ok(Frame {
        sequence: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        previous: ChainHash(previous),
        record,
        next: ChainHash::of(header, record),
    })
}

fn checksum(header: &[u8; HEADER_BYTES], record: &[u8]) -> u32 {
    let sum = crc32c::crc32c_append(crc32c::crc32c(&header[..4]), &header[8..]);
    crc32c::crc32c_append(sum, record)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ORIGIN: ChainHash = ChainHash([5; 16]);

    fn frame(record: &[u8]) -> Vec<u8> {
        let mut buffer = vec![0; HEADER_BYTES];
        buffer.extend_from_slice(record);
        complete(&mut buffer, 7, ORIGIN).expect("a record within the limits");
        buffer
    }

    #[test]
    fn a_frame_reads_as_it_was_written_and_knows_its_place() {
        let mut buffer = frame(b"one record");
        let frame = decode(&buffer).expect("whole");
        assert_eq!((frame.sequence, frame.previous), (7, ORIGIN));
        assert_eq!((frame.record, frame.bytes()), (&b"one record"[..], 42));
        let next = frame.next;
        assert_eq!(complete(&mut buffer, 7, ORIGIN), Ok(next));
        assert_ne!(complete(&mut buffer, 8, ORIGIN), Ok(next));
        assert_ne!(complete(&mut buffer, 7, next), Ok(next));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let whole = frame(b"one record");
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_err(), "bit {bit}");
        }
        for bytes in 0..whole.len() {
            assert_eq!(decode(&whole[..bytes]), Err(FrameError::CutOff), "{bytes} bytes");
        }
        assert_eq!(decode(&[0; 64]), Err(FrameError::Blank));
    }

    #[test]
    fn records_of_impossible_size_are_refused() {
        let mut empty = vec![0; HEADER_BYTES];
        assert_eq!(complete(&mut empty, 1, ORIGIN), Err(RecordSizeError(0)));
        let mut huge = vec![0; HEADER_BYTES + RECORD_BYTES + 1];
        assert_eq!(
            complete(&mut huge, 1, ORIGIN),
            Err(RecordSizeError(RECORD_BYTES + 1))
        );
        assert!(huge.iter().all(|byte| *byte == 0));
        let mut bytes = frame(b"x");
        bytes[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&bytes), Err(FrameError::Length(u32::MAX)));
    }

    #[test]
    fn the_format_on_disk_stays_what_it_is() {
        let hex: String = frame(b"ab").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "020000004c3122770700000000000000050505050505050505050505050505056162"
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(frame) = decode(&bytes) {
                prop_assert!(frame.bytes() <= bytes.len());
            }
        }
    }
}
