//! The log as a model, and every way in which a disk may lose power under the real one.
//!
//! After a crash the store opens and is as the model was after some change: none before the last one that was
//! acknowledged, none after the last one that was asked for.

use std::collections::BTreeMap;

use futures::executor::block_on;
use proptest::prelude::*;

use super::*;
use crate::encryption::DataKeys;
use crate::file_system::{Fault, seeded_chooser};

/// What a test does to a log.
#[derive(Debug, Clone, Copy)]
enum Step {
    Vote(u64),
    Append {
        count: u64,
        bytes: usize,
    },
    /// Cuts so many of the newest entries.
    Truncate(u64),
    /// Purges all but so many of the newest entries. Not acknowledged by itself.
    Purge(u64),
    /// All but so many of the newest entries are committed. Not acknowledged by itself.
    Commit(u64),
    /// Takes another data key, and begins a segment under it.
    Rekey,
    /// Forgets the data key of before, once the segments that it sealed are gone.
    Forget,
    /// Closes the store and opens it again. What was not acknowledged may be gone.
    Reopen,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    last: Option<LogId>,
    entries: BTreeMap<u64, Entry>,
    term: u64,
}

impl Model {
    fn last_index(&self) -> u64 {
        self.last.map_or(0, |last| last.index)
    }

    fn floor(&self) -> u64 {
        self.purged.map_or(0, |purged| purged.index)
    }

    fn id(&self, index: u64) -> Option<LogId> {
        self.entries.get(&index).map(|entry| entry.log_id)
    }

    /// What is on disk of it. The term is the test's own.
    fn on_disk(&self) -> Self {
        Self {
            term: 0,
            ..self.clone()
        }
    }
}

/// A store, the model beside it, and all that the model was at each acknowledgement.
struct Run {
    fs: SimFileSystem,
    store: Option<LogStore>,
    model: Model,
    /// What the store may be found as, oldest first: the last one acknowledged, then what was asked for since.
    possible: Vec<Model>,
    keys: Keys,
}

/// What the key file beside the store says, which is written before a key is used and after one is not needed.
#[derive(Debug, Clone)]
struct Keys {
    present: u8,
    former: Option<u8>,
    /// The first segment that the former key did not seal.
    anew: u64,
    live: Arc<DataKeys>,
}

fn data_key(byte: u8) -> DataKey {
    DataKey::new(Unswapped::new([byte; KEY_BYTES]))
}

impl Keys {
    fn first() -> Self {
        Self {
            present: 1,
            former: None,
            anew: 0,
            live: Arc::new(data_key(1).into()),
        }
    }

    /// As a program that starts reads them.
    fn read(&mut self) -> Sealing {
        self.live = Arc::new(DataKeys::new(data_key(self.present), self.former.map(data_key)));
        Sealing {
            keys: self.live.clone(),
            ..sealing()
        }
    }

    fn renew(&mut self) {
        if self.former.is_none() {
            self.former = Some(self.present);
            self.present += 1;
            assert!(self.live.renew(data_key(self.present)));
        }
    }
}

impl Run {
    fn start(fs: SimFileSystem) -> Self {
        let mut keys = Keys::first();
        Self {
            store: try_open(&fs, &mut keys).ok(),
            keys,
            fs,
            model: Model::default(),
            possible: vec![Model::default()],
        }
    }

