//! An example of a signer outside of a cluster, by `docs/reference/external-signer.md`: it holds a root's key in a file, and
//! signs what managers of the cluster ask for. The end-to-end tests run it; yours would keep the key in a hardware module.
//!
//! ```text
//! bulkhead cluster ca roots > cluster.pem
//! bulkhead-example-signer --listen 0.0.0.0:8443 --root root.pem --root-key root-key.pem \
//!     --server-cert server.pem --server-key server-key.pem --trust cluster.pem
//! bulkhead cluster ca rotate --ca-cert root.pem --external-signer https://signer.example:8443 --external-signer-ca server-ca.pem
//! ```
//!
//! Each certificate is one line on standard output before it leaves: who asked, and what for.

mod callers;
mod policy;
mod question;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bulkhead_identity::{Authority, Bundle, Certificate, pem};
use bulkhead_proto::{NodeId, Role, limits};
use bytes::Bytes;
use clap::Parser;
use data_encoding::BASE64;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use self::policy::Policy;

/// One connection, from the handshake to the answer. A manager waits 5 s.
const CONNECTION: Duration = Duration::from_secs(10);
/// Connections at once; more wait.
const CONNECTIONS: usize = 64;
/// Bytes of a question; one has about 1 KiB.
const QUESTION_BYTES: usize = 64 << 10;
/// Bytes of its headers.
const HEADER_BYTES: usize = 16 << 10;

/// Signs certificates for the managers of one cluster.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Where managers reach it
    #[arg(long, value_name = "HOST:PORT")]
    listen: String,
    /// The root, PEM
    #[arg(long, value_name = "FILE")]
    root: PathBuf,
    /// Its private key, PEM (PKCS#8)
    #[arg(long, value_name = "FILE")]
    root_key: PathBuf,
    /// The certificate that this server shows, PEM, and those up to its authority
    #[arg(long, value_name = "FILE")]
    server_cert: PathBuf,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE")]
    server_key: PathBuf,
    /// Other roots of the cluster, PEM, by which managers are believed: those before the rotation to this root
    #[arg(long, value_name = "FILE")]
    trust: Vec<PathBuf>,
    /// A manager that was removed from the cluster: its certificate opens nothing here
    #[arg(long, value_name = "NODE-ID")]
    refuse: Vec<NodeId>,
    /// Signs the certificate that leads from this root to another one: only while the cluster rotates away from it
    #[arg(long)]
    allow_cross: bool,
    /// Signs for this role and no other; may be given again
    #[arg(long, value_name = "ROLE")]
    only: Vec<Role>,
}

/// What it works with.
struct Signer {
    authority: Authority,
    policy: Policy,
}

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(Options::parse()))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let read = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(
        read.len() <= limits::PEM_BYTES,
        "{} has more than {} bytes",
        path.display(),
        limits::PEM_BYTES
    );
    Ok(read)
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_slice_iter(&read(path)?).collect::<Result<Vec<_>, _>>();
    found.with_context(|| format!("{} is no PEM file", path.display()))
}

async fn serve(options: Options) -> anyhow::Result<()> {
    let root = pem::certificate(&read(&options.root)?).context("--root")?;
    let key = pem::private_key(&read(&options.root_key)?).context("--root-key")?;
    let authority = Authority::from_parts(&root, &key).context("the root and its key")?;
    let mut roots = vec![root];
    for path in &options.trust {
        let more = certificates(path)?.into_iter().map(|der| der.to_vec());
        roots.extend(more.filter(|der| *der != roots[0]).collect::<Vec<_>>());
    }
    let bundle = Bundle::from_ders(roots).context("the roots by which managers are believed")?;
    let server_key = PrivateKeyDer::from_pem_slice(&read(&options.server_key)?).context("--server-key")?;
    let config = callers::config(
        bundle,
        options.refuse,
        certificates(&options.server_cert)?,
        server_key,
    )?;
    let signer = Arc::new(Signer {
        authority,
        policy: Policy {
            allow_cross: options.allow_cross,
            only: options.only,
        },
    });
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(&options.listen)
        .await
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    println!("listening on {}", listener.local_addr()?);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = places.clone().acquire_owned().await?;
        let Ok((stream, address)) = listener.accept().await else {
            // Out of descriptors: some connection ends soon.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let (acceptor, signer) = (acceptor.clone(), signer.clone());
        tokio::spawn(async move {
            match timeout(CONNECTION, connection(acceptor, signer, stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("{address}: {error:#}"),
                Err(_) => eprintln!("{address}: it took too long"),
            }
            drop(place);
        });
    }
}

async fn connection(acceptor: TlsAcceptor, signer: Arc<Signer>, stream: TcpStream) -> anyhow::Result<()> {
    let stream = acceptor.accept(stream).await.context("the handshake failed")?;
    let shown = stream.get_ref().1.peer_certificates();
    let leaf = shown.and_then(<[_]>::first).context("no certificate")?;
    // The handshake proved it; this only reads it once more.
    let caller = Certificate::from_der(leaf)?.subject().node;
    let service = service_fn(|request| answer(&signer, caller, request));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await?;
    Ok(())
}

async fn answer(
    signer: &Signer,
    caller: NodeId,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, http::Error> {
    let (status, body) = match certificate(signer, caller, request).await {
        Ok(der) => (StatusCode::OK, json!({ "certificate": BASE64.encode(&der) })),
        Err((status, why)) => {
            eprintln!("refused {caller}: {why}");
            (status, json!({ "error": why }))
        }
    };
    Response::builder()
        .status(status)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
}

type Refusal = (StatusCode, String);

async fn certificate(
    signer: &Signer,
    caller: NodeId,
    request: Request<Incoming>,
) -> Result<Vec<u8>, Refusal> {
    let bad = |why: String| (StatusCode::BAD_REQUEST, why);
    if request.method() != Method::POST {
        return Err((StatusCode::METHOD_NOT_ALLOWED, "only POST is answered".into()));
    }
    let body = Limited::new(request.into_body(), QUESTION_BYTES).collect().await;
    let body = body.map_err(|error| bad(error.to_string()))?.to_bytes();
    let (root, order) = question::read(&body).map_err(|error| bad(format!("{error:#}")))?;
    let refused = |why: &str| (StatusCode::FORBIDDEN, why.to_owned());
    let now = policy::now_ms().map_err(|error| bad(error.to_string()))?;
    signer
        .policy
        .judge(&signer.authority, &root, &order, now)
        .map_err(refused)?;
    let signed = signer.authority.sign(&order);
    let der = signed.map_err(|error| bad(error.to_string()))?;
    // On record before it leaves.
    println!("signed for {caller}: {}", question::line(&order));
    Ok(der)
}
