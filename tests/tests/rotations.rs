//! Ten rotations of the root in a row under load, each under a leader that is killed: `make test-rotation`.

#![allow(
    clippy::disallowed_methods,
    reason = "tests drive real programs: no simulation reads their clock or environment"
)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use bulkhead_tests::{Lab, eventually, may_run, text};

const ROTATIONS: usize = 10;
const PORT: u16 = 8080;

#[test]
#[ignore = "takes minutes: make test-rotation"]
fn ten_rotations_under_load_fail_no_call_and_restart_no_task() {
    assert!(may_run(), "it needs root");
    let lab = Lab::up(3, 2);
    lab.pack("web:1");
    lab.ok(&format!(
        "service create -d --name web --replicas 4 --publish {PORT}:80 web:1"
    ));
    lab.until_running("web", 4);
    let pids = lab.pids("web");
    let load = Load::default();
    thread::scope(|scope| {
        let over = Over(&load.over);
        for node in ["worker-1", "worker-2"] {
            let (lab, load) = (&lab, &load);
            scope.spawn(move || load.until_over(&load.requests, || lab.get(node, PORT, "/").map(drop)));
        }
        scope.spawn(|| {
            load.until_over(&load.commands, || {
                let stored = lab.feed(
                    &format!("secret create s{} -", load.commands.load(Relaxed)),
                    b"value",
                );
                (stored.code == 0).then_some(()).ok_or_else(|| stored.whole())
            });
        });
        for turn in 0..ROTATIONS {
            rotate(&lab, turn);
            assert_eq!(lab.pids("web"), pids, "a task was started again");
            println!(
                "rotation {}: {} requests and {} commands, {} failed; no task started again",
                turn + 1,
                load.requests.load(Relaxed),
                load.commands.load(Relaxed),
                load.failed.load(Relaxed)
            );
        }
        drop(over);
    });
    assert_eq!(load.failed.load(Relaxed), 0, "calls failed");
    let (requests, commands) = (load.requests.load(Relaxed), load.commands.load(Relaxed));
    assert!(
        requests > 100 && commands > 10,
        "{requests} requests, {commands} commands"
    );
}

/// One rotation, whose leader is killed in one phase or the other.
fn rotate(lab: &Lab, turn: usize) {
    let before = issuer(lab);
    // Refused while the manager that was killed last is not back with a certificate of the present root.
    eventually("a rotation begins", || {
        let begun = lab.run("cluster ca rotate -d");
        (begun.code == 0).then_some(()).ok_or_else(|| begun.whole())
    });
    let wanted = ["bundle", "issue"][turn % 2];
    // A phase may be over before anyone looks: then the leader dies in what follows.
    eventually("the rotation is under way", || {
        let phase = &lab.json("cluster ca status")["phase"];
        (phase == wanted || phase != "bundle")
            .then_some(())
            .ok_or(phase.to_string())
    });
    let leader = lab.leader();
    lab.ok(&format!("dev kill {leader}"));
    eventually("the rotation ends under another leader", || {
        let status = lab.json("cluster ca status");
        status["phase"].is_null().then_some(()).ok_or(status.to_string())
    });
    assert_ne!(issuer(lab), before);
    lab.ok(&format!("dev start {leader}"));
    lab.until_all_ready();
}

fn issuer(lab: &Lab) -> String {
    text(&lab.json("cluster ca status"), "issuer")
}

#[derive(Default)]
struct Load {
    over: AtomicBool,
    requests: AtomicU64,
    commands: AtomicU64,
    failed: AtomicU64,
}

impl Load {
    /// One call after the other, each once.
    fn until_over(&self, count: &AtomicU64, call: impl Fn() -> Result<(), String>) {
        while !self.over.load(Relaxed) {
            if let Err(why) = call() {
                eprintln!("failed: {why}");
                self.failed.fetch_add(1, Relaxed);
            }
            count.fetch_add(1, Relaxed);
        }
    }
}

/// Ends the load, also where an assertion fails: the threads would keep the test for ever.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
