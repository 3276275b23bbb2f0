//! What a task sees, and what it is refused, told by the probe from inside.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use bulkhead_launcher::message::{ExitCause, RefusalCode, Reply, Request, TaskSpec, Tmpfs};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use support::{Layer, Node, is_root};

#[test]
fn the_first_instruction_sees_exactly_what_was_given() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let mut spec = node.spec("view", vec![Layer::scratch().folder("srv", 0o755)], &["inspect"]);
    spec.env = vec![("GREETING".into(), "hello world".into())];
    spec.workdir = "/srv".into();
    spec.user = "1000:1001".into();
    let seen = node.inspect_inside(&spec);

    let numbers: Vec<&Value> = seen["descriptors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| &d["number"])
        .collect();
    assert_eq!(numbers, [&json!(0), &json!(1), &json!(2)]);
    assert_eq!(seen["descriptors"][0]["target"], "/dev/null");
    assert_eq!(seen["env"], json!(["GREETING"]));
    assert_eq!(seen["args"], json!(["/probe", "inspect"]));
    assert_eq!(
        (&seen["cwd"], &seen["hostname"], &seen["pid"]),
        (&json!("/srv"), &json!("probe-host"), &json!(1))
    );
    assert_eq!(seen["processes"], json!([1]));
    assert_eq!(seen["interfaces"], json!(["lo"]));
    assert_eq!(seen["groups"], json!([]));
    let status = &seen["status"];
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(
        (&status["NoNewPrivs"], &status["Seccomp"]),
        (&json!("1"), &json!("2"))
    );
    assert_eq!(
        (&status["Uid"], &status["Gid"]),
        (&json!("1000 1000 1000 1000"), &json!("1001 1001 1001 1001"))
    );
    let limits = json!({"core": [0, 0], "open_files": [1024, 4096], "locked_bytes": [65_536, 65_536]});
    assert_eq!(seen["limits"], limits);
    assert!(
        seen["cgroup"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|l| l.as_str().unwrap().contains("memory"))
            .all(|l| l.as_str().unwrap().ends_with(":/"))
    );
}

#[test]
fn mounts_and_devices_are_the_tasks_own_and_name_no_host_path() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("mounts", vec![Layer::scratch()], &["inspect"]);
    let seen = node.inspect_inside(&spec);
    let mounts: Vec<String> = seen["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| line.as_str().unwrap().to_owned())
        .collect();
    let data = node.data().display().to_string();
    for line in &mounts {
        assert!(!line.contains(&data) && !line.contains("bulkhead"), "{line}");
    }
    let places: BTreeSet<&str> = mounts.iter().filter_map(|line| line.split(' ').nth(4)).collect();
    for place in &places {
        let known = ["/", "/dev", "/proc", "/tmp"].contains(place)
            || place.starts_with("/dev/")
            || place.starts_with("/proc/");
        assert!(known, "{place}");
    }
    let devices = [
        "fd",
        "full c1:7",
        "null c1:3",
        "random c1:8",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "urandom c1:9",
        "zero c1:5",
    ];
    assert_eq!(seen["devices"], json!(devices));
}

#[test]
fn writes_go_only_where_they_are_declared() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let mut spec = node.spec(
        "writes",
        vec![Layer::scratch().folder("etc", 0o777).folder("bin", 0o777)],
        &["inspect"],
    );
    spec.tmpfs = vec![Tmpfs {
        path: "/run".into(),
        size_bytes: 1 << 20,
    }];
    let seen = node.inspect_inside(&spec);
    for place in ["/tmp", "/dev/shm", "/run", "/dev/null"] {
        assert_eq!(seen["write"][place], "ok", "{place}");
    }
    for place in ["/", "/etc", "/bin"] {
        assert!(
            seen["write"][place]
                .as_str()
                .unwrap()
                .starts_with("Read-only file system"),
            "{place}: {}",
            seen["write"][place]
        );
    }
    for (place, outcome) in seen["write"].as_object().unwrap() {
        let allowed = ["/tmp", "/dev/shm", "/run", "/dev/null", "/run/secrets"].contains(&place.as_str());
        assert!(allowed || outcome != "ok", "{place}");
    }
    for (place, outcome) in seen["read"].as_object().unwrap() {
        assert!(
            outcome != "ok" || place == "/proc/1/environ",
            "{place} can be read"
        );
    }
    assert_eq!(seen["bind_80"], "ok");
    assert!(
        seen["connect"]["127.0.0.1:1"]
            .as_str()
            .unwrap()
            .starts_with("Connection refused")
    );
    for outside in ["10.0.0.1:80", "169.254.169.254:80"] {
        assert!(
            seen["connect"][outside]
                .as_str()
                .unwrap()
                .starts_with("Network is unreachable")
        );
    }
}

