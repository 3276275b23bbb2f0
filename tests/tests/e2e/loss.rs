//! Managers are lost for good: the cluster comes back from a backup, or goes on from one manager that is left.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bulkhead_tests::{Lab, eventually, may_run, text};

#[test]
fn a_cluster_comes_back_from_a_backup_on_an_empty_manager() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 2);
    lab.pack("web:1");
    lab.secret("password", b"correct horse");
    lab.ok("service create -d --name web --replicas 2 --secret password --publish 8080:80 web:1 -- /bin/bulkhead-probe serve");
    serves(&lab);
    a_backup_needs_a_recovery_key(&lab);
    lab.ok("cluster backup create -o before.backup");
    lab.secret("later", b"not in the backup");
    backups_are_looked_at_without_a_cluster(&lab);

    for manager in ["manager-1", "manager-2", "manager-3"] {
        lab.ok(&format!("dev kill {manager}"));
        empty(&lab.data(manager));
    }
    let (tasks, seen) = (lab.processes(), lab.log("worker-1").len());
    lab.ok("dev start manager-1");
    what_is_no_whole_backup_restores_nothing(&lab);
    let restored = lab.run(&restore(&lab, "before.backup", "recovery.key"));
    assert_eq!(restored.code, 0, "{}", restored.whole());
    let restored = restored.says("gone for ever: the managers manager-1, manager-2, manager-3");
    restored.says("come back by themselves: worker-1, worker-2");

    // The workers come back by themselves, and their tasks never stopped.
    eventually("the workers are ready", || {
        let ready = lab.ok("node ls -q --filter role=worker --filter state=ready");
        (ready.lines().count() == 2)
            .then_some(())
            .ok_or_else(|| lab.ok("node ls"))
    });
    serves(&lab);
    assert!(
        tasks.is_subset(&lab.processes()),
        "no task was started again: {}",
        &lab.log("worker-1")[seen..]
    );
    let secrets = lab.ok("secret ls");
    assert!(
        secrets.contains("password") && !secrets.contains("later"),
        "{secrets}"
    );
    let status = lab.json("cluster status");
    assert_eq!(
        (status["epoch"].as_u64(), status["can_lose"].as_u64()),
        (Some(2), Some(0))
    );
    assert_eq!(lab.list("cluster ticket ls").len(), 0, "tickets are void");

    // The secret reaches a task that starts now, too.
    let (_, victim) = lab.pids("web").pop_first().expect("a task");
    kill(victim);
    eventually("the task is started again", || {
        let pids = lab.pids("web");
        let again = pids.len() == 2 && !pids.values().any(|pid| *pid == victim);
        again.then_some(()).ok_or(format!("{pids:?}"))
    });
    serves(&lab);
    a_rotation_follows(&lab);
    another_manager_joins(&lab);
    lab.ok("cluster backup create -o after.backup");
}

/// It is another node: what the old one was given is not given to it unasked, and what ran there runs elsewhere.
#[test]
fn a_worker_whose_folder_is_wiped_joins_again_as_another_node() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 2);
    lab.pack("web:1");
    lab.secret("password", b"correct horse");
    lab.ok("service create -d --name web --replicas 2 --secret password web:1 -- /bin/bulkhead-probe serve");
    lab.until_running("web", 2);
    let node = |name: &str| {
        let nodes = lab.list("node ls");
        let found = nodes.into_iter().find(|node| node["name"] == name);
        found.unwrap_or_else(|| panic!("no node {name}"))
    };
    let before = text(&node("worker-1"), "id");
    lab.ok("dev kill worker-1");
    empty(&lab.data("worker-1"));
    lab.ok("dev start worker-1");
    let ticket = lab.ok("cluster ticket create --role worker --quiet");
    fs::write(lab.folder().join("ticket"), ticket).expect("written");
    lab.ok(&format!(
        "--socket {} cluster join --ticket-file ticket --name worker-1 {}:7443",
        lab.socket("worker-1").display(),
        lab.address("manager-1"),
    ));
    // The name stays the old node's, until it is removed.
    let after = text(&node("worker-1-2"), "id");
    assert_ne!(after, before);
    eventually("the old node is down, and both tasks run elsewhere", || {
        let tasks = lab.running("web");
        let away = tasks.iter().all(|task| task["node"] != "worker-1");
        let down = node("worker-1")["state"] == "down";
        let done = away && down && tasks.len() == 2;
        done.then_some(())
            .ok_or(format!("{tasks:?} {}", lab.ok("node ls")))
    });
    lab.ok("service scale -d web=4");
    eventually("the new node runs tasks, with their secret", || {
        let tasks = lab.running("web");
        let here = tasks.iter().any(|task| task["node"] == "worker-1-2");
        (here && tasks.len() == 4)
            .then_some(())
            .ok_or(format!("{tasks:?}"))
    });
    lab.ok("node rm --yes worker-1");
    assert!(!lab.ok("node ls -q").contains(&before));
}

