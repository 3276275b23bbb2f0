//! The whole program, in this process: what the local socket offers before, during and after a cluster.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_identity::seam::SystemEntropy;
use bulkhead_identity::store::KeyFile;
use bulkhead_identity::{UnlockKey, local};
use bulkhead_manager::program::{self, Config, ProgramError};
use bulkhead_proto::wire::control_client::ControlClient;
use bulkhead_proto::wire::local_client::LocalClient;
use bulkhead_proto::wire::{
    ConfirmUnlockKeyRequest, CreateTicketRequest, GetClusterStatusRequest, GetLocalStatusRequest,
    GetUnlockKeyRequest, InitRequest, JoinProgress, JoinRequest, LeaveRequest, LocalStatus, Phase, Role,
    RotateUnlockKeyRequest, StepState, UnlockRequest, UpdateClusterRequest,
};
use bulkhead_proto::{CODE_KEY, Code};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

/// A bound for a program that hangs, far above what any step takes.
const PATIENCE: Duration = Duration::from_secs(30);

struct Running {
    stop: CancellationToken,
    ended: JoinHandle<Result<(), ProgramError>>,
    socket: PathBuf,
}

fn start(data: &Path) -> Running {
    let stop = CancellationToken::new();
    let socket = data.join("manager.sock");
    let config = Config {
        data: data.to_owned(),
        socket: socket.clone(),
        join: None,
        unlock_key_file: None,
        role: bulkhead_proto::Role::Manager,
    };
    Running {
        ended: tokio::spawn(program::run(config, stop.clone())),
        stop,
        socket,
    }
}

impl Running {
    fn client(&self) -> LocalClient<Channel> {
        LocalClient::new(local::connect(&self.socket))
    }

