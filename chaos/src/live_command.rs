//! `bulkhead-chaos live`, `compose` and `run`: campaigns against clusters of real programs.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_lab::namespace::Switch;

use crate::live::{self, Campaign, Clients, Expect, Ground, Image, Plan, Scenario, Service};
use crate::report::Verdict;

/// The network of clusters in namespaces: in one of its own, so it meets no other.
const SUBNET: [u8; 3] = [10, 77, 0];
/// The port of the test service.
const PORT: u16 = 8080;
/// Bytes of a manager's disk that can be filled.
const DISK_BYTES: u64 = 256 << 20;
/// Of each client, between two operations.
const PAUSE: Duration = Duration::from_millis(20);

/// What every campaign is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cluster.
    pub ground: Ground,
    /// The folder of the report.
    pub report: PathBuf,
    /// The folder of the journal.
    pub state: PathBuf,
    /// Where the cluster's folder is made.
    pub below: PathBuf,
    /// The words after the program's name that run this again.
    pub replay: String,
}

/// What is done to the cluster.
#[derive(Clone, Debug)]
pub enum Work {
    /// A plan that is drawn from a seed.
    Drawn {
        /// What it is about.
        plan: Plan,
        /// From which seed.
        seed: u64,
        /// For how long.
        length: Duration,
    },
    /// What a file says.
    Written(PathBuf),
}

/// Runs a campaign, and prints what it does.
///
/// # Errors
/// Those of [`live::run`], and a scenario that is none.
pub fn run(options: Options, work: &Work) -> anyhow::Result<Verdict> {
    let campaign = campaign(options, work)?;
    // Before there are threads: they would stay in the network that is left.
    let switch = match campaign.ground {
        Ground::Namespaces { .. } => Some(Switch::make(SUBNET)?),
        Ground::Compose { .. } | Ground::Context { .. } => None,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("no threads")?;
    let new = !campaign.report.exists();
    let mut say = |line: String| println!("{line}");
    let ran = runtime.block_on(live::run(&campaign, switch, &mut say));
    match ran {
        Ok(_) => println!("report: {}", campaign.report.join("report.md").display()),
        // A folder without a report would be taken for one; whatever is in it stays.
        Err(_) if new => drop(std::fs::remove_dir(&campaign.report)),
        Err(_) => {}
    }
    ran
}

fn campaign(mut options: Options, work: &Work) -> anyhow::Result<Campaign> {
    let clients = Clients {
        writers: 1,
        contenders: 3,
        pause: PAUSE,
    };
    let with = |options: Options, name, seed, strikes, length, services, expect| Campaign {
        name,
        seed,
        strikes,
        length,
        services,
        clients,
        expect,
        ground: options.ground,
        report: options.report,
        state: options.state,
        below: options.below,
        replay: options.replay,
    };
    match work {
        Work::Drawn { plan, seed, length } => {
            if let (Plan::Disk, Ground::Namespaces { disk, .. }) = (plan, &mut options.ground) {
                *disk = Some(DISK_BYTES);
            }
            let mut strikes = plan.strikes(*seed, *length);
            strikes.retain(|strike| options.ground.can(strike.fault));
            let web = Service {
                name: "web".into(),
                image: Image::Probe,
                replicas: 4,
                publish: Some(PORT),
                port: 80,
                environment: Vec::new(),
                command: Vec::new(),
                canary: true,
            };
            let name = serde_json::to_string(plan)?.replace('"', "");
            Ok(with(
                options,
                name,
                *seed,
                strikes,
                *length,
                vec![web],
                Expect::default(),
            ))
        }
        Work::Written(path) => {
            let scenario = Scenario::read(path)?;
            if let Ground::Namespaces {
                managers,
                workers,
                disk,
                ..
            } = &mut options.ground
            {
                (*managers, *workers) = scenario.nodes;
                let named = |role: &str, count: u8| -> Vec<String> {
                    (1..=count).map(|number| format!("{role}-{number}")).collect()
                };
                let nodes = [named("manager", *managers), named("worker", *workers)].concat();
                live::must_be_there(&scenario.strikes, &nodes).with_context(|| path.display().to_string())?;
                let fills = scenario
                    .strikes
                    .iter()
                    .any(|it| it.fault == live::Fault::DiskFull);
                *disk = fills.then_some(DISK_BYTES);
            }
            if let Some(strike) = scenario.strikes.iter().find(|it| !options.ground.can(it.fault)) {
                anyhow::bail!(
                    "{}: {} cannot be done to this cluster",
                    path.display(),
                    strike.fault
                );
            }
            Ok(with(
                options,
                scenario.name,
                scenario.seed,
                scenario.strikes,
                scenario.length,
                scenario.services,
                scenario.expect,
            ))
        }
    }
}
