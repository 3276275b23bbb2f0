//! The cluster that is broken: what of it can be reached, and with what hands.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use bulkhead_lab::client::{Managers, Operator};
use bulkhead_lab::namespace::{Namespace, Switch};
use bulkhead_lab::{Lab, Machine, Network, PORT, Place, groups_of, system};
use bulkhead_proto::wire::Role;
use nix::sys::signal::Signal;
use serde::Serialize;

use super::compose::Compose;
use super::dev::Dev;
use super::fault::Fault;
use super::journal::{Journal, Undo};

/// A node, as the driver knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Node {
    /// Its name in the cluster.
    pub(super) name: String,
    /// Whether it is a manager; else it is a worker.
    pub(super) manager: bool,
    /// Its address in the cluster's network.
    pub(super) address: Ipv4Addr,
}

/// Where a cluster is, and how it is made if it is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ground {
    /// Programs of this machine, each node in namespaces of its own.
    Namespaces {
        /// The folder of the programs.
        programs: PathBuf,
        /// How many managers.
        managers: u8,
        /// How many workers.
        workers: u8,
        /// Bytes of each manager's disk, in memory.
        disk: Option<u64>,
    },
    /// Containers of docker-compose.
    Compose {
        /// The compose file.
        file: PathBuf,
        /// A project that runs; nothing: one is made, and removed.
        project: Option<String>,
    },
    /// A cluster that is there, made with `--lab`, by the name of a context.
    Context {
        /// The context's folder.
        folder: PathBuf,
        /// The command line's program.
        program: PathBuf,
    },
}

impl Ground {
    /// Whether a fault can be done to such a cluster at all.
    pub fn can(&self, fault: Fault) -> bool {
        match self {
            Self::Namespaces { .. } => true,
            Self::Compose { .. } => fault != Fault::DiskFull,
            // All its nodes are on one network of this machine, or on others' machines; a service manager is there.
            Self::Context { .. } => matches!(
                fault,
                Fault::Kill
                    | Fault::KillAgent
                    | Fault::Pause
                    | Fault::LoseStore
                    | Fault::ClockAhead
                    | Fault::ClockBehind
                    | Fault::ClockJumps
                    | Fault::NoDescriptors
                    | Fault::Starve
                    | Fault::RotateRoot
                    | Fault::Drain
            ),
        }
    }
}

/// A file on a manager's disk in memory, that leaves no room for others.
const FILLER: &str = "filler";

/// Whoever can be broken.
#[derive(Debug)]
pub(super) enum Cluster {
    Lab { lab: Box<Lab>, nodes: Vec<Node> },
    Compose(Compose),
    Dev(Dev),
}

impl Cluster {
    /// Makes the cluster, or finds it. `below` is where a new one lies.
    pub(super) async fn at(
        ground: &Ground,
        switch: Option<Switch>,
        below: &Path,
        journal: &mut Journal,
    ) -> anyhow::Result<Self> {
        match ground {
            Ground::Namespaces {
                programs,
                managers,
                workers,
                disk,
            } => {
                let switch = switch.context("a cluster in namespaces has a network of its own")?;
                let place = Place {
                    programs: programs.clone(),
                    below: below.to_owned(),
                    prefix: "cluster.",
                    network: Network::Namespaces(Arc::new(switch)),
                    disk: *disk,
                };
                journal.before(Undo::Remove {
                    folder: below.to_owned(),
                })?;
                let (lab, _) = Lab::up(&place, *managers, *workers).await?;
                let nodes = lab.managers.iter().chain(&lab.workers).map(node);
                Ok(Self::Lab {
                    nodes: nodes.collect::<anyhow::Result<_>>()?,
                    lab: Box::new(lab),
                })
            }
            Ground::Compose { file, project } => Ok(Self::Compose(
                Compose::at(file, project.as_deref(), below, journal).await?,
            )),
            Ground::Context { folder, program } => Ok(Self::Dev(Dev::at(folder, program).await?)),
        }
    }

    /// Its nodes, managers first.
    pub(super) fn nodes(&self) -> &[Node] {
        match self {
            Self::Lab { nodes, .. } => nodes,
            Self::Compose(compose) => &compose.nodes,
            Self::Dev(dev) => &dev.nodes,
        }
    }

    /// How many of them are managers.
    pub(super) fn managers(&self) -> usize {
        self.nodes().iter().filter(|node| node.manager).count()
    }

