//! The root rolls while the cluster works, and who was away comes back.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use bulkhead_tests::{Follow, Lab, eventually, may_run, text};

#[test]
fn the_root_rolls_under_load_and_who_was_away_comes_back() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 3);
    lab.pack("web:1");
    lab.ok("service create -d --name web --replicas 2 --publish 8080:80 web:1");
    lab.until_running("web", 2);
    lab.ok("operator issue idle");
    certificates_last_as_long_as_the_cluster_says(&lab);

    // One worker without a task is off meanwhile.
    let used: Vec<String> = lab.running("web").iter().map(|task| text(task, "node")).collect();
    let away = lab
        .nodes()
        .into_iter()
        .find(|node| node.starts_with("worker") && !used.contains(node))
        .expect("a worker without a task");
    lab.ok(&format!("dev kill {away}"));
    eventually("it counts as down", || {
        let down = lab.list("node ls --filter state=down");
        (down.len() == 1).then_some(()).ok_or_else(|| lab.ok("node ls"))
    });
    let (pids, before) = (lab.pids("web"), issuer(&lab));
    let mut log = Follow::start(&mut lab.command("service logs -f web"));
    log.until("listening on port 80");

    let (over, writes) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let n = writes.fetch_add(1, Ordering::Relaxed);
                lab.secret(&format!("during-{n}"), b"value");
            }
        });
        let rotated = lab.run("cluster ca rotate");
        over.store(true, Ordering::Relaxed);
        assert_eq!(rotated.code, 0, "{}", rotated.whole());
        rotated.says("no rotation is under way");
    });
    assert!(writes.load(Ordering::Relaxed) > 3, "{writes:?} writes");
    let after = issuer(&lab);
    assert_ne!(before, after);
    assert_eq!(lab.pids("web"), pids, "no task was started again");
    eventually("the log goes on in the workers' new sessions", || {
        // The probe knows no such path, and writes that it was asked.
        let _ = lab.get(&used[0], 8080, "/after-the-rotation");
        log.saw("GET /after-the-rotation")
            .then_some(())
            .ok_or_else(String::new)
    });
    drop(log);
    // The away worker alone still has a certificate of the long kind.
    let nodes = lab.ok("node ls");
    assert_eq!(nodes.matches("in 47h").count(), 5, "{nodes}");
    presents_the_new_root_only(&lab, &after);

    // An operator who said nothing meanwhile, and the worker that was off.
    assert!(lab.ok("--context idle node ls").contains("worker-1"));
    lab.ok(&format!("dev start {away}"));
    lab.until(&away, "ready");
    lab.ok("service scale web=4");
    // The next one finds everyone at work, and every leader goes on with it.
    lab.ok("cluster ca rotate -d");
    lab.run("cluster ca rotate").refused(10, "BH-E0063");
    let leader = lab.leader();
    lab.ok(&format!("dev kill {leader}"));
    eventually("the rotation ends under another leader", || {
        let status = lab.json("cluster ca status");
        status["phase"].is_null().then_some(()).ok_or(status.to_string())
    });
    assert_ne!(issuer(&lab), after);
    lab.ok(&format!("dev start {leader}"));
    lab.until_all_ready();
}

fn issuer(lab: &Lab) -> String {
    text(&lab.json("cluster ca status"), "issuer")
}

fn certificates_last_as_long_as_the_cluster_says(lab: &Lab) {
    lab.run("cluster update --cert-expiry 4m").says("from 5m to 365d");
    lab.ok("cluster update --cert-expiry 48h");
    assert!(
        lab.ok("cluster status").contains("valid for 2d"),
        "{}",
        lab.ok("cluster status")
    );
}

/// What a manager presents, as openssl sees it.
fn presents_the_new_root_only(lab: &Lab, root: &str) {
    for node in lab.nodes().iter().filter(|node| node.starts_with("manager")) {
        eventually(&format!("{node} presents a certificate of the new root"), || {
            let address = format!("{}:7443", lab.address(node));
            let shown = Command::new("openssl")
                .args(["s_client", "-connect", &address, "-alpn", "h2", "-showcerts"])
                .output()
                .expect("openssl runs");
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            let leaf = shown
                .lines()
                .find(|line| line.contains("i:O"))
                .unwrap_or_default();
            leaf.contains(&format!("root {root}"))
                .then_some(())
                .ok_or(shown.clone())
        });
    }
}