#[test]
fn every_dangerous_system_call_is_refused() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    // As the sandbox's root: what is refused here is refused to everyone.
    let spec = node.spec("calls", vec![Layer::scratch()], &["syscalls"]);
    let (_, output, error) = node.run(&spec);
    let results: Value = serde_json::from_str(&output).unwrap_or_else(|_| panic!("{output} {error}"));
    for (name, outcome) in results.as_object().unwrap() {
        let expected = match name.as_str() {
            "clone3" | "unknown" => "ENOSYS",
            "abi_x32" | "abi_i386" => "signal 31",
            _ => "EPERM",
        };
        assert_eq!(outcome, expected, "{name}");
    }
    assert!(results.as_object().unwrap().len() > 50);
}

#[test]
fn secrets_are_files_of_the_tasks_user_that_nobody_can_change() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let mut spec = node.spec(
        "secret",
        vec![Layer::scratch().symlink("run", "/tmp")],
        &["inspect"],
    );
    spec.user = "33:34".into();
    let large = vec![7; 500 * 1024];
    node.start_with_secrets(&spec, &[("db-password", b"hunter2"), ("large", &large)])
        .unwrap();
    assert_eq!(node.wait_exit(&spec.task).cause, ExitCause::Code(0));
    let seen: Value = serde_json::from_str(&node.log(&spec.task).0).unwrap();
    let mut secrets = seen["secrets"].as_array().unwrap().clone();
    secrets.sort_by_key(|secret| secret["name"].to_string());
    assert_eq!(secrets.len(), 2);
    let digest = "f52fbd32b2b3b86ff88ef6c490628285f482af15ddcb29541f94bcf526a3f6c7";
    let expected =
        json!({"name": "db-password", "mode": "0400", "uid": 33, "gid": 34, "length": 7, "sha256": digest});
    assert_eq!(secrets[0], expected);
    assert_eq!(secrets[1]["length"], 512_000);
    assert_ne!(seen["write"]["/run/secrets"], "ok");
    let line = seen["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|line| line.as_str().unwrap().contains(" /run/secrets "));
    let line = line.unwrap().as_str().unwrap();
    assert!(
        line.contains(" ro,nosuid,nodev,noexec") && line.contains("noswap"),
        "{line}"
    );
}

#[test]
fn too_few_or_too_many_bytes_of_secrets_start_nothing() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("cut", vec![Layer::scratch()], &["inspect"]);
    for value in [&b"short"[..], b"much too long"] {
        use bulkhead_launcher::message::SecretFile;
        use std::io::Write;
        let spec = TaskSpec {
            secrets: vec![SecretFile {
                name: "a".into(),
                size: 8,
            }],
            ..spec.clone()
        };
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let id = node.send(Request::Start(Box::new(spec)), &[&theirs.into()]);
        ours.write_all(value).unwrap();
        drop(ours);
        assert_eq!(node.reply(id).unwrap_err().code, RefusalCode::StartFailed);
    }
    assert!(node.tasks().is_empty());
}

#[test]
fn links_where_mounts_go_are_hidden() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let image = Layer::scratch()
        .symlink("dev", "/tmp")
        .symlink("proc", "/tmp")
        .symlink("run", "/proc/self/cwd")
        .symlink("etc", "/tmp")
        .symlink("tmp", "/");
    let spec = node.spec("links", vec![image], &["inspect"]);
    let seen = node.inspect_inside(&spec);
    assert_eq!(seen["pid"], 1);
    assert_eq!(seen["hostname"], "probe-host");
    assert_eq!(seen["write"]["/dev/null"], "ok");
    assert_ne!(seen["write"]["/"], "ok");
}

