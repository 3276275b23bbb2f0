//! `bulkhead-chaos`: breaks clusters on purpose, and says whether they held.

use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_chaos::flood_command;
use bulkhead_chaos::live::{self, Ground, Plan};
use bulkhead_chaos::live_command::{self, Options, Work};
use bulkhead_chaos::partitions_command;
use bulkhead_chaos::report::Verdict;
use bulkhead_chaos::sim_command::{self, Simulation};
use bulkhead_chaos::wire_command;
use clap::{Parser, Subcommand, ValueEnum as _};

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
    /// Simulated clusters of five whose network is in parts: how long until they serve writes again, and how often they
    /// change their leader. Exit code 1 if that took more than 2 s, or more than 2 changes, in any of the shapes.
    Partitions {
        /// Seeds for each shape.
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
        seeds: u64,
        /// Runs at once; the number of processors unless given.
        #[arg(long, value_name = "N")]
        jobs: Option<usize>,
    },
    /// Three managers in this process, on real time, that are written to as fast as the processors let them: consensus,
    /// snapshots and purges compete for minutes. Exit code 1 if the leader changed or a rule broke, 2
    /// if no write was acknowledged.
    Flood {
        /// For so long.
        #[arg(long, value_name = "N", default_value_t = 1.0, value_parser = minutes)]
        minutes: f64,
        /// Entries between two snapshots of a member; managers make one after 5,000.
        #[arg(long, value_name = "N", default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(100..=10_000_000))]
        snapshot_every: u64,
    },
    /// A cluster of real programs on this machine, each node in a network namespace of its own; or one that was made with
    /// --lab, by its context. Needs root, `ip` and `nft`.
    Live(Live),
    /// A cluster of docker-compose: one of its own, or one that runs. Needs root, docker, docker-compose and `nft`.
    Compose(Compose),
    /// A scenario of your own, from a file: docs/operations/chaos.md.
    Run(Run),
    /// Takes back whatever a run that was killed left behind.
    Cleanup {
        /// The folder of the journals.
        #[arg(long, value_name = "FOLDER", default_value = live::FOLDER)]
        state: PathBuf,
    },
    /// Switches bugs on, one after the other, and counts the seeds of the simulation that find each.
    #[cfg(feature = "planted")]
    Planted(Planted),
}

#[cfg(feature = "planted")]
#[derive(Debug, clap::Args)]
struct Planted {
    /// These bugs alone, by their names.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    bug: Vec<String>,
    /// Seeds that may be tried for each.
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    seeds: u64,
}

/// What is done, for how long.
#[derive(Debug, clap::Args)]
struct Drawn {
    /// What the campaign is about.
    #[arg(long, value_enum, default_value_t = Plan::Mixed)]
    plan: Plan,
    /// For so long.
    #[arg(long, value_name = "N", default_value_t = 5.0, value_parser = minutes)]
    minutes: f64,
    /// The faults are drawn from this seed; a new one for each run unless given.
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
}

/// Where everything goes.
#[derive(Debug, clap::Args)]
struct Places {
    /// The folder of the report.
    #[arg(long, value_name = "FOLDER", default_value = "chaos-report")]
    report: PathBuf,
    /// The folder of the journal, from which `cleanup` takes back what a killed run left.
    #[arg(long, value_name = "FOLDER", default_value = live::FOLDER)]
    state: PathBuf,
    /// The folder of the cluster's programs; that of this program unless given.
    #[arg(long, value_name = "FOLDER")]
    bin: Option<PathBuf>,
    /// Where the cluster's own folder is made; the folder for temporary files unless given.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Live {
    /// Managers and workers, as 3+3.
    #[arg(long, value_name = "M+W", default_value = "3+3", value_parser = nodes)]
    nodes: (u8, u8),
    /// Breaks the cluster of this context in place of a new one; it must have been made with --lab.
    #[arg(long, value_name = "CONTEXT", conflicts_with = "nodes")]
    target: Option<String>,
    #[command(flatten)]
    drawn: Drawn,
    #[command(flatten)]
    places: Places,
}

#[derive(Debug, clap::Args)]
struct Compose {
    /// The compose file.
    #[arg(long, value_name = "FILE", default_value = "chaos/compose/docker-compose.yml")]
    file: PathBuf,
    /// A project that runs, made with --lab; one is made, and removed, unless given.
    #[arg(long, value_name = "NAME")]
    project: Option<String>,
    #[command(flatten)]
    drawn: Drawn,
    #[command(flatten)]
    places: Places,
}

