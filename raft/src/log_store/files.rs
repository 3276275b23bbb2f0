//! The files of a store's folder: what they are called, how the small ones read, how segments come and go.
//!
//! ```text
//! store             whose store this is; written last when a store is made, so that a folder without it holds nothing
//! acknowledged      the sequence of the last frame that was acknowledged; overwritten in place, never synced by itself
//! log-<sequence>    a segment, named by its first frame; preallocated, so that its writes move no metadata
//! spare-<sequence>  a segment that waits for its next use; its old content stays and does not read as frames
//! ```

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::frame::ChainHash;
use super::{OpenError, frame, sealed};
use crate::encryption::{RecordKind, Sealing};
use crate::file_system::{File, FileSystem, OpenMode, read_file, replace_file};
use crate::planted::{Bug, planted};
use crate::seam::Entropy;

pub(super) const STORE: &str = "store";
pub(super) const MARK: &str = "acknowledged";
const SEGMENT: &str = "log-";
const SPARE: &str = "spare-";

/// Frames start at multiples of this: no write touches a block that holds something acknowledged, and none of a
/// recycled segment's blocks has to be read before it is written.
pub(super) const BLOCK_BYTES: usize = 4096;
/// How much is zeroed at once; small enough that a log write beside it does not wait long.
const ZERO_BYTES: usize = 256 << 10;

pub(super) fn segment_name(sequence: u64) -> String {
    format!("{SEGMENT}{sequence:016x}")
}

pub(super) fn segment_of(name: &str) -> Option<u64> {
    let hex = name.strip_prefix(SEGMENT)?;
    let sequence = u64::from_str_radix(hex, 16).ok()?;
    (segment_name(sequence) == name).then_some(sequence)
}

fn spare_of(name: &str) -> Option<u64> {
    u64::from_str_radix(name.strip_prefix(SPARE)?, 16).ok()
}

/// A new file of zeros, durable but for its name.
pub(super) fn preallocate(fs: &dyn FileSystem, path: &Path, bytes: u64) -> io::Result<Box<dyn File>> {
    let file = fs.open(path, OpenMode::CreateNew)?;
    let zeros = vec![0; ZERO_BYTES];
    let mut at = 0;
    while at < bytes {
        let left = usize::try_from(bytes - at).unwrap_or(ZERO_BYTES).min(ZERO_BYTES);
        file.write_all_at(&zeros[..left], at)?;
        at += left as u64;
    }
    file.sync_data()?;
    Ok(file)
}

/// Whose store a folder holds: the ids in the clear, so that a refusal can tell them apart, then a sealed frame, so that
/// a wrong key is found here.
pub(super) mod header {
    use super::{
        ChainHash, Entropy, FileSystem, OpenError, Path, RecordKind, STORE, Sealing, frame, io, read_file,
        replace_file, sealed,
    };

    const MAGIC: &[u8; 8] = b"BHLOG\0\0\x01";
    const BYTES: usize = 8 + 16 + 8 + 8;

    fn ids(sealing: &Sealing) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(sealing.store);
        bytes.extend(sealing.cluster_epoch.to_le_bytes());
        bytes.extend(sealing.member.to_le_bytes());
        bytes
    }

    pub(in super::super) fn write(
        fs: &dyn FileSystem,
        folder: &Path,
        sealing: &Sealing,
        entropy: &dyn Entropy,
    ) -> io::Result<()> {
        let ids = ids(sealing);
        let mut buffer = vec![0; sealed::ROOM_BYTES];
        buffer.extend_from_slice(&ids);
        let origin = ChainHash::origin("bulkhead store", &sealing.store);
        sealed::seal(sealing, entropy, RecordKind::Log, 0, origin, &mut buffer).map_err(io::Error::other)?;
        let mut content = ids;
        content.extend(crc32c::crc32c(&content).to_le_bytes());
        content.extend(buffer);
        replace_file(fs, &folder.join(STORE), &content)
    }

    /// Whether the folder holds a store, and then that it is this one.
    pub(in super::super) fn check(
        fs: &dyn FileSystem,
        folder: &Path,
        sealing: &Sealing,
    ) -> Result<bool, OpenError> {
        let path = folder.join(STORE);
        let content = match read_file(fs, &path, 4096) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(OpenError::io(&path, source)),
        };
        let damaged = |what: &'static str| OpenError::damaged(&path, 0, what);
        let (ids_found, rest) = content
            .split_at_checked(BYTES)
            .ok_or_else(|| damaged("it is too short"))?;
        let (sum, frame) = rest
            .split_at_checked(4)
            .ok_or_else(|| damaged("it is too short"))?;
        if sum != crc32c::crc32c(ids_found).to_le_bytes() {
            return Err(damaged("its checksum does not match"));
        }
        if ids_found[..8] != MAGIC[..] {
            return Err(OpenError::Format { file: path });
        }
        if ids_found != ids(sealing) {
            return Err(OpenError::Foreign { file: path });
        }
        let frame = frame::decode(frame).map_err(|_| damaged("its sealed part is damaged"))?;
        match sealed::open(sealing, RecordKind::Log, &frame) {
            Ok(content) if content.as_slice() == ids_found => Ok(true),
            Ok(_) => Err(damaged("its sealed part is damaged")),
            Err(_) => Err(OpenError::Key { file: path }),
        }
    }
}

