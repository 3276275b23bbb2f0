//! The end of the log on disk: one batch is one frame, one write and one flush. Used by the writer alone.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::files::{BLOCK_BYTES, Mark, Spares, segment_name};
use super::frame::ChainHash;
use super::record::{Checkpoint, put_checkpoint};
use super::view::{Extent, FrameRef};
use super::{WriteError, sealed};
use crate::encryption::{RecordKind, Sealing};
use crate::file_system::{File, Lock};
use crate::planted::{Bug, planted};
use crate::seam::Entropy;

/// A segment that is in use.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) name: u64,
    pub(super) file: Arc<dyn File>,
    /// The highest index that any of its frames ever held.
    pub(super) highest: Option<u64>,
}

/// A batch's content, before and after it was sealed.
#[derive(Debug)]
pub(super) struct Content {
    /// Room for frame and cipher, then the operations.
    pub(super) buffer: Vec<u8>,
    pub(super) extent: Extent,
    /// How things stand after it.
    pub(super) after: Checkpoint,
}

/// What a write did.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) at: FrameRef,
    /// A segment was begun.
    pub(super) opened: Option<(u64, Arc<dyn File>)>,
    /// Segments that hold nothing live any more, oldest first.
    pub(super) retired: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct Disk {
    pub(super) folder: PathBuf,
    pub(super) sealing: Sealing,
    pub(super) entropy: Arc<dyn Entropy>,
    pub(super) segment_bytes: u64,
    pub(super) mark: Mark,
    pub(super) spares: Arc<Spares>,
    /// Segments in use, oldest first; frames go to the last.
    pub(super) held: VecDeque<Held>,
    /// Where the next frame goes in the last segment.
    pub(super) offset: u64,
    /// The next frame's number.
    pub(super) next: u64,
    /// What the next frame carries.
    pub(super) chain: ChainHash,
    /// How things stand after all that was written.
    pub(super) state: Checkpoint,
    pub(super) _lock: Box<dyn Lock>,
}

impl Disk {
    /// Writes a batch; when this returns, it is durable and marked as such.
    pub(super) fn write(&mut self, content: &mut Content) -> Result<Written, WriteError> {
        let highest = content.extent.highest();
        let needed =
            (content.buffer.len() + crate::encryption::TAG_BYTES).next_multiple_of(BLOCK_BYTES) as u64;
        let mut opened = None;
        // A frame larger than a segment gets one of its own, which grows.
        if self.offset + needed > self.segment_bytes && self.offset > BLOCK_BYTES as u64 {
            opened = Some(self.rotate()?);
        }
        let at = self.put(&mut content.buffer)?;
        self.state = content.after;
        if let Some(held) = self.held.back_mut() {
            held.highest = held.highest.max(highest);
        }
        Ok(Written {
            at,
            opened,
            retired: self.retired(),
        })
    }

    /// Whether the last segment is so full that the next one should be made ready.
    pub(super) fn wants_spare(&self) -> bool {
        self.offset > self.segment_bytes / 2 && self.spares.is_empty()
    }

    /// Makes the mark durable: after a clean end nothing is left to guess.
    pub(super) fn close(&self) -> io::Result<()> {
        self.mark.sync()
    }

    /// Takes from the list the segments whose entries are all purged. What `state` says is durable: these may go.
    pub(super) fn retired(&mut self) -> Vec<u64> {
        let mut retired = Vec::new();
        let purged = self.state.purged.map(|purged| purged.index);
        while self.held.len() > 1 && self.held.front().is_some_and(|held| held.highest <= purged) {
            retired.extend(self.held.pop_front().map(|held| held.name));
        }
        retired
    }

    /// Begins a segment, and the header, under the present data key: what is sealed under the former one is then in older
    /// segments alone.
    pub(super) fn begin_anew(&mut self) -> Result<(u64, Arc<dyn File>), WriteError> {
        let next = self.next;
        self.spares
            .discard()
            .and_then(|()| self.spares.reseal_header(&self.sealing, &*self.entropy))
            .map_err(|error| self.failed(next, &error))?;
        self.rotate()
    }

    /// The oldest segment in use, by its first frame.
    pub(super) fn oldest(&self) -> u64 {
        self.held.front().map_or(self.next, |held| held.name)
    }

    fn rotate(&mut self) -> Result<(u64, Arc<dyn File>), WriteError> {
        let name = self.next;
        let file: Arc<dyn File> = self
            .spares
            .take(name)
            .map_err(|error| self.failed(name, &error))?
            .into();
        self.held.push_back(Held {
            name,
            file: file.clone(),
            highest: None,
        });
        self.offset = 0;
        // Flushed by itself: two frames in one flush could survive without the first, and then a later frame would no
        // longer prove that the one before it was acknowledged.
        let mut buffer = vec![0; sealed::ROOM_BYTES];
        put_checkpoint(&mut buffer, &self.state);
        self.put(&mut buffer)?;
        Ok((name, file))
    }

    fn put(&mut self, buffer: &mut Vec<u8>) -> Result<FrameRef, WriteError> {
        let held = self.held.back().expect("a store has a segment to write to");
        let (name, file) = (held.name, held.file.clone());
        let next = sealed::seal(
            &self.sealing,
            &*self.entropy,
            RecordKind::Log,
            self.next,
            self.chain,
            buffer,
        )
        .map_err(|error| self.failed(name, &io::Error::other(error)))?;
        let bytes = buffer.len();
        buffer.resize(bytes.next_multiple_of(BLOCK_BYTES), 0);
        if planted(Bug::MarksBeforeFlush) {
            let _too_early = self.mark.set(self.next);
        }
        file.write_all_at(buffer, self.offset)
            .and_then(|()| match planted(Bug::SkipsFlush) {
                true => Ok(()),
                false => file.sync_data(),
            })
            .and_then(|()| self.mark.set(self.next))
            .map_err(|error| self.failed(name, &error))?;
        let at = FrameRef {
            first: 0,
            last: 0,
            sequence: self.next,
            segment: name,
            offset: self.offset,
            bytes,
        };
        self.offset += buffer.len() as u64;
        self.next += 1;
        self.chain = next;
        Ok(at)
    }

    fn failed(&self, segment: u64, error: &io::Error) -> WriteError {
        WriteError::new(self.folder.join(segment_name(segment)), error)
    }
}
