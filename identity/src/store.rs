//! The key file: all that makes a program the node that it is, in one file that is replaced at once or not at all.
//!
//! Key, certificate and roots change together, so they stand together: after a crash a node is what it was before or
//! what it was to become. The file opens with a mark of its format and the SHA-256 of the rest, so that a damaged one
//! is told from a foreign one. It is for its owner alone: who reads it is this node. With autolock on, all of a manager's
//! file that is secret is sealed under an unlock key that is on no disk; the rest stands beside it, bound to it.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_proto::MemberId;
use bulkhead_proto::wire::ManagerAddress;
use prost::Message;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::seam::{EntropyError, SystemEntropy};
use crate::unlock::UnlockKey;
use crate::{Bundle, Certificate, Credentials, Identity, Key, Subject, Unswapped};

/// The first bytes of a key file, with the version of its format.
const MARK: &[u8; 8] = b"BHKEYS1\n";
/// The first bytes of a locked one.
const LOCKED_MARK: &[u8; 8] = b"BHLOCK1\n";
/// Bytes of a key file; one with 64 managers has about 8 KiB.
const FILE_BYTES: usize = 64 << 10;
const HEADER_BYTES: usize = MARK.len() + 32;

/// What a key file holds. Cluster, node and role are those of the certificate.
pub struct KeyFile {
    /// Key, certificate and roots.
    pub credentials: Arc<Credentials>,
    /// The node's name in the cluster.
    pub name: String,
    /// The managers that were known last.
    pub managers: Vec<ManagerAddress>,
    /// What only a manager has.
    pub manager: Option<ManagerPart>,
    /// What its secret part is sealed with when it is written; nothing: it is written in the clear.
    pub lock: Option<UnlockKey>,
    /// What only a standby has.
    pub standby: Option<StandbyPart>,
}

/// Where a standby will be reached, once it is a manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandbyPart {
    /// Where it will listen, `host:port`.
    pub listen: String,
    /// Where others will reach it, `host:port`.
    pub advertise: String,
}

/// What a manager keeps beside its credentials. A copy is for taking back a change that could not be written.
#[derive(Clone)]
pub struct ManagerPart {
    /// Its Raft member id.
    pub member: MemberId,
    /// The cluster epoch of its store.
    pub epoch: u64,
    /// The store's random id: part of the associated data of each record.
    pub store: [u8; 16],
    /// Whether the store was made: from then on one that is not there was lost, with what it acknowledged.
    pub made: bool,
    /// Seals log, vote and snapshots.
    pub data_key: Unswapped<[u8; 32]>,
    /// The data key of before, while something sealed under it is still on disk.
    pub former_data_key: Option<Unswapped<[u8; 32]>>,
    /// Opens the envelopes of the key ring (X25519).
    pub envelope_key: Unswapped<[u8; 32]>,
    /// Where it listens, `host:port`.
    pub listen: String,
    /// Where others reach it, `host:port`.
    pub advertise: String,
}

impl fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyFile")
            .field("subject", &self.subject())
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ManagerPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagerPart")
            .field("member", &self.member)
            .finish_non_exhaustive()
    }
}

/// What a locked key file says without its unlock key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locked {
    /// Which file.
    pub path: PathBuf,
    /// The node's name in the cluster.
    pub name: String,
    /// Who it is, by its certificate.
    pub subject: Subject,
    /// Which of the cluster's unlock keys opens it.
    pub generation: u32,
}

/// A key file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It waits for its unlock key.
    #[error("the key file {} is locked with unlock key {}; run `bulkhead cluster unlock`", .0.path.display(), .0.generation)]
    Locked(Box<Locked>),
    /// The unlock key that was given is another one.
    #[error(
        "this unlock key does not open the key file {path}, which is locked with unlock key {generation}"
    )]
    WrongUnlockKey {
        /// Which file.
        path: PathBuf,
        /// Which of the cluster's unlock keys opens it.
        generation: u32,
    },
    /// No random bytes to seal it with.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// There is none: this program is not in a cluster.
    #[error("there is no key file {0}: this program is not in a cluster yet")]
    Missing(PathBuf),
    /// The system refuses.
    #[error("cannot read or write the key file {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a plain file, or of another user.
    #[error("the key file {0} is not a plain file of this program's own user; check who put it there")]
    Owner(PathBuf),
    /// Others can read or write it.
    #[error(
        "others can read or write the key file {path} (mode {mode:o}): treat its key as known, remove the node and join again"
    )]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Too many bytes, a wrong mark, a wrong sum, or parts that do not fit each other.
    #[error("the key file {path} is damaged ({what}); restore it from a copy, or join again")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What does not fit.
        what: &'static str,
    },
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct Record {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    certificate: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    roots: Vec<Vec<u8>>,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(message, repeated, tag = "5")]
    managers: Vec<ManagerAddress>,
    #[prost(message, optional, tag = "6")]
    manager: Option<ManagerRecord>,
    #[prost(bytes = "vec", repeated, tag = "7")]
    chain: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "8")]
    former: Vec<u8>,
    #[prost(message, optional, tag = "9")]
    standby: Option<StandbyRecord>,
}

