//! A run: the cluster comes up, clients begin, faults strike and are taken back, and what is left is looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_lab::client::{Control, Managers, new_id};
use bulkhead_lab::{PORT, clock, descriptors, system};

use bulkhead_proto::wire::Availability;
use bulkhead_proto::wire::{RotateRootRequest, UpdateNodeRequest};
use nix::sys::signal::Signal;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::campaign::Stop;
use super::cluster::{Cluster, Node};
use super::fault::{Fault, Strike, Target};
use super::journal::{Journal, Undo};
use super::judge::Done;
use super::links::{Cut, Detour, Links, cut};
use super::proxy::{Harm, Proxy};
use super::record::{Record, What};
use super::watch::sample;

/// Between two looks at the programs.
const LOOK: Duration = Duration::from_millis(200);
/// A program that ended by itself is started again after this, as a service manager does.
const START_AGAIN: Duration = Duration::from_secs(1);
/// Between two measurements of what processes take.
const SAMPLE: Duration = Duration::from_secs(2);
const CALL: Duration = Duration::from_secs(2);
/// What could not be taken back is tried again after this, and for so long once nothing else is broken.
const AGAIN: Duration = Duration::from_secs(2);
const HEALS: Duration = Duration::from_secs(60);
/// What a slow connection adds to each piece, at most.
const DELAY: Duration = Duration::from_millis(120);
/// Of processes that starve: how long they stand still, and how long they run.
const STANDS: Duration = Duration::from_millis(90);
const RUNS: Duration = Duration::from_millis(10);
/// One of so many pieces that a bad connection changes.
const CORRUPT: u32 = 50;

/// A fault that lasts.
struct Under {
    number: usize,
    fault: Fault,
    nodes: Vec<usize>,
    until: Instant,
    /// In the journal.
    undo: Vec<usize>,
    /// Processes whose wall clocks it set wrong.
    clocks: BTreeSet<u32>,
    /// How many files processes may open without it.
    limits: Vec<(u32, u64)>,
    /// Has processes stand still most of the time.
    starving: Option<Starving>,
}

/// Where nodes are now: clients of services go there.
pub(super) type Addresses = Arc<RwLock<Vec<Ipv4Addr>>>;

/// Breaks a cluster, and mends it.
pub(super) struct Driver<'a> {
    pub(super) cluster: &'a mut Cluster,
    pub(super) journal: &'a mut Journal,
    pub(super) record: Arc<Record>,
    pub(super) addresses: Addresses,
    /// This program's own address in the nodes' network, where it has one: slow ways go through it.
    pub(super) own: Option<Ipv4Addr>,
    managers: Managers,
    random: SmallRng,
    links: Links,
    /// The rules of each node's network that are in force.
    applied: Vec<String>,
    proxies: BTreeMap<usize, Vec<Proxy>>,
    under: Vec<Under>,
    /// Nodes that are down because they shall be.
    down: BTreeSet<usize>,
    /// Managers that lost their stores, with the members that they were until then.
    lost: BTreeMap<usize, u64>,
    again: Vec<(Instant, usize)>,
    pub(super) done: Vec<Done>,
    next_sample: Instant,
    next_look: Instant,
    looks: u64,
}

impl<'a> Driver<'a> {
    pub(super) fn new(
        cluster: &'a mut Cluster,
        journal: &'a mut Journal,
        record: Arc<Record>,
        own: Option<Ipv4Addr>,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let count = cluster.nodes().len();
        for at in 0..count {
            record.event(What::Runs { node: at });
            // Rules outlive this program where the network does: then they are taken out whatever happens.
            if let Some(undo) = cluster.rules(at) {
                journal.before(undo)?;
            }
        }
        let addresses = cluster.nodes().iter().map(|node| node.address).collect();
        Ok(Self {
            managers: cluster.client()?,
            addresses: Arc::new(RwLock::new(addresses)),
            own,
            random: SmallRng::seed_from_u64(seed),
            links: Links::default(),
            applied: vec![String::new(); count],
            proxies: BTreeMap::new(),
            under: Vec::new(),
            down: BTreeSet::new(),
            lost: BTreeMap::new(),
            again: Vec::new(),
            done: Vec::new(),
            next_sample: Instant::now(),
            next_look: Instant::now(),
            looks: 0,
            cluster,
            journal,
            record,
        })
    }

