//! The recovery key: what opens the backups of a cluster whose managers are gone.
//!
//! The cluster knows the public half alone, so that neither a manager nor whoever finds a backup can open one. The private
//! half is a line of text in a file of the operators'. It ends with four bytes of its own hash: a copy from paper that is
//! mistyped is told from another key.

use std::fmt;

use bulkhead_proto::ids::base32_lower;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable as _, Kem, Serializable as _};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::Unswapped;
use crate::seam::{Entropy, EntropyError};

pub(crate) type PrivateKey = <X25519HkdfSha256 as Kem>::PrivateKey;
pub(crate) type PublicKey = <X25519HkdfSha256 as Kem>::PublicKey;

/// Bytes of either half.
pub const RECOVERY_KEY_BYTES: usize = 32;
/// Bytes of a recovery key's file; the line itself has 80.
pub const RECOVERY_FILE_BYTES: u64 = 1_024;

const PREFIX: &str = "BULKHEAD-RECOVERY-1-";
const CHECK_BYTES: usize = 4;

/// The private half; wiped when dropped, never printed.
pub struct RecoveryKey(Unswapped<[u8; RECOVERY_KEY_BYTES]>);

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecoveryKey({}, …)", self.fingerprint())
    }
}

/// What is no recovery key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryKeyError {
    /// It does not begin as one.
    #[error("a recovery key reads {PREFIX}<58 characters>, this does not")]
    Shape,
    /// A character is wrong.
    #[error("this recovery key is mistyped or cut: its last characters do not fit the others")]
    Check,
    /// Another length, on the wire.
    #[error("a recovery key has {RECOVERY_KEY_BYTES} bytes")]
    Length,
}

impl RecoveryKey {
    /// A new key.
    ///
    /// # Errors
    /// Where the system gives no random bytes.
    pub fn generate(entropy: &dyn Entropy) -> Result<Self, EntropyError> {
        Ok(Self(Unswapped::filled(|bytes| entropy.fill(bytes))?))
    }

    /// Reads a key from a request.
    ///
    /// # Errors
    /// Where it has another length.
    pub fn from_wire(bytes: &[u8]) -> Result<Self, RecoveryKeyError> {
        Unswapped::copied(bytes).map(Self).ok_or(RecoveryKeyError::Length)
    }

    /// The key itself, for the one request that says it.
    pub fn expose(&self) -> &[u8; RECOVERY_KEY_BYTES] {
        &self.0
    }

    /// The key as it is kept in a file. Not `Display`, so that no format string prints it by chance.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new([0; RECOVERY_KEY_BYTES + CHECK_BYTES]);
        bytes[..RECOVERY_KEY_BYTES].copy_from_slice(self.0.as_slice());
        bytes[RECOVERY_KEY_BYTES..].copy_from_slice(&check(&self.0));
        let text = Zeroizing::new(base32_lower().encode(bytes.as_slice()));
        Zeroizing::new(format!("{PREFIX}{}", text.as_str()))
    }

    /// Reads the content of a key's file: one line is the key, those that begin with `#` say something about it.
    ///
    /// # Errors
    /// [`RecoveryKeyError`]. What was read is not repeated: it may hold most of a real one.
    pub fn parse(text: &str) -> Result<Self, RecoveryKeyError> {
        let mut lines = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Err(RecoveryKeyError::Shape);
        };
        let encoded = line.strip_prefix(PREFIX).ok_or(RecoveryKeyError::Shape)?;
        let decoded = base32_lower().decode(encoded.as_bytes());
        let decoded = Zeroizing::new(decoded.map_err(|_| RecoveryKeyError::Check)?);
        let (key, sum) = decoded
            .split_at_checked(RECOVERY_KEY_BYTES)
            .ok_or(RecoveryKeyError::Check)?;
        let key = Self::from_wire(key)?;
        match bool::from(sum.ct_eq(&check(&key.0))) {
            true => Ok(key),
            false => Err(RecoveryKeyError::Check),
        }
    }

    /// The public half.
    pub fn public(&self) -> [u8; RECOVERY_KEY_BYTES] {
        X25519HkdfSha256::sk_to_pk(&self.private()).to_bytes().into()
    }

    /// How people tell keys apart.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.public())
    }

    pub(crate) fn private(&self) -> PrivateKey {
        PrivateKey::from_bytes(self.0.as_slice()).expect("any 32 bytes are an X25519 key")
    }
}

fn check(key: &[u8; RECOVERY_KEY_BYTES]) -> [u8; CHECK_BYTES] {
    let hash = Sha256::new()
        .chain_update(b"bulkhead recovery key check")
        .chain_update(key)
        .finalize();
    hash[..CHECK_BYTES].try_into().expect("the first four of 32")
}

/// How people tell public halves apart: the first 80 bits of the SHA-256.
pub fn fingerprint(public: &[u8]) -> String {
    base32_lower().encode(&Sha256::digest(public)[..10])
}

/// Whether these bytes are a public half that something can be sealed to.
pub fn is_public(bytes: &[u8]) -> bool {
    // Points of small order seal to everybody; HPKE refuses them when it seals, so it is asked now.
    PublicKey::from_bytes(bytes).is_ok_and(|key| {
        let mut nothing = StdRng::from_seed([0; 32]);
        X25519HkdfSha256::encap(&key, None, &mut nothing).is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seam::SystemEntropy;

    fn key(n: u8) -> RecoveryKey {
        RecoveryKey(Unswapped::new([n; RECOVERY_KEY_BYTES]))
    }

    #[test]
    fn a_key_reads_back_from_its_file_and_a_mistyped_one_does_not() {
        let key = RecoveryKey::generate(&SystemEntropy).expect("random");
        let text = key.to_text();
        let file = format!("# opens backups\n\n  {}  \n", text.as_str());
        assert_eq!(RecoveryKey::parse(&file).expect("its own").expose(), key.expose());
        for at in PREFIX.len()..text.len() {
            let mut mistyped = text.as_bytes().to_vec();
            mistyped[at] = if mistyped[at] == b'a' { b'b' } else { b'a' };
            let mistyped = String::from_utf8(mistyped).expect("letters");
            assert_eq!(
                RecoveryKey::parse(&mistyped).map(drop),
                Err(RecoveryKeyError::Check),
                "{at}"
            );
            assert!(RecoveryKey::parse(&text[..at]).is_err(), "cut at {at}");
        }
        let twice = format!("{0}\n{0}\n", text.as_str());
        for none in ["", "# nothing", "BULKHEAD-1-abc", &twice] {
            assert_eq!(
                RecoveryKey::parse(none).map(drop),
                Err(RecoveryKeyError::Shape),
                "{none}"
            );
        }
    }

    #[test]
    fn a_key_does_not_print_and_has_a_fingerprint() {
        let printed = format!("{:?}", key(7));
        assert!(printed.contains(&fingerprint(&key(7).public())), "{printed}");
        assert!(!key(7).to_text().contains(&printed) && !printed.contains("BULKHEAD"));
        assert_ne!(key(1).fingerprint(), key(2).fingerprint());
    }

    #[test]
    fn what_seals_to_everybody_is_no_public_half() {
        assert!(is_public(&key(1).public()));
        for bad in [vec![0; 32], vec![1; 31], Vec::new()] {
            assert!(!is_public(&bad), "{bad:?}");
        }
    }
}