    /// Does one step; false once the disk refused.
    fn step(&mut self, step: Step) -> bool {
        let Some(store) = &mut self.store else {
            return false;
        };
        let model = &mut self.model;
        let done = match step {
            Step::Vote(more) => {
                model.term += more;
                model.vote = Some(vote(model.term));
                Some(block_on(store.save_vote(&vote(model.term))))
            }
            Step::Append { count, bytes } => {
                let first = model.last_index() + 1;
                let entries: Vec<Entry> = (first..first + count)
                    .map(|index| entry(model.term, index, bytes))
                    .collect();
                for entry in &entries {
                    model.entries.insert(entry.log_id.index, entry.clone());
                    model.last = Some(entry.log_id);
                }
                Some(block_on(append(store, entries)))
            }
            Step::Truncate(count) => {
                let kept = model.last_index().saturating_sub(count).max(model.floor());
                if kept == model.last_index() {
                    return true;
                }
                model.last = model.id(kept).or(model.purged);
                model.entries.retain(|index, _| *index <= kept);
                Some(block_on(store.truncate_after(model.last)))
            }
            Step::Purge(left) => {
                let upto = model.id(model.last_index().saturating_sub(left));
                let Some(upto) = upto else { return true };
                model.purged = Some(upto);
                model.entries.retain(|index, _| *index > upto.index);
                block_on(store.purge(upto)).err().map(Err)
            }
            Step::Commit(left) => {
                let upto = model.id(model.last_index().saturating_sub(left));
                let Some(upto) = upto else { return true };
                model.committed = Some(upto);
                block_on(store.save_committed(Some(upto))).err().map(Err)
            }
            Step::Rekey => {
                self.keys.renew();
                match store.begin_anew() {
                    Ok(first) => {
                        self.keys.anew = first;
                        None
                    }
                    Err(error) => Some(Err(error)),
                }
            }
            Step::Forget => match block_on(store.oldest()) {
                Ok(oldest) if oldest >= self.keys.anew => {
                    while let Ok(true) = store.remove_older(self.keys.anew) {}
                    self.keys.former = None;
                    self.keys.live.forget_former();
                    Some(Ok(()))
                }
                done => Some(done.map(drop)),
            },
            Step::Reopen => {
                self.store = None;
                self.store = try_open(&self.fs, &mut self.keys).ok();
                if let Some(store) = &mut self.store {
                    let term = model.term;
                    *model = found(store);
                    assert!(self.possible.contains(model), "after opening again: {model:?}");
                    self.possible = vec![model.clone()];
                    model.term = term;
                }
                None
            }
        };
        match done {
            None => self.store.is_some(),
            Some(Ok(())) => {
                self.possible = vec![self.model.on_disk()];
                true
            }
            Some(Err(_)) => {
                self.possible.push(self.model.on_disk());
                false
            }
        }
    }

    /// Loses power and looks at what is left.
    fn crash(&self, fs: &SimFileSystem, choose: &mut dyn FnMut(usize) -> usize) -> LogStore {
        fs.crash(choose);
        let mut store = match try_open(fs, &mut self.keys.clone()) {
            Ok(store) => store,
            Err(error) => panic!("a crash is no damage: {error}"),
        };
        let found = found(&mut store);
        assert!(
            self.possible.contains(&found),
            "found {found:?}, which is none of {:?}",
            self.possible
        );
        store
    }
}

fn try_open(fs: &SimFileSystem, keys: &mut Keys) -> Result<LogStore, OpenError> {
    open_with(fs, keys.read())
}

fn found(store: &mut LogStore) -> Model {
    block_on(async {
        let state = store.get_log_state().await.expect("a state");
        Model {
            vote: store.read_vote().await.expect("a vote"),
            committed: store.read_committed().await.expect("an id"),
            purged: state.last_purged_log_id,
            last: state.last_log_id,
            entries: all(store)
                .await
                .into_iter()
                .map(|entry| (entry.log_id.index, entry))
                .collect(),
            term: 0,
        }
    })
}

/// A short life with everything in it: rotation, a recycled segment, a conflict, frames of one block and of many.
const LIFE: [Step; 15] = [
    Step::Vote(1),
    Step::Append { count: 2, bytes: 100 },
    Step::Append {
        count: 1,
        bytes: 4100,
    },
    Step::Commit(1),
    Step::Append { count: 3, bytes: 10 },
    Step::Truncate(2),
    Step::Vote(2),
    Step::Append { count: 1, bytes: 20 },
    Step::Append {
        count: 1,
        bytes: 4100,
    },
    Step::Purge(1),
    Step::Append { count: 2, bytes: 30 },
    Step::Append {
        count: 1,
        bytes: 3900,
    },
    Step::Purge(0),
    Step::Append {
        count: 1,
        bytes: 4100,
    },
    Step::Append { count: 1, bytes: 40 },
];

/// The same, under three data keys.
fn rekeyed() -> Vec<Step> {
    let mut life = LIFE.to_vec();
    for (after, step) in [(14, Step::Rekey), (13, Step::Forget), (5, Step::Rekey)] {
        life.insert(after, step);
    }
    life
}

/// Runs the life on a disk that fails after so many changes; false once the life is over before that.
fn live_until(changes: u64, fault: Fault) -> (Run, bool) {
    live(&rekeyed(), changes, fault)
}

fn live(life: &[Step], changes: u64, fault: Fault) -> (Run, bool) {
    let fs = SimFileSystem::new();
    fs.create_directory(&folder()).expect("a folder");
    fs.set_fault_after(changes, fault);
    let mut run = Run::start(fs);
    let cut = !life.iter().all(|step| run.step(*step));
    (run, cut)
}

