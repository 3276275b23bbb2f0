//! A cluster that somebody else made and that is named by a context: broken only if it was made to be.
//!
//! Where it is the local cluster of `bulkhead dev`, its programs are on this machine and can be killed and stopped. Of any
//! other one only what its own commands can do is done: the root rotates, workers are drained.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, bail};
use bulkhead_lab::client::Operator;
use bulkhead_lab::{nodes, send, system};
use bulkhead_proto::wire::Role;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::process::Command;

use super::cluster::Node;
use super::journal::{Journal, Undo};

/// A cluster behind a context.
#[derive(Debug)]
pub(super) struct Dev {
    program: PathBuf,
    context: String,
    endpoints: Vec<String>,
    /// The folder of a local cluster; empty where it is none.
    pub(super) folder: PathBuf,
    pub(super) nodes: Vec<Node>,
    pub(super) operator: Operator,
    /// Of each node, the processes that stand still.
    paused: Vec<Vec<u32>>,
}

impl Dev {
    /// The cluster of the context in this folder.
    pub(super) async fn at(folder: &Path, program: &Path) -> anyhow::Result<Self> {
        let context = folder
            .file_name()
            .map(|it| it.to_string_lossy().into_owned())
            .unwrap_or_default();
        let managers = std::fs::read_to_string(folder.join("managers"))
            .with_context(|| format!("there is no context '{context}': `bulkhead context ls` lists them"))?;
        let operator = Operator::load(&folder.join("key"))?;
        let mut answer = Err(anyhow::anyhow!("no manager of context '{context}' answers"));
        for address in managers.lines() {
            let mut control = operator.control(address)?;
            match nodes(&mut control).await {
                Ok(all) => {
                    answer = Ok(all);
                    break;
                }
                Err(error) => answer = answer.context(format!("{address}: {}", error.message())),
            }
        }
        let all = answer?;
        let mut found = Vec::new();
        for node in &all {
            let manager = node.role() == Role::Manager;
            if manager || node.role() == Role::Worker {
                let host = match (manager, &node.description) {
                    (false, Some(it)) if !it.publish_address.is_empty() => it.publish_address.clone(),
                    _ => node
                        .address
                        .rsplit_once(':')
                        .map_or(node.address.as_str(), |it| it.0)
                        .to_owned(),
                };
                let address = match host.parse() {
                    Ok(address) => address,
                    Err(_) if manager => Ipv4Addr::UNSPECIFIED, // it is asked by its name
                    Err(_) => bail!("worker {} is at {host}, which is no IPv4 address", node.name),
                };
                found.push((
                    node.address.clone(),
                    Node {
                        name: node.name.clone(),
                        manager,
                        address,
                    },
                ));
            }
        }
        found.sort_by(|one, other| (!one.1.manager, &one.1.name).cmp(&(!other.1.manager, &other.1.name)));
        let mut dev = Self {
            program: program.to_owned(),
            context,
            endpoints: found
                .iter()
                .filter(|it| it.1.manager)
                .map(|it| it.0.clone())
                .collect(),
            folder: PathBuf::new(),
            paused: vec![Vec::new(); found.len()],
            nodes: found.into_iter().map(|it| it.1).collect(),
            operator,
        };
        // It is local where the local cluster has the same managers at the same addresses.
        let local = dev.local().await.unwrap_or_default();
        let same = |node: &Node| {
            let its = local.iter().find(|it| it["name"] == node.name.as_str());
            its.is_some_and(|it| {
                it["address"]
                    .as_str()
                    .is_some_and(|at| at.starts_with(&node.address.to_string()))
            })
        };
        if dev.nodes.iter().filter(|node| node.manager).all(same) {
            dev.folder = PathBuf::from(
                std::env::var_os("BULKHEAD_DEV_DIR").unwrap_or_else(|| "/var/lib/bulkhead-dev".into()),
            );
        }
        Ok(dev)
    }

    pub(super) fn endpoint(&self, manager: usize) -> String {
        self.endpoints[manager].clone()
    }

    /// A program in the folder of the command line's.
    pub(super) fn beside(&self, name: &str) -> PathBuf {
        self.program.with_file_name(name)
    }

    /// The words of a command line that is this context's `bulkhead`.
    pub(super) fn words(&self) -> Vec<String> {
        let program = self.program.display().to_string();
        vec![program, "--context".to_owned(), self.context.clone()]
    }

    pub(super) async fn bulkhead(&self, words: &[&str]) -> anyhow::Result<String> {
        let own = self.words();
        let output = Command::new(&own[0])
            .args(&own[1..])
            .args(words)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .with_context(|| format!("{} could not be run", self.program.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("`bulkhead {}` failed: {}", words.join(" "), said.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    async fn local(&self) -> anyhow::Result<Vec<Value>> {
        let text = self.bulkhead(&["--format", "json", "dev", "status"]).await?;
        Ok(serde_json::from_str(&text)?)
    }

    fn must_be_local(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            !self.folder.as_os_str().is_empty(),
            "the nodes of context '{}' are not on this machine: only rotate-root and drain can be done to it from here",
            self.context
        );
        Ok(())
    }

    pub(super) async fn kill(&self, at: usize, journal: &mut Journal) -> anyhow::Result<usize> {
        self.must_be_local()?;
        let name = &self.nodes[at].name;
        let undo = journal.before(Undo::StartNode {
            program: self.program.clone(),
            folder: self.folder.clone(),
            node: name.clone(),
        })?;
        self.bulkhead(&["dev", "kill", name]).await?;
        Ok(undo)
    }

    pub(super) async fn start(&self, at: usize) -> anyhow::Result<()> {
        self.bulkhead(&["dev", "start", &self.nodes[at].name])
            .await
            .map(drop)
    }

    pub(super) async fn pause(&mut self, at: usize, journal: &mut Journal) -> anyhow::Result<usize> {
        self.must_be_local()?;
        let pids = self.processes(at);
        let started = pids
            .iter()
            .map(|pid| system::started(*pid).unwrap_or_default())
            .collect();
        let undo = journal.before(Undo::Continue {
            pids: pids.clone(),
            started,
        })?;
        for pid in &pids {
            send(*pid, Signal::SIGSTOP);
        }
        self.paused[at] = pids;
        Ok(undo)
    }

    pub(super) async fn resume(&mut self, at: usize) -> anyhow::Result<()> {
        for pid in std::mem::take(&mut self.paused[at]) {
            send(pid, Signal::SIGCONT);
        }
        Ok(())
    }

    /// The data folder of a node.
    pub(super) fn data(&self, at: usize) -> anyhow::Result<PathBuf> {
        self.must_be_local()?;
        Ok(self.folder.join(&self.nodes[at].name).join("data"))
    }

    /// The processes of a node, by its folder.
    pub(super) fn processes(&self, at: usize) -> Vec<u32> {
        if self.folder.as_os_str().is_empty() {
            return Vec::new();
        }
        let data = format!("/{}/", self.nodes[at].name);
        let of_it = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.split('\0')
                .any(|word| Path::new(word).starts_with(&self.folder) && format!("{word}/").contains(&data))
        };
        let mut pids: Vec<u32> = system::processes()
            .into_iter()
            .filter(of_it)
            .flat_map(system::tree)
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    pub(super) async fn log(&self, at: usize) -> anyhow::Result<Vec<u8>> {
        self.must_be_local()?;
        let text = self.bulkhead(&["dev", "logs", &self.nodes[at].name]).await?;
        Ok(text.into_bytes())
    }
}
