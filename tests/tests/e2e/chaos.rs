//! `bulkhead-chaos` on clusters of real programs: a short campaign, a driver that is killed, clusters that are not to be broken.

use std::process::{Child, Command, Stdio};

use bulkhead_tests::{Answer, Lab, Spawned, eventually, may_run, programs};

/// A driver with its own folders.
fn chaos(folder: &std::path::Path, line: &str) -> Command {
    let mut command = Command::new(programs().join("bulkhead-chaos"));
    command.args(line.split_whitespace());
    command.arg("--state").arg(folder.join("state"));
    command
}

fn campaign(folder: &std::path::Path, line: &str) -> Command {
    let mut command = chaos(folder, line);
    command
        .arg("--report")
        .arg(folder.join("report"))
        .arg("--folder")
        .arg(folder);
    command
}

#[test]
fn a_short_campaign_of_everything_holds_and_leaves_nothing() {
    if !may_run() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let line = "live --nodes 3+2 --minutes 0.6 --plan mixed --seed 3";
    let ran = Answer::of(&mut campaign(folder.path(), line), b"");
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let text = std::fs::read_to_string(folder.path().join("report/report.json")).expect("a report");
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        (&report["schema"], &report["verdict"]),
        (&1.into(), &"pass".into())
    );
    let held = |rule: &str| {
        let rules = report["rules"].as_array().expect("a list");
        rules
            .iter()
            .find(|it| it["rule"] == rule)
            .map(|it| it["held"].clone())
    };
    for rule in [
        "linearizable",
        "acknowledged-is-kept",
        "tasks-run-on",
        "nothing-is-left",
        "secrets-stay-secret",
    ] {
        assert_eq!(held(rule), Some("pass".into()), "{rule}: {text}");
    }
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .expect("ours")
        .flatten()
        .map(|it| it.file_name())
        .collect();
    assert_eq!(
        left.len(),
        2,
        "the report and the empty folder of the journal: {left:?}"
    );
}

#[test]
fn what_a_killed_driver_leaves_is_cleaned_up() {
    if !may_run() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let scenario = folder.path().join("scenario.yml");
    std::fs::write(
        &scenario,
        "name: killed\nlength: 5m\ncluster: {managers: 3, workers: 1}\n\
         services: [{name: web, image: probe, replicas: 2}]\n\
         faults: [{at: 1s, fault: pause, target: worker-1, for: 4m}]\n",
    )
    .expect("written");
    let mut driver = Killed(
        campaign(folder.path(), &format!("run {}", scenario.display()))
            .stdout(Stdio::null())
            .spawn()
            .expect("it starts"),
    );
    let text = folder.path().to_string_lossy().into_owned();
    let managers = || {
        let of_it = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default(); // it may have ended
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("bulkhead-manager") && line.contains(&text)
        };
        bulkhead_lab::system::processes()
            .iter()
            .filter(|pid| of_it(pid))
            .count()
    };
    // What stands still hears nobody who asks it to end.
    let stands = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains("State:\tT")
    };
    let mut tasks = Vec::new();
    eventually("two tasks stand still", || {
        tasks = bulkhead_lab::supervisors(folder.path());
        match (tasks.len(), tasks.iter().all(stands)) {
            (2, true) => Ok(()),
            _ => Err(format!("{tasks:?}")),
        }
    });
    driver.0.kill().expect("it runs");
    driver.0.wait().expect("it ended");
    assert_eq!(managers(), 3, "they outlive their driver");
    let cleaned = Answer::of(&mut chaos(folder.path(), "cleanup"), b"").success();
    assert!(
        cleaned.contains("taken back") && cleaned.contains("1 journals done"),
        "{cleaned}"
    );
    eventually("nothing runs", || {
        let tasks = tasks
            .iter()
            .filter(|pid| bulkhead_lab::system::started(**pid).is_some());
        match (managers(), tasks.count()) {
            (0, 0) => Ok(()),
            left => Err(format!("{left:?} do")),
        }
    });
    assert_eq!(
        bulkhead_lab::claims_of(folder.path()),
        Vec::<std::path::PathBuf>::new()
    );
    let again = Answer::of(&mut chaos(folder.path(), "cleanup"), b"").success();
    assert!(again.contains("0 journals done"), "{again}");
}

/// Ends the driver where the test fails before it does.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it ended already
        let _ = self.0.wait();
    }
}

