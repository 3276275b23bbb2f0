//! A signer on a real socket, which says whatever a test has it say.

use std::net::SocketAddr;

use bulkhead_identity::csr::{self, PublicKey};
use bulkhead_identity::order::What;
use bulkhead_identity::seam::SystemClock;
use bulkhead_identity::{Authority, Bundle, Certificate, Credentials, Key, Subject};
use bulkhead_proto::{ClusterId, NodeId, Role};
use data_encoding::BASE64;
use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::ca::Validity;

const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);
const YEAR_MS: i64 = 365 * 86_400_000;

fn now_ms() -> i64 {
    i64::try_from(SystemClock::start().wall_millis()).expect("this age")
}

fn root() -> Authority {
    Authority::generate(CLUSTER, now_ms() - 3_600_000).expect("a root")
}

fn public() -> PublicKey {
    let key = Key::generate().expect("a key");
    csr::public_key(&key.csr().expect("a request")).expect("our own")
}

fn subject(role: Role) -> Subject {
    Subject {
        cluster: CLUSTER,
        node: NodeId::from_bytes([1; 16]),
        role,
    }
}

fn order(what: What, from: i64, to: i64) -> Order {
    Order::with_serial([0x41; 16], what, from, to)
}

/// What a worker is given now.
fn wanted(key: &PublicKey) -> Order {
    let validity = Validity::from_now(now_ms(), Duration::from_secs(3_600));
    let what = What::Leaf {
        subject: subject(Role::Worker),
        key: key.clone(),
    };
    order(what, validity.not_before, validity.not_after)
}

/// The manager that asks, of a cluster with this root.
fn manager(cluster: &Authority) -> Identity {
    let key = Key::generate().expect("a key");
    let public = csr::public_key(&key.csr().expect("a request")).expect("our own");
    let now = now_ms();
    let der = cluster.issue(&subject(Role::Manager), &public, now - 60_000, now + 3_600_000);
    let der = der.expect("signed");
    Identity::new(Credentials {
        key,
        certificate: Certificate::from_der(&der).expect("our own"),
        chain: Vec::new(),
        bundle: Bundle::from_ders(vec![cluster.root_der().to_vec()]).expect("a root"),
    })
    .expect("an identity")
}

/// A server that answers each question with the bytes that `answer` makes of its body; nothing for ever where that is none.
struct Server {
    address: SocketAddr,
    ca: Vec<u8>,
    _serving: AbortOnDropHandle<()>,
}

impl Server {
    async fn start(
        trusts: &Authority,
        answer: impl Fn(&str, &Value) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        let key = KeyPair::generate().expect("a key");
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let params = CertificateParams::new(names).expect("names");
        let shown = params.self_signed(&key).expect("signed").der().clone();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        let root = CertificateDer::from(trusts.root_der().to_vec());
        roots.add(root).expect("a root");
        let callers = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .with_client_cert_verifier(callers.expect("a verifier"))
            .with_single_cert(
                vec![shown.clone()],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )
            .expect("its own key");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    continue;
                };
                let (line, body) = question(&mut stream).await;
                match answer(&line, &body) {
                    Some(bytes) => {
                        // It may have heard enough before all of it is written.
                        let _ = stream.write_all(&bytes).await;
                        let _ = stream.shutdown().await;
                    }
                    None => std::future::pending().await,
                }
            }
        });
        Server {
            address,
            ca: shown.to_vec(),
            _serving: AbortOnDropHandle::new(serving),
        }
    }

    fn signer(&self) -> ExternalSigner {
        ExternalSigner {
            url: format!("https://{}/sign", self.address),
            ca: self.ca.clone(),
        }
    }
}

/// The request's first line, and its body.
async fn question(stream: &mut (impl AsyncRead + Unpin)) -> (String, Value) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a head"));
    }
    let head = String::from_utf8(head).expect("text").to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let length = length.expect("a length").parse().expect("a number");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.expect("a body");
    let line = head.lines().next().expect("a line").to_owned();
    (line, serde_json::from_slice(&body).expect("JSON"))
}

