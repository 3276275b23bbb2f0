//! The state machine as consensus drives it: applies entries, publishes each state, keeps the newest snapshot.
//!
//! All judgement is in [`crate::state`]; here is only the order: apply, publish, answer. So whoever hears of a success
//! finds it in the published state. A snapshot is a clone of the persistent maps; only a disk or a wire encodes it.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::wire::{Event, Outcome};
use futures::{Stream, StreamExt as _};
use openraft::storage::{ApplyResponder, EntryResponder};
use openraft::{EntryPayload, RaftSnapshotBuilder, storage::RaftStateMachine};

use crate::planted::{Bug, planted};
use crate::runtime::Blocking;
use crate::runtime::watch::{Receiver, Sender};
use crate::state::{Applied, Compacted, EventRing, State};
use crate::{Answer, LogId, StoredMembership, TypeConfig};

/// What a snapshot covers.
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
/// A snapshot: what it covers and the state itself.
pub type Snapshot = openraft::alias::SnapshotOf<TypeConfig, State>;

/// What an entry costs the log beside its command.
const ENTRY_BYTES: u64 = 64;
/// A restart applies at most about as many entries again, however small they are.
const ENTRIES: u64 = 200_000;

/// Where the newest snapshot outlives the process. Calls block.
pub trait Snapshots: fmt::Debug + Send + Sync + 'static {
    /// Replaces the snapshot, atomically and durably, and gives its size in bytes.
    fn save(&self, meta: &SnapshotMeta, state: &State) -> io::Result<u64>;
    /// The snapshot of before, if there is one, and its size in bytes.
    fn load(&self) -> io::Result<Option<(SnapshotMeta, State, u64)>>;
}

/// The published state: what readers on this manager see.
#[derive(Debug)]
pub(crate) struct View {
    published: Mutex<Published>,
    applied: Sender<u64>,
}

#[derive(Debug)]
struct Published {
    state: State,
    /// Of the last entry applied; how a leader knows that it applied one of its own.
    last: Option<LogId>,
    events: EventRing,
    /// How many of them are kept.
    kept: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // a pointer copy cannot be left half done
}

impl View {
    fn new(state: State, last: Option<LogId>, kept: usize) -> Self {
        Self {
            applied: Sender::new(state.index()),
            published: Mutex::new(Published {
                events: EventRing::new(state.index(), kept),
                state,
                last,
                kept,
            }),
        }
    }

    pub(crate) fn state(&self) -> State {
        lock(&self.published).state.clone()
    }

    pub(crate) fn index(&self) -> u64 {
        lock(&self.published).state.index()
    }

    pub(crate) fn last(&self) -> Option<LogId> {
        lock(&self.published).last
    }

    pub(crate) fn applied(&self) -> Receiver<u64> {
        self.applied.subscribe()
    }

    pub(crate) fn events_from(&self) -> u64 {
        lock(&self.published).events.floor()
    }

    pub(crate) fn events_since(&self, index: u64) -> Result<Vec<Arc<Event>>, Compacted> {
        lock(&self.published).events.since(index)
    }

    fn publish(&self, state: &State, last: LogId, events: Vec<Vec<Event>>) {
        {
            let mut published = lock(&self.published);
            published.state = state.clone();
            published.last = Some(last);
            for events in events {
                published.events.push(events);
            }
        }
        self.applied.send_replace(state.index());
    }

    /// After a snapshot: what happened in between is not known, so every watch lists again.
    fn replace(&self, state: &State, last: Option<LogId>) {
        {
            let mut published = lock(&self.published);
            published.state = state.clone();
            published.last = last;
            if !planted(Bug::WatchSkipsSnapshot) {
                published.events = EventRing::new(state.index(), published.kept);
            }
        }
        self.applied.send_replace(state.index());
    }
}

/// Keeps the newest snapshot, in memory and on disk. A build that ends after a newer one was installed is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Keeper {
    disk: Arc<dyn Snapshots>,
    blocking: Blocking,
    newest: Arc<Mutex<Option<(SnapshotMeta, State, u64)>>>,
    writing: Arc<Mutex<()>>,
    /// The next one that is asked for is made, however little there is to it.
    wanted: Arc<AtomicBool>,
}

impl Keeper {
    fn newest(&self) -> Option<Snapshot> {
        lock(&self.newest)
            .clone()
            .map(|(meta, snapshot, _)| Snapshot { meta, snapshot })
    }

    /// The size of the newest; 0 while there is none.
    fn bytes(&self) -> u64 {
        lock(&self.newest).as_ref().map_or(0, |(_, _, bytes)| *bytes)
    }

    /// The next snapshot that is asked for is made.
    pub(crate) fn want(&self) {
        self.wanted.store(true, Ordering::Relaxed);
    }

    /// Where it writes.
    pub(crate) fn blocking(&self) -> Blocking {
        self.blocking
    }

