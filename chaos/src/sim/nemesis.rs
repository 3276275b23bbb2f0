//! What goes wrong, in a seeded order.

use bulkhead_raft::file_system::Fault as DiskFault;
use tokio::time::sleep;

use super::Plan;
use super::cluster::{Cluster, Ending};
use super::dice::Dice;
use super::network::Weather;
use super::record::{Fault, Record, What};
use super::shape::Shape;

/// Healing and restarting are listed more often, or the cluster would mostly stand still.
const OF_STATE: &[Fault] = &[
    Fault::Split,
    Fault::IsolateLeader,
    Fault::OneWay,
    Fault::Bridge,
    Fault::Ring,
    Fault::Chain,
    Fault::LeaderDeaf,
    Fault::LeaderMute,
    Fault::Swizzle,
    Fault::Heal,
    Fault::Heal,
    Fault::Heal,
    Fault::Heal,
    Fault::Heal,
    Fault::Kill,
    Fault::Kill,
    Fault::KillLeader,
    Fault::KillLeader,
    Fault::KillLeader,
    Fault::PowerLoss,
    Fault::PowerLoss,
    Fault::PowerLoss,
    Fault::PowerLossOfAll,
    Fault::PowerLossOfAll,
    Fault::PowerLossOfAll,
    Fault::Restart,
    Fault::Restart,
    Fault::Restart,
    Fault::Restart,
    Fault::Restart,
    Fault::Restart,
    Fault::Pause,
    Fault::PauseLeader,
    Fault::PauseLeader,
    Fault::Storm,
    Fault::DiskError,
    Fault::DiskFull,
    Fault::DiskStall,
    Fault::DiskLost,
    Fault::HandOver,
    Fault::HandOver,
];

/// Of rotations, whose course has faults of its own.
const OF_ROTATION: &[Fault] = &[
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
    faults: Vec<Fault>,
    record: Record,
    strikes: u32,
}

impl Nemesis {
    pub(super) fn new(plan: &Plan, record: Record) -> Self {
        let mut faults = OF_STATE.to_vec();
        if plan.workers > 0 {
            // The manager of a machine that takes the place of a lost one would have no keys.
            faults.retain(|fault| *fault != Fault::DiskLost);
        }
        Self {
            plan: plan.clone(),
            faults,
            record,
            strikes: 0,
        }
    }

    /// Of rotations: what a machine is replaced by has no certificate there, and programs are stopped by its own course.
    pub(super) fn of_rotation(plan: &Plan, record: Record) -> Self {
        Self {
            faults: OF_ROTATION.to_vec(),
            ..Self::new(plan, record)
        }
    }

    pub(super) async fn strike(&mut self, cluster: &mut Cluster) {
        self.strikes += 1;
        self.record.strikes(self.strikes);
        if self.plan.without.contains(&self.strikes) {
            return;
        }
        let dice = Dice::new(self.plan.seed, FIRST_PART + u64::from(self.strikes));
        let Some(fault) = dice.pick(&self.faults) else {
            return;
        };
        let leader = cluster.live.leader().map(|(member, _)| member);
        let anybody = dice.pick(&cluster.live.members());
        let member = match fault {
            Fault::IsolateLeader
            | Fault::LeaderDeaf
            | Fault::LeaderMute
            | Fault::KillLeader
            | Fault::PauseLeader
            | Fault::HandOver => leader,
            Fault::OneWay
            | Fault::Kill
            | Fault::PowerLoss
            | Fault::Pause
            | Fault::DiskError
            | Fault::DiskFull
            | Fault::DiskStall
            | Fault::DiskLost => anybody,
            Fault::Split
            | Fault::Bridge
            | Fault::Ring
            | Fault::Chain
            | Fault::Swizzle
            | Fault::Heal
            | Fault::PowerLossOfAll
            | Fault::Restart
            | Fault::Storm => None,
        };
        self.record.note(format_args!("{fault:?}"));
        self.record.event(What::Strike {
            number: self.strikes,
            fault,
            member,
        });
        match fault {
            Fault::Split => self.split(cluster, |_| dice.percent(50)),
            Fault::Bridge => self.shape(cluster, Shape::Bridge, &dice, None),
            Fault::Ring => self.shape(cluster, Shape::Ring, &dice, None),
            Fault::Chain => self.shape(cluster, Shape::Chain, &dice, None),
            Fault::IsolateLeader => self.shape(cluster, Shape::FirstAlone, &dice, member),
            Fault::OneWay | Fault::LeaderDeaf => self.shape(cluster, Shape::FirstDeaf, &dice, member),
            Fault::LeaderMute => self.shape(cluster, Shape::FirstMute, &dice, member),
            Fault::Swizzle => self.swizzle(cluster, dice),
            Fault::Heal => heal(cluster),
            Fault::Kill | Fault::KillLeader => self.end(cluster, member, Ending::Killed).await,
            Fault::PowerLoss => self.end(cluster, member, Ending::PowerLost).await,
            Fault::PowerLossOfAll => {
                self.record.count(|counts| counts.power_losses_of_all += 1);
                // Also those whose program does not run: what it wrote is lost like that of the others.
                for id in cluster.machines() {
                    self.end(cluster, Some(id), Ending::PowerLost).await;
                }
                restart(cluster).await; // together, as a site does
            }
            Fault::Restart => restart(cluster).await,
            Fault::Pause | Fault::PauseLeader => self.pause(cluster, member, &dice),
            Fault::Storm => cluster.switch.set_weather(Weather {
                delay: (1_000, 60_000),
                loss: 5,
            }),
            Fault::DiskError => self.disk(cluster, member, DiskFault::WriteError, &dice),
            Fault::DiskFull => self.disk(cluster, member, DiskFault::Full, &dice),
            Fault::DiskStall => self.stall(cluster, member, &dice),
            Fault::DiskLost => self.lose(cluster, member).await,
            Fault::HandOver => {
                if let Some((_, replica)) = cluster.live.leader() {
                    self.record.count(|counts| counts.hand_overs += 1);
                    replica.hand_over(None).await;
                }
            }
        }
    }

