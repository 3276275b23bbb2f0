//! A real launcher with a real probe, driven through its socket as the worker drives it.
#![allow(dead_code, reason = "each test program uses a part of this")]
#![allow(
    unreachable_pub,
    reason = "shared by several test programs, each of which is a crate of its own"
)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use bulkhead_launcher::connection::Connection;
use bulkhead_launcher::log_file::{Decoder, Stream};
use bulkhead_launcher::message::{
    Compression, DiffId, Envelope, Event, ExitRecord, FromLauncher, LayerRecord, Limits, Refusal, Reply,
    Request, SecretFile, TaskId, TaskSignal, TaskSpec, TaskState, TaskStatus, UnpackLayer,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, accept, bind, listen, socket};
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

/// A worker's user that no other test's worker has need not exist; they share no folder.
const WORKER_UID: u32 = 0x6fff_fe00;

/// Whether this can run; says so when not.
pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: the launcher needs root");
    }
    root
}

/// The probe's program, built on first use.
pub fn probe() -> Vec<u8> {
    static PROBE: OnceLock<Vec<u8>> = OnceLock::new();
    let build = || {
        cargo_build(&["-p", "bulkhead-probe"]);
        fs::read(Path::new(env!("CARGO_BIN_EXE_bulkhead-launcher")).with_file_name("bulkhead-probe"))
            .expect("probe")
    };
    PROBE.get_or_init(build).clone()
}

/// Builds something that cargo did not build along, in this program's own profile.
pub fn cargo_build(what: &[&str]) {
    let profile: &[&str] = if cfg!(debug_assertions) {
        &[]
    } else {
        &["--release"]
    };
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet"])
        .args(profile)
        .args(what)
        .status();
    assert!(built.expect("cargo").success(), "{what:?} builds");
}

