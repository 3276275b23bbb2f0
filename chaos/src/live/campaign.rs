//! A campaign from beginning to end.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bulkhead_identity::seam::{Entropy as _, SystemEntropy};
use bulkhead_lab::client::{Managers, new_id};
use bulkhead_lab::namespace::Switch;
use bulkhead_lab::scan::{Needles, files_below};
use bulkhead_lab::{claims_of, nodes, status, system};
use bulkhead_proto::wire::{
    CreateSecretRequest, CreateServiceRequest, Kind, ListRequest, NodeStatus, PublishedPort, RemoveRequest,
    Resources, Role, SecretReference, ServiceSpec, TaskSummary,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::cluster::{Cluster, Ground, Node};
use super::driver::Driver;
use super::fault::{Strike, must_be_there};
use super::journal::{Journal, PREFIX};
use super::judge::{End, gaps, judge, unexpected};
use super::load::{self, Client, IMAGE};
use super::micros;
use super::record::{Event, Record, What};
use super::report::{Document, Run};
use super::scenario::Expect;
use super::watch;
use crate::report::Verdict;
use crate::rules::{Rule, Violation};

/// A secret whose value must stay where it is used.
const CANARY: &str = "bulkhead-chaos-canary";
/// Once all is well a write is served within this.
const SERVES: Duration = Duration::from_secs(10);
/// And everything is as it should be within this: a worker that stood still for long is called down, comes back, and gets
/// tasks again.
const CONVERGES: Duration = Duration::from_secs(90);
const PREPARES: Duration = Duration::from_secs(60);
const CALL: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);
/// Clients of each service.
const ASKERS: usize = 2;
/// Of a log so many bytes are kept, the last ones.
const LOG_BYTES: usize = 16 << 20;
/// Of all errors in it these many bytes, the first ones.
const ERROR_BYTES: usize = 1 << 20;

/// Where a service's image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// A web server that comes with this program.
    Probe,
    /// One that the cluster has.
    Stored(String),
    /// An OCI layout, folder or tar.
    Archive(PathBuf),
    /// A static program.
    Program(PathBuf),
}

/// A service of the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: Image,
    /// How many of it run.
    pub replicas: u32,
    /// The port of each node with a replica, if it is to be reached; requests are made to it during the run.
    pub publish: Option<u16>,
    /// The port that the program listens at.
    pub port: u16,
    /// NAME=value.
    pub environment: Vec<String>,
    /// What runs in place of the image's own command.
    pub command: Vec<String>,
    /// Whether it uses the secret that is looked for afterwards.
    pub canary: bool,
}

/// The clients of the control service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clients {
    /// How many write new objects, one after the other.
    pub writers: u64,
    /// How many change objects that others change, too.
    pub contenders: u64,
    /// What each waits between two operations.
    pub pause: Duration,
}

/// All that a run is.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// What it is called.
    pub name: String,
    /// What is left to chance is drawn from this.
    pub seed: u64,
    /// The cluster.
    pub ground: Ground,
    /// What is done to it.
    pub strikes: Vec<Strike>,
    /// For how long.
    pub length: Duration,
    /// What runs in it.
    pub services: Vec<Service>,
    /// Who uses it.
    pub clients: Clients,
    /// What is expected, beyond the rules.
    pub expect: Expect,
    /// The folder of the report.
    pub report: PathBuf,
    /// The folder of the journal.
    pub state: PathBuf,
    /// Where the cluster's folder is made.
    pub below: PathBuf,
    /// The command that runs this again.
    pub replay: String,
}

