//! Certificate requests (PKCS#10, RFC 2986): a public key and the proof of its private half, nothing else.

use bulkhead_proto::KeyId;
use bulkhead_proto::limits::CSR_BYTES;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::OID_SIG_ECDSA_WITH_SHA256;
use x509_parser::prelude::FromDer as _;

use crate::key::is_p256_spki;

/// A P-256 public key, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    spki_der: Vec<u8>,
}

impl PublicKey {
    /// Reads a SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// [`CsrError::Key`] where it is not an uncompressed P-256 key.
    pub fn from_spki(spki_der: &[u8]) -> Result<Self, CsrError> {
        match is_p256_spki(spki_der) {
            true => Ok(Self {
                spki_der: spki_der.to_vec(),
            }),
            false => Err(CsrError::Key),
        }
    }

    /// The SubjectPublicKeyInfo's DER.
    pub fn spki_der(&self) -> &[u8] {
        &self.spki_der
    }

    /// Who the holder is.
    pub fn key_id(&self) -> KeyId {
        KeyId::of_spki(&self.spki_der)
    }
}

/// A certificate request that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Too many bytes.
    #[error("a certificate request has at most {CSR_BYTES} bytes")]
    Long,
    /// Not PKCS#10, or something after it.
    #[error("this is not a PKCS#10 certificate request in DER")]
    Encoding,
    /// It asks for a name.
    #[error("a certificate request must not ask for a name: the cluster gives it; leave the subject empty")]
    AskedName,
    /// It asks for extensions or carries attributes.
    #[error("a certificate request must not ask for extensions or carry attributes; leave them out")]
    AskedExtensions,
    /// Another kind of key.
    #[error("the key must be ECDSA on P-256, uncompressed")]
    Key,
    /// Another signature algorithm, or it does not verify.
    #[error("the request's own signature does not verify as ECDSA with SHA-256: it does not prove the key")]
    Signature,
}

/// The public key that a request gives, once its own signature proves that the asker holds the private half.
///
/// # Errors
/// [`CsrError`], with the first thing that is wrong.
pub fn public_key(csr_der: &[u8]) -> Result<PublicKey, CsrError> {
    if csr_der.len() > CSR_BYTES {
        return Err(CsrError::Long);
    }
    let (rest, request) = X509CertificationRequest::from_der(csr_der).map_err(|_| CsrError::Encoding)?;
    if !rest.is_empty() {
        return Err(CsrError::Encoding);
    }
    let info = &request.certification_request_info;
    if info.subject.iter_attributes().next().is_some() {
        return Err(CsrError::AskedName);
    }
    if !info.attributes().is_empty() {
        return Err(CsrError::AskedExtensions);
    }
    let key = PublicKey::from_spki(info.subject_pki.raw)?;
    if request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
        return Err(CsrError::Signature);
    }
    request.verify_signature().map_err(|_| CsrError::Signature)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;
    use crate::Key;
    use crate::testing::rsa_request;

    fn empty() -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
    }

    #[test]
    fn our_own_request_gives_its_key() {
        let key = Key::generate().expect("a key");
        let csr = key.csr().expect("a request");
        assert!(csr.len() < CSR_BYTES / 8);
        assert_eq!(public_key(&csr).expect("our own request").key_id(), key.key_id());
    }

    #[test]
    fn a_request_that_asks_for_more_than_a_key_is_refused() {
        let key = Key::generate().expect("a key");
        let mut named = empty();
        named.distinguished_name.push(DnType::CommonName, "root");
        let mut alternative = empty();
        alternative
            .subject_alt_names
            .push(SanType::DnsName("a.b".try_into().expect("a name")));
        let mut authority = empty();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        for (params, error) in [
            (named, CsrError::AskedName),
            (alternative, CsrError::AskedExtensions),
            (authority, CsrError::AskedExtensions),
        ] {
            let csr = params.serialize_request(&key).expect("a request");
            assert_eq!(public_key(csr.der()).expect_err("refused"), error);
        }
    }

    #[test]
    fn another_kind_of_key_is_refused() {
        for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            let pair = KeyPair::generate_for(algorithm).expect("a key");
            let csr = empty().serialize_request(&pair).expect("a request");
            assert_eq!(public_key(csr.der()).expect_err("refused"), CsrError::Key);
        }
        let rsa = rsa_request();
        let (_, read) = X509CertificationRequest::from_der(&rsa).expect("PKCS#10");
        read.verify_signature().expect("nothing but its kind is wrong");
        assert_eq!(public_key(&rsa).expect_err("refused"), CsrError::Key);
    }

    #[test]
    fn a_request_that_proves_nothing_is_refused() {
        let csr = Key::generate().expect("a key").csr().expect("a request");
        let other = Key::generate().expect("a key").csr().expect("a request");
        let mut flipped = csr.clone();
        let middle = csr.len() - 20;
        flipped[middle] ^= 1;
        assert_eq!(public_key(&flipped).expect_err("refused"), CsrError::Signature);
        // Another's key under our signature.
        let (own, others) = (public_key(&csr), public_key(&other));
        let (own, others) = (own.expect("our own request"), others.expect("another's request"));
        let at = csr
            .windows(own.spki_der.len())
            .position(|bytes| bytes == own.spki_der);
        let at = at.expect("the request holds its key");
        let mut stolen = csr.clone();
        stolen[at..at + own.spki_der.len()].copy_from_slice(&others.spki_der);
        assert_eq!(public_key(&stolen).expect_err("refused"), CsrError::Signature);
        let mut longer = csr.clone();
        longer.push(0);
        assert_eq!(public_key(&longer).expect_err("refused"), CsrError::Encoding);
        assert_eq!(public_key(&[]).expect_err("refused"), CsrError::Encoding);
        assert_eq!(
            public_key(&vec![0x30; CSR_BYTES + 1]).expect_err("refused"),
            CsrError::Long
        );
    }
}
