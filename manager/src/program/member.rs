//! A manager that is a member of a cluster: all its parts, put together and running.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_identity::comeback::Challenges;
use bulkhead_identity::local::LocalConnection;
use bulkhead_identity::net::Listener;
use bulkhead_identity::seam::{Clock, Entropy, SystemClock, SystemEntropy};
use bulkhead_identity::store::{KeyFile, ManagerPart};
use bulkhead_identity::{Bundle, Credentials, Identity, UnlockKey, Unswapped, tls};
use bulkhead_proto::NodeId;
use bulkhead_proto::wire::ManagerAddress;
use bulkhead_raft::encryption::{DataKey, DataKeys, Sealing};
use bulkhead_raft::file_system::{FileSystem, RealFileSystem};
use bulkhead_raft::log_store::OpenError;
use bulkhead_raft::runtime::Blocking;
use bulkhead_raft::transport::{Binding, Network, RaftService, Witness};
use bulkhead_raft::{Parts, Replica, StartError, Timing, log_store};
use futures::StreamExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use super::binding::Speakers;
use super::error::ProgramError;
use super::local::LocalService;
use super::tasks::Tasks;
use super::{offline, recover};
use crate::audit::Notes;
use crate::authz::{AuthzLayer, Listing};
use crate::ca::signer::Signers;
use crate::ca::{self, Ca, EnrolmentService};
use crate::control_api::{self, Control};
use crate::dispatcher::{self, DispatcherService, Sessions};
use crate::freshness::{self, Fresh};
use crate::key_ring::{self, EnvelopeKey, KeyRing};
use crate::leader::{self, Signs};
use crate::membership::Gate;
use crate::peer::{self, PeerService};
use crate::peers::{Dialer, Peers};
use crate::proposer::Proposer;
use crate::registry::{self, Registry};

/// Handshakes done and waiting to be served, on the local socket.
const LOCAL_BACKLOG: usize = 64;
/// A program that ends holds its log for a moment longer: readers of it end after consensus does.
pub(super) const UNLOCKED: Duration = Duration::from_secs(3);
pub(super) const LOCKED: Duration = Duration::from_millis(50);
/// What the others said of their stores is written down this often.
const REMEMBERED: Duration = Duration::from_secs(1);
/// Freshness is looked at this often, and waited for at most so long, when this manager has just become one.
const FRESH_POLL: Duration = Duration::from_millis(10);
const FRESH_WAIT: Duration = Duration::from_secs(3);

/// Told of each replica that starts.
#[derive(Clone)]
pub struct Started(pub Arc<dyn Fn(Replica) + Send + Sync>);

impl fmt::Debug for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Started(…)")
    }
}

/// What every manager is given from outside.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its data folder, for this program alone. Keys and images are in it on the system's own disk, whatever `fs` is.
    pub data: PathBuf,
    /// Its clocks.
    pub clock: Arc<dyn Clock>,
    /// Its random source.
    pub entropy: Arc<dyn Entropy>,
    /// The disk of the replicated store.
    pub fs: Arc<dyn FileSystem>,
    /// Where what waits for that disk is done.
    pub blocking: Blocking,
    /// How the log uses it.
    pub log: log_store::Options,
    /// How fast replicas notice.
    pub timing: Timing,
    /// Who looks at replicas from outside: nobody, but in a simulation.
    pub started: Option<Started>,
}

impl Machine {
    /// The machine that this process runs on.
    pub fn real(data: PathBuf) -> Self {
        Self {
            data,
            clock: Arc::new(SystemClock::start()),
            entropy: Arc::new(SystemEntropy),
            fs: Arc::new(RealFileSystem),
            blocking: Blocking::Threads,
            log: log_store::Options::default(),
            timing: Timing::default(),
            started: None,
        }
    }

    pub(super) fn keys(&self) -> PathBuf {
        self.data.join("keys")
    }

