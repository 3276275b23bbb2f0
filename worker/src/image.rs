//! Image blobs on this node: an OCI layout on disk (image specification, "image-layout.md"), content by digest.
//!
//! A blob appears under its digest only after its size and its hash were found right and its bytes are on disk, so
//! what is there is whole. All calls block on the disk; the agent makes them beside its loop.

use bulkhead_proto::{Digest, limits};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Marks the folder for other tools.
const LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

/// Why a blob was not stored.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// More bytes than announced, or fewer.
    #[error("the blob {digest} was announced with {expected} bytes and has {}", if *more { "more" } else { "fewer" })]
    Size {
        /// The blob.
        digest: Digest,
        /// Bytes announced.
        expected: u64,
        /// Which way it differs.
        more: bool,
    },
    /// Other bytes than announced.
    #[error("the content that came for the blob {digest} has the digest {got}")]
    Digest {
        /// What was announced.
        digest: Digest,
        /// What came.
        got: Digest,
    },
    /// One blob over the limit of all blobs.
    #[error("the blob {digest} has {size} bytes; {} are the most", limits::BLOB_BYTES)]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
    },
    /// The store is full.
    #[error(
        "the blob {digest} needs {size} bytes; {free} of the store's {capacity} are free: remove unused images"
    )]
    Full {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
        /// What is left.
        free: u64,
        /// What the store may hold.
        capacity: u64,
    },
    /// The disk.
    #[error("the blob store's disk")]
    Io(#[from] io::Error),
}

/// Verified blobs by digest.
#[derive(Debug, Clone)]
pub struct BlobStore {
    blobs: PathBuf,
    ingest: PathBuf,
    capacity: u64,
}

impl BlobStore {
    /// Opens or makes the store; what an earlier run left half-received is deleted. One program uses a store.
    pub fn open(folder: &Path, capacity: u64) -> Result<Self, BlobError> {
        let store = BlobStore {
            blobs: folder.join("blobs/sha256"),
            ingest: folder.join("ingest"),
            capacity,
        };
        match fs::remove_dir_all(&store.ingest) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            Ok(()) | Err(_) => {}
        }
        fs::create_dir_all(&store.blobs)?;
        fs::create_dir_all(&store.ingest)?;
        fs::write(folder.join("oci-layout"), LAYOUT)?;
        Ok(store)
    }

    /// Which blobs are here, with their sizes. A file that is not named by a digest is no blob.
    pub fn list(&self) -> Result<BTreeMap<Digest, u64>, BlobError> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.blobs)? {
            let entry = entry?;
            let digest = entry
                .file_name()
                .to_str()
                .and_then(|name| format!("sha256:{name}").parse().ok());
            if let Some(digest) = digest {
                found.insert(digest, entry.metadata()?.len());
            }
        }
        Ok(found)
    }

    /// Whether the blob is here.
    pub fn has(&self, digest: Digest) -> bool {
        self.path(digest).is_file()
    }

    /// The blob, read-only, at its start.
    pub fn read(&self, digest: Digest) -> Result<File, BlobError> {
        Ok(File::open(self.path(digest))?)
    }

    /// Begins to receive a blob. Nothing is stored until [`Ingest::finish`]; dropping it deletes what came.
    pub fn receive(&self, digest: Digest, size: u64) -> Result<Ingest, BlobError> {
        if size > limits::BLOB_BYTES {
            return Err(BlobError::TooLarge { digest, size });
        }
        let used: u64 = self.list()?.values().sum();
        let free = self.capacity.saturating_sub(used);
        if size > free {
            return Err(BlobError::Full {
                digest,
                size,
                free,
                capacity: self.capacity,
            });
        }
        let temporary = self.ingest.join(digest.hex());
        // Whoever received it before has lost it: one blob is fetched once at a time.
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)?;
        Ok(Ingest {
            file,
            temporary,
            place: self.path(digest),
            digest,
            size,
            written: 0,
            hash: Sha256::new(),
        })
    }

    /// Reads the blob again and compares it with its digest; one that differs is deleted, so that it is fetched anew.
    pub fn verify(&self, digest: Digest) -> Result<(), BlobError> {
        let mut file = self.read(digest)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; limits::CHUNK_BYTES];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                length => hash.update(&buffer[..length]),
            }
        }
        let got = Digest::from_bytes(hash.finalize().into());
        if got != digest {
            self.remove(digest)?;
            return Err(BlobError::Digest { digest, got });
        }
        Ok(())
    }

    /// Deletes a blob, also one that is not there.
    pub fn remove(&self, digest: Digest) -> Result<(), BlobError> {
        match fs::remove_file(self.path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }
}