    /// Does these strikes at their times, and takes each back at its own; then waits until the run is over.
    pub(super) async fn run(
        &mut self,
        strikes: &[Strike],
        length: Duration,
        stop: &Stop,
        say: &mut (dyn FnMut(String) + Send),
    ) -> anyhow::Result<()> {
        let start = self.record.start();
        let mut left = strikes.iter().peekable();
        loop {
            let now = Instant::now();
            if stop.is_asked() {
                say("interrupted: everything is being taken back, which takes some seconds".to_owned());
                return Ok(());
            }
            if now >= start + length && left.peek().is_none() && self.under.is_empty() {
                return Ok(());
            }
            let ended: Vec<Under> = self.under.extract_if(.., |it| it.until <= now).collect();
            for one in ended {
                say(format!(
                    "{:>7.1} s  #{} {} is taken back",
                    start.elapsed().as_secs_f64(),
                    one.number,
                    one.fault
                ));
                self.end(one).await?;
            }
            if let Some(strike) = left.next_if(|it| start + it.at <= now) {
                let line = self.begin(strike).await?;
                say(format!("{:>7.1} s  {line}", start.elapsed().as_secs_f64()));
            }
            self.look().await?;
            let strike = left.peek().map(|it| start + it.at);
            let end = self.under.iter().map(|it| it.until).min();
            let next = strike.into_iter().chain(end).chain([now + LOOK]).min();
            sleep_until(next.unwrap_or(now + LOOK)).await;
        }
    }

    /// Looks at the programs: one that ended by itself starts again.
    pub(super) async fn look(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if now < self.next_look {
            return Ok(());
        }
        self.next_look = now + LOOK;
        self.looks += 1;
        let mut under = std::mem::take(&mut self.under);
        let set = under.iter_mut().try_for_each(|one| self.set_clocks(one));
        self.under = under;
        set?;
        for (at, how) in self.cluster.ended()? {
            self.record.event(What::Ends { node: at, how });
            if !self.down.contains(&at) {
                self.again.push((now + START_AGAIN, at));
            }
        }
        let due: Vec<usize> = self
            .again
            .extract_if(.., |(when, _)| *when <= now)
            .map(|(_, at)| at)
            .collect();
        for at in due {
            if !self.down.contains(&at) {
                self.start(at).await?;
            }
        }
        if now >= self.next_sample {
            self.next_sample = now + SAMPLE;
            let at_us = self.record.now_us();
            for at in 0..self.cluster.nodes().len() {
                if let Some(sample) = sample(&self.cluster.processes(at), at_us) {
                    self.record.seen().samples.entry(at).or_default().push(sample);
                }
            }
        }
        Ok(())
    }

    async fn start(&mut self, at: usize) -> anyhow::Result<()> {
        self.cluster.start(at).await?;
        self.record.event(What::Runs { node: at });
        self.moved(at);
        if matches!(self.cluster, Cluster::Compose(_)) {
            self.applied[at].clear(); // its network is a new one
            self.apply()?;
        }
        Ok(())
    }

    fn moved(&self, at: usize) {
        let address = self.cluster.nodes()[at].address;
        self.addresses.write().unwrap_or_else(PoisonError::into_inner)[at] = address;
    }

    /// Whom a target is now; nobody where there is none such.
    fn resolve(&mut self, fault: Fault, target: &Target) -> Vec<usize> {
        let leader = self.record.seen().leader.map(|(at, _)| at);
        let busy: BTreeSet<usize> = self
            .under
            .iter()
            .flat_map(|it| it.nodes.iter().copied())
            .collect();
        let free = |node: &usize| !busy.contains(node) && !self.down.contains(node);
        let all: Vec<(usize, Node)> = self.cluster.nodes().iter().cloned().enumerate().collect();
        let of = |wanted: &dyn Fn(usize, &Node) -> bool| -> Vec<usize> {
            all.iter()
                .filter(|(at, node)| wanted(*at, node))
                .map(|(at, _)| *at)
                .filter(free)
                .collect()
        };
        if fault.is_of_all() {
            return Vec::new();
        }
        let candidates = match target {
            Target::Leader => of(&|at, _| Some(at) == leader),
            Target::Follower => of(&|at, node| node.manager && Some(at) != leader),
            Target::Manager => of(&|_, node| node.manager),
            Target::Worker => of(&|_, node| !node.manager),
            Target::AllManagers => return of(&|_, node| node.manager),
            Target::Node(name) => of(&|_, node| node.name == *name),
        };
        candidates.choose(&mut self.random).copied().into_iter().collect()
    }

