//! Whole programs in simulation: managers and workers as they are, with their TLS, their authorisation and their whole API, in
//! one thread over a simulated network ([`turmoil`]), with an operator who uses them.
//!
//! First everything goes wrong, and nothing that was acknowledged may be lost or contradicted; then the faults stop, the
//! cluster must serve again within seconds, and what runs must become what was asked for. Real are the programs and what
//! they are made of; simulated are the network, time, the disk of the replicated store, and sandboxes.

mod machines;
mod nemesis;
mod operator;
mod record;
#[cfg(test)]
mod tests;
mod world;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;
use std::sync::Once;
use std::time::{Duration, UNIX_EPOCH};

use bulkhead_identity::simulated;
use bulkhead_raft::state::State;
use serde::Serialize;

use self::machines::{Addresses, Manager, Worker};
use self::nemesis::Nemesis;
use self::operator::{Course, Phase};
use self::record::Record;
use self::world::{EPOCH_MS, World, has_passed};
use crate::rules::Rule;
use crate::sandbox;
use crate::sim::dice::Dice;
use crate::sim::shrink::{Parts, Shrinks};
use crate::sim::{Report, What};

/// Managers listen here, each at an address of its own.
const PORT: u16 = 7_443;
/// Hosts run for so long, one after the other, before the next one's messages arrive. Halving it doubles what a run costs.
const TICK: Duration = Duration::from_millis(2);
/// A message takes at least this long, and at most so long while the network is well.
const FASTEST: Duration = Duration::from_millis(1);
const CALM: Duration = Duration::from_millis(4);
/// Pieces of a connection that are on their way: what waits beyond them waits at the sender.
const WINDOW: usize = 64;
/// No run takes longer, whatever happens in it.
const LONGEST: Duration = Duration::from_secs(600);
/// Once all is well the replicas come to one state within this time.
const AGREE: Duration = Duration::from_secs(20);

/// What a run is like. [`Plan::of`] derives one from a seed.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Decides everything that is not a key.
    pub seed: u64,
    /// Managers.
    pub managers: u64,
    /// Workers.
    pub workers: u64,
    /// Clients.
    pub clients: u64,
    /// How long things go wrong, in simulated time.
    pub trouble: Duration,
    /// A snapshot after this many entries.
    pub snapshot_every: u64,
    /// Entries kept below a snapshot.
    pub keep: u64,
    /// The slowest flush of a disk, in microseconds.
    pub flush_micros: u64,
    /// Strikes that are left out, by their numbers.
    pub without: BTreeSet<u32>,
}

impl Plan {
    /// The plan of a seed: mostly three managers and two workers; one in eight is a large cluster.
    pub fn of(seed: u64) -> Self {
        let dice = Dice::new(seed, 0);
        let (managers, workers) = match dice.below(8) {
            0 => (5 + 2 * dice.below(3) as u64, 4 + dice.below(13) as u64),
            1 => (5, 2),
            _ => (3, 2),
        };
        Self {
            managers,
            workers,
            trouble: Duration::from_secs(6),
            ..Self::small(seed)
        }
    }

    /// A plan of the same seed that is cheap, for ordinary test runs: three managers, two workers, and half the trouble.
    pub fn small(seed: u64) -> Self {
        let dice = Dice::new(seed, 1);
        Self {
            seed,
            managers: 3,
            workers: 2,
            clients: 2,
            trouble: Duration::from_secs(3),
            snapshot_every: if dice.percent(50) { 60 } else { 5_000 },
            keep: if dice.percent(50) { 40 } else { 10_000 },
            flush_micros: if dice.percent(20) { 30_000 } else { 3_000 },
            without: BTreeSet::new(),
        }
    }
}

impl Shrinks for Plan {
    fn parts(&mut self) -> Parts<'_> {
        Parts {
            without: &mut self.without,
            clients: &mut self.clients,
            trouble: &mut self.trouble,
        }
    }
}