    /// The folder of log and snapshot. Each epoch has its own, so that the key file alone says which one counts: a
    /// crash leaves the old epoch or the new one, whole.
    pub(super) fn store(&self, epoch: u64) -> PathBuf {
        match epoch {
            1 => self.data.join("raft"),
            epoch => self.data.join(format!("raft-{epoch}")),
        }
    }

    /// Removes the store of an epoch, if there is one.
    pub(super) fn remove_store(&self, epoch: u64) -> io::Result<()> {
        self.fs.remove_folder(&self.store(epoch))
    }

    /// What this manager remembers of the others' stores.
    fn members(&self) -> PathBuf {
        self.data.join("members")
    }

    /// The place of a store that was lost: what is left of it, for whoever looks for the reason. Its key is gone.
    pub(super) fn damaged(&self) -> PathBuf {
        self.data.join("raft-damaged")
    }

    /// Puts the store of an epoch aside, in the place of the one that was put there before.
    pub(super) fn put_aside(&self, epoch: u64) -> io::Result<()> {
        let aside = self.damaged();
        self.fs.remove_folder(&aside)?;
        self.fs.rename_folder(&self.store(epoch), &aside)
    }

    /// A join that waits for approval.
    pub(super) fn joining(&self) -> PathBuf {
        self.data.join("joining")
    }

    /// What this manager will be, once it is no manager any more: a key file.
    pub(super) fn next_keys(&self) -> PathBuf {
        self.data.join("keys.standby")
    }

    /// Removes what only a manager has: every store, whatever its epoch, and the images.
    pub(super) fn clear(&self) -> io::Result<()> {
        for name in self.fs.list(&self.data)? {
            if name == "raft" || name.starts_with("raft-") {
                self.fs.remove_folder(&self.data.join(name))?;
            }
        }
        or_absent(self.fs.unlink(&self.members()))?;
        or_absent(std::fs::remove_dir_all(self.images()))
    }

    fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// Removes what is of a membership, and says how that went. First the keys: without them nobody reads the rest.
    pub(super) fn forget(&self) -> String {
        let removed = or_absent(std::fs::remove_file(self.next_keys()))
            .and_then(|()| std::fs::remove_file(self.keys()))
            .and_then(|()| self.clear());
        match removed {
            Ok(()) => "it left its cluster, and kept nothing of it".to_owned(),
            Err(error) => {
                tracing::error!(%error, data = %self.data.display(), "not everything of the cluster was removed");
                format!("it left its cluster; empty the data folder before it enters another ({error})")
            }
        }
    }

    pub(super) fn now_ms(&self) -> i64 {
        i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX)
    }
}

/// What is not there need not be removed.
fn or_absent(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// A running member.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) machine: Machine,
    pub(super) replica: Replica,
    pub(super) identity: Identity,
    pub(super) proposer: Proposer,
    pub(super) fresh: Fresh,
    pub(super) peers: Peers,
    pub(super) gate: Gate,
    pub(super) key_ring: KeyRing,
    pub(super) advertise: String,
    /// What changes no object, for the audit log.
    pub(super) notes: Notes,
    data_keys: Arc<DataKeys>,
    /// What is remembered of the members' stores, this one's included.
    pub(super) witness: Witness,
    /// Cancelled once the cluster counts on this manager no more: then everything ends, and is forgotten.
    pub(super) left: CancellationToken,
    /// Cancelled once it is a standby in the cluster: then its store goes, and it goes on as one.
    pub(super) demoted: CancellationToken,
    /// Connections of the local socket, which this member serves along with its own API.
    pub(super) local: mpsc::Sender<LocalConnection>,
    /// Asks whoever runs this member to end it, and to go on from its store alone.
    pub(super) recover: mpsc::Sender<recover::Order>,
    keys: Mutex<KeyFile>,
    /// Held by whoever asks for new credentials, until they are taken up.
    turn: tokio::sync::Mutex<()>,
}

