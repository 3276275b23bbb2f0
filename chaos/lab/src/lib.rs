//! A cluster of real programs on this machine: started, joined, killed, started again, and removed whatever happens.
//!
//! Managers run as users of their own without any privilege, workers under the launcher's root, each on an address of its
//! own, as the tour and an operator start them. Everything lies in one folder.

pub mod client;
pub mod clock;
pub mod descriptors;
mod groups;
mod machine;
pub mod namespace;
pub mod scan;
pub mod system;
#[cfg(test)]
mod testing;

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bulkhead_identity::local;
use bulkhead_proto::wire::local_client::LocalClient;
use bulkhead_proto::wire::{
    ClusterStatus, GetClusterStatusRequest, GetLocalStatusRequest, ListRequest, Node, NodeStatus, Role,
};
use futures::future::try_join_all;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use tokio::time::Instant;

use client::{Control, Operator, until};
pub use groups::{claims_of, groups_of, remove_claims, remove_groups};
pub use machine::{Machine, send, supervisors};
use namespace::{Namespace, Switch};

/// Everything that is waited for comes far sooner; what takes longer is an error.
const WAIT: Duration = Duration::from_secs(30);
/// How long programs get to end when they are asked to.
const GRACE: Duration = Duration::from_secs(8);
/// The first manager's user; nobody's account.
const FIRST_UID: u32 = 77_001;
/// The port of every manager.
pub const PORT: u16 = 7443;

/// Where programs are and where the cluster lies.
#[derive(Debug, Clone)]
pub struct Place {
    /// The folder of the programs.
    pub programs: PathBuf,
    /// Where the cluster's own folder is made.
    pub below: PathBuf,
    /// How that begins.
    pub prefix: &'static str,
    /// How its nodes reach each other.
    pub network: Network,
    /// Bytes of each manager's disk, which is in memory then; nothing: folders on the disk.
    pub disk: Option<u64>,
}

/// How nodes reach each other.
#[derive(Debug, Clone)]
pub enum Network {
    /// Each on an address of this machine's loopback device, below these three numbers.
    Loopback(String),
    /// Each in a network namespace of its own.
    Namespaces(Arc<Switch>),
}

impl Network {
    fn address(&self, host: u8) -> String {
        match self {
            Self::Loopback(subnet) => format!("{subnet}.{host}:{PORT}"),
            Self::Namespaces(switch) => format!("{}:{PORT}", switch.address(host)),
        }
    }

    fn namespace(&self, host: u8) -> anyhow::Result<Option<Arc<Namespace>>> {
        match self {
            Self::Loopback(_) => Ok(None),
            Self::Namespaces(switch) => switch.connect(host).map(Some),
        }
    }
}

impl Place {
    /// A program of this build.
    pub fn program(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.programs.join(name);
        anyhow::ensure!(
            path.is_file(),
            "{} is not there: run `make`, or name the programs' folder with --bin",
            path.display()
        );
        Ok(path)
    }
}

/// A cluster. Dropping it ends and removes all of it.
#[derive(Debug)]
pub struct Lab {
    place: Place,
    folder: tempfile::TempDir,
    pub managers: Vec<Machine>,
    pub workers: Vec<Machine>,
    operator: Option<Operator>,
}

impl Lab {
    /// Starts so many programs, makes and joins the cluster, and waits until all of it is ready. Gives how long that
    /// took, from the start of the first program.
    pub async fn up(place: &Place, managers: u8, workers: u8) -> anyhow::Result<(Self, Duration)> {
        if workers > 0 && !geteuid().is_root() {
            bail!("workers set up namespaces and control groups, which needs root");
        }
        let folder = tempfile::Builder::new()
            .prefix(place.prefix)
            .tempdir_in(&place.below)
            .with_context(|| format!("could not make a folder below {}", place.below.display()))?;
        // Every node's user must be able to reach what is its own in it.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711))?;
        let place = Place {
            below: folder.path().to_owned(),
            ..place.clone()
        };
        let mut lab = Self {
            managers: Vec::new(),
            workers: Vec::new(),
            operator: None,
            place,
            folder,
        };
        for number in 1..=managers {
            lab.managers.push(lab.machine(Role::Manager, number, number)?);
        }
        for number in 1..=workers {
            lab.workers
                .push(lab.machine(Role::Worker, number, managers + number)?);
        }
        let start = Instant::now();
        for machine in lab.managers.iter_mut().chain(&mut lab.workers) {
            machine.start(&lab.place)?;
        }
        lab.form().await?;
        lab.ready().await?;
        Ok((lab, start.elapsed()))
    }

