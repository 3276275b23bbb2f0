//! How a node comes back whose certificate ended, or whose root was rotated away while it was off: over a connection on
//! which only the manager proved itself, it signs with its last committed key that it wants a certificate for a new one.
//!
//! What is signed is bound to the cluster, the node, the new key and a challenge that the manager drew a moment ago, so an
//! old request is worth nothing; and a copied one only gives a certificate for a key that the copier does not have.

use std::fmt;
use std::time::Duration;

use bulkhead_proto::limits::MESSAGE_BYTES;
use bulkhead_proto::wire::enrolment_client::EnrolmentClient;
use bulkhead_proto::wire::{GetRootRequest, ReturnRequest};
use bulkhead_proto::{ClusterId, NodeId};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use crate::certificate::parse;
use crate::key::POINT_BYTES;
use crate::seam::{Entropy, EntropyError};
use crate::{
    Bundle, BundleError, Certificate, Credentials, CredentialsError, DialError, Key, KeyError, ProfileError,
    tls,
};

/// A challenge is answered within this time.
const ANSWER: Duration = Duration::from_secs(60);
/// One question to a manager.
const CALL: Duration = Duration::from_secs(10);
const NONCE_BYTES: usize = 16;
const TIME_BYTES: usize = 8;
const TAG_BYTES: usize = 32;

/// Draws challenges and knows its own again, without keeping them.
pub struct Challenges(hmac::Key);

impl fmt::Debug for Challenges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Challenges(…)")
    }
}