#[test]
fn every_crash_at_every_point_of_a_life_loses_nothing_acknowledged() {
    let (mut points, mut states) = (0, 0);
    loop {
        let (mut run, cut) = live_until(points, Fault::WriteError);
        run.store = None;
        let mut choices = crate::file_system::tests::EveryChoice::default();
        loop {
            let fs = run.fs.fork();
            run.crash(&fs, &mut |below| choices.pick(below));
            states += 1;
            if !choices.advance() {
                break;
            }
        }
        points += 1;
        if !cut {
            break;
        }
    }
    assert!(points > 60 && states > 5000, "{points} points, {states} states");
}

#[test]
fn a_crash_while_a_store_opens_loses_nothing_either() {
    let mut opens = 0;
    for seed in 0..150 {
        let mut choose = seeded_chooser(seed);
        let (mut run, _) = live_until(choose(90) as u64, Fault::WriteError);
        run.store = None;
        run.fs.crash(&mut choose);
        for _ in 0..3 {
            run.fs.set_fault_after(choose(12) as u64, Fault::WriteError);
            if try_open(&run.fs, &mut run.keys).is_ok() {
                opens += 1;
            }
            run.fs.crash(&mut choose);
        }
        run.crash(&run.fs, &mut choose);
    }
    assert!(
        (50..400).contains(&opens),
        "{opens} of 450 opened before the crash"
    );
}

#[test]
fn what_a_killed_program_left_in_memory_survives_a_later_loss_of_power() {
    // The program is killed between write and flush; the next one finds the frame, and must flush what it builds on.
    let mut kept = 0;
    for changes in 0..90 {
        let (mut run, _) = live_until(changes, Fault::WriteError);
        run.store = None; // killed: the kernel keeps what was written
        run.fs.set_fault(Fault::None);
        let Ok(mut store) = try_open(&run.fs, &mut run.keys) else {
            panic!("a kill is no damage")
        };
        let before = found(&mut store);
        assert!(run.possible.contains(&before), "{before:?}");
        kept += usize::from(before != run.possible[0]);
        run.possible = vec![before];
        drop(store);
        let fs = run.fs.fork();
        run.crash(&fs, &mut |_| 0);
    }
    assert!(kept > 3, "{kept} times something unacknowledged was found whole");
}

#[test]
fn a_full_or_broken_disk_stops_the_log_and_a_restart_has_all_that_was_acknowledged() {
    for fault in [Fault::Full, Fault::WriteError] {
        let mut refusals = 0;
        for changes in 20..90 {
            let (mut run, cut) = live_until(changes, fault);
            if !cut {
                continue;
            }
            if let Some(mut store) = run.store.take() {
                refusals += 1;
                run.fs.set_fault(Fault::None); // mended, but what reached the disk is unknown: it stays refused
                let refused = block_on(append(&mut store, vec![entry(9, run.model.last_index() + 1, 1)]));
                let error = refused.expect_err("nothing is taken after a failed write");
                let inner = error.get_ref().expect("a reason");
                assert!(inner.downcast_ref::<WriteError>().is_some(), "{error}");
                assert_eq!(error.kind() == io::ErrorKind::StorageFull, fault == Fault::Full);
                assert!(block_on(store.save_vote(&vote(99))).is_err());
                assert!(block_on(store.save_committed(None)).is_err());
            }
            run.fs.set_fault(Fault::None);
            let mut store = try_open(&run.fs, &mut run.keys).expect("nothing is damaged");
            let found = found(&mut store);
            assert!(run.possible.contains(&found), "{found:?}");
        }
        assert!(refusals > 0, "{fault:?} was met by a running store");
    }
}

/// Every file of the store that a whole life left, closed cleanly.
fn lived() -> (SimFileSystem, Model) {
    let (mut run, cut) = live(&LIFE, u64::MAX, Fault::WriteError);
    assert!(!cut, "the life was lived to its end");
    run.store = None;
    let expected = run.possible.pop().expect("the last state");
    (run.fs, expected)
}