/// Runs a campaign, writes its report, and says meanwhile what it does.
///
/// # Errors
/// Where the cluster cannot be made or reached, this program cannot do what it should, or a signal ended it. Everything
/// was taken back then, or is in the journal ([`super::clean_up`]).
pub async fn run(
    campaign: &Campaign,
    switch: Option<Switch>,
    say: &mut (dyn FnMut(String) + Send),
) -> anyhow::Result<Verdict> {
    // Known before the run, whose result would be lost.
    std::fs::create_dir_all(&campaign.report)
        .with_context(|| format!("no report can be written into {}", campaign.report.display()))?;
    let own = switch.as_ref().map(Switch::own_address);
    let mut journal = Journal::begin(&campaign.state)?;
    let below = tempfile::Builder::new()
        .prefix(PREFIX)
        .tempdir_in(&campaign.below)
        .with_context(|| format!("could not make a folder below {}", campaign.below.display()))?
        .keep();
    std::fs::set_permissions(&below, std::fs::Permissions::from_mode(0o711))?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = Stop::default();
    let ran = {
        let mut work = Box::pin(work(campaign, switch, own, &below, &mut journal, &stop, say));
        loop {
            tokio::select! {
                biased;
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                ran = &mut work => break ran,
            }
            // Where nothing is up yet, and with the second signal, the journal alone takes back what there is.
            if !stop.ask() {
                break Err(anyhow::anyhow!("{INTERRUPTED}"));
            }
        }
    };
    let ended = journal.end();
    if below.exists() {
        std::fs::remove_dir_all(&below).with_context(|| format!("could not remove {}", below.display()))?;
    }
    let mut run = ran?;
    ended.context("not everything was taken back; `bulkhead-chaos cleanup` tries again")?;
    let left = left(&below, &run.groups, campaign);
    run.tried.insert(Rule::NothingIsLeft);
    run.broken.extend(left.into_iter().map(|evidence| Violation {
        rule: Rule::NothingIsLeft,
        at_us: run.elapsed_us,
        evidence,
    }));
    let document = Document::new(campaign, run)?;
    document
        .write(&campaign.report)
        .with_context(|| format!("could not write the report into {}", campaign.report.display()))?;
    say(document.summary());
    Ok(document.verdict())
}

const INTERRUPTED: &str = "interrupted; everything was taken back";

/// Whether a run is to end before its time.
#[derive(Debug, Default)]
pub(super) struct Stop {
    /// The cluster is up: the run itself takes back what was done to it.
    up: AtomicBool,
    asked: AtomicBool,
}

impl Stop {
    /// Asks for it; whether the run will do so by itself.
    fn ask(&self) -> bool {
        self.up.load(Ordering::Relaxed) && !self.asked.swap(true, Ordering::Relaxed)
    }

