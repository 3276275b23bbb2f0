//! What crosses a wire is TLS 1.3 both ways, as other programs see it; a key reaches what its role may, and no more.

use std::path::Path;
use std::process::Command;

use bulkhead_identity::tls::{self, Expect};
use bulkhead_identity::{Credentials, Identity};
use bulkhead_proto::wire::control_client::ControlClient;
use bulkhead_proto::wire::dispatcher_client::DispatcherClient;
use bulkhead_proto::wire::peer_client::PeerClient;
use bulkhead_proto::wire::raft_client::RaftClient;
use bulkhead_proto::wire::{
    CreateSecretRequest, GetClusterStatusRequest, ListRequest, RaftMessage, ReadIndexRequest, RenewRequest,
};
use bulkhead_tests::{Answer, Lab, installed, may_run};
use tonic::transport::Channel;

use crate::openssl::{key_file, pem, x509};

#[test]
fn others_see_tls_1_3_and_keys_reach_what_their_role_may() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 1);
    keys_reach_what_their_role_may(&lab);
    if installed("openssl") {
        openssl_sees_tls_1_3_and_the_profile(&lab);
    }
}

fn manager_address(lab: &Lab) -> String {
    format!("{}:7443", lab.address("manager-1"))
}

fn openssl_sees_tls_1_3_and_the_profile(lab: &Lab) {
    let worker = key_file(lab, &lab.data("worker-1").join("worker/node.key"));
    let manager = key_file(lab, &lab.data("manager-1").join("keys"));
    let roots = worker.credentials.bundle.ders();
    let root = pem(lab, "root.pem", "CERTIFICATE", &roots[0]);
    let certificate = pem(
        lab,
        "worker.pem",
        "CERTIFICATE",
        worker.credentials.certificate.der(),
    );
    let key = pem(
        lab,
        "worker-key.pem",
        "PRIVATE KEY",
        worker.credentials.key.pkcs8(),
    );
    let (address, cluster) = (manager_address(lab), manager.subject().cluster);

    let client = |arguments: &[&str]| {
        let mut command = Command::new("openssl");
        command
            .args(["s_client", "-connect", &address, "-alpn", "h2"])
            .args(["-CAfile", &root, "-verify_return_error"])
            .args(["-verify_hostname", &format!("manager.{cluster}")])
            .args(arguments);
        Answer::of(&mut command, b"Q\n")
    };
    // With a certificate and without: a listener asks for one and accepts none.
    for arguments in [&["-cert", &certificate, "-key", &key][..], &[][..]] {
        client(arguments)
            .says("New, TLSv1.3")
            .says("Verify return code: 0 (ok)")
            .says("ALPN protocol: h2");
    }
    for version in ["-tls1_2", "-tls1_1"] {
        let old = client(&[version]);
        assert_ne!(old.code, 0, "{}", old.whole());
        assert!(!old.out.contains("BEGIN CERTIFICATE"), "{}", old.whole());
    }
    let other_name = ["-verify_hostname", "manager.example"];
    let other_name = client(&other_name);
    assert_ne!(other_name.code, 0, "{}", other_name.whole());

    let leaf = pem(
        lab,
        "manager.pem",
        "CERTIFICATE",
        manager.credentials.certificate.der(),
    );
    x509(&leaf)
        .says(&format!(
            "O = {cluster}, OU = manager, CN = {}",
            manager.subject().node
        ))
        .says(&format!("URI:spiffe://{cluster}/node/{}", manager.subject().node))
        .says(&format!("DNS:manager.{cluster}"))
        .says("TLS Web Server Authentication")
        .says("TLS Web Client Authentication")
        .says("NIST CURVE: P-256")
        .says("CA:FALSE");
    let seen = x509(&certificate)
        .says(&format!(
            "O = {cluster}, OU = worker, CN = {}",
            worker.subject().node
        ))
        .says(&format!("URI:spiffe://{cluster}/node/{}", worker.subject().node))
        .says("TLS Web Client Authentication");
    assert!(
        !seen.out.contains("Server Authentication") && !seen.out.contains("DNS:"),
        "{}",
        seen.out
    );
    x509(&root).says("CA:TRUE, pathlen:4").says("Certificate Sign");
    let verify = ["verify", "-CAfile", &root, "-purpose", "sslserver", &leaf];
    Answer::of(Command::new("openssl").args(verify), b"")
        .says("OK")
        .success();
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Served,
    Refused,
}

fn keys_reach_what_their_role_may(lab: &Lab) {
    use Outcome::{Refused, Served};
    let of = |path: &Path| key_file(lab, path).credentials;
    let worker = of(&lab.data("worker-1").join("worker/node.key"));
    let manager = of(&lab.data("manager-1").join("keys"));
    let operator = of(&lab.folder().join("config/bulkhead/contexts/dev/key"));
    let address = manager_address(lab);
    let as_node = |credentials: &std::sync::Arc<Credentials>| {
        let identity = Identity::new(credentials.clone()).expect("they belong together");
        tls::channel(&identity, &address, Expect::AnyManager).expect("an address")
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let cases = [
            // Control, secrets, Raft, peers, renewal
            (
                "anonymous",
                tls::bundle_channel(&worker.bundle, &address, tls::Expect::AnyManager).expect("an address"),
                [Refused; 5],
            ),
            (
                "worker",
                as_node(&worker),
                [Refused, Refused, Refused, Refused, Served],
            ),
            (
                "operator",
                as_node(&operator),
                [Served, Served, Refused, Refused, Served],
            ),
            (
                "manager",
                as_node(&manager),
                [Refused, Refused, Served, Served, Served],
            ),
        ];
        for (who, channel, want) in cases {
            let got = [
                status(channel.clone()).await,
                secret(channel.clone()).await,
                raft(channel.clone()).await,
                peer(channel.clone()).await,
                dispatcher(channel).await,
            ];
            assert_eq!(got, want, "{who}");
        }
    });
}

/// Refused by who calls; any other answer comes from behind that decision.
fn outcome<T>(answer: Result<tonic::Response<T>, tonic::Status>) -> Outcome {
    match answer {
        Ok(_) => Outcome::Served,
        Err(status) => match status.code() {
            tonic::Code::PermissionDenied | tonic::Code::Unauthenticated => Outcome::Refused,
            tonic::Code::InvalidArgument | tonic::Code::FailedPrecondition => Outcome::Served,
            other => panic!("{other:?}: {status:?}"),
        },
    }
}

async fn status(channel: Channel) -> Outcome {
    let mut client = ControlClient::new(channel);
    let status = outcome(client.get_cluster_status(GetClusterStatusRequest {}).await);
    let listed = outcome(client.list_secrets(ListRequest::default()).await);
    assert_eq!(status, listed);
    status
}

async fn secret(channel: Channel) -> Outcome {
    let request = CreateSecretRequest::default();
    outcome(ControlClient::new(channel).create_secret(request).await)
}

async fn raft(channel: Channel) -> Outcome {
    let mut client = RaftClient::new(channel);
    outcome(client.vote(RaftMessage::default()).await)
}

async fn peer(channel: Channel) -> Outcome {
    let mut client = PeerClient::new(channel);
    outcome(client.read_index(ReadIndexRequest::default()).await)
}

async fn dispatcher(channel: Channel) -> Outcome {
    let mut client = DispatcherClient::new(channel);
    outcome(client.renew(RenewRequest::default()).await)
}
