//! The file of a backup: a header in the clear, then chunks that only the recovery key opens.
//!
//! ```text
//! BHBACKUP1\n  length (4)  header  encapsulated key (32)  sealed file key (48)  SHA-256 of all before (32)
//! { 0 or 1   length (4)   chunk and its tag (16 more) }...      1 is the last one; nothing follows it
//! ```
//!
//! Each file has a key of its own, which HPKE (RFC 9180, X25519, HKDF-SHA256, ChaCha20-Poly1305) seals to the recovery key
//! with mark, length and header as associated data: a header does not go with another file's chunks. A chunk's nonce is
//! its number and whether it is the last, so none can be moved, lost or cut off. The SHA-256 tells damage to the header
//! where no key is at hand; it proves nothing. What the chunks hold is their writer's business.

use std::fmt;

use bulkhead_proto::limits;
use bulkhead_proto::wire::BackupHeader;
use chacha20poly1305::aead::{Aead as _, KeyInit as _};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};
use hpke::aead::ChaCha20Poly1305 as HpkeAead;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable as _, Kem, OpModeR, OpModeS, Serializable as _};
use prost::Message as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::recovery::{self, PublicKey, RecoveryKey};
use crate::seam::{Entropy, EntropyError};

const MARK: &[u8; 10] = b"BHBACKUP1\n";
/// What all versions of the mark begin with.
const ANY_MARK: &[u8; 8] = b"BHBACKUP";
const INFO: &[u8] = b"bulkhead backup 1";
const LENGTH_BYTES: usize = 4;
const KEY_BYTES: usize = 32;
const ENCAPSULATED_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
const SUM_BYTES: usize = 32;
/// Before a chunk: whether it is the last, and its length.
const FRAME_BYTES: usize = 1 + LENGTH_BYTES;

/// Why no backup was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The header does not name a key that something can be sealed to.
    #[error("the recovery key is none")]
    Key,
    /// No random bytes.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
}

/// Why a file is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupError {
    /// Another kind of file.
    #[error("it does not begin as a backup")]
    NotBackup,
    /// A format of another version.
    #[error("it is a backup of another format than version 1; use the program that made it, or a newer one")]
    Version,
    /// The header's sum, content or binding to the key.
    #[error("its header is damaged")]
    Header,
    /// It is sealed to another key.
    #[error("it is sealed to the recovery key {wanted}, and this key is {got}")]
    Key {
        /// The header's.
        wanted: String,
        /// The key that was tried.
        got: String,
    },
    /// A chunk that does not open.
    #[error("chunk {chunk}, at byte {offset}, is damaged")]
    Chunk {
        /// Its number, from 0.
        chunk: u64,
        /// Where it begins.
        offset: u64,
    },
    /// It ends before its last chunk.
    #[error("it is cut off at byte {offset}: its last chunk is missing")]
    Truncated {
        /// How long it is.
        offset: u64,
    },
    /// It goes on after its last chunk.
    #[error("bytes follow its last chunk, at byte {offset}")]
    Surplus {
        /// Where.
        offset: u64,
    },
    /// Larger than any backup.
    #[error(
        "it is larger than {} bytes, which is more than any backup",
        limits::BACKUP_BYTES
    )]
    Large,
}

struct ChunkKey {
    cipher: ChaCha20Poly1305, // wipes itself
    next: u64,
}

impl ChunkKey {
    fn new(key: &Zeroizing<[u8; KEY_BYTES]>) -> Self {
        Self {
            cipher: ChaCha20Poly1305::new(key.as_slice().into()),
            next: 0,
        }
    }

    fn nonce(&self, last: bool) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.next.to_be_bytes());
        nonce[11] = u8::from(last);
        nonce.into()
    }

    fn seal(&mut self, plaintext: &[u8], last: bool) -> Vec<u8> {
        let sealed = self
            .cipher
            .encrypt(&self.nonce(last), plaintext)
            .expect("far below the cipher's bound");
        self.next += 1;
        sealed
    }

    fn open(&mut self, sealed: &[u8], last: bool) -> Option<Zeroizing<Vec<u8>>> {
        let opened = self.cipher.decrypt(&self.nonce(last), sealed).ok()?;
        self.next += 1;
        Some(Zeroizing::new(opened))
    }
}

/// Writes a backup, chunk by chunk.
pub struct Sealer(ChunkKey);

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer(…)")
    }
}