#[derive(Clone, PartialEq, Message)]
struct StandbyRecord {
    #[prost(string, tag = "1")]
    listen: String,
    #[prost(string, tag = "2")]
    advertise: String,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct ManagerRecord {
    #[prost(uint64, tag = "1")]
    member: u64,
    #[prost(uint64, tag = "2")]
    epoch: u64,
    #[prost(bytes = "vec", tag = "3")]
    store: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    data_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    envelope_key: Vec<u8>,
    #[prost(string, tag = "6")]
    listen: String,
    #[prost(string, tag = "7")]
    advertise: String,
    #[prost(bytes = "vec", tag = "8")]
    former_data_key: Vec<u8>,
    #[prost(bool, tag = "9")]
    made: bool,
}

/// A locked file: what may be read, and what is sealed for exactly that.
#[derive(Clone, PartialEq, Message)]
struct LockedRecord {
    #[prost(uint32, tag = "1")]
    generation: u32,
    /// A [`Record`] without its secrets.
    #[prost(bytes = "vec", tag = "2")]
    open: Vec<u8>,
    /// The [`Secrets`].
    #[prost(bytes = "vec", tag = "3")]
    sealed: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct Secrets {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    data_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    envelope_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    former_data_key: Vec<u8>,
}

impl Record {
    /// Takes out what is secret.
    fn take_secrets(&mut self) -> Secrets {
        let mut manager = self.manager.as_mut();
        let mut of_manager = |part: fn(&mut ManagerRecord) -> &mut Vec<u8>| {
            manager
                .as_deref_mut()
                .map(|manager| std::mem::take(part(manager)))
                .unwrap_or_default()
        };
        Secrets {
            data_key: of_manager(|it| &mut it.data_key),
            envelope_key: of_manager(|it| &mut it.envelope_key),
            former_data_key: of_manager(|it| &mut it.former_data_key),
            key: std::mem::take(&mut self.key),
        }
    }

    fn put_secrets(&mut self, mut secrets: Secrets) {
        self.key = std::mem::take(&mut secrets.key);
        if let Some(manager) = &mut self.manager {
            manager.data_key = std::mem::take(&mut secrets.data_key);
            manager.envelope_key = std::mem::take(&mut secrets.envelope_key);
            manager.former_data_key = std::mem::take(&mut secrets.former_data_key);
        }
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        for secret in [
            &mut self.key,
            &mut self.data_key,
            &mut self.envelope_key,
            &mut self.former_data_key,
        ] {
            zeroize::Zeroize::zeroize(secret);
        }
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(…)")
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.key);
    }
}

impl Drop for ManagerRecord {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.data_key);
        zeroize::Zeroize::zeroize(&mut self.envelope_key);
        zeroize::Zeroize::zeroize(&mut self.former_data_key);
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Record(…)")
    }
}

impl fmt::Debug for ManagerRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ManagerRecord(…)")
    }
}

impl KeyFile {
    /// Who this is.
    pub fn subject(&self) -> Subject {
        self.credentials.certificate.subject()
    }

    /// Reads a key file that is not locked. Whether the certificate is still valid is for the caller to ask.
    ///
    /// # Errors
    /// [`StoreError`]; `Missing` says that there is none, `Locked` that it waits for its unlock key.
    pub fn load(path: &Path) -> Result<Self, StoreError> {
        Self::open(path, None)
    }

