//! Copies of nodes' key files, used after the nodes went on: told of; a worker is cut off, a manager is not.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use bulkhead_identity::comeback::{ComebackError, come_back};
use bulkhead_identity::seam::SystemEntropy;
use bulkhead_identity::tls::Expect;
use bulkhead_proto::{CODE_KEY, limits};
use bulkhead_tests::{Lab, eventually, may_run, text};
use serde_json::Value;

use crate::openssl::key_file_of;

#[test]
fn an_old_copy_of_a_key_file_raises_the_alarm_and_cuts_a_worker_off_but_no_manager() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 2);
    lab.pack("web:1");
    lab.ok("service create -d --name web --replicas 2 web:1");
    lab.until_running("web", 2);
    let leader = lab.leader();
    let mut managers = lab.nodes().into_iter().filter(|node| node.starts_with("manager"));
    let victim = managers.find(|node| *node != leader).expect("three managers");
    let of_manager = key_file_of(&lab, &victim);
    let path = lab.data("worker-2").join("worker/node.key");
    let of_worker = fs::read(&path).expect("root may");

    // Every node takes another key, and was seen with it.
    lab.ok("cluster ca rotate");
    let pids = lab.pids("web");
    sleep(limits::SUPERSEDED_GRACE + Duration::from_secs(1));
    lab.until_all_ready();
    assert_eq!(told(&lab), [], "nobody is called a clone for a rotation");
    assert_eq!(lab.pids("web"), pids);

    // A worker's disk is put back as it was: who has that copy looks the same.
    lab.ok("dev kill worker-2");
    fs::write(&path, &of_worker).expect("root may");
    lab.ok("dev start worker-2");
    eventually("the copy is told of", || match told(&lab).as_slice() {
        [(name, detail)] if name == "worker-2" && detail.ends_with("it is in quarantine") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    lab.until_logged("worker-2", "a newer key of this node is in use");
    let listed = node(&lab, "worker-2");
    assert_eq!(listed["availability"], "quarantine", "{listed}");
    assert!(listed["clone_seen"]["at"].is_string(), "{listed}");
    lab.run("node ls").says("showed a superseded key of worker-2");
    lab.run("node update --clear-alarm worker-2")
        .refused(2, "BH-E0066");
    lab.until_running("web", 2); // both on the other one

    // A manager's, shown to the leader again and again.
    let address = format!("{}:7443", lab.address(&leader));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for _ in 0..5 {
        let back = come_back(
            &of_manager.credentials,
            &address,
            Expect::AnyManager,
            &SystemEntropy,
        );
        match runtime.block_on(back) {
            Err(ComebackError::Refused(status)) => {
                let code = status.metadata().get(CODE_KEY).and_then(|it| it.to_str().ok());
                assert_eq!(code, Some("BH-E0097"), "{status:?}");
            }
            other => panic!("a copy was not refused: {other:?}"),
        }
    }
    eventually("the copy is told of, once", || match told(&lab).as_slice() {
        [_, (name, _)] if *name == victim => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let listed = node(&lab, &victim);
    assert_eq!(
        (&listed["state"], &listed["availability"]),
        (&"ready".into(), &"active".into()),
        "{listed}"
    );
    lab.run("node ls").says(&format!("--clear-alarm {victim}"));
    lab.ok(&format!("node update --clear-alarm {victim}"));
    assert_eq!(node(&lab, &victim)["clone_seen"], Value::Null);
    lab.secret("still", b"served");
}

fn node(lab: &Lab, name: &str) -> Value {
    let mut all = lab.list("node ls").into_iter();
    all.find(|it| it["name"] == name).expect("it is listed")
}

/// Whom the audit log tells of a clone of, and how.
fn told(lab: &Lab) -> Vec<(String, String)> {
    let found = lab.list("audit --filter action=clone");
    found
        .iter()
        .map(|it| (text(&it["object"], "name"), text(it, "detail")))
        .collect()
}
