//! Backups: one state of the cluster with the keys that open its secrets, sealed to the recovery key.
//!
//! Written from a view of the replica, which is a pointer copy, so it is one state however long it takes and nobody waits
//! for it. The first sealed chunk is the manifest with the keys of the ring; the state follows as a snapshot has it.

use bulkhead_identity::backup::{BackupError, Opener, SealError, Sealer};
use bulkhead_identity::recovery::RecoveryKey;
use bulkhead_identity::seam::Entropy;
use bulkhead_proto::wire::{BackupHeader, BackupKey, BackupManifest, Cluster};
use bulkhead_raft::state::{self, Decoder, SnapshotError, State};
use prost::Message as _;
use zeroize::{Zeroize as _, Zeroizing};

use crate::key_ring::{EpochKey, KeyRing, KeyRingError};
use crate::view;

/// Why no backup is made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// No recovery key: nobody could ever open it.
    #[error("the cluster has no recovery key")]
    NoRecoveryKey,
    /// The key ring does not open here.
    #[error("the key ring does not open")]
    KeyRing(#[from] KeyRingError),
    /// It cannot be sealed.
    #[error("the backup cannot be sealed")]
    Seal(#[from] SealError),
}

/// The backup of a state, as the parts of its file.
///
/// # Errors
/// [`MakeError`]; later nothing can fail.
pub fn make(
    state: &State,
    cluster: &Cluster,
    ring: &KeyRing,
    entropy: &dyn Entropy,
    now_ms: i64,
) -> Result<impl Iterator<Item = Vec<u8>> + Send + use<>, MakeError> {
    let recovery = cluster.recovery_key.as_ref().ok_or(MakeError::NoRecoveryKey)?;
    let keys = ring.keys(cluster)?;
    let header = BackupHeader {
        cluster_id: cluster.id.clone(),
        epoch: cluster.epoch,
        index: state.index(),
        at: now_ms,
        recovery_key: recovery.public.clone(),
        images: false,
        level: cluster.level,
        program_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let (mut sealer, head) = Sealer::begin(&header, entropy)?;
    let manifest = encode(state, &keys);
    let mut chunks = std::iter::once(manifest)
        .chain(state::chunks(state).map(Zeroizing::new))
        .peekable();
    let sealed = std::iter::from_fn(move || {
        let chunk = chunks.next()?;
        Some(sealer.chunk(&chunk, chunks.peek().is_none()))
    });
    Ok(std::iter::once(head).chain(sealed))
}

fn encode(state: &State, keys: &[(u32, EpochKey)]) -> Zeroizing<Vec<u8>> {
    let mut manifest = BackupManifest {
        objects: state.count(),
        digest: state.objects_digest().to_vec(),
        keys: keys
            .iter()
            .map(|(epoch, key)| BackupKey {
                epoch: *epoch,
                key: key.to_vec(),
            })
            .collect(),
    };
    let encoded = Zeroizing::new(manifest.encode_to_vec());
    manifest.keys.iter_mut().for_each(|it| it.key.zeroize());
    encoded
}

/// What a backup holds.
pub struct Backup {
    /// What it says of itself; proved to be of this file.
    pub header: BackupHeader,
    /// The state.
    pub state: State,
    /// The keys of the ring.
    pub keys: Vec<(u32, EpochKey)>,
}

impl std::fmt::Debug for Backup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backup")
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

/// Why a backup is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file.
    #[error(transparent)]
    File(#[from] BackupError),
    /// The state in it.
    #[error("the state in it does not fit together: {0}")]
    State(#[from] SnapshotError),
    /// What it begins with.
    #[error("its manifest is none")]
    Manifest,
    /// Header and state differ: whoever made it was no manager of this program's kind.
    #[error("its header does not describe the state in it")]
    Header,
}

/// Reads a backup as its bytes come.
#[derive(Debug)]
pub struct Reader<'k> {
    opener: Opener<'k>,
    keys: Option<Keys>,
    decoder: Option<Decoder>,
}

struct Keys(Vec<(u32, EpochKey)>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(…)")
    }
}

impl<'k> Reader<'k> {
    /// Nothing read yet.
    pub fn new(key: &'k RecoveryKey) -> Self {
        Self {
            opener: Opener::new(key),
            keys: None,
            decoder: None,
        }
    }

    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// [`ReadError`]; nothing more can be read then.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), ReadError> {
        for chunk in self.opener.push(bytes)? {
            match (&self.keys, &mut self.decoder) {
                (None, _) => self.keys = Some(keys(&chunk)?),
                (Some(_), None) => self.decoder = Some(Decoder::new(&chunk)?),
                (Some(_), Some(decoder)) => decoder.push(&chunk)?,
            }
        }
        Ok(())
    }

    /// The backup, if it is whole.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn finish(self) -> Result<Backup, ReadError> {
        let header = self.opener.header().cloned();
        self.opener.finish()?;
        let keys = self.keys.ok_or(ReadError::Manifest)?;
        let state = self.decoder.ok_or(ReadError::Manifest)?.finish()?;
        let header = header.ok_or(ReadError::Header)?;
        let cluster = view::cluster(&state).ok_or(ReadError::Header)?;
        if (&cluster.id, cluster.epoch, state.index()) != (&header.cluster_id, header.epoch, header.index) {
            return Err(ReadError::Header);
        }
        Ok(Backup {
            header,
            state,
            keys: keys.0,
        })
    }
}