    /// Who commands it.
    fn operator(&self) -> anyhow::Result<Operator> {
        match self {
            Self::Lab { lab, .. } => lab.operator().cloned(),
            Self::Compose(compose) => Ok(compose.operator.clone()),
            Self::Dev(dev) => Ok(dev.operator.clone()),
        }
    }

    /// Where a manager's control service is, from here.
    fn endpoint(&self, manager: usize) -> String {
        match self {
            Self::Dev(dev) => dev.endpoint(manager),
            _ => format!("{}:{PORT}", self.nodes()[manager].address),
        }
    }

    /// Connections of a client of its own to each manager.
    pub(super) fn client(&self) -> anyhow::Result<Managers> {
        let endpoints = (0..self.managers()).map(|at| self.endpoint(at));
        Managers::new(self.operator()?, endpoints.collect())
    }

    /// Runs `bulkhead` as its operator.
    pub(super) async fn bulkhead(&self, words: &[&str]) -> anyhow::Result<String> {
        match self {
            Self::Lab { lab, .. } => lab.bulkhead(words).await,
            Self::Compose(compose) => compose.bulkhead(words).await,
            Self::Dev(dev) => dev.bulkhead(words).await,
        }
    }

    /// Stores the probe as an image.
    pub(super) async fn pack_probe(&self, tag: &str) -> anyhow::Result<()> {
        let probe = match self {
            Self::Lab { lab, .. } => return lab.pack_probe(tag).await,
            Self::Compose(_) => "/bin/bulkhead-probe".to_owned(),
            Self::Dev(dev) => dev.beside("bulkhead-probe").display().to_string(),
        };
        let entry = ["--entrypoint", "/bin/bulkhead-probe", "--entrypoint", "serve"];
        let line = ["image", "pack", &probe, "-t", tag];
        self.bulkhead(&[&line[..], &entry].concat()).await.map(drop)
    }

    fn machine(&mut self, at: usize) -> Option<(&mut Machine, Place)> {
        let Self::Lab { lab, .. } = self else {
            return None;
        };
        let place = lab.place().clone();
        let place = Place {
            below: lab.path().to_owned(),
            ..place
        };
        let machine = lab.managers.iter_mut().chain(&mut lab.workers).nth(at)?;
        Some((machine, place))
    }

    /// Kills all of a node.
    pub(super) async fn kill(&mut self, at: usize, journal: &mut Journal) -> anyhow::Result<Option<usize>> {
        if let Some((machine, _)) = self.machine(at) {
            return machine.kill().map(|()| None);
        }
        match self {
            Self::Compose(compose) => compose.kill(at, journal).await.map(Some),
            Self::Dev(dev) => dev.kill(at, journal).await.map(Some),
            Self::Lab { .. } => unreachable_node(at),
        }
    }

    /// Asks a node's program to end; it need not have when this returns.
    pub(super) async fn stop(&mut self, at: usize, journal: &mut Journal) -> anyhow::Result<Option<usize>> {
        if let Some((machine, _)) = self.machine(at) {
            bulkhead_lab::send(machine.pid()?, Signal::SIGTERM);
            return Ok(None);
        }
        match self {
            Self::Compose(compose) => compose.stop(at, journal).await.map(Some),
            Self::Dev(_) => {
                bail!("a node of a local cluster starts again by itself when it is asked to stop")
            }
            Self::Lab { .. } => unreachable_node(at),
        }
    }

    /// Starts a node that was killed or stopped.
    pub(super) async fn start(&mut self, at: usize) -> anyhow::Result<()> {
        if let Some((machine, place)) = self.machine(at) {
            if machine.is_up() {
                machine.stop().await?;
            }
            return machine.start(&place);
        }
        match self {
            Self::Compose(compose) => compose.start(at).await,
            Self::Dev(dev) => dev.start(at).await,
            Self::Lab { .. } => unreachable_node(at),
        }
    }

    /// Has a node stand still.
    pub(super) async fn pause(&mut self, at: usize, journal: &mut Journal) -> anyhow::Result<Option<usize>> {
        if let Some((machine, _)) = self.machine(at) {
            return machine.signal(Signal::SIGSTOP).map(|()| None);
        }
        match self {
            Self::Compose(compose) => compose.pause(at, journal).await.map(Some),
            Self::Dev(dev) => dev.pause(at, journal).await.map(Some),
            Self::Lab { .. } => unreachable_node(at),
        }
    }

