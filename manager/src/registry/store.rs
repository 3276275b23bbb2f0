//! Blobs on this manager's disk: one file for each, named by the digest of its content.
//!
//! A blob is written to a file of its own beside, hashed while it is written, flushed, and only then renamed to its
//! name: what has a name was whole and true when it got it. The folder is the only record, so there is no index that
//! could disagree with it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_proto::{Digest, limits};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::{stat::futimens, time::TimeSpec};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Blobs that are received at once; more wait. Each holds one chunk in memory and keeps the disk busy.
const RECEIVING: usize = 8;

/// Why a blob was not stored or read.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// No blob of this digest is here.
    #[error("{0} is not stored here")]
    Absent(Digest),
    /// Larger than any blob may be.
    #[error("{digest} has {size} bytes; the limit is {}", limits::BLOB_BYTES)]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// Bytes announced.
        size: u64,
    },
    /// The content is not what its digest or its announced size says.
    #[error("the content received for {0} does not match its digest and size")]
    Damaged(Digest),
    /// Reading from past the end.
    #[error("{0} is shorter than the offset asked for")]
    Offset(Digest),
    /// The disk is kept free for the log.
    #[error(
        "this manager's disk has no room for {size} bytes more beside its reserve of {}",
        limits::DISK_RESERVE_BYTES
    )]
    Full {
        /// Bytes announced.
        size: u64,
    },
    /// The disk failed.
    #[error("the blob store could not {action}")]
    Disk {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn disk(action: &'static str) -> impl FnOnce(io::Error) -> BlobError {
    move |source| BlobError::Disk { action, source }
}

/// The folder of blobs. All but [`BlobStore::receive`] blocks; call it where blocking is allowed.
#[derive(Clone)]
pub struct BlobStore(Arc<Inner>);

struct Inner {
    blobs: PathBuf,
    incoming: PathBuf,
    next_file: AtomicU64,
    receiving: Arc<Semaphore>,
    /// Held while a blob's age is looked at to remove it, and while it is renewed: neither overtakes the other.
    ages: Mutex<()>,
}

impl std::fmt::Debug for BlobStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("BlobStore").field(&self.0.blobs).finish()
    }
}

impl BlobStore {
    /// Opens or makes the store under `folder`, and clears what a crash left half received.
    pub fn open(folder: &Path) -> Result<Self, BlobError> {
        let blobs = folder.join("blobs/sha256");
        let incoming = folder.join("incoming");
        let make = || -> io::Result<()> {
            fs::create_dir_all(&blobs)?;
            fs::create_dir_all(&incoming)?;
            for left in fs::read_dir(&incoming)? {
                fs::remove_file(left?.path())?;
            }
            Ok(())
        };
        make().map_err(disk("be opened"))?;
        Ok(Self(Arc::new(Inner {
            blobs,
            incoming,
            next_file: AtomicU64::new(0),
            receiving: Arc::new(Semaphore::new(RECEIVING)),
            ages: Mutex::new(()),
        })))
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.0.blobs.join(digest.hex())
    }

    /// The size of a stored blob, whose grace starts anew: whoever asks is about to rely on it.
    pub fn touch(&self, digest: &Digest) -> Option<u64> {
        let _ages = self.0.ages.lock().unwrap_or_else(PoisonError::into_inner);
        let file = File::open(self.path(digest)).ok()?;
        // An age that cannot be renewed is only the older one.
        let _ = futimens(&file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW);
        Some(file.metadata().ok()?.len())
    }

    /// Starts to receive a blob of this size; waits while too many are under way.
    pub async fn receive(&self, digest: Digest, size: u64) -> Result<Incoming, BlobError> {
        if size > limits::BLOB_BYTES {
            return Err(BlobError::TooLarge { digest, size });
        }
        self.begin(digest, Some(size)).await
    }

    /// Starts to receive a blob whose size nobody said: the digest alone decides, up to the largest size.
    pub async fn receive_unsized(&self, digest: Digest) -> Result<Incoming, BlobError> {
        self.begin(digest, None).await
    }

    async fn begin(&self, digest: Digest, size: Option<u64>) -> Result<Incoming, BlobError> {
        let permit = self.0.receiving.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let number = self.0.next_file.fetch_add(1, Ordering::Relaxed);
        let path = self.0.incoming.join(format!("{}.{number}", digest.hex()));
        let store = self.clone();
        super::blocking(move || {
            store.check_room(size.unwrap_or(0))?;
            let file = File::create_new(&path).map_err(disk("create a file"))?;
            let incoming = Incoming {
                store,
                file,
                path,
                digest,
                size,
                written: 0,
                hasher: Sha256::new(),
                _permit: permit,
            };
            // The room is taken now, so that two large blobs cannot both be promised the same. A file system that
            // cannot do that finds out while writing.
            if let Some(size @ 1..) = size
                && let Err(nix::errno::Errno::ENOSPC) =
                    fallocate(&incoming.file, FallocateFlags::empty(), 0, size.cast_signed())
            {
                return Err(BlobError::Full { size });
            }
            Ok(incoming)
        })
        .await
    }

    fn check_room(&self, size: u64) -> Result<(), BlobError> {
        let about = nix::sys::statvfs::statvfs(&self.0.incoming)
            .map_err(|errno| disk("read the free space")(errno.into()))?;
        let free = about.blocks_available().saturating_mul(about.fragment_size());
        if free < size.saturating_add(limits::DISK_RESERVE_BYTES) {
            return Err(BlobError::Full { size });
        }
        Ok(())
    }

