//! `dev`: a whole cluster on this machine, with the certificates, consensus and sandbox of a real one.
//!
//! Nothing here is special to the cluster: `up` does what an operator does by hand. Each node has a loopback address, a
//! user and a control group of its own, so that killing the group is the loss of the machine.

mod group;
mod layout;
mod logs;
mod nodes;
mod unit;
mod up;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::app::App;
use crate::refusal::{Exit, Refusal};

/// What can be done with a local cluster.
#[derive(Debug, Args)]
pub(crate) struct Dev {
    /// The folder that holds everything of it
    #[arg(
        long,
        global = true,
        value_name = "FOLDER",
        env = "BULKHEAD_DEV_DIR",
        default_value = layout::FOLDER
    )]
    dir: PathBuf,
    #[command(subcommand)]
    verb: DevVerb,
}

#[derive(Debug, Subcommand)]
enum DevVerb {
    /// Makes a cluster and selects its context
    Up(up::Up),
    /// Lists the nodes and their processes
    Status {
        #[command(flatten)]
        filters: crate::output::Filters,
    },
    /// Prints what a node's programs logged
    Logs(logs::Logs),
    /// Starts a node that was killed
    Start {
        /// The nodes
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Kills a node as a power cut would: all its processes at once, its tasks with them
    Kill {
        /// The nodes; 'leader' is the manager that leads
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
        /// Only the manager or worker program, which is started again; tasks run on
        #[arg(long)]
        agent_only: bool,
    },
    /// Ends the cluster and removes everything of it
    Down,
    /// Runs one node's program, and again when it ends
    #[command(hide = true)]
    Unit {
        /// The node
        node: String,
    },
}

pub(crate) async fn run(dev: Dev, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let folder = layout::Folder::at(&dev.dir)?;
    match dev.verb {
        DevVerb::Up(options) => up::run(&folder, options, app).await,
        DevVerb::Status { filters } => nodes::status(&folder, &filters, app).await,
        DevVerb::Logs(options) => logs::run(&folder, options, app).await,
        DevVerb::Start { nodes } => nodes::start(&folder, &nodes, app).await,
        DevVerb::Kill { nodes, agent_only } => nodes::kill(&folder, &nodes, agent_only, app).await,
        DevVerb::Down => nodes::down(&folder, app).await,
        DevVerb::Unit { node } => unit::run(&folder, &node).await,
    }
}
