//! The nodes of a local cluster, one by one: what runs of them, starting, killing, and the end of all.

use std::path::Path;

use bulkhead_proto::wire::{LocalStatus, Phase};
use serde_json::json;

use super::group::{Group, Process};
use super::layout::{Cluster, Folder, Kind, Node, unusable};
use super::unit;
use crate::app::App;
use crate::connection::Connection;
use crate::health;
use crate::output::{Filters, Listing, Row, text};
use crate::refusal::{Code, Exit, Refusal};

/// The word for whoever leads.
const LEADER: &str = "leader";
/// How often a node is looked at that has just been told something.
pub(super) const LOOK: std::time::Duration = std::time::Duration::from_millis(20);

/// Lists the nodes.
pub(super) async fn status(folder: &Folder, filters: &Filters, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let cluster = folder.cluster()?;
    let mut rows = Vec::new();
    for node in &cluster.nodes {
        let group = group(&cluster, node);
        let runs = group.populated().map_err(|e| unusable(folder.path(), &e))?;
        let status = match runs {
            true => ask(folder, node).await,
            false => None,
        };
        rows.push(row(node, runs, status.as_ref(), &group.processes()));
    }
    let listing = Listing {
        headers: &["NODE", "ROLE", "ADDRESS", "STATE", "PROGRAMS"],
        keys: &["id", "name", "role", "address", "state", "leader"],
        rows,
    };
    app.list(listing, filters)?;
    Ok(Exit::Done)
}

fn row(node: &Node, runs: bool, status: Option<&LocalStatus>, processes: &[Process]) -> Row {
    let state = match (runs, status) {
        (false, _) => "killed",
        (true, None) => "starting",
        (true, Some(status)) if status.ready => "ready",
        (true, Some(status)) if status.phase() == Phase::Locked => "locked",
        (true, Some(_)) => "not ready",
    };
    let leader = status.is_some_and(|status| status.leader);
    // A standby may be a manager by now, and the other way round.
    let role = status.map_or(node.kind.as_str(), |status| text::role(status.role()));
    let ours = processes
        .iter()
        .filter(|process| [node.kind.program(), node.kind.agent()].contains(&process.program.as_str()));
    let programs: Vec<(&str, i32)> = ours.map(|p| (p.program.as_str(), p.pid)).collect();
    let shown: Vec<String> = programs
        .iter()
        .map(|(name, pid)| format!("{name} ({pid})"))
        .collect();
    let detail = status.map(|status| status.detail.as_str()).unwrap_or_default();
    let mut cell = state.to_owned();
    if leader {
        cell.push_str(", leads");
    }
    if !detail.is_empty() {
        cell = format!("{cell}: {detail}");
    }
    Row {
        id: node.name.clone(),
        cells: vec![
            node.name.clone(),
            role.into(),
            node.address.to_string(),
            cell,
            shown.join(", "),
        ],
        json: json!({
            "id": node.name, "name": node.name, "role": role, "address": node.address.to_string(),
            "state": state, "leader": leader, "detail": detail,
            "programs": programs.iter().map(|(name, pid)| json!({ "name": name, "pid": pid })).collect::<Vec<_>>(),
        }),
    }
}

/// Starts nodes that were killed.
pub(super) async fn start(folder: &Folder, names: &[String], app: &mut App<'_>) -> Result<Exit, Refusal> {
    let cluster = folder.cluster()?;
    for name in names {
        let node = cluster.node(name)?;
        if group(&cluster, node)
            .populated()
            .map_err(|e| unusable(folder.path(), &e))?
        {
            return Err(Refusal::new(
                Code::DevRunning,
                name,
                "this node runs",
                "'bulkhead dev status' shows the nodes",
            ));
        }
        unit::spawn(folder, node)?;
        started(folder, node).await?;
        app.print(&format!("{name}\n"))?;
    }
    Ok(Exit::Done)
}

