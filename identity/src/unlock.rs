//! Unlock keys: what a manager's key file is sealed with where autolock is on, in one piece of text that a person keeps.
//!
//! `BULKHEAD-UNLOCK-1-<generation>-<key and check, base32>`. The generation rises with each rotation, so that a file and a
//! key that do not belong together can say so. The check tells a mistyped key from a wrong one before anything is tried.

use std::fmt;
use std::str::FromStr;

use bulkhead_proto::ids::base32_lower;
use bulkhead_proto::limits::UNLOCK_KEY_TEXT_BYTES;
use chacha20poly1305::aead::{AeadInPlace as _, KeyInit as _};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::Unswapped;
use crate::seam::{Entropy, EntropyError};

/// Bytes of the key itself.
pub const UNLOCK_KEY_BYTES: usize = 32;
const CHECK_BYTES: usize = 4;
const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
const PREFIX: &str = "BULKHEAD";
const KIND: &str = "UNLOCK";
const VERSION: &str = "1";

/// The key of one generation; wiped when dropped, never printed.
#[derive(Clone)]
pub struct UnlockKey {
    generation: u32,
    key: Unswapped<[u8; UNLOCK_KEY_BYTES]>,
}

/// What was sealed does not open: another key, or damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it does not open with this unlock key")]
pub struct Refused;

impl UnlockKey {
    /// A key of random bytes.
    ///
    /// # Errors
    /// Where the system gives none.
    pub fn generate(generation: u32, entropy: &dyn Entropy) -> Result<Self, EntropyError> {
        let key = Unswapped::filled(|key| entropy.fill(key))?;
        Ok(Self { generation, key })
    }

    /// A key that was kept elsewhere; nothing where it has another length.
    pub fn from_bytes(generation: u32, bytes: &[u8]) -> Option<Self> {
        let key = Unswapped::copied(bytes)?;
        Some(Self { generation, key })
    }

    /// Which key of the cluster it is; the first is 1.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The key itself, to be sealed elsewhere.
    pub fn expose(&self) -> &[u8; UNLOCK_KEY_BYTES] {
        &self.key
    }

    /// The key as it is handed to a person. It is not `Display`, so that no format string prints it by chance.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new([0; UNLOCK_KEY_BYTES + CHECK_BYTES]);
        bytes[..UNLOCK_KEY_BYTES].copy_from_slice(self.key.as_slice());
        bytes[UNLOCK_KEY_BYTES..].copy_from_slice(&self.check());
        let encoded = Zeroizing::new(base32_lower().encode(bytes.as_slice()));
        Zeroizing::new(format!(
            "{PREFIX}-{KIND}-{VERSION}-{}-{}",
            self.generation,
            encoded.as_str()
        ))
    }

    fn check(&self) -> [u8; CHECK_BYTES] {
        let hash = Sha256::new()
            .chain_update(b"bulkhead unlock key 1")
            .chain_update(self.generation.to_be_bytes())
            .chain_update(self.key.as_slice())
            .finalize();
        [hash[0], hash[1], hash[2], hash[3]]
    }

    /// Seals for one place (XChaCha20-Poly1305, draft-irtf-cfrg-xchacha-03): nonce, ciphertext, tag. The content is
    /// overwritten.
    ///
    /// # Errors
    /// Where the system gives no random bytes.
    pub(crate) fn seal(
        &self,
        place: &[u8],
        mut content: Zeroizing<Vec<u8>>,
        entropy: &dyn Entropy,
    ) -> Result<Vec<u8>, EntropyError> {
        let mut nonce = [0; NONCE_BYTES];
        entropy.fill(&mut nonce)?;
        let tag = self
            .cipher()
            .encrypt_in_place_detached(XNonce::from_slice(&nonce), &self.bound(place), &mut content)
            .expect("far below the cipher's bound");
        Ok([&nonce[..], &content, &tag].concat())
    }

    /// Opens what was sealed for this place.
    ///
    /// # Errors
    /// [`Refused`].
    pub(crate) fn open(&self, place: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refused> {
        let (nonce, rest) = sealed.split_at_checked(NONCE_BYTES).ok_or(Refused)?;
        let at = rest.len().checked_sub(TAG_BYTES).ok_or(Refused)?;
        let (ciphertext, tag) = rest.split_at(at);
        let mut content = Zeroizing::new(ciphertext.to_vec());
        self.cipher()
            .decrypt_in_place_detached(
                XNonce::from_slice(nonce),
                &self.bound(place),
                &mut content,
                Tag::from_slice(tag),
            )
            .map_err(|_| Refused)?;
        Ok(content)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(self.expose().into())
    }

    fn bound(&self, place: &[u8]) -> Vec<u8> {
        [b"bulkhead lock 1", &self.generation.to_be_bytes()[..], place].concat()
    }
}

impl fmt::Debug for UnlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UnlockKey({})", self.generation)
    }
}

