//! Records at rest: XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03) under this manager's own data key.
//!
//! The associated data says where a record belongs: which store, cluster epoch, member, kind and place in its sequence. A
//! record that is copied elsewhere, even within one disk, does not open. Nonces are 192 random bits and are the
//! caller's to choose, so that a simulation can choose them; at that length random ones do not repeat.

use std::fmt;

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

/// Bytes of a data key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 24;
/// How much longer a sealed record is: format, nonce, and the Poly1305 tag.
pub const OVERHEAD_BYTES: usize = 1 + NONCE_BYTES + 16;

/// The only format so far. Another one opens by its own rules.
const FORMAT: u8 = 1;

/// What a record is part of; a log record does not open as a snapshot's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordKind {
    /// Raft log frames: entries, votes, truncations.
    Log,
    /// Chunks of a snapshot.
    Snapshot,
}

/// Where a record belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The store's own random id: another store's records do not open, even under the same key.
    pub store: [u8; 16],
    /// Raised by restore and recover.
    pub cluster_epoch: u64,
    /// The Raft member whose store it is.
    pub member: u64,
    /// What it is part of.
    pub kind: RecordKind,
    /// Its number in that sequence.
    pub sequence: u64,
}

impl Place {
    /// The associated data: fixed fields in a fixed order, so no two places read the same.
    fn associated_data(&self) -> [u8; 41] {
        let mut bytes = [0; 41];
        bytes[..16].copy_from_slice(&self.store);
        bytes[16..24].copy_from_slice(&self.cluster_epoch.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.member.to_be_bytes());
        bytes[32] = match self.kind {
            RecordKind::Log => 1,
            RecordKind::Snapshot => 2,
        };
        bytes[33..].copy_from_slice(&self.sequence.to_be_bytes());
        bytes
    }
}

/// A record that does not open: damaged, moved from another place, or sealed under another key. Which of them it is
/// cannot be told, by design of the cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Shorter than any record.
    #[error("the record has {0} bytes, fewer than any record")]
    Short(usize),
    /// A format that this program does not know.
    #[error("the record has format {0}, this program knows {FORMAT}")]
    Format(u8),
    /// The cipher refused it.
    #[error("the record does not open: it is damaged, belongs elsewhere, or was sealed under another key")]
    Refused,
}

/// A manager's own key for what it keeps on disk; wiped when dropped, never printed.
pub struct DataKey {
    key: Zeroizing<[u8; KEY_BYTES]>,
    cipher: XChaCha20Poly1305, // wipes itself
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(…)")
    }
}

impl DataKey {
    /// A key of random bytes that the caller drew.
    pub fn new(key: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let cipher = XChaCha20Poly1305::new(key.as_ref().into());
        Self { key, cipher }
    }

    /// The key itself, for the key file alone.
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.key
    }

    /// Seals a record for one place.
    ///
    /// # Panics
    /// Past 256 GiB of plaintext, the cipher's bound; limits keep records below 4 MiB.
    pub fn seal(&self, place: &Place, nonce: &[u8; NONCE_BYTES], plaintext: &[u8]) -> Vec<u8> {
        let payload = Payload {
            msg: plaintext,
            aad: &place.associated_data(),
        };
        let sealed = self
            .cipher
            .encrypt(XNonce::from_slice(nonce), payload)
            .expect("far below the cipher's bound");
        let mut record = Vec::with_capacity(1 + NONCE_BYTES + sealed.len());
        record.push(FORMAT);
        record.extend_from_slice(nonce);
        record.extend_from_slice(&sealed);
        record
    }

    /// Opens a record of one place.
    ///
    /// # Errors
    /// [`OpenError`]; nothing of the plaintext is given where the cipher refuses.
    pub fn open(&self, place: &Place, record: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        if record.len() < OVERHEAD_BYTES {
            return Err(OpenError::Short(record.len()));
        }
        if record[0] != FORMAT {
            return Err(OpenError::Format(record[0]));
        }
        let (nonce, sealed) = record[1..].split_at(NONCE_BYTES);
        let payload = Payload {
            msg: sealed,
            aad: &place.associated_data(),
        };
        let plaintext = self
            .cipher
            .decrypt(XNonce::from_slice(nonce), payload)
            .map_err(|_| OpenError::Refused)?;
        Ok(Zeroizing::new(plaintext))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> DataKey {
        DataKey::new(Zeroizing::new([byte; KEY_BYTES]))
    }

    const PLACE: Place = Place {
        store: [7; 16],
        cluster_epoch: 1,
        member: 2,
        kind: RecordKind::Log,
        sequence: 3,
    };

    #[test]
    fn a_record_opens_in_its_own_place_only() {
        let record = key(1).seal(&PLACE, &[9; NONCE_BYTES], b"entry");
        assert_eq!(
            key(1).open(&PLACE, &record).expect("its own place").as_slice(),
            b"entry"
        );
        let elsewhere = [
            Place {
                store: [8; 16],
                ..PLACE
            },
            Place {
                cluster_epoch: 2,
                ..PLACE
            },
            Place { member: 3, ..PLACE },
            Place {
                kind: RecordKind::Snapshot,
                ..PLACE
            },
            Place { sequence: 4, ..PLACE },
        ];
        for place in elsewhere {
            assert_eq!(key(1).open(&place, &record), Err(OpenError::Refused), "{place:?}");
        }
        assert_eq!(key(2).open(&PLACE, &record), Err(OpenError::Refused));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let record = key(1).seal(&PLACE, &[9; NONCE_BYTES], b"entry");
        for bit in 0..record.len() * 8 {
            let mut damaged = record.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(key(1).open(&PLACE, &damaged).is_err(), "bit {bit}");
        }
        for bytes in 0..record.len() {
            assert!(key(1).open(&PLACE, &record[..bytes]).is_err(), "{bytes} bytes");
        }
    }

    #[test]
    fn the_format_on_disk_stays_what_it_is() {
        let record = key(1).seal(&PLACE, &[9; NONCE_BYTES], b"entry");
        assert_eq!(record.len(), b"entry".len() + OVERHEAD_BYTES);
        let hex: String = record.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "010909090909090909090909090909090909090909090909099683cbe427447ce1d6e838f7af1cedab564b529a43"
        );
    }

    #[test]
    fn a_key_does_not_print() {
        assert_eq!(format!("{:?}", key(0xAB)), "DataKey(…)");
    }
}
