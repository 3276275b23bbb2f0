//! Parsers of text.

use std::path::Path;

use bulkhead_chaos::live::Scenario;
use bulkhead_cli::quantity;
use bulkhead_identity::outside::Url;
use bulkhead_identity::recovery::RecoveryKey;
use bulkhead_identity::seam::SystemEntropy;
use bulkhead_identity::ticket::{Ticket, TicketSecret};
use bulkhead_identity::{UnlockKey, pem as pem_file};
use bulkhead_launcher::message::{Envelope, FromLauncher};
use bulkhead_manager::registry::describe;
use bulkhead_manager::scheduler::constraint::Constraint;
use bulkhead_proto::audit::Head;
use bulkhead_proto::{ClusterId, Digest, KeyId, Method, NodeId, Role, TaskId};

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

fn seeds(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|it| it.as_bytes().to_vec()).collect()
}

pub(crate) fn ticket(bytes: &[u8]) {
    let Some(ticket) = text(bytes).and_then(|it| it.parse::<Ticket>().ok()) else {
        return;
    };
    // It is shown as it is read, whatever blanks and capitals were around it.
    let again = ticket.to_text().parse::<Ticket>().expect("its own text");
    assert_eq!(again.secret().hash(), ticket.secret().hash());
}

pub(crate) fn tickets() -> Vec<Vec<u8>> {
    let ticket = Ticket::new(b"a root", TicketSecret::new([7; 16].into()));
    vec![ticket.to_text().as_bytes().to_vec()]
}

pub(crate) fn unlock_key(bytes: &[u8]) {
    if let Some(key) = text(bytes).and_then(|it| it.parse::<UnlockKey>().ok()) {
        let again = key.to_text().parse::<UnlockKey>().expect("its own text");
        assert_eq!(
            (again.generation(), again.expose()),
            (key.generation(), key.expose())
        );
    }
}

pub(crate) fn unlock_keys() -> Vec<Vec<u8>> {
    let key = UnlockKey::generate(3, &SystemEntropy).expect("random bytes");
    vec![key.to_text().as_bytes().to_vec()]
}

pub(crate) fn recovery_key(bytes: &[u8]) {
    if let Some(key) = text(bytes).and_then(|it| RecoveryKey::parse(it).ok()) {
        let again = RecoveryKey::parse(&key.to_text()).expect("its own text");
        assert_eq!(again.expose(), key.expose());
    }
}

pub(crate) fn recovery_keys() -> Vec<Vec<u8>> {
    let key = RecoveryKey::generate(&SystemEntropy).expect("random bytes");
    vec![key.to_text().as_bytes().to_vec()]
}

pub(crate) fn ids(bytes: &[u8]) {
    let _wrong_length = (
        ClusterId::try_from(bytes),
        NodeId::try_from(bytes),
        KeyId::try_from(bytes),
    );
    let Some(text) = text(bytes) else { return };
    let _unknown = (Method::from_path(text), text.parse::<Role>());
    if let Ok(id) = text.parse::<TaskId>() {
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string().parse::<Digest>().ok(), Some(digest));
    }
}

pub(crate) fn all_ids() -> Vec<Vec<u8>> {
    let digest = Digest::of(b"x").to_string();
    let id = TaskId::from_bytes([9; 16]).to_string();
    seeds(&[&digest, &id, "manager", Method::ALL[0].path()])
}

pub(crate) fn audit_head(bytes: &[u8]) {
    if let Some(head) = text(bytes).and_then(|it| it.parse::<Head>().ok()) {
        assert_eq!(head.to_string().parse::<Head>().ok(), Some(head));
    }
}

pub(crate) fn audit_heads() -> Vec<Vec<u8>> {
    let head = Head {
        sequence: 17,
        hash: [3; 32],
    };
    seeds(&[&head.to_string()])
}

pub(crate) fn url(bytes: &[u8]) {
    if let Some(url) = text(bytes).and_then(|it| it.parse::<Url>().ok()) {
        assert!(!url.address().is_empty() && url.path().starts_with('/'));
    }
}