    /// Saves the newest snapshot once more, under the present data key.
    pub(crate) async fn reseal(&self) -> io::Result<()> {
        let keeper = self.clone();
        self.blocking
            .run(move || {
                let _one_writer = lock(&keeper.writing);
                let newest = lock(&keeper.newest).clone();
                match newest {
                    Some((meta, state, _)) => keeper.disk.save(&meta, &state).map(drop),
                    None => Ok(()),
                }
            })
            .await
    }

    /// Saves a snapshot unless a newer one is there, and gives the newest.
    async fn save(&self, meta: SnapshotMeta, state: State) -> io::Result<Snapshot> {
        let keeper = self.clone();
        self.blocking
            .run(move || {
                let _one_writer = lock(&keeper.writing);
                match keeper.newest() {
                    Some(newest) if newest.meta.last_log_id >= meta.last_log_id => Ok(newest),
                    _ => {
                        let bytes = keeper.disk.save(&meta, &state)?;
                        *lock(&keeper.newest) = Some((meta.clone(), state.clone(), bytes));
                        Ok(Snapshot {
                            meta,
                            snapshot: state,
                        })
                    }
                }
            })
            .await
    }
}

/// Entries published together at most. Each publishing makes the next change of the state copy what it touches, and
/// wakes whoever watches.
const TOGETHER: usize = 64;

/// What was applied but not yet published, entry by entry.
#[derive(Default)]
struct Unseen {
    entries: usize,
    events: Vec<Vec<Event>>,
    answers: Vec<(ApplyResponder<TypeConfig>, Outcome)>,
}

/// What was applied since the newest snapshot.
#[derive(Clone, Copy, Debug, Default)]
struct Since {
    entries: u64,
    bytes: u64,
}

impl Since {
    fn count(&mut self, entry: &crate::Entry) {
        let command = match &entry.payload {
            EntryPayload::Normal(command) => command.0.len() as u64,
            EntryPayload::Blank | EntryPayload::Membership(_) => 0,
        };
        self.entries += 1;
        self.bytes += ENTRY_BYTES + command;
    }

    /// Whether a snapshot is due: once the log has grown by the size of the last one. So both together write at most
    /// about twice what the log alone does, however large the state is, and the log stays as small as the state.
    fn due(self, last_snapshot: u64) -> bool {
        self.bytes >= last_snapshot || self.entries >= ENTRIES
    }
}

/// Applies committed entries. Owned by consensus; others read the [`View`].
#[derive(Debug)]
pub struct StateMachine {
    state: State,
    last: Option<LogId>,
    membership: StoredMembership,
    since: Since,
    view: Arc<View>,
    keeper: Keeper,
}

impl StateMachine {
    /// Starts from the snapshot on disk, or from nothing. So many events are kept for watches that resume.
    pub(crate) fn load(
        disk: Arc<dyn Snapshots>,
        blocking: Blocking,
        events: usize,
    ) -> io::Result<(Self, Arc<View>)> {
        let found = disk.load()?;
        let (meta, state, _) = found.clone().unwrap_or_default();
        let view = Arc::new(View::new(state.clone(), meta.last_log_id, events));
        let machine = Self {
            state,
            last: meta.last_log_id,
            membership: meta.last_membership,
            since: Since::default(),
            view: view.clone(),
            keeper: Keeper {
                disk,
                blocking,
                newest: Arc::new(Mutex::new(found)),
                writing: Arc::default(),
                wanted: Arc::default(),
            },
        };
        Ok((machine, view))
    }

