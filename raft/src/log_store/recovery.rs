//! Opening a store: what is there, what of it was acknowledged, and what to do about the rest.
//!
//! Frames are read in order until one is not the next one. There the log ends, and everything from there on is either
//! a torn tail, which nobody was told about and which is cut, or damage, which stops the manager. It is damage if
//! (a) the mark says that this frame was acknowledged, or
//! (b) some later frame is anywhere behind it: one is written only after the one before it was flushed, or
//! (c) the segments that are left begin after entries that were not purged.
//! Damage in what was purged is harmless and not looked for: reading starts at the newest run of segments without a
//! gap. `docs/decisions/0004-torn-or-damaged.md` has the one case that remains.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::disk::{Disk, Held};
use super::files::{self, BLOCK_BYTES, MARK, Mark, STORE, Spares, header, segment_name, segment_of};
use super::frame::{self, ChainHash, FrameError};
use super::record::{Checkpoint, Op, RecordError, put_checkpoint};
use super::view::{Extent, FrameRef, OrderError, View};
use super::{OpenError, Options, sealed};
use crate::encryption::{RecordKind, Sealing};
use crate::file_system::{FileSystem, OpenMode};
use crate::planted::{Bug, planted};
use crate::seam::Entropy;
use crate::type_config::LogId;

/// No segment is larger: one of normal size, or one frame and the segment's header.
const SEGMENT_BYTES_MAX: u64 = 64 << 20;

/// What opening found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The last entry purged.
    pub purged: Option<LogId>,
    /// The last entry, purged or not.
    pub last: Option<LogId>,
}

/// Opens the store in a folder, or makes it if the folder holds none.
pub(super) fn open(
    fs: &Arc<dyn FileSystem>,
    folder: &Path,
    sealing: Sealing,
    entropy: Arc<dyn Entropy>,
    options: &Options,
) -> Result<(Disk, View, Recovered), OpenError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::io(&path, source)
    };
    fs.create_directory(folder).map_err(io(folder))?;
    let lock = fs.lock(folder).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => OpenError::Locked {
            folder: folder.to_owned(),
        },
        _ => OpenError::io(folder, source),
    })?;
    if !header::check(&**fs, folder, &sealing)? {
        refuse_remains(&**fs, folder, &sealing)?;
        if options.made {
            return Err(OpenError::Missing {
                folder: folder.to_owned(),
            });
        }
        create(&**fs, folder, &sealing, &*entropy, options).map_err(io(folder))?;
    }
    let (mark, acknowledged) = Mark::open(&**fs, folder, &sealing.store)?;
    let names = fs.list(folder).map_err(io(folder))?;
    let segments: Vec<u64> = names.iter().filter_map(|name| segment_of(name)).collect();

    let mut scan = Scan::new(&sealing, options);
    let mut contents = Vec::new(); // behind the log's end: read again for later frames
    for segment in segments {
        let path = folder.join(segment_name(segment));
        let bytes = read_segment(&**fs, &path)?;
        if scan.read(segment, &bytes) {
            contents.clear();
        }
        contents.push((segment, bytes));
    }
    scan.check(folder, acknowledged, &contents)?;

    let Scan {
        view,
        held: found,
        offset,
        next,
        chain,
        tail,
        stale,
        ..
    } = scan;
    drop(contents);
    let mut held = VecDeque::new();
    for (name, highest) in found {
        let path = folder.join(segment_name(name));
        let file = fs.open(&path, OpenMode::Write).map_err(io(&path))?.into();
        held.push_back(Held { name, file, highest });
    }
    for name in stale {
        let path = folder.join(segment_name(name));
        fs.unlink(&path).map_err(io(&path))?;
    }
    let spares = Spares::new(fs.clone(), folder.to_owned(), options.segment_bytes);
    spares.adopt(&names).map_err(io(folder))?;
    fs.sync_directory(folder).map_err(io(folder))?;

    let recovered = Recovered {
        purged: view.now.purged,
        last: view.now.last,
    };
    let mut disk = Disk {
        folder: folder.to_owned(),
        sealing,
        entropy,
        segment_bytes: options.segment_bytes,
        mark,
        spares: Arc::new(spares),
        held,
        offset,
        next,
        chain,
        state: view.now,
        _lock: lock,
    };
    make_tail_durable(&disk, tail).map_err(io(folder))?;
    let retired = disk.retired();
    if !retired.is_empty() {
        disk.spares.retire(&retired).map_err(io(folder))?;
    }
    Ok((disk, view, recovered))
}