/// The sequence of the last acknowledged frame, in a fixed place that is overwritten after each flush and never synced
/// by itself: it costs one small write to memory, outlives the process, and reaches the disk within the kernel's
/// writeback time. What it cannot know after a loss of power, the next frame knows: one is written only after the one
/// before it was flushed.
#[derive(Debug)]
pub(super) struct Mark {
    file: Box<dyn File>,
    store: [u8; 16],
}

impl Mark {
    const BYTES: usize = 4 + 8 + 16;

    fn encode(store: &[u8; 16], sequence: u64) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[4..12].copy_from_slice(&sequence.to_le_bytes());
        bytes[12..].copy_from_slice(store);
        let sum = crc32c::crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// A durable mark that says that nothing was acknowledged; durable but for its name.
    pub(super) fn create(fs: &dyn FileSystem, folder: &Path, store: &[u8; 16]) -> io::Result<()> {
        let file = fs.open(&folder.join(MARK), OpenMode::CreateNew)?;
        file.write_all_at(&Self::encode(store, 0), 0)?;
        file.sync_data()
    }

    /// The mark and what it says.
    pub(super) fn open(
        fs: &dyn FileSystem,
        folder: &Path,
        store: &[u8; 16],
    ) -> Result<(Self, u64), OpenError> {
        let path = folder.join(MARK);
        let damaged = || OpenError::damaged(&path, 0, "the mark of what was acknowledged is damaged");
        let file = fs
            .open(&path, OpenMode::Write)
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => damaged(),
                _ => OpenError::io(&path, source),
            })?;
        let mut bytes = [0; Self::BYTES];
        file.read_exact_at(&mut bytes, 0)
            .map_err(|source| match source.kind() {
                io::ErrorKind::UnexpectedEof => damaged(),
                _ => OpenError::io(&path, source),
            })?;
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[4..12]);
        let sequence = u64::from_le_bytes(number);
        if bytes != Self::encode(store, sequence) {
            return Err(damaged());
        }
        let store = *store;
        Ok((Self { file, store }, sequence))
    }

    pub(super) fn set(&self, sequence: u64) -> io::Result<()> {
        self.file.write_all_at(&Self::encode(&self.store, sequence), 0)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// The folder's segments that are in no use: one is kept ready for the next rotation.
#[derive(Debug)]
pub(super) struct Spares {
    fs: Arc<dyn FileSystem>,
    folder: PathBuf,
    segment_bytes: u64,
    ready: Mutex<VecDeque<String>>,
}

impl Spares {
    pub(super) fn new(fs: Arc<dyn FileSystem>, folder: PathBuf, segment_bytes: u64) -> Self {
        let ready = Mutex::default();
        Self {
            fs,
            folder,
            segment_bytes,
            ready,
        }
    }

    fn ready(&self) -> std::sync::MutexGuard<'_, VecDeque<String>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ready().is_empty()
    }

    /// A segment under its name, durably named: a spare where there is one, else a new one.
    pub(super) fn take(&self, sequence: u64) -> io::Result<Box<dyn File>> {
        let path = self.folder.join(segment_name(sequence));
        let file = match self.take_spare(&path)? {
            true => self.fs.open(&path, OpenMode::Write)?,
            false => preallocate(&*self.fs, &path, self.segment_bytes)?,
        };
        if !planted(Bug::SkipsSegmentFolderFlush) {
            self.fs.sync_directory(&self.folder)?;
        }
        Ok(file)
    }

    /// Gives a spare this name; false where there is none. One that was removed for its age, beside this, is none.
    fn take_spare(&self, path: &Path) -> io::Result<bool> {
        loop {
            let Some(spare) = self.ready().pop_front() else {
                return Ok(false);
            };
            match self.fs.rename(&self.folder.join(spare), path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => return renamed.map(|()| true),
            }
        }
    }

    /// Makes a spare if there is none.
    pub(super) fn prepare(&self, number: u64) -> io::Result<()> {
        if !self.is_empty() {
            return Ok(());
        }
        let name = format!("{SPARE}{number:016x}");
        let path = self.folder.join(&name);
        if let Err(error) = preallocate(&*self.fs, &path, self.segment_bytes) {
            let _ = self.fs.unlink(&path); // what is left of it goes at the next start
            return Err(error);
        }
        self.fs.sync_directory(&self.folder)?;
        self.ready().push_back(name);
        Ok(())
    }

    /// Removes what waits for its next use: its old content was sealed under a key that is to be forgotten.
    pub(super) fn discard(&self) -> io::Result<()> {
        let ready = std::mem::take(&mut *self.ready());
        for spare in ready {
            self.unlink(&spare)?;
        }
        self.fs.sync_directory(&self.folder)
    }

    /// Removes every segment and spare that is older than a frame, in use or not; whether there was one. Nothing that is in
    /// use may be that old.
    pub(super) fn remove_older(&self, first: u64) -> io::Result<bool> {
        let is_older = |name: &String| segment_of(name).or(spare_of(name)).is_some_and(|it| it < first);
        let older: Vec<String> = self.fs.list(&self.folder)?.into_iter().filter(is_older).collect();
        self.ready().retain(|name| !older.contains(name));
        for name in &older {
            self.unlink(name)?; // one that became a spare beside this is found by the next look
        }
        if !older.is_empty() {
            self.fs.sync_directory(&self.folder)?;
        }
        Ok(!older.is_empty())
    }

    fn unlink(&self, name: &str) -> io::Result<()> {
        match self.fs.unlink(&self.folder.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Seals the store's header anew.
    pub(super) fn reseal_header(&self, sealing: &Sealing, entropy: &dyn Entropy) -> io::Result<()> {
        header::write(&*self.fs, &self.folder, sealing, entropy)
    }

    /// Takes segments out of use, oldest first: a crash in between leaves the newer ones.
    pub(super) fn retire(&self, segments: &[u64]) -> io::Result<()> {
        let mut spare = None;
        for sequence in segments {
            let path = self.folder.join(segment_name(*sequence));
            let whole = match self.fs.open(&path, OpenMode::Read) {
                Ok(file) => file.len()? == self.segment_bytes,
                // Removed for its age, beside this.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if whole && spare.is_none() && self.is_empty() {
                let name = format!("{SPARE}{sequence:016x}");
                self.fs.rename(&path, &self.folder.join(&name))?;
                spare = Some(name);
            } else {
                self.unlink(&segment_name(*sequence))?;
            }
        }
        self.fs.sync_directory(&self.folder)?;
        self.ready().extend(spare); // only now: a rename that is not durable yet must not be followed by another
        Ok(())
    }

    /// Finds the spares that the last run left; all but one whole one go.
    pub(super) fn adopt(&self, names: &[String]) -> io::Result<()> {
        for name in names.iter().filter(|name| name.starts_with(SPARE)) {
            let path = self.folder.join(name);
            let whole = self.fs.open(&path, OpenMode::Read)?.len()? == self.segment_bytes;
            if whole && self.is_empty() {
                self.ready().push_back(name.clone());
            } else {
                self.fs.unlink(&path)?;
            }
        }
        Ok(())
    }
}

/// Whether a name is one of the store's own, in a folder that it shares with the snapshot.
pub(super) fn is_ours(name: &str) -> bool {
    name == STORE
        || name == MARK
        || name.starts_with(&format!("{STORE}."))
        || name.starts_with(SEGMENT)
        || name.starts_with(SPARE)
}
