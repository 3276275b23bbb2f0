use bulkhead_identity::join::{Attempts, Enrolment, enrol};
use bulkhead_identity::seam::SystemEntropy;
use bulkhead_identity::ticket::{Ticket, TicketSecret};
use bulkhead_proto::wire::peer_client::PeerClient;
use bulkhead_proto::wire::{NodeDescription, Role as WireRole};
use bulkhead_proto::{CODE_KEY, MemberId, Role};
use tokio::sync::mpsc;

use super::*;
use crate::key_ring::{EnvelopeKey, KeyRingError};
use crate::testing::Manager;

fn transaction(change: impl FnOnce(&mut Transaction)) -> Vec<u8> {
    let mut transaction = Transaction {
        level: 1,
        request_id: vec![1; 16],
        actor: "operator/x".into(),
        ..Default::default()
    };
    change(&mut transaction);
    transaction.encode_to_vec()
}

#[test]
fn only_what_a_client_asked_for_is_forwarded() {
    assert_eq!(check_forwarded(&transaction(|it| it.at = 7)), Ok(7));
    let refused = [
        transaction(|it| it.term = 3),
        transaction(|it| it.level = 0),
        transaction(|it| it.level = 99),
        transaction(|it| it.actor.clear()),
        transaction(|it| it.request_id.clear()),
        transaction(|it| it.actor = "x".repeat(limits::TRANSACTION_BYTES)),
        vec![0xff; 10],
    ];
    for bytes in refused {
        assert!(check_forwarded(&bytes).is_err());
    }
}

