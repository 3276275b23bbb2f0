//! What can be done to a running cluster, and to whom.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A fault. Each lasts for a while, and its end takes it back, but for those that are over when they are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The node dies: every process of it at once. It starts again in the end.
    Kill,
    /// Its program is asked to end, and starts again in the end.
    Stop,
    /// Of a worker: its agent dies alone, and its launcher starts another one. Over at once.
    KillAgent,
    /// Every process of it stands still, and goes on in the end.
    Pause,
    /// Nothing comes to it from other nodes, and nothing from it to them.
    Isolate,
    /// Of a worker: its network is unplugged, for its clients, too. In a container it may come back with another address.
    Disconnect,
    /// It hears no other node; they hear it.
    Deaf,
    /// No other node hears it; it hears them.
    Mute,
    /// Two halves of the nodes do not hear each other; it is in the smaller one.
    Split,
    /// As a split, but for one manager that hears both sides, and is heard.
    Bridge,
    /// Each manager hears its two neighbours alone.
    Ring,
    /// One frame in five to each node is lost.
    Loss,
    /// Connections to it are reset as soon as something is sent over them.
    Reset,
    /// Connections to it are slow: each piece comes late.
    Delay,
    /// Connections to it change a byte now and then.
    Corrupt,
    /// A manager dies and its replicated store is lost; it starts in the end, and has to come back as a new member.
    LoseStore,
    /// Its disk is full.
    DiskFull,
    /// Its wall clock is ahead: a manager's by an hour, a worker's by a hundred days.
    ClockAhead,
    /// Its wall clock is ten days behind.
    ClockBehind,
    /// Its wall clock jumps from an hour ahead to an hour behind and back, several times a second.
    ClockJumps,
    /// A manager can open no more files and connections.
    NoDescriptors,
    /// It gets a tenth of the processor time: it stands still for 90 of each 100 ms.
    Starve,
    /// The root of the cluster is rotated. Over at once: the cluster carries on by itself.
    RotateRoot,
    /// A worker is drained, and takes tasks again in the end.
    Drain,
}

impl Fault {
    /// Every one.
    pub const ALL: &[Fault] = &[
        Self::Kill,
        Self::Stop,
        Self::KillAgent,
        Self::Pause,
        Self::Isolate,
        Self::Disconnect,
        Self::Deaf,
        Self::Mute,
        Self::Split,
        Self::Bridge,
        Self::Ring,
        Self::Loss,
        Self::Reset,
        Self::Delay,
        Self::Corrupt,
        Self::LoseStore,
        Self::DiskFull,
        Self::ClockAhead,
        Self::ClockBehind,
        Self::ClockJumps,
        Self::NoDescriptors,
        Self::Starve,
        Self::RotateRoot,
        Self::Drain,
    ];

    /// Its name, as scenarios and reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::KillAgent => "kill-agent",
            Self::Pause => "pause",
            Self::Isolate => "isolate",
            Self::Disconnect => "disconnect",
            Self::Deaf => "deaf",
            Self::Mute => "mute",
            Self::Split => "split",
            Self::Bridge => "bridge",
            Self::Ring => "ring",
            Self::Loss => "loss",
            Self::Reset => "reset",
            Self::Delay => "delay",
            Self::Corrupt => "corrupt",
            Self::LoseStore => "lose-store",
            Self::DiskFull => "disk-full",
            Self::ClockAhead => "clock-ahead",
            Self::ClockBehind => "clock-behind",
            Self::ClockJumps => "clock-jumps",
            Self::NoDescriptors => "no-descriptors",
            Self::Starve => "starve",
            Self::RotateRoot => "rotate-root",
            Self::Drain => "drain",
        }
    }

    /// Whether it is over as soon as it was done.
    pub fn is_over_at_once(self) -> bool {
        matches!(self, Self::KillAgent | Self::RotateRoot)
    }

    /// Whether it is done to the whole cluster, so that it has no target.
    pub fn is_of_all(self) -> bool {
        matches!(self, Self::Ring | Self::Loss | Self::RotateRoot)
    }

    /// Whether it is a matter of the network between nodes.
    pub fn is_of_network(self) -> bool {
        matches!(
            self,
            Self::Isolate
                | Self::Deaf
                | Self::Mute
                | Self::Split
                | Self::Bridge
                | Self::Ring
                | Self::Loss
                | Self::Reset
                | Self::Delay
                | Self::Corrupt
        )
    }

    /// How many seconds off a node's wall clock is while it lasts, of the `turn`th look at it; nothing where it is right.
    pub fn clock(self, manager: bool, turn: u64) -> Option<i32> {
        const HOUR: i32 = 3_600;
        const DAY: i32 = 24 * HOUR;
        match self {
            Self::ClockAhead => Some(if manager { HOUR } else { 100 * DAY }),
            Self::ClockBehind => Some(-10 * DAY),
            Self::ClockJumps => Some(if turn.is_multiple_of(2) { HOUR } else { -HOUR }),
            _ => None,
        }
    }

    /// Whether it can be done to a worker; the rest is for managers.
    pub fn is_for_workers(self) -> bool {
        !matches!(
            self,
            Self::Split | Self::Bridge | Self::Ring | Self::LoseStore | Self::DiskFull | Self::NoDescriptors
        )
    }

    /// Whether it can be done to a manager.
    pub fn is_for_managers(self) -> bool {
        !matches!(self, Self::KillAgent | Self::Drain | Self::Disconnect)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whom a fault is for. Who that is shows when it strikes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// The manager that leads.
    #[default]
    Leader,
    /// A manager that does not.
    Follower,
    /// Any manager.
    Manager,
    /// Any worker.
    Worker,
    /// Every manager at once.
    AllManagers,
    /// The node of this name.
    #[serde(untagged)]
    Node(String),
}