    async fn begin(&mut self, strike: &Strike) -> anyhow::Result<String> {
        let number = self.done.len() + 1;
        let nodes = self.resolve(strike.fault, &strike.target);
        let names: Vec<String> = nodes
            .iter()
            .map(|at| self.cluster.nodes()[*at].name.clone())
            .collect();
        let start_us = self.record.now_us();
        let mut done = Done {
            number,
            fault: strike.fault,
            target: strike.target.clone(),
            workers: BTreeSet::new(),
            nodes: names.clone(),
            start_us,
            end_us: start_us,
            skipped: None,
            undo: undo(strike.fault),
            gap_us: None,
        };
        let struck = match nodes.is_empty() && !strike.fault.is_of_all() {
            true => Err(anyhow::anyhow!("there is no {} free for it now", strike.target)),
            false => self.strike(number, strike.fault, &nodes).await,
        };
        let line = match &struck {
            Ok(_) => format!("#{number} {} {}", strike.fault, names.join(", ")),
            Err(error) => format!("#{number} {} is left out: {error:#}", strike.fault),
        };
        match struck {
            Ok((undo, workers)) => {
                done.workers = workers;
                if strike.fault.is_over_at_once() {
                    done.end_us = self.record.now_us();
                } else {
                    done.end_us = u64::MAX;
                    let mut one = Under {
                        number,
                        fault: strike.fault,
                        nodes,
                        until: Instant::now() + strike.lasts,
                        undo,
                        clocks: BTreeSet::new(),
                        limits: Vec::new(),
                        starving: None,
                    };
                    self.set_clocks(&mut one)?;
                    self.take_resources(&mut one)?;
                    self.under.push(one);
                }
            }
            // What the cluster is too broken for is said, and counted: too many of it, and the run proves nothing.
            Err(error) => done.skipped = Some(format!("{error:#}")),
        }
        self.done.push(done);
        Ok(line)
    }

    /// Does it; what takes it back in the journal, and which workers it could reach.
    async fn strike(
        &mut self,
        number: usize,
        fault: Fault,
        nodes: &[usize],
    ) -> anyhow::Result<(Vec<usize>, BTreeSet<String>)> {
        let mut undo = Vec::new();
        let all = self.cluster.nodes().to_vec();
        let worker = |at: &usize| (!all[*at].manager).then(|| all[*at].name.clone());
        let mut workers: BTreeSet<String> = nodes.iter().filter_map(worker).collect();
        if fault.is_of_network() {
            let target = nodes.first().copied().unwrap_or_default();
            let cut = self.harm(number, fault, target).await?;
            let reached = cut
                .drops
                .iter()
                .flat_map(|(from, to)| [*from, *to])
                .chain(cut.loses.iter().copied());
            let reached: BTreeSet<usize> = reached.chain(cut.detours.iter().map(|it| it.from)).collect();
            // A cut at a manager is one that its workers get over by themselves.
            if matches!(fault, Fault::Split | Fault::Bridge | Fault::Loss)
                || nodes.iter().any(|at| !all[*at].manager)
            {
                workers.extend(reached.iter().filter_map(worker));
            }
            self.links.add(number, cut);
            self.apply()?;
            return Ok((undo, workers));
        }
        for at in nodes {
            match fault {
                Fault::Kill => undo.extend(self.kill(*at).await?),
                Fault::LoseStore => {
                    let member = self.may_lose_a_store(nodes).await?;
                    undo.extend(self.lose_store(*at).await?);
                    self.lost.insert(*at, member);
                }
                Fault::Stop => {
                    self.down.insert(*at);
                    undo.extend(self.cluster.stop(*at, self.journal).await?);
                    self.record.event(What::Ends {
                        node: *at,
                        how: "stopped".into(),
                    });
                }
                Fault::KillAgent => self.cluster.kill_agent(*at).await?,
                Fault::Pause => undo.extend(self.cluster.pause(*at, self.journal).await?),
                Fault::Disconnect => undo.extend(self.cluster.disconnect(*at, self.journal).await?),
                Fault::DiskFull => self.cluster.fill(*at, true)?,
                Fault::ClockAhead | Fault::ClockBehind | Fault::ClockJumps => {
                    clock::possible()?;
                    let here = !self.cluster.processes(*at).is_empty();
                    anyhow::ensure!(here, "it has no process on this machine");
                }
                Fault::NoDescriptors | Fault::Starve => {
                    let here = !self.cluster.processes(*at).is_empty();
                    anyhow::ensure!(here, "it has no process on this machine");
                }
                Fault::Drain => {
                    if let Some(words) = self.cluster.activation(*at) {
                        undo.push(self.journal.before(Undo::Activate { words })?);
                    }
                    self.set(*at, Availability::Drain).await?;
                }
                _ => {}
            }
        }
        if fault == Fault::RotateRoot {
            self.rotate().await?;
        }
        Ok((undo, workers))
    }

