//! The newest snapshot on disk: one file of sealed frames, replaced atomically.
//!
//! The first frame says what the snapshot covers, each further one holds a chunk of the state, the last one says how many
//! there were. The frames are chained and numbered as the log's are, so none can be lost, moved or taken from another
//! snapshot. Neither saving nor loading holds the encoded state as a whole.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::encryption::{NONCE_BYTES, RecordKind, Sealing};
use crate::file_system::{File, FileSystem, OpenMode};
use crate::log_store::frame::{self, ChainHash, FrameError, HEADER_BYTES, RECORD_BYTES};
use crate::log_store::record::{self, Input, RecordError};
use crate::log_store::sealed;
use crate::planted::{Bug, planted};
use crate::seam::Entropy;
use crate::state::{Decoder, State, chunks};
use crate::state_machine::{SnapshotMeta, Snapshots};
use crate::type_config::StoredMembership;

const NAME: &str = "snapshot";
const NEW: &str = "snapshot.new";
/// Format of the first frame.
const FORMAT: u8 = 1;

/// Why a snapshot on disk is not taken. Inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error(
    "the snapshot is damaged: {} at byte {offset}: {what}",
    file.display()
)]
pub struct Damaged {
    file: PathBuf,
    offset: u64,
    what: String,
}

/// The snapshot of one member, in the folder of its log. Calls block.
#[derive(Clone)]
pub struct SnapshotFile {
    fs: Arc<dyn FileSystem>,
    folder: PathBuf,
    sealing: Sealing,
    entropy: Arc<dyn Entropy>,
}

impl fmt::Debug for SnapshotFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotFile")
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

impl SnapshotFile {
    /// The snapshot of the store in a folder. The folder is made and locked by [`crate::log_store::LogStore`]; nothing
    /// is read yet.
    pub fn new(fs: Arc<dyn FileSystem>, folder: &Path, sealing: Sealing, entropy: Arc<dyn Entropy>) -> Self {
        Self {
            fs,
            folder: folder.to_owned(),
            sealing,
            entropy,
        }
    }

    fn remove_new(&self) -> io::Result<()> {
        match self.fs.unlink(&self.folder.join(NEW)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn origin(&self) -> ChainHash {
        ChainHash::origin("bulkhead snapshot", &self.sealing.store)
    }

    fn write(&self, path: &Path, meta: &SnapshotMeta, state: &State) -> io::Result<u64> {
        let mut writer = Writer {
            file: self.fs.open(path, OpenMode::CreateNew)?,
            snapshot: self,
            offset: 0,
            next: 0,
            chain: self.origin(),
        };
        // Chunks of two snapshots that cover the same could otherwise be mixed.
        let mut salt = [0; NONCE_BYTES];
        self.entropy.fill(&mut salt).map_err(io::Error::other)?;
        writer.frame(&encode_meta(meta, &salt))?;
        for chunk in chunks(state) {
            writer.frame(&chunk)?;
        }
        let frames = writer.next;
        writer.frame(&frames.to_le_bytes())?;
        if !planted(Bug::SnapshotBeforeFlush) {
            writer.file.sync_data()?;
        }
        Ok(writer.offset)
    }
}

impl Snapshots for SnapshotFile {
    /// Replaces the snapshot. When this returns, the new one is durable; where it fails, the old one is as it was.
    ///
    /// # Errors
    /// The disk's own.
    fn save(&self, meta: &SnapshotMeta, state: &State) -> io::Result<u64> {
        let new = self.folder.join(NEW);
        self.remove_new()?;
        let written = self.write(&new, meta, state);
        if written.is_err() {
            let _ = self.remove_new(); // gives the space back; otherwise the next one does
        }
        let bytes = written?;
        self.fs.rename(&new, &self.folder.join(NAME))?;
        if !planted(Bug::SkipsFolderFlush) {
            self.fs.sync_directory(&self.folder)?;
        }
        Ok(bytes)
    }

    /// The newest snapshot, if there is one.
    ///
    /// # Errors
    /// The disk's own, or [`Damaged`] as [`io::ErrorKind::InvalidData`].
    fn load(&self) -> io::Result<Option<(SnapshotMeta, State, u64)>> {
        let path = self.folder.join(NAME);
        if planted(Bug::SkipsLoadingSnapshot) {
            return Ok(None);
        }
        let file = match self.fs.open(&path, OpenMode::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut reader = Reader {
            end: file.len()?,
            file: &*file,
            sealing: &self.sealing,
            offset: 0,
            next: 0,
            chain: self.origin(),
        };
        match reader.read() {
            Ok((meta, state)) => Ok(Some((meta, state, reader.end))),
            Err(LoadError::Io(error)) => Err(error),
            Err(error) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                Damaged {
                    file: path,
                    offset: reader.offset,
                    what: error.to_string(),
                },
            )),
        }
    }
}

fn encode_meta(meta: &SnapshotMeta, salt: &[u8]) -> Vec<u8> {
    let mut buffer = vec![FORMAT];
    buffer.extend_from_slice(salt);
    record::put_log_id(&mut buffer, meta.last_log_id.as_ref());
    record::put_log_id(&mut buffer, meta.last_membership.log_id().as_ref());
    record::put_membership(&mut buffer, meta.last_membership.membership());
    buffer
}

fn decode_meta(content: &[u8]) -> Result<SnapshotMeta, RecordError> {
    let rest = match content.split_first() {
        Some((&FORMAT, rest)) => rest.get(NONCE_BYTES..).ok_or(RecordError)?,
        _ => return Err(RecordError),
    };
    let mut input = Input(rest);
    let last_log_id = input.log_id()?;
    let set_by = input.log_id()?;
    let membership = input.membership()?;
    input.end()?;
    Ok(SnapshotMeta {
        last_log_id,
        last_membership: StoredMembership::new(set_by, membership),
    })
}

struct Writer<'a> {
    file: Box<dyn File>,
    snapshot: &'a SnapshotFile,
    offset: u64,
    next: u64,
    chain: ChainHash,
}