/// Runs a plan from beginning to end.
///
/// # Panics
/// Where no folder can be made for what the programs keep on real files.
pub fn run(plan: Plan) -> Report {
    heed_panics();
    let folder = sandbox::folder().expect("a folder for temporary files");
    has_passed(Duration::ZERO);
    let _up = simulated::put_up(Rc::new(World::new(Dice::new(plan.seed, 2))));
    let record = Record::default();
    let mut run = Run::new(plan, folder.path(), record.clone());
    run.go();
    let report = record.report(run.course.plan.seed);
    drop(run);
    report
}

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Panics of this thread are noted from now on: a task of a program that panics says so to nobody else.
fn heed_panics() {
    static HEEDED: Once = Once::new();
    HEEDED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with_borrow_mut(|panics| panics.push(info.to_string()));
            before(info);
        }));
    });
    PANICS.take();
}

/// A machine with a program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Host {
    Manager(u64),
    Worker(u64),
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Manager(id) => write!(f, "m{id}"),
            Self::Worker(id) => write!(f, "w{id}"),
        }
    }
}

/// How a program ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    /// Killed: what it wrote, synced or not, is with the system.
    Killed,
    /// The machine lost power: of what was not synced, any part is gone, and so is every task.
    PowerLost,
}

/// What a replica showed last.
#[derive(Clone, Copy, Default)]
struct Seen {
    index: u64,
    leading: Option<u64>,
}

/// A run under way.
struct Run {
    // Before the hosts' machines: its programs hold them.
    sim: turmoil::Sim<'static>,
    course: Rc<Course>,
    record: Record,
    dice: Dice,
    /// Programs that do not run, and since when they are to be started again.
    down: std::collections::BTreeMap<Host, Option<Duration>>,
    /// Managers whose disk failed since their program started.
    failing: BTreeSet<u64>,
    seen: Vec<Seen>,
}

impl Run {
    fn new(plan: Plan, folder: &Path, record: Record) -> Self {
        let mut sim = turmoil::Builder::new()
            .simulation_duration(LONGEST)
            .tick_duration(TICK)
            .epoch(UNIX_EPOCH + Duration::from_millis(EPOCH_MS))
            .rng_seed(plan.seed)
            .min_message_latency(FASTEST)
            .max_message_latency(CALM)
            .tcp_capacity(WINDOW)
            .enable_tokio_io() // a task's secrets are handed over on a pair of sockets
            .build();
        let addresses = Rc::new(Addresses::default());
        let made = "a folder in a folder of one's own";
        let managers: Vec<Rc<Manager>> = (1..=plan.managers)
            .map(|id| Rc::new(Manager::new(id, &plan, folder, record.clone()).expect(made)))
            .collect();
        let workers: Vec<Rc<Worker>> = (1..=plan.workers)
            .map(|id| Rc::new(Worker::new(id, &plan, folder, record.clone()).expect(made)))
            .collect();
        for manager in &managers {
            addresses.set(manager.id, sim.lookup(manager.name()));
        }
        for manager in &managers {
            let (manager, addresses) = (manager.clone(), addresses.clone());
            sim.host(manager.name(), move || {
                let running = manager.clone().run(addresses.clone());
                async move {
                    running.await;
                    Ok(())
                }
            });
        }
        for worker in &workers {
            let (worker, addresses) = (worker.clone(), addresses.clone());
            sim.host(worker.name(), move || {
                let running = worker.clone().run(addresses.clone());
                async move {
                    running.await;
                    Ok(())
                }
            });
        }
        let seen = vec![Seen::default(); managers.len()];
        let course = Rc::new(Course {
            record: record.clone(),
            addresses,
            managers,
            workers,
            phase: Cell::new(Phase::Rising),
            plan,
        });
        let operating = operator::run(course.clone());
        sim.client("operator", async move {
            Box::pin(operating).await;
            Ok(())
        });
        Self {
            sim,
            dice: Dice::new(course.plan.seed, 3),
            course,
            record,
            down: Default::default(),
            failing: BTreeSet::new(),
            seen,
        }
    }

