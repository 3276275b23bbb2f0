//! A task's output on disk: two files that never grow past their bound.
//!
//! The supervisor appends to `current`; when that is full it becomes `previous`, and the old
//! `previous` is gone. A reader holds descriptors, not names: it reads a file to its
//! closing record, which says whether to ask for the next one ([`Stream::Continued`]) or that the
//! task has ended ([`Stream::End`]). A file starts with [`MAGIC`] and its number, so that a reader that was
//! away too long sees the gap. Bytes are the task's own, control characters and all; who shows them to a
//! person cleans them.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

/// How a file starts, followed by its number (u64, little endian).
pub const MAGIC: [u8; 8] = *b"BHLOG-1\n";
/// Bytes before the first record.
pub const HEADER_BYTES: usize = 16;
/// Bytes of one record's content. A longer line is several records, of which the last ends with a newline.
pub const MAX_RECORD_BYTES: usize = 32 * 1024;
const RECORD_HEADER_BYTES: usize = 16;

/// Where a record comes from, or what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The task's standard output.
    Output,
    /// The task's standard error.
    Error,
    /// Output that could not be written down: the content is its length in bytes, in decimal.
    Lost,
    /// The end of this file; more is in the file with the next number.
    Continued,
    /// The end of this file and of the task.
    End,
}

impl Stream {
    const ALL: [Stream; 5] = [
        Stream::Output,
        Stream::Error,
        Stream::Lost,
        Stream::Continued,
        Stream::End,
    ];

    fn code(self) -> u8 {
        match self {
            Stream::Output => 1,
            Stream::Error => 2,
            Stream::Lost => 3,
            Stream::Continued => 4,
            Stream::End => 5,
        }
    }
}

/// One piece of output, as it was written: not always a whole line, sometimes several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it comes from.
    pub stream: Stream,
    /// Nanoseconds since 1970 when the supervisor read it.
    pub time_ns: u64,
    /// The bytes.
    pub content: Vec<u8>,
}

impl Record {
    /// Time (8 bytes), length (4), stream (1), three zeros, content.
    fn encode(stream: Stream, time_ns: u64, content: &[u8]) -> Vec<u8> {
        let length = u32::try_from(content.len()).expect("a record is short");
        let mut bytes = Vec::with_capacity(RECORD_HEADER_BYTES + content.len());
        bytes.extend(time_ns.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend([stream.code(), 0, 0, 0]);
        bytes.extend(content);
        bytes
    }
}

/// The bytes are not a log file's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a log file, or a damaged one")]
pub struct DamagedLog;

/// Turns the bytes of one file, in whatever pieces they are read, into records.
#[derive(Debug, Default)]
pub struct Decoder {
    waiting: Vec<u8>,
    number: Option<u64>,
}

impl Decoder {
    /// The file's number, once its header was read.
    pub fn number(&self) -> Option<u64> {
        self.number
    }

    /// Takes bytes in and gives the records that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Record>, DamagedLog> {
        self.waiting.extend_from_slice(bytes);
        let mut rest = self.waiting.as_slice();
        if self.number.is_none() {
            let Some((header, after)) = rest.split_first_chunk::<HEADER_BYTES>() else {
                return Ok(Vec::new());
            };
            let (magic, number) = header.split_at(MAGIC.len());
            if magic != MAGIC {
                return Err(DamagedLog);
            }
            self.number = Some(u64::from_le_bytes(number.try_into().expect("eight bytes")));
            rest = after;
        }
        let mut records = Vec::new();
        while let Some((header, after)) = rest.split_first_chunk::<RECORD_HEADER_BYTES>() {
            let time_ns = u64::from_le_bytes(header[..8].try_into().expect("eight bytes"));
            let length = u32::from_le_bytes(header[8..12].try_into().expect("four bytes")) as usize;
            let stream = Stream::ALL
                .into_iter()
                .find(|s| s.code() == header[12])
                .ok_or(DamagedLog)?;
            if length > MAX_RECORD_BYTES {
                return Err(DamagedLog);
            }
            let Some((content, after)) = after.split_at_checked(length) else {
                break;
            };
            records.push(Record {
                stream,
                time_ns,
                content: content.to_vec(),
            });
            rest = after;
        }
        self.waiting = rest.to_vec();
        Ok(records)
    }
}

/// The supervisor's side. Writing never fails for the task: what the disk refuses is counted and
/// noted when it takes more again.
#[derive(Debug)]
pub struct LogWriter {
    folder: OwnedFd,
    file: File,
    number: u64,
    written: u64,
    bound: u64,
    lost: u64,
}

