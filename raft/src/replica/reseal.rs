//! What a replica does so that nothing stays on its disk that a former data key opens: what goes on is written elsewhere,
//! a snapshot covers what stands in the old place, and that is purged.

use std::io;
use std::sync::PoisonError;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::Fatal as RaftFatal;
use tokio::time::sleep;

use super::{Fatal, Replica, fatal};
use crate::TypeConfig;
use crate::log_store::LogStore;

/// Consensus makes snapshots and purges when it finds the time; it is asked again this often.
const AGAIN: Duration = Duration::from_millis(200);

/// Why the store was not sealed anew.
#[derive(Debug, thiserror::Error)]
pub enum ResealError {
    /// The replica stops, or its log is not on disk.
    #[error("the replica has no log on disk any more")]
    NoStore,
    /// The disk refused.
    #[error("the log or the snapshot could not be written")]
    Io(#[from] io::Error),
    /// Consensus stopped.
    #[error("the replica stopped")]
    Stopped(#[from] Fatal),
}

impl From<RaftFatal<TypeConfig>> for ResealError {
    fn from(error: RaftFatal<TypeConfig>) -> Self {
        ResealError::Stopped(fatal(&error))
    }
}

impl Replica {
    /// Call it after the store's data keys were renewed. When it returns, the former key opens nothing on disk any more,
    /// and no entry or snapshot from before the call is left. It waits until what the log holds now is committed, so for a
    /// quorum; bound it, and call it again: each step may be done twice.
    ///
    /// # Errors
    /// [`ResealError`]; the former key may still be needed then.
    pub async fn reseal(&self) -> Result<(), ResealError> {
        let store = self.store()?;
        let keeper = &self.0.keeper;
        let writer = store.clone();
        let first = keeper.blocking().run(move || writer.begin_anew()).await?;
        keeper.reseal().await?;
        let last = self.members().last_log.unwrap_or(0);
        self.wait_applied(last).await;
        loop {
            let (covered, purged) = self.kept();
            if covered < last {
                keeper.want();
                self.0.raft.trigger().snapshot().await?;
            } else if purged < last {
                self.0.raft.trigger().purge_log(last).await?;
            } else if self.store()?.oldest().await? >= first {
                // What is out of use waits as a spare, with its old content.
                let store = self.store()?;
                if !keeper.blocking().run(move || store.remove_older(first)).await? {
                    return Ok(());
                }
            }
            sleep(AGAIN).await;
        }
    }

    /// The last entry that a snapshot covers, and the last one that was purged.
    fn kept(&self) -> (u64, u64) {
        let metrics = self.0.raft.metrics();
        let metrics = metrics.borrow_watched();
        let index = |id: Option<crate::LogId>| id.map_or(0, |id| id.index);
        (index(metrics.snapshot), index(metrics.purged))
    }

    fn store(&self) -> Result<LogStore, ResealError> {
        let store = self.0.store.lock().unwrap_or_else(PoisonError::into_inner);
        store.clone().ok_or(ResealError::NoStore)
    }
}
