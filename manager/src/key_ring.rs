//! The cluster key ring: what seals secrets and the root's key inside the replicated state.
//!
//! Each epoch is one random key, enveloped (HPKE, RFC 9180) to each manager's own X25519 key, so that the state itself,
//! its snapshots and its backups hold no plaintext. Epoch keys are opened when first needed and wiped with the ring.

mod keeping;
mod renewal;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_identity::Unswapped;
use bulkhead_identity::seam::{Entropy, EntropyError};
use bulkhead_proto::NodeId;
use bulkhead_proto::wire::{Cluster, Envelope, KeyRingEpoch, Sealed};
use bulkhead_raft::state::Key;
use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable as _, Kem, OpModeR, OpModeS, Serializable as _};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use zeroize::Zeroizing;

pub use keeping::Keeping;
pub use renewal::{cluster_place, holders, left};

type PrivateKey = <X25519HkdfSha256 as Kem>::PrivateKey;
type PublicKey = <X25519HkdfSha256 as Kem>::PublicKey;
type Encapsulated = <X25519HkdfSha256 as Kem>::EncappedKey;

/// Bytes of an epoch key and of an X25519 key.
const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;

/// One key of the ring.
pub type EpochKey = Unswapped<[u8; KEY_BYTES]>;

/// Why something could not be sealed or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyRingError {
    /// The ring has no epoch yet.
    #[error("the cluster has no key ring")]
    Empty,
    /// This manager has no envelope of the epoch.
    #[error("key-ring epoch {0} has no envelope for this manager")]
    NoEnvelope(u32),
    /// The envelope or the sealed object does not open: damaged, moved, or under another key.
    #[error("what is sealed under key-ring epoch {0} does not open: it is damaged or belongs elsewhere")]
    Refused(u32),
    /// A public key that is none.
    #[error("this is not an X25519 public key")]
    PublicKey,
    /// No random bytes.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
}

/// A manager's own X25519 key, which opens the envelopes that are made for it.
#[derive(Clone)]
pub struct EnvelopeKey(Unswapped<[u8; KEY_BYTES]>);

impl EnvelopeKey {
    /// A key of random bytes.
    ///
    /// # Errors
    /// Where the system gives none.
    pub fn generate(entropy: &dyn Entropy) -> Result<Self, EntropyError> {
        Ok(Self(Unswapped::filled(|bytes| entropy.fill(bytes))?))
    }

    /// A key that was kept; any 32 bytes are one (RFC 7748 §5 clamps them).
    pub fn from_bytes(bytes: Unswapped<[u8; KEY_BYTES]>) -> Self {
        Self(bytes)
    }

    /// The key itself, for the key file alone.
    pub fn into_bytes(self) -> Unswapped<[u8; KEY_BYTES]> {
        self.0
    }

    /// Its public half.
    pub fn public(&self) -> [u8; KEY_BYTES] {
        X25519HkdfSha256::sk_to_pk(&self.private()).to_bytes().into()
    }

    fn private(&self) -> PrivateKey {
        PrivateKey::from_bytes(self.0.as_slice()).expect("any 32 bytes are an X25519 key")
    }
}

impl fmt::Debug for EnvelopeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EnvelopeKey(…)")
    }
}

/// The ring as one manager can open it. Clones are handles to the same one.
#[derive(Clone)]
pub struct KeyRing(Arc<Inner>);

struct Inner {
    node: NodeId,
    key: EnvelopeKey,
    entropy: Arc<dyn Entropy>,
    opened: Mutex<BTreeMap<u32, EpochKey>>,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing")
            .field("node", &self.0.node)
            .finish_non_exhaustive()
    }
}

impl KeyRing {
    /// The ring as this manager's own key opens it.
    pub fn new(node: NodeId, key: EnvelopeKey, entropy: Arc<dyn Entropy>) -> Self {
        Self(Arc::new(Inner {
            node,
            key,
            entropy,
            opened: Mutex::default(),
        }))
    }

    /// This manager's public envelope key.
    pub fn public(&self) -> [u8; KEY_BYTES] {
        self.0.key.public()
    }

