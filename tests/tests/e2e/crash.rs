//! Programs die and come back: nothing acknowledged is lost, and tasks do not notice.

use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_tests::{Lab, eventually, may_run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MANAGERS: &str = "manager-1 manager-2 manager-3";

#[test]
fn all_programs_die_and_nothing_acknowledged_is_lost() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 2);
    lab.pack("web:1");
    lab.secret("password", b"correct horse");
    lab.ok("service create -d --name web --replicas 2 --secret password --publish 8080:80 web:1 -- /bin/bulkhead-probe serve");
    lab.until_running("web", 2);
    until_served(&lab);

    all_managers_at_once(&lab);
    a_worker_program(&lab);
    a_launcher(&lab);
}

/// `kill -9` of all managers while secrets are written.
fn all_managers_at_once(lab: &Lab) {
    let cluster = lab.json("cluster status")["cluster_id"].clone();
    let tasks = lab.pids("web");
    let over = AtomicBool::new(false);
    let acknowledged = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                scope.spawn({
                    let over = &over;
                    move || write_secrets(lab, writer, over)
                })
            })
            .collect();
        eventually("writes are under way", || {
            let count = lab.list("secret ls").len();
            (count > 6).then_some(()).ok_or(format!("{count} secrets"))
        });
        lab.ok(&format!("dev kill {MANAGERS}"));
        lab.ok(&format!("dev start {MANAGERS}"));
        over.store(true, Ordering::Relaxed);
        let lists = writers
            .into_iter()
            .flat_map(|writer| writer.join().expect("a writer"));
        lists.collect::<Vec<String>>()
    });
    lab.until_all_ready();

    assert_eq!(lab.json("cluster status")["cluster_id"], cluster);
    let kept: Vec<String> = lab.ok("secret ls -q").lines().map(str::to_owned).collect();
    assert!(acknowledged.len() >= 6, "{acknowledged:?}");
    for id in &acknowledged {
        assert!(
            kept.contains(id),
            "the secret {id} was acknowledged and is not in {kept:?}"
        );
    }
    assert_eq!(lab.json("service inspect web")[0]["spec"]["replicas"], 2);
    until_served(lab);
    assert_eq!(lab.pids("web"), tasks, "no task was replaced");
}

/// Writes one secret after the other; the ids of those that were acknowledged.
fn write_secrets(lab: &Lab, writer: usize, over: &AtomicBool) -> Vec<String> {
    let mut acknowledged = Vec::new();
    for number in 0.. {
        let answer = lab.feed(&format!("secret create s-{writer}-{number} -"), b"value");
        match answer.code {
            0 => acknowledged.push(answer.out.trim().to_owned()),
            9 => {} // said to be unknown, or that nobody answers
            _ => panic!("{}", answer.whole()),
        }
        if over.load(Ordering::Relaxed) {
            break;
        }
    }
    acknowledged
}

/// The worker program crashes: its unit starts it again, and the task runs on.
fn a_worker_program(lab: &Lab) {
    let tasks = lab.pids("web");
    let before = lab.pid("worker-1", "bulkhead-worker");
    lab.ok("dev kill --agent-only worker-1");
    eventually("another worker program runs", || {
        let now = lab.pid("worker-1", "bulkhead-worker");
        (now != before).then_some(()).ok_or("the old one".into())
    });
    same_tasks(lab, &tasks);
}

/// The launcher is killed, and takes its worker program with it: the next ones adopt the task.
fn a_launcher(lab: &Lab) {
    let tasks = lab.pids("web");
    let before = lab.pid("worker-1", "bulkhead-launcher");
    kill(Pid::from_raw(before), Signal::SIGKILL).expect("the launcher of this test");
    eventually("another launcher runs", || {
        let now = lab.pid("worker-1", "bulkhead-launcher");
        (now != before).then_some(()).ok_or("the old one".into())
    });
    same_tasks(lab, &tasks);
}

fn same_tasks(lab: &Lab, tasks: &std::collections::BTreeMap<String, u64>) {
    lab.until("worker-1", "ready");
    lab.until_running("web", 2);
    until_served(lab);
    assert_eq!(&lab.pids("web"), tasks, "the tasks were adopted");
}

/// Waits until both workers answer, with the secret in its place.
fn until_served(lab: &Lab) {
    for worker in ["worker-1", "worker-2"] {
        eventually(&format!("{worker} answers"), || {
            let value = lab.get(worker, 8080, "/secret/password")?;
            (value == "correct horse").then_some(()).ok_or(value)
        });
    }
}
