//! A whole worker node: the real launcher and the real program, against a manager in this process.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::disallowed_methods, reason = "real programs run here, no simulation")]

mod support;

use bulkhead_identity::local;
use bulkhead_proto::{CODE_KEY, Code, Digest, wire};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use support::{CLOSED, Cluster, Manager, Session, soon};
use tonic::transport::Channel;
use wire::local_client::LocalClient;
use wire::session_down::Message as Down;
use wire::session_up::Message as Up;

const SECRET: &[u8] = b"correct horse battery staple";
const TASK: [u8; 16] = [1; 16];
const PASSWORD: [u8; 16] = [5; 16];
/// The worker's user; no other test's worker has it.
const WORKER_UID: u32 = 0x6fff_fd00;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: the launcher needs root");
    }
    root
}

/// A program of the workspace, built like this one.
fn program(name: &str) -> PathBuf {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", name])
        .status();
    assert!(built.unwrap().success(), "{name} builds");
    Path::new(env!("CARGO_BIN_EXE_bulkhead-worker")).with_file_name(name)
}

/// A launcher with its worker. Dropping it ends both, and whatever a failed test has left running.
struct Node {
    dir: tempfile::TempDir,
    launcher: Child,
    port: u16,
}

impl Node {
    fn start() -> Node {
        let dir = tempfile::Builder::new()
            .prefix("bulkhead-node-")
            .tempdir()
            .unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        let launcher = launch(&dir.path().join("node"));
        Node { dir, launcher, port }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("node")
    }