/// An archive in the making.
pub struct Layer(pub tar::Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Layer {
        Layer(tar::Builder::new(Vec::new()))
    }

    /// One file, the probe, as `/probe`.
    pub fn scratch() -> Layer {
        Layer::new().file("probe", &probe(), 0o755)
    }

    pub fn file(mut self, path: &str, content: &[u8], mode: u32) -> Layer {
        let mut header = header(tar::EntryType::Regular, mode);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    pub fn folder(mut self, path: &str, mode: u32) -> Layer {
        let mut header = header(tar::EntryType::Directory, mode);
        self.0.append_data(&mut header, path, &[][..]).unwrap();
        self
    }

    pub fn symlink(mut self, path: &str, target: &str) -> Layer {
        let mut header = header(tar::EntryType::Symlink, 0o777);
        self.0.append_link(&mut header, path, target).unwrap();
        self
    }

    pub fn hardlink(mut self, path: &str, target: &str) -> Layer {
        let mut header = header(tar::EntryType::Link, 0o644);
        self.0.append_link(&mut header, path, target).unwrap();
        self
    }

    /// An entry with whatever name and header, unchecked.
    pub fn raw(mut self, path: &[u8], content: &[u8], change: impl FnOnce(&mut tar::Header)) -> Layer {
        let mut header = header(tar::EntryType::Regular, 0o644);
        header.set_size(content.len() as u64);
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(0);
    header
}

pub fn diff_id(tar: &[u8]) -> DiffId {
    let hex: String = Sha256::digest(tar)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    DiffId::try_from(format!("sha256:{hex}")).unwrap()
}

/// A launcher with its data folder. Dropping it ends and removes everything, and checks that nothing is left.
pub struct Node {
    pub dir: tempfile::TempDir,
    launcher: Child,
    connection: Connection,
    next: u64,
    replies: VecDeque<(u64, Result<Reply, Refusal>, Vec<OwnedFd>)>,
    events: VecDeque<Event>,
    pub worker_arguments: Vec<String>,
}

impl Node {
    pub fn start() -> Node {
        Node::start_with(&[])
    }

    /// Starts the launcher through another program.
    pub fn start_with(wrapper: &[&str]) -> Node {
        let dir = tempfile::Builder::new()
            .prefix("bulkhead-test-")
            .tempdir()
            .unwrap();
        let (launcher, connection, worker_arguments) = launch(dir.path(), wrapper);
        let (replies, events) = (VecDeque::new(), VecDeque::new());
        Node {
            dir,
            launcher,
            connection,
            next: 0,
            replies,
            events,
            worker_arguments,
        }
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("node")
    }

    pub fn launcher_pid(&self) -> u32 {
        self.launcher.id()
    }

    /// `kill -9`, then a new launcher on the same folder.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.start_again();
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.launcher.kill().unwrap();
        self.launcher.wait().unwrap();
    }

    /// SIGTERM, as a service manager ends it.
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        rustix::process::kill_process(pid(self.launcher.id()), rustix::process::Signal::TERM).unwrap();
        self.launcher.wait().unwrap()
    }

    pub fn start_again(&mut self) {
        let (launcher, connection, _) = launch(self.dir.path(), &[]);
        self.launcher = launcher;
        self.connection = connection;
        self.replies.clear();
        self.events.clear();
    }

    /// The worker is replaced: the next one's connection.
    pub fn replace_worker(&mut self, worker: u32) {
        let listener = listen_for_worker(&self.data().join("worker"));
        rustix::process::kill_process(pid(worker), rustix::process::Signal::KILL).unwrap();
        let (connection, _) = accept_worker(&listener);
        self.connection = connection;
        self.replies.clear();
    }

    pub fn send(&mut self, request: Request, descriptors: &[&OwnedFd]) -> u64 {
        self.next += 1;
        let descriptors: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
        self.connection
            .send(
                &Envelope {
                    id: self.next,
                    request,
                },
                &descriptors,
            )
            .unwrap();
        self.next
    }

    fn receive(&mut self) {
        let timeout = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let ready = poll(
            &mut [PollFd::new(&self.connection, PollFlags::IN)],
            Some(&timeout),
        )
        .unwrap();
        assert_eq!(ready, 1, "the launcher says something");
        let (message, descriptors) = self.connection.receive().unwrap().expect("the launcher runs");
        match message {
            FromLauncher::Reply { id, result } => self.replies.push_back((id, result, descriptors)),
            FromLauncher::Event(event) => self.events.push_back(event),
        }
    }

    pub fn reply(&mut self, id: u64) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        loop {
            if let Some(at) = self.replies.iter().position(|(other, _, _)| *other == id) {
                let (_, result, descriptors) = self.replies.remove(at).unwrap();
                return result.map(|reply| (reply, descriptors));
            }
            self.receive();
        }
    }

    pub fn ask(&mut self, request: Request) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        let id = self.send(request, &[]);
        self.reply(id)
    }

    pub fn unpack_as(
        &mut self,
        blob: &[u8],
        diff_id: DiffId,
        compression: Compression,
    ) -> Result<LayerRecord, Refusal> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(blob).unwrap();
        file.rewind().unwrap();
        let layer = UnpackLayer {
            diff_id,
            compression,
            size: blob.len() as u64,
        };
        let id = self.send(Request::UnpackLayer(layer), &[&file.into()]);
        match self.reply(id)?.0 {
            Reply::Layer(record) => Ok(record),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub fn unpack(&mut self, layer: Layer) -> Result<LayerRecord, Refusal> {
        let tar = layer.bytes();
        self.unpack_as(&tar, diff_id(&tar), Compression::None)
    }

    /// A spec that runs the probe from these layers.
    pub fn spec(&mut self, name: &str, layers: Vec<Layer>, arguments: &[&str]) -> TaskSpec {
        let layers = layers
            .into_iter()
            .map(|layer| self.unpack(layer).expect("unpack").diff_id)
            .collect();
        TaskSpec {
            task: task(name),
            epoch: 7,
            layers,
            argv: ["/probe"]
                .iter()
                .chain(arguments)
                .map(|s| (*s).to_owned())
                .collect(),
            env: Vec::new(),
            user: String::new(),
            workdir: String::new(),
            hostname: "probe-host".to_owned(),
            tmpfs: Vec::new(),
            limits: Limits {
                memory_bytes: 64 << 20,
                pids: 64,
                ..Limits::default()
            },
            secrets: Vec::new(),
            stop_grace_ms: 300,
        }
    }

    pub fn start_task(&mut self, spec: &TaskSpec) -> Result<TaskStatus, Refusal> {
        self.start_with_secrets(spec, &[])
    }

    pub fn start_with_secrets(
        &mut self,
        spec: &TaskSpec,
        values: &[(&str, &[u8])],
    ) -> Result<TaskStatus, Refusal> {
        let mut spec = spec.clone();
        spec.secrets = values
            .iter()
            .map(|(name, value)| SecretFile {
                name: (*name).to_owned(),
                size: u32::try_from(value.len()).unwrap(),
            })
            .collect();
        let id = if values.is_empty() {
            self.send(Request::Start(Box::new(spec)), &[])
        } else {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            let id = self.send(Request::Start(Box::new(spec)), &[&theirs.into()]);
            values
                .iter()
                .for_each(|(_, value)| ours.write_all(value).unwrap());
            id
        };
        match self.reply(id)?.0 {
            Reply::Started(status) => Ok(status),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub fn wait_exit(&mut self, id: &TaskId) -> ExitRecord {
        loop {
            let found = self.events.iter().find_map(|event| match event {
                Event::Exited { task, epoch: 7, exit } if task == id => Some(exit.clone()),
                Event::Exited { .. } => None,
            });
            if let Some(exit) = found {
                return exit;
            }
            self.receive();
        }
    }

    /// Starts, waits for the end, gives output and error stream.
    pub fn run(&mut self, spec: &TaskSpec) -> (ExitRecord, String, String) {
        self.start_task(spec)
            .unwrap_or_else(|refusal| panic!("start: {refusal}"));
        let exit = self.wait_exit(&spec.task);
        let (output, error) = self.log(&spec.task);
        (exit, output, error)
    }

    /// The probe's own view.
    pub fn inspect_inside(&mut self, spec: &TaskSpec) -> serde_json::Value {
        let (exit, output, error) = self.run(spec);
        serde_json::from_str(&output).unwrap_or_else(|_| panic!("{exit:?} {output} {error}"))
    }

    pub fn log(&mut self, id: &TaskId) -> (String, String) {
        let (reply, files) = self.ask(Request::Logs { task: id.clone() }).unwrap();
        assert_eq!(reply, Reply::Logs);
        let (mut output, mut error) = (Vec::new(), Vec::new());
        for file in files {
            let mut bytes = Vec::new();
            File::from(file).read_to_end(&mut bytes).unwrap();
            for record in Decoder::default().push(&bytes).unwrap() {
                match record.stream {
                    Stream::Output => output.extend(record.content),
                    Stream::Error => error.extend(record.content),
                    Stream::Lost | Stream::Continued | Stream::End => {}
                }
            }
        }
        (
            String::from_utf8_lossy(&output).into_owned(),
            String::from_utf8_lossy(&error).into_owned(),
        )
    }

    pub fn signal(&mut self, id: &TaskId, signal: TaskSignal) -> Result<(), Refusal> {
        self.ask(Request::Signal {
            task: id.clone(),
            signal,
        })
        .map(|_| ())
    }

    pub fn tasks(&mut self) -> Vec<TaskStatus> {
        match self.ask(Request::List { after: None }).unwrap().0 {
            Reply::Tasks { tasks, more: false } => tasks,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub fn remove(&mut self, id: &TaskId) -> Result<(), Refusal> {
        self.ask(Request::Remove { task: id.clone() }).map(|_| ())
    }

    /// Ends and removes all tasks.
    pub fn clear(&mut self) {
        for status in self.tasks() {
            if !matches!(status.state, TaskState::Exited(_)) {
                let _ = self.signal(&status.task, TaskSignal::Kill); // it may end by itself
                self.wait_exit(&status.task);
            }
            self.remove(&status.task).unwrap();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Best effort: whatever is left, its groups know.
            for entry in groups_of(&self.data()) {
                for pid in fs::read_to_string(entry.join("cgroup.procs"))
                    .unwrap_or_default()
                    .lines()
                {
                    if let Some(pid) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
                        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    }
                }
            }
            let _ = self.launcher.kill();
            let _ = self.launcher.wait();
            return;
        }
        self.clear();
        assert!(
            fs::read_dir(self.data().join("launcher/tasks"))
                .unwrap()
                .next()
                .is_none(),
            "no task folder is left"
        );
        let data = self.data();
        assert_eq!(
            groups_of(&data),
            Vec::<PathBuf>::new(),
            "no control group is left"
        );
        self.terminate();
        assert_eq!(traces_of(&data), Vec::<PathBuf>::new(), "nothing is left of it");
    }
}

pub fn task(name: &str) -> TaskId {
    TaskId::try_from(name.to_owned()).unwrap()
}

fn pid(number: u32) -> rustix::process::Pid {
    rustix::process::Pid::from_raw(number.cast_signed()).unwrap()
}

/// The launcher's folders in all hierarchies.
pub fn launcher_groups(data: &Path) -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let hash = Sha256::digest(data.as_os_str().as_bytes());
    let name = format!(
        "bulkhead-{:02x}{:02x}{:02x}{:02x}",
        hash[0], hash[1], hash[2], hash[3]
    );
    let mut found = Vec::new();
    let mut look = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = look.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_str() == Some(&name) {
                    found.push(entry.path());
                } else {
                    look.push(entry.path());
                }
            }
        }
    }
    found
}

