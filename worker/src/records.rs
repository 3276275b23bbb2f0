//! What this worker remembers across its own restarts: each task's last seen state, and how far the managers were.
//!
//! It may be lost and rebuilt, so it lives in sled: without it a returning worker learns the same from the launcher's
//! list and the managers' assignments.

use crate::agent::Seen;
use crate::task::Observed;
use bulkhead_proto::TaskId;
use std::collections::BTreeMap;
use std::path::Path;

const SEEN: &[u8] = b"seen";
const CACHE_BYTES: u64 = 4 << 20; // the least that serves: a node's records are a few kilobytes

/// The store failed. The worker ends and is started again.
#[derive(Debug, thiserror::Error)]
#[error("the worker's task records")]
pub struct RecordError(#[from] sled::Error);

/// Task records on disk.
#[derive(Debug)]
pub struct Records {
    tasks: sled::Tree,
    node: sled::Tree,
}

impl Records {
    /// Opens or makes the records. Damaged ones are deleted: see above.
    pub fn open(folder: &Path) -> Result<Self, RecordError> {
        let config = sled::Config::new().path(folder).cache_capacity(CACHE_BYTES);
        let database = match config.open() {
            Err(sled::Error::Corruption { .. }) => {
                tracing::warn!("the task records are damaged and begin anew");
                std::fs::remove_dir_all(folder).map_err(sled::Error::Io)?;
                config.open()?
            }
            opened => opened?,
        };
        Ok(Records {
            tasks: database.open_tree("tasks")?,
            node: database.open_tree("node")?,
        })
    }

    /// All tasks. An entry of another version's form is passed over.
    pub fn tasks(&self) -> Result<BTreeMap<TaskId, Observed>, RecordError> {
        let mut found = BTreeMap::new();
        for entry in &self.tasks {
            let (key, value) = entry?;
            if let (Ok(task), Ok(seen)) = (TaskId::try_from(key.as_ref()), serde_json::from_slice(&value)) {
                found.insert(task, seen);
            }
        }
        Ok(found)
    }

    /// Remembers a task's state; a crash may forget it before [`Records::flush`].
    pub fn put(&self, task: TaskId, seen: &Observed) -> Result<(), RecordError> {
        self.tasks.insert(task.as_bytes(), encode(seen))?;
        Ok(())
    }

    /// Hands everything to the kernel, so that a crash of the worker keeps it.
    pub fn flush(&self) -> Result<(), RecordError> {
        self.tasks.flush()?;
        Ok(())
    }

    /// Forgets a task.
    pub fn remove(&self, task: TaskId) -> Result<(), RecordError> {
        self.tasks.remove(task.as_bytes())?;
        Ok(())
    }

    /// How far the managers were.
    pub fn seen(&self) -> Result<Seen, RecordError> {
        let bytes = self.node.get(SEEN)?;
        Ok(bytes
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default())
    }

    /// Remembers how far the managers were, as [`Records::put`].
    pub fn set_seen(&self, seen: Seen) -> Result<(), RecordError> {
        self.node.insert(SEEN, encode(&seen))?;
        Ok(())
    }
}

fn encode<T: serde::Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain structs of numbers and texts have a JSON form")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_there_after_a_restart() {
        let folder = tempfile::tempdir().expect("folder");
        let (one, two) = (TaskId::from_bytes([1; 16]), TaskId::from_bytes([2; 16]));
        let seen = Seen { epoch: 2, index: 9 };
        let records = Records::open(folder.path()).expect("open");
        assert_eq!(records.seen().expect("seen"), Seen::default());
        records.put(one, &Observed::assigned(5)).expect("put");
        records.put(two, &Observed::assigned(6)).expect("put");
        records.remove(two).expect("remove");
        records.set_seen(seen).expect("set");
        records.flush().expect("flush");
        drop(records);
        let records = Records::open(folder.path()).expect("open again");
        assert_eq!(
            records.tasks().expect("tasks"),
            BTreeMap::from([(one, Observed::assigned(5))])
        );
        assert_eq!(records.seen().expect("seen"), seen);
    }

    #[test]
    fn an_entry_of_another_form_is_passed_over() {
        let folder = tempfile::tempdir().expect("folder");
        let records = Records::open(folder.path()).expect("open");
        records.tasks.insert([1; 16], b"{}").expect("an old form");
        records.tasks.insert(b"short", b"{}").expect("no id");
        assert!(records.tasks().expect("tasks").is_empty());
    }
}
