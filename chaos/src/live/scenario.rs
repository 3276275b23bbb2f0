//! A scenario of a user's own: services, faults and what is expected of them, as YAML.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Deserializer, Serialize, de};

use super::campaign::{Image, Service};
use super::fault::{Fault, Strike, TARGETS, Target};

/// Bytes of a scenario's file.
const FILE_BYTES: u64 = 1 << 20;
/// A run is no longer than a day.
const LENGTH: Duration = Duration::from_secs(24 * 60 * 60);
/// Strikes of one run.
const STRIKES: usize = 100_000;
const FAULTS: usize = 1_000;
const SERVICES: usize = 32;
const REPLICAS: u32 = 1_000;
const NODES: std::ops::RangeInclusive<u8> = 1..=9;
const WORKERS: std::ops::RangeInclusive<u8> = 0..=32;

/// A time as people write it: `500ms`, `10s`, `1m 30s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Time(Duration);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let refuse = || de::Error::custom(format!("'{text}' is no time: write one like 500ms, 10s or 2m"));
        let time: jiff::SignedDuration = text.parse().map_err(|_| refuse())?;
        Duration::try_from(time).map(Self).map_err(|_| refuse())
    }
}

/// A share: `99.5%`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize)]
pub struct Percent(f64);

impl Percent {
    /// The share, from 0 to 1.
    pub fn share(self) -> f64 {
        self.0 / 100.0
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = text.strip_suffix('%').and_then(|it| it.trim().parse().ok());
        number
            .filter(|it| (0.0..=100.0).contains(it))
            .map(Self)
            .ok_or_else(|| de::Error::custom(format!("'{text}' is no share: write one like 99% or 99.9%")))
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    #[serde(default)]
    cluster: Nodes,
    #[serde(default)]
    seed: u64,
    length: Time,
    #[serde(default)]
    services: Vec<ServiceEntry>,
    #[serde(default)]
    faults: Vec<FaultEntry>,
    #[serde(default)]
    expect: ExpectEntry,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nodes {
    managers: u8,
    workers: u8,
}

impl Default for Nodes {
    fn default() -> Self {
        Self {
            managers: 3,
            workers: 2,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceEntry {
    name: String,
    image: ImageEntry,
    #[serde(default = "one")]
    replicas: u32,
    publish: Option<u16>,
    #[serde(default = "http")]
    port: u16,
    #[serde(default)]
    environment: Vec<String>,
    #[serde(default)]
    command: Vec<String>,
}

fn one() -> u32 {
    1
}

fn http() -> u16 {
    80
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum ImageEntry {
    Probe,
    Stored(String),
    Archive(PathBuf),
    Program(PathBuf),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FaultEntry {
    fault: Fault,
    #[serde(default)]
    target: Option<Target>,
    at: Option<Time>,
    every: Option<Time>,
    from: Option<Time>,
    probability: Option<f64>,
    #[serde(rename = "for")]
    lasts: Option<Time>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpectEntry {
    answered: Option<Percent>,
    recovery: Option<Time>,
    restarts: Option<u64>,
}

/// What a scenario expects, beyond the rules that always hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Expect {
    /// Of all requests to its services at least this share is answered.
    pub answered: Option<Percent>,
    /// A write that is sent after a fault began is acknowledged within this time.
    pub recovery: Option<Duration>,
    /// So many tasks of its services end during the run, at most.
    pub restarts: Option<u64>,
}

/// A scenario: all in it was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// Managers and workers of the cluster that it is for, where one is made.
    pub nodes: (u8, u8),
    /// What is left to chance is drawn from this.
    pub seed: u64,
    /// How long it takes.
    pub length: Duration,
    /// What runs in the cluster.
    pub services: Vec<Service>,
    /// What is done to it, in order.
    pub strikes: Vec<Strike>,
    /// What is expected.
    pub expect: Expect,
}

/// A scenario that is none.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// The file cannot be read.
    #[error("could not read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is too long.
    #[error("{path} has more than {FILE_BYTES} bytes")]
    Long {
        /// The file.
        path: PathBuf,
    },
    /// It is no YAML, or has keys or values that are not known.
    #[error("{path}: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        reason: String,
    },
    /// What it says cannot be.
    #[error("{path}: {}", mistakes.join("; "))]
    Mistakes {
        /// The file.
        path: PathBuf,
        /// All of them.
        mistakes: Vec<String>,
    },
}

impl Scenario {
    /// Reads a file; paths in it are from its own folder.
    ///
    /// # Errors
    /// [`ScenarioError`].
    pub fn read(path: &Path) -> Result<Self, ScenarioError> {
        let read = || -> std::io::Result<Option<String>> {
            if std::fs::metadata(path)?.len() > FILE_BYTES {
                return Ok(None);
            }
            std::fs::read_to_string(path).map(Some)
        };
        let text = read().map_err(|source| ScenarioError::Read {
            path: path.to_owned(),
            source,
        })?;
        let text = text.ok_or_else(|| ScenarioError::Long {
            path: path.to_owned(),
        })?;
        Self::parse(&text, path)
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// [`ScenarioError`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ScenarioError> {
        let file: File = serde_saphyr::from_str(text).map_err(|error| ScenarioError::Syntax {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        let mistakes = mistakes(&file);
        if !mistakes.is_empty() {
            return Err(ScenarioError::Mistakes {
                path: path.to_owned(),
                mistakes,
            });
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        Ok(Self {
            strikes: strikes(&file),
            name: file.name,
            nodes: (file.cluster.managers, file.cluster.workers),
            seed: file.seed,
            length: file.length.0,
            services: file.services.into_iter().map(|it| service(it, folder)).collect(),
            expect: Expect {
                answered: file.expect.answered,
                recovery: file.expect.recovery.map(|it| it.0),
                restarts: file.expect.restarts,
            },
        })
    }
}

fn service(entry: ServiceEntry, folder: &Path) -> Service {
    Service {
        name: entry.name,
        image: match entry.image {
            ImageEntry::Probe => Image::Probe,
            ImageEntry::Stored(name) => Image::Stored(name),
            ImageEntry::Archive(path) => Image::Archive(folder.join(path)),
            ImageEntry::Program(path) => Image::Program(folder.join(path)),
        },
        replicas: entry.replicas,
        publish: entry.publish,
        port: entry.port,
        environment: entry.environment,
        command: entry.command,
        canary: false,
    }
}

fn mistakes(file: &File) -> Vec<String> {
    let mut all = Vec::new();
    let length = file.length.0;
    if length < Duration::from_secs(1) || length > LENGTH {
        all.push("length: from 1s to 24h".to_owned());
    }
    if !NODES.contains(&file.cluster.managers) {
        all.push(format!("cluster: {} to {} managers", NODES.start(), NODES.end()));
    }
    if !WORKERS.contains(&file.cluster.workers) {
        all.push(format!("cluster: at most {} workers", WORKERS.end()));
    }
    if file.services.len() > SERVICES {
        all.push(format!("services: at most {SERVICES}"));
    }
    if file.faults.len() > FAULTS {
        all.push(format!("faults: at most {FAULTS}"));
    }
    let (mut names, mut ports) = (BTreeSet::new(), BTreeSet::new());
    for one in &file.services {
        if !names.insert(&one.name) {
            all.push(format!("services: two are called {}", one.name));
        }
        if one.name.starts_with("chaos-") {
            all.push(format!(
                "services: {} begins with chaos-, as what this program makes itself",
                one.name
            ));
        }
        if one.publish.is_some_and(|port| port == 0 || !ports.insert(port)) {
            all.push(format!(
                "services: {} publishes a port that another one has, or none",
                one.name
            ));
        }
        if one.replicas == 0 || one.replicas > REPLICAS {
            all.push(format!("services: {} has 1 to {REPLICAS} replicas", one.name));
        }
        if one.environment.iter().any(|it| !it.contains('=')) {
            all.push(format!(
                "services: environment of {} is a list of NAME=value",
                one.name
            ));
        }
    }
    if file.expect.answered.is_some() && file.services.iter().all(|it| it.publish.is_none()) {
        all.push(
            "expect: answered is of requests to a service that publishes a port, and none does".to_owned(),
        );
    }
    for (number, one) in (1..).zip(&file.faults) {
        let mut wrong = |what: &str| all.push(format!("faults: number {number}, {}: {what}", one.fault));
        match (one.at, one.every) {
            (None, None) | (Some(_), Some(_)) => wrong("it comes either `at` a time or `every` so often"),
            (Some(at), None) if at.0 >= length => wrong("it comes after the end"),
            (None, Some(every)) if every.0 < Duration::from_millis(100) => wrong("`every` is 100ms at least"),
            _ => {}
        }
        match (one.from, one.every) {
            (Some(_), None) => wrong("`from` goes with `every`"),
            (from, Some(every)) if from.unwrap_or(every).0 >= length => {
                wrong("the first one comes after the end")
            }
            _ => {}
        }
        if one.probability.is_some_and(|it| !(it > 0.0 && it <= 1.0)) {
            wrong("a probability is above 0, and at most 1");
        }
        match (one.lasts, one.fault.is_over_at_once()) {
            (Some(_), true) => wrong("it is over at once, so it has no `for`"),
            (None, false) => wrong("it lasts `for` some time"),
            (Some(lasts), false) if lasts.0 > length => wrong("it lasts longer than the scenario"),
            _ => {}
        }
        match (&one.target, one.fault.is_of_all()) {
            (Some(_), true) => wrong("it is of the whole cluster, so it has no target"),
            (None, false) => {
                wrong(&format!("it has a target: {TARGETS}"));
            }
            (Some(Target::Worker), false) if !one.fault.is_for_workers() => wrong("it is for managers"),
            (Some(Target::Leader | Target::Follower | Target::Manager | Target::AllManagers), false)
                if !one.fault.is_for_managers() =>
            {
                wrong("it is for workers");
            }
            (Some(Target::AllManagers), false) if one.fault.is_of_network() => {
                wrong("a fault of the network has one node as its target");
            }
            (Some(Target::AllManagers), false) if one.fault == Fault::LoseStore => {
                wrong("no cluster comes back from the loss of every store: it has one manager as its target");
            }
            _ => {}
        }
        let often = one
            .every
            .map_or(1, |every| length.as_nanos() / every.0.as_nanos().max(1));
        if often > STRIKES as u128 {
            wrong("it comes too often");
        }
    }
    all
}

fn strikes(file: &File) -> Vec<Strike> {
    let mut random = SmallRng::seed_from_u64(file.seed);
    let length = file.length.0;
    let mut all = Vec::new();
    for one in &file.faults {
        let lasts = one.lasts.map_or(Duration::ZERO, |it| it.0);
        let mut times = Vec::new();
        if let Some(at) = one.at {
            times.push(at.0);
        }
        if let Some(every) = one.every {
            let mut at = one.from.unwrap_or(every).0;
            while at < length {
                times.push(at);
                at += every.0;
            }
        }
        for at in times {
            if one.probability.is_none_or(|it| random.random_bool(it)) {
                all.push(Strike {
                    at,
                    fault: one.fault,
                    target: one.target.clone().unwrap_or_default(),
                    // What lasts until after the end is taken back at the end.
                    lasts: lasts.min(length.saturating_sub(at)),
                });
            }
        }
    }
    all.sort_by_key(|strike| strike.at);
    all.truncate(STRIKES);
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Scenario, ScenarioError> {
        Scenario::parse(text, Path::new("folder/scenario.yml"))
    }

    const WHOLE: &str = "
name: a whole one
cluster: {managers: 5, workers: 3}
seed: 7
length: 1m
services:
  - {name: web, image: probe, replicas: 4, publish: 8080}
  - {name: own, image: {archive: own.tar}, environment: [A=b], command: [serve]}
faults:
  - {at: 5s, fault: kill, target: leader, for: 3s}
  - {every: 10s, from: 2s, probability: 0.5, fault: pause, target: worker-1, for: 500ms}
  - {at: 20s, fault: rotate-root}
expect: {answered: 99.5%, recovery: 2s, restarts: 0}
";

    #[test]
    fn a_whole_scenario_is_what_it_says() {
        let scenario = parse(WHOLE).expect("sound");
        assert_eq!(
            (scenario.nodes, scenario.length),
            ((5, 3), Duration::from_secs(60))
        );
        assert_eq!(
            scenario.services[1].image,
            Image::Archive("folder/own.tar".into())
        );
        assert_eq!(scenario.expect.answered.map(Percent::share), Some(0.995));
        let kinds = |fault| scenario.strikes.iter().filter(|it| it.fault == fault).count();
        assert_eq!((kinds(Fault::Kill), kinds(Fault::RotateRoot)), (1, 1));
        assert!((1..6).contains(&kinds(Fault::Pause)), "{:?}", scenario.strikes);
        assert_eq!(scenario, parse(WHOLE).expect("sound"), "chance is the seed's");
        assert!(scenario.strikes.is_sorted_by_key(|it| it.at));
    }

    #[test]
    fn every_mistake_is_said_at_once() {
        let error = parse(
            "
name: wrong
length: 0s
cluster: {managers: 10, workers: 1}
services: [{name: chaos-x, image: probe}, {name: a, image: probe, publish: 80}, {name: a, image: probe, publish: 80}, {name: b, image: probe, replicas: 0}]
faults:
  - {fault: kill, target: leader, for: 1s}
  - {at: 1s, fault: drain, target: leader, for: 1s}
  - {at: 1s, fault: split, target: worker, for: 1s}
  - {at: 1s, fault: rotate-root, for: 1s}
  - {at: 1s, fault: ring, target: leader, for: 1s}
  - {at: 1s, fault: pause, target: leader}
  - {every: 1s, from: 20s, fault: pause, target: leader, for: 1s}
  - {at: 1s, fault: lose-store, target: all-managers, for: 1s}
",
        );
        let text = error.expect_err("wrong").to_string();
        for part in [
            "length: from 1s",
            "1 to 9 managers",
            "begins with chaos-",
            "two are called a",
            "publishes a port",
            "either `at`",
            "it is for workers",
            "it is for managers",
            "so it has no `for`",
            "so it has no target",
            "it lasts `for`",
            "the first one comes after the end",
            "the loss of every store",
            "b has 1 to 1000 replicas",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn requests_are_expected_only_where_some_are_made() {
        let wanted = |services| {
            parse(&format!(
                "{{name: x, length: 5s, services: [{services}], expect: {{answered: 99%}}}}"
            ))
        };
        let error = wanted("{name: a, image: probe}").expect_err("nobody is asked");
        assert!(error.to_string().contains("expect: answered"), "{error}");
        wanted("{name: a, image: probe, publish: 80}").expect("sound");
    }

    #[test]
    fn what_is_not_known_is_refused_with_its_place() {
        for (text, part) in [
            ("name: x\nlength: 5s\nfaulst: []\n", "faulst"),
            ("name: x\nlength: 5 parsecs\n", "no time"),
            (
                "name: x\nlength: 5s\nfaults: [{at: 1s, fault: explode, for: 1s}]\n",
                "explode",
            ),
            ("name: x\nlength: 5s\nexpect: {answered: 101%}\n", "no share"),
            ("name: x\nname: y\nlength: 5s\n", "name"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(part) && error.contains("line"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_read(text in "\\PC{0,400}") {
            let _read = parse(&text); // neither panics nor takes long
        }

        #[test]
        fn a_changed_scenario_is_refused_or_read(at in 0..WHOLE.len(), byte in any::<u8>()) {
            let mut bytes = WHOLE.as_bytes().to_vec();
            bytes[at] = byte;
            if let Ok(text) = String::from_utf8(bytes) {
                let _read = parse(&text);
            }
        }
    }
}
