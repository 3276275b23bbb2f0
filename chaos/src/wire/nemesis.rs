//! What goes wrong, in a seeded order.

use std::time::Duration;

use bulkhead_launcher::message::ExitCause;
use bulkhead_raft::file_system::Fault as DiskFault;

use super::{Ending, Host, Plan, Run};
use crate::sim::dice::Dice;
use crate::sim::{Fault, What};

/// What strikes. Healing and restarting are listed more often, or the cluster would mostly stand still.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Blow {
    Split,
    IsolateLeader,
    OneWay,
    /// Nothing arrives between two sides; what is sent arrives later.
    Hold,
    Heal,
    Kill,
    KillLeader,
    PowerLoss,
    PowerLossOfManagers,
    KillWorker,
    PowerLossOfWorker,
    Restart,
    Storm,
    DiskError,
    DiskFull,
    TaskEnds,
}

const BLOWS: &[Blow] = &[
    Blow::Split,
    Blow::IsolateLeader,
    Blow::OneWay,
    Blow::OneWay,
    Blow::Hold,
    Blow::Heal,
    Blow::Heal,
    Blow::Heal,
    Blow::Heal,
    Blow::Kill,
    Blow::KillLeader,
    Blow::PowerLoss,
    Blow::PowerLossOfManagers,
    Blow::KillWorker,
    Blow::PowerLossOfWorker,
    Blow::Restart,
    Blow::Restart,
    Blow::Restart,
    Blow::Restart,
    Blow::Storm,
    Blow::DiskError,
    Blow::DiskFull,
    Blow::TaskEnds,
];

/// The slowest message of a storm.
const STORM: Duration = Duration::from_millis(80);
/// The dice of strikes are those of parts from here on.
const FIRST_PART: u64 = 100_000;

impl Blow {
    /// As a report has it.
    fn fault(self) -> Option<Fault> {
        match self {
            Self::Split | Self::Hold => Some(Fault::Split),
            Self::IsolateLeader => Some(Fault::IsolateLeader),
            Self::OneWay => Some(Fault::OneWay),
            Self::Heal => Some(Fault::Heal),
            Self::Kill => Some(Fault::Kill),
            Self::KillLeader => Some(Fault::KillLeader),
            Self::PowerLoss => Some(Fault::PowerLoss),
            Self::PowerLossOfManagers => Some(Fault::PowerLossOfAll),
            Self::Restart => Some(Fault::Restart),
            Self::Storm => Some(Fault::Storm),
            Self::DiskError => Some(Fault::DiskError),
            Self::DiskFull => Some(Fault::DiskFull),
            Self::KillWorker | Self::PowerLossOfWorker | Self::TaskEnds => None,
        }
    }
}

/// Strikes at a cluster. Each strike has dice of its own, so that leaving one out changes no other.
pub(super) struct Nemesis {
    plan: Plan,
    strikes: u32,
}

impl Nemesis {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            plan: plan.clone(),
            strikes: 0,
        }
    }

    pub(super) fn strike(&mut self, run: &mut Run) {
        self.strikes += 1;
        run.record.strikes(self.strikes);
        if self.plan.without.contains(&self.strikes) {
            return;
        }
        let dice = Dice::new(self.plan.seed, FIRST_PART + u64::from(self.strikes));
        let Some(blow) = dice.pick(BLOWS) else { return };
        let anybody = 1 + dice.below(run.course.managers.len()) as u64;
        let worker = Host::Worker(1 + dice.below(run.course.workers.len()) as u64);
        let member = match blow {
            Blow::IsolateLeader | Blow::KillLeader => run.leader(),
            Blow::OneWay | Blow::Kill | Blow::PowerLoss | Blow::DiskError | Blow::DiskFull => Some(anybody),
            _ => None,
        };
        run.record
            .note(format_args!("strike {}: {blow:?} {member:?}", self.strikes));
        if let Some(fault) = blow.fault() {
            run.record.event(What::Strike {
                number: self.strikes,
                fault,
                member,
            });
        }
        match (blow, member) {
            (Blow::Split, _) => sides(run, |_| dice.percent(50), Cut::Drop),
            (Blow::Hold, _) => sides(run, |_| dice.percent(50), Cut::Hold),
            (Blow::IsolateLeader, Some(leader)) => {
                sides(run, |host| host == Host::Manager(leader), Cut::Drop);
            }
            (Blow::OneWay, Some(deaf)) => deafen(run, Host::Manager(deaf)),
            (Blow::Heal, _) => run.heal(),
            (Blow::Kill | Blow::KillLeader, Some(id)) => run.stop(Host::Manager(id), Ending::Killed),
            (Blow::PowerLoss, Some(id)) => run.stop(Host::Manager(id), Ending::PowerLost),
            (Blow::PowerLossOfManagers, _) => {
                for id in 1..=self.plan.managers {
                    run.stop(Host::Manager(id), Ending::PowerLost);
                }
                run.restart_all(); // together, as a site does
            }
            (Blow::KillWorker, _) => run.stop(worker, Ending::Killed),
            (Blow::PowerLossOfWorker, _) => run.stop(worker, Ending::PowerLost),
            (Blow::Restart, _) => run.restart_all(),
            (Blow::Storm, _) => run.sim.set_max_message_latency(STORM),
            (Blow::DiskError, Some(id)) => disk(run, id, DiskFault::WriteError),
            (Blow::DiskFull, Some(id)) => disk(run, id, DiskFault::Full),
            (Blow::TaskEnds, _) => task_ends(run, worker, &dice),
            // Nobody leads: there is nobody to strike.
            (
                Blow::IsolateLeader
                | Blow::KillLeader
                | Blow::OneWay
                | Blow::Kill
                | Blow::PowerLoss
                | Blow::DiskError
                | Blow::DiskFull,
                None,
            ) => {}
        }
    }
}

/// What becomes of what is sent between two sides.
#[derive(Clone, Copy)]
enum Cut {
    Drop,
    Hold,
}

/// Two sides that do not hear each other.
fn sides(run: &Run, side: impl Fn(Host) -> bool, cut: Cut) {
    run.record.count(|counts| counts.partitions += 1);
    let sides: Vec<(String, bool)> = run
        .hosts()
        .into_iter()
        .map(|it| (it.to_string(), side(it)))
        .collect();
    for (at, (one, here)) in sides.iter().enumerate() {
        for (other, there) in &sides[at + 1..] {
            match (here == there, cut) {
                (true, _) => {}
                (false, Cut::Drop) => run.sim.partition(one.as_str(), other.as_str()),
                (false, Cut::Hold) => run.sim.hold(one.as_str(), other.as_str()),
            }
        }
    }
}

/// One that hears nobody, and is heard.
fn deafen(run: &Run, deaf: Host) {
    run.record.count(|counts| counts.partitions += 1);
    for host in run.hosts().into_iter().filter(|it| *it != deaf) {
        run.sim.partition_oneway(host.to_string(), deaf.to_string());
    }
}

fn disk(run: &mut Run, id: u64, fault: DiskFault) {
    run.failing.insert(id);
    run.manager(id).disk.set_fault(fault);
}

/// A task fails by itself.
fn task_ends(run: &Run, worker: Host, dice: &Dice) {
    let Host::Worker(id) = worker else { return };
    let sandbox = &run.worker(id).sandbox;
    let running = sandbox.running();
    if running.is_empty() {
        return;
    }
    let task = &running[dice.below(running.len())];
    sandbox.end(task, ExitCause::Code(1));
}
