use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_identity::Unswapped;
use bytes::Bytes;
use openraft::EntryPayload;
use openraft::RaftLogReader as _;
use openraft::impls::leader_id_std::LeaderId;
use openraft::storage::{IOFlushed, RaftLogStorage as _};
use openraft::type_config::TypeConfigExt as _;

use super::*;
use crate::encryption::{DataKey, KEY_BYTES};
use crate::file_system::{FileSystem, SimFileSystem};
use crate::seam::{Entropy, EntropyError};
use crate::type_config::{Command, log_id};

mod model;
mod suite;

/// Bytes that never repeat, for tests: what a nonce needs.
#[derive(Debug, Default)]
pub(crate) struct Counting(std::sync::atomic::AtomicU64);

impl Entropy for Counting {
    fn fill(&self, buffer: &mut [u8]) -> Result<(), EntropyError> {
        for chunk in buffer.chunks_mut(8) {
            let number = self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            chunk.copy_from_slice(&number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

pub(crate) fn sealing() -> Sealing {
    Sealing {
        keys: Arc::new(DataKey::new(Unswapped::new([1; KEY_BYTES])).into()),
        store: [2; 16],
        cluster_epoch: 3,
        member: 4,
    }
}

pub(crate) fn folder() -> PathBuf {
    PathBuf::from("/raft")
}

pub(super) fn options() -> Options {
    Options {
        segment_bytes: 5 * 4096,
        cache_bytes: 4096,
        flushing: Flushing::Inline,
        made: false,
    }
}

pub(super) fn open_with(fs: &SimFileSystem, sealing: Sealing) -> Result<LogStore, OpenError> {
    LogStore::open(
        Arc::new(fs.clone()),
        &folder(),
        sealing,
        Arc::new(Counting::default()),
        options(),
    )
    .map(|(store, _)| store)
}

pub(super) fn open(fs: &SimFileSystem) -> LogStore {
    open_with(fs, sealing()).expect("a store that opens")
}

pub(super) fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    let content = vec![u8::try_from(index % 251).expect("below 251"); bytes];
    Entry {
        log_id: log_id(term, index),
        payload: EntryPayload::Normal(Command(Bytes::from(content))),
    }
}

pub(super) fn vote(term: u64) -> Vote {
    Vote {
        leader_id: LeaderId { term, voted_for: 4 },
        committed: false,
    }
}

/// Appends and waits for the flush.
pub(super) async fn append(store: &mut LogStore, entries: Vec<Entry>) -> io::Result<()> {
    let (sender, flushed) = TypeConfig::oneshot();
    store.append(entries, IOFlushed::signal(sender)).await?;
    flushed.await.expect("each append is answered")
}

pub(super) async fn all(store: &mut LogStore) -> Vec<Entry> {
    store.try_get_log_entries(..).await.expect("a readable log")
}

fn names(fs: &SimFileSystem) -> Vec<String> {
    fs.list(&folder()).expect("the folder")
}

#[tokio::test]
async fn a_store_that_was_made_before_is_never_made_again() {
    let fs = SimFileSystem::new();
    let again = || {
        let options = Options {
            made: true,
            ..options()
        };
        let entropy = Arc::new(Counting::default());
        LogStore::open(Arc::new(fs.clone()), &folder(), sealing(), entropy, options).map(drop)
    };
    let missing = again().expect_err("nothing is there");
    assert!(matches!(missing, OpenError::Missing { .. }), "{missing}");
    drop(open(&fs));
    again().expect("it is there");
    for name in names(&fs) {
        fs.unlink(&folder().join(name)).expect("removed");
    }
    let missing = again().expect_err("it was wiped");
    assert!(matches!(missing, OpenError::Missing { .. }), "{missing}");
    assert!(names(&fs).is_empty(), "nothing is made in its place");
}

#[tokio::test]
async fn what_was_flushed_is_there_after_a_loss_of_power() {
    let fs = SimFileSystem::new();
    let mut store = open(&fs);
    store.save_vote(&vote(7)).await.expect("a vote");
    let entries: Vec<Entry> = (1..=20).map(|index| entry(7, index, 700)).collect();
    for chunk in entries.chunks(3) {
        append(&mut store, chunk.to_vec()).await.expect("an append");
    }
    store
        .save_committed(Some(log_id(7, 19)))
        .await
        .expect("rides along");
    append(&mut store, vec![entry(7, 21, 10)])
        .await
        .expect("an append");
    assert_eq!(all(&mut store).await.len(), 21);
    fs.crash(&mut |_| 0); // nothing that was not synced stays
    let mut store = open(&fs);
    assert_eq!(store.read_vote().await.expect("a vote"), Some(vote(7)));
    assert_eq!(store.read_committed().await.expect("an id"), Some(log_id(7, 19)));
    let mut expected = entries;
    expected.push(entry(7, 21, 10));
    assert_eq!(all(&mut store).await, expected);
}

#[tokio::test]
async fn purged_segments_are_used_again_and_their_old_frames_are_not_read() {
    let fs = SimFileSystem::new();
    let mut store = open(&fs);
    for index in 1..=200 {
        append(&mut store, vec![entry(1, index, 100)])
            .await
            .expect("an append");
        if index % 5 == 0 {
            store.purge(log_id(1, index - 2)).await.expect("a purge");
        }
        assert!(names(&fs).len() <= 7, "{:?}", names(&fs));
    }
    append(&mut store, vec![entry(1, 201, 100)])
        .await
        .expect("carries the last purge");
    drop(store);
    let mut store = open(&fs);
    let found: Vec<u64> = all(&mut store)
        .await
        .iter()
        .map(|entry| entry.log_id.index)
        .collect();
    assert_eq!(found, [199, 200, 201]);
    let state = store.get_log_state().await.expect("a state");
    assert_eq!(state.last_purged_log_id, Some(log_id(1, 198)));
}

#[tokio::test]
async fn a_folder_of_somebody_else_is_refused() {
    let fs = SimFileSystem::new();
    let store = open(&fs);
    assert!(matches!(open_with(&fs, sealing()), Err(OpenError::Locked { .. })));
    drop(store);
    let others = [
        Sealing {
            store: [9; 16],
            ..sealing()
        },
        Sealing {
            cluster_epoch: 9,
            ..sealing()
        },
        Sealing {
            member: 9,
            ..sealing()
        },
    ];
    for other in others {
        let refused = open_with(&fs, other).expect_err("not ours");
        assert!(matches!(refused, OpenError::Foreign { .. }), "{refused}");
    }
    let keys = Arc::new(DataKey::new(Unswapped::new([9; KEY_BYTES])).into());
    let refused = open_with(&fs, Sealing { keys, ..sealing() }).expect_err("another key");
    assert!(matches!(refused, OpenError::Key { .. }), "{refused}");
    open(&fs);
}

#[tokio::test]
async fn a_spare_that_is_gone_is_no_failure() {
    let fs = SimFileSystem::new();
    fs.create_directory(&folder()).expect("a folder");
    let mut store = open(&fs);
    let mut removed = 0;
    for index in 1..30 {
        append(&mut store, vec![entry(1, index, 4_000)])
            .await
            .expect("a spare is no part of the log");
        for name in names(&fs).iter().filter(|name| name.starts_with("spare-")) {
            fs.unlink(&folder().join(name)).expect("it is there");
            removed += 1;
        }
    }
    assert!(removed > 2, "{removed} spares");
    assert_eq!(all(&mut store).await.len(), 29);
}
