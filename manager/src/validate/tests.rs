use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    Constraint, Label, PublishedPort, Resources, RestartPolicy, SecretReference, ServiceSpec, TmpfsMount,
    UpdatePolicy,
};

use super::*;

fn good() -> ServiceSpec {
    ServiceSpec {
        name: "web".into(),
        image_name: "web:1".into(),
        replicas: 3,
        ..Default::default()
    }
}

/// The fields in which the changed spec is wrong.
#[track_caller]
fn check(change: impl FnOnce(&mut ServiceSpec), expected: &[&str]) {
    let mut changed = good();
    change(&mut changed);
    let mistakes = spec(&changed).err().unwrap_or_default();
    let fields: Vec<_> = mistakes.iter().map(|mistake| &mistake.field[..]).collect();
    assert_eq!(fields, expected, "{mistakes:?}");
}

fn label(key: &str, value: &str) -> Label {
    Label {
        key: key.into(),
        value: value.into(),
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn tmpfs(path: &str, size_bytes: u64) -> TmpfsMount {
    TmpfsMount {
        path: path.into(),
        size_bytes,
    }
}

fn secret(name: &str) -> SecretReference {
    SecretReference {
        name: name.into(),
        ..Default::default()
    }
}

fn port(host: u32, target: u32) -> PublishedPort {
    PublishedPort { host, target }
}

fn constraint(key: &str, value: &str) -> Constraint {
    Constraint {
        key: key.into(),
        equal: true,
        value: value.into(),
    }
}

#[test]
fn a_full_spec_passes() {
    check(
        |spec| {
            spec.labels = vec![label("team/a.b", "x y")];
            spec.command = words(&["/bin/web"]);
            spec.arguments = words(&["", "-v"]);
            spec.environment = words(&["A=", "B=1=2", "_c.d-e=x"]);
            spec.user = "1000:app".into();
            spec.tmpfs = vec![tmpfs("/cache", 0), tmpfs("/run/app", 1 << 20)];
            spec.secrets = vec![secret("db-password"), secret("tls.key")];
            spec.ports = vec![port(8080, 80), port(8081, 80)];
            spec.constraints = vec![constraint("node.labels.zone", "eu")];
            // More than any machine has is a question for the scheduler, which answers it with reasons.
            spec.reservation = Some(Resources {
                memory_bytes: 900 << 30,
                ..Default::default()
            });
        },
        &[],
    );
}

#[test]
fn all_mistakes_are_told_at_once_and_one_by_one_with_a_hint() {
    let mut wrong = good();
    wrong.name = "Web".into();
    wrong.replicas = limits::REPLICAS + 1;
    wrong.ports = vec![port(0, 70_000)];
    let mistakes = spec(&wrong).expect_err("wrong");
    let told: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "name: 'Web' is not a name; use a-z, 0-9 and '-', start with a letter, end without '-', at most 63 \
             characters",
            "replicas: 10001; the limit is 10000; ask for less",
            "ports[0].host: 0 is not a port; use 1 to 65535",
            "ports[0].target: 70000 is not a port; use 1 to 65535",
        ]
    );
}

#[test]
fn names_are_dns_labels() {
    for good in ["a", "web-1", &"a".repeat(63)] {
        assert_eq!(name("name", good), Ok(()), "{good}");
    }
    for bad in ["", "1a", "-a", "a-", "a_b", "a.b", "ä", "a/../b", &"a".repeat(64)] {
        assert!(name("name", bad).is_err(), "{bad}");
    }
}

#[test]
fn labels_are_checked_alone_too() {
    assert_eq!(labels("labels", &[label("a", "1")]), []);
    let wrong = [
        label("", "1"),
        label("a b", "1"),
        label("a", "\u{1b}[2J"),
        label("a", &"x".repeat(256)),
    ];
    let fields: Vec<_> = labels("labels", &wrong)
        .into_iter()
        .map(|mistake| mistake.field)
        .collect();
    assert_eq!(
        fields,
        ["labels[0]", "labels[1]", "labels[2]", "labels[3]", "labels[3]"]
    );
    let many: Vec<_> = (0..=limits::LABELS).map(|n| label(&n.to_string(), "")).collect();
    assert_eq!(labels("label_add", &many)[0].field, "label_add: entries");
}