    fn go(&mut self) {
        while self.course.phase.get() == Phase::Rising {
            self.step();
        }
        let mut nemesis = Nemesis::new(&self.course.plan);
        let pauses = Dice::new(self.course.plan.seed, 5);
        let over = self.sim.elapsed() + self.course.plan.trouble;
        let mut next = self.sim.elapsed();
        while self.sim.elapsed() < over && self.goes_on() {
            if self.sim.elapsed() >= next {
                nemesis.strike(self);
                next = self.sim.elapsed() + pauses.micros(50_000, 900_000);
            }
            self.step();
        }
        if !self.goes_on() {
            return;
        }
        self.heal();
        self.restart_all();
        self.record.note("all is well again");
        self.record.event(What::AllIsWell);
        self.course.phase.set(Phase::Well);
        while self.goes_on() {
            self.step();
        }
        self.agree();
        self.record.check_registers();
    }

    /// Whether there is more to see.
    fn goes_on(&self) -> bool {
        self.course.phase.get() != Phase::Over && !self.record.violated()
    }

    /// Everybody runs for a moment, and is looked at.
    fn step(&mut self) {
        let stepped = self.sim.step();
        has_passed(self.sim.elapsed());
        if let Err(error) = stepped {
            self.record
                .violation(Rule::NoPanic, format_args!("the simulation ended: {error}"));
            self.course.phase.set(Phase::Over);
        }
        for panic in PANICS.take() {
            self.record.violation(Rule::NoPanic, panic);
            self.course.phase.set(Phase::Over);
        }
        for manager in self.course.managers.clone() {
            self.look(&manager);
            if let Some(why) = manager.why_ended() {
                self.ended(&manager, &why);
            }
        }
        for worker in self.course.workers.clone() {
            if let Some(why) = worker.why_ended() {
                self.record.violation(
                    Rule::StartsAgain,
                    format_args!("w{} ended by itself: {why}", worker.id),
                );
            }
        }
        let now = self.sim.elapsed();
        let due = self.down.iter().filter(|(_, at)| at.is_some_and(|at| at <= now));
        for host in due.map(|(host, _)| *host).collect::<Vec<_>>() {
            self.start(host);
        }
    }

    fn look(&mut self, manager: &Manager) {
        let Some(replica) = manager.replica() else {
            return;
        };
        let at = usize::try_from(manager.id - 1).unwrap_or(0);
        let seen = self.seen[at];
        let state = replica.state();
        if seen.index != state.index() {
            self.seen[at].index = state.index();
            self.record.state(manager.id, &state);
        }
        let leading = replica.leadership().borrow().leading;
        if seen.leading != leading {
            self.seen[at].leading = leading;
            match leading {
                Some(term) => self.record.leads(manager.id, term),
                None => self.record.event(What::Follows { member: manager.id }),
            }
        }
    }

    /// A manager's program ended by itself: it may where its disk fails, and starts again after a moment.
    fn ended(&mut self, manager: &Manager, why: &str) {
        manager.let_go();
        self.seen[usize::try_from(manager.id - 1).unwrap_or(0)] = Seen::default();
        self.record.event(What::Ends { member: manager.id });
        if self.failing.contains(&manager.id) {
            self.record.count(|counts| counts.disk_failures += 1);
            self.record
                .note(format_args!("m{} ended, as its disk fails", manager.id));
            self.record.remark(why);
        } else {
            self.record.violation(
                Rule::StartsAgain,
                format_args!("m{} ended by itself: {why}", manager.id),
            );
        }
        let again = self.sim.elapsed() + machines::START_AGAIN;
        self.down.insert(Host::Manager(manager.id), Some(again));
    }

    /// The manager that may act as the leader of the newest term.
    fn leader(&self) -> Option<u64> {
        let leading = self.course.managers.iter().filter_map(|manager| {
            let term = manager.replica()?.leadership().borrow().leading?;
            Some((term, manager.id))
        });
        leading.max().map(|(_, id)| id)
    }

    fn manager(&self, id: u64) -> &Rc<Manager> {
        &self.course.managers[usize::try_from(id - 1).unwrap_or(0)]
    }

