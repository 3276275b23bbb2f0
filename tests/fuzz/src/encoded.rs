//! Parsers of DER, protobuf messages and files.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use bulkhead_identity::backup::{Opener, Sealer, read_header};
use bulkhead_identity::recovery::RecoveryKey;
use bulkhead_identity::seam::SystemEntropy;
use bulkhead_identity::store::KeyFile;
use bulkhead_identity::{Authority, Bundle, Certificate, Credentials, Key, Subject, csr as request_file};
use bulkhead_launcher::log_file;
use bulkhead_launcher::unpack::Limits;
use bulkhead_launcher::unpack::extract::extract;
use bulkhead_launcher::unpack::tar::Archive;
use bulkhead_manager::ca::admission::Ask;
use bulkhead_manager::dispatcher::reports::check;
use bulkhead_manager::validate;
use bulkhead_proto::wire::{self, BackupHeader};
use bulkhead_proto::{ClusterId, NodeId, Role};
use bulkhead_raft::state::State;
use prost::Message;

/// A day of the year 2026, in milliseconds.
const NOW_MS: i64 = 1_795_000_000_000;
const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

fn authority() -> Authority {
    Authority::generate(CLUSTER, NOW_MS).expect("a root")
}

fn issued(authority: &Authority, key: &Key) -> Vec<u8> {
    let subject = Subject {
        cluster: CLUSTER,
        node: NodeId::from_bytes([1; 16]),
        role: Role::Worker,
    };
    let public = request_file::public_key(&key.csr().expect("a request")).expect("our own");
    let issued = authority.issue(&subject, &public, NOW_MS, NOW_MS + 3_600_000);
    issued.expect("a certificate")
}

pub(crate) fn csr(bytes: &[u8]) {
    if let Ok(key) = request_file::public_key(bytes) {
        let again = request_file::PublicKey::from_spki(key.spki_der()).expect("it was accepted");
        assert_eq!(again.key_id(), key.key_id());
    }
}

pub(crate) fn csrs() -> Vec<Vec<u8>> {
    vec![Key::generate().expect("a key").csr().expect("a request")]
}

pub(crate) fn certificate(bytes: &[u8]) {
    if let Ok(certificate) = Certificate::from_der(bytes) {
        assert_eq!(certificate.der(), bytes, "nothing may follow it");
    }
}

pub(crate) fn certificates() -> Vec<Vec<u8>> {
    vec![issued(&authority(), &Key::generate().expect("a key"))]
}

/// The first two bytes are the length of the first root; what follows is the second.
pub(crate) fn bundle(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return;
    };
    let (one, two) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
    let ders: Vec<Vec<u8>> = [one, two]
        .into_iter()
        .filter(|it| !it.is_empty())
        .map(<[u8]>::to_vec)
        .collect();
    if let Ok(bundle) = Bundle::from_ders(ders) {
        assert!(Bundle::from_ders(bundle.ders()).is_ok());
    }
}

pub(crate) fn bundles() -> Vec<Vec<u8>> {
    let (one, two) = (authority(), authority());
    let length = u16::try_from(one.root_der().len()).expect("short").to_le_bytes();
    vec![
        [&length, one.root_der()].concat(),
        [&length, one.root_der(), two.root_der()].concat(),
    ]
}

pub(crate) fn key_file(bytes: &[u8]) {
    let _damaged = KeyFile::parse(bytes, Path::new("key"), None);
}

pub(crate) fn key_files() -> Vec<Vec<u8>> {
    let (authority, key) = (authority(), Key::generate().expect("a key"));
    let der = issued(&authority, &key);
    let file = KeyFile {
        credentials: std::sync::Arc::new(Credentials {
            key,
            certificate: Certificate::from_der(&der).expect("our own"),
            chain: Vec::new(),
            bundle: Bundle::from_ders(vec![authority.root_der().to_vec()]).expect("our own"),
        }),
        name: "worker-1".into(),
        managers: Vec::new(),
        manager: None,
        lock: None,
        standby: None,
    };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("key");
    file.save(&path).expect("written");
    vec![std::fs::read(path).expect("there")]
}

fn recovery_key() -> RecoveryKey {
    RecoveryKey::from_wire(&[9; 32]).expect("long enough")
}

