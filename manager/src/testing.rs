//! One real manager in the test's own process: a replica on disk, real TLS, and the services of this crate.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::comeback::Challenges;
use bulkhead_identity::seam::{Clock, Entropy as _, SystemClock, SystemEntropy};
use bulkhead_identity::ticket::TicketSecret;
use bulkhead_identity::{
    Bundle, Certificate, Credentials, Identity, Key as IdentityKey, Unswapped, csr, tls,
};
use bulkhead_proto::wire::{
    Change, Kind, Role as WireRole, Ticket, Transaction, change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{ClusterId, NodeId, RequestId, Role};
use bulkhead_raft::encryption::{DataKey, Sealing};
use bulkhead_raft::file_system::RealFileSystem;
use bulkhead_raft::log_store::Options;
use bulkhead_raft::state::State;
use bulkhead_raft::transport::{Binding, Network};
use bulkhead_raft::{Member, Parts, Replica, Timing};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Server};
use zeroize::Zeroizing;

use crate::audit::Notes;
use crate::authz::{AuthzLayer, Listing};
use crate::ca::genesis::{FirstManager, FirstOperator, Wishes, genesis};
use crate::ca::{Ca, EnrolmentService, Validity, genesis};
use crate::control_api::{self, Control};
use crate::dispatcher::{self, DispatcherService, Sessions, report_liveness, reports};
use crate::freshness::Fresh;
use crate::key_ring::{EnvelopeKey, KeyRing};
use crate::leader::Signs;
use crate::membership::Gate;
use crate::peer::{self, PeerService};
use crate::peers::{Dialer, Peers};
use crate::proposer::Proposer;
use crate::registry::Registry;
use crate::view;

/// The manager, and what tests reach into.
pub(crate) struct Manager {
    pub(crate) cluster: ClusterId,
    pub(crate) bundle: Bundle,
    pub(crate) address: String,
    pub(crate) own: Identity,
    pub(crate) operator: Identity,
    pub(crate) replica: Replica,
    pub(crate) proposer: Proposer,
    pub(crate) fresh: Fresh,
    pub(crate) listing: Listing,
    pub(crate) peers: Peers,
    pub(crate) ring: KeyRing,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) stop: CancellationToken,
    _folder: tempfile::TempDir,
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    SystemEntropy.fill(&mut bytes).expect("random");
    bytes
}

/// A key and its certificate request's public half.
pub(crate) fn key() -> (IdentityKey, csr::PublicKey) {
    let key = IdentityKey::generate().expect("random");
    let public = csr::public_key(&key.csr().expect("signed")).expect("our own");
    (key, public)
}

pub(crate) fn identity(key: IdentityKey, certificate: &[u8], bundle: &Bundle) -> Identity {
    Identity::new(Credentials {
        key,
        certificate: Certificate::from_der(certificate).expect("the profile"),
        chain: Vec::new(),
        bundle: bundle.clone(),
    })
    .expect("they belong together")
}

pub(crate) fn create(any: Any) -> Change {
    Change {
        change: Some(Step::Create(view::object(any))),
    }
}

/// A key ring as another manager would open it.
pub(crate) fn ring(n: u8) -> KeyRing {
    let key = EnvelopeKey::from_bytes(Unswapped::new([n; 32]));
    KeyRing::new(NodeId::from_bytes([n; 16]), key, Arc::new(SystemEntropy))
}

/// The state that a cluster begins with, and nothing that runs.
pub(crate) struct Founded {
    pub(crate) state: State,
    /// Of its first manager.
    pub(crate) ring: KeyRing,
    pub(crate) node: NodeId,
}

impl Founded {
    /// At this time, by the manager `manager-1` and the operator `admin`.
    pub(crate) fn new(now_ms: i64) -> Self {
        let node = NodeId::from_bytes([1; 16]);
        let ring = ring(1);
        let first = FirstManager {
            node,
            name: "manager-1".into(),
            advertise: "127.0.0.1:7443".into(),
            key: key().1,
            envelope_key: ring.public(),
            description: Default::default(),
        };
        let operator = FirstOperator {
            node: NodeId::from_bytes([2; 16]),
            name: "admin".into(),
            key: key().1,
        };
        let born = genesis(first, Some(operator), Wishes::default(), now_ms, &SystemEntropy);
        let born = born.expect("a cluster");
        let mut state = State::default();
        apply(&mut state, 3, born.changes);
        Self { state, ring, node }
    }
}

/// Applies changes that must be taken.
pub(crate) fn apply(state: &mut State, index: u64, changes: Vec<Change>) {
    let transaction = Transaction {
        level: 1,
        changes,
        ..Default::default()
    };
    let applied = state
        .apply(index, 1, &transaction.encode_to_vec())
        .expect("a known level");
    assert_eq!(applied.outcome.rejection, None);
}

