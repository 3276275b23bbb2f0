//! Which faults strike when: drawn from a seed, before the run begins.
//!
//! Managers have one fault at a time, so that a quorum of three is never lost by the plan's own doing, workers another
//! one beside it, and the cluster's root a third: up to three overlap.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

use super::fault::{Fault, Strike, Target};

/// What a campaign is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Plan {
    /// Everything of nodes and networks; what machines lack and wrong clocks have plans of their own.
    Mixed,
    /// The leader dies, is stopped, stands still.
    Leader,
    /// The network is cut in all ways.
    Partition,
    /// The root is rotated again and again while nodes die and the network is cut.
    Rotation,
    /// Managers' disks are full or lost, they can open nothing more or hardly run, and they die.
    Disk,
    /// Wall clocks of single nodes are wrong, or jump.
    Clock,
    /// More managers fail at once than the cluster can lose.
    Quorum,
}

/// Before the first strike and after the last one the cluster is left alone.
const QUIET: Duration = Duration::from_secs(4);

/// What strikes one part of the cluster: kinds with their targets, and how long the gaps between them are.
struct Lane {
    choices: Vec<(Fault, Target)>,
    gap: (u64, u64),
    lasts: (u64, u64),
}

const M: Target = Target::Manager;
const W: Target = Target::Worker;
const L: Target = Target::Leader;

impl Plan {
    fn lanes(self) -> Vec<Lane> {
        use Fault::*;
        let leader = || vec![(Kill, L), (Stop, L), (Pause, L)];
        let network = || {
            let one = [Isolate, Deaf, Mute, Split, Bridge, Reset, Delay, Corrupt];
            let mut all: Vec<_> = one
                .into_iter()
                .flat_map(|fault| [(fault, L), (fault, M)])
                .collect();
            all.extend([(Ring, M), (Loss, M)]);
            all
        };
        let workers = || {
            vec![
                (Kill, W),
                (KillAgent, W),
                (Pause, W),
                (Isolate, W),
                (Stop, W),
                (Deaf, W),
                (Mute, W),
                (Disconnect, W),
                (Reset, W),
                (Drain, W),
            ]
        };
        let managers = |choices| Lane {
            choices,
            gap: (2_000, 4_000),
            lasts: (1_000, 6_000),
        };
        let beside = |choices| Lane {
            choices,
            gap: (4_000, 9_000),
            lasts: (1_000, 8_000),
        };
        let root = |gap| Lane {
            choices: vec![(RotateRoot, L)],
            gap,
            lasts: (0, 1),
        };
        match self {
            Self::Mixed => vec![
                managers(
                    [
                        leader(),
                        network(),
                        vec![
                            (Kill, M),
                            (Pause, M),
                            (Stop, M),
                            (LoseStore, M),
                            (LoseStore, L),
                            (Kill, Target::AllManagers),
                        ],
                    ]
                    .concat(),
                ),
                beside(workers()),
                root((25_000, 40_000)),
            ],
            Self::Leader => vec![managers(leader())],
            Self::Partition => vec![managers(network())],
            Self::Rotation => vec![
                managers([leader(), vec![(Isolate, L), (Isolate, M), (Split, L), (Deaf, M)]].concat()),
                beside(vec![(Kill, W), (Isolate, W), (Pause, W)]),
                root((8_000, 14_000)),
            ],
            Self::Disk => vec![managers(vec![
                (LoseStore, L),
                (LoseStore, M),
                (DiskFull, L),
                (DiskFull, M),
                (NoDescriptors, L),
                (NoDescriptors, M),
                (Starve, L),
                (Starve, M),
                (Kill, L),
                (Kill, Target::AllManagers),
            ])],
            Self::Clock => {
                let wrong = [ClockAhead, ClockBehind, ClockJumps];
                vec![
                    managers(
                        wrong
                            .iter()
                            .flat_map(|it| [(*it, L), (*it, M)])
                            .chain([(Kill, L)])
                            .collect(),
                    ),
                    beside(wrong.iter().map(|it| (*it, W)).chain([(Kill, W)]).collect()),
                    root((25_000, 40_000)),
                ]
            }
            Self::Quorum => vec![managers(vec![
                (Kill, Target::AllManagers),
                (Pause, Target::AllManagers),
                (Stop, Target::AllManagers),
            ])],
        }
    }

    /// The strikes of a run of this length, in order.
    pub fn strikes(self, seed: u64, length: Duration) -> Vec<Strike> {
        let mut random = SmallRng::seed_from_u64(seed);
        let end = length.saturating_sub(QUIET);
        let mut strikes = Vec::new();
        for lane in self.lanes() {
            let mut at = QUIET;
            // Each kind once before any comes again, as far as the time goes.
            let mut left: Vec<(Fault, Target)> = Vec::new();
            loop {
                at += Duration::from_millis(random.random_range(lane.gap.0..lane.gap.1));
                let lasts = Duration::from_millis(random.random_range(lane.lasts.0..lane.lasts.1));
                if at + lasts >= end {
                    break;
                }
                if left.is_empty() {
                    left.clone_from(&lane.choices);
                }
                let Some((fault, target)) = left.choose(&mut random).cloned() else {
                    break;
                };
                left.retain(|it| *it != (fault, target.clone()));
                strikes.push(Strike {
                    at,
                    fault,
                    target,
                    lasts,
                });
                at += lasts;
            }
        }
        strikes.sort_by_key(|strike| strike.at);
        strikes
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn a_plan_is_that_of_its_seed_and_leaves_quiet_at_both_ends() {
        let length = Duration::from_secs(120);
        for plan in Plan::value_variants() {
            let strikes = plan.strikes(7, length);
            assert!(strikes.len() > 8, "{plan:?}: {}", strikes.len());
            assert_eq!(strikes, plan.strikes(7, length));
            assert_ne!(strikes, plan.strikes(8, length));
            for strike in &strikes {
                assert!(
                    strike.at >= QUIET && strike.at + strike.lasts <= length - QUIET,
                    "{strike:?}"
                );
            }
        }
    }

    #[test]
    fn managers_have_one_fault_at_a_time() {
        let of_managers = |it: &&Strike| it.target != Target::Worker && it.fault != Fault::RotateRoot;
        for seed in 0..50 {
            let strikes = Plan::Mixed.strikes(seed, Duration::from_secs(300));
            let theirs: Vec<&Strike> = strikes.iter().filter(of_managers).collect();
            for pair in theirs.windows(2) {
                assert!(pair[0].at + pair[0].lasts < pair[1].at, "{pair:?}");
            }
        }
    }

    #[test]
    fn each_kind_comes_before_any_comes_twice() {
        let strikes = Plan::Leader.strikes(3, Duration::from_secs(60));
        let first: std::collections::BTreeSet<_> = strikes.iter().take(3).map(|it| it.fault).collect();
        assert_eq!(first.len(), 3);
    }
}