    /// The newest epoch, once this manager has opened its envelope of it.
    ///
    /// # Errors
    /// [`KeyRingError`] where there is none or it does not open.
    pub fn newest(&self, cluster: &Cluster) -> Result<u32, KeyRingError> {
        let newest = cluster.key_ring.last().ok_or(KeyRingError::Empty)?.epoch;
        self.with_epoch(cluster, newest, |_| ())?;
        Ok(newest)
    }

    /// Seals for one object of the state, under the newest epoch.
    ///
    /// # Errors
    /// [`KeyRingError`].
    pub fn seal(&self, cluster: &Cluster, object: Key, plaintext: &[u8]) -> Result<Sealed, KeyRingError> {
        let epoch = self.newest(cluster)?;
        let mut nonce = [0; NONCE_BYTES];
        self.0.entropy.fill(&mut nonce)?;
        self.with_epoch(cluster, epoch, |key| {
            seal(key, &place(cluster, object, epoch), epoch, nonce, plaintext)
        })
    }

    /// Opens what was sealed for one object.
    ///
    /// # Errors
    /// [`KeyRingError`]; nothing of the plaintext is given where the cipher refuses.
    pub fn open(
        &self,
        cluster: &Cluster,
        object: Key,
        sealed: &Sealed,
    ) -> Result<Zeroizing<Vec<u8>>, KeyRingError> {
        let nonce: [u8; NONCE_BYTES] = sealed
            .nonce
            .as_slice()
            .try_into()
            .map_err(|_| KeyRingError::Refused(sealed.epoch))?;
        let payload = Payload {
            msg: &sealed.ciphertext,
            aad: &place(cluster, object, sealed.epoch),
        };
        let opened = self.with_epoch(cluster, sealed.epoch, |key| {
            XChaCha20Poly1305::new((&**key).into()).decrypt(XNonce::from_slice(&nonce), payload)
        })?;
        opened
            .map(Zeroizing::new)
            .map_err(|_| KeyRingError::Refused(sealed.epoch))
    }

    /// The ring as these keys open it, without an envelope: what a backup holds.
    pub fn with_keys(self, keys: impl IntoIterator<Item = (u32, EpochKey)>) -> Self {
        let mut opened = self.0.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.extend(keys);
        drop(opened);
        self
    }

    /// Every key of the ring in the clear, for a backup: it is sealed before it leaves.
    ///
    /// # Errors
    /// [`KeyRingError`] where one does not open here: a backup without it would be worthless.
    pub fn keys(&self, cluster: &Cluster) -> Result<Vec<(u32, EpochKey)>, KeyRingError> {
        let epochs = cluster.key_ring.iter().map(|epoch| epoch.epoch);
        epochs
            .map(|epoch| Ok((epoch, self.with_epoch(cluster, epoch, EpochKey::clone)?)))
            .collect()
    }

    /// The ring with an envelope of every epoch for this manager, replacing those it had.
    ///
    /// # Errors
    /// [`KeyRingError`] where this manager cannot open an epoch or the key is none.
    pub fn enveloped_for(
        &self,
        cluster: &Cluster,
        node: NodeId,
        public: &[u8],
    ) -> Result<Vec<KeyRingEpoch>, KeyRingError> {
        let mut ring = cluster.key_ring.clone();
        for epoch in &mut ring {
            let envelope = self.with_epoch(cluster, epoch.epoch, |key| {
                envelope(key, &cluster.id, epoch.epoch, node, public, &*self.0.entropy)
            })??;
            epoch.envelopes.retain(|it| it.node_id != node.as_bytes());
            epoch.envelopes.push(envelope);
        }
        Ok(ring)
    }

    /// The ring with one more epoch, enveloped to these managers by their public keys.
    ///
    /// # Errors
    /// [`KeyRingError`] where a key is none, or the system gives no random bytes.
    pub fn with_next_epoch(
        &self,
        cluster: &Cluster,
        managers: &[(NodeId, &[u8])],
        now_ms: i64,
    ) -> Result<Vec<KeyRingEpoch>, KeyRingError> {
        let newest = cluster.key_ring.last().ok_or(KeyRingError::Empty)?.epoch;
        let next = next_epoch(&cluster.id, newest + 1, managers, now_ms, &*self.0.entropy)?;
        Ok(cluster.key_ring.iter().cloned().chain([next.1]).collect())
    }

