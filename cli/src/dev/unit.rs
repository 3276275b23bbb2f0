//! What a service manager is on a real machine: runs one node's program, and again when it ends.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use super::group::Group;
use super::layout::{Folder, Kind, Node, unusable};
use crate::refusal::{Code, Exit, Refusal};

/// First and longest wait before a program is started again.
const WAITS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A program that ran this long had started well.
const RAN_WELL: Duration = Duration::from_secs(10);
/// Exit codes of a manager that starting it again does not mend: a damaged store, and a wrong configuration.
const FINAL: [i32; 2] = [65, 78];

/// The programs, which lie beside this one.
pub(super) fn program(name: &str) -> Result<PathBuf, Refusal> {
    let own = std::env::current_exe()
        .map_err(|e| Refusal::new(Code::DevFailed, "programs", e.to_string(), "is /proc mounted?"))?;
    let path = own.with_file_name(name);
    if path.is_file() {
        return Ok(path);
    }
    let help = "keep bulkhead, bulkhead-manager, bulkhead-launcher and bulkhead-worker in one folder; 'make' builds them all";
    Err(Refusal::new(
        Code::DevFailed,
        path.display().to_string(),
        "this program is not there",
        help,
    ))
}

/// Starts a node's unit, which outlives this command.
pub(super) fn spawn(folder: &Folder, node: &Node) -> Result<(), Refusal> {
    let log = folder.log(node);
    let output = || {
        std::fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(|e| unusable(&log, &e))
    };
    let own = std::env::current_exe().map_err(|e| unusable(folder.path(), &e))?;
    std::process::Command::new(own)
        .args(["dev", "--dir"])
        .arg(folder.path())
        .args(["unit", &node.name])
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| name == "RUST_LOG"))
        .current_dir("/")
        .stdin(std::process::Stdio::null())
        .stdout(output()?)
        .stderr(output()?)
        .spawn()
        .map(drop) // nobody waits for it: it ends with the node
        .map_err(|e| unusable(folder.path(), &e))
}

/// Runs until asked to end, or until the program ended for good.
pub(super) async fn run(folder: &Folder, name: &str) -> Result<Exit, Refusal> {
    let cluster = folder.cluster()?;
    let node = cluster.node(name)?;
    let failed =
        |e: std::io::Error| Refusal::new(Code::DevFailed, name, e.to_string(), "read the node's log");
    // Away from the terminal of whoever started it.
    nix::unistd::setsid().map_err(|e| failed(e.into()))?;
    Group::at(cluster.group.clone())
        .of(name)
        .enter()
        .map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut wait = WAITS.0;
    loop {
        let started = tokio::time::Instant::now();
        let mut child = command(folder, node)?.spawn().map_err(failed)?;
        let ended = tokio::select! {
            biased;
            _ = terminate.recv() => {
                end(&mut child);
                let _ = child.wait().await; // it ends, or the group is killed
                return Ok(Exit::Done);
            }
            ended = child.wait() => ended.map_err(failed)?,
        };
        eprintln!("unit: {} ended: {ended}", node.kind.program());
        let Some(after) = next_start(ended, started.elapsed(), wait) else {
            return Ok(Exit::Done);
        };
        wait = (after * 2).min(WAITS.1);
        tokio::select! {
            biased;
            _ = terminate.recv() => return Ok(Exit::Done),
            () = tokio::time::sleep(after) => {}
        }
    }
}

/// How long until it is started again; `None` where that would not help.
fn next_start(ended: ExitStatus, ran: Duration, wait: Duration) -> Option<Duration> {
    match ended.code() {
        Some(0) => None,
        Some(code) if FINAL.contains(&code) => None,
        _ if ran >= RAN_WELL => Some(WAITS.0),
        _ => Some(wait),
    }
}

fn end(child: &mut Child) {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    if let Some(pid) = pid {
        // It is this process's own child, and not waited for yet: the number is its own.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
    }
}

fn command(folder: &Folder, node: &Node) -> Result<Command, Refusal> {
    let mut command = Command::new(program(node.kind.program())?);
    command.arg("--data").arg(folder.data(node));
    match node.kind {
        // Setting the user drops the supplementary groups, too.
        Kind::Manager => command.uid(node.uid).gid(node.uid),
        Kind::Standby => command.arg("--standby").uid(node.uid).gid(node.uid),
        Kind::Worker => command
            .args(["--worker-uid", &node.uid.to_string()])
            .args(["--", "--publish-address", &node.address.to_string()])
            .args(["--name", &node.name]),
    };
    Ok(command)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_program_is_started_again_unless_it_ended_for_good() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        let (short, long, wait) = (
            Duration::from_millis(5),
            Duration::from_secs(60),
            Duration::from_secs(1),
        );
        for (ended, ran, want) in [
            (exited(0), long, None),
            (exited(65), long, None),
            (exited(78), short, None),
            (exited(70), short, Some(wait)),
            (exited(74), long, Some(WAITS.0)),
            (ExitStatus::from_raw(9), short, Some(wait)),
        ] {
            assert_eq!(next_start(ended, ran, wait), want, "{ended}");
        }
    }
}