impl Member {
    /// This node.
    pub(super) fn node(&self) -> NodeId {
        self.identity.subject().node
    }

    /// What the key file holds, as `look` reads it.
    pub(super) fn keys<T>(&self, look: impl FnOnce(&KeyFile) -> T) -> T {
        look(&self.keys.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until this manager may decide, so that whoever is told that it is there can use it at once. Bounded: one
    /// that hears no leader is there all the same, and says so when it is asked.
    pub(super) async fn until_fresh(&self) {
        let heard = async {
            while !self.fresh.is_fresh() {
                sleep(FRESH_POLL).await;
            }
        };
        let _late = timeout(FRESH_WAIT, heard).await;
    }

    /// The right to ask for new credentials and to take them up. One at a time: of two answers the one that was committed
    /// first could be taken up last, and the cluster takes who uses an older key than it saw for a clone of this node.
    pub(super) async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Takes up credentials: first on disk, then in every new handshake.
    pub(super) fn renewed(&self, credentials: Credentials) -> Result<(), ProgramError> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        self.take_up(keys, Arc::new(credentials))
    }

    /// Trusts these roots from now on, in the same way; key and certificate stay.
    pub(super) fn trusts(&self, bundle: Bundle) -> Result<(), ProgramError> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let new = keys.credentials.with_bundle(bundle);
        self.take_up(keys, Arc::new(new))
    }

    fn take_up(
        &self,
        mut keys: MutexGuard<'_, KeyFile>,
        credentials: Arc<Credentials>,
    ) -> Result<(), ProgramError> {
        let old = std::mem::replace(&mut keys.credentials, credentials.clone());
        if let Err(error) = keys.save(&self.machine.keys()) {
            keys.credentials = old;
            return Err(error.into());
        }
        Ok(self.identity.replace(credentials)?)
    }