/// Waits until a node's program answers.
pub(super) async fn started(folder: &Folder, node: &Node) -> Result<(), Refusal> {
    let answers = async {
        while ask(folder, node).await.is_none() {
            tokio::time::sleep(LOOK).await;
        }
    };
    let patience = std::time::Duration::from_secs(20);
    tokio::time::timeout(patience, answers).await.map_err(|_| {
        let help = format!("'bulkhead dev logs {}' says why", node.name);
        Refusal::new(Code::DevFailed, &node.name, "its program does not answer", help)
    })
}

/// Kills nodes, or only their programs.
pub(super) async fn kill(
    folder: &Folder,
    names: &[String],
    agent_only: bool,
    app: &mut App<'_>,
) -> Result<Exit, Refusal> {
    let cluster = folder.cluster()?;
    for name in names {
        let node = match name.as_str() {
            LEADER => leader(folder, &cluster).await?,
            name => cluster.node(name)?,
        };
        let group = group(&cluster, node);
        let failed = |e: std::io::Error| unusable(folder.path(), &e);
        let killed = if agent_only {
            let agent = group
                .processes()
                .into_iter()
                .find(|process| process.program == node.kind.agent());
            match agent {
                Some(agent) => group.kill_process(&agent).map_err(failed)?,
                None => false,
            }
        } else {
            let ran = group.populated().map_err(failed)?;
            group.kill().await.map_err(failed)?;
            ran
        };
        if !killed {
            let help = format!("'bulkhead dev start {}' starts it", node.name);
            return Err(Refusal::new(Code::DevAbsent, &node.name, "it does not run", help));
        }
        app.print(&format!("{}\n", node.name))?;
    }
    Ok(Exit::Done)
}

/// The manager that says it leads.
async fn leader<'a>(folder: &Folder, cluster: &'a Cluster) -> Result<&'a Node, Refusal> {
    for node in cluster.managers() {
        if ask(folder, node).await.is_some_and(|status| status.leader) {
            return Ok(node);
        }
    }
    let help =
        "wait for an election, or start managers until a majority runs; 'bulkhead dev status' lists them";
    Err(Refusal::new(Code::NoQuorum, LEADER, "no manager leads", help))
}

/// What a node's program says of itself; nothing if it does not answer.
pub(super) async fn ask(folder: &Folder, node: &Node) -> Option<LocalStatus> {
    let program = Connection::to_socket(&folder.socket(node)).ok()?;
    health::status(&mut program.local()).await.ok()
}

/// Ends everything and removes it.
pub(super) async fn down(folder: &Folder, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let cluster = folder.cluster()?;
    let all = Group::at(cluster.group.clone());
    all.kill().await.map_err(|e| unusable(&cluster.group, &e))?;
    for node in cluster.workers() {
        let data = folder.data(node);
        // A launcher that never ran keeps nothing outside.
        if data.join("launcher").is_dir() {
            forget(&data)?;
        }
    }
    all.remove().map_err(|e| unusable(&cluster.group, &e))?;
    let contexts = app.contexts();
    if let Ok(context) = contexts.find(Some(&cluster.context))
        && cluster.is_of(&context.managers().unwrap_or_default())
    {
        contexts.remove(&cluster.context)?;
    }
    // Last: as long as it is there, 'down' can be tried again.
    folder.remove()?;
    app.say(&format!("{} are gone", cluster.summary()));
    Ok(Exit::Done)
}

/// Has a launcher remove what it keeps outside of its folder: control groups and claimed ids.
fn forget(data: &Path) -> Result<(), Refusal> {
    let place = data.display().to_string();
    let refuse = |reason: String| {
        Refusal::new(
            Code::DevFailed,
            place.clone(),
            reason,
            "mend it, and run 'bulkhead dev down' again",
        )
    };
    let output = std::process::Command::new(unit::program(Kind::Worker.program())?)
        .arg("--data")
        .arg(data)
        .arg("--forget")
        .output()
        .map_err(|e| refuse(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(refuse(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

pub(super) fn group(cluster: &Cluster, node: &Node) -> Group {
    Group::at(cluster.group.clone()).of(&node.name)
}
