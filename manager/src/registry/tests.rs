use std::sync::Arc;

use bulkhead_proto::wire::peer_server::{Peer, PeerServer};
use bulkhead_proto::wire::{self, BlobHeader, push_blob_request};
use futures::stream;
use tempfile::TempDir;
use tonic::transport::{Endpoint, Server};
use tonic::{Response, Streaming};

use super::*;

/// The managers beside one, which a test can add while it runs.
#[derive(Default)]
struct Others(Mutex<Vec<(MemberId, Channel)>>);

impl Peers for Others {
    fn others(&self) -> Vec<(MemberId, Channel)> {
        self.0.lock().expect("no panic").clone()
    }
}

struct Manager {
    registry: Registry,
    others: Arc<Others>,
    folder: TempDir,
}

fn manager() -> Manager {
    let folder = tempfile::tempdir().expect("a folder");
    let others = Arc::new(Others::default());
    let registry = Registry::open(folder.path(), others.clone()).expect("a store");
    Manager {
        registry,
        others,
        folder,
    }
}

fn push(
    digest: Digest,
    size: u64,
    data: &[&[u8]],
) -> impl Stream<Item = Result<PushBlobRequest, Status>> + Unpin {
    let part = |message| {
        Ok(PushBlobRequest {
            message: Some(message),
        })
    };
    let mut parts = vec![part(push_blob_request::Message::Header(BlobHeader {
        digest: digest.as_bytes().to_vec(),
        size,
    }))];
    parts.extend(
        data.iter()
            .map(|data| part(push_blob_request::Message::Data(data.to_vec()))),
    );
    stream::iter(parts)
}

async fn stored(registry: &Registry, content: &[u8]) -> Digest {
    let digest = Digest::of(content);
    let pushed = registry
        .push(push(digest, content.len() as u64, &[content]))
        .await;
    pushed.expect("whole and true");
    digest
}

fn files(manager: &Manager) -> Vec<String> {
    let mut names = Vec::new();
    for folder in ["blobs/sha256", "incoming"] {
        for entry in std::fs::read_dir(manager.folder.path().join(folder)).expect("a folder") {
            names.push(entry.expect("an entry").file_name().into_string().expect("ASCII"));
        }
    }
    names
}

#[tokio::test]
async fn a_pushed_blob_reads_back_and_is_known() {
    let manager = manager();
    let digest = Digest::of(b"hello world");
    for existed in [false, true] {
        let parts = push(digest, 11, &[b"hello ", b"world"]);
        assert_eq!(
            manager.registry.push(parts).await.expect("stored").existed,
            existed
        );
    }
    assert_eq!(files(&manager), [digest.hex()]);
    for (offset, expected) in [(0, &b"hello world"[..]), (6, b"world"), (11, b"")] {
        let request = FetchBlobRequest {
            digest: digest.as_bytes().to_vec(),
            offset,
        };
        let chunks: Vec<_> = manager
            .registry
            .pull(request)
            .await
            .expect("there")
            .collect()
            .await;
        let read: Vec<u8> = chunks.into_iter().flat_map(|it| it.expect("good").data).collect();
        assert_eq!(read, expected, "{offset}");
    }
}

#[tokio::test]
async fn what_is_not_whole_and_true_leaves_nothing() {
    let manager = manager();
    let digest = Digest::of(b"hello");
    let cases: [(u64, &[&[u8]], tonic::Code); 5] = [
        (5, &[b"hell"], tonic::Code::DataLoss),
        (5, &[b"hellO"], tonic::Code::DataLoss),
        (5, &[b"hello!"], tonic::Code::DataLoss),
        (4, &[b"hello"], tonic::Code::DataLoss),
        (limits::BLOB_BYTES + 1, &[b"hello"], tonic::Code::InvalidArgument),
    ];
    for (size, data, code) in cases {
        let refused = manager
            .registry
            .push(push(digest, size, data))
            .await
            .expect_err("refused");
        assert_eq!(refused.code(), code, "{size} {data:?}");
    }
    let without_header = stream::iter([Ok(PushBlobRequest {
        message: Some(push_blob_request::Message::Data(b"hello".to_vec())),
    })]);
    assert!(manager.registry.push(without_header).await.is_err());
    let twice = push(digest, 5, &[]).chain(push(digest, 5, &[b"hello"]));
    assert!(manager.registry.push(twice).await.is_err());
    let broken = push(digest, 5, &[b"he"]).chain(stream::iter([Err(Status::cancelled("gone"))]));
    assert!(manager.registry.push(broken).await.is_err());
    assert_eq!(files(&manager), [""; 0]);
}

