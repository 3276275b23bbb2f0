//! A log in memory, for tests of what stands on top of a log.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::sync::{Arc, Mutex, MutexGuard};

use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};

use crate::state::State;
use crate::state_machine::{SnapshotMeta, Snapshots};
use crate::{Entry, LogId, TypeConfig, Vote};

#[derive(Debug, Default)]
struct Log {
    entries: BTreeMap<u64, Entry>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    snapshot: Option<(SnapshotMeta, State)>,
}

/// Clones share it, so that a replica can start again on what the last one left.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryStore(Arc<Mutex<Log>>);

impl MemoryStore {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().expect("no test panics while it holds it")
    }

    pub(crate) fn purged(&self) -> Option<u64> {
        self.log().purged.map(|id| id.index)
    }
}

impl Snapshots for MemoryStore {
    fn save(&self, meta: &SnapshotMeta, state: &State) -> io::Result<u64> {
        self.log().snapshot = Some((meta.clone(), state.clone()));
        Ok(0)
    }

    fn load(&self) -> io::Result<Option<(SnapshotMeta, State, u64)>> {
        let snapshot = self.log().snapshot.clone();
        Ok(snapshot.map(|(meta, state)| (meta, state, 0)))
    }
}

impl RaftLogReader<TypeConfig> for MemoryStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, io::Error> {
        Ok(self
            .log()
            .entries
            .range(range)
            .map(|(_, entry)| entry.clone())
            .collect())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.log().vote)
    }
}

impl RaftLogStorage<TypeConfig> for MemoryStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let log = self.log();
        let last = log.entries.last_key_value().map(|(_, entry)| entry.log_id);
        Ok(LogState {
            last_purged_log_id: log.purged,
            last_log_id: last.or(log.purged),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.log().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.log().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.log().committed)
    }

    async fn append<I>(&mut self, entries: I, flushed: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        self.log()
            .entries
            .extend(entries.into_iter().map(|entry| (entry.log_id.index, entry)));
        flushed.io_completed(Ok(()));
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let from = last.map_or(0, |id| id.index + 1);
        self.log().entries.split_off(&from);
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let mut log = self.log();
        log.entries = log.entries.split_off(&(upto.index + 1));
        log.purged = Some(upto);
        Ok(())
    }
}