    async fn kill(&mut self, at: usize) -> anyhow::Result<Option<usize>> {
        self.down.insert(at);
        let undo = self.cluster.kill(at, self.journal).await?;
        self.record.event(What::Ends {
            node: at,
            how: "killed".into(),
        });
        Ok(undo)
    }

    async fn lose_store(&mut self, at: usize) -> anyhow::Result<Option<usize>> {
        let stores = self.cluster.stores(at).await?;
        let undo = self.kill(at).await?;
        for store in &stores {
            if let Err(error) = std::fs::remove_dir_all(store) {
                self.down.remove(&at);
                self.start(at).await?;
                return Err(error).with_context(|| format!("could not remove {}", store.display()));
            }
        }
        Ok(undo)
    }

    /// The member whose store may be lost now. One at a time, and only while every manager votes, and each that lost its store
    /// before as another member: without the stores of two of three managers nobody is left who knows what was acknowledged.
    async fn may_lose_a_store(&mut self, nodes: &[usize]) -> anyhow::Result<u64> {
        let managers = self.cluster.managers();
        let [node] = *nodes else {
            anyhow::bail!("no cluster comes back from the loss of so many stores");
        };
        anyhow::ensure!(
            managers > 2,
            "no cluster of fewer than three managers comes back from it"
        );
        let names: Vec<String> = self.cluster.nodes().iter().map(|it| it.name.clone()).collect();
        for at in 0..managers {
            let mut control = self.managers.control(at)?;
            let Ok(Ok(status)) = timeout(CALL, bulkhead_lab::status(&mut control)).await else {
                continue;
            };
            if status.stale {
                continue;
            }
            let voters: BTreeMap<&str, u64> = status
                .members
                .iter()
                .filter(|member| member.voter)
                .map(|member| (member.name.as_str(), member.member_id))
                .collect();
            let votes = voters.len();
            anyhow::ensure!(votes == managers, "only {votes} of {managers} managers vote now");
            let member = |at: usize| voters.get(names[at].as_str()).copied();
            for (at, before) in &self.lost {
                let back = member(*at).is_some_and(|now| now != *before);
                anyhow::ensure!(back, "{} has not come back as another member yet", names[*at]);
            }
            return member(node).with_context(|| format!("{} does not vote", names[node]));
        }
        anyhow::bail!("no manager says who votes now")
    }

    /// Sets the clocks of a node's processes wrong, of those that began meanwhile, too.
    fn set_clocks(&mut self, one: &mut Under) -> anyhow::Result<()> {
        for at in one.nodes.clone() {
            let Some(offset) = one.fault.clock(self.cluster.nodes()[at].manager, self.looks) else {
                return Ok(());
            };
            let pids = self.cluster.processes(at);
            let new = pids.iter().filter(|pid| !one.clocks.contains(pid));
            let new: Vec<(u32, u64)> = new
                .filter_map(|pid| Some((*pid, system::started(*pid)?)))
                .collect();
            if !new.is_empty() && self.cluster.outlives_us() {
                let (pids, started) = new.iter().copied().unzip();
                one.undo.push(self.journal.before(Undo::Clock { pids, started })?);
            }
            one.clocks.extend(new.iter().map(|(pid, _)| *pid));
            one.clocks.retain(|pid| pids.contains(pid));
            for pid in &one.clocks {
                set_clock(*pid, offset)?;
            }
        }
        Ok(())
    }