#[tokio::test]
async fn a_blob_that_rotted_is_reported_and_goes() {
    let manager = manager();
    let digest = stored(&manager.registry, b"hello").await;
    std::fs::write(
        manager.folder.path().join("blobs/sha256").join(digest.hex()),
        b"hellO",
    )
    .expect("written");
    let request = FetchBlobRequest {
        digest: digest.as_bytes().to_vec(),
        offset: 0,
    };
    let chunks: Vec<_> = manager
        .registry
        .pull(request)
        .await
        .expect("opened")
        .collect()
        .await;
    let last = chunks.last().expect("one").as_ref().expect_err("noticed");
    assert_eq!(last.code(), tonic::Code::DataLoss);
    assert_eq!(files(&manager), [""; 0]);
}

#[tokio::test]
async fn only_old_blobs_without_an_image_are_collected() {
    let manager = manager();
    let kept = stored(&manager.registry, b"kept").await;
    stored(&manager.registry, b"goes").await;
    let referenced = [kept].into();
    let store = manager.registry.store();
    assert_eq!(store.collect(&referenced, 0).expect("collected"), 0);
    assert_eq!(store.collect(&referenced, i64::MAX).expect("collected"), 1);
    assert_eq!(files(&manager), [kept.hex()]);
}

#[test]
fn a_start_clears_what_a_crash_left() {
    let manager = manager();
    std::fs::write(manager.folder.path().join("incoming/half"), b"x").expect("written");
    BlobStore::open(manager.folder.path()).expect("opened");
    assert_eq!(files(&manager), [""; 0]);
}

/// A manager's peer service with the blob methods alone.
struct Blobs(Registry);

type Chunks = BoxStream<'static, Result<BlobChunk, Status>>;
type Answer<T> = Result<Response<T>, Status>;

fn not_here<T>() -> Answer<T> {
    Err(Status::unimplemented("only blobs"))
}

#[tonic::async_trait]
impl Peer for Blobs {
    async fn forward(&self, _: Request<wire::ForwardRequest>) -> Answer<wire::ForwardResponse> {
        not_here()
    }
    async fn read_index(&self, _: Request<wire::ReadIndexRequest>) -> Answer<wire::ReadIndexResponse> {
        not_here()
    }
    async fn report_liveness(
        &self,
        _: Request<wire::LivenessReport>,
    ) -> Answer<wire::LivenessReportResponse> {
        not_here()
    }
    async fn register_envelope_key(
        &self,
        _: Request<wire::RegisterEnvelopeKeyRequest>,
    ) -> Answer<wire::RegisterEnvelopeKeyResponse> {
        not_here()
    }
    async fn join_raft(&self, _: Request<wire::JoinRaftRequest>) -> Answer<wire::JoinRaftResponse> {
        not_here()
    }
    async fn take_back(&self, _: Request<wire::TakeBackRequest>) -> Answer<wire::TakeBackResponse> {
        not_here()
    }
    async fn leave_raft(&self, _: Request<wire::LeaveRaftRequest>) -> Answer<wire::LeaveRaftResponse> {
        not_here()
    }
    async fn has_blob(&self, request: Request<HasBlobRequest>) -> Answer<HasBlobResponse> {
        Ok(Response::new(self.0.has(request.into_inner()).await?))
    }
    type PullBlobStream = Chunks;
    async fn pull_blob(&self, request: Request<FetchBlobRequest>) -> Answer<Chunks> {
        Ok(Response::new(self.0.pull(request.into_inner()).await?))
    }
    async fn offer_blob(&self, request: Request<Streaming<OfferBlobRequest>>) -> Answer<OfferBlobResponse> {
        Ok(Response::new(self.0.offer(request.into_inner()).await?))
    }
    type RelayLogsStream = BoxStream<'static, Result<wire::LogUp, Status>>;
    async fn relay_logs(&self, _: Request<wire::RelayLogsRequest>) -> Answer<Self::RelayLogsStream> {
        not_here()
    }
}