/// Writes the last frame once more and flushes it. A killed program, or one whose flush failed, may have left it in
/// memory only; from here on it counts as acknowledged.
fn make_tail_durable(disk: &Disk, tail: FrameRef) -> io::Result<()> {
    let held = disk.held.back().expect("a store has a segment");
    let mut bytes = vec![0; tail.bytes];
    held.file.read_exact_at(&mut bytes, tail.offset)?;
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    held.file.write_all_at(&bytes, tail.offset)?;
    held.file.sync_data()?;
    disk.mark.set(tail.sequence)
}

/// A folder without a header is one in which making a store did not end: it must not hold anything acknowledged.
fn refuse_remains(fs: &dyn FileSystem, folder: &Path, sealing: &Sealing) -> Result<(), OpenError> {
    let names = fs.list(folder).map_err(|source| OpenError::io(folder, source))?;
    if !names.iter().any(|name| name == MARK) {
        return Ok(());
    }
    match Mark::open(fs, folder, &sealing.store) {
        // A crash can keep the mark's name and lose its first content; one that was used is not all zeros.
        Err(OpenError::Damaged { .. }) if blank(fs, &folder.join(MARK)) => Ok(()),
        Ok((_, 0)) => Ok(()),
        Ok(_) => Err(OpenError::damaged(
            &folder.join(STORE),
            0,
            "it is missing, yet there is a log",
        )),
        Err(error) => Err(error),
    }
}

fn blank(fs: &dyn FileSystem, path: &Path) -> bool {
    crate::file_system::read_file(fs, path, BLOCK_BYTES)
        .is_ok_and(|content| content.iter().all(|byte| *byte == 0))
}

/// Makes an empty store. The header comes last: until it is there, the folder holds nothing.
fn create(
    fs: &dyn FileSystem,
    folder: &Path,
    sealing: &Sealing,
    entropy: &dyn Entropy,
    options: &Options,
) -> io::Result<()> {
    for name in fs.list(folder)?.iter().filter(|name| files::is_ours(name)) {
        fs.unlink(&folder.join(name))?;
    }
    Mark::create(fs, folder, &sealing.store)?;
    let file = files::preallocate(fs, &folder.join(segment_name(FIRST)), options.segment_bytes)?;
    let mut buffer = vec![0; sealed::ROOM_BYTES];
    put_checkpoint(&mut buffer, &Checkpoint::default());
    sealed::seal(
        sealing,
        entropy,
        RecordKind::Log,
        FIRST,
        origin(sealing),
        &mut buffer,
    )
    .map_err(io::Error::other)?;
    file.write_all_at(&buffer, 0)?;
    file.sync_data()?;
    fs.sync_directory(folder)?;
    header::write(fs, folder, sealing, entropy)
}

/// The first frame's number.
const FIRST: u64 = 1;

fn origin(sealing: &Sealing) -> ChainHash {
    ChainHash::origin("bulkhead log", &sealing.store)
}

fn read_segment(fs: &dyn FileSystem, path: &Path) -> Result<Vec<u8>, OpenError> {
    let io = |source| OpenError::io(path, source);
    let file = fs.open(path, OpenMode::Read).map_err(io)?;
    let bytes = file.len().map_err(io)?;
    if bytes > SEGMENT_BYTES_MAX {
        return Err(OpenError::damaged(
            path,
            SEGMENT_BYTES_MAX,
            "no segment is that large",
        ));
    }
    let mut content = vec![0; usize::try_from(bytes).unwrap_or(0)];
    file.read_exact_at(&mut content, 0).map_err(io)?;
    Ok(content)
}

/// Why a frame is not the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Stop {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the frame does not continue the log")]
    Chain,
    #[error(transparent)]
    Seal(#[from] crate::encryption::OpenError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Order(#[from] OrderError),
    #[error("the segment does not start with how things stood before")]
    Start,
    #[error("a segment is missing, or the one before is damaged")]
    Missing,
}

/// Reads segments in order. All its decisions are about bytes that were read: no I/O.
struct Scan<'a> {
    sealing: &'a Sealing,
    cache_bytes: usize,
    view: View,
    held: VecDeque<(u64, Option<u64>)>,
    /// Segments that are not part of the log.
    stale: Vec<u64>,
    offset: u64,
    next: u64,
    chain: ChainHash,
    tail: FrameRef,
    /// Entries up to this one stand before the first segment that was read.
    before: Option<LogId>,
    /// Why no more was read, and where.
    stop: (u64, u64, Stop),
    /// The same for what stands before the first segment that was read.
    gap: (u64, u64, Stop),
}

impl<'a> Scan<'a> {
    fn new(sealing: &'a Sealing, options: &Options) -> Self {
        Self {
            sealing,
            cache_bytes: options.cache_bytes,
            view: View::default(),
            held: VecDeque::new(),
            stale: Vec::new(),
            offset: 0,
            next: FIRST,
            chain: origin(sealing),
            tail: FrameRef::default(),
            before: None,
            stop: (FIRST, 0, Stop::Missing),
            gap: (FIRST, 0, Stop::Missing),
        }
    }