impl Challenges {
    /// Challenges of this program's life.
    ///
    /// # Errors
    /// Where the system gives no random bytes.
    pub fn new() -> Result<Self, KeyError> {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new());
        Ok(Self(key.map_err(|_| KeyError::Generate)?))
    }

    /// A new one. `now` is a reading of a monotonic clock.
    ///
    /// # Errors
    /// Where there are no random bytes.
    pub fn draw(&self, entropy: &dyn Entropy, now: Duration) -> Result<Vec<u8>, EntropyError> {
        let mut challenge = vec![0; NONCE_BYTES];
        entropy.fill(&mut challenge)?;
        challenge.extend(millis(now).to_be_bytes());
        let tag = hmac::sign(&self.0, &challenge);
        challenge.extend(tag.as_ref());
        Ok(challenge)
    }

    /// Whether it was drawn here, within a minute.
    pub fn holds(&self, challenge: &[u8], now: Duration) -> bool {
        let Some((drawn, tag)) = challenge.split_at_checked(NONCE_BYTES + TIME_BYTES) else {
            return false;
        };
        if tag.len() != TAG_BYTES || hmac::verify(&self.0, drawn, tag).is_err() {
            return false;
        }
        let at = drawn[NONCE_BYTES..].try_into().map_or(0, u64::from_be_bytes);
        millis(now)
            .checked_sub(at)
            .is_some_and(|age| age <= millis(ANSWER))
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What is signed.
fn message(cluster: ClusterId, node: NodeId, challenge: &[u8], csr: &[u8]) -> Vec<u8> {
    [
        b"bulkhead return 1\0".as_slice(),
        cluster.as_bytes(),
        node.as_bytes(),
        &Sha256::digest(challenge),
        &Sha256::digest(csr),
    ]
    .concat()
}

/// Whether the key of this certificate signed the request.
pub fn proves(certificate: &Certificate, challenge: &[u8], csr: &[u8], signature: &[u8]) -> bool {
    let Ok(x509) = parse(certificate.der()) else {
        return false;
    };
    let spki = x509.public_key().raw;
    let Some(point) = spki.len().checked_sub(POINT_BYTES).and_then(|at| spki.get(at..)) else {
        return false;
    };
    let subject = certificate.subject();
    let message = message(subject.cluster, subject.node, challenge, csr);
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
        .verify(&message, signature)
        .is_ok()
}

/// Why a node did not come back.
#[derive(Debug, thiserror::Error)]
pub enum ComebackError {
    /// The address is none.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The manager refused, or was not reached.
    #[error("the manager did not take this node back")]
    Refused(#[from] Box<tonic::Status>),
    /// No answer.
    #[error("the manager did not answer in time")]
    Late,
    /// No new key, or no signature.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No request id.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// What came does not fit.
    #[error("the certificate that came does not fit the profile")]
    Profile(#[from] ProfileError),
    /// What came does not fit.
    #[error("the roots that came do not fit")]
    Roots(#[from] BundleError),
    /// What came is for another node or key.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

impl ComebackError {
    /// Whether nobody decided: there was no way to a manager, or none there that could answer.
    pub fn is_undecided(&self) -> bool {
        match self {
            Self::Dial(_) | Self::Late => true,
            Self::Refused(status) => matches!(
                status.code(),
                tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Cancelled
            ),
            _ => false,
        }
    }
}

/// Asks the manager at `host:port` to take this node back; what it gives is to be taken up at once. Nothing is kept here. A
/// manager names the other one; then the other's certificate may have ended, too.
///
/// # Errors
/// [`ComebackError`].
pub async fn come_back(
    current: &Credentials,
    address: &str,
    expect: tls::Expect,
    entropy: &dyn Entropy,
) -> Result<Credentials, ComebackError> {
    let subject = current.certificate.subject();
    let channel = tls::bundle_channel(&current.bundle, address, expect)?;
    let mut client = EnrolmentClient::new(channel).max_decoding_message_size(MESSAGE_BYTES);
    let asked = async {
        let root = client.get_root(GetRootRequest {}).await.map_err(Box::new)?;
        let challenge = root.into_inner().challenge;
        let key = Key::generate()?;
        let csr = key.csr()?;
        let mut request_id = vec![0; 16];
        entropy.fill(&mut request_id)?;
        let request = ReturnRequest {
            node_id: subject.node.to_wire(),
            signature: current
                .key
                .sign(&message(subject.cluster, subject.node, &challenge, &csr))?,
            key_id: current.key.key_id().to_wire(),
            certificate: current.certificate.der().to_vec(),
            chain: current.chain.clone(),
            challenge,
            csr,
            request_id,
        };
        let answer = client.r#return(request).await.map_err(Box::new)?.into_inner();
        let credentials = Credentials {
            certificate: Certificate::from_der(&answer.certificate)?,
            chain: answer.chain,
            bundle: Bundle::from_ders(answer.roots)?,
            key,
        };
        if credentials.certificate.key_id() != credentials.key.key_id() {
            return Err(CredentialsError::Key.into());
        }
        if credentials.certificate.subject() != subject {
            return Err(CredentialsError::Subject.into());
        }
        Ok(credentials)
    };
    timeout(CALL, asked).await.map_err(|_| ComebackError::Late)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seam::SystemEntropy;
    use crate::testing::{authority, credentials};
    use bulkhead_proto::Role;

    #[test]
    fn a_challenge_is_known_again_for_a_minute_and_no_other() {
        let (ours, others) = (
            Challenges::new().expect("random"),
            Challenges::new().expect("random"),
        );
        let at = Duration::from_secs(1_000);
        let challenge = ours.draw(&SystemEntropy, at).expect("random");
        assert!(ours.holds(&challenge, at) && ours.holds(&challenge, at + ANSWER));
        assert!(!ours.holds(&challenge, at + ANSWER + Duration::from_millis(1)));
        assert!(!ours.holds(&challenge, at - Duration::from_millis(1)));
        assert!(!others.holds(&challenge, at));
        for at_byte in 0..challenge.len() {
            let mut forged = challenge.clone();
            forged[at_byte] ^= 1;
            assert!(!ours.holds(&forged, at), "byte {at_byte}");
            assert!(!ours.holds(&challenge[..at_byte], at), "cut at {at_byte}");
        }
    }

    #[test]
    fn only_the_key_of_the_certificate_proves_and_only_for_this_request() {
        let authority = authority();
        let (mine, others) = (
            credentials(&authority, Role::Worker, 1),
            credentials(&authority, Role::Worker, 2),
        );
        let subject = mine.certificate.subject();
        let sign = |by: &Credentials, challenge: &[u8], csr: &[u8]| {
            let message = message(subject.cluster, subject.node, challenge, csr);
            by.key.sign(&message).expect("signed")
        };
        let good = sign(&mine, b"now", b"csr");
        assert!(proves(&mine.certificate, b"now", b"csr", &good));
        for (challenge, csr, signature) in [
            (b"old".as_slice(), b"csr".as_slice(), good.clone()),
            (b"now", b"another", good.clone()),
            (b"now", b"csr", sign(&others, b"now", b"csr")),
            (b"now", b"csr", Vec::new()),
            (b"now", b"csr", good[1..].to_vec()),
        ] {
            assert!(!proves(&mine.certificate, challenge, csr, &signature));
        }
        assert!(!proves(&others.certificate, b"now", b"csr", &good));
    }
}
