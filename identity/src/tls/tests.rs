use std::sync::{Arc, Mutex};

use bulkhead_proto::wire::enrolment_client::EnrolmentClient;
use bulkhead_proto::wire::enrolment_server::{Enrolment, EnrolmentServer};
use bulkhead_proto::wire::{EnrolRequest, EnrolResponse, GetRootRequest, GetRootResponse};
use bulkhead_proto::{NodeId, Role};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use super::*;
use crate::testing::{CLUSTER, HOUR_MS, authority, bundle, credentials, issue, subject};
use crate::ticket::{Ticket, TicketSecret};
use crate::{Authority, Certificate, ConnectInfo, Credentials, DialError, Identity, Key, Peer};

/// Answers GetRoot and writes down who asked, and every secret that it hears.
#[derive(Clone, Default)]
struct Recorder {
    roots: Vec<Vec<u8>>,
    peers: Arc<Mutex<Vec<Peer>>>,
    secrets: Arc<Mutex<Vec<Vec<u8>>>>,
}

#[tonic::async_trait]
impl Enrolment for Recorder {
    async fn get_root(&self, request: Request<GetRootRequest>) -> Result<Response<GetRootResponse>, Status> {
        let info = request
            .extensions()
            .get::<ConnectInfo>()
            .expect("every connection says who it is");
        assert!(info.address.is_some());
        self.peers.lock().expect("peers").push(info.peer.clone());
        Ok(Response::new(GetRootResponse {
            roots: self.roots.clone(),
            cluster_id: vec![],
            now: 12_345,
            challenge: vec![],
            ..Default::default()
        }))
    }

    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
        self.secrets
            .lock()
            .expect("secrets")
            .push(request.into_inner().ticket_secret);
        Err(Status::unimplemented(""))
    }

    async fn r#return(
        &self,
        _: Request<bulkhead_proto::wire::ReturnRequest>,
    ) -> Result<Response<EnrolResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

struct Serving {
    address: String,
    recorder: Recorder,
    identity: Identity,
    _server: AbortOnDropHandle<()>,
}

async fn serve(authority: &Authority, credentials: Credentials) -> Serving {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let recorder = Recorder {
        roots: vec![authority.root_der().to_vec()],
        ..Recorder::default()
    };
    let identity = Identity::new(credentials).expect("credentials");
    let (stream, service) = (
        incoming(
            listener,
            identity.clone(),
            Arc::new(crate::seam::SystemClock::start()),
        ),
        EnrolmentServer::new(recorder.clone()),
    );
    let server = tokio::spawn(async move {
        let served = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(stream)
            .await;
        served.expect("a server");
    });
    Serving {
        address,
        recorder,
        identity,
        _server: AbortOnDropHandle::new(server),
    }
}

async fn ask(channel: tonic::transport::Channel) -> Result<GetRootResponse, Status> {
    EnrolmentClient::new(channel)
        .get_root(GetRootRequest {})
        .await
        .map(Response::into_inner)
}

fn manager(node: u8) -> Expect {
    Expect::Manager(NodeId::from_bytes([node; 16]))
}

#[tokio::test]
async fn each_role_is_seen_as_what_its_certificate_says() {
    let authority = authority();
    let server = serve(&authority, credentials(&authority, Role::Manager, 1)).await;
    for role in Role::ALL {
        let client = Identity::new(credentials(&authority, role, 2)).expect("credentials");
        for expect in [Expect::AnyManager, manager(1)] {
            ask(channel(&client, &server.address, expect).expect("an address"))
                .await
                .expect("an answer");
            let peer = server.recorder.peers.lock().expect("peers").pop();
            let Some(Peer::Node(certificate)) = peer else {
                panic!("{peer:?}")
            };
            assert_eq!(certificate.subject(), subject(role, 2));
            assert_eq!(certificate.key_id(), client.current().key.key_id());
        }
    }
}

#[tokio::test]
async fn without_a_certificate_one_is_anonymous() {
    let authority = authority();
    let server = serve(&authority, credentials(&authority, Role::Manager, 1)).await;
    ask(bundle_channel(&bundle(&authority), &server.address, Expect::AnyManager).expect("an address"))
        .await
        .expect("an answer");
    let peer = server.recorder.peers.lock().expect("peers").pop();
    assert!(matches!(peer, Some(Peer::Anonymous)), "{peer:?}");
}

