//! `dev up`: the steps by which an operator makes a cluster, one after the other.

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_proto::wire::{JoinRequest, Role};
use clap::Args;
use futures::future::try_join_all;

use super::group::{Group, unified};
use super::layout::{Cluster, Folder, Kind, Node, subnet, unusable};
use super::{nodes, unit};
use crate::app::App;
use crate::cluster::{Init, Ticket, found, join, ticket};
use crate::connection::Connection;
use crate::output::Progress;
use crate::refusal::{Code, Exit, Refusal};

/// The context that is made where none is named.
const CONTEXT: &str = "dev";
/// All nodes are ready after seconds; a machine under load takes longer.
const READY: Duration = Duration::from_secs(60);
/// More would not fit this machine, nor the last number of an address.
const MOST_WORKERS: i64 = 100;

/// Flags of `dev up`.
#[derive(Debug, Args)]
pub(super) struct Up {
    /// Managers; an odd number survives most losses for its size
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    managers: u8,
    /// Workers
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=MOST_WORKERS))]
    workers: u8,
    /// Manager programs that wait to be promoted
    #[arg(long, value_name = "COUNT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=9))]
    standbys: u8,
    /// The loopback network of the nodes: three numbers
    #[arg(long, value_name = "NETWORK", env = "BULKHEAD_DEV_SUBNET", default_value = "127.77.0",
          value_parser = subnet)]
    subnet: [u8; 3],
}

pub(super) async fn run(folder: &Folder, options: Up, app: &mut App<'_>) -> Result<Exit, Refusal> {
    if let Some(running) = folder.load()? {
        return Err(there_is_one(folder, &running));
    }
    if !nix::unistd::geteuid().is_root() {
        let reason = "workers make namespaces with other users' ids, mounts and control groups, and each manager is a \
                      user of its own: all of that needs root";
        let help = "run it as root: sudo bulkhead dev up; the programs give up what they do not need";
        return Err(Refusal::new(Code::DevPrivilege, "dev up", reason, help));
    }
    for kind in [Kind::Manager, Kind::Worker] {
        unit::program(kind.program())?;
        unit::program(kind.agent())?;
    }
    let context = app.global.context.clone().unwrap_or_else(|| CONTEXT.into());
    if app.contexts().names()?.contains(&context) {
        let reason = format!("there is a context '{context}' of another cluster");
        let help = format!("'bulkhead context rm {context}', or name another with --context");
        return Err(Refusal::new(Code::ContextExists, "dev up", reason, help));
    }
    let group = unified()?.join(group_name(folder));
    let cluster = Cluster::plan(
        options.managers,
        options.workers,
        options.standbys,
        options.subnet,
        context,
        group,
    );
    for manager in cluster.managers().chain(cluster.standbys()) {
        check_free(manager)?;
    }
    folder.create(&cluster)?;
    let started = tokio::time::Instant::now();
    let made = make(folder, &cluster, app).await;
    if let Err(refusal) = made {
        app.say("the local cluster is not whole; 'bulkhead dev logs NODE' may say more, 'bulkhead dev down' removes it");
        return Err(refusal);
    }
    app.say(&format!(
        "{} are ready after {:.1} s; the context '{}' is selected",
        cluster.summary(),
        started.elapsed().as_secs_f32(),
        cluster.context
    ));
    nodes::status(folder, &crate::output::Filters::default(), app).await
}

fn there_is_one(folder: &Folder, running: &Cluster) -> Refusal {
    let runs = Group::at(running.group.clone()).populated().unwrap_or(true);
    let state = if runs { "runs" } else { "is stopped" };
    Refusal::new(
        Code::DevRunning,
        folder.path().display().to_string(),
        format!("a local cluster {state} here: {}", running.summary()),
        "'bulkhead dev status' shows it, 'bulkhead dev down' removes it; --dir and --subnet make another beside it",
    )
}

/// The groups of two local clusters must not meet.
fn group_name(folder: &Folder) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    folder.path().hash(&mut hasher);
    format!("bulkhead-dev-{:016x}", hasher.finish()).into()
}