    /// A value sealed anew under the newest epoch; nothing where it is already.
    ///
    /// # Errors
    /// [`KeyRingError`].
    pub fn moved(
        &self,
        cluster: &Cluster,
        object: Key,
        sealed: &Sealed,
    ) -> Result<Option<Sealed>, KeyRingError> {
        if sealed.epoch >= self.newest(cluster)? {
            return Ok(None);
        }
        let plaintext = self.open(cluster, object, sealed)?;
        self.seal(cluster, object, &plaintext).map(Some)
    }

    /// Lends the key of an epoch, opening its envelope at the first time. The object may be new since then, the key of
    /// an epoch never is.
    fn with_epoch<T>(
        &self,
        cluster: &Cluster,
        epoch: u32,
        work: impl FnOnce(&EpochKey) -> T,
    ) -> Result<T, KeyRingError> {
        let mut opened = self.0.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = opened.get(&epoch) {
            return Ok(work(key));
        }
        let envelope = cluster
            .key_ring
            .iter()
            .find(|it| it.epoch == epoch)
            .and_then(|it| {
                it.envelopes
                    .iter()
                    .find(|it| it.node_id == self.0.node.as_bytes())
            })
            .ok_or(KeyRingError::NoEnvelope(epoch))?;
        let key = open_envelope(&self.0.key, &cluster.id, epoch, self.0.node, envelope)?;
        Ok(work(opened.entry(epoch).or_insert(key)))
    }
}

/// The first epoch of a new cluster, enveloped to its first manager, and what is sealed under it from the beginning.
///
/// # Errors
/// Where the system gives no random bytes or the public key is none.
pub(crate) fn begin(
    cluster: &[u8],
    manager: (NodeId, &[u8]),
    objects: &[(Key, &[u8])],
    now_ms: i64,
    entropy: &dyn Entropy,
) -> Result<(KeyRingEpoch, Vec<Sealed>), KeyRingError> {
    const FIRST: u32 = 1;
    let (key, epoch) = next_epoch(cluster, FIRST, &[manager], now_ms, entropy)?;
    let sealed = objects.iter().map(|(object, plaintext)| {
        let mut nonce = [0; NONCE_BYTES];
        entropy.fill(&mut nonce)?;
        let place = associated_data(cluster, *object, FIRST);
        Ok(seal(&key, &place, FIRST, nonce, plaintext))
    });
    let sealed = sealed.collect::<Result<_, KeyRingError>>()?;
    Ok((epoch, sealed))
}

/// An epoch with a fresh key.
fn next_epoch(
    cluster: &[u8],
    epoch: u32,
    managers: &[(NodeId, &[u8])],
    now_ms: i64,
    entropy: &dyn Entropy,
) -> Result<(EpochKey, KeyRingEpoch), KeyRingError> {
    let key = EpochKey::filled(|key| entropy.fill(key))?;
    let envelopes = managers
        .iter()
        .map(|(node, public)| envelope(&key, cluster, epoch, *node, public, entropy))
        .collect::<Result<_, _>>()?;
    let epoch = KeyRingEpoch {
        epoch,
        envelopes,
        created_at: now_ms,
    };
    Ok((key, epoch))
}

fn seal(key: &EpochKey, place: &[u8], epoch: u32, nonce: [u8; NONCE_BYTES], plaintext: &[u8]) -> Sealed {
    let payload = Payload {
        msg: plaintext,
        aad: place,
    };
    let ciphertext = XChaCha20Poly1305::new((&**key).into())
        .encrypt(XNonce::from_slice(&nonce), payload)
        .expect("far below the cipher's bound");
    Sealed {
        epoch,
        nonce: nonce.to_vec(),
        ciphertext,
    }
}

fn place(cluster: &Cluster, object: Key, epoch: u32) -> Vec<u8> {
    associated_data(&cluster.id, object, epoch)
}

