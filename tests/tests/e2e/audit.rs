//! What was done to identities and secrets is in the audit log, once, whichever manager is asked; and nobody rewrote it.

use bulkhead_tests::{Lab, eventually, may_run, text};
use serde_json::Value;

/// A ticket that no cluster knows, of this cluster's root.
fn unknown(ticket: &str) -> String {
    let (start, secret) = ticket.rsplit_once('-').expect("a last part");
    let first = if secret.starts_with('a') { "b" } else { "a" };
    format!("{start}-{first}{}", &secret[1..])
}

/// The records of an action, as the object's name, who did it, and the detail.
fn records(lab: &Lab, line: &str, action: &str) -> Vec<(String, String, String)> {
    let all = lab.list(&format!("{line} --filter action={action}"));
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    all.iter()
        .map(|it| {
            (
                word(&it["object"]["name"]),
                word(&it["actor_name"]),
                word(&it["detail"]),
            )
        })
        .collect()
}

#[test]
fn what_was_done_is_in_the_log_once_on_every_manager() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 2);
    let operator = text(&lab.list("operator ls")[0], "name");
    let joined: Vec<String> = records(&lab, "audit", "join")
        .into_iter()
        .map(|it| it.0)
        .collect();
    for node in lab.nodes() {
        assert_eq!(
            joined.iter().filter(|it| **it == node).count(),
            1,
            "{node}: {joined:?}"
        );
    }
    let head = lab.ok("audit --verify -q");
    std::fs::write(lab.folder().join("head"), &head).expect("its own folder");

    // A secret: stored, given to a service, and to the nodes that run it.
    lab.secret("db", b"canary-of-the-audit-log");
    lab.pack("web:1");
    lab.ok("service create -d --name web --replicas 2 --secret db web:1");
    lab.until_running("web", 2);
    let one = |action: &str| {
        records(
            &lab,
            &format!("audit --object secret/db --actor {operator}"),
            action,
        )
    };
    assert_eq!(
        one("create"),
        [("db".to_owned(), operator.clone(), String::new())]
    );
    assert_eq!(one("grant").len(), 1);
    let used = lab.list("audit --object secret/db --filter action=access");
    let mut on: Vec<String> = used.iter().map(|it| text(&it["related"], "name")).collect();
    let mut runs: Vec<String> = lab.running("web").iter().map(|task| text(task, "node")).collect();
    on.sort();
    runs.sort();
    runs.dedup();
    assert_eq!(on, runs, "{used:?}");

    // A rotation of the root, and a node that is not trusted any more.
    lab.ok("cluster ca rotate");
    let steps: Vec<String> = records(&lab, "audit", "rotate")
        .into_iter()
        .map(|it| it.2)
        .collect();
    assert_eq!(
        steps,
        [
            "begun",
            "the new root signs",
            "ended: the old root is dropped, and its key"
        ]
    );
    lab.ok("node quarantine -y worker-1");
    assert_eq!(
        records(&lab, "audit", "quarantine"),
        [("worker-1".to_owned(), operator.clone(), String::new())]
    );

    // Wrong tickets: one record, counted.
    let ticket = text(&lab.json("cluster ticket create --role operator"), "ticket");
    std::fs::write(lab.folder().join("ticket"), unknown(&ticket)).expect("its own folder");
    let line = format!(
        "operator join --context eve --name eve --ticket-file {} {}:7443",
        lab.folder().join("ticket").display(),
        lab.address("manager-1")
    );
    for _ in 0..3 {
        lab.run(&line).refused(8, "BH-E0081");
    }
    lab.ok("context use dev");
    eventually("the refusals are in the log", || {
        let found = lab.list("audit --actor anonymous --filter action=refuse");
        let joins: Vec<&Value> = found
            .iter()
            .filter(|it| text(it, "detail").starts_with("join:"))
            .collect();
        let told = joins.len() == 1 && joins[0]["count"].as_u64() >= Some(1);
        told.then_some(()).ok_or(format!("{found:?}"))
    });

    // Every manager has the same, and nothing was rewritten since the head that was kept.
    let all: Vec<Value> = lab.list("audit");
    let numbers: Vec<u64> = all.iter().filter_map(|it| it["sequence"].as_u64()).collect();
    assert!(numbers.windows(2).all(|two| two[0] + 1 == two[1]), "{numbers:?}");
    let whole = format!("{all:?}");
    for secret in [
        "canary-of-the-audit-log",
        ticket.rsplit('-').next().expect("a last part"),
    ] {
        assert!(!whole.contains(secret), "the log holds a secret");
    }
    let verified = lab.json(&format!(
        "audit --verify --head {}",
        lab.folder().join("head").display()
    ));
    let managers = verified["managers"].as_array().expect("a list");
    assert_eq!(managers.len(), 3, "{verified}");
    assert!(managers.iter().all(|it| it["agrees"] == true), "{verified}");
    // A kept head with another hash is another history.
    let other = format!("{}:{}", head.split(':').next().expect("a number"), "0".repeat(64));
    lab.run(&format!("audit --verify --head {other}"))
        .refused(1, "BH-E0140");

    // A restart of every manager, from snapshot and log, goes on with the same chain.
    for node in ["manager-1", "manager-2", "manager-3"] {
        lab.ok(&format!("dev kill {node}"));
        lab.ok(&format!("dev start {node}"));
        lab.until(node, "ready");
    }
    let again = lab.json(&format!("audit --verify --head {}", text(&verified, "head")));
    assert!(again["last"].as_u64() >= verified["last"].as_u64(), "{again}");
    lab.run("audit --object colour/red").says("one of cluster");
}