    /// Lets it go on.
    pub(super) async fn resume(&mut self, at: usize) -> anyhow::Result<()> {
        if let Some((machine, _)) = self.machine(at) {
            return machine.signal(Signal::SIGCONT);
        }
        match self {
            Self::Compose(compose) => compose.resume(at).await,
            Self::Dev(dev) => dev.resume(at).await,
            Self::Lab { .. } => unreachable_node(at),
        }
    }

    /// Unplugs a node's network.
    pub(super) async fn disconnect(
        &mut self,
        at: usize,
        journal: &mut Journal,
    ) -> anyhow::Result<Option<usize>> {
        match self {
            Self::Compose(compose) => compose.disconnect(at, journal).await.map(Some),
            _ => {
                self.namespace(at)?
                    .tool(&["ip", "link", "set", "eth0", "down"], "")?;
                Ok(None)
            }
        }
    }

    /// Plugs it in again.
    pub(super) async fn connect(&mut self, at: usize) -> anyhow::Result<()> {
        match self {
            Self::Compose(compose) => compose.connect(at).await,
            _ => self.namespace(at)?.tool(&["ip", "link", "set", "eth0", "up"], ""),
        }
    }

    /// Kills a worker's agent alone.
    pub(super) async fn kill_agent(&mut self, at: usize) -> anyhow::Result<()> {
        let is_agent = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim() == "bulkhead-worker")
        };
        let agent = self.processes(at).into_iter().find(is_agent);
        bulkhead_lab::send(agent.context("the worker has no agent now")?, Signal::SIGKILL);
        Ok(())
    }

    /// Fills a manager's disk, or makes room again.
    pub(super) fn fill(&mut self, at: usize, full: bool) -> anyhow::Result<()> {
        let Some((machine, place)) = self.machine(at) else {
            bail!("only managers of a cluster in namespaces have a disk that can be filled");
        };
        anyhow::ensure!(
            place.disk.is_some(),
            "the managers' disks are this machine's: --plan disk gives them others"
        );
        let filler = machine.folder.join(FILLER);
        if !full {
            return std::fs::remove_file(&filler).context("the disk cannot be emptied");
        }
        let mut file = std::fs::File::create(&filler).context("the disk cannot be filled")?;
        // To the last byte: what a fallocate would leave is room.
        let block = vec![0_u8; 1 << 16];
        for size in [block.len(), 512, 1] {
            while std::io::Write::write_all(&mut file, &block[..size]).is_ok() {}
        }
        Ok(())
    }

    /// The folders of a manager's replicated store: one for each time that a cluster was begun anew.
    pub(super) async fn stores(&self, at: usize) -> anyhow::Result<Vec<PathBuf>> {
        let data = match self {
            Self::Lab { lab, .. } => {
                let machine = lab.managers.get(at);
                machine.context("only managers have a store")?.folder.clone()
            }
            Self::Compose(compose) => compose.data(at).await?,
            Self::Dev(dev) => dev.data(at)?,
        };
        let unreadable = || format!("could not read {}", data.display());
        let mut stores = Vec::new();
        for entry in std::fs::read_dir(&data).with_context(unreadable)? {
            let path = entry.with_context(unreadable)?.path();
            if path
                .file_name()
                .is_some_and(|name| is_store(&name.to_string_lossy()))
            {
                stores.push(path);
            }
        }
        anyhow::ensure!(!stores.is_empty(), "there is no store in {}", data.display());
        Ok(stores)
    }

    /// Whether its processes go on when this program dies.
    pub(super) fn outlives_us(&self) -> bool {
        !matches!(self, Self::Lab { .. })
    }

    /// The processes of a node: none while it is down.
    pub(super) fn processes(&self, at: usize) -> Vec<u32> {
        match self {
            Self::Lab { lab, .. } => {
                let machine = lab.managers.iter().chain(&lab.workers).nth(at);
                machine
                    .and_then(|machine| machine.processes().ok())
                    .unwrap_or_default()
            }
            Self::Compose(compose) => match compose.pid(at) {
                Ok(pid) if pid > 0 => system::tree(pid),
                _ => Vec::new(),
            },
            Self::Dev(dev) => dev.processes(at),
        }
    }

    /// The network that a node is in.
    pub(super) fn namespace(&self, at: usize) -> anyhow::Result<Arc<Namespace>> {
        match self {
            Self::Lab { lab, .. } => {
                let machine = lab.managers.iter().chain(&lab.workers).nth(at);
                let namespace = machine.and_then(|machine| machine.namespace().cloned());
                namespace.context("it has no network of its own")
            }
            Self::Compose(compose) => {
                let pid = compose.pid(at)?;
                anyhow::ensure!(pid > 0, "the container does not run");
                Ok(Arc::new(Namespace::of(pid)?))
            }
            Self::Dev(_) => bail!(
                "the nodes of a local cluster have one network; use `live` without --target for partitions"
            ),
        }
    }

    /// This machine's address in the nodes' network, where it is not this program's own.
    pub(super) fn gateway(&self) -> Option<Ipv4Addr> {
        match self {
            Self::Compose(compose) => compose.gateway,
            Self::Lab { .. } | Self::Dev(_) => None,
        }
    }

    /// What takes our rules out of a node's network, where that does not go with the cluster.
    pub(super) fn rules(&self, at: usize) -> Option<Undo> {
        match self {
            Self::Compose(compose) => Some(compose.rules(at)),
            _ => None,
        }
    }

    /// Nodes whose programs ended by themselves since this was asked last, and how. They are started again a moment later,
    /// as a service manager would.
    pub(super) fn ended(&mut self) -> anyhow::Result<Vec<(usize, String)>> {
        let Self::Lab { lab, .. } = self else {
            return Ok(Vec::new()); // docker and `bulkhead dev` start theirs again
        };
        let mut ended = Vec::new();
        for (at, machine) in lab.managers.iter_mut().chain(&mut lab.workers).enumerate() {
            if let Some(status) = machine.ended()? {
                ended.push((at, status.to_string()));
            }
        }
        Ok(ended)
    }

    /// What a node's programs logged.
    pub(super) async fn log(&self, at: usize) -> anyhow::Result<Vec<u8>> {
        match self {
            Self::Lab { lab, nodes } => {
                let path = lab.path().join(format!("{}.log", nodes[at].name));
                std::fs::read(&path).with_context(|| format!("could not read {}", path.display()))
            }
            Self::Compose(compose) => compose.log(at).await,
            Self::Dev(dev) => dev.log(at).await,
        }
    }

    /// The folders in which all that nodes keep lies.
    pub(super) fn disks(&self) -> anyhow::Result<Vec<PathBuf>> {
        match self {
            Self::Lab { lab, .. } => Ok(vec![lab.path().to_owned()]),
            Self::Compose(compose) => compose.volumes(),
            Self::Dev(dev) => Ok(vec![dev.folder.clone()]),
        }
    }

    /// The control groups that its launchers made.
    pub(super) fn groups(&self) -> Vec<PathBuf> {
        match self {
            Self::Lab { lab, .. } => lab.workers.iter().flat_map(|it| groups_of(&it.folder)).collect(),
            Self::Compose(_) | Self::Dev(_) => Vec::new(), // those of docker, or of a cluster that stays
        }
    }

    /// The command that has a worker of a cluster that stays take tasks again.
    pub(super) fn activation(&self, at: usize) -> Option<Vec<String>> {
        let own = match self {
            Self::Lab { .. } => return None,
            Self::Compose(compose) => compose.words(),
            Self::Dev(dev) => dev.words(),
        };
        let update = [
            "node",
            "update",
            "--availability",
            "active",
            &self.nodes()[at].name,
        ];
        Some(own.into_iter().chain(update.map(str::to_owned)).collect())
    }
}

/// Not what a manager put aside of one that was damaged.
fn is_store(name: &str) -> bool {
    let epoch = name.strip_prefix("raft-");
    name == "raft" || epoch.is_some_and(|it| it.parse::<u64>().is_ok())
}

fn unreachable_node<T>(at: usize) -> anyhow::Result<T> {
    bail!("there is no node {at}")
}

fn node(machine: &Machine) -> anyhow::Result<Node> {
    let host = machine.address.split(':').next().unwrap_or_default();
    Ok(Node {
        name: machine.name.clone(),
        manager: machine.role == Role::Manager,
        address: host
            .parse()
            .with_context(|| format!("{host} is no IPv4 address"))?,
    })
}
