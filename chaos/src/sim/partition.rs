//! A network that falls into parts while clients write: when the next write is acknowledged, and who leads how often.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::client::Client;
use super::cluster::{Cluster, Ending};
use super::dice::Dice;
use super::record::{Record, What};
use super::{Plan, Shape};

/// All goes well for so long before.
const BEFORE: Duration = Duration::from_secs(1);
/// The network is in parts for so long.
const PARTED: Duration = Duration::from_secs(10);
/// Between writes: what is measured is no more exact.
const AGAIN: Duration = Duration::from_millis(20);
/// A write is acknowledged within this time; ten elections of the slowest kind.
pub const SOON: Duration = Duration::from_secs(2);
/// The leader changes at most so often: to one that is heard, and once more where two began at once.
pub const CHANGES: usize = 2;

/// What came of one network in parts.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// From the fault to the first acknowledgement of a write that was begun after it.
    pub first_write: Option<Duration>,
    /// Leaders that began to lead after the fault.
    pub leader_changes: usize,
    /// Whether a rule of the cluster was broken.
    pub violated: bool,
}

impl Course {
    /// Whether it is as it should be.
    pub fn holds(&self) -> bool {
        let soon = self.first_write.is_some_and(|it| it <= SOON);
        soon && self.leader_changes <= CHANGES && !self.violated
    }
}

/// A cluster of five whose network takes a shape.
pub fn run(shape: Shape, seed: u64) -> Course {
    let plan = Plan {
        members: 5,
        faults: false,
        ..Plan::of(seed)
    };
    super::alone(seed, simulate(shape, plan))
}

async fn simulate(shape: Shape, plan: Plan) -> Course {
    let record = Record::new(false);
    let mut cluster = Cluster::new(plan.clone(), record.clone());
    cluster.found().await;
    let dice = Dice::new(plan.seed, 50);
    let written = Written::default();
    let clients: Vec<JoinHandle<()>> = (cluster.machines().into_iter())
        .map(|member| {
            tokio::spawn(write(
                client(&plan, &cluster, &record, member),
                member,
                written.clone(),
            ))
        })
        .collect();
    // Not always at the same point between two signs of life.
    sleep(BEFORE + dice.micros(0, 300_000)).await;
    let mut members = cluster.machines();
    dice.shuffle(&mut members);
    if let Some((leader, _)) = cluster.live.leader().filter(|_| shape.is_about_one()) {
        members.sort_by_key(|id| *id != leader);
    }
    record.note(format_args!("{shape:?} of {members:?}"));
    let (fault, fault_us) = (Instant::now(), record.now_us());
    cluster.switch.cut(shape.cuts(&members));
    sleep(PARTED).await;
    for client in clients {
        client.abort();
        let _cancelled = client.await;
    }
    for id in cluster.live.members() {
        cluster.stop(id, Ending::Killed).await;
    }
    let violated = record.violated();
    let events = record.report(plan.seed).events.into_iter();
    let after = events.filter(|event| event.at_us > fault_us);
    Course {
        first_write: written.first_after(fault),
        leader_changes: after
            .filter(|event| matches!(event.what, What::Leads { .. }))
            .count(),
        violated,
    }
}

/// When acknowledged writes were begun, and when they were acknowledged. Clones share it.
#[derive(Clone, Debug, Default)]
struct Written(Arc<Mutex<Vec<(Instant, Instant)>>>);

impl Written {
    fn add(&self, begun: Instant) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push((begun, Instant::now()));
    }

    /// How long after the fault the first write was acknowledged that was begun after it.
    fn first_after(&self, fault: Instant) -> Option<Duration> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let later = all.iter().filter(|(begun, _)| *begun >= fault);
        later.map(|(_, acknowledged)| *acknowledged - fault).min()
    }
}

fn client(plan: &Plan, cluster: &Cluster, record: &Record, number: u64) -> Client {
    Client {
        number,
        dice: Dice::new(plan.seed, 100 + number),
        live: cluster.live.clone(),
        record: record.clone(),
        written: 0,
    }
}

/// Writes again and again at a member that says that it leads.
async fn write(mut client: Client, member: u64, written: Written) {
    loop {
        sleep(AGAIN).await;
        let replica = client.live.get(member);
        let Some(leader) = replica.filter(|it| it.leadership().borrow().leading.is_some()) else {
            continue;
        };
        let begun = Instant::now();
        if client.write(&leader).await.is_some() {
            written.add(begun);
        }
    }
}