/// The words for each of them.
pub(super) const TARGETS: &str = "leader, follower, manager, worker, all-managers, or a node's name";

/// Refuses a strike whose target is none of these nodes.
///
/// # Errors
/// Where there is one.
pub fn must_be_there(strikes: &[Strike], nodes: &[String]) -> anyhow::Result<()> {
    for strike in strikes {
        if let Target::Node(name) = &strike.target {
            anyhow::ensure!(
                nodes.contains(name),
                "there is no {name} for {}: a target is {TARGETS}; the nodes are {}",
                strike.fault,
                nodes.join(", ")
            );
        }
    }
    Ok(())
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Leader => "leader",
            Self::Follower => "follower",
            Self::Manager => "manager",
            Self::Worker => "worker",
            Self::AllManagers => "all-managers",
            Self::Node(name) => name,
        })
    }
}

/// One fault of a run: when, which, to whom and for how long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Strike {
    /// Since the run began.
    #[serde(serialize_with = "millis")]
    pub at: Duration,
    /// What is done.
    pub fault: Fault,
    /// To whom.
    pub target: Target,
    /// For how long.
    #[serde(rename = "for", serialize_with = "millis")]
    pub lasts: Duration,
}

fn millis<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_is_no_node_is_refused() {
        let strike = |target| Strike {
            at: std::time::Duration::ZERO,
            fault: Fault::Kill,
            target,
            lasts: std::time::Duration::ZERO,
        };
        let nodes = ["manager-1", "worker-1"].map(str::to_owned);
        for target in [Target::Leader, Target::Worker, Target::Node("worker-1".into())] {
            must_be_there(&[strike(target)], &nodes).expect("there is one");
        }
        let error = must_be_there(&[strike(Target::Node("boss".into()))], &nodes).expect_err("no such node");
        let text = error.to_string();
        for part in ["there is no boss", "leader, follower", "manager-1, worker-1"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_fault_has_the_name_that_scenarios_write() {
        for fault in Fault::ALL {
            let text = serde_json::to_string(fault).expect("plain");
            assert_eq!(text, format!("\"{}\"", fault.name()));
            assert!(fault.is_for_managers() || fault.is_for_workers(), "{fault}");
        }
    }

    #[test]
    fn a_target_is_a_part_of_the_cluster_or_the_name_of_a_node() {
        let parse = |text: &str| serde_json::from_str::<Target>(&format!("\"{text}\"")).expect("a word");
        assert_eq!(parse("leader"), Target::Leader);
        assert_eq!(parse("all-managers"), Target::AllManagers);
        assert_eq!(parse("worker-2"), Target::Node("worker-2".into()));
        for text in ["leader", "follower", "worker-2"] {
            assert_eq!(parse(text).to_string(), text);
        }
    }
}
