//! Stores that no replica runs over: what one holds, and a new one that begins with a state.
//!
//! When a quorum is lost for good, or all managers are, nobody can commit anything any more. What comes after is a store
//! of a higher cluster epoch that begins with a state as if it had always been its snapshot: one voter, nothing before
//! it. Nothing here decides what that state is. Calls block.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use openraft::EntryPayload;

use crate::encryption::Sealing;
use crate::file_system::FileSystem;
use crate::log_store::{LogStore, OpenError, Options, READ_BYTES};
use crate::seam::Entropy;
use crate::snapshot::SnapshotFile;
use crate::state::{FatalApply, State};
use crate::state_machine::{SnapshotMeta, Snapshots as _};
use crate::{Member, Membership, StoredMembership, log_id};

/// Where a store is, and under what it is sealed.
#[derive(Debug, Clone)]
pub struct Store {
    /// The file system.
    pub fs: Arc<dyn FileSystem>,
    /// The folder of log and snapshot.
    pub folder: PathBuf,
    /// Under which both are sealed.
    pub sealing: Sealing,
    /// For nonces.
    pub entropy: Arc<dyn Entropy>,
    /// How the log uses its disk.
    pub log: Options,
}

/// What a store holds.
#[derive(Debug, Clone)]
pub struct Held {
    /// The state after the last entry of the log.
    pub state: State,
    /// The last entry that this member knew to be committed. Those after it may have been, and acknowledged: only a
    /// leader that is gone knew.
    pub committed: Option<u64>,
}

/// Why a store is not read or made.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// The log does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The snapshot cannot be read or written.
    #[error("the snapshot cannot be read or written")]
    Snapshot(#[source] io::Error),
    /// The log cannot be read.
    #[error("the log cannot be read")]
    Log(#[source] io::Error),
    /// An entry is missing between snapshot and log.
    #[error("entry {0} is neither in the snapshot nor in the log")]
    Gap(u64),
    /// An entry of a newer program.
    #[error("an entry of the log cannot be applied")]
    Apply(#[from] FatalApply),
    /// The folder holds a log already.
    #[error("there is a log in {} already", .0.display())]
    Occupied(PathBuf),
}

impl Store {
    fn open(&self) -> Result<(LogStore, SnapshotFile, Option<u64>), OpenError> {
        let (log, recovered) = LogStore::open(
            self.fs.clone(),
            &self.folder,
            self.sealing.clone(),
            self.entropy.clone(),
            self.log.clone(),
        )?;
        let snapshot = SnapshotFile::new(
            self.fs.clone(),
            &self.folder,
            self.sealing.clone(),
            self.entropy.clone(),
        );
        Ok((log, snapshot, recovered.last.map(|id| id.index)))
    }

    /// Reads all that the store holds: the snapshot, and every entry of the log, known to be committed or not.
    ///
    /// # Errors
    /// [`OfflineError`]; the store is as it was.
    pub fn read(&self) -> Result<Held, OfflineError> {
        let (log, snapshot, _) = self.open()?;
        let snapshot = snapshot.load().map_err(OfflineError::Snapshot)?;
        let (mut next, mut state) = match snapshot {
            Some((_, state, _)) => (state.index() + 1, state),
            None => (0, State::default()),
        };
        loop {
            let entries = log.read(next, u64::MAX, READ_BYTES).map_err(OfflineError::Log)?;
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                let (index, term) = (entry.log_id.index, entry.log_id.committed_leader_id().term);
                if index != next {
                    return Err(OfflineError::Gap(next));
                }
                match entry.payload {
                    EntryPayload::Normal(command) => drop(state.apply(index, term, &command.0)?),
                    EntryPayload::Blank | EntryPayload::Membership(_) => state.skip(index),
                }
                next = index + 1;
            }
        }
        Ok(Held {
            state,
            committed: log.committed(),
        })
    }

    /// Makes a store in an empty folder that begins with a state, and whose only voter is its own member.
    ///
    /// # Errors
    /// [`OfflineError`]; what was begun stays, and nobody knows of it.
    pub fn plant(&self, state: &State, me: Member) -> Result<(), OfflineError> {
        let (_log, snapshot, last) = self.open()?;
        if last.is_some() {
            return Err(OfflineError::Occupied(self.folder.clone()));
        }
        let member = self.sealing.member;
        let membership = Membership::new(vec![BTreeSet::from([member])], BTreeMap::from([(member, me)]))
            .expect("its only voter has a node");
        // No term has passed in this epoch. That entries of the old one had higher terms is of no matter: none of them
        // is ever held against one of these.
        let last = log_id(0, state.index());
        let meta = SnapshotMeta {
            last_log_id: Some(last),
            last_membership: StoredMembership::new(Some(last), membership),
        };
        snapshot.save(&meta, state).map_err(OfflineError::Snapshot)?;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
