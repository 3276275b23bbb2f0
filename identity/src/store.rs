//! The key file: all that makes a program the node that it is, in one file that is replaced at once or not at all.
//!
//! Key, certificate and roots change together, so they stand together: after a crash a node is what it was before or
//! what it was to become. The file opens with a mark of its format and the SHA-256 of the rest, so that a damaged one
//! is told from a foreign one. It is not encrypted: who reads it is this node, so it is for its owner alone.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_proto::MemberId;
use bulkhead_proto::wire::ManagerAddress;
use prost::Message;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::{Bundle, Certificate, Credentials, Identity, Key, Subject};

/// The first bytes of a key file, with the version of its format.
const MARK: &[u8; 8] = b"BHKEYS1\n";
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
}

/// What a manager keeps beside its credentials.
pub struct ManagerPart {
    /// Its Raft member id.
    pub member: MemberId,
    /// The cluster epoch of its store.
    pub epoch: u64,
    /// The store's random id: part of the associated data of each record.
    pub store: [u8; 16],
    /// Seals log, vote and snapshots.
    pub data_key: Zeroizing<[u8; 32]>,
    /// Opens the envelopes of the key ring (X25519).
    pub envelope_key: Zeroizing<[u8; 32]>,
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

/// A key file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
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

    /// Reads a key file. Whether the certificate is still valid is for the caller to ask.
    ///
    /// # Errors
    /// [`StoreError`]; `Missing` says that there is none.
    pub fn load(path: &Path) -> Result<Self, StoreError> {
        let bytes = read(path)?;
        decode(&bytes).map_err(|what| StoreError::Damaged {
            path: path.to_owned(),
            what,
        })
    }

    /// Writes the file anew, mode 0600: after a crash the old or the new one is there, whole.
    ///
    /// # Errors
    /// [`StoreError::Io`]; the old file then stands.
    pub fn save(&self, path: &Path) -> Result<(), StoreError> {
        replace(path, &self.encode()).map_err(|source| StoreError::Io {
            path: path.to_owned(),
            source,
        })
    }

    fn encode(&self) -> Zeroizing<Vec<u8>> {
        let record = Record {
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
            }),
        };
        // With its size known nothing is moved, and no copy stays behind unwiped.
        let mut bytes = Zeroizing::new(Vec::with_capacity(HEADER_BYTES + record.encoded_len()));
        bytes.extend_from_slice(MARK);
        bytes.extend_from_slice(&[0; 32]);
        record.encode_raw(&mut *bytes);
        let sum = Sha256::digest(&bytes[HEADER_BYTES..]);
        bytes[MARK.len()..HEADER_BYTES].copy_from_slice(&sum);
        bytes
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, StoreError> {
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

fn decode(bytes: &[u8]) -> Result<KeyFile, &'static str> {
    if bytes.len() > FILE_BYTES {
        return Err("it is too long");
    }
    let rest = bytes
        .strip_prefix(MARK)
        .ok_or("it does not begin as a key file of this version")?;
    let (sum, body) = rest.split_at_checked(32).ok_or("it is cut short")?;
    if Sha256::digest(body).as_slice() != sum {
        return Err("its sum does not fit");
    }
    let mut record = Record::decode(body).map_err(|_| "it does not decode")?;
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
    })
}

fn manager_part(mut record: ManagerRecord) -> Result<ManagerPart, &'static str> {
    let secret = |bytes: &[u8]| -> Result<Zeroizing<[u8; 32]>, &'static str> {
        let mut key = Zeroizing::new([0; 32]);
        if bytes.len() != key.len() {
            return Err("one of its store keys has another length");
        }
        key.copy_from_slice(bytes);
        Ok(key)
    };
    Ok(ManagerPart {
        member: MemberId(record.member),
        epoch: record.epoch,
        store: record
            .store
            .as_slice()
            .try_into()
            .map_err(|_| "its store id has another length")?,
        data_key: secret(&record.data_key)?,
        envelope_key: secret(&record.envelope_key)?,
        listen: std::mem::take(&mut record.listen),
        advertise: std::mem::take(&mut record.advertise),
    })
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
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
                data_key: Zeroizing::new([4; 32]),
                envelope_key: Zeroizing::new([5; 32]),
                listen: "0.0.0.0:7443".into(),
                advertise: "127.0.0.1:7443".into(),
            }),
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
        assert_eq!(*read.encode(), *file.encode());
        assert_eq!(read.subject(), file.subject());
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
        let bytes = key_file().encode();
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
        assert!(decode(&file.encode()).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let sum = Sha256::digest(&body);
            let _ = decode(&[MARK.as_slice(), &sum, &body].concat()); // only that it returns
        }
    }
}