    /// Keeps where the managers are reached, for a start at which the store does not tell.
    pub(super) fn keep_managers(&self, managers: Vec<ManagerAddress>) -> Result<(), ProgramError> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.managers == managers {
            return Ok(());
        }
        let old = std::mem::replace(&mut keys.managers, managers);
        keys.save(&self.machine.keys()).map_err(|error| {
            keys.managers = old;
            error.into()
        })
    }

    /// Seals the key file with this unlock key from now on, or with none.
    pub(super) fn lock_with(&self, lock: Option<UnlockKey>) -> Result<(), ProgramError> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut keys.lock, lock);
        keys.save(&self.machine.keys()).map_err(|error| {
            keys.lock = old;
            error.into()
        })
    }

    /// Takes a new data key: first on disk, beside the one before, then for all that is written. One that was taken
    /// before and is not done yet stays.
    pub(super) fn renew_data_key(&self, key: Unswapped<[u8; 32]>) -> Result<(), ProgramError> {
        if self.has_former_data_key() {
            return Ok(());
        }
        self.with_part(|part| {
            part.former_data_key = Some(std::mem::replace(&mut part.data_key, key.clone()));
        })?;
        let renewed = self.data_keys.renew(DataKey::new(key));
        debug_assert!(renewed, "the store's keys are those of the key file");
        Ok(())
    }

    /// Nothing on disk needs the data key of before.
    pub(super) fn forget_data_key(&self) -> Result<(), ProgramError> {
        self.data_keys.forget_former();
        self.with_part(|part| part.former_data_key = None)
    }

    /// Whether the data key of before is still needed.
    pub(super) fn has_former_data_key(&self) -> bool {
        self.keys(|keys| {
            let part = keys.manager.as_ref();
            part.is_some_and(|part| part.former_data_key.is_some())
        })
    }

    fn with_part(&self, change: impl FnOnce(&mut ManagerPart)) -> Result<(), ProgramError> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let before = keys.manager.clone();
        keys.manager.as_mut().map(change);
        keys.save(&self.machine.keys()).map_err(|error| {
            keys.manager = before;
            error.into()
        })
    }

    /// Puts a manager together and starts it: it listens when this returns. `local` is the service of the local
    /// socket, which a member serves itself.
    pub(super) async fn start(
        machine: Machine,
        mut keys: KeyFile,
        local_service: LocalService,
        recover: mpsc::Sender<recover::Order>,
        stop: CancellationToken,
    ) -> Result<(Arc<Member>, Tasks), ProgramError> {
        if let Some(part) = keys.manager.as_mut().filter(|part| !part.made) {
            // Before anything is acknowledged: an empty folder is a loss from then on.
            offline::make(&machine, part).await?;
            part.made = true;
            keys.save(&machine.keys())?;
        }
        let Some(part) = &keys.manager else {
            return Err(ProgramError::NotAManager(machine.data.clone()));
        };
        let identity = Identity::new(keys.credentials.clone())?;
        let subject = identity.subject();
        let binding = Binding {
            cluster: subject.cluster,
            epoch: part.epoch,
            member: part.member.0,
        };
        let dialer = Dialer::new(identity.clone());
        let data_keys = data_keys(part);
        let members = machine.members();
        let witness = Witness::open(&*machine.fs, &members).map_err(|source| ProgramError::Folder {
            path: members,
            source,
        })?;
        let (keys_of_store, dial) = (data_keys.clone(), dialer.clone());
        let replica = start_replica(&machine, part, keys_of_store, binding, dial, witness.clone()).await?;
        if let Some(Started(told)) = &machine.started {
            told(replica.clone());
        }
        let listen = part.listen.clone();
        let listener = Listener::bind(&listen)
            .await
            .map_err(|source| ProgramError::Listen {
                address: listen.clone(),
                source,
            })?;

        let (clock, entropy) = (machine.clock.clone(), machine.entropy.clone());
        let peers = Peers::new(replica.clone(), dialer);
        let fresh = Fresh::new(replica.clone(), clock.clone());
        let actor = format!("manager/{}", subject.node);
        let proposer = Proposer::new(
            replica.clone(),
            Arc::new(peers.clone()),
            clock.clone(),
            entropy.clone(),
            actor.clone(),
        );
        let envelope_key = EnvelopeKey::from_bytes(part.envelope_key.clone());
        let key_ring = KeyRing::new(subject.node, envelope_key, entropy.clone());
        let registry = open_images(&machine.images(), &peers)?;
        let signs = Signs::default();
        let gate = Gate::new(replica.clone(), proposer.clone(), clock.clone());
        let sessions = Sessions::default();
        let notes = Notes::default();
        let listing = Listing::new(replica.clone());
        let authz = AuthzLayer::new(
            subject.cluster,
            listing.clone(),
            fresh.clone(),
            peers.clone(),
            clock.clone(),
            notes.clone(),
            stop.clone(),
        );
        let signers = Signers::new(identity.clone(), clock.clone());
        let ca = Ca::new(key_ring.clone()).with_signers(signers.clone());
        let enrolment = EnrolmentService::new(
            replica.clone(),
            proposer.clone(),
            fresh.clone(),
            ca.clone(),
            clock.clone(),
            Challenges::new()?,
            notes.clone(),
        );
        let (reports, committer) = dispatcher::reports(proposer.clone(), entropy.clone(), subject.node);
        let dispatcher = DispatcherService::new(dispatcher::Parts {
            desk: Arc::new(dispatcher::Desk {
                replica: replica.clone(),
                proposer: proposer.clone(),
                fresh: fresh.clone(),
                ring: key_ring.clone(),
                sessions: sessions.clone(),
                signs: signs.clone(),
                reports,
                notes: notes.clone(),
                clock: clock.clone(),
                entropy: entropy.clone(),
            }),
            registry: registry.clone(),
            enrolment: enrolment.clone(),
        });
        let control = Control::new(control_api::Parts {
            replica: replica.clone(),
            proposer: proposer.clone(),
            registry: registry.clone(),
            key_ring: key_ring.clone(),
            ca: ca.clone(),
            logs: Arc::new(sessions.clone()),
            peers: Arc::new(peers.clone()),
            fresh: fresh.clone(),
            clock: clock.clone(),
            entropy: entropy.clone(),
        });
        let peer_service = PeerService::new(peer::Parts {
            replica: replica.clone(),
            proposer: proposer.clone(),
            ring: key_ring.clone(),
            registry: registry.clone(),
            sessions: sessions.clone(),
            signs: signs.clone(),
            gate: gate.clone(),
            fresh: fresh.clone(),
            clock: clock.clone(),
        });
        let speakers = Arc::new(Speakers(replica.clone()));
        let raft_service = RaftService::new(&replica, binding, speakers, witness.clone());

        let mut tasks = Tasks::new(stop);
        let (health, health_loop) = control_api::health(fresh.clone(), tasks.stop());
        let network = Server::builder()
            .layer(authz.clone())
            .add_service(enrolment.into_server())
            .add_service(dispatcher.into_server())
            .add_service(peer_service.into_server())
            .add_service(raft_service.into_server())
            .add_service(control.clone().into_server())
            .add_service(health.clone());
        let stopped = tasks.stop();
        let incoming = tls::incoming(listener, identity.clone(), clock.clone());
        tasks.spawn("the server for managers, workers and operators", async move {
            let served = network
                .serve_with_incoming_shutdown(incoming, stopped.cancelled_owned())
                .await;
            report("the network server failed", served);
        });
        let (local, connections) = mpsc::channel(LOCAL_BACKLOG);
        let machine_local = Server::builder()
            .layer(authz)
            .add_service(local_service.into_server())
            .add_service(control.into_server())
            .add_service(health);
        let stopped = tasks.stop();
        tasks.spawn("the server of the local socket", async move {
            let incoming = ReceiverStream::new(connections).map(Ok::<_, std::io::Error>);
            let served = machine_local
                .serve_with_incoming_shutdown(incoming, stopped.cancelled_owned())
                .await;
            report("the local server failed", served);
        });
        let stop = tasks.stop();
        tasks.spawn("freshness", fresh.clone().follow(peers.clone(), stop.clone()));
        tasks.spawn(
            "the memory of the others' stores",
            remember(witness.clone(), machine.blocking, stop.clone()),
        );
        tasks.spawn("the health service", health_loop);
        tasks.spawn("the key list", {
            let stop = stop.clone();
            async move { listing.run(stop).await }
        });
        tasks.spawn("sessions", {
            let (sessions, replica, stop) = (sessions.clone(), replica.clone(), stop.clone());
            async move { sessions.run(replica, stop).await }
        });
        tasks.spawn("status reports", committer.run(stop.clone()));
        tasks.spawn(
            "liveness reports",
            dispatcher::report_liveness(
                replica.clone(),
                peers.clone(),
                signs.clone(),
                clock.clone(),
                stop.clone(),
            ),
        );
        tasks.spawn(
            "orchestration",
            leader::run(
                replica.clone(),
                proposer.clone(),
                signs,
                clock.clone(),
                fresh.clone(),
                stop.clone(),
            ),
        );
        tasks.spawn(
            "notes for the audit log",
            notes.clone().run(
                proposer.clone(),
                actor.clone(),
                clock.clone(),
                entropy.clone(),
                stop.clone(),
            ),
        );
        tasks.spawn(
            "alarms about clones",
            notes.alarms().run(
                replica.clone(),
                proposer.clone(),
                actor,
                clock.clone(),
                entropy,
                stop.clone(),
            ),
        );
        tasks.spawn(
            "readings of clocks",
            freshness::keep(
                subject.node,
                replica.clone(),
                proposer.clone(),
                fresh.clone(),
                clock.clone(),
                machine.entropy.clone(),
                stop.clone(),
            ),
        );
        tasks.spawn("membership", gate.clone().run(stop.clone()));
        tasks.spawn(
            "root rotation",
            ca::lead(
                replica.clone(),
                proposer.clone(),
                ca.clone(),
                clock.clone(),
                stop.clone(),
            ),
        );
        tasks.spawn(
            "external signers",
            ca::signer::watch(replica.clone(), ca, signers, stop.clone()),
        );
        let keeping = key_ring::Keeping {
            replica: replica.clone(),
            proposer: proposer.clone(),
            ring: key_ring.clone(),
            clock: clock.clone(),
        };
        tasks.spawn("key ring", keeping.run(stop.clone()));
        let collected = {
            let replica = replica.clone();
            let fresh = fresh.clone();
            move || fresh.is_fresh().then(|| replica.state())
        };
        tasks.spawn(
            "image collection",
            registry::collect_loop(registry, collected, clock, stop),
        );
        let advertise = part.advertise.clone();
        let member = Arc::new(Member {
            machine,
            replica,
            identity,
            proposer,
            fresh,
            peers,
            gate,
            key_ring,
            advertise,
            notes,
            data_keys,
            witness,
            left: CancellationToken::new(),
            demoted: CancellationToken::new(),
            local,
            recover,
            keys: Mutex::new(keys),
            turn: tokio::sync::Mutex::default(),
        });
        Ok((member, tasks))
    }
}

