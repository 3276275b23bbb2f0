//! Reading a task's log: the two bounded files that its supervisor writes, as lines, once or as they grow.

use crate::runtime::{Runtime, RuntimeError};
use bulkhead_launcher::log_file::{DamagedLog, Decoder, HEADER_BYTES, MAGIC, MAX_RECORD_BYTES, Stream};
use bulkhead_launcher::message::TaskId as LaunchId;
use bulkhead_proto::{TaskId, limits, wire};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use tokio::sync::mpsc;

/// How long a line of a followed log may wait to be seen. The files are on this host: looking costs one `pread`.
const FOLLOW_PERIOD: Duration = Duration::from_millis(200);

/// Why a log cannot be read (further).
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The launcher does not give the files.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The files are damaged.
    #[error("the task's log is damaged from here on")]
    Damaged(#[from] DamagedLog),
    /// The disk.
    #[error("the task's log cannot be read")]
    Io(#[from] io::Error),
}

/// One line without its end. Bytes are the task's own: who shows them to a person cleans them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// When its first byte was read from the task, in milliseconds since 1970.
    pub at_ms: i64,
    /// Whether it is from standard error.
    pub stderr: bool,
    /// The bytes.
    pub text: Vec<u8>,
}

impl Line {
    /// As it travels.
    pub fn to_wire(self, task: TaskId) -> wire::LogLine {
        wire::LogLine {
            task_id: task.to_wire(),
            at: self.at_ms,
            stderr: self.stderr,
            text: self.text,
        }
    }
}

/// Which lines are asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    /// Only this many of the newest lines that exist now.
    pub tail: Option<u64>,
    /// Only lines from this time on, in milliseconds since 1970.
    pub since_ms: i64,
    /// Whether to go on with lines as they come.
    pub follow: bool,
}

/// Sends the lines that `query` asks for, in parts. Ends when the log does, when all was sent and nothing is followed, or
/// when the receiver is gone.
pub async fn send(
    runtime: &Runtime,
    task: LaunchId,
    query: Query,
    to: mpsc::Sender<Vec<Line>>,
) -> Result<(), LogError> {
    let mut reader = LogReader::default();
    let mut old = VecDeque::new();
    reader.open(files(runtime, &task).await?)?;
    let mut ended = false;
    loop {
        let (step, lines) = reader.read()?;
        let wanted = lines.into_iter().filter(|line| line.at_ms >= query.since_ms);
        old.extend(wanted);
        if let Some(tail) = query.tail {
            let surplus = old
                .len()
                .saturating_sub(usize::try_from(tail).unwrap_or(usize::MAX));
            old.drain(..surplus);
        }
        match step {
            Step::More => {}
            Step::NextFile => reader.open(files(runtime, &task).await?)?,
            Step::CaughtUp => break,
            Step::End => {
                ended = true;
                break;
            }
        }
    }
    if !query.follow {
        old.extend(reader.unfinished());
    }
    for part in parts(old) {
        if to.send(part).await.is_err() {
            return Ok(());
        }
    }
    while query.follow && !ended {
        let (step, lines) = reader.read()?;
        let lines: VecDeque<_> = lines
            .into_iter()
            .filter(|line| line.at_ms >= query.since_ms)
            .collect();
        for part in parts(lines) {
            if to.send(part).await.is_err() {
                return Ok(());
            }
        }
        match step {
            Step::More => {}
            Step::NextFile => reader.open(files(runtime, &task).await?)?,
            Step::End => ended = true,
            Step::CaughtUp => tokio::select! {
                biased;
                () = to.closed() => return Ok(()),
                () = tokio::time::sleep(FOLLOW_PERIOD) => {}
            },
        }
    }
    Ok(())
}

async fn files(runtime: &Runtime, task: &LaunchId) -> Result<Vec<File>, RuntimeError> {
    Ok(runtime
        .logs(task.clone())
        .await?
        .into_iter()
        .map(File::from)
        .collect())
}

/// Lines in parts that each fit a message.
fn parts(mut lines: VecDeque<Line>) -> impl Iterator<Item = Vec<Line>> {
    const LINE_OVERHEAD: usize = 32;
    std::iter::from_fn(move || {
        let mut part = Vec::new();
        let mut bytes = 0;
        while let Some(line) = lines.front() {
            let size = line.text.len() + LINE_OVERHEAD;
            if !part.is_empty() && bytes + size > limits::CHUNK_BYTES {
                break;
            }
            bytes += size;
            part.extend(lines.pop_front());
        }
        (!part.is_empty()).then_some(part)
    })
}