    pub(super) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

/// What a run made in a cluster, by names; a cluster that stays gets rid of these and of nothing else.
#[derive(Debug, Default)]
struct Made {
    services: Vec<String>,
    secrets: Vec<String>,
    images: Vec<String>,
}

async fn work(
    campaign: &Campaign,
    switch: Option<Switch>,
    own: Option<std::net::Ipv4Addr>,
    below: &Path,
    journal: &mut Journal,
    stop: &Stop,
    say: &mut (dyn FnMut(String) + Send),
) -> anyhow::Result<Run> {
    say("the cluster comes up".to_owned());
    let mut cluster = Cluster::at(&campaign.ground, switch, below, journal).await?;
    must_be_lab(&mut cluster.client()?).await?;
    let nodes: Vec<String> = cluster.nodes().iter().map(|it| it.name.clone()).collect();
    must_be_there(&campaign.strikes, &nodes)?;
    stop.up.store(true, Ordering::Relaxed);
    let record = Arc::new(Record::begin());
    let mut made = Made::default();
    let ran = strike(
        campaign,
        &mut cluster,
        own,
        &record,
        journal,
        stop,
        &mut made,
        say,
    )
    .await;
    if !campaign.is_of_its_own() {
        made.secrets.extend(record.seen().secrets.keys().cloned());
        tidy(&cluster, made).await?;
    }
    let groups = cluster.groups();
    drop(cluster); // one of its own ends with it; the journal has what else is to be taken back
    Ok(Run { groups, ..ran? })
}

/// Faults are for clusters that were made for them.
async fn must_be_lab(managers: &mut Managers) -> anyhow::Result<()> {
    let mut last = None;
    for at in 0..managers.count() {
        match status(&mut managers.control(at)?).await {
            Ok(status) if status.lab => return Ok(()),
            Ok(_) => bail!(
                "this cluster was not made with --lab, so nothing in it is broken on purpose; \
                 `bulkhead cluster init --lab` and `bulkhead dev up` make one that may be"
            ),
            Err(error) => last = Some(error.message().to_owned()),
        }
    }
    bail!("no manager answers: {}", last.unwrap_or_default())
}

/// Everything that needs the cluster.
#[expect(
    clippy::too_many_arguments,
    reason = "the parts of one run, which are used nowhere else"
)]
async fn strike(
    campaign: &Campaign,
    cluster: &mut Cluster,
    own: Option<std::net::Ipv4Addr>,
    record: &Arc<Record>,
    journal: &mut Journal,
    stop: &Stop,
    made: &mut Made,
    say: &mut (dyn FnMut(String) + Send),
) -> anyhow::Result<Run> {
    // A proxy needs an address that nodes reach: of containers it is their network's gateway, which is this machine.
    let own = own.or_else(|| cluster.gateway());
    let needles = prepare(cluster, campaign, made, stop).await?;
    let began = jiff::Timestamp::now();
    let mut control = cluster.client()?.control(0)?;
    made.services.extend((0..load::REGISTERS).map(load::name));
    load::make_registers(&mut control, record).await?;
    let all = Arc::new(cluster.nodes().to_vec());
    let names: Vec<String> = campaign.services.iter().map(|it| it.name.clone()).collect();
    say(format!(
        "{} managers and {} workers are up, {} strikes in {} s",
        cluster.managers(),
        all.len() - cluster.managers(),
        campaign.strikes.len(),
        campaign.length.as_secs()
    ));
    let mut driver = Driver::new(cluster, journal, record.clone(), own, campaign.seed)?;
    let mut clients = JoinSet::new();
    begin(
        &mut clients,
        campaign,
        driver.cluster,
        record,
        &all,
        &driver.addresses,
        names.clone(),
    )?;
    let struck = driver.run(&campaign.strikes, campaign.length, stop, say).await;
    let healed = driver.heal().await;
    struck.and(healed)?;
    anyhow::ensure!(!stop.is_asked(), INTERRUPTED);
    record.event(What::AllIsWell);
    say("every fault is taken back".to_owned());
    let mut broken = Vec::new();
    settle(&mut driver, campaign, &names, &mut broken).await?;
    clients.shutdown().await;
    let end = last_look(driver.cluster).await;
    let mut done = std::mem::take(&mut driver.done);
    drop(driver);
    let elapsed_us = record.now_us();
    let node_names: Vec<String> = all.iter().map(|it| it.name.clone()).collect();
    gaps(&mut done, &record.seen());
    let (found, unknown) = judge(&record.seen(), &done, &node_names, &end, elapsed_us);
    broken.extend(found);
    broken.extend(unexpected(&record.seen(), &done, &campaign.expect, elapsed_us));
    let mut tried: BTreeSet<Rule> = Rule::OF_PROGRAMS
        .iter()
        .copied()
        .filter(|it| !unknown.contains(it))
        .collect();
    if campaign.expect == Expect::default() {
        tried.remove(&Rule::Expected);
    }
    if let Some(needles) = &needles {
        broken.extend(secrets(cluster, &campaign.report, needles, elapsed_us).await?);
    } else {
        keep_logs(cluster, &campaign.report).await?;
        tried.remove(&Rule::SecretsStaySecret);
    }
    handshakes(&campaign.report, &all, began, record);
    Ok(Run {
        groups: Vec::new(),
        nodes: all.to_vec(),
        elapsed_us,
        done,
        broken,
        tried,
        record: record.clone(),
    })
}

impl Campaign {
    /// Whether the cluster is made for this run, and removed after it.
    pub(super) fn is_of_its_own(&self) -> bool {
        match &self.ground {
            Ground::Namespaces { .. } => true,
            Ground::Compose { project, .. } => project.is_none(),
            Ground::Context { .. } => false,
        }
    }
}

