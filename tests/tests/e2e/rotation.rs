//! The root rolls while the cluster works, and who was away comes back.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use bulkhead_tests::{Follow, Lab, eventually, may_run, text};
use serde_json::Value;

use crate::openssl::{key_file_of, lets_in, openssl, pem, presented, verifies};

#[test]
fn the_root_rolls_under_load_and_who_was_away_comes_back() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 3);
    lab.pack("web:1");
    lab.ok("service create -d --name web --replicas 2 --publish 8080:80 web:1");
    lab.until_running("web", 2);
    lab.ok("operator issue idle");
    certificates_last_as_long_as_the_cluster_says(&lab);

    // One worker without a task is off meanwhile.
    let used: Vec<String> = lab.running("web").iter().map(|task| text(task, "node")).collect();
    let away = lab
        .nodes()
        .into_iter()
        .find(|node| node.starts_with("worker") && !used.contains(node))
        .expect("a worker without a task");
    lab.ok(&format!("dev kill {away}"));
    eventually("it counts as down", || {
        let down = lab.list("node ls --filter state=down");
        (down.len() == 1).then_some(()).ok_or_else(|| lab.ok("node ls"))
    });
    let (pids, before) = (lab.pids("web"), issuer(&lab));
    let mut log = Follow::start(&mut lab.command("service logs -f web"));
    log.until("listening on port 80");

    let (over, writes) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let n = writes.fetch_add(1, Ordering::Relaxed);
                lab.secret(&format!("during-{n}"), b"value");
            }
        });
        let rotated = lab.run("cluster ca rotate");
        over.store(true, Ordering::Relaxed);
        assert_eq!(rotated.code, 0, "{}", rotated.whole());
        rotated.says("no rotation is under way");
    });
    assert!(writes.load(Ordering::Relaxed) > 3, "{writes:?} writes");
    let after = issuer(&lab);
    assert_ne!(before, after);
    assert_eq!(lab.pids("web"), pids, "no task was started again");
    eventually("the log goes on in the workers' new sessions", || {
        // The probe knows no such path, and writes that it was asked.
        let _ = lab.get(&used[0], 8080, "/after-the-rotation");
        log.saw("GET /after-the-rotation")
            .then_some(())
            .ok_or_else(String::new)
    });
    drop(log);
    // The away worker alone still has a certificate of the long kind.
    let nodes = lab.ok("node ls");
    assert_eq!(nodes.matches("in 47h").count(), 5, "{nodes}");
    presents_the_new_root_only(&lab, &after);

    // It misses another one.
    lab.ok("cluster ca rotate");
    let after = issuer(&lab);
    presents_the_new_root_only(&lab, &after);

    // An operator who said nothing meanwhile, and the worker that was off.
    assert!(lab.ok("--context idle node ls").contains("worker-1"));
    lab.ok(&format!("dev start {away}"));
    lab.until(&away, "ready");
    lab.ok("service scale web=4");
    // The next one finds everyone at work, and every leader goes on with it.
    lab.ok("cluster ca rotate -d");
    lab.run("cluster ca rotate").refused(10, "BH-E0063");
    let leader = lab.leader();
    lab.ok(&format!("dev kill {leader}"));
    eventually("the rotation ends under another leader", || {
        let status = lab.json("cluster ca status");
        status["phase"].is_null().then_some(()).ok_or(status.to_string())
    });
    assert_ne!(issuer(&lab), after);
    lab.ok(&format!("dev start {leader}"));
    lab.until_all_ready();
}

pub(crate) fn issuer(lab: &Lab) -> String {
    text(&lab.json("cluster ca status"), "issuer")
}

fn certificates_last_as_long_as_the_cluster_says(lab: &Lab) {
    lab.run("cluster update --cert-expiry 4m").says("from 5m to 365d");
    lab.ok("cluster update --cert-expiry 48h");
    assert!(
        lab.ok("cluster status").contains("valid for 2d"),
        "{}",
        lab.ok("cluster status")
    );
}

