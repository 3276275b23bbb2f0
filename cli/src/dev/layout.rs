//! Where a local cluster keeps what, and what its nodes are called.

use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bulkhead_proto::limits;
use serde::{Deserialize, Serialize};

use crate::refusal::{Code, Refusal};

/// Below a folder that every user may pass: managers are users of their own.
pub(super) const FOLDER: &str = "/var/lib/bulkhead-dev";
/// Users of nodes: above accounts, below the users of tasks.
const FIRST_UID: u32 = 0x6fff_f000;
/// The file that says what the cluster is made of.
const CLUSTER: &str = "cluster.json";

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    Manager,
    Worker,
    Standby,
}

impl Kind {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Kind::Manager => "manager",
            Kind::Worker => "worker",
            Kind::Standby => "standby",
        }
    }

    /// The program that the unit starts.
    pub(super) fn program(self) -> &'static str {
        match self {
            Kind::Manager | Kind::Standby => "bulkhead-manager",
            Kind::Worker => "bulkhead-launcher",
        }
    }

    /// The program that speaks with the cluster.
    pub(super) fn agent(self) -> &'static str {
        match self {
            Kind::Manager | Kind::Standby => "bulkhead-manager",
            Kind::Worker => "bulkhead-worker",
        }
    }
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) address: Ipv4Addr,
    /// The user of the manager or worker program.
    pub(super) uid: u32,
}

impl Node {
    /// Where a manager listens.
    pub(super) fn listen(&self) -> String {
        format!("{}:{}", self.address, limits::MANAGER_PORT)
    }
}

/// What the cluster is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cluster {
    /// The context that `up` made.
    pub(super) context: String,
    /// The control group of all nodes.
    pub(super) group: PathBuf,
    pub(super) nodes: Vec<Node>,
}

impl Cluster {
    /// Names, addresses and users for so many nodes: managers first, one address after the other.
    pub(super) fn plan(
        managers: u8,
        workers: u8,
        standbys: u8,
        subnet: [u8; 3],
        context: String,
        group: PathBuf,
    ) -> Cluster {
        let kinds = (1..=managers).map(|n| (Kind::Manager, n));
        let kinds = kinds.chain((1..=workers).map(|n| (Kind::Worker, n)));
        let kinds = kinds.chain((1..=standbys).map(|n| (Kind::Standby, n)));
        let node = |(place, (kind, n)): (u8, (Kind, u8))| Node {
            name: format!("{}-{n}", kind.as_str()),
            kind,
            address: Ipv4Addr::new(subnet[0], subnet[1], subnet[2], place),
            uid: FIRST_UID + u32::from(place),
        };
        Cluster {
            context,
            group,
            nodes: (1..).zip(kinds).map(node).collect(),
        }
    }

    pub(super) fn managers(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.kind == Kind::Manager)
    }

    pub(super) fn standbys(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.kind == Kind::Standby)
    }

    pub(super) fn workers(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.kind == Kind::Worker)
    }

    /// Whether a context with these managers is this cluster's: its name may be another cluster's by now, and its key
    /// the only one.
    pub(super) fn is_of(&self, managers: &[String]) -> bool {
        self.managers()
            .any(|manager| managers.contains(&manager.listen()))
    }

    /// The node of this name.
    pub(super) fn node(&self, name: &str) -> Result<&Node, Refusal> {
        self.nodes.iter().find(|node| node.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
            let help = format!("there are: {}", names.join(", "));
            Refusal::new(
                Code::NotFound,
                "local cluster",
                format!("there is no node '{name}'"),
                help,
            )
        })
    }

    /// The cluster in a few words.
    pub(super) fn summary(&self) -> String {
        let addresses: Vec<String> = [self.nodes.first(), self.nodes.last()]
            .into_iter()
            .flatten()
            .map(|node| node.address.to_string())
            .collect();
        let standbys = match self.standbys().count() {
            0 => String::new(),
            1 => ", 1 standby".to_owned(),
            more => format!(", {more} standbys"),
        };
        format!(
            "{} managers and {} workers{standbys} at {}",
            self.managers().count(),
            self.workers().count(),
            addresses.join(" to ")
        )
    }
}

/// The folder of one local cluster.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    root: PathBuf,
}