/// Images, secret and services; waits until all tasks run. Gives what the secret's value looks like.
async fn prepare(
    cluster: &Cluster,
    campaign: &Campaign,
    made: &mut Made,
    stop: &Stop,
) -> anyhow::Result<Option<Needles>> {
    cluster.pack_probe(IMAGE).await?;
    made.images.push(IMAGE.to_owned());
    let mut control = cluster.client()?.control(0)?;
    let mut needles = None;
    if campaign.services.iter().any(|it| it.canary) {
        let mut bytes = [0; 24];
        SystemEntropy.fill(&mut bytes)?;
        let value: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        needles = Some(Needles::of(value.as_bytes()));
        control
            .create_secret(CreateSecretRequest {
                request_id: new_id()?,
                secret_id: new_id()?,
                name: CANARY.to_owned(),
                value: value.into_bytes(),
                labels: Vec::new(),
            })
            .await?;
        made.secrets.push(CANARY.to_owned());
    }
    for service in &campaign.services {
        let image = image(cluster, service, made).await?;
        let secrets = service.canary.then(|| SecretReference {
            name: CANARY.to_owned(),
            ..SecretReference::default()
        });
        let port = service.publish.map(|host| PublishedPort {
            host: host.into(),
            target: service.port.into(),
        });
        let request = CreateServiceRequest {
            request_id: new_id()?,
            service_id: new_id()?,
            spec: Some(ServiceSpec {
                name: service.name.clone(),
                replicas: service.replicas,
                image_name: image,
                environment: service.environment.clone(),
                command: service.command.clone(),
                secrets: secrets.into_iter().collect(),
                ports: port.into_iter().collect(),
                limit: Some(Resources {
                    memory_bytes: 64 << 20,
                    ..Resources::default()
                }),
                ..ServiceSpec::default()
            }),
        };
        let created = control.create_service(request).await;
        created.with_context(|| format!("service {} cannot be made", service.name))?;
        made.services.push(service.name.clone());
    }
    let (end, wanted) = (Instant::now() + PREPARES, campaign.replicas());
    loop {
        let names: Vec<String> = campaign.services.iter().map(|it| it.name.clone()).collect();
        let tasks = watch::tasks_of(&mut control, &names).await.unwrap_or_default();
        let running = tasks.iter().filter(|it| watch::runs(it)).count();
        if running >= wanted {
            return Ok(needles);
        }
        anyhow::ensure!(!stop.is_asked(), INTERRUPTED);
        if Instant::now() > end {
            let status = |it: &TaskSummary| it.task.as_ref()?.status.clone();
            let mut why: Vec<String> = tasks.iter().filter_map(status).map(|it| it.message).collect();
            why.retain(|it| !it.is_empty());
            why.sort();
            why.dedup();
            bail!(
                "{running} of {wanted} tasks run after {} s: {}",
                PREPARES.as_secs(),
                match why.is_empty() {
                    true => "the cluster does not say why".to_owned(),
                    false => why.join("; "),
                }
            );
        }
        sleep(PAUSE).await;
    }
}

impl Campaign {
    fn replicas(&self) -> usize {
        self.services.iter().map(|it| it.replicas as usize).sum()
    }
}

/// The name of a service's image, once it is stored.
async fn image(cluster: &Cluster, service: &Service, made: &mut Made) -> anyhow::Result<String> {
    let tag = format!("bulkhead-chaos:{}", service.name);
    match &service.image {
        Image::Probe => return Ok(IMAGE.to_owned()),
        Image::Stored(name) => return Ok(name.clone()),
        Image::Archive(path) => {
            let path = path.to_string_lossy();
            cluster.bulkhead(&["image", "load", &path, "-t", &tag]).await?;
        }
        Image::Program(path) => {
            let path = path.to_string_lossy();
            cluster.bulkhead(&["image", "pack", &path, "-t", &tag]).await?;
        }
    }
    made.images.push(tag.clone());
    Ok(tag)
}

fn begin(
    clients: &mut JoinSet<()>,
    campaign: &Campaign,
    cluster: &Cluster,
    record: &Arc<Record>,
    all: &Arc<Vec<Node>>,
    addresses: &super::driver::Addresses,
    names: Vec<String>,
) -> anyhow::Result<()> {
    let Clients {
        writers,
        contenders,
        pause,
    } = campaign.clients;
    for number in 1..=writers {
        let client = Client::new(number, campaign.seed, cluster.client()?, record.clone());
        clients.spawn(client.write(pause));
    }
    for number in writers + 1..=writers + contenders {
        let client = Client::new(number, campaign.seed, cluster.client()?, record.clone());
        clients.spawn(client.contend(pause));
    }
    for at in 0..cluster.managers() {
        clients.spawn(watch::manager(at, cluster.client()?, all.clone(), record.clone()));
    }
    clients.spawn(watch::tasks(
        cluster.client()?,
        names,
        all.clone(),
        record.clone(),
    ));
    for (name, port) in campaign
        .services
        .iter()
        .filter_map(|it| Some((&it.name, it.publish?)))
    {
        for _ in 0..ASKERS {
            let addresses = addresses.clone();
            let address = move |at: usize| addresses.read().unwrap_or_else(PoisonError::into_inner)[at];
            clients.spawn(load::ask(name.clone(), port, address, PAUSE, record.clone()));
        }
    }
    Ok(())
}