    async fn status(&self, wanted: impl Fn(&LocalStatus) -> bool) -> LocalStatus {
        let asked = async {
            loop {
                // A connection each time: the program hands it to whoever serves it then.
                if let Ok(status) = self.client().get_status(GetLocalStatusRequest {}).await
                    && wanted(status.get_ref())
                {
                    return status.into_inner();
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, asked).await.expect("the program comes there")
    }

    async fn end(self) {
        self.stop.cancel();
        let ended = timeout(PATIENCE, self.ended)
            .await
            .expect("it ends")
            .expect("no panic");
        ended.expect("it ends well");
    }
}

fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").to_string()
}

fn init(listen: &str) -> InitRequest {
    InitRequest {
        listen: listen.to_owned(),
        advertise: listen.to_owned(),
        name: "first".to_owned(),
        ..Default::default()
    }
}

fn code(status: &Status) -> Option<Code> {
    Code::parse(status.metadata().get(CODE_KEY)?.to_str().ok()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_of_one_begins_and_outlives_its_program() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let first = start(folder.path());
    first
        .status(|status| status.phase() == Phase::Uninitialised)
        .await;
    let address = free_address();
    let made = first
        .client()
        .init(init(&address))
        .await
        .expect("it is free to begin")
        .into_inner();
    assert_eq!(made.name, "first");
    let before = first.status(|status| status.ready && status.leader).await;
    assert_eq!(before.node_id, made.node_id);
    let refused = first
        .client()
        .init(init(&address))
        .await
        .expect_err("there is one already");
    assert_eq!(code(&refused), Some(Code::AlreadyMember));
    first.end().await;

    let again = start(folder.path());
    let after = again.status(|status| status.ready && status.leader).await;
    assert_eq!(
        (after.node_id, after.cluster_id),
        (before.node_id, before.cluster_id)
    );
    again.end().await;
}

async fn ticket(manager: &Running, role: Role, uses: u32) -> String {
    let request = CreateTicketRequest {
        request_id: RandomId::next(),
        ticket_id: RandomId::next(),
        role: role.into(),
        uses,
        ..Default::default()
    };
    let mut control = ControlClient::new(local::connect(&manager.socket));
    control
        .create_ticket(request)
        .await
        .expect("a ticket")
        .into_inner()
        .ticket
}

/// Ids of this process's own requests.
struct RandomId;

impl RandomId {
    fn next() -> Vec<u8> {
        let mut bytes = [0; 16];
        bulkhead_identity::seam::Entropy::fill(&SystemEntropy, &mut bytes).expect("random bytes");
        bytes.to_vec()
    }
}

async fn join(manager: &Running, ticket: &str, address: &str) -> Vec<JoinProgress> {
    let listen = free_address();
    let request = JoinRequest {
        ticket: ticket.to_owned(),
        addresses: vec![address.to_owned()],
        listen: listen.clone(),
        advertise: listen,
        ..Default::default()
    };
    let mut steps = manager
        .client()
        .join(request)
        .await
        .expect("a checklist")
        .into_inner();
    let mut seen = Vec::new();
    while let Ok(Some(step)) = timeout(PATIENCE, steps.message()).await.expect("the next step") {
        seen.push(step);
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn three_managers_join_with_tickets_and_one_may_leave() {
    let folders: Vec<_> = (0..3)
        .map(|_| tempfile::tempdir().expect("a temporary folder"))
        .collect();
    let managers: Vec<Running> = folders.iter().map(|folder| start(folder.path())).collect();
    for manager in &managers {
        manager
            .status(|status| status.phase() == Phase::Uninitialised)
            .await;
    }
    let address = free_address();
    managers[0]
        .client()
        .init(init(&address))
        .await
        .expect("it is free to begin");
    managers[0].status(|status| status.ready).await;
    let ticket = ticket(&managers[0], Role::Manager, 2).await;
    for manager in &managers[1..] {
        let steps = join(manager, &ticket, &address).await;
        let last = steps.last().expect("steps");
        assert_eq!(
            (last.step.as_str(), last.state()),
            ("raft", StepState::Done),
            "{steps:?}"
        );
        manager.status(|status| status.ready).await;
    }
    let mut control = ControlClient::new(local::connect(&managers[2].socket));
    let status = control
        .get_cluster_status(GetClusterStatusRequest {})
        .await
        .expect("it always answers");
    let status = status.into_inner();
    assert_eq!(
        (
            status.members.iter().filter(|it| it.voter).count(),
            status.can_lose
        ),
        (3, 1)
    );

    // A third join on a ticket for two is refused, and nothing is left of it.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let late = start(folder.path());
    late.status(|status| status.phase() == Phase::Uninitialised).await;
    let steps = join(&late, &ticket, &address).await;
    assert_eq!(
        steps.last().map(|it| it.state()),
        Some(StepState::Failed),
        "{steps:?}"
    );
    late.end().await;

    let left = managers[1].client().leave(LeaveRequest::default()).await;
    assert!(left.expect("two of three stay").into_inner().told);
    let free = managers[1]
        .status(|status| status.phase() == Phase::Uninitialised)
        .await;
    assert!(free.detail.contains("kept nothing"), "{}", free.detail);
    let kept = std::fs::read_dir(folders[1].path()).expect("a folder").flatten();
    let kept: Vec<_> = kept.map(|entry| entry.file_name()).collect();
    assert_eq!(kept, ["manager.sock"]);
    let two = async {
        loop {
            let mut control = ControlClient::new(local::connect(&managers[2].socket));
            let status = control.get_cluster_status(GetClusterStatusRequest {}).await;
            if status.is_ok_and(|it| it.get_ref().members.len() == 2) {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, two).await.expect("the others count two");
    for manager in managers {
        manager.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = start(folder.path());
    program
        .status(|status| status.phase() == Phase::Uninitialised)
        .await;
    let refused = |request| async { program.client().init(request).await.expect_err("refused") };
    assert_eq!(code(&refused(init("nowhere")).await), Some(Code::Invalid));
    assert_eq!(code(&refused(init("0.0.0.0:7443")).await), Some(Code::Invalid));
    let busy = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let taken = busy.local_addr().expect("an address").to_string();
    let status = refused(init(&taken)).await;
    assert!(status.message().contains(&taken), "{status}");
    let join = JoinRequest {
        ticket: "SWMTKN-1-x".to_owned(),
        addresses: vec![free_address()],
        listen: free_address(),
        ..Default::default()
    };
    let status = program.client().join(join).await.expect_err("no ticket");
    assert_eq!(code(&status), Some(Code::BadTicket));
    assert!(!folder.path().join("keys").exists(), "a key file is left");
    program
        .status(|status| status.phase() == Phase::Uninitialised)
        .await;
    program.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_program_on_the_folder_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let first = start(folder.path());
    first.status(|_| true).await;
    let second = timeout(PATIENCE, start(folder.path()).ended)
        .await
        .expect("it ends")
        .expect("no panic");
    let error = second.expect_err("the folder is taken");
    assert!(matches!(error, ProgramError::InUse(_)), "{error}");
    first.status(|_| true).await;
    first.end().await;
}

/// Every file below a folder, sockets apart.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        let kind = entry.file_type().expect("a kind");
        if kind.is_dir() {
            found.extend(files(&path));
        } else if kind.is_file() {
            found.push((path.clone(), std::fs::read(&path).expect("readable")));
        }
    }
    found
}

/// What opens this manager's store and envelopes, and speaks for it.
fn secrets(folder: &Path, unlock: &UnlockKey) -> Vec<Vec<u8>> {
    let keys = KeyFile::open(&folder.join("keys"), Some(unlock)).expect("its own unlock key");
    let part = keys.manager.as_ref().expect("a manager's");
    let former = part.former_data_key.iter().map(|key| key.to_vec());
    [
        part.data_key.to_vec(),
        part.envelope_key.to_vec(),
        unlock.expose().to_vec(),
        keys.credentials.key.pkcs8().to_vec(),
    ]
    .into_iter()
    .chain(former)
    .collect()
}

fn assert_on_no_disk(folder: &Path, secrets: &[Vec<u8>]) {
    for (path, content) in files(folder) {
        for secret in secrets {
            let found = content
                .windows(secret.len())
                .any(|window| window == secret.as_slice());
            assert!(!found, "a key stands in {}", path.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_manager_has_no_key_on_disk_and_waits_for_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = start(folder.path());
    program
        .status(|status| status.phase() == Phase::Uninitialised)
        .await;
    let request = InitRequest {
        autolock: true,
        ..init(&free_address())
    };
    let made = program
        .client()
        .init(request)
        .await
        .expect("it begins")
        .into_inner();
    program.status(|status| status.ready).await;
    let first: UnlockKey = made.unlock_key.parse().expect("an unlock key");
    let before = secrets(folder.path(), &first);
    assert_on_no_disk(folder.path(), &before);
    program.end().await;

    let program = start(folder.path());
    let locked = program.status(|status| status.phase() == Phase::Locked).await;
    assert_eq!(
        (locked.locked_with, locked.ready, locked.name.as_str()),
        (1, false, "first")
    );
    let unlock = async |program: &Running, key: &UnlockKey| {
        let unlock_key = key.to_text().to_string();
        program.client().unlock(UnlockRequest { unlock_key }).await
    };
    let wrong = UnlockKey::generate(1, &SystemEntropy).expect("random bytes");
    let refused = unlock(&program, &wrong).await.expect_err("another key");
    assert_eq!(code(&refused), Some(Code::WrongUnlockKey));
    let refused = program
        .client()
        .init(init(&free_address()))
        .await
        .expect_err("locked");
    assert_eq!(code(&refused), Some(Code::Locked));
    let mut control = ControlClient::new(local::connect(&program.socket));
    control
        .get_cluster_status(GetClusterStatusRequest {})
        .await
        .expect_err("a locked manager serves nothing of its cluster");
    unlock(&program, &first).await.expect("its own key");
    program.status(|status| status.ready).await;

    // With the next key everything on disk is sealed anew, and no key of before is of use.
    let mut control = ControlClient::new(local::connect(&program.socket));
    let request = RotateUnlockKeyRequest {
        request_id: RandomId::next(),
    };
    control.rotate_unlock_key(request).await.expect("it is on");
    let shown = control.get_unlock_key(GetUnlockKeyRequest::default()).await;
    let second: UnlockKey = shown
        .expect("a key")
        .into_inner()
        .unlock_key
        .parse()
        .expect("a key");
    let confirm = ConfirmUnlockKeyRequest {
        request_id: RandomId::next(),
        generation: 2,
    };
    control
        .confirm_unlock_key(confirm)
        .await
        .expect("it is the newest");
    let settled = async {
        loop {
            let status = control.get_cluster_status(GetClusterStatusRequest {}).await;
            let status = status.expect("it always answers").into_inner();
            let member = &status.members[0];
            if (member.locked_with, member.resealed) == (2, status.reseal) {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, settled).await.expect("it takes the new key up");
    program.end().await;
    let after = secrets(folder.path(), &second);
    assert_ne!(after[0], before[0], "the data key stayed");
    assert_eq!(after.len(), 4, "the data key of before is still needed");
    assert_on_no_disk(folder.path(), &[before, after].concat());

    let program = start(folder.path());
    program.status(|status| status.phase() == Phase::Locked).await;
    let refused = unlock(&program, &first).await.expect_err("the key of before");
    assert!(refused.message().contains("unlock key 2"), "{refused}");
    unlock(&program, &second).await.expect("its own key");
    program.status(|status| status.ready).await;
    let off = UpdateClusterRequest {
        request_id: RandomId::next(),
        autolock: Some(false),
        ..Default::default()
    };
    let mut control = ControlClient::new(local::connect(&program.socket));
    control.update_cluster(off).await.expect("it may go off");
    let open = async {
        while KeyFile::load(&folder.path().join("keys")).is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, open).await.expect("the file stands open again");
    program.end().await;
    let program = start(folder.path());
    program.status(|status| status.ready).await;
    program.end().await;
}
