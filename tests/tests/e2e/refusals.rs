//! Bad input and tasks that fail: each says what is wrong, and how to mend it.

use std::net::TcpListener;

use bulkhead_tests::{Lab, eventually, may_run, text};
use serde_json::Value;

#[test]
fn what_cannot_be_done_is_refused_with_a_reason() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 1);
    lab.pack("web:1");
    bad_input(&lab);
    tasks_that_fail(&lab);
    a_port_in_use(&lab);
}

fn bad_input(lab: &Lab) {
    let large = vec![b'x'; (500 << 10) + 1];
    lab.feed("secret create large -", &large)
        .refused(2, "BH-E0003")
        .says("512000");
    let most = vec![b'x'; 500 << 10];
    lab.feed("secret create most -", &most).success();
    lab.feed("secret create empty -", b"").refused(2, "BH-E0002");
    lab.secret("password", b"x");
    lab.feed("secret create password -", b"y")
        .refused(10, "BH-E0062")
        .says("password");

    let create = "service create -d --name";
    lab.run(&format!("{create} web --secret nothing web:1"))
        .refused(3, "BH-E0065")
        .says("nothing");
    lab.run(&format!("{create} web none:1"))
        .refused(3, "BH-E0065")
        .says("none:1");
    lab.ok(&format!("{create} web --secret password web:1"));
    lab.run(&format!("{create} web web:1"))
        .refused(10, "BH-E0062")
        .says("web");
    lab.run("secret rm password").refused(1, "BH-E0064").says("web");
    lab.run("image rm web:1").refused(1, "BH-E0064").says("web");
    lab.run("secret rm nothing").refused(3, "BH-E0060");
    lab.run("service ps nothing").refused(3, "BH-E0060");
    lab.ok("service rm web");

    for (line, says) in [
        ("service create --name web @web", "NAME:TAG"),
        ("service create --name web --colour red web:1", "--colour"),
        ("service create --name Web_1 web:1", "BH-E0002"),
        ("service create --name web --limit-memory lots web:1", "BH-E0001"),
        ("service create --name web --publish 80:http web:1", "--publish"),
        ("secret create x", "FILE"),
        ("imgae ls", "imgae"),
    ] {
        let answer = lab.run(line).says(says);
        assert_eq!(answer.code, 2, "{}", answer.whole());
        assert_eq!(answer.out, "", "results alone go there");
    }
    // Flags stand anywhere, and after -- nothing is a flag of ours.
    lab.ok("service create web:1 -d --name anywhere --replicas 0 -- /bin/bulkhead-probe --colour red");
    let spec = &lab.json("service inspect anywhere")[0]["spec"];
    assert!(spec["command"].to_string().contains("--colour"), "{spec}");
    lab.ok("service rm anywhere");
}

fn tasks_that_fail(lab: &Lab) {
    let once = "service create -d --restart-condition none";
    let probe = "/bin/bulkhead-probe";
    lab.ok(&format!("{once} --name exits web:1 -- {probe} exit 7"));
    lab.ok(&format!("{once} --name crashes web:1 -- {probe} crash"));
    lab.ok(&format!(
        "{once} --name hog --limit-memory 32m web:1 -- {probe} hog-memory"
    ));
    lab.ok(&format!("{once} --name absent web:1 -- /bin/nothing"));

    let exits = ended(lab, "exits");
    assert_eq!(
        (exits["state"].as_str(), exits["exit_code"].as_i64()),
        (Some("failed"), Some(7)),
        "{exits}"
    );
    shows(lab, "exits", "exit code 7");
    let crashes = ended(lab, "crashes");
    assert_eq!(crashes["signal"], 11, "{crashes}");
    shows(lab, "crashes", "signal 11");
    let hog = ended(lab, "hog");
    assert_eq!(hog["out_of_memory"], true, "{hog}");
    shows(lab, "hog", "--limit-memory");
    let absent = ended(lab, "absent");
    assert_ne!(absent["state"], "complete", "{absent}");
    shows(lab, "absent", "/bin/nothing");
    for service in ["exits", "crashes", "hog", "absent"] {
        lab.ok(&format!("service rm {service}"));
    }
}

/// The first task of a service, once it ended.
fn ended(lab: &Lab, service: &str) -> Value {
    eventually(&format!("a task of {service} ends"), || {
        let tasks = lab.list(&format!("service ps {service}"));
        let ended =
            |task: &&Value| ["complete", "failed", "rejected"].contains(&text(task, "state").as_str());
        tasks.iter().find(ended).cloned().ok_or(format!("{tasks:?}"))
    })
}

/// People see why, where they look first.
fn shows(lab: &Lab, service: &str, reason: &str) {
    lab.run(&format!("service ps {service}")).says(reason);
    let task = text(&ended(lab, service), "id");
    lab.run(&format!("task explain {task}")).says(&task[..12]);
}

/// Another program of the node has the port: the task says so, and the service answers once it is free.
fn a_port_in_use(lab: &Lab) {
    let address = format!("{}:8088", lab.address("worker-1"));
    let taken = TcpListener::bind(&address).expect("a free port");
    // Its own name: one that was removed keeps its name until its last task has ended.
    lab.ok("service create -d --name port --publish 8088:80 web:1");
    eventually("the task says what is in the way", || {
        let shown = lab.run("service ps port").success();
        (shown.contains("8088") && shown.contains("another program"))
            .then_some(())
            .ok_or(shown)
    });
    drop(taken);
    eventually("the port answers", || lab.get("worker-1", 8088, "/health"));
}