    fn machine(&self, role: Role, number: u8, host: u8) -> anyhow::Result<Machine> {
        let noun = match role {
            Role::Manager => "manager",
            _ => "worker",
        };
        let name = format!("{noun}-{number}");
        let folder = self.path().join(&name);
        let mut uid = None;
        if role == Role::Manager {
            fs::DirBuilder::new().mode(0o700).create(&folder)?;
            if geteuid().is_root() {
                let own = FIRST_UID + u32::from(number);
                if let Some(bytes) = self.place.disk {
                    let options = format!("size={bytes},mode=0700");
                    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
                    mount(Some("tmpfs"), &folder, Some("tmpfs"), flags, Some(&*options))
                        .with_context(|| format!("no disk in memory for {name}"))?;
                }
                chown(&folder, Some(own), Some(own))?;
                uid = Some(own);
            }
        }
        Ok(Machine {
            address: self.place.network.address(host),
            namespace: self.place.network.namespace(host)?,
            name,
            role,
            folder,
            uid,
            child: None,
        })
    }

    /// The folder that holds everything of it.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// `init` at the first manager, tickets, and all joins at once.
    async fn form(&mut self) -> anyhow::Result<()> {
        let (first, others) = self.managers.split_first().context("no manager")?;
        listens(first).await?;
        let address = first.address.clone();
        let socket = first.socket();
        let socket = socket.to_string_lossy();
        let init = ["cluster", "init", "--socket", &*socket, "--listen", &address];
        let named = ["--advertise", &address, "--name", &first.name, "--lab"];
        self.bulkhead(&[&init[..], &named].concat()).await?;
        let key = self.path().join("config/bulkhead/contexts/default/key");
        let operator = Operator::load(&key)?;

        let mut joins = Vec::new();
        for (role, machines) in [("manager", others), ("worker", &self.workers)] {
            if machines.is_empty() {
                continue;
            }
            let ticket = self.ticket(role, machines.len()).await?;
            let file = self.path().join(format!("{role}.ticket"));
            fs::write(&file, ticket)?;
            for machine in machines {
                joins.push(self.join(machine, file.clone(), &address));
            }
        }
        try_join_all(joins).await?;
        self.operator = Some(operator);
        Ok(())
    }

    async fn join(&self, machine: &Machine, ticket: PathBuf, to: &str) -> anyhow::Result<()> {
        listens(machine).await?;
        let (socket, ticket) = (machine.socket(), ticket.to_string_lossy().into_owned());
        let socket = socket.to_string_lossy();
        let mut line = vec!["cluster", "join", "--socket", &*socket, "--ticket-file", &ticket];
        if machine.role == Role::Manager {
            line.extend(["--listen", &machine.address, "--advertise", &machine.address]);
            line.extend(["--name", &machine.name]);
        }
        line.push(to);
        self.bulkhead(&line).await.map(drop)
    }