    /// Takes files or processor time from a node's processes.
    fn take_resources(&mut self, one: &mut Under) -> anyhow::Result<()> {
        if !matches!(one.fault, Fault::NoDescriptors | Fault::Starve) {
            return Ok(());
        }
        let pids: Vec<u32> = one
            .nodes
            .iter()
            .flat_map(|at| self.cluster.processes(*at))
            .collect();
        let started = pids
            .iter()
            .map(|pid| system::started(*pid).unwrap_or_default())
            .collect();
        let undo = if one.fault == Fault::Starve {
            Undo::Continue {
                pids: pids.clone(),
                started,
            }
        } else {
            for pid in &pids {
                one.limits.push((*pid, descriptors::limit_of(*pid)?));
            }
            Undo::Descriptors {
                pids: pids.clone(),
                started,
                limits: one.limits.iter().map(|(_, limit)| *limit).collect(),
            }
        };
        if self.cluster.outlives_us() {
            one.undo.push(self.journal.before(undo)?);
        }
        for (pid, _) in &one.limits {
            descriptors::exhaust(*pid)?;
        }
        if one.fault == Fault::Starve {
            one.starving = Some(Starving::begin(pids));
        }
        Ok(())
    }

    /// What a fault does to the network, with the slow ways that it needs.
    async fn harm(&mut self, number: usize, fault: Fault, target: usize) -> anyhow::Result<Cut> {
        let (managers, count) = (self.cluster.managers(), self.cluster.nodes().len());
        let mut cut = cut(fault, target, managers, count);
        let harm = match fault {
            Fault::Delay => Harm::Delay(DELAY),
            Fault::Corrupt => Harm::Corrupt(CORRUPT),
            _ => return Ok(cut),
        };
        let own = self
            .own
            .context("the nodes' network has no address of this program")?;
        anyhow::ensure!(target < managers, "connections go to managers");
        let to = SocketAddrV4::new(self.cluster.nodes()[target].address, PORT);
        for from in (0..count).filter(|from| *from != target) {
            let proxy = Proxy::open(own, to, harm, self.random.random()).await?;
            cut.detours.push(Detour {
                from,
                to: target,
                through: proxy.address,
            });
            self.proxies.entry(number).or_default().push(proxy);
        }
        Ok(cut)
    }

    /// Brings the rules of each node's network to what is in force.
    fn apply(&mut self) -> anyhow::Result<()> {
        let addresses: Vec<Ipv4Addr> = self.cluster.nodes().iter().map(|node| node.address).collect();
        for at in 0..addresses.len() {
            let script = self.links.script(at, &addresses, PORT);
            if script == self.applied[at] || (self.applied[at].is_empty() && !script.contains("chain")) {
                continue;
            }
            if self.down.contains(&at) && matches!(self.cluster, Cluster::Compose(_)) {
                continue; // it has no network now, and gets the rules with its next one
            }
            self.cluster.namespace(at)?.tool(&["nft", "-f", "-"], &script)?;
            self.applied[at] = script;
        }
        Ok(())
    }

    /// Asks each manager in turn to rotate the root.
    async fn rotate(&mut self) -> anyhow::Result<()> {
        let request = RotateRootRequest {
            request_id: new_id()?,
            ..RotateRootRequest::default()
        };
        self.ask(async |control| control.rotate_root(request.clone()).await.map(drop))
            .await
    }

    async fn set(&mut self, at: usize, availability: Availability) -> anyhow::Result<()> {
        let request = UpdateNodeRequest {
            request_id: new_id()?,
            selector: self.cluster.nodes()[at].name.clone(),
            availability: availability.into(),
            ..UpdateNodeRequest::default()
        };
        self.ask(async |control| control.update_node(request.clone()).await.map(drop))
            .await
    }

