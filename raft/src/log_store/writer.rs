//! What waits to be written, and who writes it.
//!
//! Changes show in the view and join the open batch under one lock. A flush takes the oldest batch, writes it without
//! the lock, and then tells those who wait. There is one flush at a time, in order; so a failed one ends them all.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use openraft::storage::IOFlushed;
use openraft::type_config::TypeConfigExt as _;
use tokio::sync::Notify;

use super::disk::{Content, Disk, Written};
use super::files::Spares;
use super::record::{self, Checkpoint, Op};
use super::view::{Budget, Extent, FrameRef, OrderError, Source, View};
use super::{Delay, Durable, Flushing, Options, WriteError, frame, sealed};
use crate::encryption::{RecordKind, Sealing};
use crate::file_system::File;
use crate::planted::{Bug, planted};
use crate::type_config::{Entry, LogId, TypeConfig, Vote};

/// A batch takes no more entries past this many bytes. Doubling it doubles the longest flush; halving it costs
/// throughput only where a thousand clients write at once.
const BATCH_BYTES: usize = 1 << 20;
/// `append` waits while more than this is not yet written.
const QUEUE_BYTES: usize = 8 << 20;
/// Jobs that may wait for the helper thread: one for a spare, a few retirements.
const JOBS: usize = 16;

/// What will be one frame.
#[derive(Debug)]
struct Batch {
    buffer: Vec<u8>,
    extent: Extent,
    /// Somebody waits; otherwise it may wait for who does.
    urgent: bool,
    waiting: Vec<Waiting>,
}

struct Waiting(IOFlushed<TypeConfig>);

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waiting")
    }
}

impl Batch {
    fn new(mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        buffer.resize(sealed::ROOM_BYTES, 0);
        Self {
            buffer,
            extent: Extent::default(),
            urgent: false,
            waiting: Vec::new(),
        }
    }

    fn is_empty(&self) -> bool {
        self.buffer.len() == sealed::ROOM_BYTES
    }
}

/// The view, and the changes to it that are not written yet.
#[derive(Debug)]
pub(super) struct Queue {
    view: View,
    open: Batch,
    full: VecDeque<(Batch, Checkpoint)>,
    /// The first entry of the batch that is being written, if one is.
    writing: Option<Option<u64>>,
    committed_changed: bool,
    files: BTreeMap<u64, Arc<dyn File>>,
    failed: Option<WriteError>,
    closing: bool,
    /// A buffer to use again.
    free: Vec<u8>,
    cache_bytes: usize,
}

impl Queue {
    pub(super) fn vote(&mut self, vote: Vote) -> Result<(), OrderError> {
        self.view.set_vote(vote);
        if !planted(Bug::ForgetsVote) {
            record::put_vote_op(&mut self.open.buffer, &vote);
        }
        Ok(())
    }

