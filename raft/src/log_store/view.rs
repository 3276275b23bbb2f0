//! What the log holds, in memory: its ends, its newest entries, and where on disk the others are. No I/O.

use std::collections::VecDeque;

use openraft::EntryPayload;

use super::record::{Checkpoint, Op};
use crate::planted::{Bug, planted};
use crate::type_config::{Entry, LogId, Vote};

/// Where a frame with live entries stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct FrameRef {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) sequence: u64,
    pub(super) segment: u64,
    pub(super) offset: u64,
    pub(super) bytes: usize,
}

/// What a frame does to the log's entries: it cuts from one index on, then appends a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Extent {
    cut: Option<u64>,
    run: Option<(u64, u64)>,
}

impl Extent {
    pub(super) fn append(&mut self, index: u64) {
        let first = self.run.map_or(index, |(first, _)| first);
        self.run = Some((first, index));
    }

    /// Everything from this index on is gone.
    pub(super) fn truncate(&mut self, from: u64) {
        self.cut = Some(self.cut.map_or(from, |cut| cut.min(from)));
        self.run = self
            .run
            .and_then(|(first, last)| (first < from).then(|| (first, last.min(from - 1))));
    }

    /// The first index that the frame's entries take.
    pub(super) fn first(&self) -> Option<u64> {
        self.run.map(|(first, _)| first)
    }

    /// The last index that they take.
    pub(super) fn highest(&self) -> Option<u64> {
        self.run.map(|(_, last)| last)
    }

    pub(super) fn of(ops: &[Op]) -> Self {
        let mut extent = Self::default();
        for op in ops {
            match op {
                Op::Append(entry) => extent.append(entry.log_id.index),
                Op::TruncateAfter(last) => extent.truncate(after(last.as_ref())),
                Op::Vote(_) | Op::Committed(_) | Op::Purge(_) | Op::Checkpoint(_) => {}
            }
        }
        extent
    }
}

/// The index that follows an entry, or the log's start.
fn after(last: Option<&LogId>) -> u64 {
    last.map_or(0, |last| last.index.saturating_add(1))
}

/// An operation that the log cannot take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// It would leave a hole.
    #[error("entry {index} cannot follow entry {last}: the log has no holes")]
    Hole {
        /// The entry's index.
        index: u64,
        /// The last index there is.
        last: u64,
    },
    /// It would cut what was purged.
    #[error("the log cannot be cut from entry {kept_below} on: entries up to {purged} are purged")]
    Purged {
        /// The first entry to cut.
        kept_below: u64,
        /// The last one purged.
        purged: u64,
    },
}

/// The log as openraft sees it: changes are visible here before they are on disk.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) now: Checkpoint,
    /// Frames that hold the live entries before `cache`, and more; ascending.
    frames: VecDeque<FrameRef>,
    /// The newest entries, up to the last one. All that is not on disk yet is here.
    cache: VecDeque<Entry>,
    cache_bytes: usize,
}

impl View {
    pub(super) fn new(now: Checkpoint) -> Self {
        Self {
            now,
            ..Self::default()
        }
    }

    pub(super) fn set_vote(&mut self, vote: Vote) {
        self.now.vote = Some(vote);
    }

    /// Checks that an entry may come next; any index may start an empty log.
    pub(super) fn check_next(&self, index: u64) -> Result<(), OrderError> {
        match self.now.last {
            Some(last) if last.index.checked_add(1) != Some(index) => Err(OrderError::Hole {
                index,
                last: last.index,
            }),
            _ => Ok(()),
        }
    }

    pub(super) fn append(&mut self, entry: Entry) {
        self.now.last = Some(entry.log_id);
        let index = entry.log_id.index;
        if planted(Bug::KeepsTruncatedInCache)
            && self.cache.back().is_some_and(|last| last.log_id.index >= index)
        {
            return;
        }
        self.cache_bytes += weight(&entry);
        self.cache.push_back(entry);
    }

