//! What an operator does with a running cluster, each through the command line.

use std::fs;

use bulkhead_tests::{Follow, Lab, eventually, may_run, text};
use serde_json::Value;

#[test]
fn a_cluster_is_operated() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 3);
    lab.pack("web:1");
    lab.ok("service create -d --name web --replicas 2 --publish 8080:80 web:1");
    lab.until_running("web", 2);
    an_update_replaces_one_after_the_other(&lab);
    what_changes_is_seen(&lab);
    logs_are_read(&lab);
    labels_and_constraints_decide_where(&lab);
    a_node_is_drained(&lab);
    a_worker_leaves(&lab);
    a_manager_leaves_and_joins_again(&lab);
    operators_come_and_go(&lab);
    a_worker_is_cut_off(&lab);
    images_are_shown_and_removed(&lab);
}

fn an_update_replaces_one_after_the_other(lab: &Lab) {
    let before = lab.pids("web");
    let update = lab
        .program("bulkhead")
        .args(["service", "update", "web", "--env-add", "COLOUR=blue"])
        .spawn();
    let mut update = update.expect("it starts");
    let ended = eventually("the update ends", || {
        let running = lab.list("service ps web --filter state=running").len();
        assert!(running > 0, "one of two runs at any time");
        update
            .try_wait()
            .expect("its own child")
            .ok_or("it goes on".into())
    });
    assert!(ended.success());
    let mut tasks = lab.until_running("web", 2);
    assert!(
        tasks.iter().all(|task| !before.contains_key(&text(task, "id"))),
        "{tasks:?}"
    );
    assert!(
        tasks
            .iter()
            .all(|task| task["spec"]["environment"].to_string().contains("COLOUR")),
        "{tasks:?}"
    );
    tasks.sort_by_key(|task| text(task, "created_at"));
    assert!(
        text(&tasks[0], "since") < text(&tasks[1], "created_at"),
        "the second was not made before the first ran: {tasks:?}"
    );

    lab.ok("service scale -d web=3");
    lab.until_running("web", 3);
    lab.ok("service update -d --env-rm COLOUR web");
    assert_eq!(lab.json("service inspect web")[0]["spec"]["replicas"], 3);
    lab.ok("service scale -d web=2");
    lab.until_running("web", 2);
}

fn what_changes_is_seen(lab: &Lab) {
    let mut events = Follow::start(&mut lab.command("events --kind secret --kind node"));
    // It is connected once something that happens is seen.
    let mut changes = 0;
    eventually("the stream begins", || {
        changes += 1;
        lab.ok(&format!("node update worker-1 --label-add seen={changes}"));
        events
            .saw("worker-1")
            .then_some(())
            .ok_or(format!("not after {changes} changes"))
    });
    lab.secret("fresh", b"value");
    let line = events.until("fresh");
    assert!(line.contains("created") && line.contains("operator"), "{line}");
    let past = lab.ok("events --no-follow --kind image");
    assert!(past.contains("web:1"), "{past}");

    let task = &lab.running("web")[0];
    let id = text(task, "id");
    let whole = &lab.json(&format!("task inspect {}", &id[..10]))[0];
    assert_eq!(
        (&whole["id"], &whole["state"]),
        (&task["id"], &Value::from("running"))
    );
    assert_eq!(whole["node"], task["node"]);
    lab.run(&format!("task explain {id}")).says(&text(task, "node"));
    assert!(lab.ok("task ls --service web").contains(&id[..12]));
}

fn logs_are_read(lab: &Lab) {
    // A worker whose session is being made anew is named as not shown.
    eventually("both tasks' logs are shown", || {
        let all = lab.run("service logs web");
        let shown = all.out.contains("listening on port 80") && !all.err.contains("not shown");
        shown.then_some(()).ok_or_else(|| all.whole())
    });
    let one = lab.ok("service logs --tail 1 web");
    assert!(one.lines().count() <= lab.list("service ps web").len(), "{one}");
    assert_eq!(lab.ok("service logs --since 2100-01-01T00:00:00Z web"), "");
    let mut follow = Follow::start(&mut lab.command("service logs -f --since 1h web"));
    follow.until("listening on port 80");
    let node = text(&lab.running("web")[0], "node");
    lab.get(&node, 8080, "/marker").expect_err("it is not there");
    follow.until("GET /marker");
}