#[tokio::test]
async fn a_caller_refuses_whoever_is_not_the_manager_it_called() {
    let (ours, foreign) = (authority(), authority());
    let client = Identity::new(credentials(&ours, Role::Worker, 2)).expect("credentials");
    let expired = |authority: &Authority| {
        let key = Key::generate().expect("a key");
        let der = issue(authority, &key, subject(Role::Manager, 1), -HOUR_MS, -60_000);
        Credentials {
            key,
            certificate: Certificate::from_der(&der).expect("ours"),
            chain: Vec::new(),
            bundle: bundle(authority),
        }
    };
    let future = |authority: &Authority| {
        let key = Key::generate().expect("a key");
        let der = issue(authority, &key, subject(Role::Manager, 1), 60_000, HOUR_MS);
        Credentials {
            key,
            certificate: Certificate::from_der(&der).expect("ours"),
            chain: Vec::new(),
            bundle: bundle(authority),
        }
    };
    for (why, authority, credentials, expect) in [
        (
            "another manager",
            &ours,
            credentials(&ours, Role::Manager, 3),
            manager(1),
        ),
        (
            "a worker that serves",
            &ours,
            credentials(&ours, Role::Worker, 1),
            Expect::AnyManager,
        ),
        (
            "an operator that serves",
            &ours,
            credentials(&ours, Role::Operator, 1),
            manager(1),
        ),
        (
            "another root of the same name",
            &foreign,
            credentials(&foreign, Role::Manager, 1),
            manager(1),
        ),
        (
            "an expired certificate",
            &ours,
            expired(&ours),
            Expect::AnyManager,
        ),
        ("a certificate not yet valid", &ours, future(&ours), manager(1)),
    ] {
        let server = serve(authority, credentials).await;
        let refused = ask(channel(&client, &server.address, expect).expect("an address")).await;
        assert_eq!(refused.expect_err(why).code(), tonic::Code::Unavailable, "{why}");
        assert!(server.recorder.peers.lock().expect("peers").is_empty(), "{why}");
    }
}

#[tokio::test]
async fn a_listener_refuses_certificates_that_prove_nothing() {
    let (ours, foreign) = (authority(), authority());
    let server = serve(&ours, credentials(&ours, Role::Manager, 1)).await;
    let forged = |authority: &Authority, from_ms, to_ms| {
        let key = Key::generate().expect("a key");
        let der = issue(authority, &key, subject(Role::Worker, 2), from_ms, to_ms);
        let certificate = Certificate::from_der(&der).expect("ours");
        Identity::new(Credentials {
            key,
            certificate,
            chain: Vec::new(),
            bundle: bundle(&ours),
        })
        .expect("credentials")
    };
    for (why, client) in [
        (
            "another root of the same name",
            forged(&foreign, -60_000, HOUR_MS),
        ),
        ("expired", forged(&ours, -HOUR_MS, -60_000)),
        ("not yet valid", forged(&ours, 60_000, HOUR_MS)),
    ] {
        let refused = ask(channel(&client, &server.address, manager(1)).expect("an address")).await;
        assert!(refused.is_err(), "{why}");
    }
    assert!(server.recorder.peers.lock().expect("peers").is_empty());
}

#[tokio::test]
async fn new_credentials_hold_for_new_connections_and_old_ones_go_on() {
    let authority = authority();
    let server = serve(&authority, credentials(&authority, Role::Manager, 1)).await;
    let client = Identity::new(credentials(&authority, Role::Worker, 2)).expect("credentials");
    let standing = channel(&client, &server.address, manager(1)).expect("an address");
    ask(standing.clone()).await.expect("an answer");
    let before = client.current().key.key_id();
    let mut changed = client.changed();

    server
        .identity
        .replace(credentials(&authority, Role::Manager, 1))
        .expect("the same subject");
    client
        .replace(credentials(&authority, Role::Worker, 2))
        .expect("the same subject");
    assert!(changed.has_changed().expect("alive"));
    changed.mark_unchanged();

    ask(standing).await.expect("an answer on the old connection");
    ask(channel(&client, &server.address, manager(1)).expect("an address"))
        .await
        .expect("an answer");
    let peers: Vec<_> = server.recorder.peers.lock().expect("peers").drain(..).collect();
    let keys: Vec<_> = peers
        .iter()
        .map(|peer| match peer {
            Peer::Node(certificate) => certificate.key_id(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(keys, [before, before, client.current().key.key_id()]);
    let other = client.replace(credentials(&authority, Role::Worker, 3));
    assert!(other.is_err(), "another node's credentials");
}

#[tokio::test]
async fn the_ticket_decides_which_root_is_believed() {
    let (ours, other) = (authority(), authority());
    let server = serve(&ours, credentials(&ours, Role::Manager, 1)).await;
    let ticket = |root: &Authority| Ticket::new(root.root_der(), TicketSecret::new(Zeroizing::new([9; 16])));
    let (found, cluster, now) = fetch_roots(&server.address, &ticket(&ours))
        .await
        .expect("the root");
    assert_eq!(
        (found.ders(), cluster, now),
        (vec![ours.root_der().to_vec()], CLUSTER, 12_345)
    );

    let refused = fetch_roots(&server.address, &ticket(&other))
        .await
        .expect_err("another root");
    assert!(matches!(refused, DialError::WrongRoot { .. }), "{refused}");
    assert!(server.recorder.secrets.lock().expect("secrets").is_empty());
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let authority = authority();
    let server = serve(&authority, credentials(&authority, Role::Manager, 1)).await;
    // A ClientHello (RFC 5246 §7.4.1.2) with ECDHE-ECDSA-AES128-GCM, P-256 and ECDSA-SHA256, and without the extension
    // that offers TLS 1.3.
    let extensions = [[0, 10, 0, 4, 0, 2, 0, 23], [0, 13, 0, 4, 0, 2, 4, 3]].concat();
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0, 0, 16]);
    hello.extend(extensions);
    let length = u8::try_from(hello.len()).expect("short");
    let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    let mut stream = tokio::net::TcpStream::connect(&server.address)
        .await
        .expect("a connection");
    stream.write_all(&record).await.expect("sent");
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .await
        .expect("an alert, and the end");
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 70], "fatal alert: protocol_version");
}

