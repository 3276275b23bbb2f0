//! A root whose key is in no manager: the example signer holds it, and the cluster rotates to it, works with it, and away.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use bulkhead_tests::{Lab, Spawned, eventually, may_run, text};
use serde_json::Value;

use crate::openssl::{key_file_of, openssl};
use crate::rotation::{GOOD, held, issuer, make_root, managers, until_lagging, until_presented};

/// The example signer, until dropped.
struct Signer(Child);

impl Signer {
    /// Starts it with the key of this root, and waits until it listens.
    fn start(lab: &Lab, address: &str, root: &str, more: &[&str]) -> Self {
        let log = lab.folder().join("signer.log");
        let file = File::create(&log).expect("its own folder");
        let mut command = lab.program("bulkhead-example-signer");
        command
            .args(["--listen", address, "--trust", "cluster.pem"])
            .args([
                "--root",
                &format!("{root}.pem"),
                "--root-key",
                &format!("{root}-key.pem"),
            ])
            .args(["--server-cert", "server.pem", "--server-key", "server-key.pem"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a descriptor"))
            .stderr(file);
        let signer = Self(command.spawn().expect("run: cargo build --workspace --bins"));
        eventually("the signer listens", || {
            let said = std::fs::read_to_string(&log).expect("its log");
            said.contains("listening").then_some(()).ok_or(said)
        });
        signer
    }
}

impl Drop for Signer {
    fn drop(&mut self) {
        // It may have ended by itself; it is waited for in any case.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The authority of the signer's own certificate, and that certificate, as docs/reference/external-signer.md makes them.
fn make_server(lab: &Lab, ip: &str) {
    let path = |name: &str| format!("{}/{name}", lab.folder().display());
    let key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-sha256",
    ];
    let ca = [
        "-subj",
        "/CN=authority of the signer",
        "-keyout",
        &path("server-ca-key.pem"),
        "-out",
        &path("server-ca.pem"),
    ];
    openssl(&[&["req", "-x509", "-days", "30"][..], &key, &ca].concat()).success();
    let server = [
        "-subj",
        "/CN=signer",
        "-CA",
        &path("server-ca.pem"),
        "-CAkey",
        &path("server-ca-key.pem"),
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-addext",
        &format!("subjectAltName=IP:{ip}"),
        "-keyout",
        &path("server-key.pem"),
        "-out",
        &path("server.pem"),
    ];
    openssl(&[&["req", "-x509", "-days", "30"][..], &key, &server].concat()).success();
}

fn status(lab: &Lab) -> Value {
    lab.json("cluster ca status")
}

/// Waits until the manager that answers says of the signer that it fails, or that it works.
fn until_signer(lab: &Lab, fails: bool) {
    eventually("the signer's state is known", || {
        let status = status(lab);
        let signer = &status["signers"][0];
        let known = match fails {
            true => !signer["failing_since"].is_null(),
            false => signer["failing_since"].is_null() && !signer["worked_at"].is_null(),
        };
        known.then_some(()).ok_or(status.to_string())
    });
}

#[test]
fn a_root_outside_signs_for_the_cluster_and_its_signer_may_fail() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 1);
    let ip = format!("{}.251", lab.network());
    let address = format!("{ip}:8443");
    make_server(&lab, &ip);
    make_root(&lab, "outside", GOOD);
    make_root(&lab, "other", GOOD);
    let kept_roots = || {
        let roots = lab.ok("cluster ca roots");
        std::fs::write(lab.folder().join("cluster.pem"), roots + "\n").expect("its own folder");
    };
    kept_roots();
    let there = format!("--external-signer https://{address}/sign --external-signer-ca server-ca.pem");
    let rotate = |more: &str| lab.run(&format!("cluster ca rotate --ca-cert outside.pem {there} {more}"));
    let first = issuer(&lab);

    // Nothing begins before it proved that it holds the key.
    rotate("").refused(1, "BH-E0096").says("not reached");
    {
        let _other = Signer::start(&lab, &address, "other", &[]);
        rotate("").refused(1, "BH-E0096").says("another root");
    }
    let http = "--external-signer http://signer.example:1 --external-signer-ca server-ca.pem";
    let plain = lab.run(&format!("cluster ca rotate --ca-cert outside.pem {http}"));
    assert_eq!(plain.code, 2, "{}", plain.whole());
    assert!(status(&lab)["phase"].is_null() && issuer(&lab) == first);

    let signer = Signer::start(&lab, &address, "outside", &[]);
    rotate("").success();
    until_presented(&lab, "outside");
    let outside = issuer(&lab);
    assert_ne!(outside, first);
    until_signer(&lab, false);
    nodes_join(&lab);

    // Without it nobody gets a certificate, and it is said; everything else goes on.
    drop(signer);
    lab.run("operator issue late -o late.pem")
        .refused(1, "BH-E0096")
        .says("not reached");
    until_signer(&lab, true);
    assert!(lab.ok("cluster status").contains("fails, first"));
    lab.secret("meanwhile", b"value");
    kept_roots();
    let signer = Signer::start(&lab, &address, "outside", &[]);
    until_signer(&lab, false);
    lab.ok("operator issue late -o late.pem");
    lab.ok(&format!("cluster ca move-signer {}", there.replace("/sign", "/")));

    // Back to a root of the cluster: the signer certifies it only where it was told to.
    lab.run("cluster ca rotate")
        .refused(1, "BH-E0096")
        .says("--compromised");
    drop(signer);
    let signer = Signer::start(&lab, &address, "outside", &["--allow-cross"]);
    lab.ok("cluster ca rotate");
    let inside = issuer(&lab);
    assert!(inside != outside && inside != first);
    assert_eq!(status(&lab)["signers"], serde_json::json!([]));
    drop(signer);
    kept_roots();
    waits_for_its_signer(&lab, &address);
    drop(lab);
}

/// A signer that signs for workers alone: the rotation would never end, and is taken back while the new root signs.
#[test]
fn a_rotation_that_its_signer_lets_down_half_way_is_taken_back() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 1);
    let (ip, first) = (format!("{}.251", lab.network()), issuer(&lab));
    let address = format!("{ip}:8443");
    make_server(&lab, &ip);
    make_root(&lab, "half", GOOD);
    std::fs::write(
        lab.folder().join("cluster.pem"),
        lab.ok("cluster ca roots") + "\n",
    )
    .expect("its own folder");
    let _signer = Signer::start(&lab, &address, "half", &["--only", "worker"]);
    let there = format!("--external-signer https://{address}/ --external-signer-ca server-ca.pem");
    lab.ok(&format!("cluster ca rotate -d --ca-cert half.pem {there}"));
    eventually("the worker renewed, and no manager", || {
        let status = status(&lab);
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        let renewed: Vec<String> = nodes
            .iter()
            .filter(|node| node["uses"] == true)
            .map(|node| text(node, "name"))
            .collect();
        (status["phase"] == "issue" && renewed == ["worker-1"])
            .then_some(())
            .ok_or(status.to_string())
    });
    lab.ok("cluster ca cancel");
    assert_eq!(issuer(&lab), first);
    let worker = |lab: &Lab| key_file_of(lab, "worker-1").credentials;
    eventually("the worker has a certificate of the old root again", || {
        let held = worker(&lab);
        let root = &held.bundle.roots()[0];
        let back = held.bundle.roots().len() == 1 && root.is_issuer_of(&held.certificate);
        back.then_some(()).ok_or_else(String::new)
    });
    lab.until_all_ready();
    lab.secret("after", b"value");
}