    pub(super) fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), OrderError> {
        let kept = after(last.as_ref());
        if let Some(purged) = self.now.purged.filter(|purged| purged.index >= kept) {
            return Err(OrderError::Purged {
                kept_below: kept,
                purged: purged.index,
            });
        }
        while self.cache.back().is_some_and(|entry| entry.log_id.index >= kept)
            && !planted(Bug::KeepsTruncatedInCache)
        {
            self.drop_newest();
        }
        if self.now.last.is_some_and(|newest| newest.index >= kept) {
            self.now.last = last.or(self.now.purged);
        }
        Ok(())
    }

    fn drop_newest(&mut self) {
        if let Some(entry) = self.cache.pop_back() {
            self.cache_bytes -= weight(&entry);
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(entry) = self.cache.pop_front() {
            self.cache_bytes -= weight(&entry);
        }
    }

    /// Forgets up to and with an entry. One past the end empties the log, which then goes on after it.
    pub(super) fn purge(&mut self, upto: LogId) {
        if self.now.purged.is_some_and(|purged| purged.index >= upto.index) {
            return;
        }
        self.now.purged = Some(upto);
        while self
            .cache
            .front()
            .is_some_and(|entry| entry.log_id.index <= upto.index)
        {
            self.drop_oldest();
        }
        while self.frames.front().is_some_and(|frame| frame.last <= upto.index) {
            self.frames.pop_front();
        }
        if self.now.last.is_none_or(|last| last.index <= upto.index) {
            self.now.last = Some(upto);
        }
    }

    /// Does what a frame from disk says. A checkpoint is for who starts at it; here everything before it is known.
    pub(super) fn replay(&mut self, op: Op) -> Result<(), OrderError> {
        match op {
            Op::Vote(vote) => self.set_vote(vote),
            Op::Committed(committed) => self.now.committed = committed,
            Op::Append(entry) => {
                self.check_next(entry.log_id.index)?;
                self.append(entry);
            }
            Op::TruncateAfter(last) => self.truncate_after(last)?,
            Op::Purge(upto) => self.purge(upto),
            Op::Checkpoint(_) => {}
        }
        Ok(())
    }

    /// A frame is on disk: its entries can be read from there.
    pub(super) fn written(&mut self, extent: Extent, at: FrameRef) {
        let cut = match (extent.cut, extent.first()) {
            (Some(cut), Some(first)) => Some(cut.min(first)),
            (cut, first) => cut.or(first),
        };
        if let Some(cut) = cut {
            while self.frames.back().is_some_and(|frame| frame.first >= cut) {
                self.frames.pop_back();
            }
            if let Some(frame) = self.frames.back_mut() {
                frame.last = frame.last.min(cut - 1);
            }
        }
        if let Some((first, last)) = extent.run
            && self.now.purged.is_none_or(|purged| purged.index < last)
        {
            self.frames.push_back(FrameRef { first, last, ..at });
        }
    }

    /// Lets go of the oldest entries in memory above a size, but of none from `unwritten` on.
    pub(super) fn shrink(&mut self, bytes: usize, unwritten: Option<u64>) {
        while self.cache_bytes > bytes {
            match self.cache.front() {
                Some(entry) if unwritten.is_none_or(|first| entry.log_id.index < first) => self.drop_oldest(),
                _ => break,
            }
        }
    }

    /// The first index that is held in memory.
    fn cached_from(&self) -> u64 {
        match self.cache.front() {
            Some(entry) => entry.log_id.index,
            None => after(self.now.last.as_ref()),
        }
    }

    /// The live part of a range.
    pub(super) fn clip(&self, start: u64, end: u64) -> (u64, u64) {
        let start = start.max(self.now.purged.map_or(0, |purged| purged.index.saturating_add(1)));
        let first = self.frames.front().map_or(u64::MAX, |frame| frame.first);
        let start = start.max(first.min(self.cached_from()));
        (start, end.min(after(self.now.last.as_ref())))
    }

    /// Where the next entries of a clipped, non-empty range come from.
    pub(super) fn source(&self, start: u64, end: u64, bytes: usize) -> Source {
        let cached = self.cached_from();
        if start >= cached {
            let skip = usize::try_from(start - cached).unwrap_or(usize::MAX);
            let wanted = usize::try_from(end - start).unwrap_or(usize::MAX);
            let mut budget = Budget(bytes);
            let entries = self.cache.iter().skip(skip).take(wanted);
            return Source::Memory(entries.take_while(|entry| budget.take(entry)).cloned().collect());
        }
        let at = self.frames.partition_point(|frame| frame.last < start);
        match self.frames.get(at) {
            Some(frame) if frame.first <= start => Source::Disk(*frame),
            _ => Source::Nowhere,
        }
    }
}

/// Where entries are.
#[derive(Debug)]
pub(super) enum Source {
    Memory(Vec<Entry>),
    Disk(FrameRef),
    /// In a hole, which no log has: a bug or a damaged disk.
    Nowhere,
}

/// How many bytes of entries one answer may still take; the first entry always fits.
#[derive(Debug)]
pub(super) struct Budget(pub(super) usize);

impl Budget {
    /// Whether this entry is still part of the answer.
    pub(super) fn take(&mut self, entry: &Entry) -> bool {
        let fits = self.0 > 0;
        self.0 = self.0.saturating_sub(weight(entry));
        fits
    }
}

/// About how many bytes an entry takes in memory.
pub(super) fn weight(entry: &Entry) -> usize {
    64 + match &entry.payload {
        EntryPayload::Normal(command) => command.0.len(),
        EntryPayload::Blank => 0,
        EntryPayload::Membership(_) => 1024,
    }
}
