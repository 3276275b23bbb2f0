//! One node's program: started, asked to end, killed, stopped for a while.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use anyhow::Context as _;
use bulkhead_proto::wire::Role;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::until;
use crate::namespace::Namespace;
use crate::{Place, WAIT, system};

/// One node: a program, its folder and address.
#[derive(Debug)]
pub struct Machine {
    /// As the cluster knows it.
    pub name: String,
    /// IP and port.
    pub address: String,
    /// What the cluster has it do.
    pub role: Role,
    /// What it keeps.
    pub folder: PathBuf,
    pub(crate) uid: Option<u32>,
    pub(crate) child: Option<Child>,
    /// Its network; the machine's own where there is none.
    pub(crate) namespace: Option<Arc<Namespace>>,
}

impl Machine {
    /// The program's process: of a worker, the launcher's.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn pid(&self) -> anyhow::Result<u32> {
        let child = self.child.as_ref();
        Ok(child.with_context(|| format!("{} does not run", self.name))?.id())
    }

    /// Whether it was started and not ended since by this program.
    pub fn is_up(&self) -> bool {
        self.child.is_some()
    }

    /// Its local socket.
    pub fn socket(&self) -> PathBuf {
        match self.role {
            Role::Manager => self.folder.join("manager.sock"),
            _ => self.folder.join("worker/worker.sock"),
        }
    }

    /// The program in the worker's place that the launcher started.
    ///
    /// # Errors
    /// Where there is none.
    pub fn agent(&self) -> anyhow::Result<u32> {
        let below = system::tree(self.pid()?);
        let is_agent = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "bulkhead-worker")
        };
        below
            .into_iter()
            .find(is_agent)
            .with_context(|| format!("{} has no worker", self.name))
    }

    /// The network that it is in; nothing: this machine's own.
    pub fn namespace(&self) -> Option<&Arc<Namespace>> {
        self.namespace.as_ref()
    }

    /// Starts its program, whose output goes into a log beside its folder.
    ///
    /// # Errors
    /// Where the program is missing or does not start.
    pub fn start(&mut self, place: &Place) -> anyhow::Result<()> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(place.below.join(format!("{}.log", self.name)))?;
        let mut command = match self.role {
            Role::Manager => {
                let mut command = Command::new(place.program("bulkhead-manager")?);
                command.arg("--data").arg(&self.folder);
                command
            }
            _ => {
                let mut command = Command::new(place.program("bulkhead-launcher")?);
                let ip = self.address.split(':').next().unwrap_or_default();
                command.arg("--data").arg(&self.folder);
                command.args(["--", "--publish-address", ip, "--name", &self.name]);
                command
            }
        };
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        command
            // Not in this program's group: an interrupt from the terminal is for this one, which then ends them in order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = match &self.namespace {
            Some(namespace) => namespace.run(|| command.spawn()),
            None => command.spawn(),
        };
        self.child = Some(child.with_context(|| format!("could not start {}", self.name))?);
        Ok(())
    }

    /// Asks it to end, and waits until it did.
    ///
    /// # Errors
    /// Where it does not run, or does not end.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        send(self.pid()?, Signal::SIGTERM);
        if let Some(mut child) = self.child.take() {
            until(&format!("{} ends", self.name), WAIT, async || {
                matches!(child.try_wait(), Ok(Some(_)))
            })
            .await?;
        }
        Ok(())
    }

    /// How its program ended, where it did so by itself; it is down then.
    ///
    /// # Errors
    /// Where the system does not say.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else {
            return Ok(None);
        };
        let status = child.try_wait()?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status)
    }

    /// Every process of the node: its program, what is below it, and the tasks that outlived an earlier one.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn processes(&self) -> anyhow::Result<Vec<u32>> {
        let mut pids = system::tree(self.pid()?);
        for supervisor in supervisors(&self.folder) {
            pids.extend(system::tree(supervisor));
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Stops all of the node for a while, or lets it go on.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        for pid in self.processes()? {
            send(pid, signal);
        }
        Ok(())
    }

    /// Ends it as a loss of power does: the program, everything below it and its tasks, at once.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::SIGKILL)?;
        if let Some(mut child) = self.child.take() {
            child.wait()?;
        }
        Ok(())
    }
}

/// Sends a signal to a process, which may have ended already.
pub fn send(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid.cast_signed()), signal); // to nobody, then
}

/// The supervisors of the tasks below a folder: they outlive their launcher on purpose, and hold the folder open.
pub fn supervisors(folder: &Path) -> Vec<u32> {
    let holds = |pid: &u32| {
        // By its first word: it is executed from memory, and newer kernels (since 6.14) name it after that.
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if words.split(|byte| *byte == 0).next() != Some(b"bulkhead-supervisor") {
            return false;
        }
        let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return false;
        };
        open.flatten()
            .any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(folder)))
    };
    system::processes().into_iter().filter(holds).collect()
}
