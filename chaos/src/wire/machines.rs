//! The machines of a run: each with a disk and, where it is a worker's, a launcher, which outlive its program.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_manager::program::{self as manager, Config as ManagerConfig, Join, Machine, Started};
use bulkhead_proto::Role;
use bulkhead_raft::file_system::{FileSystem as _, SimFileSystem};
use bulkhead_raft::log_store::{Flushing, Options};
use bulkhead_raft::runtime::Blocking;
use bulkhead_raft::{Replica, Timing};
use bulkhead_worker::config::Config as WorkerConfig;
use bulkhead_worker::program as worker;
use bulkhead_worker::runtime::Launcher;
use futures::FutureExt as _;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::record::Record;
use super::world::SimClock;
use super::{PORT, Plan};
use crate::sandbox::Sandbox;
use crate::sim::dice::Dice;

/// Where a ticket is, in a machine's folder.
const TICKET: &str = "ticket";

/// The replica of a machine's program that runs now. Dropped with the program: it holds the store.
type Slot = Arc<Mutex<Option<Replica>>>;

/// A manager's machine.
pub(super) struct Manager {
    pub(super) id: u64,
    plan: Plan,
    folder: PathBuf,
    pub(super) disk: SimFileSystem,
    lives: Cell<u64>,
    slot: Slot,
    /// Why the program of now ended by itself.
    ended: RefCell<Option<String>>,
    record: Record,
}

impl Manager {
    pub(super) fn new(id: u64, plan: &Plan, below: &Path, record: Record) -> std::io::Result<Self> {
        let folder = below.join(format!("m{id}"));
        std::fs::create_dir_all(&folder)?;
        let disk = SimFileSystem::new();
        disk.create_directory(&folder)?;
        Ok(Self {
            id,
            plan: plan.clone(),
            folder,
            disk,
            lives: Cell::new(0),
            slot: Slot::default(),
            ended: RefCell::default(),
            record,
        })
    }

    pub(super) fn name(&self) -> String {
        format!("m{}", self.id)
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder.join("manager.sock")
    }

    pub(super) fn replica(&self) -> Option<Replica> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets the store go, as the end of a process does.
    pub(super) fn let_go(&self) {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Why the program ended by itself, once.
    pub(super) fn why_ended(&self) -> Option<String> {
        self.ended.borrow_mut().take()
    }

    pub(super) fn give_ticket(&self, ticket: &str) -> std::io::Result<()> {
        std::fs::write(self.folder.join(TICKET), ticket)
    }

    /// What the machine gives to its program. Each life has dice of its own.
    fn machine(&self) -> Machine {
        let life = self.lives.get() + 1;
        self.lives.set(life);
        let seed = self.plan.seed ^ (self.id << 32) ^ (life << 48);
        let (flushes, slowest) = (Dice::new(seed, 4), self.plan.flush_micros);
        let slot = self.slot.clone();
        Machine {
            data: self.folder.clone(),
            clock: Arc::new(SimClock),
            entropy: Arc::new(Dice::new(seed, 3)),
            fs: Arc::new(self.disk.mounted()),
            blocking: Blocking::Inline,
            log: Options {
                segment_bytes: 256 << 10,
                flushing: Flushing::Delayed(Arc::new(move || sleep(flushes.micros(50, slowest)).boxed())),
                ..Options::default()
            },
            timing: Timing {
                snapshot_every: self.plan.snapshot_every,
                keep: self.plan.keep,
                ..Timing::default()
            },
            started: Some(Started(Arc::new(move |replica| {
                slot.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .replace(replica);
            }))),
        }
    }

    /// Runs the program until it ends or is killed.
    pub(super) async fn run(self: Rc<Self>, addresses: Rc<Addresses>) {
        let join = (self.id > 1).then(|| Join {
            addresses: vec![addresses.manager(1)],
            ticket_file: self.folder.join(TICKET),
            listen: format!("0.0.0.0:{PORT}"),
            advertise: addresses.manager(self.id),
            name: self.name(),
        });
        let config = ManagerConfig {
            data: self.folder.clone(),
            socket: self.socket(),
            join,
            unlock_key_file: None,
            role: Role::Manager,
        };
        let machine = self.machine();
        self.record.note(format_args!("m{} runs", self.id));
        self.record.event(crate::sim::What::Runs { member: self.id });
        let ended = Box::pin(manager::run_on(machine, config, CancellationToken::new())).await;
        let why = match ended {
            Ok(()) => "it was asked to".to_owned(),
            Err(error) => bulkhead_manager::refusal::chain(&error),
        };
        self.ended.replace(Some(why));
    }
}

/// A worker's machine.
pub(super) struct Worker {
    pub(super) id: u64,
    seed: u64,
    folder: PathBuf,
    pub(super) sandbox: Sandbox,
    lives: Cell<u64>,
    ended: RefCell<Option<String>>,
    record: Record,
}

impl Worker {
    pub(super) fn new(id: u64, plan: &Plan, below: &Path, record: Record) -> std::io::Result<Self> {
        let folder = below.join(format!("w{id}"));
        std::fs::create_dir_all(&folder)?;
        Ok(Self {
            id,
            seed: plan.seed,
            folder,
            sandbox: Sandbox::new(Arc::new(SimClock)),
            lives: Cell::new(0),
            ended: RefCell::default(),
            record,
        })
    }

    pub(super) fn name(&self) -> String {
        format!("w{}", self.id)
    }

    pub(super) fn give_ticket(&self, ticket: &str) -> std::io::Result<()> {
        std::fs::write(self.folder.join(TICKET), ticket)
    }

    /// Why the program ended by itself, once.
    pub(super) fn why_ended(&self) -> Option<String> {
        self.ended.borrow_mut().take()
    }

    /// Runs the program until it ends or is killed.
    pub(super) async fn run(self: Rc<Self>, addresses: Rc<Addresses>) {
        let life = self.lives.get() + 1;
        self.lives.set(life);
        let entropy = Dice::new(self.seed ^ (self.id << 32) ^ (life << 48), 7);
        let sandbox = self.sandbox.clone();
        let machine = worker::Machine {
            clock: Arc::new(SimClock),
            entropy: Arc::new(entropy),
            launcher: Launcher::within(move |calls, events| sandbox.serve(calls, events)),
        };
        let config = WorkerConfig {
            data: self.folder.clone(),
            launcher_fd: -1,
            socket: None,
            publish_address: std::net::Ipv4Addr::UNSPECIFIED.into(),
            join: addresses.managers(),
            ticket_file: Some(self.folder.join(TICKET)),
            name: Some(self.name()),
        };
        self.record.note(format_args!("w{} runs", self.id));
        let ended = Box::pin(worker::run_on(machine, config, std::future::pending())).await;
        let why = match ended {
            Ok(()) => "it was asked to".to_owned(),
            Err(error) => bulkhead_manager::refusal::chain(&error),
        };
        self.ended.replace(Some(why));
    }
}

/// Where managers are reached.
#[derive(Default)]
pub(super) struct Addresses(RefCell<BTreeMap<u64, String>>);

impl Addresses {
    pub(super) fn set(&self, id: u64, ip: std::net::IpAddr) {
        self.0.borrow_mut().insert(id, format!("{ip}:{PORT}"));
    }

    pub(super) fn manager(&self, id: u64) -> String {
        self.0.borrow().get(&id).cloned().unwrap_or_default()
    }

    pub(super) fn managers(&self) -> Vec<String> {
        self.0.borrow().values().cloned().collect()
    }
}

/// The slowest start of a program that ended by itself: as a service manager does.
pub(super) const START_AGAIN: Duration = Duration::from_secs(1);