/// A blob that is being received.
#[derive(Debug)]
pub struct Ingest {
    file: File,
    temporary: PathBuf,
    place: PathBuf,
    digest: Digest,
    size: u64,
    written: u64,
    hash: Sha256,
}

impl Ingest {
    /// Takes the next bytes. More than were announced are refused before they reach the disk.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        let written = self.written.saturating_add(bytes.len() as u64);
        if written > self.size {
            return Err(self.wrong_size(true));
        }
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.written = written;
        Ok(())
    }

    /// How many bytes have come: where a broken transfer goes on.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Checks size and digest, brings the bytes to the disk, and only then names them by the digest.
    pub fn finish(self) -> Result<(), BlobError> {
        if self.written < self.size {
            return Err(self.wrong_size(false));
        }
        let got = Digest::from_bytes(self.hash.clone().finalize().into());
        if got != self.digest {
            return Err(BlobError::Digest {
                digest: self.digest,
                got,
            });
        }
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.place)?;
        if let Some(folder) = self.place.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }

    fn wrong_size(&self, more: bool) -> BlobError {
        BlobError::Size {
            digest: self.digest,
            expected: self.size,
            more,
        }
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        // After `finish` the file has moved away; otherwise the next start deletes what this cannot.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Since when each blob has had no task that needs it. Pure; the agent deletes what it names.
///
/// An image outlives its last task for a while: the next task of an update or a restart would fetch it again.
#[derive(Debug, Default)]
pub struct Unused(BTreeMap<Digest, i64>);

impl Unused {
    /// The blobs that have been without use for [`limits::BLOB_GRACE`].
    pub fn expired(
        &mut self,
        here: &BTreeSet<Digest>,
        needed: &BTreeSet<Digest>,
        now_ms: i64,
    ) -> Vec<Digest> {
        self.0
            .retain(|digest, _| here.contains(digest) && !needed.contains(digest));
        for digest in here.difference(needed) {
            self.0.entry(*digest).or_insert(now_ms);
        }
        let grace = i64::try_from(limits::BLOB_GRACE.as_millis()).unwrap_or(i64::MAX);
        let old = |since: i64| now_ms.saturating_sub(since) >= grace;
        self.0
            .iter()
            .filter(|(_, since)| old(**since))
            .map(|(digest, _)| *digest)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(capacity: u64) -> (tempfile::TempDir, BlobStore) {
        let folder = tempfile::tempdir().expect("folder");
        let store = BlobStore::open(folder.path(), capacity).expect("store");
        (folder, store)
    }

    fn files(folder: &Path) -> usize {
        fs::read_dir(folder).expect("folder").count()
    }

    #[test]
    fn what_is_stored_is_what_was_announced() {
        let (folder, store) = store(100);
        let digest = Digest::of(b"hello");
        let mut ingest = store.receive(digest, 5).expect("room");
        ingest.write(b"he").expect("part");
        assert!(!store.has(digest), "not before it is whole");
        ingest.write(b"llo").expect("part");
        ingest.finish().expect("whole");
        assert_eq!(store.list().expect("list"), BTreeMap::from([(digest, 5)]));
        assert_eq!(
            io::read_to_string(store.read(digest).expect("open")).expect("text"),
            "hello"
        );
        store.verify(digest).expect("right");
        assert_eq!(files(&folder.path().join("ingest")), 0);
        let again = BlobStore::open(folder.path(), 100).expect("store");
        assert!(again.has(digest), "it outlives the program");
    }

    #[test]
    fn what_differs_is_not_stored_and_leaves_nothing() {
        let (folder, store) = store(100);
        let digest = Digest::of(b"hello");
        type Expected = fn(&BlobError) -> bool;
        let cases: [(&[u8], Expected); 3] = [
            (b"hell", |e| matches!(e, BlobError::Size { more: false, .. })),
            (b"hello!", |e| matches!(e, BlobError::Size { more: true, .. })),
            (b"hallo", |e| matches!(e, BlobError::Digest { .. })),
        ];
        for (content, expected) in cases {
            let mut ingest = store.receive(digest, 5).expect("room");
            let result = ingest.write(content).and_then(|()| ingest.finish());
            let error = result.expect_err("it differs");
            assert!(expected(&error), "{error}");
            assert!(!store.has(digest));
            assert_eq!(files(&folder.path().join("ingest")), 0);
        }
    }

    #[test]
    fn the_store_has_a_bound() {
        let (_folder, store) = store(8);
        let mut ingest = store.receive(Digest::of(b"hello"), 5).expect("room");
        ingest.write(b"hello").expect("part");
        ingest.finish().expect("whole");
        let error = store.receive(Digest::of(b"more"), 4).expect_err("full");
        assert!(matches!(error, BlobError::Full { free: 3, .. }), "{error}");
        let error = store
            .receive(Digest::of(b"x"), limits::BLOB_BYTES + 1)
            .expect_err("too large");
        assert!(matches!(error, BlobError::TooLarge { .. }), "{error}");
        store.remove(Digest::of(b"hello")).expect("remove");
        store.remove(Digest::of(b"hello")).expect("and again");
        store.receive(Digest::of(b"more"), 4).expect("room again");
    }

    #[test]
    fn a_blob_that_changed_on_disk_is_found_and_deleted() {
        let (folder, store) = store(100);
        let digest = Digest::of(b"hello");
        let mut ingest = store.receive(digest, 5).expect("room");
        ingest.write(b"hello").expect("part");
        ingest.finish().expect("whole");
        fs::write(folder.path().join("blobs/sha256").join(digest.hex()), b"hullo").expect("damage");
        assert!(matches!(store.verify(digest), Err(BlobError::Digest { .. })));
        assert!(!store.has(digest));
    }

    #[test]
    fn a_start_deletes_what_was_half_received() {
        let (folder, store) = store(100);
        let ingest = store.receive(Digest::of(b"hello"), 5).expect("room");
        std::mem::forget(ingest); // as if the program had been killed
        assert_eq!(files(&folder.path().join("ingest")), 1);
        BlobStore::open(folder.path(), 100).expect("store");
        assert_eq!(files(&folder.path().join("ingest")), 0);
    }

    #[test]
    fn a_blob_goes_only_after_a_whole_grace_without_use() {
        let grace = i64::try_from(limits::BLOB_GRACE.as_millis()).expect("fits");
        let (digest, none) = (Digest::of(b"a"), BTreeSet::new());
        let here = BTreeSet::from([digest]);
        let mut unused = Unused::default();
        assert!(unused.expired(&here, &none, 0).is_empty());
        assert!(unused.expired(&here, &here, grace / 2).is_empty(), "used again");
        assert!(
            unused.expired(&here, &none, grace).is_empty(),
            "its grace began anew"
        );
        assert_eq!(unused.expired(&here, &none, 2 * grace), [digest]);
        assert!(unused.expired(&none, &none, 3 * grace).is_empty(), "it is gone");
    }
}
