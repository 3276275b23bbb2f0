//! What goes wrong, in a seeded order.

use bulkhead_raft::file_system::Fault;

use super::cluster::{Cluster, Ending};
use super::dice::Dice;
use super::network::{CALM, Weather};
use super::record::Record;

/// One thing that goes wrong, or right again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Move {
    Split,
    IsolateLeader,
    OneWay,
    Heal,
    Kill,
    KillLeader,
    PowerLoss,
    PowerLossOfAll,
    Restart,
    Storm,
    DiskError,
    DiskFull,
    HandOver,
}

/// Healing and restarting are listed more often, or the cluster would mostly stand still.
const MOVES: &[Move] = &[
    Move::Split,
    Move::IsolateLeader,
    Move::OneWay,
    Move::Heal,
    Move::Heal,
    Move::Heal,
    Move::Kill,
    Move::KillLeader,
    Move::KillLeader,
    Move::PowerLoss,
    Move::PowerLoss,
    Move::PowerLossOfAll,
    Move::Restart,
    Move::Restart,
    Move::Restart,
    Move::Restart,
    Move::Storm,
    Move::DiskError,
    Move::DiskFull,
    Move::HandOver,
];

pub(super) struct Nemesis {
    pub(super) dice: Dice,
    pub(super) record: Record,
    pub(super) members: u64,
}

impl Nemesis {
    pub(super) async fn strike(&self, cluster: &mut Cluster) {
        let Some(what) = self.dice.pick(MOVES) else { return };
        self.record.note(format_args!("{what:?}"));
        let leader = cluster.live.leader().map(|(member, _)| member);
        let anybody = self.dice.pick(&cluster.live.members());
        match what {
            Move::Split => self.split(cluster, |_, dice| dice.percent(50)),
            Move::IsolateLeader => self.split(cluster, |id, _| Some(id) == leader),
            Move::OneWay => {
                let deaf = anybody.unwrap_or(1);
                self.record.count(|counts| counts.partitions += 1);
                cluster.switch.cut((1..=self.members).map(|id| (id, deaf)));
            }
            Move::Heal => heal(cluster, self.members),
            Move::Kill => self.end(cluster, anybody, Ending::Killed).await,
            Move::KillLeader => self.end(cluster, leader, Ending::Killed).await,
            Move::PowerLoss => self.end(cluster, anybody, Ending::PowerLost).await,
            Move::PowerLossOfAll => {
                for id in cluster.live.members() {
                    self.end(cluster, Some(id), Ending::PowerLost).await;
                }
                self.restart(cluster).await; // together, as a site does
            }
            Move::Restart => self.restart(cluster).await,
            Move::Storm => cluster.switch.set_weather(Weather {
                delay: (1_000, 60_000),
                loss: 5,
            }),
            Move::DiskError => self.fault(cluster, anybody, Fault::WriteError),
            Move::DiskFull => self.fault(cluster, anybody, Fault::Full),
            Move::HandOver => {
                if let Some((_, replica)) = cluster.live.leader() {
                    self.record.count(|counts| counts.hand_overs += 1);
                    replica.hand_over(None).await;
                }
            }
        }
    }

    /// Two sides that do not hear each other.
    fn split(&self, cluster: &Cluster, side: impl Fn(u64, &Dice) -> bool) {
        let sides: Vec<(u64, bool)> = (1..=self.members).map(|id| (id, side(id, &self.dice))).collect();
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

    pub(super) async fn restart(&self, cluster: &mut Cluster) {
        for id in cluster.down() {
            cluster.restart(id).await;
        }
    }

    fn fault(&self, cluster: &Cluster, id: Option<u64>, fault: Fault) {
        let Some(id) = id else { return };
        self.record.note(format_args!("m{id}: {fault:?}"));
        cluster.set_fault(id, fault);
    }
}

/// Network and disks work again.
pub(super) fn heal(cluster: &Cluster, members: u64) {
    cluster.switch.cut([]);
    cluster.switch.set_weather(CALM);
    for id in 1..=members {
        cluster.set_fault(id, Fault::None);
    }
}