    /// The network in this shape, its members in an order that the dice say, but for the first.
    fn shape(&self, cluster: &Cluster, shape: Shape, dice: &Dice, first: Option<u64>) {
        let mut members = cluster.machines();
        dice.shuffle(&mut members);
        if let Some(first) = first {
            members.sort_by_key(|id| *id != first);
        }
        self.record.note(format_args!("{shape:?} of {members:?}"));
        self.record.count(|counts| counts.partitions += 1);
        cluster.switch.cut(shape.cuts(&members));
    }

    /// Links are clogged one by one, each in both directions, and then released one by one in another order.
    fn swizzle(&self, cluster: &mut Cluster, dice: Dice) {
        let members = cluster.machines();
        let mut links: Vec<(u64, u64)> = members
            .iter()
            .flat_map(|one| members.iter().map(move |other| (*one, *other)))
            .filter(|(one, other)| one < other)
            .collect();
        dice.shuffle(&mut links);
        links.truncate(1 + dice.below(links.len().max(1)));
        self.record.count(|counts| counts.partitions += 1);
        let (switch, record) = (cluster.switch.clone(), self.record.clone());
        cluster.afterwards(async move {
            for clogged in [true, false] {
                for (one, other) in &links {
                    sleep(dice.micros(20_000, 200_000)).await;
                    record.note(format_args!("m{one} and m{other} clogged: {clogged}"));
                    switch.clog((*one, *other), clogged);
                    switch.clog((*other, *one), clogged);
                }
                dice.shuffle(&mut links);
            }
        });
    }

    fn pause(&self, cluster: &mut Cluster, id: Option<u64>, dice: &Dice) {
        let Some(id) = id else { return };
        let length = dice.micros(200_000, 3_000_000);
        self.record
            .note(format_args!("m{id} is stopped for {} ms", length.as_millis()));
        self.record.count(|counts| counts.pauses += 1);
        cluster.pause(id, length);
    }

    fn stall(&self, cluster: &mut Cluster, id: Option<u64>, dice: &Dice) {
        let Some(id) = id else { return };
        let length = dice.micros(1_000_000, 10_000_000);
        self.record
            .note(format_args!("m{id}: no flush for {} ms", length.as_millis()));
        self.record.count(|counts| counts.stalls += 1);
        cluster.stall(id, length);
    }

    /// Only where the others are a cluster without it: one that lost more than that is lost.
    async fn lose(&self, cluster: &mut Cluster, id: Option<u64>) {
        let Some(id) = id else { return };
        if let Some(new) = cluster.replace(id).await {
            self.record.note(format_args!(
                "m{id} is lost with its disk; m{new} comes in its place"
            ));
            self.record.count(|counts| counts.replacements += 1);
        }
    }

    /// Two sides that do not hear each other.
    fn split(&self, cluster: &Cluster, side: impl Fn(u64) -> bool) {
        let machines = cluster.machines().into_iter();
        let sides: Vec<(u64, bool)> = machines.map(|id| (id, side(id))).collect();
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

    fn disk(&self, cluster: &Cluster, id: Option<u64>, fault: DiskFault, dice: &Dice) {
        let Some(id) = id else { return };
        self.record.note(format_args!("m{id}: {fault:?}"));
        // A flush is a write, a sync and the mark: it fails at any of them.
        cluster.set_fault_after(id, dice.below(6) as u64, fault);
    }
}

async fn restart(cluster: &mut Cluster) {
    for id in cluster.down() {
        cluster.restart(id).await;
    }
}

/// Network and disks work again, and stopped programs go on.
pub(super) fn heal(cluster: &mut Cluster) {
    cluster.calm();
    cluster.switch.heal();
    for id in cluster.machines() {
        cluster.set_fault(id, DiskFault::None);
    }
}