#[test]
fn programs_and_variables() {
    check(|spec| spec.image_name = String::new(), &["image"]);
    check(|spec| spec.image_name = "a b".into(), &["image"]);
    check(|spec| spec.image_name = "x".repeat(256), &["image"]);
    check(|spec| spec.command = words(&["", "x"]), &["command"]);
    check(|spec| spec.command = words(&["a\0b"]), &["command[0]"]);
    check(
        |spec| spec.arguments = vec![String::new(); limits::ARGUMENTS + 1],
        &["arguments: entries"],
    );
    check(
        |spec| spec.environment = words(&["novalue", "=x", "1a=x", "a b=x"]),
        &[
            "environment[0]",
            "environment[1]",
            "environment[2]",
            "environment[3]",
        ],
    );
    check(
        |spec| spec.environment = words(&["A=1", "A=2", "B=\0"]),
        &["environment[1]", "environment[2]"],
    );
    check(
        |spec| spec.environment = vec![format!("A={}", "x".repeat(limits::ENVIRONMENT_ENTRY_BYTES))],
        &["environment[0]"],
    );
    for user in ["root", "0", "65534:65534", "www-data"] {
        check(|spec| spec.user = user.into(), &[]);
    }
    for user in [":", "a:", ":a", "65535", "4294967296", "a b", "-1:\n", "../x"] {
        check(|spec| spec.user = user.into(), &["user"]);
    }
}

#[test]
fn a_variable_s_value_is_never_repeated() {
    let mut wrong = good();
    wrong.environment = words(&["A=1", "A=canary-5", "bad name=canary-5", "canary-5"]);
    let told = format!("{:?}", spec(&wrong).expect_err("wrong"));
    assert!(!told.contains("canary-5"), "{told}");
}

#[test]
fn places_and_files() {
    for path in ["", "/", "cache", "/a/../b", "/a//b", "/a/", "/a\n", "/./a"] {
        check(|spec| spec.tmpfs = vec![tmpfs(path, 0)], &["tmpfs[0]"]);
    }
    for path in ["/proc", "/dev/shm", "/run/secrets", "/run/secrets/x"] {
        check(|spec| spec.tmpfs = vec![tmpfs(path, 0)], &["tmpfs[0]"]);
    }
    check(|spec| spec.tmpfs = vec![tmpfs("/devices", 1)], &["tmpfs[0]"]);
    check(
        |spec| spec.tmpfs = vec![tmpfs("/a", 0), tmpfs("/a", 0)],
        &["tmpfs[1]"],
    );
    check(
        |spec| spec.tmpfs = (0..17).map(|n| tmpfs(&format!("/{n}"), 0)).collect(),
        &["tmpfs: entries"],
    );
    for name in ["", ".", "..", "a/b", "a b", &"x".repeat(256)] {
        check(|spec| spec.secrets = vec![secret(name)], &["secrets[0]"]);
    }
    check(
        |spec| spec.secrets = vec![secret("a"), secret("a")],
        &["secrets[1]"],
    );
}

#[test]
fn ports_and_constraints() {
    check(
        |spec| spec.ports = vec![port(80, 1), port(80, 2)],
        &["ports[1].host"],
    );
    check(
        |spec| spec.constraints = vec![constraint("node.zone", "a"), constraint("node.id", "")],
        &["constraints[0]", "constraints[1]"],
    );
    let by_host = |spec: &mut ServiceSpec| spec.constraints = vec![constraint("node.hostname", "a")];
    check(by_host, &[]);
    check(
        |spec| {
            by_host(spec);
            spec.secrets = vec![secret("a")];
        },
        &["constraints[0]"],
    );
}

#[test]
fn amounts_have_bounds() {
    let resources = |cpu_millis, memory_bytes, pids| {
        Some(Resources {
            cpu_millis,
            memory_bytes,
            pids,
        })
    };
    check(
        |spec| spec.limit = resources(9, (4 << 20) - 1, 100_001),
        &["limit.cpu", "limit.memory", "limit.pids"],
    );
    check(
        |spec| spec.reservation = resources(0, 0, 1),
        &["reservation.pids"],
    );
    check(
        |spec| {
            spec.reservation = resources(200, 64 << 20, 0);
            spec.limit = resources(100, 32 << 20, 0);
        },
        &["limit.cpu", "limit.memory"],
    );
    check(
        |spec| {
            spec.restart = Some(RestartPolicy {
                condition: 9,
                delay_ms: DAY_MS + 1,
                max_attempts: 0,
            });
            spec.update = Some(UpdatePolicy {
                parallelism: limits::REPLICAS + 1,
                monitor_ms: DAY_MS + 1,
            });
            spec.stop_grace_ms = DAY_MS + 1;
        },
        &[
            "restart.condition",
            "restart.delay",
            "update.monitor",
            "update.parallelism",
            "stop_grace",
        ],
    );
}

#[test]
fn a_spec_and_its_mistakes_are_bounded() {
    check(
        |spec| spec.environment = (0..3).map(|n| format!("A{n}={}", "x".repeat(30 << 10))).collect(),
        &["spec"],
    );
    let mut wrong = good();
    wrong.environment = vec![String::new(); 10_000];
    assert_eq!(spec(&wrong).expect_err("wrong").len(), MISTAKES);
}