/// Serves the manager's blobs on loopback until the test's runtime ends.
async fn serve(manager: &Manager) -> Channel {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = listener.local_addr().expect("an address");
    let service = PeerServer::new(Blobs(manager.registry.clone()));
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(
        Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming),
    );
    Endpoint::from_shared(format!("http://{address}"))
        .expect("a URI")
        .connect_lazy()
}

/// Nobody listens there.
fn dead() -> Channel {
    Endpoint::from_static("http://127.0.0.1:1").connect_lazy()
}

fn join(manager: &Manager, member: u64, channel: Channel) {
    manager
        .others
        .0
        .lock()
        .expect("no panic")
        .push((MemberId(member), channel));
}

#[tokio::test]
async fn an_image_reaches_a_majority_and_the_rest_pulls_it() {
    let (one, two, three) = (manager(), manager(), manager());
    let large: Vec<u8> = (0..limits::CHUNK_BYTES * 3 + 7)
        .map(|n| u8::try_from(n % 251).expect("below 251"))
        .collect();
    let small = stored(&one.registry, b"small").await;
    let big = stored(&one.registry, &large).await;
    let blobs = [(small, 5), (big, large.len() as u64)];
    stored(&two.registry, b"small").await;

    join(&one, 2, serve(&two).await);
    join(&one, 3, dead());
    one.registry.replicate(&blobs).await.expect("two of three");
    assert_eq!(two.registry.store().touch(&big), Some(large.len() as u64));

    join(&three, 9, dead());
    join(&three, 2, serve(&two).await);
    let request = FetchBlobRequest {
        digest: big.as_bytes().to_vec(),
        offset: 0,
    };
    let chunks: Vec<_> = three
        .registry
        .fetch(request)
        .await
        .expect("from two")
        .collect()
        .await;
    let read: Vec<u8> = chunks.into_iter().flat_map(|it| it.expect("good").data).collect();
    assert!(read == large);
    assert_eq!(three.registry.store().touch(&big), Some(large.len() as u64));
}

#[tokio::test]
async fn without_a_majority_an_image_is_not_acknowledged() {
    let one = manager();
    let digest = stored(&one.registry, b"x").await;
    one.registry.replicate(&[(digest, 1)]).await.expect("one of one");
    join(&one, 2, dead());
    join(&one, 3, dead());
    let refused = one
        .registry
        .replicate(&[(digest, 1)])
        .await
        .expect_err("one of three");
    assert_eq!((refused.holding, refused.managers, refused.needed), (1, 3, 2));
}

#[tokio::test]
async fn a_peer_that_sends_something_else_is_not_believed() {
    let (one, liar) = (manager(), manager());
    let digest = stored(&liar.registry, b"hello").await;
    std::fs::write(
        liar.folder.path().join("blobs/sha256").join(digest.hex()),
        b"evil!",
    )
    .expect("written");
    join(&one, 2, serve(&liar).await);
    let refused = one.registry.ensure(digest).await.expect_err("not the content");
    assert!(matches!(refused, BlobError::Absent(_)));
    assert_eq!(files(&one), [""; 0]);
}

fn config(diff_ids: &[&str]) -> serde_json::Value {
    serde_json::json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Entrypoint": ["/bin/web"], "Env": ["A=b"], "User": "65532", "Cmd": null },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
}

fn manifest(config: &[u8], layer: &[u8]) -> serde_json::Value {
    let descriptor = |kind: &str, content: &[u8]| {
        serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": Digest::of(content).to_string(), "size": content.len(),
        })
    };
    serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", config),
        "layers": [descriptor("layer.v1.tar", layer)],
    })
}