/// A text that is no unlock key. What was typed is not repeated: it may hold most of a real one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnlockKeyError {
    /// Not five parts, or another beginning.
    #[error(
        "an unlock key reads {PREFIX}-{KIND}-{VERSION}-<number>-<key>; copy it whole, from `bulkhead cluster unlock-key show`"
    )]
    Shape,
    /// A version that this program does not know.
    #[error("this unlock key's version is not {VERSION}; use a program of the cluster's own version")]
    Version,
    /// The key does not decode, or its check does not fit.
    #[error("the unlock key is mistyped: a character is wrong, missing or too many")]
    Mistyped,
}

impl FromStr for UnlockKey {
    type Err = UnlockKeyError;

    /// Reads an unlock key; white space around it, as a file's last newline, does not count.
    fn from_str(text: &str) -> Result<Self, UnlockKeyError> {
        if text.len() > UNLOCK_KEY_TEXT_BYTES {
            return Err(UnlockKeyError::Shape);
        }
        let parts: Vec<&str> = text.trim().split('-').collect();
        let [PREFIX, KIND, version, generation, encoded] = parts[..] else {
            return Err(UnlockKeyError::Shape);
        };
        if version != VERSION {
            return Err(UnlockKeyError::Version);
        }
        let generation = generation.parse().map_err(|_| UnlockKeyError::Mistyped)?;
        let bytes = base32_lower()
            .decode(encoded.as_bytes())
            .map(Zeroizing::new)
            .map_err(|_| UnlockKeyError::Mistyped)?;
        let (key, check) = bytes
            .split_at_checked(UNLOCK_KEY_BYTES)
            .ok_or(UnlockKeyError::Mistyped)?;
        let read = Self::from_bytes(generation, key).ok_or(UnlockKeyError::Mistyped)?;
        match check == read.check() {
            true => Ok(read),
            false => Err(UnlockKeyError::Mistyped),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::seam::SystemEntropy;

    fn key(generation: u32) -> UnlockKey {
        UnlockKey::from_bytes(generation, &[7; UNLOCK_KEY_BYTES]).expect("its length")
    }

    #[test]
    fn a_key_survives_its_text_and_every_wrong_character_is_told() {
        let text = key(3).to_text();
        let read: UnlockKey = format!(" {}\n", text.as_str()).parse().expect("our own text");
        assert_eq!((read.generation(), read.expose()), (3, key(3).expose()));
        assert!(text.len() <= UNLOCK_KEY_TEXT_BYTES);
        for at in 0..text.len() {
            let mut wrong = text.as_bytes().to_vec();
            wrong[at] = if wrong[at] == b'5' { b'6' } else { b'5' };
            let wrong = String::from_utf8(wrong).expect("still ASCII");
            assert!(wrong.parse::<UnlockKey>().is_err(), "{at}");
        }
        for (text, error) in [
            ("", UnlockKeyError::Shape),
            ("SWMKEY-1-abc", UnlockKeyError::Shape),
            ("BULKHEAD-UNLOCK-2-1-a", UnlockKeyError::Version),
            ("BULKHEAD-UNLOCK-1-x-a", UnlockKeyError::Mistyped),
            ("BULKHEAD-UNLOCK-1-1-", UnlockKeyError::Mistyped),
            ("BULKHEAD-1-abc-def", UnlockKeyError::Shape),
        ] {
            assert_eq!(text.parse::<UnlockKey>().err(), Some(error), "{text}");
        }
        assert_eq!(
            "x".repeat(1 << 20).parse::<UnlockKey>().err(),
            Some(UnlockKeyError::Shape)
        );
    }

    #[test]
    fn what_is_sealed_opens_in_its_place_with_its_own_key_alone() {
        let content = || Zeroizing::new(b"a data key".to_vec());
        let sealed = key(1).seal(b"here", content(), &SystemEntropy).expect("sealed");
        assert_eq!(key(1).open(b"here", &sealed).expect("its own"), content());
        assert_eq!(key(1).open(b"there", &sealed), Err(Refused));
        assert_eq!(key(2).open(b"here", &sealed), Err(Refused), "another generation");
        let other = UnlockKey::from_bytes(1, &[8; UNLOCK_KEY_BYTES]).expect("its length");
        assert_eq!(other.open(b"here", &sealed), Err(Refused));
        for bit in 0..sealed.len() * 8 {
            let mut damaged = sealed.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key(1).open(b"here", &damaged), Err(Refused), "bit {bit}");
        }
        for bytes in 0..sealed.len() {
            assert_eq!(key(1).open(b"here", &sealed[..bytes]), Err(Refused), "{bytes}");
        }
        assert!(!sealed.windows(4).any(|four| four == b"data"));
    }

    #[test]
    fn no_key_prints() {
        assert_eq!(format!("{:?}", key(7)), "UnlockKey(7)");
        let mistyped = format!("{}x", key(1).to_text().as_str());
        let error = mistyped.parse::<UnlockKey>().expect_err("one too many");
        assert!(!format!("{error} {error:?}").contains(&mistyped[24..40]));
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,300}") {
            let _ = text.parse::<UnlockKey>(); // only that it returns
        }
    }
}