/// Where a sealed value belongs: it does not open as another object's, kind's or cluster's. Fixed lengths, so that no
/// two places read the same.
fn associated_data(cluster: &[u8], object: Key, epoch: u32) -> Vec<u8> {
    let kind = i32::from(object.kind()).to_be_bytes();
    [cluster, &kind, object.id(), &epoch.to_be_bytes()].concat()
}

/// HPKE's `info`: an envelope opens for its own cluster, epoch and node alone.
fn envelope_info(cluster: &[u8], epoch: u32, node: NodeId) -> Vec<u8> {
    [
        b"bulkhead key ring 1".as_slice(),
        cluster,
        &epoch.to_be_bytes(),
        node.as_bytes(),
    ]
    .concat()
}

fn envelope(
    key: &EpochKey,
    cluster: &[u8],
    epoch: u32,
    node: NodeId,
    public: &[u8],
    entropy: &dyn Entropy,
) -> Result<Envelope, KeyRingError> {
    let recipient = PublicKey::from_bytes(public).map_err(|_| KeyRingError::PublicKey)?;
    let mut seed = Zeroizing::new([0; 32]);
    entropy.fill(seed.as_mut())?;
    let (encapsulated, ciphertext) =
        hpke::single_shot_seal::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256, _>(
            &OpModeS::Base,
            &recipient,
            &envelope_info(cluster, epoch, node),
            key.as_slice(),
            &[],
            &mut StdRng::from_seed(*seed),
        )
        .map_err(|_| KeyRingError::PublicKey)?; // a point of small order (RFC 9180 §7.1.4)
    Ok(Envelope {
        node_id: node.to_wire(),
        encapsulated_key: encapsulated.to_bytes().to_vec(),
        ciphertext,
    })
}