    /// Opens a blob to read it from `offset` on.
    pub fn read(&self, digest: Digest, offset: u64) -> Result<BlobReader, BlobError> {
        let mut file = match File::open(self.path(&digest)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(BlobError::Absent(digest)),
            Err(e) => return Err(disk("open a blob")(e)),
        };
        let size = file.metadata().map_err(disk("read a blob's size"))?.len();
        if offset > size {
            return Err(BlobError::Offset(digest));
        }
        file.seek(SeekFrom::Start(offset)).map_err(disk("seek"))?;
        Ok(BlobReader {
            store: self.clone(),
            digest,
            file,
            hasher: (offset == 0).then(Sha256::new),
        })
    }

    /// A whole blob of at most `limit` bytes, checked.
    pub fn read_small(&self, digest: Digest, limit: usize) -> Result<Vec<u8>, BlobError> {
        let mut reader = self.read(digest, 0)?;
        let mut content = Vec::new();
        while let Some(chunk) = reader.next_chunk()? {
            content.extend_from_slice(&chunk);
            if content.len() > limit {
                let size = content.len() as u64;
                return Err(BlobError::TooLarge { digest, size });
            }
        }
        Ok(content)
    }

    /// Removes what nothing refers to and nobody asked for since `before_ms` (milliseconds since 1970). Answers how many.
    pub fn collect(&self, referenced: &BTreeSet<Digest>, before_ms: i64) -> Result<usize, BlobError> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.0.blobs).map_err(disk("list the blobs"))? {
            let entry = entry.map_err(disk("list the blobs"))?;
            let name = entry.file_name();
            let digest = name.to_str().and_then(|hex| format!("sha256:{hex}").parse().ok());
            if digest.is_some_and(|digest: Digest| referenced.contains(&digest)) {
                continue;
            }
            let _ages = self.0.ages.lock().unwrap_or_else(PoisonError::into_inner);
            if modified_ms(&entry).map_err(disk("read a blob's age"))? < before_ms {
                fs::remove_file(entry.path()).map_err(disk("remove a blob"))?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

fn modified_ms(entry: &fs::DirEntry) -> io::Result<i64> {
    use std::os::unix::fs::MetadataExt as _;
    let about = entry.metadata()?;
    Ok(about.mtime() * 1000 + about.mtime_nsec() / 1_000_000)
}

/// A blob under way. Dropped before [`Incoming::finish`], it leaves nothing.
pub struct Incoming {
    store: BlobStore,
    file: File,
    path: PathBuf,
    digest: Digest,
    size: Option<u64>,
    written: u64,
    hasher: Sha256,
    _permit: OwnedSemaphorePermit,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Incoming({} bytes of {})", self.written, self.digest)
    }
}

impl Incoming {
    /// Takes the next bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.written = self.written.saturating_add(bytes.len() as u64);
        if self.written > self.size.unwrap_or(limits::BLOB_BYTES) {
            return Err(BlobError::Damaged(self.digest));
        }
        if self.size.is_none() {
            self.store.check_room(bytes.len() as u64)?;
        }
        self.hasher.update(bytes);
        match self.file.write_all(bytes) {
            Err(e) if e.kind() == io::ErrorKind::StorageFull => Err(BlobError::Full {
                size: bytes.len() as u64,
            }),
            written => written.map_err(disk("write a blob")),
        }
    }

    /// Checks the whole, makes it durable and gives it its name.
    pub fn finish(mut self) -> Result<(), BlobError> {
        let hash = std::mem::take(&mut self.hasher).finalize();
        if self.size.is_some_and(|size| size != self.written)
            || Digest::from_bytes(hash.into()) != self.digest
        {
            return Err(BlobError::Damaged(self.digest));
        }
        self.file.sync_all().map_err(disk("flush a blob"))?;
        let _ages = self.store.0.ages.lock().unwrap_or_else(PoisonError::into_inner);
        fs::rename(&self.path, self.store.path(&self.digest)).map_err(disk("name a blob"))?;
        File::open(&self.store.0.blobs)
            .and_then(|folder| folder.sync_all())
            .map_err(disk("flush the blob folder"))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // After `finish` there is nothing at the path; what stays after an error goes at the next start.
        let _ = fs::remove_file(&self.path);
    }
}

/// A blob that is read in chunks. Read from its start, it is checked, and one that rotted on disk is removed, so that
/// the next reader's manager takes a good one from a peer.
pub struct BlobReader {
    store: BlobStore,
    digest: Digest,
    file: File,
    hasher: Option<Sha256>,
}

impl std::fmt::Debug for BlobReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("BlobReader").field(&self.digest).finish()
    }
}

impl BlobReader {
    /// The next bytes, at most [`limits::CHUNK_BYTES`]; nothing at the end.
    pub fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, BlobError> {
        let mut chunk = vec![0; limits::CHUNK_BYTES];
        let mut filled = 0;
        while filled < chunk.len() {
            let got = self
                .file
                .read(&mut chunk[filled..])
                .map_err(disk("read a blob"))?;
            if got == 0 {
                break;
            }
            filled += got;
        }
        chunk.truncate(filled);
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&chunk);
        }
        if filled > 0 {
            return Ok(Some(chunk));
        }
        let whole = match self.hasher.take() {
            Some(hasher) => Digest::from_bytes(hasher.finalize().into()) == self.digest,
            None => true,
        };
        if !whole {
            // If it cannot be removed, the next reader tries again.
            let _ = fs::remove_file(self.store.path(&self.digest));
            return Err(BlobError::Damaged(self.digest));
        }
        Ok(None)
    }
}