fn keys(manifest: &[u8]) -> Result<Keys, ReadError> {
    let mut manifest = BackupManifest::decode(manifest).map_err(|_| ReadError::Manifest)?;
    let keys = manifest.keys.iter_mut().map(|it| {
        let key = EpochKey::copied(&it.key);
        it.key.zeroize();
        key.map(|key| (it.epoch, key)).ok_or(ReadError::Manifest)
    });
    keys.collect::<Result<_, _>>().map(Keys)
}

#[cfg(test)]
mod tests {
    use bulkhead_identity::seam::SystemEntropy;
    use bulkhead_proto::wire::{
        Change, Kind, RecoveryKey as Public, Secret, change::Change as Step, object::Object as Any,
    };
    use bulkhead_raft::state::Key;

    use super::*;
    use crate::testing::{self, Founded, apply};

    /// A cluster with a recovery key and a secret of 400 KiB, several times over.
    fn founded(recovery: Option<&RecoveryKey>) -> (State, KeyRing) {
        let founded = Founded::new(1_700_000_000_000);
        let mut state = founded.state;
        let mut cluster = view::cluster(&state).expect("founded").clone();
        cluster.recovery_key = recovery.map(|key| Public {
            public: key.public().to_vec(),
            since: 1,
        });
        let secrets = (1..=4_u8).map(|n| {
            let place = Key::new(Kind::Secret, [n; 16]);
            let value = founded.ring.seal(&cluster, place, &vec![n; 400 << 10]);
            Step::Create(view::object(Any::Secret(Secret {
                id: vec![n; 16],
                name: format!("secret-{n}"),
                value: Some(value.expect("sealed")),
                ..Default::default()
            })))
        });
        let steps = secrets.chain([Step::Replace(view::object(Any::Cluster(cluster.clone())))]);
        let changes = steps.map(|step| Change { change: Some(step) }).collect();
        apply(&mut state, 9, changes);
        (state, founded.ring)
    }

    fn parts(state: &State, ring: &KeyRing) -> Result<Vec<Vec<u8>>, MakeError> {
        let cluster = view::cluster(state).expect("founded");
        make(state, cluster, ring, &SystemEntropy, 5).map(Iterator::collect)
    }

    fn read(file: &[u8], key: &RecoveryKey) -> Result<Backup, ReadError> {
        let mut reader = Reader::new(key);
        for part in file.chunks(100_000) {
            reader.push(part)?;
        }
        reader.finish()
    }

    #[test]
    fn a_backup_gives_the_state_and_the_keys_back() {
        let key = RecoveryKey::generate(&SystemEntropy).expect("random");
        let (state, ring) = founded(Some(&key));
        let parts = parts(&state, &ring).expect("made");
        assert!(parts.len() > 3, "{} parts", parts.len());
        let file = parts.concat();
        assert!(!file.windows(8).any(|bytes| bytes == b"secret-1"));
        let backup = read(&file, &key).expect("whole");
        assert_eq!(backup.state.digest(), state.digest());
        assert_eq!(backup.state.index(), 9);
        let epochs: Vec<u32> = backup.keys.iter().map(|(epoch, _)| *epoch).collect();
        assert_eq!(epochs, [1]);
        assert_eq!((backup.header.at, backup.header.images), (5, false));
        // Another manager, whose own key opens no envelope.
        let cluster = view::cluster(&backup.state).expect("founded");
        let place = Key::new(Kind::Secret, [3; 16]);
        let Some(Any::Secret(secret)) = &backup.state.get(place).expect("there").object else {
            panic!("a secret");
        };
        let sealed = secret.value.as_ref().expect("sealed");
        let other = testing::ring(9).with_keys(backup.keys);
        assert_eq!(
            other.open(cluster, place, sealed).expect("opens").as_slice(),
            vec![3; 400 << 10]
        );
    }

    #[test]
    fn a_backup_that_is_not_whole_or_of_another_key_is_refused() {
        let key = RecoveryKey::generate(&SystemEntropy).expect("random");
        let (state, ring) = founded(Some(&key));
        let parts = parts(&state, &ring).expect("made");
        let cut = parts[..parts.len() - 1].concat();
        assert!(matches!(
            read(&cut, &key),
            Err(ReadError::File(BackupError::Truncated { .. }))
        ));
        let other = RecoveryKey::generate(&SystemEntropy).expect("random");
        assert!(matches!(
            read(&parts.concat(), &other),
            Err(ReadError::File(BackupError::Key { .. }))
        ));
        let (none, ring) = founded(None);
        let cluster = view::cluster(&none).expect("founded");
        let made = make(&none, cluster, &ring, &SystemEntropy, 5).map(drop);
        assert!(matches!(made, Err(MakeError::NoRecoveryKey)));
        let stranger = testing::ring(9);
        let cluster = view::cluster(&state).expect("founded");
        let made = make(&state, cluster, &stranger, &SystemEntropy, 5).map(drop);
        assert!(matches!(made, Err(MakeError::KeyRing(_))));
    }
}