#[tokio::test]
async fn a_whole_image_is_described() {
    let manager = manager();
    let layer = b"layer".to_vec();
    let config = config(&[&Digest::of(&layer).to_string()])
        .to_string()
        .into_bytes();
    let manifest = manifest(&config, &layer).to_string().into_bytes();
    let (size, named) = (manifest.len() as u64, Digest::of(&manifest));
    for blob in [&config, &manifest] {
        stored(&manager.registry, blob).await;
    }
    let missing = manager
        .registry
        .describe(named, size)
        .await
        .expect_err("no layer yet");
    assert!(matches!(missing, ImageError::Blob(BlobError::Absent(digest)) if digest == Digest::of(&layer)));
    stored(&manager.registry, &layer).await;
    let described = manager.registry.describe(named, size).await.expect("whole");
    assert_eq!(described.blobs.len(), 3);
    assert_eq!(
        described.size,
        (layer.len() + config.len() + manifest.len()) as u64
    );
    assert_eq!(described.run.entrypoint, ["/bin/web"]);
    assert!(
        manager.registry.describe(named, size + 1).await.is_err(),
        "another size"
    );
}

#[test]
fn what_this_cluster_does_not_run_is_refused_with_its_reason() {
    let layer = Digest::of(b"layer").to_string();
    type Edit = fn(&mut serde_json::Value, &mut serde_json::Value);
    let check = |edit: Edit, expected: &str| {
        let mut config = config(&[&layer]);
        let mut manifest = manifest(config.to_string().as_bytes(), b"layer");
        edit(&mut manifest, &mut config);
        let content = manifest.to_string();
        let result = describe(
            Digest::of(content.as_bytes()),
            content.as_bytes(),
            config.to_string().as_bytes(),
        );
        let message = result.expect_err(expected).to_string();
        assert!(message.contains(expected), "'{message}' lacks '{expected}'");
    };
    check(|m, _| m["schemaVersion"] = 1.into(), "not of the OCI kind");
    check(
        |m, _| m["mediaType"] = "application/x".into(),
        "not of the OCI kind",
    );
    check(
        |m, _| m["config"]["mediaType"] = "application/x".into(),
        "its config is a 'application/x'",
    );
    check(
        |m, _| m["config"]["size"] = (limits::MANIFEST_BYTES + 1).into(),
        "the config has",
    );
    check(|m, _| m["config"]["size"] = (-1).into(), "manifest is not valid");
    check(|m, _| m["layers"] = serde_json::json!([]), "it has 0 layers");
    check(
        |m, _| m["layers"] = vec![m["layers"][0].clone(); limits::IMAGE_LAYERS + 1].into(),
        "it has 129 layers",
    );
    check(
        |m, _| m["layers"][0]["mediaType"] = "application/x".into(),
        "a layer is a 'application/x'",
    );
    check(
        |m, _| m["layers"][0]["digest"] = "sha512:00".into(),
        "is not a digest",
    );
    check(
        |m, _| m["layers"][0]["digest"] = "sha256:../../../etc/passwd".into(),
        "is not a digest",
    );
    check(
        |m, _| m["layers"][0]["size"] = (limits::BLOB_BYTES + 1).into(),
        "the limit is",
    );
    check(
        |m, _| {
            let mut twin = m["layers"][0].clone();
            twin["size"] = 6.into();
            m["layers"].as_array_mut().expect("an array").push(twin);
        },
        "is said to have 6 bytes",
    );
    check(|_, c| c["os"] = "windows".into(), "it is for windows/");
    check(|_, c| c["architecture"] = "s390x".into(), "it is for linux/s390x");
    check(
        |_, c| c["rootfs"]["diff_ids"] = serde_json::json!([]),
        "the content of 0 layers",
    );
    check(|_, c| c["rootfs"]["diff_ids"][0] = "x".into(), "is not a digest");
    check(
        |_, c| c["config"]["Entrypoint"] = vec!["x"; limits::ARGUMENTS + 1].into(),
        "its entry point has more",
    );
    check(
        |_, c| c["config"]["Env"] = vec!["A=\0"].into(),
        "its environment has more",
    );
    check(
        |_, c| c["config"]["User"] = "x".repeat(5_000).into(),
        "its user is too long",
    );
}

#[test]
fn a_document_nested_without_end_is_refused() {
    let deep = "[".repeat(100_000);
    assert!(matches!(
        image::Manifest::parse(deep.as_bytes()),
        Err(ImageError::Malformed { .. })
    ));
}
