//! The layer itself, for every method and every caller.

use std::convert::Infallible;
use std::sync::Arc;

use bulkhead_identity::{ConnectInfo, Peer};
use bulkhead_proto::{Caller, Method, Role};
use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer as _, Service as _, ServiceExt as _, service_fn};

use super::*;
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
        AuthzLayer::new(manager.cluster, listing, fresh, peers, clock)
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