impl Sealer {
    /// Begins a backup that is sealed to the header's recovery key; gives the file's first bytes.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn begin(header: &BackupHeader, entropy: &dyn Entropy) -> Result<(Self, Vec<u8>), SealError> {
        let recipient = PublicKey::from_bytes(&header.recovery_key).map_err(|_| SealError::Key)?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        entropy.fill(key.as_mut())?;
        let mut seed = Zeroizing::new([0; 32]);
        entropy.fill(seed.as_mut())?;
        let mut bytes = MARK.to_vec();
        bytes.extend(length(header.encoded_len()));
        header.encode(&mut bytes).expect("a vector grows");
        let (encapsulated, sealed) = hpke::single_shot_seal::<HpkeAead, HkdfSha256, X25519HkdfSha256, _>(
            &OpModeS::Base,
            &recipient,
            INFO,
            key.as_slice(),
            &bytes,
            &mut StdRng::from_seed(*seed),
        )
        .map_err(|_| SealError::Key)?; // a point of small order (RFC 9180 §7.1.4)
        bytes.extend(encapsulated.to_bytes());
        bytes.extend(sealed);
        let sum = Sha256::digest(&bytes);
        bytes.extend(sum);
        Ok((Self(ChunkKey::new(&key)), bytes))
    }

    /// The next chunk as it is written: at most [`limits::BACKUP_CHUNK_BYTES`] of plaintext.
    pub fn chunk(&mut self, plaintext: &[u8], last: bool) -> Vec<u8> {
        let mut bytes = vec![u8::from(last)];
        bytes.extend(length(plaintext.len() + TAG_BYTES));
        bytes.extend(self.0.seal(plaintext, last));
        bytes
    }
}

fn length(bytes: usize) -> [u8; LENGTH_BYTES] {
    u32::try_from(bytes).expect("bounded by the limits").to_be_bytes()
}

fn read_length(bytes: &[u8]) -> usize {
    let length = bytes.try_into().map_or(u32::MAX, u32::from_be_bytes);
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// What stands before the chunks.
#[derive(Debug)]
struct Head {
    header: BackupHeader,
    /// Bytes that the file key is bound to.
    bound: usize,
    /// Bytes of it all.
    bytes: usize,
}

/// The header of a file that begins with these bytes; nothing where more of them are needed.
fn head(bytes: &[u8]) -> Result<Option<Head>, BackupError> {
    let seen = bytes.len().min(MARK.len());
    if bytes[..seen] != MARK[..seen] {
        let versioned = bytes.len() > ANY_MARK.len() && bytes.starts_with(ANY_MARK);
        return Err(match versioned {
            true => BackupError::Version,
            false => BackupError::NotBackup,
        });
    }
    let start = MARK.len() + LENGTH_BYTES;
    let Some(said) = bytes.get(MARK.len()..start) else {
        return Ok(None);
    };
    let said = read_length(said);
    if said > limits::BACKUP_HEADER_BYTES {
        return Err(BackupError::Header);
    }
    let bound = start + said;
    let summed = bound + ENCAPSULATED_BYTES + KEY_BYTES + TAG_BYTES;
    let Some(sum) = bytes.get(summed..summed + SUM_BYTES) else {
        return Ok(None);
    };
    if Sha256::digest(&bytes[..summed]).as_slice() != sum {
        return Err(BackupError::Header);
    }
    let header = BackupHeader::decode(&bytes[start..bound]).map_err(|_| BackupError::Header)?;
    Ok(Some(Head {
        header,
        bound,
        bytes: summed + SUM_BYTES,
    }))
}

/// What a backup says of itself, from its first bytes; nothing where more of them are needed. No key is needed, and
/// nothing is proved but that it was not damaged by chance.
///
/// # Errors
/// [`BackupError`].
pub fn read_header(bytes: &[u8]) -> Result<Option<BackupHeader>, BackupError> {
    Ok(head(bytes)?.map(|head| head.header))
}

/// Reads a backup as its bytes come.
pub struct Opener<'k> {
    key: &'k RecoveryKey,
    buffer: Vec<u8>,
    /// Bytes of the file before the buffer.
    before: u64,
    opened: Option<(BackupHeader, ChunkKey)>,
    ended: bool,
}

impl fmt::Debug for Opener<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener")
            .field("key", self.key)
            .finish_non_exhaustive()
    }
}

impl<'k> Opener<'k> {
    /// Nothing read yet.
    pub fn new(key: &'k RecoveryKey) -> Self {
        Self {
            key,
            buffer: Vec::new(),
            before: 0,
            opened: None,
            ended: false,
        }
    }

    /// The header, once it was read and proved to be of this file.
    pub fn header(&self) -> Option<&BackupHeader> {
        self.opened.as_ref().map(|(header, _)| header)
    }