fn open_envelope(
    own: &EnvelopeKey,
    cluster: &[u8],
    epoch: u32,
    node: NodeId,
    envelope: &Envelope,
) -> Result<EpochKey, KeyRingError> {
    let refused = |_| KeyRingError::Refused(epoch);
    let encapsulated = Encapsulated::from_bytes(&envelope.encapsulated_key).map_err(refused)?;
    let opened = hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
        &OpModeR::Base,
        &own.private(),
        &encapsulated,
        &envelope_info(cluster, epoch, node),
        &envelope.ciphertext,
        &[],
    )
    .map(Zeroizing::new)
    .map_err(refused)?;
    EpochKey::copied(&opened).ok_or(KeyRingError::Refused(epoch))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_identity::seam::SystemEntropy;
    use bulkhead_proto::wire::Kind;

    const CLUSTER: Key = Key::new(Kind::Cluster, [1; 16]);
    const SECRET: Key = Key::new(Kind::Secret, [2; 16]);

    fn node(n: u8) -> NodeId {
        NodeId::from_bytes([n; 16])
    }

    fn ring(n: u8) -> KeyRing {
        let key = EnvelopeKey::from_bytes(Unswapped::new([n; KEY_BYTES]));
        KeyRing::new(node(n), key, Arc::new(SystemEntropy))
    }

    fn cluster(first: &KeyRing) -> Cluster {
        let (epoch, mut sealed) = begin(
            &[1; 16],
            (first.0.node, &first.public()),
            &[(CLUSTER, b"the root's key")],
            0,
            &SystemEntropy,
        )
        .expect("sealed");
        Cluster {
            id: vec![1; 16],
            key_ring: vec![epoch],
            root_key: sealed.pop(),
            ..Default::default()
        }
    }

    #[test]
    fn the_first_manager_opens_what_the_cluster_began_with() {
        let cluster = cluster(&ring(1));
        let sealed = cluster.root_key.clone().expect("sealed");
        assert_eq!(
            ring(1)
                .open(&cluster, CLUSTER, &sealed)
                .expect("its own")
                .as_slice(),
            b"the root's key"
        );
        assert_eq!(ring(1).newest(&cluster), Ok(1));
        assert_eq!(
            ring(2).open(&cluster, CLUSTER, &sealed),
            Err(KeyRingError::NoEnvelope(1))
        );
    }

    #[test]
    fn a_second_manager_opens_only_after_it_was_enveloped() {
        let first = ring(1);
        let mut cluster = cluster(&first);
        let sealed = first.seal(&cluster, SECRET, b"hunter2").expect("opened");
        assert_eq!(ring(2).newest(&cluster), Err(KeyRingError::NoEnvelope(1)));
        for _ in 0..2 {
            cluster.key_ring = first
                .enveloped_for(&cluster, node(2), &ring(2).public())
                .expect("a key");
            assert_eq!(cluster.key_ring[0].envelopes.len(), 2);
        }
        assert_eq!(
            ring(2)
                .open(&cluster, SECRET, &sealed)
                .expect("enveloped")
                .as_slice(),
            b"hunter2"
        );
    }

    #[test]
    fn another_manager_goes_on_with_the_keys_of_the_ring() {
        let first = ring(1);
        let mut cluster = cluster(&first);
        let sealed = first.seal(&cluster, SECRET, b"hunter2").expect("opened");
        let keys = first.keys(&cluster).expect("all open");
        assert_eq!(ring(2).keys(&cluster).map(drop), Err(KeyRingError::NoEnvelope(1)));
        let second = ring(2).with_keys(keys);
        cluster.key_ring = second
            .enveloped_for(&cluster, node(2), &second.public())
            .expect("all open");
        let opened = ring(2).open(&cluster, SECRET, &sealed).expect("enveloped");
        assert_eq!(opened.as_slice(), b"hunter2");
    }

    #[test]
    fn a_sealed_value_opens_in_its_own_place_only() {
        let ring = ring(1);
        let cluster = cluster(&ring);
        let sealed = ring.seal(&cluster, SECRET, b"hunter2").expect("opened");
        let elsewhere = [Key::new(Kind::Secret, [3; 16]), Key::new(Kind::Cluster, [2; 16])];
        for place in elsewhere {
            assert_eq!(
                ring.open(&cluster, place, &sealed),
                Err(KeyRingError::Refused(1)),
                "{place:?}"
            );
        }
        let other = Cluster {
            id: vec![9; 16],
            ..cluster.clone()
        };
        assert_eq!(ring.open(&other, SECRET, &sealed), Err(KeyRingError::Refused(1)));
        for bit in 0..sealed.ciphertext.len() * 8 {
            let mut damaged = sealed.clone();
            damaged.ciphertext[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                ring.open(&cluster, SECRET, &damaged),
                Err(KeyRingError::Refused(1)),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn an_envelope_of_another_node_epoch_or_cluster_does_not_open() {
        let cluster = cluster(&ring(1));
        let change = |change: &dyn Fn(&mut Cluster)| {
            let mut changed = cluster.clone();
            change(&mut changed);
            ring(1).newest(&changed)
        };
        assert_eq!(change(&|it| it.id = vec![9; 16]), Err(KeyRingError::Refused(1)));
        assert_eq!(
            change(&|it| it.key_ring[0].epoch = 2),
            Err(KeyRingError::Refused(2))
        );
        assert_eq!(
            change(&|it| it.key_ring[0].envelopes[0].ciphertext[0] ^= 1),
            Err(KeyRingError::Refused(1))
        );
        assert_eq!(
            change(&|it| it.key_ring[0].envelopes[0].encapsulated_key = vec![]),
            Err(KeyRingError::Refused(1))
        );
        assert_eq!(change(&|it| it.key_ring.clear()), Err(KeyRingError::Empty));
    }

    #[test]
    fn a_public_key_that_is_none_gets_no_envelope() {
        let first = ring(1);
        for bad in [vec![], vec![1; 31], vec![0; 32]] {
            let got = first.enveloped_for(&cluster(&first), node(2), &bad).map(|_| ());
            assert_eq!(got, Err(KeyRingError::PublicKey), "{bad:?}");
        }
    }

    #[test]
    fn no_key_prints() {
        let key = EnvelopeKey::from_bytes(Unswapped::new([0xAB; 32]));
        assert_eq!(format!("{key:?}"), "EnvelopeKey(…)");
        assert!(!format!("{:?}", ring(0xAB)).contains("171"));
    }
}