/// Another cluster may have these addresses, whatever its folder.
fn check_free(manager: &Node) -> Result<(), Refusal> {
    let address = manager.listen();
    match TcpListener::bind(&address) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => Err(Refusal::new(
            Code::DevRunning,
            address,
            "another program listens there, perhaps another local cluster",
            "choose another network with --subnet, like --subnet 127.78.0",
        )),
        Err(e) => Err(Refusal::new(
            Code::DevFailed,
            address,
            e.to_string(),
            "is the loopback interface up?",
        )),
    }
}

async fn make(folder: &Folder, cluster: &Cluster, app: &mut App<'_>) -> Result<(), Refusal> {
    let all = Group::at(cluster.group.clone());
    all.create().map_err(|e| unusable(&cluster.group, &e))?;
    for node in &cluster.nodes {
        unit::spawn(folder, node)?;
    }
    try_join_all(cluster.nodes.iter().map(|node| nodes::started(folder, node))).await?;

    let mut managers = cluster.managers();
    let first = managers
        .next()
        .ok_or_else(|| Refusal::new(Code::Internal, "dev up", "no manager was planned", "report it"))?;
    app.global.socket = Some(folder.socket(first));
    app.global.context = Some(cluster.context.clone());
    let init = Init::local(first.listen(), first.name.clone());
    found(&init, app).await?;

    let mut program = app.program()?;
    let others = u32::try_from(cluster.managers().count().saturating_sub(1)).unwrap_or(u32::MAX);
    let workers = u32::try_from(cluster.workers().count()).unwrap_or(u32::MAX);
    let as_manager = admission(&mut program, Role::Manager, others).await?;
    let standbys = u32::try_from(cluster.standbys().count()).unwrap_or(u32::MAX);
    let as_standby = admission(&mut program, Role::Standby, standbys).await?;
    let as_worker = admission(&mut program, Role::Worker, workers).await?;
    let progress = RefCell::new(app.progress());
    let joins = cluster
        .nodes
        .iter()
        .filter(|node| node.name != first.name)
        .map(|node| {
            let ticket = match node.kind {
                Kind::Manager => as_manager.as_ref(),
                Kind::Worker => as_worker.as_ref(),
                Kind::Standby => as_standby.as_ref(),
            };
            join_node(folder, node, ticket, first, &progress)
        });
    try_join_all(joins).await?;
    let ready = try_join_all(cluster.nodes.iter().map(|node| ready(folder, node)));
    ready.await.map(drop)
}

/// A ticket for so many nodes, if any are to come.
async fn admission(program: &mut Connection, role: Role, uses: u32) -> Result<Option<Ticket>, Refusal> {
    match uses {
        0 => Ok(None),
        uses => ticket::issue_for(program, role, uses).await.map(Some),
    }
}

async fn join_node(
    folder: &Folder,
    node: &Node,
    ticket: Option<&Ticket>,
    first: &Node,
    progress: &RefCell<Progress<'_>>,
) -> Result<(), Refusal> {
    let ticket = ticket.map_or_else(String::new, |ticket| ticket.to_string());
    let listen = match node.kind {
        Kind::Manager | Kind::Standby => node.listen(),
        Kind::Worker => String::new(),
    };
    let request = JoinRequest {
        ticket,
        addresses: vec![first.listen()],
        advertise: listen.clone(),
        listen,
        name: node.name.clone(),
    };
    let program = Connection::to_socket(&folder.socket(node))?;
    progress.borrow_mut().set(&node.name, "joins");
    // Each hop is a line where one node joins; of many nodes only what goes wrong is one.
    let shown = |step: &str, line: &str| {
        if line.starts_with(join::FAILED) {
            progress.borrow_mut().set(&node.name, &format!("{step}: {line}"));
        }
    };
    join::follow(&program, request, shown).await?;
    progress.borrow_mut().set(&node.name, "joined");
    Ok(())
}

async fn ready(folder: &Folder, node: &Node) -> Result<(), Refusal> {
    let ready = async {
        while !nodes::ask(folder, node).await.is_some_and(|status| status.ready) {
            tokio::time::sleep(nodes::LOOK).await;
        }
    };
    tokio::time::timeout(READY, ready).await.map_err(|_| {
        let reason = format!("it is not ready after {} s", READY.as_secs());
        let help = format!("'bulkhead dev logs {}' says why", node.name);
        Refusal::new(Code::DevFailed, &node.name, reason, help)
    })
}