    pub(super) fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), OrderError> {
        self.view.truncate_after(last)?;
        if !planted(Bug::ForgetsTruncation) {
            let kept = match planted(Bug::TruncatesOneTooFew) {
                true => last.map(|last| LogId::new(*last.committed_leader_id(), last.index + 1)),
                false => last,
            };
            record::put_truncate(&mut self.open.buffer, kept.as_ref());
        }
        self.open.extent.truncate(last.map_or(0, |last| last.index + 1));
        Ok(())
    }

    fn append(&mut self, entry: Entry) -> io::Result<()> {
        self.view
            .check_next(entry.log_id.index)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let before = self.open.buffer.len();
        record::put_entry_op(&mut self.open.buffer, &entry);
        if self.open.buffer.len() - before > BATCH_BYTES * 2 {
            self.open.buffer.truncate(before);
            let bytes = frame::RecordSizeError(before);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, bytes));
        }
        self.open.extent.append(entry.log_id.index);
        self.view.append(entry);
        if self.open.buffer.len() > BATCH_BYTES {
            self.close_batch();
        }
        Ok(())
    }

    /// Ends the open batch; what comes next is another frame.
    fn close_batch(&mut self) {
        if std::mem::take(&mut self.committed_changed) {
            record::put_committed(&mut self.open.buffer, self.view.now.committed.as_ref());
        }
        let next = Batch::new(std::mem::take(&mut self.free));
        let batch = std::mem::replace(&mut self.open, next);
        self.full.push_back((batch, self.view.now));
    }

    /// Waits for the frame that holds the newest change.
    fn wait(&mut self, waiting: Waiting) {
        if planted(Bug::AcknowledgesBeforeFlush) {
            self.open.urgent = true;
            return tell(vec![waiting], || Ok(()));
        }
        match self.full.back_mut() {
            Some((batch, _)) if self.open.is_empty() => batch.waiting.push(waiting),
            _ => {
                self.open.waiting.push(waiting);
                self.open.urgent = true;
            }
        }
    }

    fn has_work(&self) -> bool {
        self.failed.is_none()
            && (!self.full.is_empty() || self.open.urgent || (self.closing && !self.open.is_empty()))
    }

    fn take(&mut self) -> Option<(Content, Vec<Waiting>)> {
        if !self.has_work() {
            return None;
        }
        if self.full.is_empty() {
            self.close_batch();
        }
        let (batch, after) = self.full.pop_front()?;
        self.writing = Some(batch.extent.first());
        let content = Content {
            buffer: batch.buffer,
            extent: batch.extent,
            after,
        };
        Some((content, batch.waiting))
    }

    fn written(&mut self, extent: Extent, written: &Written) {
        self.view.written(extent, written.at);
        if let Some((name, file)) = &written.opened {
            self.files.insert(*name, file.clone());
        }
        for name in &written.retired {
            self.files.remove(name);
        }
        self.shrink();
    }

    fn shrink(&mut self) {
        let waiting = self.full.iter().map(|(batch, _)| batch).chain([&self.open]);
        let unwritten = waiting
            .map(|batch| batch.extent.first())
            .chain(self.writing)
            .flatten()
            .min();
        self.view.shrink(self.cache_bytes, unwritten);
    }

    fn queued_bytes(&self) -> usize {
        let full: usize = self.full.iter().map(|(batch, _)| batch.buffer.len()).sum();
        full + self.open.buffer.len()
    }

    fn all_waiting(&mut self) -> Vec<Waiting> {
        let full = self.full.drain(..).flat_map(|(batch, _)| batch.waiting);
        full.chain(self.open.waiting.drain(..)).collect()
    }
}

/// What the store's handles and its writer share.
#[derive(Debug)]
pub(super) struct Shared {
    queue: Mutex<Queue>,
    disk: Mutex<Disk>,
    sealing: Sealing,
    durable: Durable,
    /// Wakes the writer, where it is a thread.
    work: Condvar,
    /// Wakes the writer, where it is a task.
    work_task: Arc<Notify>,
    /// Wakes who waits for room in the queue.
    room: Notify,
    inline: bool,
    beside: Beside,
}

/// Who makes spares and lets go of segments: a thread, so that no flush waits for it, or the flush itself.
#[derive(Debug)]
enum Beside {
    /// Nobody, once the store is being closed.
    Thread(Mutex<Option<SyncSender<Job>>>),
    Here(Arc<Spares>),
}

#[derive(Debug)]
enum Job {
    Prepare(u64),
    Retire(Vec<u64>),
}

impl Job {
    /// A job that fails costs time or space only: a rotation makes its own segment, the next start lets go.
    fn run(self, spares: &Spares) {
        let result = match self {
            Job::Prepare(number) => spares.prepare(number),
            Job::Retire(segments) => spares.retire(&segments),
        };
        if let Err(error) = result {
            tracing::warn!(%error, "a log segment could not be prepared or removed");
        }
    }
}