    /// Reads a key file, with an unlock key where it is locked. One that is not locked opens as it is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(path: &Path, unlock: Option<&UnlockKey>) -> Result<Self, StoreError> {
        Self::parse(&read(path)?, path, unlock)
    }

    /// Reads the bytes of a key file; `path` is for errors alone.
    ///
    /// # Errors
    /// As [`KeyFile::open`].
    pub fn parse(bytes: &[u8], path: &Path, unlock: Option<&UnlockKey>) -> Result<Self, StoreError> {
        let damaged = |what| StoreError::Damaged {
            path: path.to_owned(),
            what,
        };
        match body(bytes).map_err(damaged)? {
            Body::Open(body) => {
                let record = Record::decode(body).map_err(|_| damaged("it does not decode"))?;
                key_file(record, None).map_err(damaged)
            }
            Body::Locked(body) => {
                let locked = LockedRecord::decode(body).map_err(|_| damaged("it does not decode"))?;
                let record = Record::decode(&*locked.open).map_err(|_| damaged("it does not decode"))?;
                match unlock {
                    None => {
                        let locked = glance(path, &record, locked.generation).map_err(damaged)?;
                        Err(StoreError::Locked(Box::new(locked)))
                    }
                    Some(unlock) => {
                        let secrets = unlock.open(&locked.open, &locked.sealed).map_err(|_| {
                            StoreError::WrongUnlockKey {
                                path: path.to_owned(),
                                generation: locked.generation,
                            }
                        })?;
                        let secrets = Secrets::decode(secrets.as_slice())
                            .map_err(|_| damaged("its sealed part does not decode"))?;
                        let mut record = record;
                        record.put_secrets(secrets);
                        key_file(record, Some(unlock.clone())).map_err(damaged)
                    }
                }
            }
        }
    }

    /// Writes the file anew, mode 0600: after a crash the old or the new one is there, whole. Where the old one stood in
    /// the clear and this one is locked, the old one's bytes are overwritten, as far as the file system does that in place.
    ///
    /// # Errors
    /// [`StoreError`]; the old file then stands. That its bytes could not be overwritten is said in the log alone.
    pub fn save(&self, path: &Path) -> Result<(), StoreError> {
        let refused = |source| StoreError::Io {
            path: path.to_owned(),
            source,
        };
        let bytes = self.encode()?;
        let former = match self.lock {
            Some(_) => in_the_clear(path).map_err(refused)?,
            None => None,
        };
        replace(path, &bytes).map_err(refused)?;
        if let Some(Err(error)) = former.as_ref().map(overwrite) {
            tracing::warn!(%error, "the key file that stood in the clear could not be overwritten");
        }
        Ok(())
    }

    fn encode(&self) -> Result<Zeroizing<Vec<u8>>, EntropyError> {
        let mut record = Record {
            key: self.credentials.key.pkcs8().to_vec(),
            certificate: self.credentials.certificate.der().to_vec(),
            roots: self.credentials.bundle.ders(),
            chain: self.credentials.chain.clone(),
            former: self.credentials.bundle.former().unwrap_or_default().to_vec(),
            name: self.name.clone(),
            managers: self.managers.clone(),
            manager: self.manager.as_ref().map(|part| ManagerRecord {
                member: part.member.0,
                epoch: part.epoch,
                store: part.store.to_vec(),
                data_key: part.data_key.to_vec(),
                envelope_key: part.envelope_key.to_vec(),
                listen: part.listen.clone(),
                advertise: part.advertise.clone(),
                former_data_key: part
                    .former_data_key
                    .as_ref()
                    .map_or(Vec::new(), |key| key.to_vec()),
                made: part.made,
            }),
            standby: self.standby.as_ref().map(|part| StandbyRecord {
                listen: part.listen.clone(),
                advertise: part.advertise.clone(),
            }),
        };
        let Some(lock) = &self.lock else {
            return Ok(framed(MARK, &record));
        };
        let secrets = record.take_secrets();
        let mut content = Zeroizing::new(Vec::with_capacity(secrets.encoded_len()));
        secrets.encode_raw(&mut *content);
        let open = record.encode_to_vec();
        let locked = LockedRecord {
            generation: lock.generation(),
            sealed: lock.seal(&open, content, &SystemEntropy)?,
            open,
        };
        Ok(framed(LOCKED_MARK, &locked))
    }
}

/// A mark, the SHA-256 of the rest, and the rest. With its size known nothing is moved, and no copy stays behind unwiped.
fn framed(mark: &[u8; 8], content: &impl Message) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(HEADER_BYTES + content.encoded_len()));
    bytes.extend_from_slice(mark);
    bytes.extend_from_slice(&[0; 32]);
    content.encode_raw(&mut *bytes);
    let sum = Sha256::digest(&bytes[HEADER_BYTES..]);
    bytes[mark.len()..HEADER_BYTES].copy_from_slice(&sum);
    bytes
}