impl Writer<'_> {
    fn frame(&mut self, content: &[u8]) -> io::Result<()> {
        let mut buffer = vec![0; sealed::ROOM_BYTES];
        buffer.extend_from_slice(content);
        self.chain = sealed::seal(
            &self.snapshot.sealing,
            &*self.snapshot.entropy,
            RecordKind::Snapshot,
            self.next,
            self.chain,
            &mut buffer,
        )
        .map_err(io::Error::other)?;
        self.file.write_all_at(&buffer, self.offset)?;
        self.offset += buffer.len() as u64;
        self.next += 1;
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Seal(#[from] crate::encryption::OpenError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    State(#[from] crate::state::SnapshotError),
    #[error("the frame does not follow the one before")]
    Chain,
    #[error("bytes follow its end")]
    Surplus,
}

struct Reader<'a> {
    file: &'a dyn File,
    end: u64,
    sealing: &'a Sealing,
    offset: u64,
    next: u64,
    chain: ChainHash,
}

impl Reader<'_> {
    fn read(&mut self) -> Result<(SnapshotMeta, State), LoadError> {
        let meta = decode_meta(&self.frame()?)?;
        let mut decoder = Decoder::new(&self.frame()?)?;
        loop {
            let chunk = self.frame()?;
            if self.offset == self.end {
                // The last frame: how many came before it.
                return match chunk[..] == (self.next - 1).to_le_bytes() {
                    true => Ok((meta, decoder.finish()?)),
                    false => Err(LoadError::Surplus),
                };
            }
            decoder.push(&chunk)?;
        }
    }

    fn frame(&mut self) -> Result<zeroize::Zeroizing<Vec<u8>>, LoadError> {
        let left = self.end - self.offset;
        let mut bytes = vec![0; HEADER_BYTES];
        if left < HEADER_BYTES as u64 {
            return Err(FrameError::CutOff.into());
        }
        self.file.read_exact_at(&mut bytes, self.offset)?;
        let record = usize::try_from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .unwrap_or(usize::MAX)
            .min(RECORD_BYTES); // a longer one is refused below
        let whole = HEADER_BYTES + record;
        if left < whole as u64 {
            return Err(FrameError::CutOff.into());
        }
        bytes.resize(whole, 0);
        self.file.read_exact_at(&mut bytes, self.offset)?;
        let frame = frame::decode(&bytes)?;
        if (frame.sequence, frame.previous) != (self.next, self.chain) {
            return Err(LoadError::Chain);
        }
        let content = sealed::open(self.sealing, RecordKind::Snapshot, &frame)?;
        self.chain = frame.next;
        self.next += 1;
        self.offset += whole as u64;
        Ok(content)
    }
}

#[cfg(test)]
mod tests;
