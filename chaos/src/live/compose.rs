//! A cluster of docker-compose. Containers get no privilege for this: who breaks them enters their networks from outside.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bulkhead_lab::client::{Operator, until};
use serde::Deserialize;
use tokio::process::Command;

use super::cluster::Node;
use super::journal::{Journal, Undo};

/// The first start of all containers, on a machine that has other things to do.
const UP: Duration = Duration::from_secs(120);

/// What `docker inspect` says of a container, as far as it matters.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    id: String,
    config: Config,
    state: State,
    network_settings: NetworkSettings,
    mounts: Vec<Mount>,
}

/// What of this machine a container sees, and where.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Mount {
    source: PathBuf,
    destination: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    labels: BTreeMap<String, String>,
    cmd: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    pid: u32,
    health: Option<Health>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Health {
    status: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NetworkSettings {
    networks: BTreeMap<String, Endpoint>,
}

#[derive(Debug, Deserialize)]
struct Endpoint {
    #[serde(rename = "IPAddress")]
    address: String,
    #[serde(rename = "Gateway")]
    gateway: String,
}

/// A project, its containers and its operator.
#[derive(Debug)]
pub(super) struct Compose {
    file: PathBuf,
    project: String,
    pub(super) nodes: Vec<Node>,
    containers: Vec<String>,
    network: String,
    /// This machine's address in it.
    pub(super) gateway: Option<Ipv4Addr>,
    pids: Mutex<Vec<u32>>,
    pub(super) operator: Operator,
}

impl Compose {
    /// Brings a project up, or takes the one that runs.
    pub(super) async fn at(
        file: &Path,
        project: Option<&str>,
        below: &Path,
        journal: &mut Journal,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(
            file.is_file(),
            "{} is not there: name the compose file, which is chaos/compose/docker-compose.yml in the source",
            file.display()
        );
        let name = match project {
            Some(name) => name.to_owned(),
            None => {
                journal.before(Undo::Remove {
                    folder: below.to_owned(),
                })?;
                let name = format!("bulkhead-chaos-{}", std::process::id());
                journal.before(Undo::ComposeDown {
                    file: file.to_owned(),
                    project: name.clone(),
                })?;
                compose(file, &name, &["up", "-d"]).await?;
                name
            }
        };
        let of_it = |one: &&Inspected| one.config.cmd.as_ref().is_some_and(|it| role(it).is_some());
        let mut all = Vec::new();
        until("the containers are healthy", UP, async || {
            all = inspect(&name).await.unwrap_or_default();
            let mut nodes = all.iter().filter(of_it).peekable();
            nodes.peek().is_some()
                && nodes.all(|one| one.state.health.as_ref().is_some_and(|it| it.status == "healthy"))
        })
        .await
        .with_context(|| format!("project {name}: `docker-compose -p {name} ps` shows its containers"))?;
        let mut found: Vec<(bool, String, &Inspected)> = Vec::new();
        for one in all.iter().filter(of_it) {
            let service = one.config.labels.get("com.docker.compose.service").cloned();
            let manager = one.config.cmd.as_ref().and_then(|it| role(it)) == Some(Role::Manager);
            found.push((!manager, service.unwrap_or_default(), one));
        }
        found.sort_by(|one, other| (one.0, &one.1).cmp(&(other.0, &other.1)));
        let network = found
            .first()
            .and_then(|(.., one)| one.network_settings.networks.keys().next());
        let network = network.context("the containers have no network")?.clone();
        let gateway = found
            .first()
            .and_then(|(.., one)| one.network_settings.networks.get(&network));
        let gateway = gateway.and_then(|endpoint| endpoint.gateway.parse().ok());
        let operator = volume(&name, "operator")
            .await?
            .join("bulkhead/contexts/default/key");
        Ok(Self {
            nodes: found
                .iter()
                .map(|(worker, service, one)| {
                    Ok(Node {
                        name: service.clone(),
                        manager: !worker,
                        address: address(one, &network)?,
                    })
                })
                .collect::<anyhow::Result<_>>()?,
            containers: found.iter().map(|(.., one)| one.id.clone()).collect(),
            pids: Mutex::new(found.iter().map(|(.., one)| one.state.pid).collect()),
            operator: Operator::borrow(&operator, below)
                .context("the operator's key is in the volume `operator`")?,
            network,
            gateway,
            file: file.to_owned(),
            project: name,
        })
    }

    pub(super) async fn bulkhead(&self, words: &[&str]) -> anyhow::Result<String> {
        let own = self.words();
        output(Command::new(&own[0]).args(&own[1..]).args(words)).await
    }

    /// The words of a command line that is this project's `bulkhead`.
    pub(super) fn words(&self) -> Vec<String> {
        let file = self.file.display().to_string();
        let line = [
            "docker-compose",
            "-f",
            &file,
            "-p",
            &self.project,
            "run",
            "--rm",
            "-T",
            "cli",
        ];
        line.map(str::to_owned).to_vec()
    }

    /// The first process of a container, as this machine counts; 0 while it does not run.
    pub(super) fn pid(&self, at: usize) -> anyhow::Result<u32> {
        let mut pids = self.pids.lock().unwrap_or_else(PoisonError::into_inner);
        if pids[at] == 0 || !Path::new(&format!("/proc/{}", pids[at])).exists() {
            pids[at] = pid(&self.containers[at])?;
        }
        Ok(pids[at])
    }

    pub(super) fn rules(&self, at: usize) -> Undo {
        Undo::Rules {
            container: self.containers[at].clone(),
        }
    }

    fn will_start(&self, at: usize, journal: &mut Journal) -> anyhow::Result<usize> {
        journal.before(Undo::Start {
            container: self.containers[at].clone(),
        })
    }

    pub(super) async fn kill(&self, at: usize, journal: &mut Journal) -> anyhow::Result<usize> {
        let undo = self.will_start(at, journal)?;
        docker(&["kill", "-s", "KILL", &self.containers[at]]).await?;
        Ok(undo)
    }

    pub(super) async fn stop(&self, at: usize, journal: &mut Journal) -> anyhow::Result<usize> {
        let undo = self.will_start(at, journal)?;
        docker(&["stop", "-t", "8", &self.containers[at]]).await?;
        Ok(undo)
    }

    pub(super) async fn start(&mut self, at: usize) -> anyhow::Result<()> {
        docker(&["start", &self.containers[at]]).await?;
        self.look_again(at).await
    }

    /// What may be another after a start: process and address.
    async fn look_again(&mut self, at: usize) -> anyhow::Result<()> {
        let all = inspect(&self.project).await?;
        let one = all.iter().find(|one| one.id == self.containers[at]);
        let one = one.context("the container is gone")?;
        self.nodes[at].address = address(one, &self.network)?;
        self.pids.lock().unwrap_or_else(PoisonError::into_inner)[at] = one.state.pid;
        Ok(())
    }

    pub(super) async fn pause(&self, at: usize, journal: &mut Journal) -> anyhow::Result<usize> {
        let undo = journal.before(Undo::Unpause {
            container: self.containers[at].clone(),
        })?;
        docker(&["pause", &self.containers[at]]).await?;
        Ok(undo)
    }

    pub(super) async fn resume(&self, at: usize) -> anyhow::Result<()> {
        docker(&["unpause", &self.containers[at]]).await.map(drop)
    }

    pub(super) async fn disconnect(&self, at: usize, journal: &mut Journal) -> anyhow::Result<usize> {
        let undo = journal.before(Undo::Connect {
            container: self.containers[at].clone(),
            network: self.network.clone(),
            alias: self.nodes[at].name.clone(),
        })?;
        docker(&["network", "disconnect", &self.network, &self.containers[at]]).await?;
        Ok(undo)
    }

    pub(super) async fn connect(&mut self, at: usize) -> anyhow::Result<()> {
        let alias = self.nodes[at].name.clone();
        docker(&[
            "network",
            "connect",
            "--alias",
            &alias,
            &self.network,
            &self.containers[at],
        ])
        .await?;
        self.look_again(at).await
    }

    pub(super) async fn log(&self, at: usize) -> anyhow::Result<Vec<u8>> {
        let output = Command::new("docker")
            .args(["logs", &self.containers[at]])
            .output()
            .await?;
        Ok([output.stdout, output.stderr].concat())
    }

    /// Where a node's data folder is on this machine.
    pub(super) async fn data(&self, at: usize) -> anyhow::Result<PathBuf> {
        let all = inspect(&self.project).await?;
        let one = all.iter().find(|one| one.id == self.containers[at]);
        let one = one.context("the container is gone")?;
        let data = data_of(one.config.cmd.as_deref().unwrap_or_default());
        let mount = one
            .mounts
            .iter()
            .find(|it| Some(it.destination.as_path()) == data);
        let mount = mount.with_context(|| format!("{} has no volume for its --data", self.nodes[at].name))?;
        Ok(mount.source.clone())
    }

    /// Where the volumes of the project are on this machine.
    pub(super) fn volumes(&self) -> anyhow::Result<Vec<PathBuf>> {
        let filter = format!("label=com.docker.compose.project={}", self.project);
        let named = std::process::Command::new("docker")
            .args(["volume", "ls", "-q", "--filter", &filter])
            .output()?;
        let names = String::from_utf8_lossy(&named.stdout).into_owned();
        let mut line = vec!["volume", "inspect", "-f", "{{.Mountpoint}}"];
        line.extend(names.split_whitespace());
        let places = std::process::Command::new("docker").args(&line).output()?;
        Ok(String::from_utf8_lossy(&places.stdout)
            .lines()
            .map(PathBuf::from)
            .collect())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Manager,
    Worker,
}

/// What a container's program makes of it; the command line and others are no nodes.
fn role(command: &[String]) -> Option<Role> {
    match command
        .first()
        .map(|it| it.rsplit('/').next().unwrap_or_default())
    {
        Some("bulkhead-manager") => Some(Role::Manager),
        Some("bulkhead-launcher") => Some(Role::Worker),
        _ => None,
    }
}

/// The folder that a program's command line names.
fn data_of(command: &[String]) -> Option<&Path> {
    let at = command.iter().position(|word| word == "--data")?;
    command.get(at + 1).map(Path::new)
}

fn address(one: &Inspected, network: &str) -> anyhow::Result<Ipv4Addr> {
    let endpoint = one.network_settings.networks.get(network);
    let address = endpoint.map(|it| it.address.as_str()).unwrap_or_default();
    address
        .parse()
        .with_context(|| format!("container {} has no address in {network}", one.id))
}

/// The first process of a container; 0 while it does not run.
pub(super) fn pid(container: &str) -> anyhow::Result<u32> {
    let output = std::process::Command::new("docker")
        .args(["inspect", "-f", "{{.State.Pid}}", container])
        .output()
        .context("docker could not be run")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim()
        .parse()
        .with_context(|| format!("there is no container {container}"))
}

async fn inspect(project: &str) -> anyhow::Result<Vec<Inspected>> {
    let filter = format!("label=com.docker.compose.project={project}");
    let listed = docker(&["ps", "-aq", "--no-trunc", "--filter", &filter]).await?;
    let ids: Vec<&str> = listed.split_whitespace().collect();
    if ids.is_empty() {
        bail!("there is no container of project {project}");
    }
    let text = docker(&[&["inspect"], &ids[..]].concat()).await?;
    serde_json::from_str(&text).context("docker inspect says what this program does not know")
}

async fn volume(project: &str, name: &str) -> anyhow::Result<PathBuf> {
    let of_project = format!("label=com.docker.compose.project={project}");
    let named = format!("label=com.docker.compose.volume={name}");
    let found = docker(&["volume", "ls", "-q", "--filter", &of_project, "--filter", &named]).await?;
    let found = found.trim();
    anyhow::ensure!(!found.is_empty(), "project {project} has no volume `{name}`");
    let place = docker(&["volume", "inspect", "-f", "{{.Mountpoint}}", found]).await?;
    Ok(PathBuf::from(place.trim()))
}

async fn docker(words: &[&str]) -> anyhow::Result<String> {
    output(Command::new("docker").args(words)).await
}

async fn compose(file: &Path, project: &str, words: &[&str]) -> anyhow::Result<String> {
    output(
        Command::new("docker-compose")
            .arg("-f")
            .arg(file)
            .args(["-p", project])
            .args(words),
    )
    .await
}

async fn output(command: &mut Command) -> anyhow::Result<String> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| {
            format!("{name} could not be run; on Debian: apt-get install -y docker.io docker-compose")
        })?;
    if !output.status.success() {
        bail!(
            "{name} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_what_its_program_makes_it() {
        let role = |line: &str| role(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(role("bulkhead-manager --data /d"), Some(Role::Manager));
        assert_eq!(role("/bin/bulkhead-launcher --data /d"), Some(Role::Worker));
        assert_eq!(role("bulkhead cluster init"), None);
        let line = ["bulkhead-manager", "--data", "/data/manager"].map(str::to_owned);
        assert_eq!(data_of(&line), Some(Path::new("/data/manager")));
        assert_eq!(data_of(&line[..2]), None);
    }
}