/// What a launcher keeps outside of its folder: groups, and claims of ids.
pub fn traces_of(data: &Path) -> Vec<PathBuf> {
    let claims = fs::read_dir("/run/bulkhead/id-ranges")
        .into_iter()
        .flatten()
        .flatten();
    let its_own = |claim: &PathBuf| fs::read_to_string(claim).is_ok_and(|owner| Path::new(&owner) == data);
    let claims = claims.map(|entry| entry.path()).filter(its_own);
    launcher_groups(data).into_iter().chain(claims).collect()
}

fn groups_of(data: &Path) -> Vec<PathBuf> {
    let inside = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten();
    launcher_groups(data)
        .into_iter()
        .flat_map(inside)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn listen_for_worker(folder: &Path) -> OwnedFd {
    let path = folder.join("test.sock");
    let _ = fs::remove_file(&path); // of an earlier worker
    let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    std::os::unix::fs::chown(&path, Some(WORKER_UID), Some(WORKER_UID)).unwrap();
    listen(&listener, 1).unwrap();
    listener
}

fn accept_worker(listener: &OwnedFd) -> (Connection, Vec<String>) {
    let timeout = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout)).unwrap();
    assert_eq!(ready, 1, "the launcher starts its worker");
    let test = accept(listener).unwrap();
    poll(&mut [PollFd::new(&test, PollFlags::IN)], Some(&timeout)).unwrap();
    let (arguments, descriptors) = Connection::from_descriptor(test)
        .unwrap()
        .receive()
        .unwrap()
        .unwrap();
    let socket = descriptors.into_iter().next().unwrap();
    (Connection::from_descriptor(socket).unwrap(), arguments)
}