impl Folder {
    /// The folder at this path, which need not exist.
    pub(super) fn at(path: &Path) -> Result<Self, Refusal> {
        // A unit and its programs run in another working folder, and socket names are short.
        let root = std::path::absolute(path).map_err(|e| unusable(path, &e))?;
        // A socket's whole path has 107 characters; the longest name below the folder is a worker's.
        let longest = root.join("manager-250/data/worker/worker.sock");
        if longest.as_os_str().len() > 107 {
            let reason = "its name is too long for the sockets in it";
            return Err(Refusal::new(
                Code::BadField,
                root.display().to_string(),
                reason,
                "name a shorter folder with --dir",
            ));
        }
        Ok(Self { root })
    }

    pub(super) fn path(&self) -> &Path {
        &self.root
    }

    /// The cluster that is kept here, if there is one.
    pub(super) fn load(&self) -> Result<Option<Cluster>, Refusal> {
        let path = self.root.join(CLUSTER);
        let read = || -> std::io::Result<(u32, Vec<u8>)> {
            let owner = std::fs::metadata(&path)?.uid();
            Ok((owner, std::fs::read(&path)?))
        };
        let (owner, text) = match read() {
            Ok(read) => read,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(unusable(&path, &e)),
        };
        // It names a control group that 'kill' and 'down' kill: only its maker's word counts.
        if owner != nix::unistd::geteuid().as_raw() {
            let reason = format!("the local cluster here is user {owner}'s");
            let help = "run this as that user, or name another folder with --dir";
            return Err(Refusal::new(
                Code::DevPrivilege,
                path.display().to_string(),
                reason,
                help,
            ));
        }
        let parsed = serde_json::from_slice(&text);
        parsed.map(Some).map_err(|e| {
            let help = "it was not written by this program; move it away";
            Refusal::new(Code::Unreadable, path.display().to_string(), e.to_string(), help)
        })
    }

    /// The cluster that is kept here.
    pub(super) fn cluster(&self) -> Result<Cluster, Refusal> {
        self.load()?.ok_or_else(|| {
            Refusal::new(
                Code::DevAbsent,
                self.root.display().to_string(),
                "there is no local cluster",
                "'bulkhead dev up' makes one; --dir names another folder",
            )
        })
    }

    /// Makes the folder, which must be empty or absent, and its nodes' folders.
    pub(super) fn create(&self, cluster: &Cluster) -> Result<(), Refusal> {
        make(&self.root)?;
        let mut entries = std::fs::read_dir(&self.root).map_err(|e| unusable(&self.root, &e))?;
        if entries.next().is_some() {
            let help = "name an empty folder, or one that is not there, with --dir";
            return Err(Refusal::new(
                Code::Unwritable,
                self.root.display().to_string(),
                "it is not empty, and holds no local cluster",
                help,
            ));
        }
        // First, so that 'down' finds whatever was begun.
        let text = serde_json::to_vec_pretty(cluster).map_err(|e| unusable(&self.root, &e.into()))?;
        let path = self.root.join(CLUSTER);
        std::fs::write(&path, text).map_err(|e| unusable(&path, &e))?;
        for node in &cluster.nodes {
            make(&self.node(node))?;
            let data = self.data(node);
            make(&data)?;
            if node.kind != Kind::Worker {
                let only_its_own = || {
                    std::os::unix::fs::chown(&data, Some(node.uid), Some(node.uid))?;
                    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700))
                };
                only_its_own().map_err(|e| unusable(&data, &e))?;
            }
        }
        Ok(())
    }

    /// Removes everything.
    pub(super) fn remove(&self) -> Result<(), Refusal> {
        std::fs::remove_dir_all(&self.root).map_err(|e| unusable(&self.root, &e))
    }

    fn node(&self, node: &Node) -> PathBuf {
        self.root.join(&node.name)
    }

    /// The data folder of a node's program.
    pub(super) fn data(&self, node: &Node) -> PathBuf {
        self.node(node).join("data")
    }

    /// What a node's programs log.
    pub(super) fn log(&self, node: &Node) -> PathBuf {
        self.node(node).join("log")
    }

    /// The local socket of a node's manager or worker program.
    pub(super) fn socket(&self, node: &Node) -> PathBuf {
        match node.kind {
            Kind::Manager | Kind::Standby => self.data(node).join("manager.sock"),
            Kind::Worker => self.data(node).join("worker/worker.sock"),
        }
    }
}

