//! Records at rest: XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03) under this manager's own data key.
//!
//! The associated data says where a record belongs: which store, cluster epoch, member, kind and place in its sequence. A
//! record that is copied elsewhere, even within one disk, does not open; nor does one whose predecessor is another than
//! when it was sealed. Nonces are 192 random bits and are the
//! caller's to choose, so that a simulation can choose them; at that length random ones do not repeat.
//!
//! A store takes a new data key while it runs: what is written from then on is sealed under it, and the one before opens
//! what is left of it, until that is gone.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use chacha20poly1305::aead::{AeadInPlace as _, KeyInit as _};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

use bulkhead_identity::Unswapped;

/// Bytes of a data key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 24;
/// Bytes of a sealed record before its content: format and nonce.
pub const PREFIX_BYTES: usize = 1 + NONCE_BYTES;
/// Bytes of a sealed record after its content: the Poly1305 tag.
pub const TAG_BYTES: usize = 16;
/// How much longer a sealed record is than its content.
pub const OVERHEAD_BYTES: usize = PREFIX_BYTES + TAG_BYTES;

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
    /// The hash of the record before it.
    pub previous: [u8; 16],
}

impl Place {
    /// The associated data: fixed fields in a fixed order, so no two places read the same.
    fn associated_data(&self) -> [u8; 57] {
        let mut bytes = [0; 57];
        bytes[..16].copy_from_slice(&self.store);
        bytes[16..24].copy_from_slice(&self.cluster_epoch.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.member.to_be_bytes());
        bytes[32] = match self.kind {
            RecordKind::Log => 1,
            RecordKind::Snapshot => 2,
        };
        bytes[33..41].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[41..].copy_from_slice(&self.previous);
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
    key: Unswapped<[u8; KEY_BYTES]>,
    cipher: Unswapped<XChaCha20Poly1305>,
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(…)")
    }
}

impl DataKey {
    /// A key of random bytes that the caller drew.
    pub fn new(key: Unswapped<[u8; KEY_BYTES]>) -> Self {
        let cipher = Unswapped::new(XChaCha20Poly1305::new((&*key).into()));
        Self { key, cipher }
    }

    /// The key itself, for the key file alone.
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.key
    }

    /// Seals in place the record that starts at `from`: [`PREFIX_BYTES`] of room, then the content. Appends the tag.
    ///
    /// # Panics
    /// Where there is no room for the prefix; past 256 GiB, the cipher's bound: limits keep records below 8 MiB.
    pub fn seal(&self, place: &Place, nonce: &[u8; NONCE_BYTES], buffer: &mut Vec<u8>, from: usize) {
        let (prefix, content) = buffer[from..].split_at_mut(PREFIX_BYTES);
        prefix[0] = FORMAT;
        prefix[1..].copy_from_slice(nonce);
        let tag = self
            .cipher
            .encrypt_in_place_detached(XNonce::from_slice(nonce), &place.associated_data(), content)
            .expect("far below the cipher's bound");
        buffer.extend_from_slice(&tag);
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
        let (prefix, sealed) = record.split_at(PREFIX_BYTES);
        let (content, tag) = sealed.split_at(sealed.len() - TAG_BYTES);
        let mut plaintext = Zeroizing::new(content.to_vec());
        self.cipher
            .decrypt_in_place_detached(
                XNonce::from_slice(&prefix[1..]),
                &place.associated_data(),
                &mut plaintext,
                Tag::from_slice(tag),
            )
            .map_err(|_| OpenError::Refused)?;
        Ok(plaintext)
    }
}

/// The data keys of a store: the one that seals, and the one before as long as something sealed under it is left.
pub struct DataKeys(RwLock<Ring>);

struct Ring {
    present: DataKey,
    former: Option<DataKey>,
}

impl fmt::Debug for DataKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKeys(…)")
    }
}

impl From<DataKey> for DataKeys {
    fn from(present: DataKey) -> Self {
        Self::new(present, None)
    }
}

impl DataKeys {
    /// The keys of a store; a former one where a change of keys was not finished.
    pub fn new(present: DataKey, former: Option<DataKey>) -> Self {
        Self(RwLock::new(Ring { present, former }))
    }

    /// Seals with another key from now on. False, and nothing changes, while a former one is still needed.
    #[must_use]
    pub fn renew(&self, next: DataKey) -> bool {
        let mut ring = self.write();
        if ring.former.is_some() {
            return false;
        }
        ring.former = Some(std::mem::replace(&mut ring.present, next));
        true
    }