/// The command of a launcher for this folder.
pub fn launcher_command(data: &Path) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_bulkhead-launcher"));
    let worker = program.parent().unwrap().join("examples/hand_over");
    let mut command = Command::new(program);
    command.arg("--data").arg(data).arg("--worker").arg(worker);
    command
        .args(["--worker-uid", &WORKER_UID.to_string()])
        .stdin(Stdio::null());
    command
}

fn launch(dir: &Path, wrapper: &[&str]) -> (Child, Connection, Vec<String>) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let data = dir.join("node");
    // The launcher makes this folder itself; here the socket must be there before the worker is.
    let worker = data.join("worker");
    if !worker.exists() {
        fs::create_dir_all(&worker).unwrap();
        std::os::unix::fs::chown(&worker, Some(WORKER_UID), Some(WORKER_UID)).unwrap();
        fs::set_permissions(&worker, fs::Permissions::from_mode(0o700)).unwrap();
    }
    let listener = listen_for_worker(&worker);
    let mut command = launcher_command(&data);
    if let Some((program, arguments)) = wrapper.split_first() {
        let mut wrapped = Command::new(program);
        wrapped
            .args(arguments)
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null());
        command = wrapped;
    }
    let launcher = command.spawn().expect("start the launcher");
    let (connection, arguments) = accept_worker(&listener);
    (launcher, connection, arguments)
}