    /// The last entry that was applied.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.last
    }

    /// What keeps its snapshots.
    pub(crate) fn keeper(&self) -> Keeper {
        self.keeper.clone()
    }

    /// Applies one entry; nobody sees it before [`StateMachine::publish`].
    fn apply_one(&mut self, entry: crate::Entry) -> io::Result<Applied> {
        self.since.count(&entry);
        let log_id = entry.log_id;
        let (index, term) = (log_id.index, log_id.committed_leader_id().term);
        let applied = match entry.payload {
            // An entry that this program does not understand stops the replica: what it would do next could differ.
            EntryPayload::Normal(_) if planted(Bug::AppliesDifferently) && self.since.entries % 50 == 7 => {
                self.skip(index)
            }
            EntryPayload::Normal(_) if planted(Bug::SkipsEntry) && index.is_multiple_of(97) => {
                self.skip(index)
            }
            EntryPayload::Normal(_)
                if planted(Bug::SkipsFirstAfterStart) && self.view.events_from() == self.state.index() =>
            {
                self.skip(index)
            }
            EntryPayload::Normal(command) => self
                .state
                .apply(index, term, &command.0)
                .map_err(io::Error::other)?,
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(log_id), membership);
                self.skip(index)
            }
            EntryPayload::Blank => self.skip(index),
        };
        self.last = Some(log_id);
        Ok(applied)
    }

    /// Publishes what was applied, then answers who waits for it.
    fn publish(&self, unseen: &mut Unseen) {
        if let Some(last) = self.last {
            self.view
                .publish(&self.state, last, std::mem::take(&mut unseen.events));
        }
        for (responder, outcome) in unseen.answers.drain(..) {
            responder.send(Answer(outcome));
        }
        unseen.entries = 0;
    }

    fn skip(&mut self, index: u64) -> Applied {
        self.state.skip(index);
        let outcome = Outcome {
            index,
            rejection: None,
        };
        Applied {
            outcome,
            events: Vec::new(),
        }
    }

    fn snapshot_meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: self.last,
            last_membership: match planted(Bug::SavesOldMembers) {
                true => self
                    .keeper
                    .newest()
                    .map_or_else(StoredMembership::default, |it| it.meta.last_membership),
                false => self.membership.clone(),
            },
        }
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = State;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.last, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        let mut unseen = Unseen::default();
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let applied = self.apply_one(entry)?;
            unseen.entries += 1;
            unseen.events.push(applied.events);
            unseen
                .answers
                .extend(responder.map(|responder| (responder, applied.outcome)));
            if unseen.entries == TOGETHER {
                self.publish(&mut unseen);
            }
        }
        if unseen.entries > 0 {
            self.publish(&mut unseen);
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Builder> {
        let wanted = self.keeper.wanted.swap(false, Ordering::Relaxed);
        match force || wanted || self.since.due(self.keeper.bytes()) {
            true => Some(self.get_snapshot_builder().await),
            false => None,
        }
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        self.since = Since::default();
        Builder {
            meta: self.snapshot_meta(),
            state: match planted(Bug::SavesOldState) {
                true => self.keeper.newest().map_or_else(State::default, |it| it.snapshot),
                false => self.state.clone(),
            },
            keeper: self.keeper.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, state: State) -> Result<(), io::Error> {
        if meta.last_log_id.map(|id| id.index) != Some(state.index()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the snapshot's state is not at the index that it claims",
            ));
        }
        if !planted(Bug::SkipsSavingSnapshot) {
            self.keeper.save(meta.clone(), state.clone()).await?;
        }
        self.last = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.since = Since::default();
        self.state = state;
        self.view.replace(&self.state, self.last);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        Ok(self.keeper.newest())
    }
}

/// Saves the state as it was when the snapshot was asked for, beside further applying.
#[derive(Debug)]
pub struct Builder {
    meta: SnapshotMeta,
    state: State,
    keeper: Keeper,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = State;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        self.keeper.save(self.meta.clone(), self.state.clone()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemoryStore;
    use crate::type_config::log_id;

    /// Says that every snapshot has so many bytes.
    #[derive(Debug)]
    struct Sized(MemoryStore, u64);

    impl Snapshots for Sized {
        fn save(&self, meta: &SnapshotMeta, state: &State) -> io::Result<u64> {
            self.0.save(meta, state).map(|_| self.1)
        }

        fn load(&self) -> io::Result<Option<(SnapshotMeta, State, u64)>> {
            let found = self.0.load()?;
            Ok(found.map(|(meta, state, _)| (meta, state, self.1)))
        }
    }

    fn machine(disk: &MemoryStore, bytes: u64) -> StateMachine {
        let disk = Arc::new(Sized(disk.clone(), bytes));
        StateMachine::load(disk, Blocking::Inline, 1_000)
            .expect("a machine")
            .0
    }

    /// Applies blank entries until a snapshot is due, and counts them.
    async fn until_due(machine: &mut StateMachine, from: u64) -> u64 {
        for n in 0.. {
            if let Some(mut builder) = machine.try_create_snapshot_builder(false).await {
                builder.build_snapshot().await.expect("a snapshot");
                return n;
            }
            let entry = crate::Entry {
                log_id: log_id(1, from + n),
                payload: EntryPayload::Blank,
            };
            machine.apply_one(entry).expect("applied");
        }
        unreachable!("it becomes due")
    }

    #[tokio::test]
    async fn a_snapshot_is_due_when_the_log_grew_by_the_size_of_the_last() {
        let disk = MemoryStore::default();
        let mut large = machine(&disk, 100 * ENTRY_BYTES);
        assert_eq!(until_due(&mut large, 1).await, 0, "there is none");
        assert_eq!(until_due(&mut large, 1).await, 100);
        assert!(large.try_create_snapshot_builder(false).await.is_none());
        assert!(large.try_create_snapshot_builder(true).await.is_some());
        let mut again = machine(&disk, 100 * ENTRY_BYTES);
        assert_eq!(until_due(&mut again, 101).await, 100, "after a restart");
        let mut huge = machine(&disk, u64::MAX);
        assert_eq!(until_due(&mut huge, 201).await, ENTRIES, "but not for ever");
    }
}
