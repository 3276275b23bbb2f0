//! What another implementation of TLS and X.509 thinks of ours.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use bulkhead_identity::store::KeyFile;
use bulkhead_identity::tls::{self, Expect};
use bulkhead_identity::{Credentials, Identity};
use bulkhead_proto::wire::GetRootRequest;
use bulkhead_proto::wire::enrolment_client::EnrolmentClient;
use bulkhead_tests::{Answer, Lab};

/// `openssl` with these words.
pub(crate) fn openssl(words: &[&str]) -> Answer {
    Answer::of(Command::new("openssl").args(words), b"")
}

/// A program's key file, read as its owner would.
pub(crate) fn key_file(lab: &Lab, path: &Path) -> KeyFile {
    let copy = lab.folder().join("copied.key");
    std::fs::copy(path, &copy).expect("root may");
    let file = KeyFile::load(&copy).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    std::fs::remove_file(&copy).expect("its own");
    file
}

/// The key file of a node's program.
pub(crate) fn key_file_of(lab: &Lab, node: &str) -> KeyFile {
    let file = match node.starts_with("manager") {
        true => "keys",
        false => "worker/node.key",
    };
    key_file(lab, &lab.data(node).join(file))
}

/// Writes something as PEM; gives the path.
pub(crate) fn pem(lab: &Lab, name: &str, label: &str, der: &[u8]) -> String {
    let path: PathBuf = lab.folder().join(name);
    let body = data_encoding::BASE64.encode(der);
    let lines: Vec<&str> = body
        .as_bytes()
        .chunks(64)
        .map(|line| std::str::from_utf8(line).expect("ASCII"))
        .collect();
    let text = format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    );
    std::fs::write(&path, text).expect("its own folder");
    path.display().to_string()
}

/// What openssl reads in a certificate.
pub(crate) fn x509(path: &str) -> Answer {
    let answer = openssl(&["x509", "-noout", "-text", "-in", path]);
    assert_eq!(answer.code, 0, "{}", answer.whole());
    answer
}

/// What a manager presents to a caller of this protocol: paths of the leaf and of what comes with it.
pub(crate) fn presented(lab: &Lab, manager: &str, protocol: &str) -> (String, Option<String>) {
    let address = format!("{}:7443", lab.address(manager));
    let shown = openssl(&["s_client", "-connect", &address, "-alpn", protocol, "-showcerts"]);
    let (begin, end) = ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----");
    let mut paths = shown.out.split(begin).skip(1).enumerate().map(|(at, rest)| {
        let body = rest.split(end).next().expect("a whole certificate");
        let path = lab.folder().join(format!("{manager}-{protocol}-{at}.pem"));
        std::fs::write(&path, format!("{begin}{body}{end}\n")).expect("its own folder");
        path.display().to_string()
    });
    let leaf = paths
        .next()
        .unwrap_or_else(|| panic!("no certificate in {}", shown.whole()));
    let between = paths.next();
    assert_eq!(paths.next(), None, "{}", shown.whole());
    (leaf, between)
}

/// Whether openssl believes a leaf by this root, with what is presented beside it.
pub(crate) fn verifies(root: &str, between: Option<&str>, leaf: &str) -> bool {
    let mut words = vec!["verify", "-CAfile", root];
    if let Some(between) = between {
        words.extend(["-untrusted", between]);
    }
    words.push(leaf);
    let answer = openssl(&words);
    let good = answer.code == 0;
    assert!(
        good || answer.err.contains("verification failed"),
        "{}",
        answer.whole()
    );
    good
}

/// Whether a server of openssl's that demands a client certificate of `root` lets these credentials in, as our own client
/// presents them. It serves with `certificate` and `key`, which the client must believe.
pub(crate) fn lets_in(
    address: &str,
    root: &str,
    (certificate, key): (&str, &str),
    client: Arc<Credentials>,
) -> bool {
    let mut server = Command::new("openssl")
        .args(["s_server", "-accept", address, "-naccept", "1", "-alpn", "h2"])
        .args(["-cert", certificate, "-key", key])
        .args(["-CAfile", root, "-Verify", "1", "-verify_return_error"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl runs");
    let mut lines = BufReader::new(server.stdout.take().expect("piped")).lines();
    let mut until = |words: &str| lines.any(|line| line.expect("a pipe").contains(words));
    assert!(until("ACCEPT"), "it listens");
    let identity = Identity::new(client).expect("they belong together");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let entered = runtime.enter();
    let channel = tls::channel(&identity, address, Expect::AnyManager).expect("an address");
    // Nobody answers: what matters is said in the handshake.
    runtime.spawn(async move { EnrolmentClient::new(channel).get_root(GetRootRequest {}).await });
    let let_in = until("CIPHER is");
    drop(entered);
    runtime.shutdown_background();
    let ended = server.wait_with_output().expect("it ends with its connection");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(let_in || said.contains("verify error"), "{said}");
    let_in
}