/// What each manager presents, as openssl sees it, is of this root in the end.
fn presents_the_new_root_only(lab: &Lab, root: &str) {
    for node in managers(lab) {
        eventually(&format!("{node} presents a certificate of the new root"), || {
            let (leaf, between) = presented(lab, &node, "h2");
            let issuer = openssl(&["x509", "-noout", "-issuer", "-in", &leaf]).success();
            (issuer.contains(&format!("root {root}")) && between.is_none())
                .then_some(())
                .ok_or(issuer)
        });
    }
}

pub(crate) fn managers(lab: &Lab) -> Vec<String> {
    let nodes = lab.nodes().into_iter();
    nodes.filter(|node| node.starts_with("manager")).collect()
}

/// Each phase is held by a worker that cannot write its key file, while openssl looks at what the others present.
#[test]
fn openssl_agrees_at_each_phase_and_after_the_end_believes_nothing_by_the_old_root() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 2);
    let roots = |node: &str| key_file_of(&lab, node).credentials.bundle.ders();
    let leaf = |node: &str, name: &str| {
        let credentials = key_file_of(&lab, node).credentials.clone();
        pem(&lab, name, "CERTIFICATE", credentials.certificate.der())
    };
    let old = pem(&lab, "old-root.pem", "CERTIFICATE", &roots("manager-1")[0]);

    held(&lab, "worker-1", true);
    lab.ok("cluster ca rotate -d");
    until_lagging(&lab, "bundle", &["worker-1"]);
    let new = pem(&lab, "new-root.pem", "CERTIFICATE", &roots("manager-1")[1]);
    assert!(verifies(&new, None, &new) && !verifies(&old, None, &new));
    for node in managers(&lab) {
        let (leaf, between) = presented(&lab, &node, "h2");
        assert_eq!(between, None, "{node}");
        assert!(
            verifies(&old, None, &leaf) && !verifies(&new, None, &leaf),
            "{node}"
        );
    }
    assert_eq!(roots("worker-1").len(), 1, "it could not be written");
    assert_eq!(roots("worker-2").len(), 2);

    held(&lab, "worker-2", true);
    held(&lab, "worker-1", false);
    until_lagging(&lab, "issue", &["worker-2"]);
    for node in managers(&lab) {
        let (leaf, between) = presented(&lab, &node, "h2");
        let cross = between.expect("the cross-certificate");
        assert!(
            verifies(&old, Some(&cross), &leaf),
            "{node} by the cross-certificate"
        );
        assert!(verifies(&new, None, &leaf), "{node} by the new root");
        assert!(!verifies(&old, None, &leaf), "{node} by the old root alone");
    }
    let (renewed, late) = (leaf("worker-1", "renewed.pem"), leaf("worker-2", "late.pem"));
    let cross = &key_file_of(&lab, "worker-1").credentials.chain[0];
    let cross = pem(&lab, "cross.pem", "CERTIFICATE", cross);
    assert!(verifies(&old, Some(&cross), &renewed) && verifies(&new, None, &renewed));
    assert!(verifies(&old, None, &late) && !verifies(&new, None, &late));

    held(&lab, "worker-2", false);
    eventually("the rotation ends", || {
        let status = lab.json("cluster ca status");
        status["phase"].is_null().then_some(()).ok_or(status.to_string())
    });
    // Everyone has heard of the end.
    eventually("every node trusts the new root alone", || {
        let late = lab.nodes().into_iter().find(|node| roots(node).len() != 1);
        late.map_or(Ok(()), Err)
    });
    for node in managers(&lab) {
        let (leaf, between) = presented(&lab, &node, "h2");
        assert_eq!(between, None, "{node}");
        assert!(
            verifies(&new, None, &leaf) && !verifies(&old, None, &leaf),
            "{node}"
        );
        // Who was away asks to be taken back by another protocol, and finds the way from the old root there.
        let (leaf, between) = presented(&lab, &node, "bulkhead-enrol");
        assert!(verifies(&old, between.as_deref(), &leaf), "{node}");
    }
    let manager = key_file_of(&lab, "manager-1").credentials;
    let server = (
        pem(&lab, "server.pem", "CERTIFICATE", manager.certificate.der()),
        pem(&lab, "server-key.pem", "PRIVATE KEY", manager.key.pkcs8()),
    );
    let address = format!("{}.250:7443", lab.network());
    for node in ["worker-1", "worker-2"] {
        let credentials = key_file_of(&lab, node).credentials;
        for (root, believed) in [(&new, true), (&old, false)] {
            let let_in = lets_in(&address, root, (&server.0, &server.1), credentials.clone());
            assert_eq!(let_in, believed, "{node} by {root}");
        }
    }
}

