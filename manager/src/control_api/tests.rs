//! The service as operators call it: over mutual TLS, on a real replica.

use bulkhead_identity::ticket::Ticket as TicketText;
use bulkhead_proto::wire::control_client::ControlClient;
use bulkhead_proto::wire::{
    self, BlobHeader, CreateImageRequest, CreateSecretRequest, CreateServiceRequest, CreateTicketRequest,
    ListRequest, PushBlobRequest, RemoveRequest, SecretReference, ServiceSpec, WatchRequest, event,
    object::Object as Any, push_blob_request,
};
use bulkhead_proto::{Code, Digest};
use bulkhead_raft::state::Key;
use prost::Message as _;
use tonic::transport::Channel;

use super::testing::refused;
use super::*;
use crate::testing::{Manager, identity, key, until};

const CANARY: &[u8] = b"canary-7f3a91c2";

fn client(manager: &Manager) -> ControlClient<Channel> {
    ControlClient::new(manager.channel(&manager.operator))
}

fn all() -> ListRequest {
    ListRequest::default()
}

fn removal(selector: &str, request: u8) -> RemoveRequest {
    RemoveRequest {
        request_id: vec![request; 16],
        selector: selector.into(),
        force: false,
        ..Default::default()
    }
}

async fn push(client: &mut ControlClient<Channel>, content: &[u8]) -> Digest {
    let digest = Digest::of(content);
    let header = push_blob_request::Message::Header(BlobHeader {
        digest: digest.as_bytes().to_vec(),
        size: content.len() as u64,
    });
    let parts = [header, push_blob_request::Message::Data(content.to_vec())];
    let parts = parts.map(|message| PushBlobRequest {
        message: Some(message),
    });
    let pushed = client.push_blob(futures::stream::iter(parts)).await;
    pushed.expect("stored");
    digest
}

/// Pushes a small image and answers its request.
async fn image(client: &mut ControlClient<Channel>, name: &str) -> CreateImageRequest {
    let layer = push(client, b"a layer").await;
    let architecture = if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    };
    let config = serde_json::json!({
        "architecture": architecture, "os": "linux", "config": { "Entrypoint": ["/web"] },
        "rootfs": { "type": "layers", "diff_ids": [layer.to_string()] },
    });
    let config = config.to_string();
    let named = push(client, config.as_bytes()).await;
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": named.to_string(), "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": layer.to_string(), "size": b"a layer".len(),
        }],
    });
    let manifest = manifest.to_string();
    CreateImageRequest {
        request_id: vec![1; 16],
        image_id: vec![2; 16],
        name: name.into(),
        manifest_digest: push(client, manifest.as_bytes()).await.as_bytes().to_vec(),
        manifest_size: manifest.len() as u64,
    }
}

fn secret() -> CreateSecretRequest {
    CreateSecretRequest {
        request_id: vec![3; 16],
        secret_id: vec![4; 16],
        name: "db-password".into(),
        value: CANARY.to_vec(),
        labels: Vec::new(),
    }
}

