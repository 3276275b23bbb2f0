//! One frame of a log segment: length, CRC32C (RFC 3720 appendix B.4), the previous frame's hash, a sealed record.
//!
//! ```text
//! offset  bytes  what
//! 0       4      length of the record, little endian; 0 where the preallocated zeros begin
//! 4       4      CRC32C of length, previous hash and record, little endian
//! 8       16     hash of the previous frame: SHA-256 of (its previous hash, its record), cut to 128 bits
//! 24      n      the sealed record
//! ```
//!
//! The checksum finds damage without a key, so a tool can check a disk that it cannot read. The hash chains frames: one that
//! was left from an earlier use of a recycled segment is whole by itself and still not the next one.

use sha2::{Digest as _, Sha256};

/// Bytes before the record.
pub const HEADER_BYTES: usize = 24;
/// Bytes of the largest record: a transaction, its envelope and the cipher's overhead fit many times over.
pub const RECORD_BYTES: usize = 8 << 20;

/// What chains a frame to the one before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChainHash([u8; 16]);

impl ChainHash {
    /// The hash before the first frame of a store: bound to the store's id, so two stores never share a chain.
    pub fn origin(store: &[u8; 16]) -> Self {
        Self::cut(Sha256::new().chain_update(b"bulkhead log").chain_update(store))
    }

    fn next(self, record: &[u8]) -> Self {
        Self::cut(Sha256::new().chain_update(self.0).chain_update(record))
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
pub struct RecordSizeError(usize);

/// Appends a frame and gives the hash that the next one carries.
///
/// # Errors
/// [`RecordSizeError`] where the record is empty or too large; nothing was appended.
pub fn encode(
    buffer: &mut Vec<u8>,
    previous: ChainHash,
    record: &[u8],
) -> Result<ChainHash, RecordSizeError> {
    let length = match u32::try_from(record.len()) {
        Ok(length) if (1..=RECORD_BYTES).contains(&record.len()) => length.to_le_bytes(),
        _ => return Err(RecordSizeError(record.len())),
    };
    buffer.reserve(HEADER_BYTES + record.len());
    buffer.extend_from_slice(&length);
    buffer.extend_from_slice(&checksum(length, previous, record).to_le_bytes());
    buffer.extend_from_slice(&previous.0);
    buffer.extend_from_slice(record);
    Ok(previous.next(record))
}

/// What stands at a place of a segment.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// A whole frame that continues the chain.
    Frame {
        /// The sealed record.
        record: &'a [u8],
        /// What the next frame carries.
        next: ChainHash,
        /// Bytes of the frame.
        bytes: usize,
    },
    /// Zeros: nothing was written here.
    Blank,
}

/// What stands there is no frame that continues the chain. Whether that is a torn tail, which is cut, or damage,
/// which stops the manager, depends on what was acknowledged; only the store knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The segment ends inside the frame.
    #[error("the frame is cut off")]
    CutOff,
    /// No frame is that long.
    #[error("a frame cannot hold {0} bytes")]
    Length(u32),
    /// The content is not what was written.
    #[error("the frame's checksum does not match")]
    Checksum,
    /// A whole frame, but not the next one.
    #[error("the frame does not continue the log")]
    Chain,
}

/// Reads the frame at the start of `bytes`.
///
/// # Errors
/// [`FrameError`]; never panics, whatever the bytes.
pub fn decode(bytes: &[u8], previous: ChainHash) -> Result<Decoded<'_>, FrameError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return if bytes.iter().all(|byte| *byte == 0) {
            Ok(Decoded::Blank)
        } else {
            Err(FrameError::CutOff)
        };
    };
    if header.iter().all(|byte| *byte == 0) {
        return Ok(Decoded::Blank);
    }
    let [l0, l1, l2, l3, c0, c1, c2, c3, hash @ ..] = *header;
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if !(1..=RECORD_BYTES).contains(&size) {
        return Err(FrameError::Length(length));
    }
    let record = rest.get(..size).ok_or(FrameError::CutOff)?;
    let carried = ChainHash(hash);
    if checksum([l0, l1, l2, l3], carried, record) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Err(FrameError::Checksum);
    }
    if carried != previous {
        return Err(FrameError::Chain);
    }
    Ok(Decoded::Frame {
        record,
        next: previous.next(record),
        bytes: HEADER_BYTES + size,
    })
}

fn checksum(length: [u8; 4], previous: ChainHash, record: &[u8]) -> u32 {
    let sum = crc32c::crc32c_append(crc32c::crc32c(&length), &previous.0);
    crc32c::crc32c_append(sum, record)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STORE: [u8; 16] = [5; 16];

    fn chain(records: &[Vec<u8>]) -> Vec<u8> {
        let mut buffer = Vec::new();
        let mut hash = ChainHash::origin(&STORE);
        for record in records {
            hash = encode(&mut buffer, hash, record).expect("a record within the limits");
        }
        buffer
    }

    fn read(mut bytes: &[u8]) -> Result<Vec<Vec<u8>>, FrameError> {
        let mut hash = ChainHash::origin(&STORE);
        let mut records = Vec::new();
        while let Decoded::Frame {
            record,
            next,
            bytes: used,
        } = decode(bytes, hash)?
        {
            records.push(record.to_vec());
            hash = next;
            bytes = &bytes[used..];
        }
        Ok(records)
    }

    #[test]
    fn the_format_on_disk_stays_what_it_is() {
        let hex: String = chain(&[b"one".to_vec()])
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, "0300000076a7ce3727a1cffe731cbb545a3eb352c6f707766f6e65");
    }

    #[test]
    fn every_flipped_bit_of_a_frame_is_noticed() {
        let bytes = chain(&[b"one".to_vec(), b"two".to_vec()]);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_frame_of_an_earlier_use_of_the_segment_does_not_continue_the_log() {
        let old = chain(&[b"old1".to_vec(), b"old2".to_vec()]);
        let mut bytes = chain(&[b"new1".to_vec()]);
        bytes.extend_from_slice(&old[bytes.len()..]); // whole, with a checksum that matches
        assert_eq!(read(&bytes), Err(FrameError::Chain));
    }

    #[test]
    fn an_empty_or_huge_record_is_refused() {
        let mut buffer = Vec::new();
        let hash = ChainHash::origin(&STORE);
        assert_eq!(encode(&mut buffer, hash, &[]), Err(RecordSizeError(0)));
        let huge = vec![0; RECORD_BYTES + 1];
        assert_eq!(encode(&mut buffer, hash, &huge), Err(RecordSizeError(huge.len())));
        assert!(buffer.is_empty());
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(
            records in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 0..8),
            zeros in 0usize..100,
        ) {
            let mut bytes = chain(&records);
            bytes.resize(bytes.len() + zeros, 0);
            prop_assert_eq!(read(&bytes), Ok(records));
        }

        #[test]
        fn a_cut_gives_a_prefix_or_an_error(
            records in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 1..6),
            at in any::<prop::sample::Index>(),
        ) {
            let bytes = chain(&records);
            if let Ok(found) = read(&bytes[..at.index(bytes.len())]) {
                prop_assert!(records.starts_with(&found) && found.len() < records.len());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes, ChainHash::origin(&STORE)); // only that it returns
        }
    }
}