/// Folders that others may pass and nobody else may list.
fn make(path: &Path) -> Result<(), Refusal> {
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(path);
    made.map_err(|e| unusable(path, &e))
}

pub(super) fn unusable(path: &Path, e: &std::io::Error) -> Refusal {
    Refusal::new(
        Code::DevFailed,
        path.display().to_string(),
        e.to_string(),
        "check the folder's owner, mode and free space; --dir names another one",
    )
}

/// Three numbers of a loopback network, like 127.77.0.
pub(super) fn subnet(text: &str) -> Result<[u8; 3], String> {
    let complaint = || "write three numbers of the loopback network, like 127.77.0".to_owned();
    let parts: Vec<u8> = text
        .split('.')
        .map(|part| part.parse().map_err(|_| complaint()))
        .collect::<Result<_, _>>()?;
    match parts.as_slice() {
        &[127, b, c] if (b, c) != (0, 0) => Ok([127, b, c]),
        _ => Err(complaint()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_numbered_and_differ_in_address_and_user() {
        let cluster = Cluster::plan(3, 2, 0, [127, 77, 0], "dev".into(), "/g".into());
        let shown: Vec<String> = cluster
            .nodes
            .iter()
            .map(|n| format!("{} {}", n.name, n.address))
            .collect();
        assert_eq!(
            shown,
            [
                "manager-1 127.77.0.1",
                "manager-2 127.77.0.2",
                "manager-3 127.77.0.3",
                "worker-1 127.77.0.4",
                "worker-2 127.77.0.5"
            ]
        );
        let mut uids: Vec<u32> = cluster.nodes.iter().map(|n| n.uid).collect();
        uids.dedup();
        assert_eq!(uids.len(), 5);
        assert_eq!(
            cluster.summary(),
            "3 managers and 2 workers at 127.77.0.1 to 127.77.0.5"
        );
        assert!(cluster.is_of(&["127.77.0.2:7443".into()]));
        for other in [
            vec![],
            vec!["127.77.0.4:7443".into()],
            vec!["10.0.0.1:7443".into()],
        ] {
            assert!(!cluster.is_of(&other), "{other:?}");
        }
        assert_eq!(
            cluster.node("worker-9").map_err(|e| e.code()),
            Err(Code::NotFound)
        );
    }

    #[test]
    fn only_loopback_networks_are_taken() {
        assert_eq!(subnet("127.77.0"), Ok([127, 77, 0]));
        for bad in [
            "127.0.0",
            "10.0.0",
            "127.1",
            "127.1.2.3",
            "127.1.x",
            "",
            "127.1.256",
        ] {
            assert!(subnet(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_folder_is_made_whole_found_again_and_never_taken_from_others() {
        let place = tempfile::tempdir().expect("a folder");
        let folder = Folder::at(&place.path().join("dev")).expect("short enough");
        assert_eq!(folder.cluster().map_err(|e| e.code()), Err(Code::DevAbsent));
        let uid = nix::unistd::geteuid().as_raw();
        let mut cluster = Cluster::plan(1, 1, 0, [127, 77, 0], "dev".into(), "/g".into());
        cluster.nodes.iter_mut().for_each(|node| node.uid = uid);
        folder.create(&cluster).expect("made");
        assert_eq!(folder.load(), Ok(Some(cluster.clone())));
        if uid == 0 {
            let file = folder.path().join(CLUSTER);
            std::os::unix::fs::chown(&file, Some(65_534), None).expect("root may");
            assert_eq!(folder.load().map_err(|e| e.code()), Err(Code::DevPrivilege));
        }
        folder.remove().expect("ours");

        std::fs::create_dir(folder.path()).expect("a folder");
        std::fs::write(folder.path().join("thesis"), "x").expect("written");
        assert_eq!(
            folder.create(&cluster).map_err(|e| e.code()),
            Err(Code::Unwritable)
        );
        let long = place.path().join("x".repeat(90));
        assert_eq!(
            Folder::at(&long).map(|_| ()).map_err(|e| e.code()),
            Err(Code::BadField)
        );
    }
}
