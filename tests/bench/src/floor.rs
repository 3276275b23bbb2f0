//! What a replicated write cannot be faster than on this machine: two loopback round trips over TLS (client to leader,
//! leader to follower) and one flush of a disk that three members write to at once.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use anyhow::Context as _;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const REQUEST_BYTES: usize = 1_024;
const ANSWER_BYTES: usize = 64;
/// A block: what a write of 1 KiB takes on disk.
const WRITE_BYTES: usize = 4_096;
const FILE_BYTES: usize = 4 << 20;
const NAME: &str = "floor.invalid";

/// Round trips of 1 KiB there and a short answer back, TLS 1.3 over the loopback.
pub(crate) async fn tls_round_trips(count: usize) -> anyhow::Result<Vec<Duration>> {
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(vec![NAME.to_owned()])?.self_signed(&key)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = [&rustls::version::TLS13];
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&versions)?
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        )?;
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone())?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)?
        .with_root_certificates(roots)
        .with_no_client_auth();

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let answering = tokio::spawn(async move {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let mut stream = TlsAcceptor::from(Arc::new(server)).accept(stream).await?;
        let (mut request, answer) = (vec![0; REQUEST_BYTES], vec![0; ANSWER_BYTES]);
        // Ends when the other end closes.
        while stream.read_exact(&mut request).await.is_ok() {
            stream.write_all(&answer).await?;
            stream.flush().await?;
        }
        Ok::<_, std::io::Error>(())
    });
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(NAME)?;
    let mut stream = TlsConnector::from(Arc::new(client)).connect(name, stream).await?;
    let (request, mut answer) = (vec![0; REQUEST_BYTES], vec![0; ANSWER_BYTES]);
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        stream.write_all(&request).await?;
        stream.flush().await?;
        stream.read_exact(&mut answer).await?;
        times.push(start.elapsed());
    }
    drop(stream);
    answering.await??;
    Ok(times)
}

/// Writes of a block with a flush each, three files at once, preallocated.
pub(crate) fn flushes_of_three(folder: &Path, count: usize) -> anyhow::Result<Vec<Duration>> {
    let folder = tempfile::Builder::new()
        .prefix("bulkhead-bench-floor.")
        .tempdir_in(folder)?;
    let mut files = Vec::new();
    for number in 0..3 {
        let mut file = File::create_new(folder.path().join(format!("{number}")))?;
        file.write_all(&vec![0; FILE_BYTES])?;
        file.sync_all()?;
        files.push(file);
    }
    let begin = Arc::new(Barrier::new(files.len()));
    let writers: Vec<_> = files
        .into_iter()
        .map(|file| {
            let begin = begin.clone();
            std::thread::spawn(move || {
                begin.wait();
                writes(&file, count)
            })
        })
        .collect();
    let mut times = Vec::with_capacity(count * 3);
    for writer in writers {
        let done = writer.join().ok().context("a writer panicked")?;
        times.extend(done.with_context(|| format!("could not write below {}", folder.path().display()))?);
    }
    Ok(times)
}

fn writes(file: &File, count: usize) -> std::io::Result<Vec<Duration>> {
    let block = vec![0xA5; WRITE_BYTES];
    let mut times = Vec::with_capacity(count);
    for round in 0..count {
        let offset = round * WRITE_BYTES % FILE_BYTES;
        let start = Instant::now();
        file.write_all_at(&block, offset as u64)?;
        file.sync_data()?;
        times.push(start.elapsed());
    }
    Ok(times)
}
