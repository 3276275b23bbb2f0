//! `bulkhead-chaos`: breaks clusters on purpose, and says whether they held.

use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_chaos::report::Verdict;
use bulkhead_chaos::sim_command::{self, Simulation};
use clap::{Parser, Subcommand};

/// What this program could not do is none of the cluster's faults.
const HARNESS: u8 = 3;

/// Breaks clusters on purpose, and says whether they held.
///
/// Exit codes: 0 every rule held; 1 a rule was broken; 2 too little was tried for a pass; 3 this program itself failed.
#[derive(Debug, Parser)]
#[command(name = "bulkhead-chaos", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Simulated clusters: real replicas over their real log store, in one process, on one seed each.
    Sim(Sim),
    /// Switches bugs on, one after the other, and counts the seeds of the simulation that find each.
    #[cfg(feature = "planted")]
    Planted(Planted),
}

#[cfg(feature = "planted")]
#[derive(Debug, clap::Args)]
struct Planted {
    /// This bug alone, by its name.
    #[arg(long, value_name = "NAME")]
    bug: Option<String>,
    /// Seeds that may be tried for each.
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    seeds: u64,
}

#[derive(Debug, clap::Args)]
struct Sim {
    /// How many seeds are run.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    seeds: u64,
    /// The first seed.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    from: u64,
    /// Runs at once; the number of processors unless given.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Runs this seed alone and prints what happens.
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "from", "jobs"])]
    replay: Option<u64>,
    /// With --replay: strikes that are left out, by number.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', requires = "replay")]
    without: Vec<u32>,
    /// With --replay: so many clients instead of those of the seed.
    #[arg(long, value_name = "N", requires = "replay", value_parser = clap::value_parser!(u64).range(1..=100))]
    clients: Option<u64>,
    /// With --replay: things go wrong for so long, in simulated milliseconds.
    #[arg(long, value_name = "MS", requires = "replay", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    trouble: Option<u64>,
    /// With --replay: each message on the network, too.
    #[arg(long, requires = "replay")]
    messages: bool,
    /// The folder of the report.
    #[arg(long, value_name = "FOLDER", default_value = "chaos-report")]
    report: PathBuf,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let failed = error.use_stderr();
            let _printed = error.print(); // to nobody, if not to the terminal
            return ExitCode::from(if failed { HARNESS } else { 0 });
        }
    };
    let ended = match arguments.command {
        Command::Sim(sim) => simulate(sim),
        #[cfg(feature = "planted")]
        Command::Planted(planted) => find(&planted),
    };
    match ended {
        Ok(verdict) => ExitCode::from(verdict.exit_code()),
        Err(error) => {
            eprintln!("bulkhead-chaos: {error:#}");
            ExitCode::from(HARNESS)
        }
    }
}

#[cfg(feature = "planted")]
fn find(planted: &Planted) -> anyhow::Result<Verdict> {
    use anyhow::Context as _;
    use bulkhead_raft::planted::Bug;

    let named = |bug: &&Bug| {
        planted
            .bug
            .as_ref()
            .is_none_or(|name| format!("{bug:?}") == *name)
    };
    let bugs: Vec<Bug> = Bug::ALL.iter().filter(named).copied().collect();
    let names = || {
        Bug::ALL
            .iter()
            .map(|bug| format!("{bug:?}"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    bugs.first()
        .with_context(|| format!("no bug has this name; there are {}", names()))?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    bulkhead_chaos::planted::run(&bugs, planted.seeds, jobs, &mut std::io::stdout().lock())
}

fn simulate(sim: Sim) -> anyhow::Result<Verdict> {
    let simulation = Simulation {
        seeds: sim.seeds,
        from: sim.from,
        jobs: sim.jobs,
        replay: sim.replay,
        without: sim.without.into_iter().collect(),
        clients: sim.clients,
        trouble_ms: sim.trouble,
        every_message: sim.messages,
        report: sim.report,
    };
    sim_command::run(&simulation, &mut std::io::stdout().lock())
}