/// A folder in which its owner, who is not root, can write nothing; or no longer.
pub(crate) fn held(lab: &Lab, node: &str, held: bool) {
    let folder = lab.data(node).join("worker");
    let key = std::fs::metadata(folder.join("node.key")).expect("a key file");
    let owner = if held { 0 } else { key.uid() };
    std::os::unix::fs::chown(&folder, Some(owner), None).expect("root may");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&folder, mode).expect("root may");
}

/// Waits until the rotation is in this phase, and waits for these nodes alone.
pub(crate) fn until_lagging(lab: &Lab, phase: &str, nodes: &[&str]) {
    eventually(&format!("phase {phase} waits for {nodes:?}"), || {
        let status = lab.json("cluster ca status");
        let all = status["nodes"].as_array().expect("a list");
        let lags = |node: &&Value| node["waited_for"] == true && node["lags"] != "";
        let lagging: Vec<String> = all.iter().filter(lags).map(|node| text(node, "name")).collect();
        (status["phase"] == phase && lagging == nodes)
            .then_some(())
            .ok_or(status.to_string())
    });
}

#[test]
fn a_rotation_is_cancelled_and_leads_to_a_root_of_ones_own_and_back() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 1);
    let first = issuer(&lab);
    lab.run("cluster ca cancel")
        .refused(10, "BH-E0063")
        .says("no rotation");

    held(&lab, "worker-1", true);
    lab.ok("cluster ca rotate -d");
    until_lagging(&lab, "bundle", &["worker-1"]);
    lab.run("cluster ca rotate")
        .refused(10, "BH-E0063")
        .says("cluster ca cancel");
    lab.ok("cluster ca cancel");
    let status = lab.json("cluster ca status");
    assert!(status["phase"].is_null() && issuer(&lab) == first, "{status}");
    eventually("every node trusts the old root alone again", || {
        let late = lab
            .nodes()
            .into_iter()
            .find(|node| key_file_of(&lab, node).credentials.bundle.roots().len() != 1);
        late.map_or(Ok(()), Err)
    });
    held(&lab, "worker-1", false);

    bad_roots_are_refused(&lab);
    make_root(&lab, "own", GOOD);
    let own = rotated(&lab, "own");
    assert_ne!(own, first);
    // And away from it, and back: its key was kept.
    lab.ok("cluster ca rotate");
    assert_ne!(issuer(&lab), own);
    assert_eq!(rotated(&lab, "own"), own);
    lab.run("cluster ca rotate --ca-cert own.pem --ca-key own-key.pem")
        .refused(1, "BH-E0092")
        .says("already");
    lab.until_all_ready();
    lab.secret("after", b"value");
}

/// Rotates to a root of one's own; gives its id.
fn rotated(lab: &Lab, name: &str) -> String {
    lab.ok(&format!(
        "cluster ca rotate --ca-cert {name}.pem --ca-key {name}-key.pem"
    ));
    until_presented(lab, name);
    issuer(lab)
}

/// Waits until each manager presents a certificate of this root, and of no other.
pub(crate) fn until_presented(lab: &Lab, name: &str) {
    let root = format!("{}/{name}.pem", lab.folder().display());
    for node in managers(lab) {
        eventually(&format!("{node} presents a certificate of {name} alone"), || {
            let (leaf, between) = presented(lab, &node, "h2");
            (between.is_none() && verifies(&root, None, &leaf))
                .then_some(())
                .ok_or_else(String::new)
        });
    }
}

/// How a root is made; as docs/operations/rotate-the-root.md says unless told otherwise.
#[derive(Clone, Copy)]
pub(crate) struct Recipe {
    key: &'static str,
    kind: &'static str,
    digest: &'static str,
    days: &'static str,
    basic: &'static str,
    usage: &'static str,
    organisation: Option<&'static str>,
}