    /// What it was made of.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Runs the command line of this cluster's operator; its output.
    ///
    /// # Errors
    /// Where the command fails: with what it said.
    pub async fn bulkhead(&self, line: &[&str]) -> anyhow::Result<String> {
        let output = tokio::process::Command::new(self.place.program("bulkhead")?)
            .args(line)
            .env("XDG_CONFIG_HOME", self.path().join("config"))
            .env_remove("BULKHEAD_CONTEXT")
            .env_remove("BULKHEAD_SOCKET")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await?;
        anyhow::ensure!(
            output.status.success(),
            "`bulkhead {}` failed: {}",
            line.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// A ticket for so many nodes.
    pub async fn ticket(&self, role: &str, uses: usize) -> anyhow::Result<String> {
        let uses = uses.to_string();
        let line = [
            "cluster", "ticket", "create", "--role", role, "--uses", &uses, "-q",
        ];
        self.bulkhead(&line).await
    }

    /// The image of the probe, stored under this name.
    pub async fn pack_probe(&self, tag: &str) -> anyhow::Result<()> {
        let probe = self.place.program("bulkhead-probe")?;
        let entry = "/bin/bulkhead-probe";
        let line = ["image", "pack", &probe.to_string_lossy(), "-t", tag];
        let entry = ["--entrypoint", entry, "--entrypoint", "serve"];
        self.bulkhead(&[&line[..], &entry].concat()).await.map(drop)
    }

    pub fn operator(&self) -> anyhow::Result<&Operator> {
        self.operator.as_ref().context("the cluster is not made yet")
    }

    /// Every manager is fresh and votes, and the workers are ready.
    pub async fn ready(&self) -> anyhow::Result<()> {
        let operator = self.operator()?;
        let count = self.managers.len();
        for manager in &self.managers {
            let mut control = operator.control(&manager.address)?;
            until(&format!("{} is ready", manager.name), WAIT, async || {
                let Ok(status) = status(&mut control).await else {
                    return false;
                };
                let voters = status.members.iter().filter(|member| member.voter).count();
                !status.stale && voters == count && status.leader_member != 0
            })
            .await?;
        }
        let up = self.workers.iter().filter(|worker| worker.is_up()).count();
        let mut control = operator.control(&self.managers[0].address)?;
        until("the workers are ready", WAIT, async || {
            nodes(&mut control).await.is_ok_and(|nodes| {
                let ready = nodes
                    .iter()
                    .filter(|node| node.role() == Role::Worker && node.status() == NodeStatus::Ready);
                ready.count() == up
            })
        })
        .await
    }

    /// The position of the manager that leads.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        let operator = self.operator()?;
        let end = Instant::now() + WAIT;
        while Instant::now() < end {
            for manager in self.managers.iter().filter(|manager| manager.is_up()) {
                let Ok(status) = status(&mut operator.control(&manager.address)?).await else {
                    continue;
                };
                let leader = status.members.iter().find(|member| member.leader);
                let at = self
                    .managers
                    .iter()
                    .position(|it| leader.is_some_and(|leader| leader.address == it.address) && it.is_up());
                if let Some(at) = at.filter(|_| !status.stale) {
                    return Ok(at);
                }
            }
        }
        bail!("no manager leads")
    }

    /// Connections that stand, to every manager but one.
    pub async fn others(&self, than: usize) -> anyhow::Result<Vec<Control>> {
        let mut others = Vec::new();
        for (at, manager) in self.managers.iter().enumerate() {
            if at != than {
                let mut control = self.operator()?.control(&manager.address)?;
                status(&mut control).await?;
                others.push(control);
            }
        }
        Ok(others)
    }

    /// Starts a node's program again and waits until the cluster is whole; how long the program itself took to be ready.
    pub async fn revive(&mut self, role: Role, at: usize) -> anyhow::Result<Duration> {
        let place = self.place.clone();
        let machines = match role {
            Role::Manager => &mut self.managers,
            _ => &mut self.workers,
        };
        let start = Instant::now();
        machines[at].start(&place)?;
        let machine = &machines[at];
        until(&format!("{} is ready", machine.name), WAIT, async || {
            let mut local = LocalClient::new(local::connect(&machine.socket()));
            let asked = local.get_status(GetLocalStatusRequest {}).await;
            asked.is_ok_and(|status| status.get_ref().ready)
        })
        .await?;
        let took = start.elapsed();
        self.ready().await?;
        Ok(took)
    }

    /// Ends what runs, asked first, and what is left of it.
    fn end(&mut self) {
        let mut all: Vec<&mut Machine> = self.workers.iter_mut().chain(&mut self.managers).collect();
        for machine in &mut all {
            if let Ok(pid) = machine.pid() {
                send(pid, Signal::SIGTERM);
            }
        }
        let end = Instant::now() + GRACE;
        for machine in all {
            let Some(mut child) = machine.child.take() else {
                continue;
            };
            while let Ok(None) = child.try_wait() {
                if Instant::now() >= end {
                    let _ = child.kill(); // it ended just now, or it does now
                    let _ = child.wait();
                    break;
                }
                #[expect(clippy::disallowed_methods, reason = "a destructor cannot await")]
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        // Tasks outlive their launcher on purpose. Their supervisors hold this folder open.
        for pid in machine::supervisors(self.path()) {
            send(pid, Signal::SIGKILL);
        }
        for worker in &self.workers {
            remove_groups(&worker.folder);
        }
        remove_claims(self.path());
        if self.place.disk.is_some() {
            for manager in &self.managers {
                let _ = umount2(&manager.folder, MntFlags::MNT_DETACH); // it was not mounted yet, then
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.end();
    }
}

async fn listens(machine: &Machine) -> anyhow::Result<()> {
    let socket = machine.socket();
    until(
        &format!("{} waits on its socket", machine.name),
        WAIT,
        async || socket.exists(),
    )
    .await
}

/// What the cluster says of itself.
pub async fn status(control: &mut Control) -> Result<ClusterStatus, tonic::Status> {
    let mut request = tonic::Request::new(GetClusterStatusRequest {});
    request.set_timeout(Duration::from_secs(1));
    Ok(control.get_cluster_status(request).await?.into_inner())
}

/// Its nodes.
pub async fn nodes(control: &mut Control) -> Result<Vec<Node>, tonic::Status> {
    Ok(control
        .list_nodes(ListRequest::default())
        .await?
        .into_inner()
        .nodes)
}
