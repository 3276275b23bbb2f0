//! What a replica is made of, and how fast it is.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::limits;
use openraft::errors::Fatal as RaftFatal;
use openraft::{Config, SnapshotPolicy};

use crate::TypeConfig;
use crate::encryption::Sealing;
use crate::file_system::FileSystem;
use crate::log_store::{LogStore, OpenError, Options, Recovered};
use crate::runtime::Blocking;
use crate::seam::{Entropy, EntropyError};
use crate::snapshot::SnapshotFile;
use crate::state_machine::Snapshots;
use crate::transport::Witness;

/// How fast replicas notice and decide.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Random election timeout, in milliseconds.
    pub election_ms: Range<u64>,
    /// A leader's sign of life.
    pub heartbeat: Duration,
    /// After this many entries a snapshot is considered; it is made once it is worth its size.
    pub snapshot_every: u64,
    /// Entries kept below a snapshot. openraft panics where a purge overtakes an apply that is already queued
    /// (openraft#2116); a queue never holds as many entries as this, so purge stays behind it. It also lets a
    /// follower that was away shortly catch up by entries.
    pub keep: u64,
    /// A snapshot must be sent and installed within this time.
    pub snapshot_wait: Duration,
    /// Events kept for watches that resume. Four times the most that one transaction can make would always hold some;
    /// a watch that fell further behind lists again.
    pub events: usize,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            election_ms: limits::ELECTION_MS,
            heartbeat: limits::HEARTBEAT,
            snapshot_every: 5_000,
            keep: 10_000,
            snapshot_wait: Duration::from_secs(60),
            events: 4 * limits::CHANGES,
        }
    }
}

impl Timing {
    pub(super) fn config(&self) -> Result<Config, StartError> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let config = Config {
            cluster_name: "bulkhead".to_owned(),
            election_timeout_min: self.election_ms.start,
            election_timeout_max: self.election_ms.end,
            heartbeat_interval: millis(self.heartbeat),
            install_snapshot_timeout: millis(self.snapshot_wait),
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_every),
            max_in_snapshot_log_to_keep: self.keep,
            // Beyond this many entries a snapshot is sent instead: never less than what one snapshot can be behind.
            replication_lag_threshold: self.keep.max(self.snapshot_every * 2),
            // A message is bounded by the reader's 1 MiB; this bounds the entries of very small ones.
            max_payload_entries: 512,
            api_channel_size: Some(4_096),
            enable_pre_vote: Some(true),
            enable_leader_restore: Some(false),
            allow_log_reversion: Some(false),
            quorum_loss_probe_interval: Some(self.election_ms.end * 2),
            backoff: "50ms 100ms ...500ms".to_owned(),
            ..Config::default()
        };
        config
            .validate()
            .map_err(|error| StartError::Timing(error.to_string()))
    }
}

/// A disk that is watched for free space.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The file system.
    pub fs: Arc<dyn FileSystem>,
    /// A folder on it.
    pub folder: PathBuf,
}

impl Disk {
    pub(super) fn has_room(&self) -> bool {
        // A disk that cannot be asked is treated as one with room: the log itself will say.
        self.fs
            .free_bytes(&self.folder)
            .map_or(true, |free| free >= limits::DISK_RESERVE_BYTES)
    }
}

/// What a replica is made of, whatever its log.
#[derive(Debug)]
pub struct Core<L, N> {
    /// Raft member id; never reused.
    pub member: u64,
    /// The log.
    pub log: L,
    /// The snapshot file.
    pub snapshots: Arc<dyn Snapshots>,
    /// How the other members are reached.
    pub network: N,
    /// The disk under log and snapshot.
    pub disk: Disk,
    /// Seeds election timeouts.
    pub seed: u64,
    /// How fast replicas notice.
    pub timing: Timing,
    /// Where snapshots are written.
    pub blocking: Blocking,
}

/// What a replica on disk is made of.
#[derive(Debug)]
pub struct Parts<N> {
    /// Raft member id; never reused.
    pub member: u64,
    /// The file system.
    pub fs: Arc<dyn FileSystem>,
    /// The folder of log and snapshot.
    pub folder: PathBuf,
    /// Under which both are sealed.
    pub sealing: Sealing,
    /// For nonces, and the seed of election timeouts.
    pub entropy: Arc<dyn Entropy>,
    /// How the other members are reached.
    pub network: N,
    /// How fast replicas notice.
    pub timing: Timing,
    /// How the log uses its disk.
    pub log: Options,
    /// Where snapshots are written.
    pub blocking: Blocking,
    /// What is remembered of the members' stores: the one that the network tells of, too.
    pub witness: Witness,
}

impl<N> Parts<N> {
    pub(super) async fn open(self) -> Result<(Core<LogStore, N>, Recovered), StartError> {
        let mut seed = [0; 8];
        self.entropy.fill(&mut seed)?;
        let disk = Disk {
            fs: self.fs.clone(),
            folder: self.folder.clone(),
        };
        let snapshots = SnapshotFile::new(
            self.fs.clone(),
            &self.folder,
            self.sealing.clone(),
            self.entropy.clone(),
        );
        let (fs, folder, sealing, entropy) = (self.fs, self.folder, self.sealing, self.entropy);
        let options = self.log;
        let opened = self
            .blocking
            .run(move || Ok(LogStore::open(fs, &folder, sealing, entropy, options)));
        let (log, recovered) = opened.await.map_err(StartError::Thread)??;
        self.witness.opened(self.member, log.durable());
        let core = Core {
            member: self.member,
            log,
            snapshots: Arc::new(snapshots),
            network: self.network,
            disk,
            seed: u64::from_le_bytes(seed),
            timing: self.timing,
            blocking: self.blocking,
        };
        Ok((core, recovered))
    }
}

/// Why a replica does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The log does not open.
    #[error(transparent)]
    Log(#[from] OpenError),
    /// No random bytes.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// The thread that opened the log died.
    #[error("the log was not opened")]
    Thread(#[source] io::Error),
    /// The snapshot does not load.
    #[error("the snapshot cannot be read")]
    Snapshot(#[source] io::Error),
    /// The snapshot is missing, or older than the log goes back.
    #[error("the store is damaged: the log begins after entry {purged}, and no snapshot goes so far")]
    NoSnapshot {
        /// The last entry that the log does not hold any more.
        purged: u64,
    },
    /// The timing contradicts itself.
    #[error("the election timing is not usable: {0}")]
    Timing(String),
    /// The log or the state does not load.
    #[error("the replica cannot start: {0}")]
    Raft(RaftFatal<TypeConfig>),
}

impl StartError {
    /// Whether the store is gone or damaged: what this member acknowledged is not all there any more, so that it must
    /// neither vote nor acknowledge again.
    pub fn is_loss(&self) -> bool {
        match self {
            StartError::Log(OpenError::Damaged { .. } | OpenError::Missing { .. })
            | StartError::NoSnapshot { .. } => true,
            StartError::Snapshot(error) => error.kind() == io::ErrorKind::InvalidData,
            StartError::Log(
                OpenError::Locked { .. }
                | OpenError::Foreign { .. }
                | OpenError::Key { .. }
                | OpenError::Format { .. }
                | OpenError::Io { .. },
            )
            | StartError::Entropy(_)
            | StartError::Thread(_)
            | StartError::Timing(_)
            | StartError::Raft(_) => false,
        }
    }
}