/// The bytes of a small file that is its owner's alone.
pub(crate) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, StoreError> {
    let refuse = |source| StoreError::Io {
        path: path.to_owned(),
        source,
    };
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.cast_signed())
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StoreError::Missing(path.to_owned()));
        }
        Err(error) => return Err(refuse(error)),
    };
    let found = file.metadata().map_err(refuse)?;
    if !found.is_file() || found.uid() != rustix::process::geteuid().as_raw() {
        return Err(StoreError::Owner(path.to_owned()));
    }
    if found.mode() & 0o077 != 0 {
        return Err(StoreError::Exposed {
            path: path.to_owned(),
            mode: found.mode() & 0o777,
        });
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(FILE_BYTES + 1));
    file.take(FILE_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(refuse)?;
    Ok(bytes)
}

/// The two kinds of content.
enum Body<'a> {
    Open(&'a [u8]),
    Locked(&'a [u8]),
}

fn body(bytes: &[u8]) -> Result<Body<'_>, &'static str> {
    if bytes.len() > FILE_BYTES {
        return Err("it is too long");
    }
    let (mark, rest) = bytes.split_at_checked(MARK.len()).ok_or("it is cut short")?;
    if mark != MARK && mark != LOCKED_MARK {
        return Err("it does not begin as a key file of this version");
    }
    let (sum, body) = rest.split_at_checked(32).ok_or("it is cut short")?;
    if Sha256::digest(body).as_slice() != sum {
        return Err("its sum does not fit");
    }
    Ok(match mark == MARK {
        true => Body::Open(body),
        false => Body::Locked(body),
    })
}

/// What a locked file says of itself.
fn glance(path: &Path, record: &Record, generation: u32) -> Result<Locked, &'static str> {
    let certificate = Certificate::from_der(&record.certificate).map_err(|_| "its certificate is none")?;
    Ok(Locked {
        path: path.to_owned(),
        name: record.name.clone(),
        subject: certificate.subject(),
        generation,
    })
}

fn key_file(mut record: Record, lock: Option<UnlockKey>) -> Result<KeyFile, &'static str> {
    let key = Key::from_pkcs8(&record.key).map_err(|_| "its key is none")?;
    let certificate = Certificate::from_der(&record.certificate).map_err(|_| "its certificate is none")?;
    let former = (!record.former.is_empty()).then_some(record.former.as_slice());
    let bundle = Bundle::from_ders(record.roots.clone()).and_then(|bundle| bundle.with_former(former));
    let bundle = bundle.map_err(|_| "its roots are none")?;
    let credentials = Arc::new(Credentials {
        key,
        certificate,
        chain: std::mem::take(&mut record.chain),
        bundle,
    });
    Identity::new(credentials.clone())
        .map_err(|_| "its key, certificate and roots do not belong together")?;
    let manager = record.manager.take().map(manager_part).transpose()?;
    Ok(KeyFile {
        credentials,
        name: std::mem::take(&mut record.name),
        managers: std::mem::take(&mut record.managers),
        manager,
        lock,
        standby: record.standby.take().map(|part| StandbyPart {
            listen: part.listen,
            advertise: part.advertise,
        }),
    })
}

fn manager_part(mut record: ManagerRecord) -> Result<ManagerPart, &'static str> {
    let secret = |bytes: &[u8]| Unswapped::copied(bytes).ok_or("one of its store keys has another length");
    Ok(ManagerPart {
        member: MemberId(record.member),
        epoch: record.epoch,
        store: record
            .store
            .as_slice()
            .try_into()
            .map_err(|_| "its store id has another length")?,
        made: record.made,
        data_key: secret(&record.data_key)?,
        former_data_key: match record.former_data_key.is_empty() {
            true => None,
            false => Some(secret(&record.former_data_key)?),
        },
        envelope_key: secret(&record.envelope_key)?,
        listen: std::mem::take(&mut record.listen),
        advertise: std::mem::take(&mut record.advertise),
    })
}

/// Writes a small file for its owner alone, at once or not at all.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = folder(path).ok_or(io::ErrorKind::InvalidInput)?;
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    // One that a crash left may have any mode, or be a link: it goes, and ours is made anew.
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&fresh, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&fresh); // the first error is the one that matters
        return Err(error);
    }
    File::open(folder)?.sync_all()
}

/// The file at a path, if it stands in the clear.
fn in_the_clear(path: &Path) -> io::Result<Option<File>> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut mark = [0; MARK.len()];
    Ok(match file.read_exact_at(&mut mark, 0) {
        Ok(()) if mark == *MARK => Some(file),
        _ => None,
    })
}