pub(crate) fn backup(bytes: &[u8]) {
    let _header = read_header(bytes);
    let key = recovery_key();
    let mut opener = Opener::new(&key);
    if bytes
        .chunks(100)
        .try_for_each(|piece| opener.push(piece).map(drop))
        .is_ok()
    {
        let _cut = opener.finish();
    }
}

pub(crate) fn backups() -> Vec<Vec<u8>> {
    let header = BackupHeader {
        cluster_id: vec![7; 16],
        recovery_key: recovery_key().public().to_vec(),
        ..BackupHeader::default()
    };
    let (mut sealer, mut bytes) = Sealer::begin(&header, &SystemEntropy).expect("a key");
    bytes.extend(sealer.chunk(b"one", false));
    bytes.extend(sealer.chunk(b"two", true));
    vec![bytes]
}

/// The first byte chooses the kind of request; what follows is one.
pub(crate) fn request(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else {
        return;
    };
    let read = READ[usize::from(*kind) % READ.len()];
    read(rest);
}

/// What decodes is written as the same bytes again, however often. (Messages are not compared: a number that is none
/// differs from itself.)
fn read<M: Message + Default>(bytes: &[u8]) {
    if let Ok(message) = M::decode(bytes) {
        let written = message.encode_to_vec();
        let again = M::decode(&*written).expect("it was written just now");
        assert_eq!(again.encode_to_vec(), written);
    }
}

macro_rules! every_request {
    ($($name:ident)*) => { &[$(read::<wire::$name>),*] };
}

/// What each method of each service gets.
const READ: &[fn(&[u8])] = every_request!(
    AttendRequest CancelRotationRequest ConfirmUnlockKeyRequest CreateBackupRequest CreateImageRequest CreateSecretRequest
    CreateServiceRequest CreateTicketRequest EnrolRequest ExplainRequest FetchBlobRequest ForwardRequest
    GetClusterStatusRequest GetExposureRequest GetLocalStatusRequest GetRootRequest GetRotationRequest GetUnlockKeyRequest
    HasBlobRequest InitRequest IssueOperatorRequest JoinRaftRequest JoinRequest LeaveRaftRequest LeaveRequest ListAuditRequest
    ListRequest ListTasksRequest LivenessReport LogUp LogsRequest MoveSignerRequest OfferBlobRequest PushBlobRequest RaftMessage
    ReadIndexRequest RecoverRequest RegisterEnvelopeKeyRequest RelayLogsRequest RemoveRequest RenewRequest RestoreRequest
    ReturnRequest RevokeAllTicketsRequest RotateKeyRingRequest RotateRootRequest RotateUnlockKeyRequest SessionUp
    SetRecoveryKeyRequest TakeBackRequest UnlockRequest UpdateClusterRequest UpdateNodeRequest UpdateServiceRequest WatchRequest
    WithdrawRequest
);

pub(crate) fn requests() -> Vec<Vec<u8>> {
    let request = wire::CreateServiceRequest {
        request_id: vec![1; 16],
        spec: Some(service()),
        ..wire::CreateServiceRequest::default()
    };
    vec![[vec![6], request.encode_to_vec()].concat()]
}

pub(crate) fn spec(bytes: &[u8]) {
    if let Ok(spec) = wire::ServiceSpec::decode(bytes) {
        let mistakes = validate::spec(&spec).err().unwrap_or_default();
        assert!(mistakes.len() < 10_000);
    }
}

fn service() -> wire::ServiceSpec {
    wire::ServiceSpec {
        name: "web".into(),
        ..wire::ServiceSpec::default()
    }
}

pub(crate) fn specs() -> Vec<Vec<u8>> {
    vec![service().encode_to_vec()]
}