impl LogWriter {
    /// Starts a log in `folder`, at most `total` bytes in both files.
    pub fn create(folder: OwnedFd, total: u64) -> io::Result<LogWriter> {
        let file = new_file(&folder, 0)?;
        let bound = (total / 2).max(4 * MAX_RECORD_BYTES as u64);
        Ok(LogWriter {
            folder,
            file,
            number: 0,
            written: HEADER_BYTES as u64,
            bound,
            lost: 0,
        })
    }

    /// Appends what the task wrote.
    pub fn append(&mut self, stream: Stream, time_ns: u64, content: &[u8]) {
        for piece in content.chunks(MAX_RECORD_BYTES) {
            if self.lost > 0 {
                let note = self.lost.to_string();
                if self.write(Stream::Lost, time_ns, note.as_bytes()).is_ok() {
                    self.lost = 0;
                }
            }
            if self.write(stream, time_ns, piece).is_err() {
                self.lost += piece.len() as u64;
            }
        }
    }

    /// Says that nothing more will come.
    pub fn finish(&mut self, time_ns: u64) {
        let _ = self.write(Stream::End, time_ns, &[]); // a full disk; readers also learn of the end otherwise
    }

    fn write(&mut self, stream: Stream, time_ns: u64, content: &[u8]) -> io::Result<()> {
        let bytes = Record::encode(stream, time_ns, content);
        // Room is kept for the closing record.
        if self.written + bytes.len() as u64 + RECORD_HEADER_BYTES as u64 > self.bound {
            self.rotate(time_ns)?;
        }
        if let Err(error) = self.file.write_all(&bytes) {
            // A half-written record would make the rest unreadable.
            self.file.set_len(self.written)?;
            io::Seek::seek(&mut self.file, io::SeekFrom::Start(self.written))?;
            return Err(error);
        }
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn rotate(&mut self, time_ns: u64) -> io::Result<()> {
        rustix::fs::renameat(&self.folder, "current", &self.folder, "previous")?;
        let next = new_file(&self.folder, self.number + 1)?;
        self.file
            .write_all(&Record::encode(Stream::Continued, time_ns, &[]))?;
        self.file = next;
        self.number += 1;
        self.written = HEADER_BYTES as u64;
        Ok(())
    }
}

fn new_file(folder: &OwnedFd, number: u64) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, openat};
    let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = File::from(openat(folder, "current", flags, Mode::from_raw_mode(0o600))?);
    file.write_all(&MAGIC)?;
    file.write_all(&number.to_le_bytes())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn records(path: &std::path::Path) -> (u64, Vec<Record>) {
        let mut decoder = Decoder::default();
        let bytes = fs::read(path).expect("log file");
        let mut records = Vec::new();
        for piece in bytes.chunks(7) {
            records.extend(decoder.push(piece).expect("whole"));
        }
        (decoder.number().expect("header"), records)
    }

    #[test]
    fn output_comes_back_as_it_was_written() {
        let dir = tempfile::tempdir().expect("folder");
        let mut log =
            LogWriter::create(File::open(dir.path()).expect("folder").into(), 1 << 20).expect("log");
        log.append(Stream::Output, 1, b"hello\nwor");
        log.append(Stream::Error, 2, b"\x1b[31moh\x00");
        log.finish(3);
        let (number, records) = records(&dir.path().join("current"));
        let shown: Vec<_> = records
            .iter()
            .map(|r| (r.stream, r.time_ns, r.content.as_slice()))
            .collect();
        assert_eq!(number, 0);
        assert_eq!(
            shown,
            [
                (Stream::Output, 1, &b"hello\nwor"[..]),
                (Stream::Error, 2, b"\x1b[31moh\x00"),
                (Stream::End, 3, b"")
            ]
        );
    }

    #[test]
    fn both_files_stay_within_their_bound() {
        let dir = tempfile::tempdir().expect("folder");
        let total = 1 << 20;
        let mut log = LogWriter::create(File::open(dir.path()).expect("folder").into(), total).expect("log");
        for round in 0..200 {
            log.append(Stream::Output, round, &vec![b'x'; 50_000]);
        }
        let size = |name: &str| fs::metadata(dir.path().join(name)).expect("file").len();
        assert!(size("current") + size("previous") <= total);
        let (old, before) = records(&dir.path().join("previous"));
        let (new, _) = records(&dir.path().join("current"));
        assert_eq!(old + 1, new);
        assert_eq!(before.last().expect("closing record").stream, Stream::Continued);
    }

    #[test]
    fn damage_is_an_error_not_an_allocation() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(&[0; 16]), Err(DamagedLog));
        let mut decoder = Decoder::default();
        decoder.push(&MAGIC).expect("part of a header");
        let mut bytes = vec![0; 8];
        bytes.extend(Record::encode(Stream::Output, 0, b"x"));
        bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decoder.push(&bytes), Err(DamagedLog));
    }
}
