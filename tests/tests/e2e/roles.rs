//! Standbys become managers and managers standbys, while the cluster is written to.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_tests::{Lab, eventually, may_run, text};

#[test]
fn roles_change_and_no_write_fails() {
    if !may_run() {
        return;
    }
    let lab = Lab::with_standbys(3, 0, 1);
    assert_eq!(voters(&lab), names(["manager-1", "manager-2", "manager-3"]));
    lab.run("node ls --filter role=standby").says("standby-1");
    let ends = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writing = scope.spawn(|| write_until(&lab, &ends));
        promoted_and_demoted(&lab);
        ends.store(true, Ordering::Relaxed);
        writing.join().expect("a thread")
    });
    assert!(!written.is_empty());
    let kept: BTreeSet<String> = lab.list("secret ls").iter().map(|it| text(it, "name")).collect();
    assert_eq!(kept, written, "what was acknowledged is there");
}

fn promoted_and_demoted(lab: &Lab) {
    lab.ok("node promote standby-1");
    lab.until("standby-1", "ready");
    assert_eq!(voters(lab).len(), 4);
    lab.run("cluster status").says("4 managers: a quorum is 3");

    // The one that leads hands over first.
    let leader = lab.leader();
    lab.run(&format!("node demote {leader} --clean"))
        .says("nothing is renewed for it");
    assert!(!voters(lab).contains(&leader));
    assert_eq!(role(lab, &leader), "standby");
    assert_ne!(lab.leader(), leader);
    lab.until(&leader, "ready");
    let data = lab.data(&leader);
    assert!(data.join("keys").exists() && !data.join("keys.standby").exists());
    assert!(
        !data.join("raft").exists() && !data.join("images").exists(),
        "its store is wiped"
    );

    // As a standby it may not be asked what a manager is asked.
    let socket = data.join("manager.sock");
    let refused = lab.run(&format!("--socket {} secret ls", socket.display()));
    assert_ne!(refused.code, 0, "{}", refused.whole());

    // Under a new member id it comes back.
    let before = members(lab);
    lab.ok(&format!("node promote {leader}"));
    lab.until(&leader, "ready");
    assert!(members(lab).iter().max() > before.iter().max());
}

#[test]
fn a_quorum_is_not_given_away_and_a_promotion_waits_for_its_standby() {
    if !may_run() {
        return;
    }
    let lab = Lab::with_standbys(2, 1, 1);
    lab.run("cluster status")
        .says("2 managers: a quorum is 2, none may fail");
    lab.run("node promote worker-1")
        .refused(2, "BH-E0066")
        .says("bulkhead-manager --standby");
    lab.run("node demote worker-1").refused(2, "BH-E0066");
    lab.run("node demote standby-1").success();

    // It hears of it when it is back.
    lab.ok("dev kill standby-1");
    lab.ok("node promote standby-1 --detach");
    lab.ok("dev start standby-1");
    eventually("it votes", || {
        let voters = voters(&lab);
        voters
            .contains("standby-1")
            .then_some(())
            .ok_or(format!("{voters:?}"))
    });

    // Two of three answer: none of the two can be spared.
    lab.ok("dev kill standby-1");
    until_listed(&lab, "standby-1", "down");
    lab.run("node demote manager-2")
        .refused(1, "BH-E0068")
        .says("1 of the 2 managers that would remain answer; 2 are needed");
    lab.run("node demote standby-1")
        .refused(1, "BH-E0104")
        .says("node rm --force standby-1");
    assert_eq!(role(&lab, "manager-2"), "manager");
    lab.ok("dev start standby-1");
    until_listed(&lab, "standby-1", "ready");
    lab.ok("node demote manager-2 --clean");
    let socket = lab.socket("manager-2");
    lab.ok(&format!("cluster leave -y --socket {}", socket.display()));
    eventually("the cluster lists it no more", || {
        let listed = lab.list("node ls --filter name=manager-2");
        listed.is_empty().then_some(()).ok_or(format!("{listed:?}"))
    });
}

fn until_listed(lab: &Lab, node: &str, state: &str) {
    eventually(&format!("{node} is listed as {state}"), || {
        let found = lab.list(&format!("node ls --filter name={node}"));
        let is = found.first().is_some_and(|it| it["state"] == state);
        is.then_some(()).ok_or(format!("{found:?}"))
    });
}

/// A secret with each turn; every one must succeed.
fn write_until(lab: &Lab, ends: &AtomicBool) -> BTreeSet<String> {
    let mut written = BTreeSet::new();
    while !ends.load(Ordering::Relaxed) {
        let name = format!("s{}", written.len());
        lab.secret(&name, b"value");
        written.insert(name);
    }
    written
}

fn voters(lab: &Lab) -> BTreeSet<String> {
    let status = lab.json("cluster status");
    let members = status["members"].as_array().cloned().unwrap_or_default();
    let voting = members.iter().filter(|it| it["voter"] == true);
    voting.map(|it| text(it, "name")).collect()
}

fn members(lab: &Lab) -> BTreeSet<u64> {
    let status = lab.json("cluster status");
    let members = status["members"].as_array().cloned().unwrap_or_default();
    members.iter().filter_map(|it| it["member_id"].as_u64()).collect()
}

fn role(lab: &Lab, node: &str) -> String {
    let found = lab.list(&format!("node ls --filter name={node}"));
    text(found.first().expect("it is listed"), "role")
}

fn names<const N: usize>(all: [&str; N]) -> BTreeSet<String> {
    all.map(str::to_owned).into()
}