    async fn ask(
        &mut self,
        send: impl AsyncFn(&mut Control) -> Result<(), tonic::Status>,
    ) -> anyhow::Result<()> {
        let mut last = None;
        for at in 0..self.managers.count() {
            let mut control = self.managers.control(at)?;
            match timeout(CALL, send(&mut control)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(status)) => last = Some(status.message().to_owned()),
                Err(_) => last = Some("no answer".to_owned()),
            }
        }
        anyhow::bail!("no manager did it: {}", last.unwrap_or_default())
    }

    /// Takes a fault back.
    async fn end(&mut self, mut one: Under) -> anyhow::Result<()> {
        drop(one.starving.take());
        for (pid, limit) in std::mem::take(&mut one.limits) {
            match descriptors::limit(pid, limit) {
                Err(error) if system::started(pid).is_some() => return Err(error),
                _ => {}
            }
        }
        let mut active = true;
        if one.fault.is_of_network() {
            self.links.remove(one.number);
            self.proxies.remove(&one.number);
            self.apply()?;
        }
        for at in &one.nodes {
            match one.fault {
                Fault::Kill | Fault::Stop | Fault::LoseStore => {
                    self.down.remove(at);
                    self.start(*at).await?;
                }
                // It may have ended meanwhile.
                Fault::Pause => self.cluster.resume(*at).await.unwrap_or_default(),
                Fault::Disconnect => {
                    self.cluster.connect(*at).await?;
                    self.moved(*at);
                }
                Fault::DiskFull => self.cluster.fill(*at, false)?,
                Fault::ClockAhead | Fault::ClockBehind | Fault::ClockJumps => {
                    // A copy that a process made of itself has its clock, too.
                    for pid in self.cluster.processes(*at) {
                        set_clock(pid, 0)?;
                    }
                }
                Fault::Drain => active &= self.set(*at, Availability::Active).await.is_ok(),
                _ => {}
            }
        }
        if !active {
            // A cluster that is being broken may not answer now.
            self.under.push(Under {
                until: Instant::now() + AGAIN,
                ..one
            });
            return Ok(());
        }
        for number in one.undo {
            self.journal.undone(number)?;
        }
        let now = self.record.now_us();
        if let Some(done) = self.done.get_mut(one.number - 1) {
            done.end_us = now;
        }
        Ok(())
    }

    /// Takes back whatever lasts.
    pub(super) async fn heal(&mut self) -> anyhow::Result<()> {
        let end = Instant::now() + HEALS;
        loop {
            for one in std::mem::take(&mut self.under) {
                self.end(one).await?;
            }
            if self.under.is_empty() {
                return Ok(());
            }
            anyhow::ensure!(
                Instant::now() < end,
                "a worker that was drained cannot be made active again"
            );
            sleep(AGAIN).await;
        }
    }
}

/// Has processes stand still for nine tenths of the time, until it goes.
struct Starving {
    pids: Vec<u32>,
    task: tokio::task::JoinHandle<()>,
}

impl Starving {
    fn begin(pids: Vec<u32>) -> Self {
        let theirs = pids.clone();
        let task = tokio::spawn(async move {
            loop {
                for (signal, time) in [(Signal::SIGSTOP, STANDS), (Signal::SIGCONT, RUNS)] {
                    for pid in &theirs {
                        bulkhead_lab::send(*pid, signal);
                    }
                    sleep(time).await;
                }
            }
        });
        Self { pids, task }
    }
}

impl Drop for Starving {
    fn drop(&mut self) {
        self.task.abort();
        for pid in &self.pids {
            bulkhead_lab::send(*pid, Signal::SIGCONT);
        }
    }
}

/// Sets a process's clock; it may have ended meanwhile.
fn set_clock(pid: u32, offset: i32) -> anyhow::Result<()> {
    match clock::set(pid, offset) {
        Err(error) if system::started(pid).is_some() => Err(error),
        _ => Ok(()),
    }
}

/// How a fault is taken back, for the report.
fn undo(fault: Fault) -> &'static str {
    match fault {
        Fault::Kill | Fault::Stop | Fault::LoseStore => "a start",
        Fault::KillAgent => "its launcher",
        Fault::Pause => "a signal to go on",
        Fault::Disconnect => "its network plugged in",
        Fault::DiskFull => "room on the disk",
        Fault::ClockAhead | Fault::ClockBehind | Fault::ClockJumps => "the machine's clock",
        Fault::NoDescriptors => "its limit of open files",
        Fault::Starve => "a signal to go on",
        Fault::RotateRoot => "nothing: the cluster carries on",
        Fault::Drain => "the worker active again",
        Fault::Isolate
        | Fault::Deaf
        | Fault::Mute
        | Fault::Split
        | Fault::Bridge
        | Fault::Ring
        | Fault::Loss
        | Fault::Reset
        | Fault::Delay
        | Fault::Corrupt => "rules taken out",
    }
}
