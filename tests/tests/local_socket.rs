//! What the command says to a program of its own machine, with the programs of this build.

#![allow(
    clippy::disallowed_methods,
    reason = "tests drive real programs: no simulation reads their clock or environment"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The folder of the programs, which `make test` builds before the tests run.
fn program(name: &str) -> PathBuf {
    // target/TRIPLE/debug/deps/test-program
    let test = std::env::current_exe().expect("a test has a path");
    let path = test.ancestors().nth(2).expect("two folders up").join(name);
    assert!(
        path.exists(),
        "{name} is not built; run: cargo build --workspace --bins"
    );
    path
}

/// A manager program without a cluster, in a folder of its own.
struct Manager {
    folder: tempfile::TempDir,
    process: Child,
}

impl Manager {
    fn start(uid: Option<u32>) -> Manager {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("its owner may");
        let data = folder.path().join("data");
        fs::create_dir(&data).expect("a new folder");
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).expect("its owner may");
        let mut command = Command::new(program("bulkhead-manager"));
        command.arg("--data").arg(&data).stderr(Stdio::null());
        if let Some(uid) = uid {
            std::os::unix::fs::chown(&data, Some(uid), Some(uid)).expect("root may");
            command.uid(uid).gid(uid);
        }
        let process = command.spawn().expect("the manager starts");
        let manager = Manager { folder, process };
        let end = Instant::now() + Duration::from_secs(30);
        while !manager.socket().exists() {
            assert!(Instant::now() < end, "the manager opens its socket");
            std::thread::sleep(Duration::from_millis(20));
        }
        manager
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("data/manager.sock")
    }

    /// `bulkhead --socket …` through another program, with contexts in this manager's folder.
    fn command(&self, wrapper: &[&str], words: &[&str]) -> Output {
        let bulkhead = program("bulkhead").into_os_string();
        let line: Vec<_> = wrapper
            .iter()
            .map(|word| (*word).into())
            .chain([bulkhead])
            .collect();
        Command::new(&line[0])
            .args(&line[1..])
            .args(words)
            .arg("--socket")
            .arg(self.socket())
            .env("XDG_CONFIG_HOME", self.folder.path().join("config"))
            .output()
            .expect("the command starts")
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.process.kill(); // it may have ended, which the test noticed
        let _ = self.process.wait();
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").mode() & 0o777
}

#[test]
fn init_writes_the_tickets_that_others_join_with() {
    let manager = Manager::start(None);
    let tickets = manager.folder.path().join("tickets");
    fs::create_dir(&tickets).expect("a new folder");
    let to = tickets.to_string_lossy().into_owned();
    let init = [
        "cluster",
        "init",
        "--listen",
        "127.82.0.1:7443",
        "--tickets-to",
        &to,
    ];
    let made = manager.command(&[], &init);
    assert!(made.status.success(), "{}", errors(&made));
    let files = ["manager", "worker"].map(|role| tickets.join(role).join("ticket"));
    for file in &files {
        let text = fs::read_to_string(file).expect("a ticket");
        assert!(text.starts_with("BULKHEAD-1-") && text.ends_with('\n'));
        assert_eq!(mode(file), 0o600);
        assert_eq!(mode(file.parent().expect("a folder")), 0o700);
    }
    let again = manager.command(&[], &init);
    assert!(!again.status.success() && errors(&again).contains("BH-E0051"));
}

#[test]
fn init_if_needed_makes_up_for_tickets_that_are_missing() {
    let manager = Manager::start(None);
    let tickets = manager.folder.path().join("tickets");
    let to = tickets.to_string_lossy().into_owned();
    let init = [
        "cluster",
        "init",
        "--if-needed",
        "--listen",
        "127.82.0.2:7443",
        "--tickets-to",
        &to,
    ];
    // There is no place for the tickets, but a cluster is made.
    let made = manager.command(&[], &init);
    assert!(errors(&made).contains("BH-E0011"), "{}", errors(&made));
    fs::create_dir(&tickets).expect("a new folder");
    let again = manager.command(&[], &init);
    assert!(again.status.success(), "{}", errors(&again));
    assert!(tickets.join("worker/ticket").exists() && tickets.join("manager/ticket").exists());
}

#[test]
fn a_root_that_may_not_open_other_users_files_can_check_their_programs() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: it needs root");
        return;
    }
    let manager = Manager::start(Some(77_082));
    let root = [
        "setpriv",
        "--bounding-set=-all,+setuid,+setgid",
        "--inh-caps=-all",
    ];
    let closed = manager.command(&root, &["health"]);
    assert!(errors(&closed).contains("BH-E0042"), "{}", errors(&closed));
    let open = manager.command(&root, &["health", "--user", "77082"]);
    assert!(
        errors(&open).contains("not ready (manager uninitialised)"),
        "{}",
        errors(&open)
    );
    let nobody = ["setpriv", "--reuid=77082", "--regid=77082", "--clear-groups"];
    let refused = manager.command(&nobody, &["health", "--user", "77083"]);
    assert!(errors(&refused).contains("where: --user"), "{}", errors(&refused));
}