#[derive(Debug, clap::Args)]
struct Run {
    /// The scenario, YAML.
    scenario: PathBuf,
    /// Breaks the cluster of this context in place of a new one; it must have been made with --lab.
    #[arg(long, value_name = "CONTEXT", conflicts_with = "compose")]
    target: Option<String>,
    /// Breaks a cluster of this compose file in place of one in namespaces.
    #[arg(long, value_name = "FILE")]
    compose: Option<PathBuf>,
    /// With --compose: a project that runs.
    #[arg(long, value_name = "NAME", requires = "compose")]
    project: Option<String>,
    #[command(flatten)]
    places: Places,
}

/// At most a day.
fn minutes(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.3..=1_440.0).contains(&number) {
        return Ok(number);
    }
    Err("from 0.3 to 1440".to_owned())
}

/// Workers of clusters of real programs, and of simulations of whole ones.
const MOST_WORKERS: u8 = 32;
/// And where they are plain tasks.
const MOST_SIMULATED: u16 = 1_000;

fn nodes(text: &str) -> Result<(u8, u8), String> {
    counts(text, MOST_WORKERS)
}

fn simulated_nodes(text: &str) -> Result<(u16, u16), String> {
    counts(text, MOST_SIMULATED)
}

fn counts<T: std::str::FromStr + Copy + PartialOrd + From<u8> + std::fmt::Display>(
    text: &str,
    most: T,
) -> Result<(T, T), String> {
    let parsed = text.split_once('+').and_then(|(managers, workers)| {
        let counts: (T, T) = (managers.parse().ok()?, workers.parse().ok()?);
        let fit = (T::from(1)..=T::from(9)).contains(&counts.0) && counts.1 <= most;
        fit.then_some(counts)
    });
    parsed.ok_or_else(|| format!("managers and workers, as 3+3: 1 to 9 and at most {most}"))
}

/// How much of the programs a simulation has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Level {
    /// Replicas over their log store.
    Core,
    /// Whole programs: managers and workers with TLS and their API, and an operator.
    Wire,
}

#[derive(Debug, clap::Args)]
struct Sim {
    /// What is simulated.
    #[arg(long, value_enum, default_value_t = Level::Core)]
    level: Level,
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
    /// So many clients instead of those of the seed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100))]
    clients: Option<u64>,
    /// With --replay: things go wrong for so long, in simulated milliseconds.
    #[arg(long, value_name = "MS", requires = "replay", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    trouble: Option<u64>,
    /// With --replay: each message on the network, too.
    #[arg(long, requires = "replay")]
    messages: bool,
    /// Managers and workers, as 5+20, instead of those of the seed, which has no workers without --level wire.
    #[arg(long, value_name = "M+W", value_parser = simulated_nodes)]
    nodes: Option<(u16, u16)>,
    /// With --replay: what the programs log, too, as in `info,bulkhead_manager=debug`.
    #[arg(long, value_name = "FILTER", requires = "replay")]
    log: Option<String>,
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
        Command::Partitions { seeds, jobs } => {
            partitions_command::run(seeds, jobs, &mut std::io::stdout().lock())
        }
        Command::Flood {
            minutes,
            snapshot_every,
        } => flood_command::run(minutes, snapshot_every, &mut std::io::stdout().lock()),
        Command::Live(live) => break_live(live),
        Command::Compose(compose) => break_compose(compose),
        Command::Run(scenario) => run_scenario(scenario),
        Command::Cleanup { state } => {
            live::clean_up(&state, &mut std::io::stdout().lock()).map(|()| Verdict::Pass)
        }
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

    let named = |bug: &&Bug| planted.bug.is_empty() || planted.bug.contains(&format!("{bug:?}"));
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
    if let Some(filter) = &sim.log {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::try_new(filter)?)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
    }
    if sim.level == Level::Wire {
        return simulate_programs(sim);
    }
    let simulation = Simulation {
        seeds: sim.seeds,
        from: sim.from,
        jobs: sim.jobs,
        replay: sim.replay,
        without: sim.without.into_iter().collect(),
        clients: sim.clients,
        nodes: sim.nodes,
        trouble_ms: sim.trouble,
        every_message: sim.messages,
        report: sim.report,
    };
    sim_command::run(&simulation, &mut std::io::stdout().lock())
}