#[tokio::test]
async fn those_who_stall_do_not_keep_others_out() {
    let authority = authority();
    let server = serve(&authority, credentials(&authority, Role::Manager, 1)).await;
    let mut stalled = Vec::new();
    for _ in 0..bulkhead_proto::limits::HANDSHAKES + 20 {
        stalled.push(
            tokio::net::TcpStream::connect(&server.address)
                .await
                .expect("a connection"),
        );
    }
    let client = Identity::new(credentials(&authority, Role::Worker, 2)).expect("credentials");
    let asked = ask(channel(&client, &server.address, manager(1)).expect("an address"));
    let answer = tokio::time::timeout(bulkhead_proto::limits::HANDSHAKE / 2, asked).await;
    answer
        .expect("before any stalled handshake times out")
        .expect("an answer");
}

#[tokio::test]
async fn credentials_swap_while_others_shake_hands() {
    let authority = authority();
    let server = serve(&authority, credentials(&authority, Role::Manager, 1)).await;
    let client = Identity::new(credentials(&authority, Role::Worker, 2)).expect("credentials");
    let calls: Vec<_> = (0..40)
        .map(|_| {
            let channel = channel(&client, &server.address, manager(1)).expect("an address");
            tokio::spawn(ask(channel))
        })
        .collect();
    for _ in 0..10 {
        server
            .identity
            .replace(credentials(&authority, Role::Manager, 1))
            .expect("the same subject");
        client
            .replace(credentials(&authority, Role::Worker, 2))
            .expect("the same subject");
        tokio::task::yield_now().await;
    }
    for call in calls {
        call.await.expect("no panic").expect("an answer");
    }
}

/// Where a node stands in a rotation of the root.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stand {
    Away,
    TrustsBoth,
    Renewed,
    After,
}

