//! The worker as a child: started with one socket and hardly a right, started again when it ends.

use crate::connection::Connection;
use crate::sandbox::{capabilities, sys};
use rustix::process::{Signal, pidfd_send_signal};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// First and longest wait before a worker is started again.
const WAITS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A worker that ran this long had started well.
const RAN_WELL: Duration = Duration::from_secs(10);

/// How the worker is started.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    /// The arguments of the first stage: program, user, then the worker's own arguments.
    argv: Vec<CString>,
    env: Vec<CString>,
}

impl WorkerCommand {
    /// The worker `program` on folder `data` as `uid`, with further arguments.
    pub fn new(
        program: &Path,
        data: &Path,
        uid: u32,
        extra: &[String],
        env: &[(String, String)],
    ) -> io::Result<Self> {
        let text = |bytes: &[u8]| CString::new(bytes).map_err(io::Error::from);
        let mut argv = vec![
            CString::from(c"bulkhead-run-worker"),
            text(uid.to_string().as_bytes())?,
        ];
        argv.push(text(program.as_os_str().as_bytes())?);
        argv.extend([CString::from(c"--data"), text(data.as_os_str().as_bytes())?]);
        argv.extend([
            CString::from(c"--launcher-fd"),
            text(sys::CHANNEL.to_string().as_bytes())?,
        ]);
        for one in extra {
            argv.push(text(one.as_bytes())?);
        }
        let env = env
            .iter()
            .map(|(name, value)| text(format!("{name}={value}").as_bytes()));
        Ok(WorkerCommand {
            argv,
            env: env.collect::<Result<_, _>>()?,
        })
    }
}

/// The stage between launcher and worker: gives up privileges, then becomes the worker. Returns only
/// when that failed.
pub fn become_worker(arguments: &[CString], env: &[CString]) -> io::Result<()> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
    let uid = arguments
        .get(1)
        .and_then(|text| text.to_str().ok()?.parse().ok())
        .ok_or_else(wrong)?;
    let command = arguments
        .get(2..)
        .filter(|rest| !rest.is_empty())
        .ok_or_else(wrong)?;
    capabilities::become_worker(uid, uid).map_err(|error| {
        let what = format!("could not become user {uid}, which takes CAP_SETUID and CAP_SETGID: {error}");
        io::Error::new(error.kind(), what)
    })?;
    // Without its launcher a worker is in the way of the next one.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    sys::default_sigpipe();
    let Err(error) = nix::unistd::execve(&command[0], command, env);
    Err(error.into())
}

/// The worker's life.
#[derive(Debug)]
pub struct WorkerProcess {
    command: WorkerCommand,
    running: Option<(sys::Process, Duration)>,
    wait: Duration,
    start_at: Duration,
}

impl WorkerProcess {
    /// To be started at once.
    pub fn new(command: WorkerCommand) -> WorkerProcess {
        WorkerProcess {
            command,
            running: None,
            wait: WAITS.0,
            start_at: Duration::ZERO,
        }
    }

    /// Starts the worker when it is time, and gives the launcher's end of its socket.
    pub fn start_if_due(&mut self, program: BorrowedFd<'_>, now: Duration) -> io::Result<Option<Connection>> {
        if self.running.is_some() || now < self.start_at {
            return Ok(None);
        }
        let (ours, theirs) = Connection::pair()?;
        let process = sys::spawn(program, theirs.as_fd(), &self.command.argv, &self.command.env)?;
        tracing::info!(pid = process.pid, "worker started");
        self.running = Some((process, now));
        Ok(Some(ours))
    }

    /// How long until it is due.
    pub fn due_in(&self, now: Duration) -> Option<Duration> {
        self.running.is_none().then(|| self.start_at.saturating_sub(now))
    }

    /// A child ended. True when it was the worker.
    pub fn ended(&mut self, pid: u32, now: Duration) -> bool {
        let Some((_, since)) = self.running.take_if(|(process, _)| process.pid == pid) else {
            return false;
        };
        (self.wait, self.start_at) = next_start(self.wait, now.saturating_sub(since), now);
        tracing::warn!(pid, "worker ended");
        true
    }

    /// Sends the worker a signal, if it runs. `false` when that is not allowed: a launcher in a container may not
    /// signal another user's process; then closing its socket has to do.
    pub fn signal(&self, signal: Signal) -> bool {
        let sent = self
            .running
            .as_ref()
            .map(|(process, _)| pidfd_send_signal(&process.handle, signal));
        sent != Some(Err(rustix::io::Errno::PERM))
    }

    /// Whether it runs.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }
}

/// The next wait and the time to start at: doubling while it keeps failing.
fn next_start(wait: Duration, ran: Duration, now: Duration) -> (Duration, Duration) {
    let wait = if ran >= RAN_WELL { WAITS.0 } else { wait };
    ((wait * 2).min(WAITS.1), now + wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_until_it_runs_well() {
        let (mut wait, mut at) = (WAITS.0, Duration::ZERO);
        let mut waits = Vec::new();
        for _ in 0..8 {
            let now = at;
            (wait, at) = next_start(wait, Duration::from_secs(1), now);
            waits.push((at - now).as_millis());
        }
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        let (_, at) = next_start(wait, RAN_WELL, Duration::ZERO);
        assert_eq!(at, WAITS.0);
    }
}
