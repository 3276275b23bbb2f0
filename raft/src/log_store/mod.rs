//! The Raft log on disk: entries, vote, and what is committed and purged, in segments of sealed frames.
//!
//! One batch is one frame, one write and one flush. `append` returns once its entries can be read; a writer flushes them,
//! and what arrives meanwhile shares the next flush. After a failed write nothing more is accepted. What a crash may
//! leave and what is damage, [`recovery`] decides. Not here: the state machine's snapshot ([`crate::snapshot`]).

mod disk;
mod files;
pub mod frame;
pub mod record;
mod recovery;
pub(crate) mod sealed;
#[cfg(test)]
pub(crate) mod tests;
mod view;
mod writer;

use std::fmt;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_proto::wire::StoreMark;
use futures::future::BoxFuture;
use futures::{Stream, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};

pub use recovery::Recovered;
pub use view::OrderError;

use crate::encryption::Sealing;
use crate::file_system::FileSystem;
use crate::planted::{Bug, planted};
use crate::seam::Entropy;
use crate::type_config::{Entry, LogId, TypeConfig, Vote};
use writer::{Guard, Shared};

/// Bytes of entries that one read for replication gives; a batch of them is one message of at most 4 MiB.
pub const READ_BYTES: usize = 1 << 20;

/// Makes what a flush waits for.
pub type Delay = dyn Fn() -> BoxFuture<'static, ()> + Send + Sync;

/// When batches are written.
#[derive(Clone, Default)]
pub enum Flushing {
    /// By a thread of the store's own: production.
    #[default]
    Thread,
    /// Before `append` returns: simple simulations.
    Inline,
    /// By a task on the current runtime, each once a future is through: simulations that explore orders.
    Delayed(Arc<Delay>),
}

impl fmt::Debug for Flushing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Flushing::Thread => "Thread",
            Flushing::Inline => "Inline",
            Flushing::Delayed(_) => "Delayed",
        })
    }
}

/// How a store uses its disk and memory.
#[derive(Debug, Clone)]
pub struct Options {
    /// Bytes of a segment. Halving it doubles how often the folder is synced; doubling it doubles what lies idle.
    pub segment_bytes: u64,
    /// Bytes of entries that stay in memory after they were written; followers that are just behind are served from it.
    pub cache_bytes: usize,
    /// When batches are written.
    pub flushing: Flushing,
    /// Whether the store was made before: then a folder without one is refused, since what it acknowledged is lost.
    pub made: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            segment_bytes: 16 << 20,
            cache_bytes: 4 << 20,
            flushing: Flushing::Thread,
            made: false,
        }
    }
}

/// The latest vote and entry of a store that are durable. Clones are handles to the same reading.
#[derive(Debug, Clone, Default)]
pub(crate) struct Durable(Arc<Mutex<StoreMark>>);

impl Durable {
    pub(crate) fn now(&self) -> StoreMark {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, vote_term: u64, (last_term, last_index): (u64, u64)) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = StoreMark {
            vote_term,
            last_term,
            last_index,
            ..StoreMark::default()
        };
    }
}

/// Why a store does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another program has it open.
    #[error("{} is in use by another program; stop that one first", folder.display())]
    Locked {
        /// The store's folder.
        folder: PathBuf,
    },
    /// It belongs to another member, cluster or epoch.
    #[error("{} is of another manager, cluster or epoch than the key file beside it; put back what belongs together", file.display())]
    Foreign {
        /// The file that says so.
        file: PathBuf,
    },
    /// It was sealed under another key.
    #[error("{} was sealed under another data key; put back the key file that belongs to it", file.display())]
    Key {
        /// The file that does not open.
        file: PathBuf,
    },
    /// Its format is of another version.
    #[error("{} has a format that this program does not know; start the version that wrote it", file.display())]
    Format {
        /// The file.
        file: PathBuf,
    },
    /// Something that was acknowledged is not there as it was written.
    #[error(
        "the store is damaged: {} at byte {offset}: {what}",
        file.display()
    )]
    Damaged {
        /// The damaged file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// It was made before, and is not there.
    #[error("the store {} is gone, and with it what this manager acknowledged", folder.display())]
    Missing {
        /// The store's folder.
        folder: PathBuf,
    },
    /// The disk refused.
    #[error("{} cannot be used; check the disk and the folder's owner", file.display())]
    Io {
        /// The file or folder.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl OpenError {
    fn io(file: &Path, source: io::Error) -> Self {
        OpenError::Io {
            file: file.to_owned(),
            source,
        }
    }

    fn damaged(file: &Path, offset: u64, what: impl Into<String>) -> Self {
        OpenError::Damaged {
            file: file.to_owned(),
            offset,
            what: what.into(),
        }
    }
}

/// A write failed; whether it reached the disk is unknown, so the store takes no more. Restart the program: what was
/// acknowledged is there. Inside an [`io::Error`] of the same kind, so that a full disk can be told from a broken one.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the log could not be written to {}: nothing more is accepted until a restart", file.display())]
pub struct WriteError {
    file: PathBuf,
    kind: io::ErrorKind,
    source: Arc<io::Error>,
}

impl WriteError {
    fn new(file: PathBuf, error: &io::Error) -> Self {
        let source = match error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::new(error.kind(), error.to_string()),
        };
        Self {
            file,
            kind: error.kind(),
            source: Arc::new(source),
        }
    }

    fn io(&self) -> io::Error {
        io::Error::new(self.kind, self.clone())
    }
}

