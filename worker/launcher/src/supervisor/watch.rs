//! The supervisor's loop: streams into the log, requests answered, the end recorded.

use super::protocol::{FromSupervisor, ToSupervisor};
use super::{Running, count};
use crate::clock;
use crate::connection::Connection;
use crate::log_file::Stream;
use crate::message::{ExitCause, ExitRecord, Limits, MAX_SOCKETS, Refusal, RefusalCode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, openat, renameat};
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, socket_with};
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Launchers connected at once: one, and the next one while the kernel notices that the first is gone.
const MAX_CONNECTIONS: usize = 4;
/// After an alarm the kernel counts its kill a moment later.
const MEMORY_RECHECK: Duration = Duration::from_millis(50);
/// What is left in the pipes after the end is read at once; this bounds a pipe that somebody keeps open.
const DRAIN_AT_MOST: Duration = Duration::from_secs(1);

/// What the loop knows besides the task.
struct Watch {
    task: Running,
    connections: Vec<Connection>,
    kill_at: Option<Duration>,
    recheck_memory: bool,
    open: [bool; 2],
}

/// Watches a task to its end.
pub(super) fn watch(task: Running, launcher: Connection) -> io::Result<()> {
    let mut watch = Watch {
        task,
        connections: vec![launcher],
        kill_at: None,
        recheck_memory: false,
        open: [true; 2],
    };
    while !watch.turn()? {}
    watch.finish()
}

impl Watch {
    /// Waits for something and handles it. True when the task has ended.
    fn turn(&mut self) -> io::Result<bool> {
        let mut waiting = vec![
            PollFd::new(&self.task.process.handle, PollFlags::IN),
            PollFd::new(&self.task.listener, PollFlags::IN),
            PollFd::new(
                &self.task.output,
                if self.open[0] {
                    PollFlags::IN
                } else {
                    PollFlags::empty()
                },
            ),
            PollFd::new(
                &self.task.error,
                if self.open[1] {
                    PollFlags::IN
                } else {
                    PollFlags::empty()
                },
            ),
        ];
        waiting.extend(self.connections.iter().map(|c| PollFd::new(c, PollFlags::IN)));
        if let Some(alarm) = &self.task.memory.alarm {
            waiting.push(PollFd::new(alarm, PollFlags::IN));
        }
        let timeout = self.timeout().map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        match poll(&mut waiting, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(false),
            result => result?,
        };
        let ready: Vec<bool> = waiting.iter().map(|one| !one.revents().is_empty()).collect();
        drop(waiting);

        let connections = self.connections.len();
        for stream in [0, 1] {
            if ready[2 + stream] && self.open[stream] {
                self.open[stream] = self.log_some(stream);
            }
        }
        if self.recheck_memory || ready.get(4 + connections).copied().unwrap_or(false) {
            self.check_memory();
        }
        if self.kill_at.is_some_and(|at| clock::monotonic() >= at) {
            self.kill_at = None;
            self.signal(Signal::KILL);
        }
        for index in (0..connections).rev() {
            if ready[4 + index] && !self.serve(index) {
                self.connections.remove(index);
            }
        }
        if ready[1] {
            self.admit();
        }
        Ok(ready[0])
    }

    fn timeout(&self) -> Option<Duration> {
        let kill = self.kill_at.map(|at| at.saturating_sub(clock::monotonic()));
        let memory = self.recheck_memory.then_some(MEMORY_RECHECK);
        [kill, memory].into_iter().flatten().min()
    }

    /// Moves what a stream has into the log. False at its end.
    fn log_some(&mut self, stream: usize) -> bool {
        let mut buffer = [0; 32 * 1024];
        let (source, kind) = match stream {
            0 => (&mut self.task.output, Stream::Output),
            _ => (&mut self.task.error, Stream::Error),
        };
        match source.read(&mut buffer) {
            Ok(0) => false,
            Ok(read) => {
                self.task.log.append(kind, now_ns(), &buffer[..read]);
                true
            }
            Err(error) => error.kind() == io::ErrorKind::Interrupted,
        }
    }

    /// A task that lost one process to the memory limit is not what was asked for any more: it ends whole.
    fn check_memory(&mut self) {
        if let Some(alarm) = &self.task.memory.alarm
            && !self.recheck_memory
        {
            let _ = rustix::io::read(alarm, &mut [0; 8]); // only resets it
        }
        // Without a kill yet, the kernel may still be choosing; look again soon, once.
        self.recheck_memory = self.task.memory.kills() == 0 && !self.recheck_memory;
        if self.task.memory.kills() > 0 {
            self.signal(Signal::KILL);
        }
    }

    fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.task.process.handle, signal); // gone already is as good
    }

    /// Answers one message. False when the connection is over.
    fn serve(&mut self, index: usize) -> bool {
        match self.connections[index].receive() {
            Ok(Some((ToSupervisor::Stop, _))) => {
                self.signal(Signal::TERM);
                let grace = Duration::from_millis(self.task.assignment.spec.stop_grace_ms);
                self.kill_at.get_or_insert(clock::monotonic() + grace);
                true
            }
            Ok(Some((ToSupervisor::Kill, _))) => {
                self.signal(Signal::KILL);
                true
            }
            Ok(Some((ToSupervisor::Sockets { count }, _))) => match sockets(count) {
                Ok(sockets) => {
                    let borrowed: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
                    self.connections[index]
                        .send(&FromSupervisor::Sockets, &borrowed)
                        .is_ok()
                }
                Err(error) => {
                    let refusal = Refusal::new(RefusalCode::Busy, format!("could not make sockets: {error}"));
                    self.connections[index]
                        .send(&FromSupervisor::NoSockets(refusal), &[])
                        .is_ok()
                }
            },
            Ok(Some((ToSupervisor::Start(_), _)) | None) => false,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }

    /// Lets a launcher in: root, as the folder of the socket already says.
    fn admit(&mut self) {
        let Ok(socket) = accept_with(&self.task.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        else {
            return;
        };
        let root = rustix::net::sockopt::socket_peercred(&socket).is_ok_and(|peer| peer.uid.is_root());
        if let (true, Ok(connection)) = (root, Connection::from_descriptor(socket)) {
            self.connections.truncate(MAX_CONNECTIONS - 1);
            self.connections.push(connection);
        }
    }

    /// Records the end: first the log's rest, then the record, then whoever listens.
    fn finish(mut self) -> io::Result<()> {
        let deadline = clock::monotonic() + DRAIN_AT_MOST;
        for stream in [0, 1] {
            while self.open[stream] && clock::monotonic() < deadline {
                let source = if stream == 0 {
                    self.task.output.as_fd()
                } else {
                    self.task.error.as_fd()
                };
                let left = Timespec {
                    tv_sec: 0,
                    tv_nsec: 100_000_000,
                };
                let readable = poll(&mut [PollFd::new(&source, PollFlags::IN)], Some(&left))? > 0;
                self.open[stream] = readable && self.log_some(stream);
            }
        }
        self.task.log.finish(now_ns());
        let status = waitid(
            WaitId::PidFd(self.task.process.handle.as_fd()),
            WaitIdOptions::EXITED,
        )?;
        let spec = &self.task.assignment.spec;
        let killed_for_memory = self.task.memory.kills() > 0;
        let refused_processes = count(self.task.pids_events.as_ref(), "max ");
        let record = record(
            status.as_ref(),
            killed_for_memory,
            refused_processes,
            &spec.limits,
        );
        write_record(&self.task.folder, &record)?;
        for connection in &self.connections {
            let _ = connection.send(&FromSupervisor::Exited(record.clone()), &[]); // else the file tells
        }
        Ok(())
    }
}

fn now_ns() -> u64 {
    u64::try_from(clock::wall().as_nanos()).unwrap_or(u64::MAX)
}

/// Sockets in this process's network, which is the task's.
fn sockets(count: u32) -> io::Result<Vec<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let one = || Ok(socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?);
    (0..count.min(MAX_SOCKETS)).map(|_| one()).collect()
}

/// What is recorded of an end, in words that name the flag to change.
fn record(
    status: Option<&WaitIdStatus>,
    out_of_memory: bool,
    refused_processes: u64,
    limits: &Limits,
) -> ExitRecord {
    let cause = match status.map(|s| (s.exit_status(), s.terminating_signal())) {
        Some((Some(code), _)) => ExitCause::Code(code),
        Some((None, Some(signal))) => ExitCause::Signal(signal),
        _ => ExitCause::Lost,
    };
    let mut message = match cause {
        ExitCause::Code(code) => format!("exited with code {code}"),
        ExitCause::Signal(signal) => format!("killed by signal {signal}"),
        ExitCause::NeverRan | ExitCause::Lost => "its end was not seen".to_owned(),
    };
    if out_of_memory {
        let mib = limits.memory_bytes >> 20;
        message = format!(
            "out of memory: it needed more than its limit of {mib} MiB; raise it with --limit-memory"
        );
    } else if refused_processes > 0 && cause != ExitCause::Code(0) {
        message += &format!(
            "; it had reached its limit of {} processes, raise it with --limit-pids",
            limits.pids
        );
    }
    ExitRecord {
        cause,
        out_of_memory,
        ended_at_ms: clock::wall_ms(),
        message,
    }
}

fn write_record(folder: &OwnedFd, record: &ExitRecord) -> io::Result<()> {
    let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(folder, "exit.draft", flags, Mode::from_raw_mode(0o600))?;
    serde_json::to_writer(std::fs::File::from(file), record)?;
    renameat(folder, "exit.draft", folder, "exit")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_for_want_of_memory_names_the_flag() {
        let message = record(None, true, 0, &Limits::default()).message;
        assert!(
            message.contains("256 MiB") && message.contains("--limit-memory"),
            "{message}"
        );
    }

    #[test]
    fn an_end_at_the_process_limit_names_the_flag() {
        let message = record(None, false, 3, &Limits::default()).message;
        assert!(
            message.contains("512 processes") && message.contains("--limit-pids"),
            "{message}"
        );
    }
}