impl Manager {
    /// A cluster of one manager, fresh and serving.
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::start());
        let entropy = Arc::new(SystemEntropy);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let (manager_key, manager_public) = key();
        let (operator_key, operator_public) = key();
        let envelope = EnvelopeKey::generate(&*entropy).expect("random");
        let now = i64::try_from(clock.wall_millis()).expect("this age");
        let node = NodeId::from_bytes(random());
        let born = genesis(
            FirstManager {
                node,
                name: "manager-1".into(),
                advertise: address.clone(),
                key: manager_public,
                envelope_key: envelope.public(),
                description: Default::default(),
            },
            Some(FirstOperator {
                node: NodeId::from_bytes(random()),
                name: "admin".into(),
                key: operator_public,
            }),
            Wishes {
                lab: true,
                ..Default::default()
            },
            now,
            &*entropy,
        )
        .expect("a cluster");
        let bundle = Bundle::from_ders(vec![born.root.clone()]).expect("a root");
        let own = identity(manager_key, &born.manager.certificate, &bundle);
        let operator = identity(
            operator_key,
            &born.operator.expect("asked for").certificate,
            &bundle,
        );
        let dialer = Dialer::new(own.clone());
        let binding = Binding {
            cluster: born.cluster,
            epoch: 1,
            member: 1,
        };
        let replica = Replica::start(Parts {
            member: 1,
            fs: Arc::new(RealFileSystem),
            folder: folder.path().join("raft"),
            sealing: Sealing {
                keys: Arc::new(DataKey::new(Unswapped::new([7; 32])).into()),
                store: [1; 16],
                cluster_epoch: 1,
                member: 1,
            },
            entropy: entropy.clone(),
            network: Network::new(dialer.clone(), binding, Default::default()),
            timing: Timing::default(),
            log: Options {
                segment_bytes: 1 << 20,
                ..Options::default()
            },
            blocking: Default::default(),
            witness: Default::default(),
        })
        .await
        .expect("a replica");
        let me = Member {
            node,
            address: address.clone(),
        };
        replica.initialise(me).await.expect("the first voter");
        let peers = Peers::new(replica.clone(), dialer);
        let actor = format!("manager/{node}");
        let proposer = Proposer::new(
            replica.clone(),
            Arc::new(peers.clone()),
            clock.clone(),
            entropy.clone(),
            actor.clone(),
        );
        let ring = KeyRing::new(node, envelope, entropy.clone());
        let fresh = Fresh::new(replica.clone(), clock.clone());
        let stop = CancellationToken::new();
        let (sessions, listing) = (Sessions::default(), Listing::new(replica.clone()));
        let (handle, committer) = reports(proposer.clone(), entropy.clone(), node);
        let ca = Ca::new(ring.clone());
        let notes = Notes::default();
        let enrolment = EnrolmentService::new(
            replica.clone(),
            proposer.clone(),
            fresh.clone(),
            ca,
            clock.clone(),
            Challenges::new().expect("random"),
            notes.clone(),
        );
        let registry = Registry::open(folder.path(), Arc::new(peers.clone())).expect("a folder");
        let signs = Signs::default();
        let dispatcher = DispatcherService::new(dispatcher::Parts {
            desk: Arc::new(dispatcher::Desk {
                replica: replica.clone(),
                proposer: proposer.clone(),
                fresh: fresh.clone(),
                ring: ring.clone(),
                sessions: sessions.clone(),
                signs: signs.clone(),
                reports: handle,
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
            key_ring: ring.clone(),
            ca: Ca::new(ring.clone()),
            logs: Arc::new(sessions.clone()),
            peers: Arc::new(peers.clone()),
            fresh: fresh.clone(),
            clock: clock.clone(),
            entropy: entropy.clone(),
        });
        let peer = PeerService::new(peer::Parts {
            gate: Gate::new(replica.clone(), proposer.clone(), clock.clone()),
            replica: replica.clone(),
            proposer: proposer.clone(),
            ring: ring.clone(),
            registry,
            sessions: sessions.clone(),
            signs: signs.clone(),
            fresh: fresh.clone(),
            clock: clock.clone(),
        });
        let (health, health_loop) = control_api::health(fresh.clone(), stop.clone());
        tokio::spawn(health_loop);
        let manager = Self {
            cluster: born.cluster,
            bundle,
            address,
            own: own.clone(),
            operator,
            replica: replica.clone(),
            proposer,
            fresh: fresh.clone(),
            listing: listing.clone(),
            peers: peers.clone(),
            ring,
            clock: clock.clone(),
            stop: stop.clone(),
            _folder: folder,
        };
        manager.commit(born.changes).await;
        let layer = AuthzLayer::new(
            manager.cluster,
            listing.clone(),
            fresh.clone(),
            peers.clone(),
            clock.clone(),
            notes.clone(),
            stop.clone(),
        );
        tokio::spawn(fresh.clone().follow(peers.clone(), stop.clone()));
        tokio::spawn(committer.run(stop.clone()));
        tokio::spawn(notes.alarms().run(
            replica.clone(),
            manager.proposer.clone(),
            actor.clone(),
            clock.clone(),
            entropy.clone(),
            stop.clone(),
        ));
        tokio::spawn(notes.run(
            manager.proposer.clone(),
            actor,
            clock.clone(),
            entropy,
            stop.clone(),
        ));
        tokio::spawn(report_liveness(
            replica.clone(),
            peers,
            signs,
            clock,
            stop.clone(),
        ));
        tokio::spawn({
            let (listing, stop) = (listing, stop.clone());
            async move { listing.run(stop).await }
        });
        tokio::spawn({
            let stop = stop.clone();
            async move { sessions.run(replica, stop).await }
        });
        let server = Server::builder()
            .layer(layer)
            .add_service(enrolment.into_server())
            .add_service(dispatcher.into_server())
            .add_service(peer.into_server())
            .add_service(control.into_server())
            .add_service(health)
            .serve_with_incoming_shutdown(
                tls::incoming(listener, own, manager.clock.clone()),
                stop.cancelled_owned(),
            );
        tokio::spawn(server);
        until(|| fresh.is_fresh()).await;
        manager
    }

    /// Commits as the local user.
    pub(crate) async fn commit(&self, changes: Vec<Change>) {
        let request = RequestId::from_bytes(random());
        let outcome = self
            .proposer
            .client("local/0", request, Vec::new(), changes)
            .await;
        assert_eq!(outcome.expect("it leads").rejection, None);
    }

    /// A node that was admitted before, and its key.
    pub(crate) async fn admitted(&self, role: Role, name: &str) -> Identity {
        self.admitted_for(role, name, Duration::from_secs(3_600)).await
    }

    /// The same, with a certificate that ends after so long.
    pub(crate) async fn admitted_for(&self, role: Role, name: &str, validity: Duration) -> Identity {
        let (key, public) = key();
        let node = NodeId::from_bytes(random());
        let state = self.replica.state();
        let cluster = view::cluster(&state).expect("begun");
        let now = i64::try_from(self.clock.wall_millis()).expect("this age");
        let validity = Validity::from_now(now, validity);
        let signed = Ca::new(self.ring.clone())
            .issue_here(cluster, node, role, &public, validity)
            .expect("signed");
        let certificate = signed.certificate.clone();
        let record = genesis::record(node, role, name.to_owned(), signed, now);
        self.commit(vec![create(Any::Node(record))]).await;
        identity(key, &certificate, &self.bundle)
    }

    /// A ticket's secret.
    pub(crate) async fn ticket(&self, role: WireRole, uses_left: u32) -> Vec<u8> {
        let secret = random();
        self.commit(vec![create(Any::Ticket(Ticket {
            id: random().to_vec(),
            role: role.into(),
            secret_hash: TicketSecret::new(Zeroizing::new(secret)).hash().to_vec(),
            expires_at: i64::MAX,
            uses_left,
            ..Default::default()
        }))])
        .await;
        secret.to_vec()
    }

    /// A connection with this certificate.
    pub(crate) fn channel(&self, identity: &Identity) -> Channel {
        tls::channel(identity, &self.address, tls::Expect::AnyManager).expect("an address")
    }

    /// A connection without a certificate.
    pub(crate) fn anonymous(&self) -> Channel {
        tls::bundle_channel(&self.bundle, &self.address, tls::Expect::AnyManager).expect("an address")
    }

    /// Deletes a node and puts its keys on the list of the removed.
    pub(crate) async fn remove(&self, node: NodeId) {
        use bulkhead_proto::wire::{AddTombstone, Tombstone};
        let state = self.replica.state();
        let record = view::node(&state, node).expect("there");
        let mut changes: Vec<Change> = record
            .keys
            .iter()
            .map(|key| Change {
                change: Some(Step::AddTombstone(AddTombstone {
                    tombstone: Some(Tombstone {
                        key_id: key.key_id.clone(),
                        node_id: node.to_wire(),
                        ..Default::default()
                    }),
                })),
            })
            .collect();
        let gone = bulkhead_raft::state::Key::new(Kind::Node, *node.as_bytes()).to_wire();
        changes.push(Change {
            change: Some(Step::Delete(gone)),
        });
        self.commit(changes).await;
    }
}

/// Waits for a condition, and fails the test when it does not come.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while !condition() {
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    waited.await.expect("it becomes true");
}