/// Waits until all is as it should be once every fault is taken back, and says what is not in time.
async fn settle(
    driver: &mut Driver<'_>,
    campaign: &Campaign,
    names: &[String],
    broken: &mut Vec<Violation>,
) -> anyhow::Result<()> {
    let (start, healed) = (Instant::now(), driver.record.now_us());
    let served = |record: &Record| {
        let seen = record.seen();
        let after = seen.acks.iter().filter(|ack| ack.sent_us >= healed);
        after.map(|ack| ack.done_us - healed).min()
    };
    let mut managers = driver.cluster.client()?;
    let nothing = campaign.clients.writers == 0;
    loop {
        driver.look().await?;
        let wrong = wrong(&mut managers, driver.cluster.nodes(), names, campaign.replicas()).await;
        let write = served(&driver.record);
        if wrong.is_none() && (write.is_some() || nothing) {
            if let Some(took) = write.filter(|took| *took > micros(SERVES)) {
                broken.push(Violation {
                    rule: Rule::ServesAgain,
                    at_us: healed + took,
                    evidence: format!("the first write took {} ms", took / 1_000),
                });
            }
            return Ok(());
        }
        if start.elapsed() > CONVERGES {
            let at_us = driver.record.now_us();
            if write.is_none() && !nothing {
                let evidence = format!("no write was served within {} s", CONVERGES.as_secs());
                broken.push(Violation {
                    rule: Rule::ServesAgain,
                    at_us,
                    evidence,
                });
            }
            if let Some((rule, evidence)) = wrong {
                broken.push(Violation {
                    rule,
                    at_us,
                    evidence,
                });
            }
            return Ok(());
        }
        sleep(PAUSE).await;
    }
}

/// What is not as it should be in a cluster that is left alone; nothing: all is.
async fn wrong(
    managers: &mut Managers,
    all: &[Node],
    names: &[String],
    replicas: usize,
) -> Option<(Rule, String)> {
    let converges = |what: String| Some((Rule::Converges, what));
    let mut issuers = BTreeSet::new();
    let unusable = |error: anyhow::Error| Some((Rule::Converges, format!("{error:#}")));
    for (at, node) in all.iter().enumerate().take(managers.count()) {
        let name = &node.name;
        let mut control = match managers.control(at) {
            Ok(control) => control,
            Err(error) => return unusable(error),
        };
        match status(&mut control).await {
            Ok(status) if status.stale => return converges(format!("{name} is not current")),
            Ok(status) if status.roots.len() != 1 => {
                return Some((
                    Rule::RotationEnds,
                    format!("{name} trusts {} roots", status.roots.len()),
                ));
            }
            Ok(status) => drop(issuers.insert(status.issuer)),
            Err(error) => return converges(format!("{name} does not answer: {}", error.message())),
        }
    }
    let mut control = match managers.control(0) {
        Ok(control) => control,
        Err(error) => return unusable(error),
    };
    let listed = match timeout(CALL, nodes(&mut control)).await {
        Ok(Ok(listed)) => listed,
        _ => return converges("the nodes cannot be listed".into()),
    };
    for node in listed
        .iter()
        .filter(|it| matches!(it.role(), Role::Manager | Role::Worker))
    {
        if node.status() != NodeStatus::Ready {
            return converges(format!("{} is not ready: {}", node.name, node.status_reason));
        }
        if !node.issuer.is_empty() && !issuers.contains(&node.issuer) {
            return Some((
                Rule::RotationEnds,
                format!("{} has a certificate of a root that was dropped", node.name),
            ));
        }
    }
    if issuers.len() != 1 {
        return Some((
            Rule::RotationEnds,
            format!("managers name {} roots that sign", issuers.len()),
        ));
    }
    match watch::running(&mut control, names).await {
        Some(running) if running.len() == replicas => None,
        running => converges(format!(
            "{} of {replicas} tasks run",
            running.unwrap_or_default().len()
        )),
    }
}

/// The secrets that are there at the end.
async fn last_look(cluster: &Cluster) -> End {
    let seen = async {
        let mut secrets = BTreeSet::new();
        let mut control = cluster.client()?.control(0)?;
        let mut after = Vec::new();
        loop {
            let request = ListRequest {
                selector: String::new(),
                after,
            };
            let page = timeout(CALL, control.list_secrets(request)).await??.into_inner();
            secrets.extend(page.secrets.into_iter().map(|it| it.name));
            after = page.next;
            if after.is_empty() {
                break;
            }
        }
        anyhow::Ok(secrets)
    };
    let mut end = End::default();
    match seen.await {
        Ok(secrets) => end.secrets = secrets,
        Err(error) => end.unseen = Some(format!("the secrets cannot be listed: {error:#}")),
    }
    end
}

