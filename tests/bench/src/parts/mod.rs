//! The parts of the table. Each measures one thing on a cluster of its own or on the one that the parts before it left
//! up, and answers with rows; one that fails becomes a row that says so, and the others go on.

mod endure;
mod hand_over;
mod idle;
mod kill;
mod reconnect;
mod remove;
mod renew;
mod rotate;
mod tasks;
mod tools;
mod up;
mod work;
mod worker;
mod write;

use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::report::{Report, Row};
use bulkhead_lab::system::Others;
use bulkhead_lab::{Lab, Network, Place};

/// A part of the table, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Part {
    /// Cluster of 3 + 2, from the first program's start to ready
    Up,
    /// Memory after a minute of rest
    Idle,
    /// 100 tasks on one node
    Tasks,
    /// A worker is lost
    Worker,
    /// The leader is killed
    Kill,
    /// The leader is asked to stop
    HandOver,
    /// A node is removed
    Remove,
    /// The root rolls
    Rotate,
    /// 1,000 workers renew, and the root rolls under them
    Renew,
    /// The leader is killed with 1,000 workers at it
    Reconnect,
    /// Durable replicated writes, beside etcd
    Write,
    /// The log store alone
    Log,
    /// One task's start
    Start,
    /// Half an hour of writes at nine tenths of the most; only where it is asked for
    Endure,
}

impl Part {
    /// The parts of the table.
    pub(crate) fn of_the_table() -> Vec<Self> {
        let all = Self::value_variants().iter().copied();
        all.filter(|part| *part != Self::Endure).collect()
    }
}

/// What the command line says.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) programs: PathBuf,
    pub(crate) folder: PathBuf,
    pub(crate) subnet: String,
    pub(crate) etcd: Option<PathBuf>,
    pub(crate) quick: bool,
}

/// A run: its options, and the cluster that is up.
#[derive(Debug)]
pub(crate) struct Bench {
    options: Options,
    lab: Option<Lab>,
}

impl Bench {
    pub(crate) fn new(options: Options) -> Self {
        Self { options, lab: None }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.options.folder
    }

    /// Measures one part; whether that worked.
    pub(crate) async fn measure(&mut self, part: Part, report: &mut Report) -> bool {
        let name = part.to_possible_value();
        let name = name.as_ref().map_or("", |value| value.get_name());
        eprintln!("bulkhead-bench: measuring: {name}");
        let others = Others::watch();
        let rows = match part {
            Part::Up => Box::pin(up::measure(self)).await,
            Part::Idle => Box::pin(idle::measure(self)).await,
            Part::Tasks => Box::pin(tasks::measure(self)).await,
            Part::Worker => Box::pin(worker::measure(self)).await,
            Part::Kill => Box::pin(kill::measure(self)).await,
            Part::HandOver => Box::pin(hand_over::measure(self)).await,
            Part::Remove => Box::pin(remove::measure(self)).await,
            Part::Renew => Box::pin(renew::measure(self)).await,
            Part::Rotate => Box::pin(rotate::measure(self)).await,
            Part::Reconnect => Box::pin(reconnect::measure(self)).await,
            Part::Write => Box::pin(write::measure(self)).await,
            Part::Log => tools::log_store(self).await,
            Part::Start => tools::task_start().await,
            Part::Endure => Box::pin(endure::measure(self)).await,
        };
        match rows {
            Ok(rows) => {
                let percent = others.percent();
                for mut row in rows {
                    row.others_percent.get_or_insert(percent);
                    report.add(row);
                }
                true
            }
            Err(error) => {
                eprintln!("bulkhead-bench: {name}: {error:#}");
                report.add(Row::failed(name, &format!("{error:#}")));
                self.lab = None; // in whatever state it is: the next part starts a new one
                false
            }
        }
    }

    /// Ends the cluster that is up, if one is.
    pub(crate) async fn end(&mut self) {
        self.lab = None;
    }

    fn place(&self) -> Place {
        Place {
            programs: self.options.programs.clone(),
            below: self.options.folder.clone(),
            prefix: "bulkhead-bench.",
            network: Network::Loopback(self.options.subnet.clone()),
            disk: None,
        }
    }

    /// So many repetitions, or few when it is only to be seen that all works.
    fn times(&self, full: usize, quick: usize) -> usize {
        if self.options.quick { quick } else { full }
    }

    /// Three managers and two workers: those of before, or new ones.
    async fn lab(&mut self) -> anyhow::Result<&mut Lab> {
        if self.lab.is_none() {
            self.lab = Some(Lab::up(&self.place(), 3, 2).await?.0);
        }
        self.lab
            .as_mut()
            .ok_or_else(|| anyhow::anyhow!("it was just made"))
    }
}