#[test]
fn users_and_working_folders_that_lead_outside_are_refused() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let image =
        Layer::scratch()
            .symlink("fd", "/proc/self/fd/7")
            .file("etc/passwd", b"web:x:33:34::/:/\n", 0o644);
    let spec = node.spec("users", vec![image], &["inspect"]);
    let mut refused = |change: &dyn Fn(&mut TaskSpec)| {
        let mut spec = spec.clone();
        change(&mut spec);
        let refusal = node.start_task(&spec).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::Invalid, "{refusal}");
        assert!(!refusal.message.contains("/tmp/"), "{refusal}");
    };
    for user in ["4294967296", "-1", "65536", "0 ", "nobody-here"] {
        refused(&|spec| spec.user = user.to_owned());
    }
    for folder in ["/proc/self/fd/3", "/fd", "/missing", "/probe"] {
        refused(&|spec| spec.workdir = folder.to_owned());
    }
    let named = TaskSpec {
        user: "web".into(),
        ..spec.clone()
    };
    assert_eq!(node.inspect_inside(&named)["status"]["Uid"], "33 33 33 33");
}

#[test]
fn a_memory_hog_and_a_fork_bomb_end_alone_and_their_flags_are_named() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let hog = node.spec("hog", vec![Layer::scratch()], &["hog-memory"]);
    let (exit, output, _) = node.run(&hog);
    assert!(
        exit.out_of_memory && exit.message.contains("--limit-memory"),
        "{exit:?}"
    );
    assert_eq!(output, "taking memory\n");
    let bomb = node.spec("bomb", vec![Layer::scratch()], &["fork-bomb"]);
    let (exit, output, error) = node.run(&bomb);
    assert_eq!(exit.cause, ExitCause::Code(3), "{error}");
    assert!(
        output.starts_with("63 processes, then: Resource temporarily unavailable"),
        "{output}"
    );
    assert!(exit.message.contains("--limit-pids"), "{exit:?}");
}

#[test]
fn streams_can_be_opened_again_and_logs_stay_bounded() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let mut spec = node.spec("reopen", vec![Layer::scratch()], &["reopen"]);
    spec.user = "1000".into();
    let (exit, output, error) = node.run(&spec);
    assert_eq!(
        (exit.cause, output.as_str(), error.as_str()),
        (ExitCause::Code(0), "reopened\n", "reopened too\n")
    );

    let mut spec = node.spec("chatty", vec![Layer::scratch()], &["lines", "100000", "100"]);
    spec.limits.log_bytes = 1 << 20;
    let (exit, output, _) = node.run(&spec);
    assert_eq!(exit.cause, ExitCause::Code(0));
    assert!(
        output.len() > 256 << 10 && output.len() <= 1 << 20,
        "{}",
        output.len()
    );
}

#[test]
fn the_kernel_confirms_the_profile_from_outside() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("profile", vec![Layer::scratch()], &["sleep"]);
    let status = node.start_task(&spec).unwrap();
    let Reply::Profile(profile) = node
        .ask(Request::Inspect {
            task: spec.task.clone(),
        })
        .unwrap()
        .0
    else {
        panic!("not a profile")
    };
    let line = |name: &str| {
        profile
            .status
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    };
    assert_eq!(line("CapEff"), Some("0000000000000000"));
    assert_eq!((line("NoNewPrivs"), line("Seccomp")), (Some("1"), Some("2")));
    let [inside, outside, count] = profile.uid_map[0];
    assert!(inside == 0 && outside >= 0x7001_0000 && count == 65_536);
    for (kind, inode) in &profile.namespaces {
        use std::os::unix::fs::MetadataExt;
        let host = std::fs::metadata(format!("/proc/self/ns/{kind}")).unwrap().ino();
        assert_ne!(host, *inode, "{kind}");
    }
    assert!(
        profile
            .limits
            .iter()
            .any(|(name, value)| name == "pids.max" && value == "64"),
        "{:?}",
        profile.limits
    );
    let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", status.pid)).unwrap();
    assert_eq!(score.trim(), "500");
}

#[test]
fn sockets_reach_the_task_and_nothing_else() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec("web", vec![Layer::scratch()], &["serve"]);
    node.start_task(&spec).unwrap();
    let mut answer = String::new();
    // The program listens a moment after it was executed.
    while answer.is_empty() {
        let (_, sockets) = node
            .ask(Request::Sockets {
                task: spec.task.clone(),
                count: 2,
            })
            .unwrap();
        assert_eq!(sockets.len(), 2);
        let socket = sockets.into_iter().next().unwrap();
        rustix::io::ioctl_fionbio(&socket, false).unwrap();
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], 80));
        if rustix::net::connect(&socket, &address).is_ok() {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::from(socket);
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            stream.read_to_string(&mut answer).unwrap();
        }
    }
    assert!(answer.contains("hello from probe-host"), "{answer}");
}