/// A manager that joins as the program does, over TLS, by a ticket.
async fn joined(manager: &Manager, role: WireRole) -> bulkhead_identity::join::Enrolled {
    let secret = manager.ticket(role, 1).await;
    let secret = TicketSecret::from_wire(&secret).expect("its length");
    let root = &manager.bundle.ders()[0];
    let request = Enrolment {
        ticket: Ticket::new(root, secret),
        addresses: vec![manager.address.clone()],
        role: Role::Manager,
        description: NodeDescription {
            level: 1,
            ..Default::default()
        },
        listen: String::new(),
        advertise: "127.0.0.1:7443".into(),
        name: "manager-2".into(),
    };
    let (steps, mut read) = mpsc::channel(64);
    let drain = async { while read.recv().await.is_some() {} };
    let attempts = Attempts::default();
    let (enrolled, ()) = tokio::join!(enrol(request, &attempts, &*manager.clock, steps), drain);
    enrolled.expect("admitted")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joining_manager_gets_the_key_ring_for_its_own_key_and_no_other() {
    let manager = Manager::start().await;
    let enrolled = Box::pin(joined(&manager, WireRole::Manager)).await;
    assert!(enrolled.member.is_some_and(|it| it > MemberId(1)));
    let identity = bulkhead_identity::Identity::new(enrolled.credentials).expect("its own");
    let node = identity.subject().node;
    let envelope = EnvelopeKey::generate(&SystemEntropy).expect("random");
    let public = envelope.public().to_vec();
    let ring = KeyRing::new(node, envelope, Arc::new(SystemEntropy));
    let cluster = |manager: &Manager| view::cluster(&manager.replica.state()).expect("begun").clone();
    assert_eq!(ring.newest(&cluster(&manager)), Err(KeyRingError::NoEnvelope(1)));

    let mut client = PeerClient::new(manager.channel(&identity));
    let register = |public_key: &[u8], n: u8| RegisterEnvelopeKeyRequest {
        public_key: public_key.to_vec(),
        request_id: vec![n; 16],
    };
    for n in [1, 1, 2] {
        let answer = client.register_envelope_key(register(&public, n)).await;
        assert!(answer.expect("its own key").into_inner().index > 0);
    }
    let opened = cluster(&manager);
    assert_eq!(ring.newest(&opened), Ok(1));
    let sealed = opened.root_key.as_ref().expect("sealed");
    let place = Key::new(Kind::Cluster, opened.id.as_slice().try_into().expect("an id"));
    assert!(ring.open(&opened, place, sealed).is_ok());

    let other = client
        .register_envelope_key(register(&[9; 32], 3))
        .await
        .expect_err("another key");
    let code = other.metadata().get(CODE_KEY).and_then(|it| it.to_str().ok());
    assert_eq!(
        (other.code(), code),
        (tonic::Code::PermissionDenied, Some(Code::Denied.as_str()))
    );

    // On its way out it gets nothing any more, whatever it was about when it was told to go.
    let record = view::node(&manager.replica.state(), node)
        .expect("admitted")
        .clone();
    let leaving = Node {
        availability: Availability::Drain.into(),
        envelope_key: Vec::new(),
        ..record
    };
    let change = Change {
        change: Some(Step::Replace(view::object(Any::Node(leaving)))),
    };
    let id = bulkhead_proto::RequestId::from_bytes([4; 16]);
    let done = manager.proposer.client("test", id, Vec::new(), vec![change]);
    assert_eq!(done.await.expect("it leads").rejection, None);
    let refused = client.register_envelope_key(register(&public, 5)).await;
    assert_eq!(
        refused.expect_err("it leaves").code(),
        tonic::Code::PermissionDenied
    );

    // A plan of its own controllers is no client's transaction.
    let forged = ForwardRequest {
        transaction: transaction(|it| it.term = 1).into(),
    };
    let refused = client.forward(forged).await.expect_err("a controller's");
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    let now = i64::try_from(manager.clock.wall_millis()).expect("this age");
    let forwarded = ForwardRequest {
        transaction: transaction(|it| it.at = now).into(),
    };
    let outcome = client
        .forward(forwarded)
        .await
        .expect("taken")
        .into_inner()
        .outcome;
    assert_eq!(outcome.expect("this one leads").rejection, None);
    assert!(
        client
            .read_index(ReadIndexRequest { now })
            .await
            .expect("it leads")
            .into_inner()
            .index
            > 1
    );
}

/// Two managers agree that this one's clock is a minute behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_clock_is_off_the_others_judges_no_expiry() {
    let manager = Manager::start().await;
    let others = [
        manager.admitted(Role::Manager, "manager-2").await,
        manager.admitted(Role::Manager, "manager-3").await,
    ];
    let now = || i64::try_from(manager.clock.wall_millis()).expect("this age");
    let ask = async |ahead_ms: i64| {
        let mut answers = Vec::new();
        for other in &others {
            let mut client = PeerClient::new(manager.channel(other));
            let question = ReadIndexRequest {
                now: now() + ahead_ms,
            };
            // It answers on: nobody else could lead here. But until both were heard it does not know whose clock is right.
            let answer = client.read_index(question).await;
            answers.extend(answer.ok().map(tonic::Response::into_inner));
        }
        answers
    };
    ask(0).await;
    assert!(!manager.fresh.clock_is_off());
    // What was heard counts for two seconds, and a slow machine may take longer between two lines: so it is asked again.
    let mut told = None;
    let mut client = PeerClient::new(manager.channel(&others[0]));
    let forwarded = |at: i64| ForwardRequest {
        transaction: transaction(|it| it.at = at).into(),
    };
    let refused = loop {
        let answers = ask(60_000).await;
        if !manager.fresh.clock_is_off() {
            continue;
        }
        told = answers.last().map(|it| it.ahead_ms).or(told);
        // A transaction of this manager's time is as wrong, wherever it comes from.
        if let Err(refused) = client.forward(forwarded(now())).await {
            break refused;
        }
    };
    let told = told.expect("it was off before that");
    assert!(!is_off(told), "the asker is right, and hears {told}");
    let code = refused.metadata().get(CODE_KEY).and_then(|it| it.to_str().ok());
    assert_eq!(code, Some(Code::ClockSkew.as_str()));
    // Taken while at least one of them was heard lately; else nobody can say.
    let no_quorum = |refused: &tonic::Status| {
        let code = refused.metadata().get(CODE_KEY).and_then(|it| it.to_str().ok());
        code == Some(Code::NoQuorum.as_str())
    };
    loop {
        ask(60_000).await;
        match client.forward(forwarded(now() + 60_000)).await {
            Err(refused) if no_quorum(&refused) => {}
            right => {
                right.expect("the median's time");
                break;
            }
        }
    }
    ask(0).await;
    assert!(!manager.fresh.clock_is_off(), "it was set right");
}