fn http(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

fn good(der: &[u8]) -> Vec<u8> {
    let body = json!({ "certificate": BASE64.encode(der), "more": 1 }).to_string();
    http("200 OK", "", body.as_bytes())
}

fn signers(cluster: &Authority) -> Signers {
    Signers::with_patience(
        manager(cluster),
        Arc::new(SystemClock::start()),
        Duration::from_secs(60),
    )
}

/// What comes of an order that is answered with these bytes.
async fn answered(
    outside: &Authority,
    wanted: &Order,
    answer: Vec<u8>,
) -> (Result<Vec<u8>, SignerError>, Signers) {
    let cluster = root();
    let server = Server::start(&cluster, move |_, _| Some(answer.clone())).await;
    let signers = signers(&cluster);
    let result = signers.sign(&server.signer(), outside.root_der(), wanted).await;
    (result, signers)
}

#[tokio::test]
async fn a_signer_is_asked_as_the_document_says_and_its_certificate_is_taken() {
    let (outside, key) = (root(), public());
    let wanted = wanted(&key);
    let der = outside.sign(&wanted).expect("signed");
    let expected = json!({
        "version": 1,
        "cluster": CLUSTER.to_string(),
        "root": Root::from_der(outside.root_der()).expect("a root").key_id().to_string(),
        "serial": "41".repeat(16),
        "not_before": wanted.not_before_ms() / 1_000,
        "not_after": wanted.not_after_ms() / 1_000,
        "kind": "leaf",
        "node": NodeId::from_bytes([1; 16]).to_string(),
        "role": "worker",
        "public_key": BASE64.encode(key.spki_der()),
    });
    let (cluster, answer) = (root(), good(&der));
    let server = Server::start(&cluster, move |line, body| {
        assert_eq!((line, body), ("post /sign http/1.1", &expected));
        Some(answer.clone())
    })
    .await;
    let signers = signers(&cluster);
    let signed = signers.sign(&server.signer(), outside.root_der(), &wanted).await;
    assert_eq!(signed.expect("signed"), der);
    let id = Root::from_der(outside.root_der()).expect("a root").key_id();
    assert!(signers.works(id));
}

/// S21 of the attacks: each lie is refused when it is received, and the signer counts as one that fails.
#[tokio::test]
async fn a_signer_that_lies_is_refused_with_what_is_wrong() {
    use Difference as D;
    let (outside, key) = (root(), public());
    let wanted = wanted(&key);
    let (from, to) = (wanted.not_before_ms(), wanted.not_after_ms());
    let leaf = |role, key: &PublicKey| What::Leaf {
        subject: subject(role),
        key: key.clone(),
    };
    let worker = || leaf(Role::Worker, &key);
    let next = Root::from_der(root().root_der()).expect("a root");
    let mut serial = [0x41; 16];
    serial[15] = 0;
    type Told = fn(&Difference) -> bool;
    let lies: Vec<(&str, Order, Told)> = vec![
        (
            "another key",
            order(leaf(Role::Worker, &public()), from, to),
            |it| *it == D::Key,
        ),
        ("an authority", order(What::Cross(next), from, to), |it| {
            matches!(it, D::Profile(_))
        }),
        ("another role", order(leaf(Role::Manager, &key), from, to), |it| {
            matches!(it, D::Role { .. })
        }),
        ("expired", order(worker(), from - YEAR_MS, to - YEAR_MS), |it| {
            matches!(it, D::Validity { .. })
        }),
        ("ten years", order(worker(), from, to + 10 * YEAR_MS), |it| {
            matches!(it, D::Validity { .. })
        }),
        (
            "another serial",
            Order::with_serial(serial, worker(), from, to),
            |it| *it == D::Serial,
        ),
    ];
    for (what, lie, told) in lies {
        let der = outside.sign(&lie).expect("signed");
        let (result, signers) = answered(&outside, &wanted, good(&der)).await;
        match result {
            Err(SignerError::Lie(difference)) => assert!(told(&difference), "{what}: {difference}"),
            other => panic!("{what}: {other:?}"),
        }
        let id = Root::from_der(outside.root_der()).expect("a root").key_id();
        assert!(!signers.works(id), "{what}");
        let status = signers.status(id, &ExternalSigner::default());
        assert!(
            status.failing_since > 0 && status.reason.contains("another certificate"),
            "{what}"
        );
    }
    let by_another = root().sign(&wanted).expect("signed");
    let (result, _) = answered(&outside, &wanted, good(&by_another)).await;
    assert!(matches!(result, Err(SignerError::Lie(D::Issuer))), "{result:?}");
}

#[tokio::test]
async fn an_answer_that_is_none_is_refused() {
    let (outside, key) = (root(), public());
    let wanted = wanted(&key);
    let huge = vec![b' '; limits::SIGNER_ANSWER_BYTES + 1];
    let refusal = json!({ "error": format!("no\r\n\u{1b}[31m{}", "x".repeat(9_999)) }).to_string();
    type Told = fn(&SignerError) -> bool;
    let answers: Vec<(&str, Vec<u8>, Told)> = vec![
        ("too large", http("200 OK", "", &huge), |it| {
            matches!(it, SignerError::Long)
        }),
        ("not JSON", http("200 OK", "", b"<html>"), |it| {
            matches!(it, SignerError::Format(_))
        }),
        ("no certificate", http("200 OK", "", b"{}"), |it| {
            matches!(it, SignerError::Format(_))
        }),
        (
            "not base64",
            http("200 OK", "", br#"{"certificate":"*"}"#),
            |it| matches!(it, SignerError::Format(_)),
        ),
        ("empty", http("200 OK", "", br#"{"certificate":""}"#), |it| {
            matches!(it, SignerError::Lie(Difference::Profile(_)))
        }),
        (
            "a redirect",
            http("302 Found", "location: https://127.0.0.1:1/\r\n", b""),
            |it| matches!(it, SignerError::Refused { status: 302, .. }),
        ),
        ("a refusal", http("403 Forbidden", "", refusal.as_bytes()), |it| {
            let SignerError::Refused { status: 403, said } = it else {
                return false;
            };
            said.starts_with("no") && said.chars().count() == 200 && !said.contains(char::is_control)
        }),
        ("no HTTP", b"220 mail.example\r\n".to_vec(), |it| {
            matches!(it, SignerError::Http(_))
        }),
        (
            "cut",
            b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".to_vec(),
            |it| matches!(it, SignerError::Http(_)),
        ),
        ("nothing", Vec::new(), |it| matches!(it, SignerError::Http(_))),
    ];
    for (what, answer, told) in answers {
        let (result, _) = answered(&outside, &wanted, answer).await;
        let error = result.expect_err(what);
        assert!(told(&error), "{what}: {error:?}");
        assert!(!error.hint().is_empty());
    }
}

#[tokio::test]
async fn a_signer_that_does_not_answer_is_given_up_and_one_that_answers_again_works() {
    let (cluster, outside, key) = (root(), root(), public());
    let wanted = wanted(&key);
    let silent = Server::start(&cluster, |_, _| None).await;
    let patience = Duration::from_millis(200);
    let signers = Signers::with_patience(manager(&cluster), Arc::new(SystemClock::start()), patience);
    let sign = async |signer| signers.sign(&signer, outside.root_der(), &wanted).await;
    let late = sign(silent.signer()).await;
    assert!(matches!(late, Err(SignerError::Late)), "{late:?}");
    let id = Root::from_der(outside.root_der()).expect("a root").key_id();
    assert!(!signers.works(id));

    let der = outside.sign(&wanted).expect("signed");
    let answers = Server::start(&cluster, move |_, _| Some(good(&der))).await;
    // The first may be too slow on a busy machine.
    while sign(answers.signer()).await.is_err() {}
    assert!(signers.works(id));
    assert_eq!(signers.status(id, &answers.signer()).failing_since, 0);
    signers.keep(&[]);
    assert!(!signers.works(id), "of a root that is gone nothing is remembered");
}

#[tokio::test]
async fn who_answers_proves_its_name_under_the_given_authority_and_knows_the_caller() {
    let (cluster, outside, key) = (root(), root(), public());
    let wanted = wanted(&key);
    let der = outside.sign(&wanted).expect("signed");
    let answer = good(&der);
    let server = Server::start(&cluster, move |_, _| Some(answer.clone())).await;
    let sign = async |signers: &Signers, signer: ExternalSigner| {
        signers.sign(&signer, outside.root_der(), &wanted).await
    };
    let ours = signers(&cluster);
    sign(&ours, server.signer()).await.expect("signed");
    let mut other_ca = server.signer();
    other_ca.ca = Server::start(&cluster, |_, _| None).await.ca;
    let mut other_name = server.signer();
    other_name.url = format!("https://[::ffff:127.0.0.1]:{}/", server.address.port());
    let mut nobody = server.signer();
    nobody.url = "https://127.0.0.1:1/".into();
    for signer in [other_ca, other_name, nobody] {
        let result = sign(&ours, signer).await;
        assert!(matches!(result, Err(SignerError::Dial(_))), "{result:?}");
    }
    // A manager of a cluster that this signer does not know; TLS 1.3 says so with the first answer.
    let stranger = sign(&signers(&root()), server.signer()).await;
    assert!(
        matches!(stranger, Err(SignerError::Dial(_) | SignerError::Http(_))),
        "{stranger:?}"
    );
    for url in ["http://127.0.0.1:1", "https://user:password@127.0.0.1:1", ""] {
        let mut signer = server.signer();
        signer.url = url.into();
        assert!(matches!(check(&signer), Err(SignerError::Url(_))), "{url}");
    }
}

#[test]
fn a_signer_is_asked_again_after_a_while_and_sooner_while_it_fails() {
    let check = super::super::millis(limits::SIGNER_CHECK);
    let retry = super::super::millis(limits::SIGNER_RETRY);
    let mut health = Health::default();
    assert!(health.is_due(Need::Later, 1_000_000), "never asked");
    health.note(1_000_000, Ok(()));
    assert!(health.works());
    let due = |health: &Health, at| health.is_due(Need::Later, at);
    assert!(!due(&health, 1_000_000 + check - 1) && due(&health, 1_000_000 + check));
    assert!(health.is_due(Need::Soon, 1_000_000 + retry));
    health.note(2_000_000, Err("down".into()));
    health.note(3_000_000, Err("still down".into()));
    assert!(!health.works());
    assert_eq!(health.failing, Some((2_000_000, "still down".into())));
    assert!(!due(&health, 3_000_000 + retry - 1) && due(&health, 3_000_000 + retry));
    assert!(due(&health, 2_999_999), "the clock was put back");
    health.note(4_000_000, Ok(()));
    assert_eq!((health.works(), health.failing), (true, None));
}
