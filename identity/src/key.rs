//! A node's private key: ECDSA on P-256 with SHA-256, and nothing else.

use std::fmt;
use std::sync::Arc;

use bulkhead_proto::KeyId;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use rustls::sign::{Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};

use crate::unswapped::Unswapped;

/// Bytes of a P-256 key as PKCS#8 are below this; what is longer is not one.
const PKCS8_BYTES: usize = 512;

/// A private key, never printed. Clones are handles to the same one.
#[derive(Clone)]
pub struct Key {
    private: Arc<Unswapped<Private>>,
    key_id: KeyId,
}

struct Private {
    pair: EcdsaKeyPair,
    pkcs8: [u8; PKCS8_BYTES],
    pkcs8_len: usize,
}

/// A key that cannot be made or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The system gave no random bytes.
    #[error("no key could be made: the system gave no random bytes")]
    Generate,
    /// These bytes are no P-256 key.
    #[error("this is not a P-256 private key in PKCS#8; restore the key file, or join again")]
    Pkcs8,
    /// The request could not be signed.
    #[error("the request could not be signed")]
    Sign,
}

impl Key {
    /// Draws a new key.
    ///
    /// # Errors
    /// Where the system gives no random bytes.
    pub fn generate() -> Result<Self, KeyError> {
        #[cfg(feature = "simulated")]
        if let Some(pkcs8) = crate::simulated::world().and_then(|world| world.key()) {
            return Self::from_pkcs8(&pkcs8);
        }
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
            .map_err(|_| KeyError::Generate)?;
        Self::from_pkcs8(document.as_ref())
    }

    /// Reads a key that was kept.
    ///
    /// # Errors
    /// Where it is not a P-256 key, or its halves do not belong together.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, KeyError> {
        if pkcs8.len() > PKCS8_BYTES {
            return Err(KeyError::Pkcs8);
        }
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8, &SystemRandom::new())
            .map_err(|_| KeyError::Pkcs8)?;
        let key_id = KeyId::of_spki(&spki(pair.public_key().as_ref()));
        let mut private = Unswapped::new(Private {
            pair,
            pkcs8: [0; PKCS8_BYTES],
            pkcs8_len: pkcs8.len(),
        });
        private.pkcs8[..pkcs8.len()].copy_from_slice(pkcs8);
        Ok(Self {
            private: Arc::new(private),
            key_id,
        })
    }

    /// The key as PKCS#8 (RFC 5208), for the key file or a sealed record.
    pub fn pkcs8(&self) -> &[u8] {
        &self.private.pkcs8[..self.private.pkcs8_len]
    }

    /// Who the holder of this key is.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// A signature over this message: ECDSA with SHA-256, ASN.1.
    ///
    /// # Errors
    /// Where signing fails.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let signature = self
            .private
            .pair
            .sign(&SystemRandom::new(), message)
            .map_err(|_| KeyError::Sign)?;
        Ok(signature.as_ref().to_vec())
    }

    /// A certificate request (PKCS#10) that gives the public key, proves that we hold its private half, and asks for
    /// nothing: names are the cluster's to give.
    ///
    /// # Errors
    /// Where signing fails.
    pub fn csr(&self) -> Result<Vec<u8>, KeyError> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let request = params.serialize_request(self).map_err(|_| KeyError::Sign)?;
        Ok(request.der().to_vec())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({:?}, …)", self.key_id)
    }
}

impl rcgen::PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        self.private.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Key::sign(self, message).map_err(|_| rcgen::Error::RingUnspecified)
    }
}

impl SigningKey for Key {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered
            .contains(&self.scheme())
            .then(|| Box::new(self.clone()) as Box<dyn Signer>)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl Signer for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        Key::sign(self, message).map_err(|error| rustls::Error::General(error.to_string()))
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ECDSA_NISTP256_SHA256
    }
}

/// Bytes of an uncompressed P-256 point (SEC 1 §2.3.3).
pub(crate) const POINT_BYTES: usize = 65;

/// SubjectPublicKeyInfo of a P-256 key up to its point (RFC 5480 §2): id-ecPublicKey, prime256v1.
const SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

fn spki(point: &[u8]) -> Vec<u8> {
    [SPKI_PREFIX.as_slice(), point].concat()
}

/// Whether this is the one encoding of an uncompressed P-256 key: so one key has one id.
pub(crate) fn is_p256_spki(spki_der: &[u8]) -> bool {
    spki_der.len() == SPKI_PREFIX.len() + POINT_BYTES
        && spki_der.starts_with(&SPKI_PREFIX)
        && spki_der[SPKI_PREFIX.len()] == 4
}

#[cfg(test)]
mod tests {
    use rcgen::PublicKeyData as _;

    use super::*;

    #[test]
    fn a_key_reads_back_and_has_one_id() {
        let key = Key::generate().expect("a key");
        let again = Key::from_pkcs8(key.pkcs8()).expect("our own key");
        assert_eq!(key.key_id(), again.key_id());
        assert_eq!(key.key_id(), KeyId::of_spki(&key.subject_public_key_info()));
        assert!(is_p256_spki(&key.subject_public_key_info()));
        assert_ne!(key.key_id(), Key::generate().expect("a key").key_id());
    }

    #[test]
    fn what_is_no_p256_key_is_refused() {
        let key = Key::generate().expect("a key");
        let p384 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).expect("a key");
        let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("a key");
        let mut torn = key.pkcs8().to_vec();
        torn.pop();
        let mut swapped = key.pkcs8().to_vec();
        *swapped.last_mut().expect("bytes") ^= 1; // the public half no longer fits
        for bytes in [
            &[],
            torn.as_slice(),
            &swapped,
            p384.serialized_der(),
            ed25519.serialized_der(),
            &[0; 4096],
        ] {
            assert_eq!(Key::from_pkcs8(bytes).expect_err("refused"), KeyError::Pkcs8);
        }
    }

    #[test]
    fn debug_shows_only_the_id() {
        let key = Key::generate().expect("a key");
        assert_eq!(format!("{key:?}"), format!("Key({:?}, …)", key.key_id()));
    }
}