/// The log of one member. Clones share it; the last one to go ends its writer and lets go of the folder.
#[derive(Debug, Clone)]
pub struct LogStore {
    guard: Arc<Guard>,
}

impl LogStore {
    /// Opens the store in a folder, or makes an empty one. Blocks: at most a few segments are read.
    ///
    /// # Errors
    /// [`OpenError`]; nothing was changed but a store that was being made.
    pub fn open(
        fs: Arc<dyn FileSystem>,
        folder: &Path,
        sealing: Sealing,
        entropy: Arc<dyn Entropy>,
        options: Options,
    ) -> Result<(Self, Recovered), OpenError> {
        let (disk, view, recovered) = recovery::open(&fs, folder, sealing, entropy, &options)?;
        let guard = Guard::start(disk, view, &options).map_err(|source| OpenError::io(folder, source))?;
        let guard = Arc::new(guard);
        Ok((Self { guard }, recovered))
    }

    /// Writes under the present data key from now on, header included, in a segment of its own; its number. Blocks for a
    /// few flushes.
    ///
    /// # Errors
    /// A write failed: nothing more is accepted.
    pub fn begin_anew(&self) -> io::Result<u64> {
        self.shared().begin_anew()
    }

    /// Makes durable what waits for company, and says which segment is the oldest in use.
    ///
    /// # Errors
    /// A write failed: nothing more is accepted.
    pub async fn oldest(&self) -> io::Result<u64> {
        self.shared().change(|_| Ok(())).await?;
        Ok(self.shared().oldest())
    }

    /// Removes every file of the log that is older than this segment, those that wait for their next use too; whether there
    /// was one. Call it once [`LogStore::oldest`] is no older. Blocks.
    ///
    /// # Errors
    /// The disk's own.
    pub fn remove_older(&self, first: u64) -> io::Result<bool> {
        self.shared().remove_older(first)
    }

    /// What of it is durable, from now on.
    pub(crate) fn durable(&self) -> Durable {
        self.shared().durable()
    }

    fn shared(&self) -> &Shared {
        &self.guard.shared
    }

    /// Live entries of a range, from its start; stops after about so many bytes.
    pub(crate) fn read(&self, start: u64, end: u64, bytes: usize) -> io::Result<Vec<Entry>> {
        self.shared().read(start, end, bytes)
    }

    /// The last entry that is known to be committed.
    pub(crate) fn committed(&self) -> Option<u64> {
        self.shared().now().committed.map(|id| id.index)
    }

    fn follow(&self, start: u64, end: u64) -> impl Stream<Item = io::Result<Entry>> + Send + 'static {
        let store = self.clone();
        let chunks = stream::try_unfold(start, move |at| {
            let chunk = store.read(at, end, READ_BYTES);
            async move {
                let chunk = chunk?;
                Ok::<_, io::Error>(
                    chunk
                        .last()
                        .map(|last| last.log_id.index + 1)
                        .map(|next| (chunk, next)),
                )
            }
        });
        use futures::{StreamExt as _, TryStreamExt as _};
        chunks
            .map_ok(|chunk| stream::iter(chunk.into_iter().map(Ok)))
            .try_flatten()
            .boxed()
    }
}

/// A range as [start, end).
fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + fmt::Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        self.read(start, end, usize::MAX)
    }

    /// Reads as it goes: what a restart applies again may be more than fits into memory.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + fmt::Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        self.follow(start, end)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.shared().now().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read(start, end, READ_BYTES)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let now = self.shared().now();
        Ok(LogState {
            last_purged_log_id: now.purged,
            last_log_id: now.last,
        })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = *vote;
        self.shared().change(move |queue| queue.vote(vote)).await
    }

    /// Rides in the next frame.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.shared().set_committed(committed)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let now = self.shared().now();
        Ok(match planted(Bug::TakesLogForCommitted) {
            true => now.last,
            false => now.committed,
        })
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        self.shared().room().await;
        self.shared().append(entries, callback)
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.shared()
            .change(move |queue| queue.truncate_after(last_log_id))
            .await
    }

    /// Rides in the next frame; the disk space comes back after that one.
    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.shared().purge(log_id)
    }
}
