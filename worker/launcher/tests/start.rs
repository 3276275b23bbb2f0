//! Starting, ending, listing, removing.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(
    clippy::disallowed_methods,
    reason = "a deadline of the test itself; real programs run here, no simulation"
)]

mod support;

use std::time::{Duration, Instant};

use bulkhead_launcher::message::{ExitCause, RefusalCode, Reply, Request, TaskSignal, TaskState};
use support::{Layer, Node, is_root, task};

#[test]
fn a_scratch_image_with_one_file_runs_and_its_output_is_kept() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("t1", vec![Layer::scratch()], &["log", "3"]);
    let (exit, output, error) = node.run(&spec);
    assert_eq!(
        (exit.cause, exit.out_of_memory),
        (ExitCause::Code(0), false),
        "{error}"
    );
    assert_eq!(output, "line 0\nline 1\nline 2\n");
}

#[test]
fn exit_codes_and_signals_are_reported() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let layers = node.spec("x", vec![Layer::scratch()], &[]).layers;
    let mut check = |name: &str, arguments: &[&str], expected: ExitCause| {
        let mut spec = node.spec(name, Vec::new(), arguments);
        spec.layers = layers.clone();
        assert_eq!(node.run(&spec).0.cause, expected, "{name}");
    };
    check("code", &["exit", "42"], ExitCause::Code(42));
    check("crash", &["crash"], ExitCause::Signal(11));
}

#[test]
fn a_task_is_listed_stopped_and_removed() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("s1", vec![Layer::scratch()], &["ignore-term"]);
    let status = node.start_task(&spec).unwrap();
    assert_eq!((status.epoch, &status.state), (7, &TaskState::Running));
    assert_eq!(node.tasks(), [status]);

    let again = node.start_task(&spec).unwrap_err();
    assert_eq!(again.code, RefusalCode::TaskExists);
    assert_eq!(node.remove(&spec.task).unwrap_err().code, RefusalCode::WrongState);
    let layer = Request::RemoveLayer {
        diff_id: spec.layers[0].clone(),
    };
    assert_eq!(node.ask(layer.clone()).unwrap_err().code, RefusalCode::Busy);

    // It does not heed SIGTERM, so that the grace period ends it.
    node.signal(&spec.task, TaskSignal::Term).unwrap();
    assert_eq!(node.wait_exit(&spec.task).cause, ExitCause::Signal(9));
    assert!(matches!(node.tasks()[0].state, TaskState::Exited(_)));
    node.remove(&spec.task).unwrap();
    assert!(node.tasks().is_empty());
    assert_eq!(node.ask(layer).unwrap().0, Reply::Done);
    assert_eq!(
        node.start_task(&spec).unwrap_err().code,
        RefusalCode::UnknownLayer
    );
}

#[test]
fn what_cannot_be_executed_is_told_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let image = Layer::scratch()
        .file("text", b"not a program", 0o644)
        .file("bad", b"\x7fELFnonsense", 0o755);
    let spec = node.spec("n1", vec![image], &[]);
    for program in ["/missing", "/text", "/bad", "missing"] {
        let mut spec = spec.clone();
        spec.argv = vec![program.to_owned()];
        let refusal = node.start_task(&spec).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::NotExecutable, "{program}: {refusal}");
    }
    assert!(node.tasks().is_empty());
    assert_eq!(
        node.ask(Request::Logs { task: task("n1") }).unwrap_err().code,
        RefusalCode::UnknownTask
    );
}

/// A worker container is granted no more than this (chaos/compose), so the launcher must do with it.
#[test]
fn three_capabilities_are_enough_for_the_launcher() {
    if !is_root() {
        return;
    }
    // As in a container: control groups of its own, below the root group, whose folder nobody may write to.
    let own = format!("few-{}", std::process::id());
    let place = |hierarchy: &str| std::path::Path::new("/sys/fs/cgroup").join(hierarchy).join(&own);
    let places = ["memory", "pids", "cpu", "unified", ""].map(place);
    let places: Vec<_> = places
        .iter()
        .filter(|place| std::fs::create_dir(place).is_ok())
        .collect();
    let mut script = String::new();
    for place in places.iter().filter(|place| place.join("cgroup.procs").exists()) {
        script += &format!("echo $$ > {}/cgroup.procs; ", place.display());
    }
    script +=
        "exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+sys_admin,+setuid,+setgid \"$@\"";
    let mut node = Node::start_with(&["sh", "-c", &script, "sh"]);
    // Files that only their owner may read, and a user who is not root of the sandbox.
    let image = Layer::scratch().folder("private", 0o700);
    let mut spec = node.spec("few", vec![image], &["inspect"]);
    spec.workdir = "/private".into();
    spec.hostname = "few".into();
    node.start_with_secrets(&spec, &[("token", b"value")]).unwrap();
    let exit = node.wait_exit(&spec.task);
    let (output, error) = node.log(&spec.task);
    assert_eq!(exit.cause, ExitCause::Code(0), "{error}");
    assert!(output.contains("\"length\":5"), "{output}");
    let diff_id = spec.layers[0].clone();
    node.remove(&spec.task).unwrap();
    assert_eq!(node.ask(Request::RemoveLayer { diff_id }).unwrap().0, Reply::Done);
    drop(node);
    // A killed process leaves its group when the kernel is done with it, shortly after its end was seen.
    let deadline = Instant::now() + Duration::from_secs(10);
    for place in places {
        while let Err(error) = std::fs::remove_dir(place) {
            let busy = error.kind() == std::io::ErrorKind::ResourceBusy;
            assert!(busy && Instant::now() < deadline, "{}: {error}", place.display());
            std::thread::yield_now();
        }
    }
}