/// Before anybody is told that it is durable.
fn note(durable: &Durable, now: &Checkpoint) {
    let vote = now.vote.map_or(0, |vote| vote.leader_id.term);
    let last = now
        .last
        .map_or((0, 0), |last| (last.committed_leader_id().term, last.index));
    durable.set(vote, last);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn now(&self) -> Checkpoint {
        lock(&self.queue).view.now
    }

    pub(super) fn durable(&self) -> Durable {
        self.durable.clone()
    }

    /// The queue, unless a write failed.
    fn queue(&self) -> io::Result<MutexGuard<'_, Queue>> {
        let queue = lock(&self.queue);
        match &queue.failed {
            None => Ok(queue),
            Some(failed) => Err(failed.io()),
        }
    }

    /// Makes a change and waits until it is durable.
    pub(super) async fn change(
        &self,
        change: impl FnOnce(&mut Queue) -> Result<(), OrderError> + Send,
    ) -> io::Result<()> {
        let (sender, flushed) = TypeConfig::oneshot();
        {
            let mut queue = self.queue()?;
            change(&mut queue).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
            queue.wait(Waiting(IOFlushed::signal(sender)));
        }
        self.kick();
        match flushed.await {
            Ok(result) => result,
            Err(_) => Err(io::Error::other("the log store was closed")),
        }
    }

    pub(super) fn append(
        &self,
        entries: impl IntoIterator<Item = Entry>,
        callback: IOFlushed<TypeConfig>,
    ) -> io::Result<()> {
        {
            let mut queue = self.queue()?;
            for entry in entries {
                queue.append(entry)?;
            }
            queue.wait(Waiting(callback));
        }
        self.kick();
        Ok(())
    }

    pub(super) fn set_committed(&self, committed: Option<LogId>) -> io::Result<()> {
        let mut queue = self.queue()?;
        queue.view.now.committed = committed;
        queue.committed_changed = true;
        Ok(())
    }

    pub(super) fn purge(&self, upto: LogId) -> io::Result<()> {
        let mut queue = self.queue()?;
        let upto = match planted(Bug::PurgesAboveSnapshot) {
            true => queue.view.now.last.unwrap_or(upto),
            false => upto,
        };
        queue.view.purge(upto);
        record::put_purge(&mut queue.open.buffer, &upto);
        Ok(())
    }

    /// Begins a segment under the present data key; its first frame's number.
    pub(super) fn begin_anew(&self) -> io::Result<u64> {
        // Held while the new file becomes known: nobody writes to it before a reader can find it.
        let mut disk = lock(&self.disk);
        let begun = disk.begin_anew();
        let mut queue = self.queue()?;
        match begun {
            Ok((name, file)) => {
                queue.files.insert(name, file);
                Ok(name)
            }
            Err(error) => {
                queue.failed = Some(error.clone());
                Err(error.io())
            }
        }
    }

    /// The oldest segment in use, by its first frame.
    pub(super) fn oldest(&self) -> u64 {
        lock(&self.disk).oldest()
    }

    /// Removes what is older than a segment in use, spares too; whether there was something.
    pub(super) fn remove_older(&self, first: u64) -> io::Result<bool> {
        let spares = lock(&self.disk).spares.clone();
        spares.remove_older(first)
    }

    /// Waits until the writer has caught up enough.
    pub(super) async fn room(&self) {
        loop {
            let freed = self.room.notified();
            if lock(&self.queue).queued_bytes() <= QUEUE_BYTES || self.inline {
                return;
            }
            freed.await;
        }
    }

    fn kick(&self) {
        if self.inline {
            while self.flush() {}
        } else {
            self.work.notify_one();
            self.work_task.notify_one();
        }
    }

    /// Writes the oldest batch and tells who waits; false where there was none.
    fn flush(&self) -> bool {
        let Some((mut content, waiting)) = lock(&self.queue).take() else {
            return false;
        };
        let after = content.after;
        let mut disk = lock(&self.disk);
        let result = disk.write(&mut content);
        let spare_for = disk.wants_spare().then_some(disk.next);
        drop(disk);

        let mut queue = lock(&self.queue);
        queue.writing = None;
        let (told, failed) = match result {
            Err(_) if planted(Bug::IgnoresFailedFlush) => (None, None),
            Ok(written) => {
                note(&self.durable, &after);
                queue.written(content.extent, &written);
                if content.buffer.capacity() <= 2 * BATCH_BYTES {
                    queue.free = content.buffer;
                }
                (Some(written.retired), None)
            }
            Err(error) => {
                queue.failed = Some(error.clone());
                (None, Some((error, queue.all_waiting())))
            }
        };
        drop(queue);
        self.room.notify_waiters();
        match failed {
            None => tell(waiting, || Ok(())),
            Some((error, later)) => {
                tell(waiting, || Err(error.io()));
                tell(later, || Err(error.io()));
            }
        }
        if let Some(number) = spare_for {
            self.beside(Job::Prepare(number));
        }
        if let Some(retired) = told.filter(|retired| !retired.is_empty()) {
            self.beside(Job::Retire(retired));
        }
        true
    }

    fn beside(&self, job: Job) {
        match &self.beside {
            Beside::Here(spares) => job.run(spares),
            // A full queue means that the disk is far behind; the next start lets go of what stays.
            Beside::Thread(jobs) => {
                if let Some(jobs) = &*lock(jobs) {
                    let _ = jobs.try_send(job);
                }
            }
        }
    }

    /// Live entries of a range, from its start; stops after about so many bytes.
    pub(super) fn read(&self, start: u64, end: u64, bytes: usize) -> io::Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut budget = bytes;
        let mut at = start;
        loop {
            let queue = lock(&self.queue);
            let (from, to) = queue.view.clip(at, end);
            if from >= to || budget == 0 {
                return Ok(entries);
            }
            if from != at && !entries.is_empty() {
                entries.clear(); // purged meanwhile: what was read so far is gone too
            }
            let frame = match queue.view.source(from, to, budget) {
                Source::Memory(newest) => {
                    drop(queue);
                    entries.extend(newest);
                    return Ok(entries);
                }
                Source::Disk(frame) => frame,
                Source::Nowhere => return Err(unreadable(&format!("entry {from} is nowhere"))),
            };
            let file = queue.files.get(&frame.segment).cloned();
            drop(queue);
            let held = file
                .ok_or_else(|| unreadable("its segment is gone"))
                .and_then(|file| self.read_frame(&*file, frame));
            match held {
                Ok(held) => {
                    let mut left = Budget(budget);
                    let held = held
                        .into_iter()
                        .filter(|entry| (from..to.min(frame.last + 1)).contains(&entry.log_id.index));
                    for entry in held {
                        if !left.take(&entry) {
                            break;
                        }
                        at = entry.log_id.index + 1;
                        entries.push(entry);
                    }
                    budget = left.0;
                    if at <= from {
                        return Err(unreadable(&format!("entry {from} is not in its frame")));
                    }
                }
                // The segment may have been purged and used again since the lock was let go.
                Err(error) => {
                    if lock(&self.queue).view.clip(from, to).0 <= from {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn read_frame(&self, file: &dyn File, at: FrameRef) -> io::Result<Vec<Entry>> {
        let mut bytes = vec![0; at.bytes];
        file.read_exact_at(&mut bytes, at.offset)?;
        let damaged = |what: String| {
            let segment = super::files::segment_name(at.segment);
            unreadable(&format!("{segment} at byte {}: {what}", at.offset))
        };
        let frame = frame::decode(&bytes).map_err(|error| damaged(error.to_string()))?;
        if frame.sequence != at.sequence {
            return Err(damaged("another frame stands there".to_owned()));
        }
        let content = sealed::open(&self.sealing, RecordKind::Log, &frame)
            .map_err(|error| damaged(error.to_string()))?;
        let mut entries: Vec<Entry> = Vec::new();
        for op in record::ops(&content) {
            match op.map_err(|error| damaged(error.to_string()))? {
                Op::Append(entry) => entries.push(entry),
                Op::TruncateAfter(last) => {
                    let kept = last.map_or(0, |last| last.index + 1);
                    entries.retain(|entry| entry.log_id.index < kept);
                }
                Op::Vote(_) | Op::Committed(_) | Op::Purge(_) | Op::Checkpoint(_) => {}
            }
        }
        Ok(entries)
    }
}

fn unreadable(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the store is damaged: {what}; started again, this manager asks the others to take it back"),
    )
}

fn tell(waiting: Vec<Waiting>, result: impl Fn() -> io::Result<()>) {
    for Waiting(callback) in waiting {
        callback.io_completed(result());
    }
}

/// Owns the writer: ends it when the last handle goes.
#[derive(Debug)]
pub(super) struct Guard {
    pub(super) shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Guard {
    /// Starts the writer.
    ///
    /// # Errors
    /// The system refused a thread.
    pub(super) fn start(disk: Disk, view: View, options: &Options) -> io::Result<Self> {
        let spares = disk.spares.clone();
        let mut threads = Vec::new();
        let beside = match options.flushing {
            Flushing::Thread => {
                let (jobs, queue) = sync_channel(JOBS);
                let helper = std::thread::Builder::new().name("log-segments".to_owned());
                threads.push(helper.spawn(move || run_jobs(&queue, &spares))?);
                Beside::Thread(Mutex::new(Some(jobs)))
            }
            Flushing::Inline | Flushing::Delayed(_) => Beside::Here(spares),
        };
        let files = disk
            .held
            .iter()
            .map(|held| (held.name, held.file.clone()))
            .collect();
        let durable = Durable::default();
        note(&durable, &disk.state);
        let shared = Arc::new(Shared {
            sealing: disk.sealing.clone(),
            durable,
            disk: Mutex::new(disk),
            queue: Mutex::new(Queue {
                view,
                open: Batch::new(Vec::new()),
                full: VecDeque::new(),
                writing: None,
                committed_changed: false,
                files,
                failed: None,
                closing: false,
                free: Vec::new(),
                cache_bytes: options.cache_bytes,
            }),
            work: Condvar::new(),
            work_task: Arc::default(),
            room: Notify::new(),
            inline: matches!(options.flushing, Flushing::Inline),
            beside,
        });
        let mut task = None;
        match &options.flushing {
            Flushing::Inline => {}
            Flushing::Thread => {
                let shared = shared.clone();
                let writer = std::thread::Builder::new().name("log-writer".to_owned());
                threads.push(writer.spawn(move || run_thread(&shared))?);
            }
            Flushing::Delayed(delay) => {
                let (work, delay) = (shared.work_task.clone(), delay.clone());
                task = Some(crate::runtime::spawn(run_task(
                    Arc::downgrade(&shared),
                    work,
                    delay,
                )));
            }
        }
        Ok(Self {
            shared,
            threads,
            task,
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort(); // a simulation's end is a crash
        }
        lock(&self.shared.queue).closing = true;
        self.shared.work.notify_one();
        if let Beside::Thread(jobs) = &self.shared.beside {
            *lock(jobs) = None; // ends the helper once it has done what it was given
        }
        // Both end before the folder's lock is let go of, which `shared` holds.
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic there was reported by the thread itself
        }
    }
}

fn run_jobs(jobs: &Receiver<Job>, spares: &Spares) {
    while let Ok(job) = jobs.recv() {
        job.run(spares);
    }
}

fn run_thread(shared: &Shared) {
    loop {
        {
            let mut queue = lock(&shared.queue);
            while !queue.has_work() {
                if queue.closing || queue.failed.is_some() {
                    break;
                }
                queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if !shared.flush() {
            break;
        }
    }
    if let Err(error) = lock(&shared.disk).close() {
        tracing::warn!(%error, "the log's mark could not be flushed");
    }
}

async fn run_task(shared: Weak<Shared>, work: Arc<Notify>, delay: Arc<Delay>) {
    loop {
        work.notified().await;
        loop {
            delay().await;
            let Some(shared) = shared.upgrade() else { return };
            if !shared.flush() {
                break;
            }
        }
    }
}