/// A worker and a manager, with certificates that the signer signed.
fn nodes_join(lab: &Lab) {
    let joiner = Spawned::manager(lab, "joiner");
    let ticket: PathBuf = lab.folder().join("ticket");
    std::fs::write(&ticket, lab.ok("cluster ticket create -q --role manager")).expect("its own folder");
    let own = format!("{}.202:7443", lab.network());
    lab.ok(&format!(
        "cluster join --socket {} --ticket-file ticket --listen {own} --advertise {own} {}:7443",
        joiner.socket().display(),
        lab.address("manager-1")
    ));
    lab.ok(&format!(
        "cluster leave --yes --socket {}",
        joiner.socket().display()
    ));
}

/// A rotation whose signer is gone before it is to sign waits, says so, can be taken back, and goes on.
fn waits_for_its_signer(lab: &Lab, address: &str) {
    let there = format!("--external-signer https://{address}/ --external-signer-ca server-ca.pem");
    let signer = Signer::start(lab, address, "other", &[]);
    held(lab, "worker-1", true);
    lab.ok(&format!("cluster ca rotate -d --ca-cert other.pem {there}"));
    until_lagging(lab, "bundle", &["worker-1"]);
    drop(signer);
    // Each knows by itself, whichever leads.
    let managers = managers(lab);
    let failures = |manager: &String| {
        lab.log(manager)
            .matches("the external signer does not sign")
            .count()
    };
    let before: Vec<usize> = managers.iter().map(failures).collect();
    for (manager, before) in managers.iter().zip(before) {
        eventually(&format!("{manager} knows that the signer is gone"), || {
            let now = failures(manager);
            (now > before).then_some(()).ok_or(format!("{now} failures"))
        });
    }
    held(lab, "worker-1", false);
    eventually("the rotation waits for the signer alone", || {
        let status = status(lab);
        let nodes = status["nodes"].as_array().expect("a list");
        let ready = nodes
            .iter()
            .all(|node| node["waited_for"] != true || node["lags"] == "");
        let paused = status["paused"]
            .as_str()
            .is_some_and(|why| why.contains("signer fails"));
        (ready && paused && text(&status, "phase") == "bundle")
            .then_some(())
            .ok_or(status.to_string())
    });
    let _signer = Signer::start(lab, address, "other", &[]);
    eventually("the rotation ends once it signs", || {
        let status = status(lab);
        status["phase"].is_null().then_some(()).ok_or(status.to_string())
    });
    until_presented(lab, "other");
}
