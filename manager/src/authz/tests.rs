//! The layer itself, for every method and every caller.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::comeback::{ComebackError, come_back};
use bulkhead_identity::seam::{Clock, SystemEntropy};
use bulkhead_identity::tls::Expect;
use bulkhead_identity::{ConnectInfo, Peer};
use bulkhead_proto::wire::dispatcher_client::DispatcherClient;
use bulkhead_proto::wire::enrolment_client::EnrolmentClient;
use bulkhead_proto::wire::{
    AuditAction, Change, FetchBlobRequest, GetRootRequest, NodeKey, RenewRequest, ReturnRequest,
    SupersededKey, change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{Caller, Method, Role, limits};
use http::{Request, Response};
use http_body::Body as _;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::{Layer as _, Service as _, ServiceExt as _, service_fn};

use super::guard::Guarded;
use super::right::Right;
use super::*;
use crate::audit::Notes;
use crate::freshness::Fresh;
use crate::testing::{Manager, until};

/// What the layer answers: `None` where the service was reached, else the gRPC status.
async fn ask(layer: &AuthzLayer, peer: Peer, path: &str) -> Option<tonic::Code> {
    let reached = service_fn(|request: Request<Body>| async move {
        assert!(
            request.extensions().get::<Principal>().is_some(),
            "a service always gets a principal"
        );
        Ok::<_, Infallible>(Response::new(Body::empty()))
    });
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = path.parse().expect("a path");
    request.extensions_mut().insert(ConnectInfo {
        peer,
        address: None,
        opened_ms: 0,
    });
    let mut service = layer.layer(reached);
    let answer = service
        .ready()
        .await
        .expect("ready")
        .call(request)
        .await
        .expect("answers");
    tonic::Status::from_header_map(answer.headers()).map(|status| status.code())
}

fn peer(identity: &bulkhead_identity::Identity) -> Peer {
    Peer::Node(Arc::new(identity.current().certificate.clone()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_takes_its_callers_and_nobody_else() {
    let manager = Manager::start().await;
    let worker = manager.admitted(Role::Worker, "worker-1").await;
    let layer = |fresh| {
        let (listing, peers, clock) = (
            manager.listing.clone(),
            manager.peers.clone(),
            manager.clock.clone(),
        );
        AuthzLayer::new(
            manager.cluster,
            listing,
            fresh,
            peers,
            clock,
            Notes::default(),
            manager.stop.clone(),
        )
    };
    let fresh = layer(manager.fresh.clone());
    let stale = layer(Fresh::new(manager.replica.clone(), manager.clock.clone()));
    let callers = [
        (Caller::Anonymous, Peer::Anonymous),
        (Caller::Worker, peer(&worker)),
        (Caller::Manager, peer(&manager.own)),
        (Caller::Operator, peer(&manager.operator)),
        (Caller::Local, Peer::Local { uid: 0 }),
    ];
    for &method in Method::ALL {
        for (caller, peer) in &callers {
            let may = method.callers().contains(*caller);
            let expected = (!may).then_some(tonic::Code::PermissionDenied);
            let got = ask(&fresh, peer.clone(), method.path()).await;
            assert_eq!(got, expected, "{caller} {}", method.path());
            let expected = match method.standing() {
                bulkhead_proto::Standing::Listed if may => Some(tonic::Code::Unavailable),
                _ => expected,
            };
            let got = ask(&stale, peer.clone(), method.path()).await;
            assert_eq!(got, expected, "stale: {caller} {}", method.path());
        }
    }
    let strange = ask(&fresh, peer(&manager.operator), "/bulkhead.v1.Control/Nothing").await;
    assert_eq!(strange, Some(tonic::Code::Unimplemented));

    // The same certificate, once its key is removed.
    manager.remove(worker.subject().node).await;
    for &method in Method::ALL {
        let open = method.standing() == bulkhead_proto::Standing::None;
        if method.callers().contains(Caller::Worker) && !open {
            let got = ask(&fresh, peer(&worker), method.path()).await;
            assert_eq!(
                got,
                Some(tonic::Code::PermissionDenied),
                "removed: {}",
                method.path()
            );
        }
    }
}

#[test]
fn a_replica_that_cannot_decide_says_so_with_the_code_that_callers_try_again() {
    let status = super::stale();
    let code = status.metadata().get(bulkhead_proto::CODE_KEY).expect("a code");
    assert_eq!(code, bulkhead_proto::Code::NoQuorum.as_str());
    assert_eq!(status.code(), tonic::Code::Unavailable);
}

/// A stream that never says anything.
struct Silent;

impl http_body::Body for Silent {
    type Data = bytes::Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<bytes::Bytes>, tonic::Status>>> {
        std::task::Poll::Pending
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_open_stream_ends_with_the_manager() {
    let manager = Manager::start().await;
    let (listing, fresh) = (manager.listing.clone(), manager.fresh.clone());
    let (peers, clock) = (manager.peers.clone(), manager.clock.clone());
    let stop = CancellationToken::new();
    let layer = AuthzLayer::new(
        manager.cluster,
        listing,
        fresh,
        peers,
        clock,
        Notes::default(),
        stop.clone(),
    );
    let service = layer.layer(service_fn(|_: Request<Body>| async {
        Ok::<_, Infallible>(Response::new(Body::new(Silent)))
    }));
    let mut open = Vec::new();
    let health = "/grpc.health.v1.Health/Watch";
    for path in Method::ALL.iter().map(|method| method.path()).chain([health]) {
        let mut request = Request::builder()
            .uri(path)
            .body(Body::empty())
            .expect("a request");
        let peer = peer(&manager.own);
        request.extensions_mut().insert(ConnectInfo {
            peer,
            address: None,
            opened_ms: 0,
        });
        let answer = service.clone().oneshot(request).await.expect("answers");
        // What a manager may not call is refused in the headers.
        if tonic::Status::from_header_map(answer.headers()).is_none() {
            open.push((path, answer.into_body()));
        }
    }
    assert!(open.iter().any(|(path, _)| *path == Method::RaftAppend.path()));
    stop.cancel();
    for (path, body) in open {
        assert_eq!(last_status(body).await.code(), tonic::Code::Unavailable, "{path}");
    }
}

/// A clock by which nothing was heard for an hour.
#[derive(Debug)]
struct Later;

impl Clock for Later {
    fn wall_millis(&self) -> u64 {
        0
    }

    fn monotonic(&self) -> Duration {
        Duration::from_secs(3_600)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_done_is_answered_though_the_manager_ends_and_what_is_not_known_is_said_so() {
    let done = || {
        let mut trailers = http::HeaderMap::new();
        tonic::Status::ok("").add_header(&mut trailers).expect("a status");
        Body::new(Ready(Some(trailers)))
    };
    let manager = Manager::start().await;
    let right = |fresh: &Fresh| Right {
        fresh: fresh.clone(),
        listing: manager.listing.clone(),
        clock: manager.clock.clone(),
        caller: Caller::Operator,
        key: None,
        opened_ms: 0,
        certificate: None,
        current: true,
    };
    let (ended, lost) = (
        CancellationToken::new(),
        Fresh::new(manager.replica.clone(), Arc::new(Later)),
    );
    ended.cancel();
    let answered = Guarded::new(done(), Some(right(&manager.fresh)), ended.clone());
    assert_eq!(last_status(Body::new(answered)).await.code(), tonic::Code::Ok);
    let lost = Guarded::new(done(), Some(right(&lost)), CancellationToken::new());
    let lost = last_status(Body::new(lost)).await;
    assert_eq!(
        code(&lost),
        Code::OutcomeUnknown.as_str(),
        "never 'nothing was done'"
    );
    // Its key was removed, or got a successor, while it was served.
    let gone = || Right {
        key: Some((
            manager.operator.subject(),
            manager.own.current().certificate.key_id(),
        )),
        ..right(&manager.fresh)
    };
    let withheld = Guarded::new(done(), Some(gone()), CancellationToken::new());
    let withheld = last_status(Body::new(withheld)).await;
    assert_eq!(code(&withheld), Code::OutcomeUnknown.as_str());
    assert!(withheld.message().contains("removed"), "{withheld}");
    // Of a stream that only waited nothing was withheld.
    let closed = Guarded::new(Body::new(Silent), Some(gone()), CancellationToken::new());
    let closed = last_status(Body::new(closed)).await;
    assert_eq!(code(&closed), Code::UnknownCaller.as_str());
    let waits = last_status(Body::new(Guarded::new(Body::new(Silent), None, ended))).await;
    assert_eq!(waits.code(), tonic::Code::Unavailable);
}

/// An answer that is ready: its trailers, and the end.
struct Ready(Option<http::HeaderMap>);

impl http_body::Body for Ready {
    type Data = bytes::Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<bytes::Bytes>, tonic::Status>>> {
        std::task::Poll::Ready(
            self.0
                .take()
                .map(|trailers| Ok(http_body::Frame::trailers(trailers))),
        )
    }
}

async fn last_status(mut body: Body) -> tonic::Status {
    let next = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await;
    let trailers = next.expect("a frame").expect("in order").into_trailers();
    tonic::Status::from_header_map(&trailers.expect("trailers")).expect("a status")
}

/// The worker's record with its key superseded at that time, and a newer one in use.
async fn supersede(manager: &Manager, worker: &bulkhead_identity::Identity, at: i64) {
    let state = manager.replica.state();
    let mut record = crate::view::node(&state, worker.subject().node)
        .expect("listed")
        .clone();
    record.keys.push(NodeKey {
        key_id: vec![at.to_le_bytes()[0]; 32],
        ..record.keys[0].clone()
    });
    record.superseded.push(SupersededKey {
        key_id: worker.current().certificate.key_id().to_wire(),
        at,
        until: i64::MAX,
    });
    let replace = Step::Replace(crate::view::object(Any::Node(record)));
    manager
        .commit(vec![Change {
            change: Some(replace),
        }])
        .await;
}

fn code(status: &tonic::Status) -> &str {
    status
        .metadata()
        .get(bulkhead_proto::CODE_KEY)
        .map_or("", |it| it.to_str().expect("text"))
}

fn now(manager: &Manager) -> i64 {
    i64::try_from(manager.clock.wall_millis()).expect("this age")
}

/// Records of this action in the audit log.
fn told(manager: &Manager, action: AuditAction) -> usize {
    let state = manager.replica.state();
    state.audit().records().filter(|it| it.action() == action).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_connects_with_a_superseded_key_is_refused_and_told_of_once() {
    let manager = Manager::start().await;
    let worker = manager.admitted(Role::Worker, "worker-1").await;
    let grace = i64::try_from(limits::SUPERSEDED_GRACE.as_millis()).expect("short");
    let mut before = DispatcherClient::new(manager.channel(&worker));
    let asked = || FetchBlobRequest {
        digest: vec![0; 32],
        ..Default::default()
    };
    let refused = before.fetch_blob(asked()).await.expect_err("no task needs it");
    assert_eq!(code(&refused), Code::Denied.as_str());
    // The connection is a little younger than the successor's first use: it was being opened then.
    supersede(&manager, &worker, now(&manager) - grace / 2).await;
    let refused = before.fetch_blob(asked()).await.expect_err("no task needs it");
    assert_eq!(code(&refused), Code::Denied.as_str(), "it goes on");
    let renewed = before.renew(RenewRequest {
        csr: crate::testing::key().0.csr().expect("signed"),
        request_id: vec![7; 16],
        ..Default::default()
    });
    let refused = renewed.await.expect_err("not by this key");
    assert_eq!(code(&refused), Code::SupersededKey.as_str());
    assert_eq!(
        told(&manager, AuditAction::Clone),
        0,
        "nobody is called a clone for that"
    );

    let clone = manager.admitted(Role::Worker, "worker-2").await;
    supersede(&manager, &clone, now(&manager) - 2 * grace).await;
    for n in 0..20 {
        let mut client = DispatcherClient::new(manager.channel(&clone));
        let refused = client.fetch_blob(asked()).await.expect_err("a clone");
        // As soon as its node is in quarantine the key is dead like all others of it.
        let dead = n > 0 && code(&refused) == Code::UnknownCaller.as_str();
        assert!(
            dead || code(&refused) == Code::SupersededKey.as_str(),
            "{refused:?}"
        );
    }
    until(|| told(&manager, AuditAction::Clone) > 0).await;
    let come_back = || async {
        let current = clone.current();
        come_back(&current, &manager.address, Expect::AnyManager, &SystemEntropy).await
    };
    let refused = come_back().await.expect_err("nor this way");
    let ComebackError::Refused(status) = refused else {
        panic!("{refused}")
    };
    assert_eq!(code(&status), Code::SupersededKey.as_str());
    let state = manager.replica.state();
    let record = crate::view::node(&state, clone.subject().node).expect("it stays");
    assert!(record.quarantined_at != 0 && record.keys.is_empty());
    assert_eq!(
        record.clone_seen.as_ref().map(|it| it.address.as_str()),
        Some("127.0.0.1")
    );
    assert_eq!(told(&manager, AuditAction::Clone), 1);
    assert_eq!(
        told(&manager, AuditAction::Quarantine),
        0,
        "the one record says so"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_comes_back_by_a_superseded_key_raises_the_alarm_and_a_mere_name_does_not() {
    let manager = Manager::start().await;
    let worker = manager.admitted(Role::Worker, "worker-1").await;
    let grace = i64::try_from(limits::SUPERSEDED_GRACE.as_millis()).expect("short");
    supersede(&manager, &worker, now(&manager) - 2 * grace).await;
    let mut anonymous = EnrolmentClient::new(manager.anonymous());
    let root = anonymous
        .get_root(GetRootRequest {})
        .await
        .expect("anybody may")
        .into_inner();
    let current = worker.current();
    // Who only saw the certificate cannot sign: the node is not to be cut off by that.
    let named = ReturnRequest {
        node_id: worker.subject().node.to_wire(),
        key_id: current.certificate.key_id().to_wire(),
        certificate: current.certificate.der().to_vec(),
        csr: crate::testing::key().0.csr().expect("signed"),
        challenge: root.challenge,
        signature: vec![0; 64],
        request_id: vec![7; 16],
        ..Default::default()
    };
    let refused = anonymous.r#return(named).await.expect_err("not signed");
    assert_eq!(code(&refused), Code::UnknownCaller.as_str());
    let refused = come_back(&current, &manager.address, Expect::AnyManager, &SystemEntropy).await;
    assert!(
        matches!(refused, Err(ComebackError::Refused(ref status)) if code(status) == Code::SupersededKey.as_str())
    );
    until(|| told(&manager, AuditAction::Clone) > 0).await;
    // The refusal for the false signature came before, and would have been told of first.
    assert_eq!(told(&manager, AuditAction::Clone), 1);
    let state = manager.replica.state();
    let record = crate::view::node(&state, worker.subject().node).expect("it stays");
    assert!(record.quarantined_at != 0);
}
