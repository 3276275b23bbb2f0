//! The layer itself, for every method and every caller.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_identity::{ConnectInfo, Peer};
use bulkhead_proto::{Caller, Method, Role};
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
use crate::testing::Manager;

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
    request
        .extensions_mut()
        .insert(ConnectInfo { peer, address: None });
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
        request
            .extensions_mut()
            .insert(ConnectInfo { peer, address: None });
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
    let code = lost.metadata().get(bulkhead_proto::CODE_KEY).expect("a code");
    assert_eq!(code, Code::OutcomeUnknown.as_str(), "never 'nothing was done'");
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