pub(crate) fn enrolment(bytes: &[u8]) {
    if let Ok(request) = wire::EnrolRequest::decode(bytes) {
        let _refused = Ask::from_wire(request, Some(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }
}

pub(crate) fn enrolments() -> Vec<Vec<u8>> {
    let request = wire::EnrolRequest {
        ticket_secret: vec![1; 16],
        csr: Key::generate().expect("a key").csr().expect("a request"),
        role: wire::Role::Manager.into(),
        name: "m".into(),
        advertise: "10.0.0.1:7443".into(),
        ..wire::EnrolRequest::default()
    };
    vec![request.encode_to_vec()]
}

pub(crate) fn reports(bytes: &[u8]) {
    if let Ok(batch) = wire::StatusBatch::decode(bytes) {
        let _refused = check(&State::default(), NodeId::from_bytes([1; 16]), batch);
    }
}

pub(crate) fn all_reports() -> Vec<Vec<u8>> {
    let report = wire::TaskReport {
        task_id: vec![2; 16],
        status: Some(wire::TaskStatus {
            state: wire::TaskState::Running.into(),
            ..wire::TaskStatus::default()
        }),
    };
    let batch = wire::StatusBatch {
        reports: vec![report],
        ..wire::StatusBatch::default()
    };
    vec![batch.encode_to_vec()]
}

/// What an archive may take here: little, so that a bomb shows.
const LITTLE: Limits = Limits {
    bytes: 1 << 20,
    archive_bytes: 1 << 20,
    entries: 200,
    depth: 20,
    path_bytes: 4_095,
    cpu_seconds: 5,
    memory_bytes: 64 << 20,
};

/// Unpacks an archive into a folder whose neighbours must not change.
pub(crate) fn layer(bytes: &[u8]) {
    use std::os::fd::AsFd as _;
    let below = tempfile::tempdir().expect("a folder");
    let made: Vec<std::fs::File> = ["root", "mask"]
        .into_iter()
        .map(|name| {
            let path = below.path().join(name);
            std::fs::create_dir(&path).expect("a folder");
            std::fs::File::open(path).expect("just made")
        })
        .collect();
    let _hostile = extract(
        &mut Archive::new(bytes),
        made[0].as_fd(),
        made[1].as_fd(),
        &LITTLE,
    );
    let outside = std::fs::read_dir(below.path()).expect("there").count();
    assert_eq!(outside, 2, "something was written beside the layer");
}

pub(crate) fn layers() -> Vec<Vec<u8>> {
    let header = |name: &str, kind: u8, link: &str, size: usize| {
        let mut block = [0_u8; 512];
        let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, "0000644");
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{size:011o}"));
        put(136, "00000000000");
        put(157, link);
        put(257, "ustar");
        put(263, "00");
        block[156] = kind;
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    };
    let file = [&header("a/b", b'0', "", 3)[..], b"abc", &[0; 509]].concat();
    let folder = header("a/", b'5', "", 0).to_vec();
    let link = header("a/c", b'2', "../../../etc", 0).to_vec();
    let through = [&header("a/c/d", b'0', "", 3)[..], b"abc", &[0; 509]].concat();
    let hard = header("e", b'1', "a/b", 0).to_vec();
    let whiteout = header("a/.wh.f", b'0', "", 0).to_vec();
    let end = vec![0; 1024];
    vec![
        [folder.clone(), file.clone(), hard, whiteout, end.clone()].concat(),
        [folder, link, through, end.clone()].concat(),
        [file, end].concat(),
    ]
}

pub(crate) fn task_log(bytes: &[u8]) {
    let mut decoder = log_file::Decoder::default();
    let mut records = 0;
    for piece in bytes.chunks(64) {
        match decoder.push(piece) {
            Ok(more) => records += more.len(),
            Err(_) => return,
        }
    }
    assert!(records <= bytes.len());
}

pub(crate) fn task_logs() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a folder");
    let opened = std::fs::File::open(folder.path()).expect("there");
    let mut writer = log_file::LogWriter::create(opened.into(), 1 << 16).expect("a log");
    writer.append(log_file::Stream::Output, 7, b"one line");
    drop(writer);
    let files = std::fs::read_dir(folder.path()).expect("there").flatten();
    files.filter_map(|file| std::fs::read(file.path()).ok()).collect()
}

pub(crate) fn transactions() -> Vec<Vec<u8>> {
    let change = wire::Change {
        change: Some(wire::change::Change::Create(wire::Object::default())),
    };
    let transaction = wire::Transaction {
        request_id: vec![1; 16],
        changes: vec![change],
        ..wire::Transaction::default()
    };
    vec![transaction.encode_to_vec()]
}

pub(crate) fn raft_messages() -> Vec<Vec<u8>> {
    bulkhead_raft::transport::some_of_each_message()
}