fn labels_and_constraints_decide_where(lab: &Lab) {
    lab.ok("node update worker-1 --label-add zone=a");
    lab.ok("service create -d --name zoned --replicas 2 --constraint node.labels.zone==a web:1");
    let tasks = lab.until_running("zoned", 2);
    assert!(tasks.iter().all(|task| task["node"] == "worker-1"), "{tasks:?}");

    lab.ok("service create -d --name waits --constraint node.labels.zone==b web:1");
    eventually("it says why it waits", || {
        let tasks = lab.ok("service ps waits");
        (tasks.contains("pending") && tasks.contains("zone"))
            .then_some(())
            .ok_or(tasks)
    });
    lab.run("service explain waits")
        .says("no node can")
        .says("zone")
        .says("worker-2");
    lab.ok("node update worker-2 --label-add zone=b");
    let tasks = lab.until_running("waits", 1);
    assert_eq!(tasks[0]["node"], "worker-2");
    lab.ok("service rm zoned waits");
    lab.ok("node update worker-1 --label-rm zone");
    assert!(lab.json("node inspect worker-1")[0]["labels"]["zone"].is_null());
}

fn a_node_is_drained(lab: &Lab) {
    let node = text(&lab.running("web")[0], "node");
    lab.ok(&format!("node drain {node}"));
    let tasks = lab.until_running("web", 2);
    assert!(
        tasks.iter().all(|task| task["node"] != node.as_str()),
        "{tasks:?}"
    );
    assert_eq!(lab.list("node ls --filter availability=drain").len(), 1);
    lab.ok(&format!("node activate {node}"));
}

fn a_worker_leaves(lab: &Lab) {
    let node = text(&lab.running("web")[0], "node");
    let leave = format!("cluster leave -y --socket {}", lab.socket(&node).display());
    lab.run(&leave)
        .refused(1, "BH-E0064")
        .says(&format!("node drain {node}"));
    lab.ok(&format!("node drain {node}"));
    lab.run(&leave).says(&format!("{node} has left the cluster"));
    assert!(!lab.ok("node ls").contains(&node), "the cluster lists it no more");
    assert!(
        !lab.data(&node).join("worker/node.key").exists(),
        "its key is gone"
    );
    lab.until_running("web", 2);
}

fn a_manager_leaves_and_joins_again(lab: &Lab) {
    let leader = lab.leader();
    let node = lab
        .nodes()
        .into_iter()
        .find(|node| node.starts_with("manager") && *node != leader)
        .expect("a follower");
    let socket = lab.socket(&node);
    let address = text(&lab.json(&format!("node inspect {node}"))[0], "address");
    let root = |lab: &Lab| {
        let status = lab.json("cluster ca status");
        (status["phase"].clone(), text(&status, "issuer"))
    };
    let (_, before) = root(lab);
    lab.run(&format!("cluster leave -y --socket {}", socket.display()))
        .says(&format!("{node} has left the cluster"));
    assert!(!lab.ok("node ls").contains(&node), "the cluster lists it no more");
    eventually("nothing of the cluster is kept", || {
        let kept = ["keys", "raft", "images"].map(|name| lab.data(&node).join(name).exists());
        (kept == [false; 3]).then_some(()).ok_or(format!("{kept:?}"))
    });
    eventually("what it could open is sealed anew, and the root rolls", || {
        let (phase, issuer) = root(lab);
        let renewed = phase.is_null() && issuer != before;
        let status = lab.ok("cluster status");
        (renewed && status.contains("epoch 2, opened by 2 of 2 managers"))
            .then_some(())
            .ok_or(format!("{phase} {issuer}\n{status}"))
    });
    let ticket = lab.folder().join("manager.ticket");
    fs::write(&ticket, lab.ok("cluster ticket create --role manager")).expect("a file");
    let leader = text(&lab.json(&format!("node inspect {leader}"))[0], "address");
    let join = format!(
        "cluster join --socket {} --ticket-file {} --listen {address} --advertise {address} --name {node} {leader}",
        socket.display(),
        ticket.display()
    );
    eventually("it joins again", || {
        let answer = lab.run(&join);
        (answer.code == 0).then_some(()).ok_or_else(|| answer.whole())
    });
    lab.until(&node, "ready");
}

