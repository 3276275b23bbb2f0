//! Launcher and worker may go and come back; tasks do not notice.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use bulkhead_launcher::message::{ExitCause, Reply, Request, TaskSignal, TaskState};
use std::os::unix::fs::MetadataExt;
use support::{Layer, Node, is_root, launcher_command};

#[test]
fn a_task_survives_the_launchers_death_and_is_adopted() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("survivor", vec![Layer::scratch()], &["ignore-term"]);
    let short = node.spec("short", vec![Layer::scratch()], &["sleep", "1"]);
    let before = node.start_task(&spec).unwrap();
    node.start_task(&short).unwrap();
    node.kill_and_restart();
    let after = node.tasks();
    assert!(after.contains(&before), "{after:?}");
    // Its supervisor still answers, and its end is still heard.
    let sockets = node
        .ask(Request::Sockets {
            task: spec.task.clone(),
            count: 1,
        })
        .unwrap();
    assert_eq!((sockets.0, sockets.1.len()), (Reply::Sockets, 1));
    node.signal(&spec.task, TaskSignal::Kill).unwrap();
    assert_eq!(node.wait_exit(&spec.task).cause, ExitCause::Signal(9));
    assert_eq!(node.log(&spec.task).0, "ready\n");
    // One that ends by itself after the adoption.
    let ended = |node: &mut Node| {
        node.tasks()
            .into_iter()
            .any(|t| t.task == short.task && matches!(t.state, TaskState::Exited(_)))
    };
    if !ended(&mut node) {
        assert_eq!(node.wait_exit(&short.task).cause, ExitCause::Code(0));
    }
}

#[test]
fn an_end_that_nobody_watched_is_not_lost() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("alone", vec![Layer::scratch()], &["ignore-term"]);
    let status = node.start_task(&spec).unwrap();
    assert!(node.terminate().success());
    let pid = rustix::process::Pid::from_raw(status.pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let record = node.data().join("launcher/tasks/alone/exit");
    while !record.exists() {
        std::thread::yield_now();
    }
    node.start_again();
    match &node.tasks()[0].state {
        TaskState::Exited(exit) => assert_eq!(exit.cause, ExitCause::Signal(9)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_worker_is_unprivileged_and_a_new_one_finds_the_tasks() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("kept", vec![Layer::scratch()], &["sleep"]);
    let before = node.start_task(&spec).unwrap();
    let worker = worker_of(node.launcher_pid());
    let status = std::fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
    let line = |name: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(line("Uid:"), (0x6fff_fe00).to_string());
    assert_eq!(
        (line("CapEff:"), line("CapBnd:")),
        ("0000000000000400".into(), "0000000000000400".into())
    );
    assert_eq!(line("NoNewPrivs:"), "1");
    let data = node
        .worker_arguments
        .iter()
        .skip_while(|a| *a != "--data")
        .nth(1)
        .unwrap();
    assert_eq!(std::fs::metadata(data).unwrap().mode() & 0o777, 0o700);
    node.replace_worker(worker);
    assert_eq!(node.tasks(), [before]);
}

fn worker_of(launcher: u32) -> u32 {
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    let is_worker = |pid: &&str| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.windows(9).any(|part| part == b"hand_over")
    };
    children
        .split_whitespace()
        .find(is_worker)
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn two_launchers_on_one_folder_are_refused() {
    if !is_root() {
        return;
    }
    let node = Node::start();
    let second = launcher_command(&node.data()).output().unwrap();
    assert!(!second.status.success());
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(error.contains("another launcher uses"), "{error}");
}

#[test]
fn what_a_dead_launcher_left_can_be_forgotten() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("left", vec![Layer::scratch()], &["ignore-term"]);
    let task = node.start_task(&spec).unwrap();
    let forget = || launcher_command(&node.data()).arg("--forget").output().unwrap();
    let refused = forget();
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && error.contains("another launcher uses"),
        "{error}"
    );
    node.kill();
    assert!(!support::traces_of(&node.data()).is_empty());
    for _again in 0..2 {
        let done = launcher_command(&node.data()).arg("--forget").output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(
            !std::path::Path::new(&format!("/proc/{}", task.pid)).exists(),
            "its task is gone"
        );
        assert_eq!(support::traces_of(&node.data()), Vec::<std::path::PathBuf>::new());
    }
    // A mistyped folder is no success, and stays as it is.
    let other = node.dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let before = std::fs::metadata(&other).unwrap();
    for wrong in [&other, &other.join("none")] {
        let refused = launcher_command(wrong).arg("--forget").output().unwrap();
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && error.contains("no launcher's data folder"),
            "{error}"
        );
    }
    assert_eq!(std::fs::metadata(&other).unwrap().mode(), before.mode());
    assert_eq!(std::fs::read_dir(&other).unwrap().count(), 0);
    node.start_again();
    assert_eq!(node.tasks(), []);
}

#[test]
fn ids_are_unique_while_used_and_free_after() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("a", vec![Layer::scratch()], &["sleep"]);
    let mut other = spec.clone();
    other.task = support::task("b");
    let mut bases = Vec::new();
    for spec in [&spec, &other] {
        node.start_task(spec).unwrap();
        let Reply::Profile(profile) = node
            .ask(Request::Inspect {
                task: spec.task.clone(),
            })
            .unwrap()
            .0
        else {
            panic!("not a profile")
        };
        bases.push(profile.uid_map[0][1]);
    }
    assert_ne!(bases[0], bases[1]);
}