/// What to do after a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Read again: this read has used its budget.
    More,
    /// All that is written was read.
    CaughtUp,
    /// This file is full; open the files again for the next one.
    NextFile,
    /// The task has ended, and with it the log.
    End,
}

/// Reads a log from file to file. Knows by the files' numbers which it has read, and notes a gap when the log went
/// round while nobody read.
#[derive(Debug, Default)]
pub struct LogReader {
    files: VecDeque<(u64, File)>,
    offset: u64,
    decoder: Decoder,
    next_number: Option<u64>,
    lines: Lines,
}

impl LogReader {
    /// Takes the log's files as they are now, older first; those that were read before are dropped.
    pub fn open(&mut self, files: Vec<File>) -> Result<(), LogError> {
        self.files.clear();
        self.offset = 0;
        self.decoder = Decoder::default();
        for file in files {
            let number = number(&file)?;
            if self.next_number.is_none_or(|next| number >= next) {
                self.files.push_back((number, file));
            }
        }
        if let (Some(next), Some((number, _))) = (self.next_number, self.files.front())
            && *number > next
        {
            self.lines.note(format!(
                "({} log files were overwritten before they were read)",
                number - next
            ));
        }
        Ok(())
    }

    /// Reads on: one budget of bytes, whole lines.
    pub fn read(&mut self) -> Result<(Step, Vec<Line>), LogError> {
        let Some((number, file)) = self.files.front() else {
            // The launcher has not made the next file yet.
            return Ok((
                if self.next_number.is_some() {
                    Step::NextFile
                } else {
                    Step::CaughtUp
                },
                self.lines.take(),
            ));
        };
        let mut buffer = vec![0; limits::CHUNK_BYTES];
        let length = file.read_at(&mut buffer, self.offset)?;
        if length == 0 {
            return Ok((Step::CaughtUp, self.lines.take()));
        }
        self.offset += length as u64;
        let number = *number;
        for record in self.decoder.push(&buffer[..length])? {
            match record.stream {
                Stream::Output => self.lines.add(record.time_ns, false, &record.content),
                Stream::Error => self.lines.add(record.time_ns, true, &record.content),
                Stream::Lost => {
                    let bytes = String::from_utf8_lossy(&record.content).into_owned();
                    self.lines
                        .note(format!("({bytes} bytes of output were lost: the disk was full)"));
                }
                Stream::Continued => {
                    self.files.pop_front();
                    self.next_number = Some(number + 1);
                    self.offset = 0;
                    self.decoder = Decoder::default();
                    let step = if self.files.is_empty() {
                        Step::NextFile
                    } else {
                        Step::More
                    };
                    return Ok((step, self.lines.take()));
                }
                Stream::End => {
                    self.lines.finish();
                    return Ok((Step::End, self.lines.take()));
                }
            }
        }
        Ok((Step::More, self.lines.take()))
    }

    /// What was begun without a line end, for a reader that does not wait for it.
    pub fn unfinished(&mut self) -> Vec<Line> {
        self.lines.finish();
        self.lines.take()
    }
}

fn number(file: &File) -> Result<u64, LogError> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let (magic, number) = header.split_at(MAGIC.len());
    match (magic == MAGIC, number.try_into()) {
        (true, Ok(number)) => Ok(u64::from_le_bytes(number)),
        _ => Err(DamagedLog.into()),
    }
}

/// Makes lines of pieces; the two streams of a task do not mix within a line.
#[derive(Debug, Default)]
struct Lines {
    whole: Vec<Line>,
    begun: [Option<Line>; 2],
    last_ms: i64,
}

impl Lines {
    fn add(&mut self, time_ns: u64, stderr: bool, content: &[u8]) {
        let at_ms = i64::try_from(time_ns / 1_000_000).unwrap_or(i64::MAX);
        self.last_ms = at_ms;
        for piece in content.split_inclusive(|byte| *byte == b'\n') {
            let begun = &mut self.begun[usize::from(stderr)];
            let line = begun.get_or_insert_with(|| Line {
                at_ms,
                stderr,
                text: Vec::new(),
            });
            let (text, ends) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            line.text.extend_from_slice(text);
            // A task that never ends its line must not fill this program's memory.
            if ends || line.text.len() >= MAX_RECORD_BYTES {
                self.whole.extend(begun.take());
            }
        }
    }

    fn note(&mut self, text: String) {
        self.whole.push(Line {
            at_ms: self.last_ms,
            stderr: true,
            text: text.into_bytes(),
        });
    }

    fn finish(&mut self) {
        self.whole.extend(self.begun.iter_mut().filter_map(Option::take));
    }

    fn take(&mut self) -> Vec<Line> {
        std::mem::take(&mut self.whole)
    }
}

#[cfg(test)]
mod tests;