pub(crate) const GOOD: Recipe = Recipe {
    key: "ec",
    kind: "ec_paramgen_curve:P-256",
    digest: "-sha256",
    days: "3650",
    basic: "basicConstraints=critical,CA:TRUE,pathlen:1",
    usage: "keyUsage=critical,keyCertSign",
    organisation: None,
};

/// Writes NAME.pem and NAME-key.pem.
pub(crate) fn make_root(lab: &Lab, name: &str, recipe: Recipe) {
    let cluster = text(&lab.json("cluster status"), "cluster_id");
    let subject = format!("/O={}/CN=our {name}", recipe.organisation.unwrap_or(&cluster));
    let path = |name: &str| format!("{}/{name}.pem", lab.folder().display());
    let (root, key) = (path(name), path(&format!("{name}-key")));
    openssl(&[
        "req",
        "-x509",
        "-newkey",
        recipe.key,
        "-pkeyopt",
        recipe.kind,
        recipe.digest,
        "-nodes",
        "-days",
        recipe.days,
        "-subj",
        &subject,
        "-addext",
        recipe.basic,
        "-addext",
        recipe.usage,
        "-keyout",
        &key,
        "-out",
        &root,
    ])
    .success();
}

fn bad_roots_are_refused(lab: &Lab) {
    let rotate = |name: &str, key: &str| {
        lab.run(&format!(
            "cluster ca rotate --ca-cert {name}.pem --ca-key {key}.pem"
        ))
    };
    let refused = |name: &str, says: &str| {
        rotate(name, &format!("{name}-key"))
            .refused(1, "BH-E0092")
            .says(says);
    };
    let bad = [
        (
            "sha1",
            Recipe {
                digest: "-sha1",
                ..GOOD
            },
            "SHA-256",
        ),
        (
            "p384",
            Recipe {
                kind: "ec_paramgen_curve:P-384",
                ..GOOD
            },
            "P-256",
        ),
        (
            "rsa",
            Recipe {
                key: "rsa",
                kind: "rsa_keygen_bits:2048",
                ..GOOD
            },
            "P-256",
        ),
        ("soon", Recipe { days: "30", ..GOOD }, "more days"),
        (
            "no-authority",
            Recipe {
                basic: "basicConstraints=critical,CA:FALSE",
                ..GOOD
            },
            "authority",
        ),
        (
            "short",
            Recipe {
                basic: "basicConstraints=critical,CA:TRUE,pathlen:0",
                ..GOOD
            },
            "path length",
        ),
        (
            "more",
            Recipe {
                usage: "keyUsage=critical,keyCertSign,digitalSignature",
                ..GOOD
            },
            "key usage",
        ),
        (
            "foreign",
            Recipe {
                organisation: Some("somebody"),
                ..GOOD
            },
            "O=<cluster id>",
        ),
    ];
    for (name, recipe, says) in bad {
        make_root(lab, name, recipe);
        refused(name, says);
    }
    make_root(lab, "good", GOOD);
    make_root(lab, "another", GOOD);
    rotate("good", "another-key")
        .refused(1, "BH-E0092")
        .says("not the certificate's");
    let write =
        |name: &str, content: &[u8]| std::fs::write(lab.folder().join(name), content).expect("its own");
    let read = |name: &str| std::fs::read(lab.folder().join(name)).expect("its own");
    write("two.pem", &[read("good.pem"), read("another.pem")].concat());
    rotate("two", "good-key")
        .refused(1, "BH-E0092")
        .says("more than one");
    write("large.pem", &vec![b'x'; 1 << 20]);
    rotate("large", "good-key")
        .refused(2, "BH-E0003")
        .says("65536 bytes");
    write("none.pem", b"");
    rotate("none", "good-key")
        .refused(1, "BH-E0092")
        .says("no 'CERTIFICATE'");
    rotate("absent", "good-key").refused(1, "BH-E0010");
    let alone = lab.run("cluster ca rotate --ca-cert good.pem");
    assert_eq!(alone.code, 2, "{}", alone.whole());
    assert!(lab.json("cluster ca status")["phase"].is_null(), "nothing began");
}