async fn keep_logs(cluster: &Cluster, report: &Path) -> anyhow::Result<PathBuf> {
    let folder = report.join("logs");
    std::fs::create_dir_all(&folder).with_context(|| format!("could not make {}", folder.display()))?;
    for (at, node) in cluster.nodes().iter().enumerate() {
        // Of a cluster on other machines there is none to be had.
        if let Ok(log) = cluster.log(at).await {
            let from = log.len().saturating_sub(LOG_BYTES);
            std::fs::write(folder.join(format!("{}.log", node.name)), &log[from..])?;
            // Why a program ended is said once, and may be far back.
            let errors = watch::errors(&String::from_utf8_lossy(&log), ERROR_BYTES);
            std::fs::write(folder.join(format!("{}.errors.log", node.name)), errors)?;
        }
    }
    Ok(folder)
}

/// Notes the handshakes that the kept logs tell of.
fn handshakes(report: &Path, all: &[Node], began: jiff::Timestamp, record: &Record) {
    for (node, its) in all.iter().enumerate() {
        // Without a log nothing is known.
        let log = std::fs::read(report.join("logs").join(format!("{}.log", its.name))).unwrap_or_default();
        for (at, address) in watch::refused(&String::from_utf8_lossy(&log)) {
            let since = Duration::try_from(at.duration_since(began)).unwrap_or_default();
            let other = all.iter().find(|it| it.address.to_string() == address);
            record.seen().events.push(Event {
                at_us: micros(since),
                what: What::HandshakeFailed {
                    node,
                    address: other.map_or(address, |it| it.name.clone()),
                },
            });
        }
    }
}

/// Where the secret's value is that it must not be.
async fn secrets(
    cluster: &Cluster,
    report: &Path,
    needles: &Needles,
    at_us: u64,
) -> anyhow::Result<Vec<Violation>> {
    let mut folders = cluster.disks()?;
    folders.push(keep_logs(cluster, report).await?);
    let found = folders.iter().flat_map(|folder| files_below(folder, needles));
    Ok(found
        .map(|finding| Violation {
            rule: Rule::SecretsStaySecret,
            at_us,
            evidence: format!("{} at {} of {}", finding.form, finding.at, finding.place),
        })
        .collect())
}

/// Takes what this run made out of a cluster that stays: services first, whose tasks use the rest until they ended.
async fn tidy(cluster: &Cluster, made: Made) -> anyhow::Result<()> {
    let mut control = cluster.client()?.control(0)?;
    let services = made.services.into_iter().map(|name| (Kind::Service, name));
    let secrets = made.secrets.into_iter().map(|name| (Kind::Secret, name));
    let images = made.images.into_iter().map(|name| (Kind::Image, name));
    for (kind, name) in services.chain(secrets).chain(images) {
        let request = RemoveRequest {
            request_id: new_id()?,
            selector: name.clone(),
            ..RemoveRequest::default()
        };
        let end = Instant::now() + PREPARES;
        loop {
            let removed = match kind {
                Kind::Service => control.remove_service(request.clone()).await,
                Kind::Secret => control.remove_secret(request.clone()).await,
                _ => control.remove_image(request.clone()).await,
            };
            match removed {
                Ok(_) => break,
                Err(error) if error.code() == tonic::Code::NotFound => break,
                Err(error) if Instant::now() > end => {
                    return Err(error).with_context(|| format!("{name} is left in the cluster"));
                }
                Err(_) => sleep(PAUSE).await,
            }
        }
    }
    Ok(())
}

/// What is left of a cluster that was removed.
fn left(below: &Path, groups: &[PathBuf], campaign: &Campaign) -> Vec<String> {
    if !matches!(campaign.ground, Ground::Namespaces { .. }) {
        return Vec::new(); // docker says what it could not remove, and others' clusters stay
    }
    let mut found = Vec::new();
    let text = below.to_string_lossy().into_owned();
    for pid in system::processes() {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(&text) {
            found.push(format!("process {pid}"));
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(&text))
            .map(|line| format!("mount {line}")),
    );
    if below.exists() {
        found.push(format!("folder {text}"));
    }
    found.extend(
        claims_of(below)
            .iter()
            .map(|it| format!("claim {}", it.display())),
    );
    let groups = groups.iter().filter(|it| it.exists());
    found.extend(groups.map(|it| format!("control group {}", it.display())));
    found
}