#[test]
fn a_flipped_bit_anywhere_is_noticed_or_harmless() {
    let (fs, expected) = lived();
    let (mut noticed, mut harmless) = (0, 0);
    for name in names(&fs) {
        let path = folder().join(&name);
        let content = crate::file_system::read_file(&fs, &path, 1 << 20).expect("a file");
        for (at, byte) in content.iter().enumerate() {
            // Most of what is zero was never written, or pads a frame: a sample of it will do; so of long entries.
            let sampled = at % 61 == 0 || at % 4096 < 200;
            if !(sampled && (*byte != 0 || at % 7 == 0)) {
                continue;
            }
            let copy = fs.fork();
            copy.flip_bit(&path, at as u64 * 8 + at as u64 % 8)
                .expect("a bit");
            match open_with(&copy, sealing()) {
                Err(OpenError::Io { source, .. }) => panic!("{name} at {at}: {source}"),
                Err(_) => noticed += 1,
                Ok(mut store) => {
                    assert_eq!(found(&mut store), expected, "{name} at {at}");
                    harmless += 1;
                }
            }
        }
    }
    assert!(
        noticed > 500 && harmless > 50,
        "{noticed} noticed, {harmless} harmless"
    );
}

#[test]
fn damage_names_the_place() {
    let (fs, _) = lived();
    let mut store = open(&fs);
    for _ in 0..2 {
        let next = found(&mut store).last.map_or(1, |last| last.index + 1);
        block_on(append(&mut store, vec![entry(9, next, 10)])).expect("an append");
    }
    let expected = found(&mut store);
    drop(store);
    let last = names(&fs)
        .into_iter()
        .rfind(|name| name.starts_with("log-"))
        .expect("a segment");
    let path = folder().join(&last);
    let content = crate::file_system::read_file(&fs, &path, 1 << 20).expect("a file");
    let starts: Vec<usize> = (0..content.len())
        .step_by(files::BLOCK_BYTES)
        .filter(|at| {
            frame::decode(&content[*at..])
                .is_ok_and(|frame| frame.sequence >= files::segment_of(&last).expect("its name"))
        })
        .collect();
    assert!(starts.len() >= 2, "{starts:?}");
    for at in &starts {
        let copy = fs.fork();
        copy.flip_bit(&path, (at + 60) as u64 * 8).expect("a bit");
        let text = open_with(&copy, sealing()).expect_err("damage").to_string();
        let place = format!("{} at byte {at}", path.display());
        assert!(
            text.contains(&place) && text.contains("the store is damaged"),
            "{text}"
        );
    }
    // Without the mark, a later frame still proves all but the last one.
    let copy = fs.fork();
    Mark::write(&copy, 0);
    let tail = *starts.last().expect("a frame");
    for at in &starts {
        let copy = copy.fork();
        copy.flip_bit(&path, (at + 60) as u64 * 8).expect("a bit");
        let opened = open_with(&copy, sealing());
        assert_eq!(
            opened.is_ok(),
            *at == tail,
            "the documented limit, and no more: byte {at}"
        );
    }
    // The unharmed one opens.
    assert_eq!(found(&mut open(&fs)), expected);
}

/// Sets the mark as if it had not reached the disk.
struct Mark;

impl Mark {
    fn write(fs: &SimFileSystem, sequence: u64) {
        let (mark, _) = files::Mark::open(fs, &folder(), &sealing().store).expect("a mark");
        mark.set(sequence).and_then(|()| mark.sync()).expect("a write");
    }
}

#[test]
fn missing_files_are_noticed() {
    let (fs, _) = lived();
    for name in names(&fs).iter().filter(|name| !name.starts_with("spare-")) {
        let copy = fs.fork();
        copy.unlink(&folder().join(name)).expect("a file");
        copy.sync_directory(&folder()).expect("a sync");
        let refused = open_with(&copy, sealing());
        assert!(
            matches!(refused, Err(OpenError::Damaged { .. })),
            "without {name}: {refused:?}"
        );
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (1..3_u64).prop_map(Step::Vote),
        8 => (1..5_u64, 0..6000_usize).prop_map(|(count, bytes)| Step::Append { count, bytes }),
        2 => (1..4_u64).prop_map(Step::Truncate),
        3 => (0..4_u64).prop_map(Step::Purge),
        2 => (0..3_u64).prop_map(Step::Commit),
        1 => Just(Step::Rekey),
        1 => Just(Step::Forget),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_life_agrees_with_the_model(life in steps(), end in 0..400_u64, seed in any::<u64>()) {
        let fs = SimFileSystem::new();
        fs.create_directory(&folder()).expect("a folder");
        fs.set_fault_after(end, Fault::WriteError);
        let mut run = Run::start(fs.clone());
        for step in life {
            if !run.step(step) {
                break;
            }
            if let Some(store) = &mut run.store {
                prop_assert_eq!(found(store), run.model.on_disk());
            }
        }
        run.store = None;
        let _ = run.crash(&fs, &mut seeded_chooser(seed));
    }
}