fn serves(lab: &Lab) {
    for worker in ["worker-1", "worker-2"] {
        eventually(&format!("{worker} answers with the secret"), || {
            let value = lab.get(worker, 8080, "/secret/password")?;
            (value == "correct horse").then_some(()).ok_or(value)
        });
    }
}

fn a_backup_needs_a_recovery_key(lab: &Lab) {
    lab.run("cluster recovery-key show").refused(1, "BH-E0113");
    let refused = lab
        .run("cluster backup create -o none.backup")
        .refused(1, "BH-E0113");
    refused.says("cluster recovery-key create");
    assert!(!lab.folder().join("none.backup").exists());
    // Who sets it could read every secret: no operator may, only who is at a manager's own socket.
    lab.run("cluster recovery-key create -o mine.key")
        .refused(2, "BH-E0002");
    let socket = format!("--socket {}", lab.socket("manager-1").display());
    let fingerprint = lab.ok(&format!("{socket} cluster recovery-key create -o recovery.key"));
    assert!(lab.ok("cluster recovery-key show").starts_with(&fingerprint));
    let mode = fs::metadata(lab.folder().join("recovery.key"))
        .expect("written")
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    // Neither the file nor the cluster's key is ever replaced by chance.
    lab.run(&format!("{socket} cluster recovery-key create -o recovery.key"))
        .refused(1, "BH-E0011");
    lab.run(&format!("{socket} cluster recovery-key create -o another.key"))
        .refused(10, "BH-E0063");
    assert!(!lab.folder().join("another.key").exists());
}

fn backups_are_looked_at_without_a_cluster(lab: &Lab) {
    lab.run("cluster backup create -o before.backup")
        .refused(1, "BH-E0011");
    let shown = lab.json("cluster backup inspect before.backup");
    assert_eq!(
        (shown["epoch"].as_u64(), shown["images"].as_bool()),
        (Some(1), Some(false))
    );
    assert_eq!(
        (shown["verified"].as_bool(), &shown["objects"]),
        (Some(false), &serde_json::Value::Null)
    );
    let verified = lab.json("cluster backup verify before.backup --recovery-key recovery.key");
    let objects = &verified["objects"];
    assert_eq!(
        (objects["secrets"].as_u64(), objects["workers"].as_u64()),
        (Some(1), Some(2))
    );
    let bytes = fs::read(lab.folder().join("before.backup")).expect("written");
    for canary in [b"correct horse".as_slice(), b"password", b"worker-1"] {
        assert!(!bytes.windows(canary.len()).any(|window| window == canary));
    }
    let write = |name: &str, bytes: &[u8]| fs::write(lab.folder().join(name), bytes).expect("written");
    write("cut.backup", &bytes[..bytes.len() - 1]);
    let verify = |name: &str| {
        lab.run(&format!(
            "cluster backup verify {name} --recovery-key recovery.key"
        ))
    };
    verify("cut.backup")
        .refused(1, "BH-E0111")
        .says("its last chunk is missing");
    // A bit anywhere: in the header, in a chunk's frame, in the last tag.
    for at in [30, bytes.len() / 2, bytes.len() - 1] {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        write("flipped.backup", &flipped);
        verify("flipped.backup").refused(1, "BH-E0111");
    }
    verify("recovery.key").refused(1, "BH-E0110");
    lab.run("cluster backup verify before.backup --recovery-key before.backup")
        .refused(2, "BH-E0002");
    lab.ok(&format!(
        "--socket {} cluster recovery-key create --replace -o other.key",
        lab.socket("manager-1").display()
    ));
    lab.run("cluster backup verify before.backup --recovery-key other.key")
        .refused(8, "BH-E0112");
}

fn restore(lab: &Lab, backup: &str, key: &str) -> String {
    format!(
        "--context restored --socket {} cluster restore {backup} --recovery-key {key} --listen {}:7443 --name manager-1",
        lab.socket("manager-1").display(),
        lab.address("manager-1"),
    )
}

fn what_is_no_whole_backup_restores_nothing(lab: &Lab) {
    lab.run(&restore(lab, "cut.backup", "recovery.key"))
        .refused(1, "BH-E0111");
    lab.run(&restore(lab, "flipped.backup", "recovery.key"))
        .refused(1, "BH-E0111");
    lab.run(&restore(lab, "before.backup", "other.key"))
        .refused(8, "BH-E0112");
    lab.run(&format!(
        "{} --forget nobody",
        restore(lab, "before.backup", "recovery.key")
    ))
    .refused(3, "BH-E0065")
    .says("nobody");
    assert!(!lab.data("manager-1").join("keys").exists());
    let contexts = lab.ok("context ls");
    assert!(!contexts.contains("restored"), "{contexts}");
}

