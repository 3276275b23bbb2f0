//! What goes wrong, in a seeded order.

use bulkhead_raft::file_system::Fault as DiskFault;

use super::Plan;
use super::cluster::{Cluster, Ending};
use super::dice::Dice;
use super::network::{CALM, Weather};
use super::record::{Fault, Record, What};

/// Healing and restarting are listed more often, or the cluster would mostly stand still.
const FAULTS: &[Fault] = &[
    Fault::Split,
    Fault::IsolateLeader,
    Fault::OneWay,
    Fault::Heal,
    Fault::Heal,
    Fault::Heal,
    Fault::Kill,
    Fault::KillLeader,
    Fault::KillLeader,
    Fault::PowerLoss,
    Fault::PowerLoss,
    Fault::PowerLossOfAll,
    Fault::Restart,
    Fault::Restart,
    Fault::Restart,
    Fault::Restart,
    Fault::Storm,
    Fault::DiskError,
    Fault::DiskFull,
    Fault::HandOver,
];

/// The dice of strikes are those of parts from here on.
const FIRST_PART: u64 = 100_000;

/// Strikes at a cluster. Each strike has dice of its own, so that leaving one out changes no other.
pub(super) struct Nemesis {
    plan: Plan,
    record: Record,
    strikes: u32,
}

impl Nemesis {
    pub(super) fn new(plan: &Plan, record: Record) -> Self {
        Self {
            plan: plan.clone(),
            record,
            strikes: 0,
        }
    }

    pub(super) fn members(&self) -> u64 {
        self.plan.members
    }

    pub(super) async fn strike(&mut self, cluster: &mut Cluster) {
        self.strikes += 1;
        if self.plan.without.contains(&self.strikes) {
            return;
        }
        let dice = Dice::new(self.plan.seed, FIRST_PART + u64::from(self.strikes));
        let Some(fault) = dice.pick(FAULTS) else { return };
        let leader = cluster.live.leader().map(|(member, _)| member);
        let anybody = dice.pick(&cluster.live.members());
        let member = match fault {
            Fault::IsolateLeader | Fault::KillLeader | Fault::HandOver => leader,
            Fault::OneWay | Fault::Kill | Fault::PowerLoss | Fault::DiskError | Fault::DiskFull => anybody,
            Fault::Split | Fault::Heal | Fault::PowerLossOfAll | Fault::Restart | Fault::Storm => None,
        };
        self.record.note(format_args!("{fault:?}"));
        self.record.event(What::Strike {
            number: self.strikes,
            fault,
            member,
        });
        match fault {
            Fault::Split => self.split(cluster, |_| dice.percent(50)),
            Fault::IsolateLeader => self.split(cluster, |id| Some(id) == member),
            Fault::OneWay => {
                let deaf = member.unwrap_or(1);
                self.record.count(|counts| counts.partitions += 1);
                cluster.switch.cut((1..=self.plan.members).map(|id| (id, deaf)));
            }
            Fault::Heal => heal(cluster, self.plan.members),
            Fault::Kill | Fault::KillLeader => self.end(cluster, member, Ending::Killed).await,
            Fault::PowerLoss => self.end(cluster, member, Ending::PowerLost).await,
            Fault::PowerLossOfAll => {
                for id in cluster.live.members() {
                    self.end(cluster, Some(id), Ending::PowerLost).await;
                }
                restart(cluster).await; // together, as a site does
            }
            Fault::Restart => restart(cluster).await,
            Fault::Storm => cluster.switch.set_weather(Weather {
                delay: (1_000, 60_000),
                loss: 5,
            }),
            Fault::DiskError => self.disk(cluster, member, DiskFault::WriteError),
            Fault::DiskFull => self.disk(cluster, member, DiskFault::Full),
            Fault::HandOver => {
                if let Some((_, replica)) = cluster.live.leader() {
                    self.record.count(|counts| counts.hand_overs += 1);
                    replica.hand_over(None).await;
                }
            }
        }
    }

    /// Two sides that do not hear each other.
    fn split(&self, cluster: &Cluster, side: impl Fn(u64) -> bool) {
        let sides: Vec<(u64, bool)> = (1..=self.plan.members).map(|id| (id, side(id))).collect();
        let across = |from: &(u64, bool)| {
            let from = *from;
            sides
                .iter()
                .filter(move |to| to.1 != from.1)
                .map(move |to| (from.0, to.0))
                .collect::<Vec<_>>()
        };
        self.record.count(|counts| counts.partitions += 1);
        cluster.switch.cut(sides.iter().flat_map(across));
    }

    async fn end(&self, cluster: &mut Cluster, id: Option<u64>, how: Ending) {
        let Some(id) = id else { return };
        self.record.note(format_args!("m{id}: {how:?}"));
        self.record.count(|counts| match how {
            Ending::Killed => counts.kills += 1,
            Ending::PowerLost => counts.power_losses += 1,
        });
        cluster.stop(id, how).await;
    }

    fn disk(&self, cluster: &Cluster, id: Option<u64>, fault: DiskFault) {
        let Some(id) = id else { return };
        self.record.note(format_args!("m{id}: {fault:?}"));
        cluster.set_fault(id, fault);
    }
}

async fn restart(cluster: &mut Cluster) {
    for id in cluster.down() {
        cluster.restart(id).await;
    }
}

/// Network and disks work again.
pub(super) fn heal(cluster: &Cluster, members: u64) {
    cluster.switch.cut([]);
    cluster.switch.set_weather(CALM);
    for id in 1..=members {
        cluster.set_fault(id, DiskFault::None);
    }
}