/// Removes a file of ours that stands in the clear, and first what is in it.
pub(crate) fn erase(path: &Path) -> io::Result<()> {
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
    let opened = OpenOptions::new()
        .write(true)
        .custom_flags(flags.cast_signed())
        .open(path);
    let written = match opened {
        Ok(file) if file.metadata()?.is_file() => overwrite(&file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // A link, or what is no file: nothing of ours is in it.
        Ok(_) | Err(_) => Ok(()),
    };
    fs::remove_file(path).and(written)
}

fn overwrite(file: &File) -> io::Result<()> {
    let bytes = usize::try_from(file.metadata()?.len()).unwrap_or(FILE_BYTES);
    file.write_all_at(&vec![0; bytes.min(FILE_BYTES)], 0)?;
    file.sync_data()
}

/// The folder that a file is in; of a bare name it is the current one.
fn folder(path: &Path) -> Option<&Path> {
    let folder = path.parent()?;
    Some(match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use bulkhead_proto::Role;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{authority, credentials};

    fn key_file() -> KeyFile {
        KeyFile {
            credentials: Arc::new(credentials(&authority(), Role::Manager, 1)),
            name: "m1".into(),
            managers: vec![ManagerAddress {
                node_id: vec![1; 16],
                address: "127.0.0.1:7443".into(),
                member_id: 1,
            }],
            manager: Some(ManagerPart {
                member: MemberId(1),
                epoch: 2,
                store: [3; 16],
                made: true,
                data_key: Unswapped::new([4; 32]),
                former_data_key: None,
                envelope_key: Unswapped::new([5; 32]),
                listen: "0.0.0.0:7443".into(),
                advertise: "127.0.0.1:7443".into(),
            }),
            standby: Some(StandbyPart {
                listen: "0.0.0.0:7443".into(),
                advertise: "127.0.0.1:7443".into(),
            }),
            lock: None,
        }
    }

    fn unlock_key(byte: u8, generation: u32) -> UnlockKey {
        UnlockKey::from_bytes(generation, &[byte; 32]).expect("its length")
    }

    fn contains(bytes: &[u8], part: &[u8]) -> bool {
        bytes.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn a_locked_file_holds_no_key_and_opens_with_its_unlock_key_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("node.keys");
        let mut file = key_file();
        file.manager.as_mut().expect("a manager").former_data_key = Some(Unswapped::new([6; 32]));
        file.save(&path).expect("saved");
        let link = folder.path().join("of the old bytes");
        fs::hard_link(&path, &link).expect("a link");
        file.lock = Some(unlock_key(9, 2));
        file.save(&path).expect("saved");
        let pkcs8 = file.credentials.key.pkcs8().to_vec();
        for file in [&path, &link] {
            let bytes = fs::read(file).expect("it is there");
            for secret in [&pkcs8[..], &[4; 32], &[5; 32], &[6; 32], &[9; 32]] {
                assert!(!contains(&bytes, secret), "{}", file.display());
            }
        }
        let Err(StoreError::Locked(locked)) = KeyFile::load(&path) else {
            panic!("it is locked");
        };
        assert_eq!((locked.name.as_str(), locked.generation), ("m1", 2));
        assert_eq!(locked.subject, file.subject());
        for wrong in [unlock_key(8, 2), unlock_key(9, 3)] {
            let opened = KeyFile::open(&path, Some(&wrong));
            assert!(matches!(
                opened,
                Err(StoreError::WrongUnlockKey { generation: 2, .. })
            ));
        }
        let opened = KeyFile::open(&path, Some(&unlock_key(9, 2))).expect("its own key");
        let part = opened.manager.as_ref().expect("a manager's part");
        assert_eq!((part.data_key[0], part.envelope_key[0]), (4, 5));
        assert_eq!(part.former_data_key.as_ref().map(|key| key[0]), Some(6));
        assert_eq!(opened.credentials.key.pkcs8(), pkcs8.as_slice());
        opened.save(&path).expect("saved");
        assert!(
            matches!(KeyFile::load(&path), Err(StoreError::Locked(_))),
            "it stays locked"
        );
        let unlocked = KeyFile { lock: None, ..opened };
        unlocked.save(&path).expect("saved");
        KeyFile::open(&path, Some(&unlock_key(1, 1))).expect("open to its owner");
    }

    #[test]
    fn nothing_in_a_locked_file_can_be_swapped() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("node.keys");
        let mut file = key_file();
        file.lock = Some(unlock_key(9, 1));
        let bytes = file.encode().expect("sealed");
        let Body::Locked(body) = body(&bytes).expect("whole") else {
            panic!("it is locked");
        };
        let mut other = key_file();
        other.name = "m2".into();
        other.lock = Some(unlock_key(9, 1));
        let other = other.encode().expect("sealed");
        let Body::Locked(other) = super::body(&other).expect("whole") else {
            panic!("it is locked");
        };
        // Another's open part, under a sum that fits.
        let mixed = LockedRecord {
            open: LockedRecord::decode(other).expect("ours").open,
            ..LockedRecord::decode(body).expect("ours")
        };
        fs::write(&path, framed(LOCKED_MARK, &mixed).as_slice()).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        let opened = KeyFile::open(&path, Some(&unlock_key(9, 1)));
        assert!(matches!(opened, Err(StoreError::WrongUnlockKey { .. })));
    }

    /// The whole way of a file's bytes.
    fn decode(bytes: &[u8]) -> Result<KeyFile, &'static str> {
        match body(bytes)? {
            Body::Open(body) => super::key_file(Record::decode(body).map_err(|_| "no record")?, None),
            Body::Locked(_) => Err("locked"),
        }
    }

    #[test]
    fn a_key_file_reads_back_and_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("node.keys");
        assert!(matches!(KeyFile::load(&path), Err(StoreError::Missing(_))));
        let file = key_file();
        let anothers = folder.path().join("node.new");
        fs::write(&anothers, "not ours").expect("a file");
        for _ in 0..2 {
            fs::write(folder.path().join("node.keys.new"), "left by a crash").expect("a file");
            file.save(&path).expect("saved");
        }
        assert_eq!(fs::metadata(&path).expect("it is there").mode() & 0o777, 0o600);
        assert_eq!(fs::read(&anothers).expect("untouched"), b"not ours");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 2);
        let read = KeyFile::load(&path).expect("our own file");
        assert_eq!(*read.encode().expect("encoded"), *file.encode().expect("encoded"));
        assert_eq!(read.subject(), file.subject());
        assert_eq!(read.standby, file.standby);
        let part = read.manager.as_ref().expect("a manager's part");
        assert_eq!((part.data_key[0], part.envelope_key[0], part.store[0]), (4, 5, 3));
        let printed = format!("{read:?} {part:?} {:?}", read.credentials);
        assert!(
            !printed.contains("[4, 4") && !printed.contains("[5, 5"),
            "{printed}"
        );
    }

    #[test]
    fn a_bare_name_is_in_the_current_folder() {
        assert_eq!(super::folder(Path::new("bob.key")), Some(Path::new(".")));
        assert_eq!(super::folder(Path::new("a/bob.key")), Some(Path::new("a")));
        assert_eq!(super::folder(Path::new("/")), None);
    }

    #[test]
    fn what_others_can_read_or_swap_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("node.keys");
        key_file().save(&path).expect("saved");
        for mode in [0o640, 0o604, 0o620, 0o601, 0o777] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            assert!(
                matches!(KeyFile::load(&path), Err(StoreError::Exposed { mode: got, .. }) if got == mode)
            );
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        let link = folder.path().join("link");
        symlink(&path, &link).expect("a link");
        assert!(matches!(KeyFile::load(&link), Err(StoreError::Io { .. })));
        assert!(matches!(KeyFile::load(folder.path()), Err(StoreError::Owner(_))));
    }

    #[test]
    fn every_cut_and_every_flipped_byte_is_told() {
        let bytes = key_file().encode().expect("encoded");
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "cut at {length}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x20;
            assert!(decode(&damaged).is_err(), "flipped at {at}");
        }
        assert!(decode(&vec![0; FILE_BYTES + 1]).is_err());
    }

    #[test]
    fn parts_that_do_not_belong_together_are_refused() {
        let mut file = key_file();
        let other = credentials(&authority(), Role::Manager, 1);
        let ours = Arc::into_inner(file.credentials).expect("the only owner");
        file.credentials = Arc::new(Credentials {
            key: other.key,
            certificate: ours.certificate,
            chain: Vec::new(),
            bundle: ours.bundle,
        });
        assert!(decode(&file.encode().expect("encoded")).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let sum = Sha256::digest(&body);
            let _ = decode(&[MARK.as_slice(), &sum, &body].concat()); // only that it returns
        }
    }
}