fn holds_canary(bytes: &[u8]) -> bool {
    bytes.windows(CANARY.len()).any(|it| it == CANARY)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_of_an_image_and_a_secret_is_made_once_and_its_parts_stay() {
    let manager = Manager::start().await;
    let mut client = client(&manager);
    let asked = image(&mut client, "web:1").await;
    let made = client
        .create_image(asked.clone())
        .await
        .expect("whole")
        .into_inner();
    let again = client.create_image(asked).await.expect("a retry").into_inner();
    assert_eq!((&made.id, made.version), (&again.id, again.version));

    client.create_secret(secret()).await.expect("sealed");
    client.create_secret(secret()).await.expect("a retry");
    let twin = CreateSecretRequest {
        request_id: vec![9; 16],
        secret_id: vec![9; 16],
        ..secret()
    };
    let status = client.create_secret(twin).await.expect_err("the name is taken");
    refused(&status, Code::NameTaken, "has the name", "another name");

    let service = CreateServiceRequest {
        request_id: vec![5; 16],
        service_id: vec![6; 16],
        spec: Some(ServiceSpec {
            name: "shop".into(),
            replicas: 2,
            image_name: "web:1".into(),
            secrets: vec![SecretReference {
                name: "db-password".into(),
                ..Default::default()
            }],
            ..Default::default()
        }),
    };
    let made = client
        .create_service(service.clone())
        .await
        .expect("made")
        .into_inner();
    let again = client
        .create_service(service)
        .await
        .expect("a retry")
        .into_inner();
    assert_eq!((&made.id, made.version), (&again.id, again.version));
    let listed = client.list_services(all()).await.expect("listed").into_inner();
    assert_eq!((listed.services.len(), listed.services[0].desired), (1, 2));

    let status = client
        .remove_secret(removal("db-password", 7))
        .await
        .expect_err("in use");
    refused(&status, Code::InUse, "secret db-password", "");
    assert!(status.message().contains("service shop"), "{}", status.message());
    let status = client
        .remove_image(removal("web:1", 8))
        .await
        .expect_err("in use");
    refused(&status, Code::InUse, "service shop", "");
    client.remove_service(removal("shop", 9)).await.expect("marked");
    let listed = client.list_services(all()).await.expect("listed").into_inner();
    assert!(listed.services[0].service.as_ref().expect("a service").removing);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_is_sealed_in_the_state_and_in_no_answer() {
    let manager = Manager::start().await;
    let mut client = client(&manager);
    let mut watch = client
        .watch(WatchRequest::default())
        .await
        .expect("a stream")
        .into_inner();
    let begun = watch.message().await.expect("open").expect("the start");
    assert!(begun.events.is_empty());

    client.create_secret(secret()).await.expect("sealed");
    let seen = watch.message().await.expect("open").expect("the secret");
    assert!(matches!(
        &seen.events[..],
        [wire::Event { change: Some(event::Change::Put(wire::Object { object: Some(Any::Secret(it)) })), .. }]
            if it.name == "db-password" && it.value.is_none()
    ));
    let listed = client.list_secrets(all()).await.expect("listed").into_inner();
    assert_eq!(
        (listed.secrets.len(), listed.secrets[0].size),
        (1, u32::try_from(CANARY.len()).expect("small"))
    );
    assert_eq!(listed.secrets[0].value, None);
    for bytes in [
        listed.encode_to_vec(),
        seen.encode_to_vec(),
        format!("{seen:?}").into_bytes(),
    ] {
        assert!(!holds_canary(&bytes));
    }

    let state = manager.replica.state();
    let kept = get::<wire::Secret>(&state, &[4; 16]).expect("committed");
    assert!(!holds_canary(&kept.encode_to_vec()));
    let place = Key::new(Kind::Secret, [4; 16]);
    let sealed = kept.value.as_ref().expect("a value");
    let opened = manager
        .ring
        .open(view::cluster(&state).expect("begun"), place, sealed);
    assert_eq!(opened.expect("ours")[..], *CANARY);

    let too_large = CreateSecretRequest {
        request_id: vec![8; 16],
        secret_id: vec![8; 16],
        name: "large".into(),
        value: vec![0; limits::SECRET_BYTES + 1],
        labels: Vec::new(),
    };
    let status = client.create_secret(too_large).await.expect_err("over the limit");
    refused(&status, Code::OverLimit, "this one 512001", "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_s_text_works_also_from_a_retry_and_is_kept_nowhere() {
    let manager = Manager::start().await;
    let mut client = client(&manager);
    let request = CreateTicketRequest {
        request_id: vec![1; 16],
        ticket_id: vec![2; 16],
        role: wire::Role::Worker.into(),
        ..Default::default()
    };
    for _ in 0..3 {
        let made = client
            .create_ticket(request.clone())
            .await
            .expect("made")
            .into_inner();
        let text: TicketText = made.ticket.parse().expect("a ticket");
        let state = manager.replica.state();
        assert!(text.names_root(&view::cluster(&state).expect("begun").root_certificate));
        let kept = get::<wire::Ticket>(&state, &[2; 16]).expect("committed");
        assert!(
            text.secret().matches(&kept.secret_hash),
            "the newest answer's ticket works"
        );
        assert_eq!(made.managers.len(), 1);
    }
    let listed = client.list_tickets(all()).await.expect("listed").into_inner();
    assert_eq!(listed.tickets.len(), 1);
    assert!(listed.tickets[0].secret_hash.is_empty());
    let id = bulkhead_proto::TicketId::from_bytes([2; 16]).to_string();
    client.revoke_ticket(removal(&id, 3)).await.expect("revoked");
    assert!(
        client
            .list_tickets(all())
            .await
            .expect("listed")
            .into_inner()
            .tickets
            .is_empty()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_issued_operator_may_act_until_it_is_revoked() {
    let manager = Manager::start().await;
    let mut client = client(&manager);
    let (key, _) = key();
    let request = wire::IssueOperatorRequest {
        request_id: vec![1; 16],
        node_id: vec![2; 16],
        name: "second".into(),
        csr: key.csr().expect("signed"),
        validity_ms: 0,
    };
    let issued = client
        .issue_operator(request.clone())
        .await
        .expect("issued")
        .into_inner();
    let again = client
        .issue_operator(request)
        .await
        .expect("a retry")
        .into_inner();
    assert_eq!(
        issued.certificate, again.certificate,
        "a retry hands out what is committed"
    );

    let second = identity(key, &issued.certificate, &manager.bundle);
    let mut second = ControlClient::new(manager.channel(&second));
    let mut watch = second
        .watch(WatchRequest::default())
        .await
        .expect("a stream")
        .into_inner();
    watch.message().await.expect("open");
    let operators = client.list_operators(all()).await.expect("listed").into_inner();
    assert_eq!(operators.nodes.len(), 2);
    client
        .revoke_operator(removal("second", 3))
        .await
        .expect("revoked");
    assert!(second.list_nodes(all()).await.is_err());
    while let Ok(message) = watch.message().await {
        assert!(
            message.is_some(),
            "it ends with a refusal, not as if all were told"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_names_the_cluster_its_members_and_its_ring() {
    let manager = Manager::start().await;
    let request = wire::GetClusterStatusRequest {};
    until(|| manager.replica.leadership().borrow().leading.is_some()).await;
    let status = client(&manager)
        .get_cluster_status(request)
        .await
        .expect("always")
        .into_inner();
    assert_eq!(status.cluster_id, manager.cluster.as_bytes());
    assert!(!status.stale && status.lab);
    assert_eq!(
        (status.members.len(), status.can_lose, status.leader_member),
        (1, 0, 1)
    );
    assert_eq!(
        (&status.members[0].name[..], status.members[0].voter),
        ("manager-1", true)
    );
    assert!(status.key_ring.starts_with("epoch 1"));
    assert!(status.oldest_certificate_not_after > 0);
}
