//! A secret is where its tasks are, and nowhere else: on no disk, in no log, in no program that does not need it.

use std::collections::BTreeMap;
use std::io::Read;

use bulkhead_tests::{Finding, Lab, Needles, eventually, files_below, may_run, memory_of, text};

#[test]
fn a_secret_is_on_no_disk_in_no_log_and_in_no_program_that_did_not_need_it() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 2);
    keys_are_never_swapped_out(&lab);
    lab.pack("web:1");
    lab.ok("node update worker-1 --label-add place=here");
    let value = random_text();
    let needles = Needles::of(value.as_bytes());
    lab.secret("canary", value.as_bytes());
    lab.ok("service create -d --name web --secret canary --publish 8080:80 --constraint node.labels.place==here web:1");
    lab.until_running("web", 1);
    let served = eventually("the task has it", || lab.get("worker-1", 8080, "/secret/canary"));
    assert_eq!(served, value);
    nowhere_else(&lab, &needles);

    // A new leader, and a manager that reads its log and the key ring anew.
    let leader = lab.leader();
    lab.ok("dev kill leader");
    lab.secret("another", b"so that the next leader wrote something");
    lab.ok(&format!("dev start {leader}"));
    lab.until_all_ready();
    nowhere_else(&lab, &needles);
}

/// Each program of the network has locked memory, for its keys.
fn keys_are_never_swapped_out(lab: &Lab) {
    for (node, program) in [("manager-1", "bulkhead-manager"), ("worker-1", "bulkhead-worker")] {
        let status = std::fs::read_to_string(format!("/proc/{}/status", lab.pid(node, program)));
        let status = status.unwrap_or_else(|e| panic!("{program}: {e}"));
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
        assert_ne!(locked.map(str::trim), Some("0 kB"), "{program}");
        assert!(locked.is_some(), "proc_pid_status(5) has it: {status}");
    }
}

/// Random letters, from the kernel.
fn random_text() -> String {
    let mut bytes = [0; 40];
    let mut source = std::fs::File::open("/dev/urandom").expect("a device");
    source.read_exact(&mut bytes).expect("random bytes");
    data_encoding::BASE32_NOPAD.encode(&bytes)
}

fn nowhere_else(lab: &Lab, needles: &Needles) {
    assert_eq!(files_below(lab.folder(), needles), [], "on a disk");
    for node in lab.nodes() {
        let path = lab.folder().join("printed");
        std::fs::write(&path, lab.ok(&format!("dev logs {node}"))).expect("its own folder");
        assert_eq!(files_below(lab.folder(), needles), [], "in the log of {node}");
    }
    let tasks_log = lab.ok("service logs web");
    std::fs::write(lab.folder().join("printed"), tasks_log).expect("its own folder");
    assert_eq!(files_below(lab.folder(), needles), [], "in the task's log");

    // Whoever handles it may hold it for a moment: an answer that is under way, a buffer of its connection.
    eventually("no program holds it that does not need it", || {
        let found = in_memory(lab, needles);
        found.is_empty().then_some(()).ok_or(format!("{found:#?}"))
    });
}

/// Where in the memory of the cluster's programs it is, those left out that hand it to the task or are the task.
fn in_memory(lab: &Lab, needles: &Needles) -> Vec<Finding> {
    // The worker with the task, and the manager at the other end of its session, whose buffer of that session may hold
    // what it last sent: docs/threat-model.md.
    let detail = text(&lab.status("worker-1"), "detail");
    let dispatches = |node: &&String| node.starts_with("manager") && detail.contains(&lab.address(node));
    let nodes = lab.nodes();
    let dispatcher = nodes
        .iter()
        .find(dispatches)
        .unwrap_or_else(|| panic!("a session: {detail}"));
    let needs = [
        lab.pid("worker-1", "bulkhead-worker"),
        lab.pid(dispatcher, "bulkhead-manager"),
    ];
    let programs: BTreeMap<i32, String> = lab
        .processes()
        .into_iter()
        .filter(|pid| !needs.contains(pid))
        .map(|pid| (pid, name(pid)))
        .filter(|(_, name)| name != "bulkhead-probe")
        .collect();
    let mut seen: Vec<&str> = programs.values().map(String::as_str).collect();
    seen.sort_unstable();
    let count = |wanted: &str| seen.iter().filter(|name| **name == wanted).count();
    // Names are cut to 15 characters. The other worker, both launchers, two managers and five units.
    assert_eq!(
        (
            count("bulkhead-worker"),
            count("bulkhead-launch"),
            count("bulkhead-manage"),
            count("bulkhead")
        ),
        (1, 2, 2, 5),
        "{seen:?}"
    );
    let search = |(pid, name): (&i32, &String)| {
        let found = memory_of(*pid, needles).unwrap_or_else(|e| panic!("{name}: {e}"));
        let named = |finding: Finding| Finding {
            place: format!("{name} {}", finding.place),
            ..finding
        };
        found.into_iter().map(named).collect::<Vec<_>>()
    };
    programs.iter().flat_map(search).collect()
}

fn name(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default(); // it may have ended
    name.trim().to_owned()
}