#[test]
fn a_cluster_is_broken_only_if_it_was_made_to_be() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 1);
    let at = |line: &str| {
        let mut command = lab.program("bulkhead-chaos");
        command.args(line.split_whitespace());
        for (name, folder) in [("--state", "state"), ("--report", "report")] {
            command.arg(name).arg(lab.folder().join(folder));
        }
        Answer::of(&mut command, b"")
    };
    let unknown = at("live --target nobody --minutes 0.3");
    assert_eq!(unknown.code, 3);
    assert!(
        unknown.whole().contains("there is no context 'nobody'"),
        "{}",
        unknown.whole()
    );
    let scenario = lab.folder().join("scenario.yml");
    std::fs::write(
        &scenario,
        "name: own\nlength: 4s\nservices: [{name: web, image: probe, replicas: 2, publish: 8080}]\n\
         faults: [{at: 1s, fault: pause, target: worker, for: 1s}, {at: 2s, fault: rotate-root}]\n\
         expect: {answered: 10%, restarts: 0}\n",
    )
    .expect("written");
    let context = lab.ok("context ls -q");
    let held = at(&format!("run {} --target {}", scenario.display(), context.trim()));
    assert_eq!(held.code, 0, "{}", held.whole());
    eventually("the run took its services away", || {
        let left = lab.ok("service ls -q");
        left.trim().is_empty().then_some(()).ok_or(left)
    });
    assert_eq!(lab.ok("secret ls -q").trim(), "", "and its secrets");
    let network = at(&format!(
        "live --target {} --plan partition --minutes 0.3",
        context.trim()
    ));
    assert_ne!(
        network.code,
        1,
        "no rule is broken where nothing can be done: {}",
        network.whole()
    );
}

#[test]
fn a_cluster_that_was_not_made_for_it_is_refused() {
    if !may_run() {
        return;
    }
    let lab = Lab::nothing_yet();
    let manager = Spawned::manager(&lab, "own");
    let address = format!("{}.9:7443", lab.network());
    lab.ok(&format!(
        "cluster init --socket {} --listen {address} --advertise {address} --name own",
        manager.socket().display()
    ));
    let context = lab.ok("context ls -q");
    let mut command = lab.program("bulkhead-chaos");
    command.args([
        "live",
        "--plan",
        "rotation",
        "--minutes",
        "0.3",
        "--target",
        context.trim(),
    ]);
    command.arg("--state").arg(lab.folder().join("state"));
    let refused = Answer::of(&mut command, b"");
    assert_eq!(refused.code, 3);
    assert!(
        refused.whole().contains("was not made with --lab"),
        "{}",
        refused.whole()
    );
    let audit = lab.ok("audit");
    assert!(
        !audit.contains("rotate") && lab.ok("service ls -q").trim().is_empty(),
        "nothing was done: {audit}"
    );
}

#[test]
fn an_interrupted_run_leaves_a_cluster_that_stays_as_it_was() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 2);
    let scenario = lab.folder().join("scenario.yml");
    std::fs::write(
        &scenario,
        "name: long\nlength: 5m\nservices: [{name: web, image: probe, replicas: 2}]\n\
         faults: [{at: 1s, fault: drain, target: worker-1, for: 4m}, {at: 1s, fault: pause, target: worker-2, for: 4m}]\n",
    )
    .expect("written");
    let context = lab.ok("context ls -q");
    let mut command = lab.program("bulkhead-chaos");
    command
        .arg("run")
        .arg(&scenario)
        .arg("--target")
        .arg(context.trim());
    command.arg("--state").arg(lab.folder().join("state"));
    let mut driver = Killed(
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts"),
    );
    let availability = || lab.json("node inspect worker-1")[0]["availability"].to_string();
    eventually("a worker is drained", || {
        let is = availability();
        is.contains("drain").then_some(()).ok_or(is)
    });
    bulkhead_lab::send(driver.0.id(), nix::sys::signal::Signal::SIGINT);
    let ended = driver.0.wait().expect("it ends");
    assert_eq!(ended.code(), Some(3), "an interrupted run proves nothing");
    assert!(availability().contains("active"), "{}", availability());
    assert_eq!(lab.ok("secret ls -q").trim(), "");
    eventually("its services are gone and both workers are there", || {
        let (services, ready) = (
            lab.ok("service ls -q"),
            lab.ok("node ls -q --filter role=worker --filter state=ready"),
        );
        (services.trim().is_empty() && ready.lines().count() == 2)
            .then_some(())
            .ok_or(format!("{services} {ready}"))
    });
}

#[test]
fn a_scenario_that_is_none_is_refused_with_all_that_is_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("wrong.yml");
    std::fs::write(&path, "name: x\nlength: 5s\nfaults: [{at: 9s, fault: kill}]\n").expect("written");
    let refused = Answer::of(
        &mut campaign(folder.path(), &format!("run {}", path.display())),
        b"",
    );
    assert_eq!(refused.code, 3, "this is none of the cluster's faults");
    for part in ["after the end", "it lasts `for`", "it has a target", "wrong.yml"] {
        assert!(refused.whole().contains(part), "{part}: {}", refused.whole());
    }
}