fn operators_come_and_go(lab: &Lab) {
    let file = lab.folder().join("bob.key");
    let file = file.display();
    let refused = lab.run("operator issue bob -o /nonexistent/bob.key");
    refused.refused(1, "BH-E0011");
    assert!(!lab.ok("operator ls").contains("bob"), "nobody without a key");
    lab.ok(&format!("operator issue bob -o {file}"));
    lab.run(&format!("operator issue bill -o {file}"))
        .refused(1, "BH-E0011");
    lab.ok(&format!("context import bob {file}"));
    assert!(lab.ok("context ls").contains("bob"));
    assert!(lab.ok("--context bob node ls").contains("manager-1"));
    assert!(lab.ok("operator ls").contains("bob"));
    lab.ok("operator revoke -y bob");
    let refused = lab.run("--context bob node ls");
    assert_eq!(refused.code, 8, "{}", refused.whole());
    assert!(!refused.out.contains("worker"), "{}", refused.whole());
    lab.ok("context rm -y bob");
    assert!(lab.ok("node ls").contains("manager-1"), "the others go on");
}

fn a_worker_is_cut_off(lab: &Lab) {
    lab.secret("db", b"value");
    lab.ok("service create -d --name db --replicas 2 --secret db web:1");
    let tasks = lab.until_running("db", 2);
    let node = text(&tasks[0], "node");
    let held = lab.list("secret trace db");
    assert_eq!(held.len(), 2, "{held:?}");
    assert!(
        held.iter().all(|it| it["now"] == true && it["service"] == "db"),
        "{held:?}"
    );
    let log = lab.log(&node).len();
    lab.run(&format!("node quarantine -y {node}")).says("it held: db");
    eventually("its stream is closed and it is refused", || {
        let log = &lab.log(&node)[log..];
        log.contains("does not list this worker's key")
            .then_some(())
            .ok_or(log.to_owned())
    });
    let tasks = lab.until_running("db", 2);
    assert!(
        tasks.iter().all(|task| task["node"] != node.as_str()),
        "{tasks:?}"
    );
    assert_eq!(lab.list("node ls --filter availability=quarantine").len(), 1);
    lab.run(&format!("node activate {node}"))
        .refused(2, "BH-E0066")
        .says("in quarantine");
    let exposure = &lab.json(&format!("node inspect --exposure {node}"))[0]["exposure"];
    let exposure = exposure.as_array().expect("a list");
    assert!(
        !exposure.is_empty() && exposure.iter().all(|it| it["now"] == false),
        "{exposure:?}"
    );
    lab.ok("service rm db");
}

fn images_are_shown_and_removed(lab: &Lab) {
    let image = &lab.json("image inspect web:1")[0];
    assert_eq!(image["name"], "web:1");
    assert!(image.to_string().contains("sha256:"), "{image}");
    lab.run("image rm web:1").refused(1, "BH-E0064").says("web");
    lab.ok("service rm web");
    eventually("the image is in use no more", || {
        let answer = lab.run("image rm web:1");
        (answer.code == 0).then_some(()).ok_or_else(|| answer.whole())
    });
    lab.run("image inspect web:1").refused(3, "BH-E0060");
}
