use std::collections::{BTreeMap, BTreeSet};

use bulkhead_proto::NodeId;
use bulkhead_proto::wire::{Change, Object, Secret, Transaction, change, object};
use prost::Message as _;

use super::*;
use crate::file_system::tests::EveryChoice;
use crate::file_system::{Fault, SimFileSystem, read_file};
use crate::log_store::tests::{Counting, folder, sealing};
use crate::type_config::{Member, Membership, log_id};

fn state(secrets: u8) -> State {
    let mut state = State::default();
    for n in 1..=secrets {
        let secret = Secret {
            id: vec![n; 16],
            name: format!("secret-{n}"),
            ..Default::default()
        };
        let create = change::Change::Create(Object {
            object: Some(object::Object::Secret(secret)),
        });
        let transaction = Transaction {
            level: 1,
            request_id: vec![n; 16],
            changes: vec![Change { change: Some(create) }],
            ..Default::default()
        };
        let applied = state.apply(u64::from(n), 1, &transaction.encode_to_vec());
        assert_eq!(applied.expect("a known level").outcome.rejection, None);
    }
    state
}

fn meta(index: u64) -> SnapshotMeta {
    let member = Member {
        node: NodeId::from_bytes([7; 16]),
        address: "127.0.0.1:7443".to_owned(),
    };
    let voters = vec![BTreeSet::from([1])];
    let membership = Membership::new(voters, BTreeMap::from([(1, member)])).expect("valid");
    SnapshotMeta {
        last_log_id: Some(log_id(1, index)),
        last_membership: StoredMembership::new(Some(log_id(1, 1)), membership),
    }
}

fn disk() -> SimFileSystem {
    let fs = SimFileSystem::new();
    fs.create_directory(&folder()).expect("a folder");
    fs
}

fn on(fs: &SimFileSystem) -> SnapshotFile {
    SnapshotFile::new(
        Arc::new(fs.clone()),
        &folder(),
        sealing(),
        Arc::new(Counting::default()),
    )
}

/// The index and the state's digest of what is there.
fn found(fs: &SimFileSystem) -> Option<(SnapshotMeta, [u8; 32])> {
    let found = on(fs).load().expect("a readable snapshot");
    found.map(|(meta, state, _)| (meta, state.digest()))
}

#[test]
fn a_snapshot_loads_as_it_was_saved_and_the_newest_counts() {
    let fs = disk();
    assert_eq!(found(&fs), None);
    on(&fs).save(&meta(3), &state(3)).expect("the first");
    let bytes = on(&fs).save(&meta(5), &state(5)).expect("the second");
    let file = fs.open(&folder().join(NAME), OpenMode::Read).expect("a file");
    assert_eq!(bytes, file.len().expect("its length"));
    assert_eq!(found(&fs), Some((meta(5), state(5).digest())));
    assert_eq!(fs.list(&folder()).expect("names"), [NAME]);
}

#[test]
fn every_crash_and_every_failure_leaves_the_old_snapshot_or_the_new() {
    let (mut olds, mut news) = (0, 0);
    for changes in 0.. {
        let fs = disk();
        on(&fs).save(&meta(3), &state(3)).expect("the first");
        fs.set_fault_after(changes, Fault::Full);
        let saved = on(&fs).save(&meta(5), &state(5)).is_ok();
        let mut choices = EveryChoice::default();
        loop {
            let fs = fs.fork();
            fs.crash(&mut |below| choices.pick(below));
            let (covers, digest) = found(&fs).expect("one of both");
            let new = covers.last_log_id == Some(log_id(1, 5));
            assert_eq!(digest, state(if new { 5 } else { 3 }).digest());
            assert!(new || !saved, "what was saved is lost");
            *if new { &mut news } else { &mut olds } += 1;
            on(&fs)
                .save(&meta(7), &state(7))
                .expect("what a crash left is no hindrance");
            assert_eq!(found(&fs), Some((meta(7), state(7).digest())));
            if !choices.advance() {
                break;
            }
        }
        if saved && changes > 8 {
            break;
        }
    }
    assert!(olds > 10 && news > 3, "{olds} old, {news} new");
}

#[test]
fn every_flipped_byte_and_every_cut_is_noticed() {
    let fs = disk();
    on(&fs).save(&meta(3), &state(3)).expect("a snapshot");
    let path = folder().join(NAME);
    let content = read_file(&fs, &path, 1 << 20).expect("a file");
    for at in 0..content.len() as u64 {
        let copy = fs.fork();
        copy.flip_bit(&path, at * 8 + at % 8).expect("a bit");
        let error = on(&copy).load().expect_err("damage");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "byte {at}");
        assert!(error.to_string().contains("the snapshot is damaged"), "{error}");
        let copy = fs.fork();
        let file = copy.open(&path, OpenMode::Write).expect("a file");
        file.set_len(at).expect("a cut");
        assert!(on(&copy).load().is_err(), "cut at {at}");
    }
}

#[test]
fn a_snapshot_of_another_store_does_not_load() {
    let fs = disk();
    on(&fs).save(&meta(3), &state(3)).expect("a snapshot");
    let other = Sealing {
        member: 99,
        ..sealing()
    };
    let other = SnapshotFile::new(Arc::new(fs), &folder(), other, Arc::new(Counting::default()));
    assert!(other.load().is_err());
}