    fn worker(&self, id: u64) -> &Rc<Worker> {
        &self.course.workers[usize::try_from(id - 1).unwrap_or(0)]
    }

    fn hosts(&self) -> Vec<Host> {
        let managers = self.course.managers.iter().map(|it| Host::Manager(it.id));
        let workers = self.course.workers.iter().map(|it| Host::Worker(it.id));
        managers.chain(workers).collect()
    }

    /// Ends a program.
    fn stop(&mut self, host: Host, how: Ending) {
        if self.down.contains_key(&host) {
            return;
        }
        self.record.note(format_args!("{host}: {how:?}"));
        self.record.count(|counts| match how {
            Ending::Killed => counts.kills += 1,
            Ending::PowerLost => counts.power_losses += 1,
        });
        self.sim.crash(host.to_string());
        self.down.insert(host, None);
        let dice = self.dice.clone();
        match host {
            Host::Manager(id) => {
                let manager = self.manager(id).clone();
                manager.let_go();
                let _unheard = manager.why_ended(); // it ended in the same moment
                self.seen[usize::try_from(id - 1).unwrap_or(0)] = Seen::default();
                self.record.event(What::Ends { member: id });
                match how {
                    Ending::Killed => manager.disk.crash(&mut |_| 1), // everything written stays
                    Ending::PowerLost => manager.disk.crash(&mut |count| dice.below(count)),
                }
            }
            Host::Worker(id) => {
                let worker = self.worker(id);
                let _unheard = worker.why_ended();
                if how == Ending::PowerLost {
                    worker.sandbox.lose_power();
                }
            }
        }
    }

    /// Starts a program that does not run, on what its disk holds.
    fn start(&mut self, host: Host) {
        if self.down.remove(&host).is_none() {
            return;
        }
        if let Host::Manager(id) = host {
            self.failing.remove(&id);
            self.manager(id).disk.crash(&mut |_| 1); // of one that ended by itself: what it had open is closed
        }
        self.sim.bounce(host.to_string());
    }

    fn restart_all(&mut self) {
        for host in self.down.keys().copied().collect::<Vec<_>>() {
            self.start(host);
        }
    }

    /// Network and disks work again.
    fn heal(&mut self) {
        let names: Vec<String> = self.hosts().iter().map(ToString::to_string).collect();
        for (at, one) in names.iter().enumerate() {
            for other in &names[at + 1..] {
                self.sim.release(one.as_str(), other.as_str());
            }
        }
        self.sim.set_max_message_latency(CALM);
        for manager in &self.course.managers {
            manager.disk.set_fault(bulkhead_raft::file_system::Fault::None);
        }
    }

    /// All replicas come to one state, and it holds what was acknowledged.
    fn agree(&mut self) {
        if self.record.violated() {
            return;
        }
        let late = self.sim.elapsed() + AGREE;
        loop {
            // Each time anew: one whose disk failed before all was well may end only now, and starts again.
            let managers = self.course.managers.iter();
            let replicas: Vec<_> = managers.filter_map(|it| Some((it.id, it.replica()?))).collect();
            let states: Vec<(u64, State)> = replicas.iter().map(|(id, it)| (*id, it.state())).collect();
            let last = replicas.iter().filter_map(|(_, it)| it.members().last_log).max();
            let agreed = states.iter().all(|(_, state)| Some(state.index()) == last);
            if agreed && states.len() == self.course.managers.len() {
                for (id, state) in &states {
                    self.record.state(*id, state);
                    self.record.check_secrets(*id, &secrets(state));
                }
                return;
            }
            if self.sim.elapsed() > late {
                let at: Vec<_> = states.iter().map(|(id, state)| (*id, state.index())).collect();
                return self.record.violation(
                    Rule::Converges,
                    format_args!("the replicas did not come to one state: {at:?}, {last:?}"),
                );
            }
            self.step();
            if self.record.violated() {
                return;
            }
        }
    }
}

/// The names of a state's secrets.
fn secrets(state: &State) -> BTreeSet<String> {
    bulkhead_manager::view::secrets(state)
        .map(|secret| secret.name.clone())
        .collect()
}