#[tokio::test]
async fn in_a_rotation_everyone_meets_everyone_but_an_old_certificate_after_its_end() {
    use Stand::{After, Away, Renewed, TrustsBoth};
    let (old, new) = (authority(), authority());
    let next = crate::bundle::Root::from_der(new.root_der()).expect("a root");
    let cross = old
        .cross(&next, crate::testing::now_ms() - HOUR_MS)
        .expect("certified");
    let stands = |stand, role, node| {
        let roots: &[&Authority] = match stand {
            Away => &[&old],
            TrustsBoth | Renewed => &[&old, &new],
            After => &[&new],
        };
        let (issuer, chain) = match stand {
            Away | TrustsBoth => (&old, vec![]),
            Renewed | After => (&new, vec![cross.clone()]),
        };
        let roots = roots.iter().map(|root| root.root_der().to_vec()).collect();
        let credentials = Credentials {
            chain,
            bundle: crate::Bundle::from_ders(roots).expect("roots"),
            ..credentials(issuer, role, node)
        };
        let issued = credentials.bundle.issuer_of(&credentials.certificate);
        assert_eq!(issued.map(|root| root.der()), Some(issuer.root_der()));
        credentials
    };
    // Once the old root is gone, what leads from it is shown to those alone who may know nothing newer.
    for (stand, ordinary, enrol) in [(Away, 1, 1), (TrustsBoth, 1, 1), (Renewed, 2, 2), (After, 1, 2)] {
        let credentials = stands(stand, Role::Manager, 1);
        let shown = |protocol| presented(&credentials, protocol).cert.len();
        assert_eq!(
            (shown(ALPN_H2), shown(ALPN_ENROL)),
            (ordinary, enrol),
            "{stand:?}"
        );
    }
    for serving in [Away, TrustsBoth, Renewed, After] {
        let server = serve(&new, stands(serving, Role::Manager, 1)).await;
        for calling in [Away, TrustsBoth, Renewed, After] {
            let credentials = stands(calling, Role::Worker, 2);
            let anonymous =
                bundle_channel(&credentials.bundle, &server.address, Expect::AnyManager).expect("an address");
            let client = Identity::new(credentials).expect("credentials");
            let met = ask(channel(&client, &server.address, manager(1)).expect("an address")).await;
            let ordinarily =
                ask(channel(&client, &server.address, Expect::AnyManager).expect("an address")).await;
            assert_eq!(
                met.is_ok(),
                ordinarily.is_ok(),
                "{calling:?} calls any, {serving:?}"
            );
            let is_old = |stand| matches!(stand, Away | TrustsBoth);
            let (refuses, refused) = (
                calling == After && is_old(serving),
                serving == After && is_old(calling),
            );
            assert_eq!(met.is_ok(), !refuses && !refused, "{calling:?} calls {serving:?}");
            // Who was away can always ask to be taken back.
            assert_eq!(
                ask(anonymous).await.is_ok(),
                !refuses,
                "{calling:?} asks {serving:?}"
            );
        }
    }
    // Managers meet a while longer: one that was away must count for the quorum before it can be taken back.
    let remembers = |role, node| {
        let credentials = stands(After, role, node);
        let bundle = credentials.bundle.clone().with_former(Some(old.root_der()));
        Credentials {
            bundle: bundle.expect("a root of the cluster"),
            ..credentials
        }
    };
    let server = serve(&new, remembers(Role::Manager, 1)).await;
    for role in Role::ALL {
        let away = Identity::new(stands(Away, role, 2)).expect("credentials");
        let met = ask(channel(&away, &server.address, manager(1)).expect("an address")).await;
        assert_eq!(met.is_ok(), role == Role::Manager, "{role}");
    }
    let server = serve(&new, stands(Away, Role::Manager, 1)).await;
    for (expect, meets) in [(manager(1), true), (Expect::AnyManager, false)] {
        let back = Identity::new(remembers(Role::Manager, 2)).expect("credentials");
        let met = ask(channel(&back, &server.address, expect).expect("an address")).await;
        assert_eq!(met.is_ok(), meets, "{expect:?}");
    }
    // Nothing but the cross-certificate leads there.
    let bare = Credentials {
        chain: vec![],
        ..stands(Renewed, Role::Manager, 1)
    };
    let server = serve(&new, bare).await;
    let away = Identity::new(stands(Away, Role::Worker, 2)).expect("credentials");
    assert!(
        ask(channel(&away, &server.address, manager(1)).expect("an address"))
            .await
            .is_err()
    );
    let foreign = Authority::generate(
        bulkhead_proto::ClusterId::from_bytes([8; 16]),
        crate::testing::now_ms(),
    )
    .expect("a root");
    assert!(
        foreign.cross(&next, crate::testing::now_ms()).is_err(),
        "another cluster's root"
    );
}

/// Managers that were all off for long must meet to elect a leader, before anyone can renew.
#[tokio::test]
async fn managers_whose_certificates_ended_lately_meet_each_other_and_nobody_else_meets_them() {
    const DAY_MS: i64 = 24 * HOUR_MS;
    let authority = authority();
    let ended = |role, node, days: i64| {
        let key = Key::generate().expect("a key");
        let der = issue(
            &authority,
            &key,
            subject(role, node),
            -100 * DAY_MS,
            -days * DAY_MS - 60_000,
        );
        Credentials {
            key,
            certificate: Certificate::from_der(&der).expect("ours"),
            chain: Vec::new(),
            bundle: bundle(&authority),
        }
    };
    let meets = async |serving: Credentials, calling: Credentials, expect| {
        let server = serve(&authority, serving).await;
        let client = Identity::new(calling).expect("credentials");
        ask(channel(&client, &server.address, expect).expect("an address"))
            .await
            .is_ok()
    };
    let fresh = |role, node| credentials(&authority, role, node);
    for (days, meet) in [(0, true), (29, true), (30, false), (60, false)] {
        let (one, two) = (ended(Role::Manager, 1, days), ended(Role::Manager, 2, days));
        assert_eq!(meets(one, two, manager(1)).await, meet, "{days} days");
        let one = ended(Role::Manager, 1, days);
        assert_eq!(
            meets(one, fresh(Role::Manager, 2), manager(1)).await,
            meet,
            "{days} days"
        );
    }
    for role in [Role::Worker, Role::Operator] {
        assert!(!meets(ended(Role::Manager, 1, 0), fresh(role, 2), Expect::AnyManager).await);
        assert!(!meets(fresh(Role::Manager, 1), ended(role, 2, 0), Expect::AnyManager).await);
    }
}