/// The keys that open a manager's store.
pub(super) fn data_keys(part: &ManagerPart) -> Arc<DataKeys> {
    Arc::new(DataKeys::new(
        DataKey::new(part.data_key.clone()),
        part.former_data_key.clone().map(DataKey::new),
    ))
}

/// Under what a manager's store is sealed.
pub(super) fn sealing(part: &ManagerPart, keys: Arc<DataKeys>) -> Sealing {
    Sealing {
        keys,
        store: part.store,
        cluster_epoch: part.epoch,
        member: part.member.0,
    }
}

async fn start_replica(
    machine: &Machine,
    part: &ManagerPart,
    keys: Arc<DataKeys>,
    binding: Binding,
    dialer: Dialer,
    witness: Witness,
) -> Result<Replica, ProgramError> {
    let sealing = sealing(part, keys);
    let until = Instant::now() + UNLOCKED;
    loop {
        let parts = Parts {
            member: part.member.0,
            fs: machine.fs.clone(),
            folder: machine.store(part.epoch),
            sealing: sealing.clone(),
            entropy: machine.entropy.clone(),
            network: Network::new(dialer.clone(), binding, witness.clone()),
            timing: machine.timing.clone(),
            log: log_store::Options {
                made: part.made,
                ..machine.log.clone()
            },
            blocking: machine.blocking,
            witness: witness.clone(),
        };
        match Replica::start(parts).await {
            Err(StartError::Log(OpenError::Locked { .. })) if Instant::now() < until => sleep(LOCKED).await,
            started => return Ok(started?),
        }
    }
}

/// Writes down each second what the others said of their stores, and once more at the end.
async fn remember(witness: Witness, blocking: Blocking, stop: CancellationToken) {
    let mut stopped = false;
    while !stopped {
        stopped = tokio::select! {
            biased;
            () = stop.cancelled() => true,
            () = sleep(REMEMBERED) => false,
        };
        let kept = witness.clone();
        if let Err(error) = blocking.run(move || kept.keep()).await {
            tracing::warn!(%error, "what the others said of their stores was not written");
        }
    }
}

fn open_images(folder: &Path, peers: &Peers) -> Result<Registry, ProgramError> {
    Registry::open(folder, Arc::new(peers.clone())).map_err(|error| ProgramError::Images {
        path: folder.to_owned(),
        source: error.into(),
    })
}

fn report(what: &'static str, served: Result<(), tonic::transport::Error>) {
    if let Err(error) = served {
        tracing::error!(error = crate::refusal::chain(&error), "{what}");
    }
}