    /// Nothing is left that only the former key opens.
    pub fn forget_former(&self) {
        self.write().former = None;
    }

    /// As [`DataKey::seal`], with the present key.
    pub fn seal(&self, place: &Place, nonce: &[u8; NONCE_BYTES], buffer: &mut Vec<u8>, from: usize) {
        self.read().present.seal(place, nonce, buffer, from);
    }

    /// As [`DataKey::open`], with whichever key it was sealed with.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(&self, place: &Place, record: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        let ring = self.read();
        match (ring.present.open(place, record), &ring.former) {
            (Err(OpenError::Refused), Some(former)) => former.open(place, record),
            (opened, _) => opened,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Ring> {
        self.0.read().unwrap_or_else(PoisonError::into_inner) // each change is one assignment
    }

    fn write(&self) -> RwLockWriteGuard<'_, Ring> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whose records these are: the keys and the part of a [`Place`] that all records of a store share.
#[derive(Clone, Debug)]
pub struct Sealing {
    /// This manager's data keys.
    pub keys: Arc<DataKeys>,
    /// The store's own random id.
    pub store: [u8; 16],
    /// Raised by restore and recover.
    pub cluster_epoch: u64,
    /// The Raft member whose store it is.
    pub member: u64,
}

impl Sealing {
    /// A place in this store.
    pub fn place(&self, kind: RecordKind, sequence: u64, previous: [u8; 16]) -> Place {
        Place {
            store: self.store,
            cluster_epoch: self.cluster_epoch,
            member: self.member,
            kind,
            sequence,
            previous,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> DataKey {
        DataKey::new(Unswapped::new([byte; KEY_BYTES]))
    }

    const PLACE: Place = Place {
        store: [7; 16],
        cluster_epoch: 1,
        member: 2,
        kind: RecordKind::Log,
        sequence: 3,
        previous: [4; 16],
    };

    fn seal(key: &DataKey, content: &[u8]) -> Vec<u8> {
        let mut record = vec![0; PREFIX_BYTES];
        record.extend_from_slice(content);
        key.seal(&PLACE, &[9; NONCE_BYTES], &mut record, 0);
        record
    }

    #[test]
    fn a_record_opens_in_its_own_place_only() {
        let record = seal(&key(1), b"entry");
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
            Place {
                previous: [5; 16],
                ..PLACE
            },
        ];
        for place in elsewhere {
            assert_eq!(key(1).open(&place, &record), Err(OpenError::Refused), "{place:?}");
        }
        assert_eq!(key(2).open(&PLACE, &record), Err(OpenError::Refused));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let record = seal(&key(1), b"entry");
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
        let record = seal(&key(1), b"entry");
        assert_eq!(record.len(), b"entry".len() + OVERHEAD_BYTES);
        let hex: String = record.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "010909090909090909090909090909090909090909090909099683cbe42733007a40ab3148a53155d79dcd9762c2"
        );
    }

    #[test]
    fn a_former_key_opens_what_it_sealed_until_it_is_forgotten() {
        let keys = DataKeys::from(key(1));
        let seal = |keys: &DataKeys| {
            let mut record = vec![0; PREFIX_BYTES];
            record.extend_from_slice(b"entry");
            keys.seal(&PLACE, &[9; NONCE_BYTES], &mut record, 0);
            record
        };
        let old = seal(&keys);
        assert!(keys.renew(key(2)));
        assert!(!keys.renew(key(3)), "the former one is still needed");
        let new = seal(&keys);
        assert!(key(2).open(&PLACE, &new).is_ok() && key(1).open(&PLACE, &new).is_err());
        for record in [&old, &new] {
            assert_eq!(keys.open(&PLACE, record).expect("either").as_slice(), b"entry");
        }
        keys.forget_former();
        assert_eq!(keys.open(&PLACE, &old), Err(OpenError::Refused));
        assert!(keys.open(&PLACE, &new).is_ok() && keys.renew(key(3)));
    }

    #[test]
    fn a_key_does_not_print() {
        assert_eq!(format!("{:?}", DataKeys::from(key(0xAB))), "DataKeys(…)");
        assert_eq!(format!("{:?}", key(0xAB)), "DataKey(…)");
    }
}