fn a_rotation_follows(lab: &Lab) {
    let before = text(&lab.json("cluster backup inspect before.backup"), "cluster_id");
    eventually("the rotation that was due is over", || {
        let status = lab.json("cluster ca status");
        let over = status["phase"].is_null() && !status["former_until"].is_null();
        over.then_some(()).ok_or(status.to_string())
    });
    assert_eq!(text(&lab.json("cluster status"), "cluster_id"), before);
    for node in ["manager-1", "worker-1", "worker-2"] {
        lab.until(node, "ready");
    }
}

fn another_manager_joins(lab: &Lab) {
    lab.ok("dev start manager-2");
    let ticket = lab.ok("cluster ticket create --role manager --quiet");
    fs::write(lab.folder().join("ticket"), ticket).expect("written");
    let (first, second) = (lab.address("manager-1"), lab.address("manager-2"));
    lab.ok(&format!(
        "--socket {} cluster join --ticket-file ticket --listen {second}:7443 --name manager-2 {first}:7443",
        lab.socket("manager-2").display(),
    ));
    lab.until("manager-2", "ready");
}

/// Everything in a folder goes, the folder stays: it belongs to the program's own user.
fn empty(folder: &Path) {
    for entry in fs::read_dir(folder).expect("a data folder").flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        }
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

fn kill(pid: u64) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a process id"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it runs");
}

#[test]
fn a_cluster_goes_on_from_the_one_manager_that_is_left() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 1);
    lab.pack("web:1");
    lab.secret("password", b"correct horse");
    lab.ok(
        "service create -d --name web --secret password --publish 8080:80 web:1 -- /bin/bulkhead-probe serve",
    );
    let pids = eventually("the task runs", || {
        let pids = lab.pids("web");
        (pids.len() == 1).then_some(pids).ok_or(String::new())
    });
    let recover = format!("--socket {} cluster recover", lab.socket("manager-1").display());
    lab.run(&format!("{recover} -y"))
        .refused(1, "BH-E0068")
        .says("nothing is lost");
    lab.secret("newest", b"acknowledged");
    lab.ok("dev kill manager-2");
    lab.ok("dev kill manager-3");
    eventually("the quorum is lost for a while", || {
        let shown = lab.run(&format!("{recover} --dry-run"));
        match shown.code {
            0 => Ok(shown.says("gone for ever: the managers manager-2, manager-3")),
            _ => Err(shown.whole()),
        }
    });
    // The worker looks for a manager more and more rarely: after five rounds of all three it waits for seconds.
    eventually("the worker has tried in vain for long", || {
        let tries = lab.log("worker-1").matches("the session ended").count();
        (tries >= 15).then_some(()).ok_or(format!("{tries} times"))
    });
    lab.run(&recover).refused(2, "BH-E0130");
    assert_eq!(
        lab.status("manager-1")["state"],
        "not ready",
        "nothing was done yet"
    );
    let recovered = lab.run(&format!("{recover} -y"));
    assert_eq!(recovered.code, 0, "{}", recovered.whole());
    recovered.says("at epoch 2");

    // Operators, workers, tasks and all that was acknowledged are as they were.
    lab.until("worker-1", "ready");
    let secrets = lab.ok("secret ls");
    assert!(secrets.contains("newest"), "{secrets}");
    lab.secret("after", b"value");
    assert_eq!(lab.pids("web"), pids);
    assert_eq!(
        lab.get("worker-1", 8080, "/secret/password").as_deref(),
        Ok("correct horse")
    );
    let data = lab.data("manager-1");
    assert!(!data.join("raft").exists() && data.join("raft-2").is_dir());

    // One that comes back with its old state is heard by nobody; with an empty folder it may join again.
    lab.ok("dev start manager-2");
    lab.until_logged("manager-1", "denied");
    assert_eq!(lab.status("manager-2")["state"], "not ready");
    let members = lab.json("cluster status")["members"].as_array().map(Vec::len);
    assert_eq!(members, Some(1));
    lab.ok("dev kill manager-2");
    empty(&lab.data("manager-2"));
    another_manager_joins(&lab);
    // And what was recovered is still there after a crash.
    lab.ok("dev kill manager-1");
    lab.ok("dev start manager-1");
    lab.until("manager-1", "ready");
    assert!(lab.ok("secret ls").contains("after"));
}