    /// Takes the next bytes of the file, and gives the chunks that are whole with them. What it gave is authentic; that
    /// it is all, only [`Opener::finish`] says.
    ///
    /// # Errors
    /// [`BackupError`]; nothing more can be read then.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Zeroizing<Vec<u8>>>, BackupError> {
        if self.before + (self.buffer.len() + bytes.len()) as u64 > limits::BACKUP_BYTES {
            return Err(BackupError::Large);
        }
        self.buffer.extend_from_slice(bytes);
        if self.opened.is_none() {
            let Some(head) = head(&self.buffer)? else {
                return Ok(Vec::new());
            };
            let key = self.file_key(&head)?;
            self.consume(head.bytes);
            self.opened = Some((head.header, ChunkKey::new(&key)));
        }
        let mut chunks = Vec::new();
        while let Some(chunk) = self.chunk()? {
            chunks.push(chunk);
        }
        Ok(chunks)
    }

    /// The file has no more bytes.
    ///
    /// # Errors
    /// [`BackupError::Truncated`] where its last chunk did not come.
    pub fn finish(self) -> Result<(), BackupError> {
        match self.ended {
            true => Ok(()),
            false => Err(BackupError::Truncated {
                offset: self.before + self.buffer.len() as u64,
            }),
        }
    }

    fn chunk(&mut self) -> Result<Option<Zeroizing<Vec<u8>>>, BackupError> {
        let Some((_, key)) = &mut self.opened else {
            return Ok(None);
        };
        if self.ended && !self.buffer.is_empty() {
            return Err(BackupError::Surplus { offset: self.before });
        }
        let damaged = BackupError::Chunk {
            chunk: key.next,
            offset: self.before,
        };
        let Some(frame) = self.buffer.get(..FRAME_BYTES) else {
            return Ok(None);
        };
        let last = match frame[0] {
            0 => false,
            1 => true,
            _ => return Err(damaged),
        };
        let bytes = read_length(&frame[1..]);
        if bytes > limits::BACKUP_CHUNK_BYTES + TAG_BYTES {
            return Err(damaged);
        }
        let Some(sealed) = self.buffer.get(FRAME_BYTES..FRAME_BYTES + bytes) else {
            return Ok(None);
        };
        let opened = key.open(sealed, last).ok_or(damaged)?;
        self.consume(FRAME_BYTES + bytes);
        self.ended = last;
        Ok(Some(opened))
    }

    fn consume(&mut self, bytes: usize) {
        self.buffer.drain(..bytes);
        self.before += bytes as u64;
    }

    fn file_key(&self, head: &Head) -> Result<Zeroizing<[u8; KEY_BYTES]>, BackupError> {
        if head.header.recovery_key != self.key.public() {
            return Err(BackupError::Key {
                wanted: recovery::fingerprint(&head.header.recovery_key),
                got: self.key.fingerprint(),
            });
        }
        let refused = |_| BackupError::Header;
        let (bound, rest) = self.buffer.split_at(head.bound);
        let (encapsulated, sealed) = rest.split_at(ENCAPSULATED_BYTES);
        let encapsulated =
            <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(encapsulated).map_err(refused)?;
        let opened = hpke::single_shot_open::<HpkeAead, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &self.key.private(),
            &encapsulated,
            INFO,
            &sealed[..KEY_BYTES + TAG_BYTES],
            bound,
        )
        .map(Zeroizing::new)
        .map_err(refused)?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        key.copy_from_slice(&opened);
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seam::SystemEntropy;

    fn key(n: u8) -> RecoveryKey {
        RecoveryKey::from_wire(&[n; 32]).expect("32 bytes")
    }

    fn header(n: u8) -> BackupHeader {
        BackupHeader {
            cluster_id: vec![9; 16],
            epoch: 3,
            index: 70,
            recovery_key: key(n).public().to_vec(),
            ..Default::default()
        }
    }

    const CHUNKS: [&[u8]; 4] = [b"keys", b"", b"objects and more objects", b"the last"];

    fn file() -> Vec<u8> {
        let (mut sealer, mut bytes) = Sealer::begin(&header(1), &SystemEntropy).expect("sealed");
        for (at, chunk) in CHUNKS.iter().enumerate() {
            bytes.extend(sealer.chunk(chunk, at + 1 == CHUNKS.len()));
        }
        bytes
    }

    fn read(bytes: &[u8], key: &RecoveryKey, step: usize) -> Result<Vec<Vec<u8>>, BackupError> {
        let mut opener = Opener::new(key);
        let mut chunks = Vec::new();
        for part in bytes.chunks(step) {
            chunks.extend(opener.push(part)?.into_iter().map(|chunk| chunk.to_vec()));
        }
        opener.finish()?;
        Ok(chunks)
    }

    #[test]
    fn a_backup_reads_back_however_its_bytes_come() {
        let file = file();
        assert!(!file.windows(7).any(|bytes| bytes == b"objects"));
        for step in [1, 7, 100, file.len()] {
            assert_eq!(read(&file, &key(1), step).expect("whole"), CHUNKS, "{step}");
        }
        assert_eq!(read_header(&file), Ok(Some(header(1))));
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_told() {
        let file = file();
        for length in 0..file.len() {
            let offset = length as u64;
            assert_eq!(
                read(&file[..length], &key(1), 64),
                Err(BackupError::Truncated { offset }),
                "cut at {length}"
            );
        }
        for bit in 0..file.len() * 8 {
            let mut damaged = file.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&damaged, &key(1), file.len()).is_err(), "bit {bit}");
        }
        let longer = [file.as_slice(), b"x"].concat();
        let offset = file.len() as u64;
        assert_eq!(read(&longer, &key(1), 64), Err(BackupError::Surplus { offset }));
    }

    #[test]
    fn damage_is_told_from_a_wrong_key_and_a_foreign_file() {
        let file = file();
        let wanted = BackupError::Key {
            wanted: key(1).fingerprint(),
            got: key(2).fingerprint(),
        };
        assert_eq!(read(&file, &key(2), 64), Err(wanted));
        assert_eq!(
            read(b"#!/bin/sh\nexit 0", &key(1), 64),
            Err(BackupError::NotBackup)
        );
        let newer = [b"BHBACKUP2\n".as_slice(), &file[10..]].concat();
        assert_eq!(read(&newer, &key(1), 64), Err(BackupError::Version));
        let mut damaged = file.clone();
        damaged[MARK.len() + LENGTH_BYTES + 3] ^= 1;
        assert_eq!(read_header(&damaged), Err(BackupError::Header));
        let at = file.len() - 3;
        damaged = file.clone();
        damaged[at] ^= 1;
        let last = BackupError::Chunk {
            chunk: 3,
            offset: (file.len() - FRAME_BYTES - CHUNKS[3].len() - TAG_BYTES) as u64,
        };
        assert_eq!(read(&damaged, &key(1), 64), Err(last));
    }

    #[test]
    fn chunks_keep_their_place_and_their_header() {
        let (mut sealer, head) = Sealer::begin(&header(1), &SystemEntropy).expect("sealed");
        let (one, two) = (sealer.chunk(b"one", false), sealer.chunk(b"two", true));
        let join = |parts: &[&Vec<u8>]| {
            parts
                .iter()
                .flat_map(|part| part.iter().copied())
                .collect::<Vec<_>>()
        };
        assert!(read(&join(&[&head, &one, &two]), &key(1), 64).is_ok());
        for moved in [
            join(&[&head, &two, &one]),
            join(&[&head, &two]),
            join(&[&head, &one, &one, &two]),
        ] {
            assert!(matches!(
                read(&moved, &key(1), 64),
                Err(BackupError::Chunk { .. })
            ));
        }
        // A chunk that was not the last does not become it.
        let mut early = join(&[&head, &one]);
        early[head.len()] = 1;
        assert!(read(&early, &key(1), 64).is_err());
        // Another header of the same key, with a sum that fits.
        let (_, other) = Sealer::begin(&header(1), &SystemEntropy).expect("sealed");
        assert!(read(&join(&[&other, &one, &two]), &key(1), 64).is_err());
        let mut forged = head.clone();
        let at = MARK.len() + LENGTH_BYTES + 3;
        forged[at] ^= 1;
        let summed = forged.len() - SUM_BYTES;
        let sum = Sha256::digest(&forged[..summed]);
        forged[summed..].copy_from_slice(&sum);
        assert_eq!(
            read(&join(&[&forged, &one, &two]), &key(1), 64),
            Err(BackupError::Header)
        );
    }

    #[test]
    fn nothing_is_sealed_to_what_is_no_key() {
        let none = BackupHeader {
            recovery_key: vec![0; 32],
            ..header(1)
        };
        assert!(matches!(
            Sealer::begin(&none, &SystemEntropy),
            Err(SealError::Key)
        ));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(tail in proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..400)) {
            let _ = read(&[MARK.as_slice(), &tail].concat(), &key(1), 64); // only that it returns
        }
    }
}