    /// The local socket, once the program serves it.
    async fn local(&self) -> LocalClient<Channel> {
        let path = self.data().join("worker/worker.sock");
        soon(async {
            loop {
                let mut client = LocalClient::new(local::connect(&path));
                if client.get_status(wire::GetLocalStatusRequest {}).await.is_ok() {
                    return client;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }

    async fn status(&self) -> wire::LocalStatus {
        let mut client = self.local().await;
        client
            .get_status(wire::GetLocalStatusRequest {})
            .await
            .unwrap()
            .into_inner()
    }

    /// The worker's process.
    fn worker(&self) -> u32 {
        let pid = self.launcher.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let is_worker = |pid: &u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.starts_with("bulkhead-worker")
        };
        children
            .split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .find(is_worker)
            .expect("a worker")
    }

    /// SIGTERM, as a service manager ends it.
    fn terminate(&mut self) -> bool {
        signal(self.launcher.id(), Signal::TERM);
        self.launcher.wait().unwrap().success()
    }

    fn start_again(&mut self) {
        self.launcher = launch(&self.data());
    }

    /// What the task answers through the published port.
    async fn get(&self, path: &str) -> String {
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        soon(async {
            loop {
                let request = request.clone();
                let asked = tokio::task::spawn_blocking(move || -> std::io::Result<String> {
                    let mut stream = TcpStream::connect(address)?;
                    stream.write_all(request.as_bytes())?;
                    let mut answer = String::new();
                    stream.read_to_string(&mut answer)?;
                    Ok(answer)
                });
                match asked.await.unwrap() {
                    Ok(answer) if answer.contains("200 OK") => return answer,
                    _ => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        })
        .await
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
        for group in groups(&self.data()) {
            for task in fs::read_dir(&group)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|e| e.path().is_dir())
            {
                let members = fs::read_to_string(task.path().join("cgroup.procs")).unwrap_or_default();
                members
                    .lines()
                    .for_each(|pid| signal(pid.parse().unwrap(), Signal::KILL));
                // A killed process leaves its group a moment later.
                for _ in 0..100 {
                    if fs::remove_dir(task.path()).is_ok() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            let _ = fs::remove_dir(&group);
        }
    }
}

fn signal(pid: u32, signal: Signal) {
    // It may have ended by itself.
    let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal);
}

fn launch(data: &Path) -> Child {
    Command::new(program("bulkhead-launcher"))
        .arg("--data")
        .arg(data)
        .arg("--worker")
        .arg(env!("CARGO_BIN_EXE_bulkhead-worker"))
        .args([
            "--worker-uid",
            &WORKER_UID.to_string(),
            "--",
            "--publish-address",
            "127.0.0.1",
        ])
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

/// The launcher's folders in all hierarchies of control groups.
fn groups(data: &Path) -> Vec<PathBuf> {
    let digest = Digest::of(data.as_os_str().as_encoded_bytes()).hex();
    let name = format!("bulkhead-{}", &digest[..8]);
    let mut found = Vec::new();
    let mut look = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = look.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                match entry.file_name().to_str() == Some(&name) {
                    true => found.push(entry.path()),
                    false => look.push(entry.path()),
                }
            }
        }
    }
    found
}

/// A layer of the probe alone.
fn layer() -> Vec<u8> {
    let probe = fs::read(program("bulkhead-probe")).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o755);
    header.set_size(probe.len() as u64);
    tar.append_data(&mut header, "probe", probe.as_slice()).unwrap();
    tar.into_inner().unwrap()
}

fn image(manager: &Manager) -> wire::Image {
    let tar = layer();
    let digest = manager.add_blob(&tar).as_bytes().to_vec();
    wire::Image {
        id: vec![7; 16],
        name: "web:1".into(),
        layers: vec![wire::ImageLayer {
            digest: digest.clone(),
            size: tar.len() as u64,
            media_type: "application/vnd.oci.image.layer.v1.tar".into(),
            diff_id: digest,
        }],
        config: Some(wire::ImageConfig {
            entrypoint: vec!["/probe".into()],
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn assignments(image: &wire::Image, port: u16, desired: wire::DesiredState) -> wire::Assignments {
    let task = wire::Task {
        id: TASK.into(),
        service_id: vec![9; 16],
        slot: 1,
        fence: 4,
        desired: desired.into(),
        ..Default::default()
    };
    let spec = wire::ServiceSpec {
        image_id: image.id.clone(),
        arguments: vec!["serve".into(), "--port".into(), "80".into()],
        secrets: vec![wire::SecretReference {
            secret_id: PASSWORD.into(),
            name: "password".into(),
        }],
        ports: vec![wire::PublishedPort {
            host: port.into(),
            target: 80,
        }],
        ..Default::default()
    };
    wire::Assignments {
        complete: true,
        sequence: 1,
        index: 2,
        put: vec![wire::AssignedTask {
            task: Some(task),
            spec: Some(spec),
            service_name: "web".into(),
        }],
        secrets: vec![wire::AssignedSecret {
            id: PASSWORD.into(),
            name: "password".into(),
            value: SECRET.to_vec(),
        }],
        images: vec![image.clone()],
        ..Default::default()
    }
}

fn lines(part: &wire::LogUp) -> Vec<String> {
    let text = |line: &wire::LogLine| String::from_utf8_lossy(&line.text).into_owned();
    part.lines.iter().map(text).collect()
}

async fn join(node: &Node, manager: &mut Manager) -> (Vec<String>, Session) {
    let mut client = node.local().await;
    let request = wire::JoinRequest {
        ticket: manager.ticket(),
        addresses: vec![manager.address.to_string()],
        name: "worker-1".into(),
        ..Default::default()
    };
    let mut steps = soon(client.join(request)).await.unwrap().into_inner();
    let collected = async {
        let mut done = Vec::new();
        while let Some(step) = steps.message().await.unwrap() {
            assert_ne!(step.state(), wire::StepState::Failed, "{step:?}");
            if step.state() == wire::StepState::Done {
                done.push(step.step);
            }
        }
        done
    };
    let began = async {
        let session = manager.session().await;
        session.welcome(1, 1).await;
        session.beat();
        session
    };
    let both = async { tokio::join!(collected, began) };
    soon(both).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_runs_a_task_and_keeps_it_through_restarts() {
    if !is_root() {
        return;
    }
    let cluster = Cluster::new();
    let mut manager = Manager::start(&cluster).await;
    let mut node = Node::start();
    assert_eq!(node.status().await.phase(), wire::Phase::Uninitialised);

    // Join, step by step; a wrong ticket before it changes nothing.
    let mut client = node.local().await;
    let wrong = wire::JoinRequest {
        ticket: "BULKHEAD-1-x-y".into(),
        addresses: vec![manager.address.to_string()],
        ..Default::default()
    };
    let mut steps = client.join(wrong).await.unwrap().into_inner();
    let refused = soon(steps.message()).await.expect_err("no ticket");
    assert_eq!(
        refused.metadata().get(CODE_KEY).unwrap(),
        Code::BadTicket.as_str()
    );
    assert_eq!(node.status().await.phase(), wire::Phase::Uninitialised);
    let (done, mut session) = join(&node, &mut manager).await;
    assert_eq!(done.last().map(String::as_str), Some("stream"));
    let status = node.status().await;
    assert_eq!(
        (status.phase(), status.ready, status.name.as_str()),
        (wire::Phase::Member, true, "worker-1")
    );

    // A task with a secret and a port.
    let image = image(&manager);
    let running = assignments(&image, node.port, wire::DesiredState::Running);
    session.say(Down::Assignments(running.clone())).await;
    assert_eq!(session.hear().await, Up::Applied(wire::Applied { sequence: 1 }));
    let started = session.until(&TASK, wire::TaskState::Running).await;
    let profile: serde_json::Value = serde_json::from_slice(&started.profile).unwrap();
    assert!(
        profile["status"]
            .as_array()
            .unwrap()
            .contains(&serde_json::json!(["CapEff", "0000000000000000"]))
    );
    let seen = node.get("/inspect").await;
    assert!(
        seen.contains(&Digest::of(SECRET).hex()),
        "the task has its secret: {seen}"
    );

    // Its log, followed and cancelled.
    let request = wire::LogRequest {
        stream: 8,
        task_id: TASK.into(),
        follow: true,
        ..Default::default()
    };
    session.say(Down::Logs(request)).await;
    node.get("/health").await;
    soon(async {
        loop {
            let part = manager.logs.recv().await.unwrap();
            assert_eq!((part.stream, part.error.as_str()), (8, ""));
            if lines(&part).contains(&"GET /health".to_owned()) {
                break;
            }
        }
    })
    .await;
    session.say(Down::LogCancel(wire::LogCancel { stream: 8 })).await;
    soon(async { while manager.logs.recv().await.unwrap().error != CLOSED {} }).await;

    // The worker is killed: the task runs on, is reported first, and its port answers again.
    signal(node.worker(), Signal::KILL);
    let mut session = manager.session().await;
    assert_eq!(session.hello.task_ids, [TASK.to_vec()]);
    session.welcome(1, 2).await;
    session.beat();
    let reported = session.until(&TASK, wire::TaskState::Running).await;
    assert_eq!(reported.pid, started.pid);
    session.say(Down::Assignments(running.clone())).await;
    assert!(node.get("/health").await.contains("ok"));

    // Launcher and worker end as asked; the task outlives them.
    assert!(node.terminate());
    assert!(Path::new(&format!("/proc/{}", started.pid)).exists());
    node.start_again();
    let mut session = manager.session().await;
    session.welcome(1, 2).await;
    session.beat();
    assert_eq!(
        session.until(&TASK, wire::TaskState::Running).await.pid,
        started.pid
    );
    session.say(Down::Assignments(running)).await;
    assert!(node.get("/health").await.contains("ok"));

    // With a task it does not leave; without one it does, and is as new.
    let mut client = node.local().await;
    let refused = client
        .leave(wire::LeaveRequest { force: false })
        .await
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    let stop = wire::Assignments {
        sequence: 2,
        complete: false,
        ..assignments(&image, node.port, wire::DesiredState::Remove)
    };
    session.say(Down::Assignments(stop)).await;
    session.until(&TASK, wire::TaskState::Shutdown).await;
    let tasks = node.data().join("launcher/tasks");
    soon(async {
        while fs::read_dir(&tasks).unwrap().next().is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    client.leave(wire::LeaveRequest { force: false }).await.unwrap();
    soon(async {
        while node.status().await.phase() != wire::Phase::Uninitialised {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(!node.data().join("worker/node.key").exists());

    // Nothing is left, and the secret was never on the disk.
    assert!(node.terminate());
    for group in groups(&node.data()) {
        let inner = fs::read_dir(&group).unwrap().flatten();
        assert_eq!(
            inner.filter(|e| e.path().is_dir()).count(),
            0,
            "a task's group is left"
        );
    }
    let mut look = vec![node.data()];
    while let Some(folder) = look.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                look.push(entry.path());
            } else if entry.file_type().unwrap().is_file() {
                let content = fs::read(entry.path()).unwrap();
                let found = content.windows(SECRET.len()).any(|window| window == SECRET);
                assert!(!found, "the secret is in {}", entry.path().display());
            }
        }
    }
}