pub(crate) fn urls() -> Vec<Vec<u8>> {
    seeds(&["https://signer.example:8443/v1/sign", "https://[::1]:1/"])
}

pub(crate) fn constraint(bytes: &[u8]) {
    if let Some(text) = text(bytes) {
        let _not_one = text.parse::<Constraint>();
    }
}

pub(crate) fn constraints() -> Vec<Vec<u8>> {
    seeds(&[
        "node.labels.disk==ssd",
        "node.role != manager",
        "node.hostname==a",
    ])
}

pub(crate) fn quantity(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    let _not_one = (quantity::size(text), quantity::cpus(text), quantity::since(text));
    if let Ok(time) = quantity::duration(text) {
        assert_eq!(
            quantity::duration(&format!("{}ns", time.as_nanos())).is_ok(),
            time.as_nanos() < 10_u128.pow(18)
        );
    }
}

pub(crate) fn quantities() -> Vec<Vec<u8>> {
    seeds(&["1m30s", "1.5GiB", "0.125", "2026-11-29T00:00:00Z", "36500d"])
}

pub(crate) fn scenario(bytes: &[u8]) {
    if let Some(text) = text(bytes) {
        let _wrong = Scenario::parse(text, Path::new("scenario.yml"));
    }
}

pub(crate) fn scenarios() -> Vec<Vec<u8>> {
    seeds(&[
        include_str!("../../../chaos/scenarios/leader-dies.yml"),
        include_str!("../../../chaos/scenarios/worker-cut-off.yml"),
        include_str!("../../../chaos/scenarios/rotation-under-partition.yml"),
    ])
}

pub(crate) fn pem(bytes: &[u8]) {
    if let Ok(der) = pem_file::certificate(bytes) {
        assert_eq!(
            pem_file::certificate(pem_file::encode(&der).as_bytes()).as_ref(),
            Ok(&der)
        );
    }
    let _none = pem_file::private_key(bytes);
}

pub(crate) fn pems() -> Vec<Vec<u8>> {
    seeds(&[
        &pem_file::encode(&[0x30; 120]),
        "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n",
    ])
}

/// A manifest, a zero byte, and the config.
pub(crate) fn manifest(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let manifest = parts.next().unwrap_or_default();
    let config = parts.next().unwrap_or_default();
    if let Ok(image) = describe(Digest::of(manifest), manifest, config) {
        assert!(image.blobs.iter().map(|(_, size)| size).sum::<u64>() == image.size);
    }
}

pub(crate) fn manifests() -> Vec<Vec<u8>> {
    let digest = Digest::of(b"x");
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        _ => "arm64",
    };
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":100}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{digest}","size":10}}]}}"#
    );
    let config = format!(
        r#"{{"os":"linux","architecture":"{architecture}","config":{{"Entrypoint":["/a"],"Env":["A=b"],"Cmd":["c"],"User":"1:2","WorkingDir":"/"}},"rootfs":{{"type":"layers","diff_ids":["{digest}"]}}}}"#
    );
    vec![[manifest.as_bytes(), &[0], config.as_bytes()].concat()]
}

pub(crate) fn launcher_request(bytes: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Envelope>(bytes) {
        let again = serde_json::to_vec(&request).expect("it was read");
        assert_eq!(serde_json::from_slice::<Envelope>(&again).ok(), Some(request));
    }
    let _not_one = serde_json::from_slice::<FromLauncher>(bytes);
}

pub(crate) fn launcher_requests() -> Vec<Vec<u8>> {
    let layer = Digest::of(b"x");
    seeds(&[
        &format!(r#"{{"id":1,"request":{{"VerifyLayer":{{"diff_id":"{layer}"}}}}}}"#),
        r#"{"id":2,"request":{"List":{"after":null}}}"#,
        r#"{"id":3,"request":{"Signal":{"task":"abc","signal":"Kill"}}}"#,
    ])
}