    /// Reads one segment; false where it is no part of the log.
    fn read(&mut self, segment: u64, bytes: &[u8]) -> bool {
        if let Err(stop) = self.begin(segment, bytes) {
            if segment == self.next || self.held.is_empty() {
                self.stop = (segment, 0, stop);
            }
            self.stale.push(segment);
            return false;
        }
        loop {
            let at = usize::try_from(self.offset).unwrap_or(usize::MAX);
            let rest = bytes.get(at..).unwrap_or_default();
            if let Err(stop) = self.frame(segment, rest) {
                self.stop = (segment, self.offset, stop);
                return true;
            }
        }
    }

    /// Reads a segment's first frame: it continues the log, or a new reading starts at it.
    fn begin(&mut self, segment: u64, bytes: &[u8]) -> Result<(), Stop> {
        let frame = frame::decode(bytes)?;
        if frame.sequence != segment || segment < self.next {
            return Err(Stop::Chain);
        }
        let ops = self.open(&frame)?;
        let [Op::Checkpoint(checkpoint)] = ops[..] else {
            return Err(Stop::Start);
        };
        if segment == self.next && frame.previous != self.chain {
            return Err(Stop::Chain);
        }
        if segment > self.next {
            // Frames are missing before it. If they held anything live, `check` refuses.
            self.stale.extend(self.held.drain(..).map(|(name, _)| name));
            self.view = View::new(checkpoint);
            self.before = checkpoint.last;
            self.gap = match self.stop.2 {
                Stop::Frame(FrameError::Blank) | Stop::Chain => (segment, 0, Stop::Missing),
                _ => self.stop,
            };
        }
        self.held.push_back((segment, None));
        self.offset = 0;
        self.took(segment, &frame);
        Ok(())
    }

    fn frame(&mut self, segment: u64, bytes: &[u8]) -> Result<(), Stop> {
        let frame = frame::decode(bytes)?;
        if (frame.sequence, frame.previous) != (self.next, self.chain) {
            return Err(Stop::Chain);
        }
        let ops = self.open(&frame)?;
        let extent = Extent::of(&ops);
        for op in ops {
            self.view.replay(op)?;
        }
        self.took(segment, &frame);
        self.view.written(extent, self.tail);
        self.view.shrink(self.cache_bytes, None);
        if let Some((_, highest)) = self.held.back_mut() {
            *highest = (*highest).max(extent.highest());
        }
        Ok(())
    }

    fn open(&self, frame: &frame::Frame<'_>) -> Result<Vec<Op>, Stop> {
        let record = sealed::open(self.sealing, RecordKind::Log, frame)?;
        Ok(super::record::ops(&record).collect::<Result<_, _>>()?)
    }

    fn took(&mut self, segment: u64, frame: &frame::Frame<'_>) {
        self.tail = FrameRef {
            first: 0,
            last: 0,
            sequence: frame.sequence,
            segment,
            offset: self.offset,
            bytes: frame.bytes(),
        };
        self.offset += frame.bytes().next_multiple_of(BLOCK_BYTES) as u64;
        self.next = frame.sequence + 1;
        self.chain = frame.next;
    }

    /// Whether what follows the log's end may be cut. `behind` are the last segment and those that are no part of it.
    fn check(&self, folder: &Path, acknowledged: u64, behind: &[(u64, Vec<u8>)]) -> Result<(), OpenError> {
        let damaged = |(segment, offset, stop): (u64, u64, Stop)| {
            let path = folder.join(segment_name(segment));
            Err(OpenError::damaged(&path, offset, stop.to_string()))
        };
        if self.held.is_empty() {
            return damaged(self.stop);
        }
        if self.before.map(|before| before.index) > self.view.now.purged.map(|purged| purged.index) {
            return damaged(self.gap);
        }
        let torn = !matches!(self.stop.2, Stop::Frame(FrameError::Blank) | Stop::Chain);
        if acknowledged >= self.next
            || self.later_frame(behind)
            || (torn && planted(Bug::CallsTornTailDamage))
        {
            return damaged(self.stop);
        }
        Ok(())
    }

    /// Whether a frame that is not older than the log's end stands anywhere behind it.
    fn later_frame(&self, behind: &[(u64, Vec<u8>)]) -> bool {
        behind.iter().enumerate().any(|(number, (_, bytes))| {
            let from = if number == 0 { self.offset } else { 0 };
            let from = usize::try_from(from).unwrap_or(usize::MAX);
            (from..bytes.len())
                .step_by(BLOCK_BYTES)
                .any(|at| frame::decode(&bytes[at..]).is_ok_and(|frame| frame.sequence >= self.next))
        })
    }
}