fn simulate_programs(sim: Sim) -> anyhow::Result<Verdict> {
    anyhow::ensure!(!sim.messages, "--messages is for --level core");
    let nodes = match sim.nodes {
        None => None,
        Some((managers, workers)) => Some((
            u8::try_from(managers)?,
            u8::try_from(workers)
                .ok()
                .filter(|it| *it <= MOST_WORKERS)
                .ok_or_else(|| anyhow::anyhow!("--level wire has {MOST_WORKERS} workers at most"))?,
        )),
    };
    if let Some(filter) = &sim.log {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::try_new(filter)?)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
    }
    let simulation = wire_command::Simulation {
        seeds: sim.seeds,
        from: sim.from,
        jobs: sim.jobs,
        replay: sim.replay,
        without: sim.without.into_iter().collect(),
        trouble_ms: sim.trouble,
        nodes,
        clients: sim.clients,
        report: sim.report,
    };
    wire_command::run(&simulation, &mut std::io::stdout().lock())
}

fn break_live(live: Live) -> anyhow::Result<Verdict> {
    let programs = programs(live.places.bin.as_ref())?;
    let (managers, workers) = live.nodes;
    let (ground, which) = match live.target {
        Some(name) => (context(&name, &programs)?, format!("--target {name}")),
        None => {
            let ground = Ground::Namespaces {
                programs,
                managers,
                workers,
                disk: None,
            };
            (ground, format!("--nodes {managers}+{workers}"))
        }
    };
    drawn(ground, &format!("live {which}"), &live.drawn, live.places)
}

fn break_compose(compose: Compose) -> anyhow::Result<Verdict> {
    let which = compose
        .project
        .as_ref()
        .map_or(String::new(), |name| format!(" --project {name}"));
    let line = format!("compose --file {}{which}", compose.file.display());
    let ground = Ground::Compose {
        file: compose.file,
        project: compose.project,
    };
    drawn(ground, &line, &compose.drawn, compose.places)
}

fn drawn(ground: Ground, line: &str, drawn: &Drawn, places: Places) -> anyhow::Result<Verdict> {
    let seed = drawn.seed.unwrap_or_else(|| std::process::id().into()); // another one for each run; the report names it
    let plan = drawn
        .plan
        .to_possible_value()
        .map_or(String::new(), |it| it.get_name().to_owned());
    let replay = format!(
        "bulkhead-chaos {line} --plan {plan} --minutes {} --seed {seed}",
        drawn.minutes
    );
    let work = Work::Drawn {
        plan: drawn.plan,
        seed,
        length: std::time::Duration::from_secs_f64(drawn.minutes * 60.0),
    };
    live_command::run(options(ground, places, replay), &work)
}

fn run_scenario(run: Run) -> anyhow::Result<Verdict> {
    let programs = programs(run.places.bin.as_ref())?;
    let mut line = format!("bulkhead-chaos run {}", run.scenario.display());
    let ground = match (run.target, run.compose) {
        (Some(name), _) => {
            line.push_str(&format!(" --target {name}"));
            context(&name, &programs)?
        }
        (None, Some(file)) => {
            line.push_str(&format!(" --compose {}", file.display()));
            Ground::Compose {
                file,
                project: run.project,
            }
        }
        (None, None) => Ground::Namespaces {
            programs,
            managers: 3,
            workers: 2,
            disk: None,
        },
    };
    live_command::run(options(ground, run.places, line), &Work::Written(run.scenario))
}

fn options(ground: Ground, places: Places, replay: String) -> Options {
    Options {
        ground,
        report: places.report,
        state: places.state,
        below: places.folder.unwrap_or_else(std::env::temp_dir),
        replay,
    }
}

/// The folder of the programs: the one that is named, or this one's own.
fn programs(named: Option<&PathBuf>) -> anyhow::Result<PathBuf> {
    use anyhow::Context as _;
    if let Some(folder) = named {
        return Ok(folder.clone());
    }
    let own = std::env::current_exe().context("this program has no path")?;
    Ok(own.parent().map(PathBuf::from).unwrap_or_default())
}

/// The context of this name, where the command line keeps them.
fn context(name: &str, programs: &std::path::Path) -> anyhow::Result<Ground> {
    use anyhow::Context as _;
    anyhow::ensure!(!name.contains(['/', '.']), "'{name}' is no context's name");
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config"));
    let config = config
        .or_else(home)
        .context("neither XDG_CONFIG_HOME nor HOME says where contexts are")?;
    Ok(Ground::Context {
        folder: config.join("bulkhead/contexts").join(name),
        program: programs.join("bulkhead"),
    })
}
