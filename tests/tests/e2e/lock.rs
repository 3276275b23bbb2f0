//! Autolock and the key ring: managers that wait for their key, and disks on which nothing is found.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use bulkhead_identity::UnlockKey;
use bulkhead_identity::store::{KeyFile, StoreError};
use bulkhead_tests::{Follow, Lab, eventually, may_run};

/// What no disk of a manager may hold.
const CANARY: &[u8] = b"canary-5f0d3c1e-of-the-locked";
/// How often a manager is killed; BULKHEAD_TEST_KILLS sets another count.
const KILLS: u32 = 5;

/// Every file below a folder that is one when it is read.
fn files(folder: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&path, found),
            Ok(kind) if kind.is_file() => {
                // What was removed meanwhile is on no disk.
                found.extend(std::fs::read(&path).ok().map(|content| (path, content)));
            }
            _ => {}
        }
    }
}

/// The unlock key that a manager's file waits for; nothing where it stands open. A copy is read, which is the test's own.
fn locked_with(lab: &Lab, node: &str) -> Option<u32> {
    match open(lab, node, None) {
        Ok(_) => None,
        Err(StoreError::Locked(locked)) => Some(locked.generation),
        Err(error) => panic!("{node}: {error}"),
    }
}

fn open(lab: &Lab, node: &str, unlock: Option<&UnlockKey>) -> Result<KeyFile, StoreError> {
    let copy = lab.folder().join(format!("{node}.keys"));
    std::fs::copy(lab.data(node).join("keys"), &copy).expect("copied");
    KeyFile::open(&copy, unlock)
}

fn parse(printed: &str) -> UnlockKey {
    let key = printed.lines().find(|line| line.starts_with("BULKHEAD-UNLOCK-"));
    key.expect("an unlock key is printed")
        .parse()
        .expect("an unlock key")
}

/// Whether the managers decide.
fn decides(lab: &Lab) -> Result<(), String> {
    let answer = lab.run("secret ls");
    (answer.code == 0).then_some(()).ok_or_else(|| answer.whole())
}

fn unlock(lab: &Lab, node: &str, key: &UnlockKey) {
    let socket = lab.socket(node);
    let line = format!("--socket {} cluster unlock --key-file -", socket.display());
    let answer = lab.feed(&line, key.to_text().as_bytes());
    assert_eq!(answer.code, 0, "{}", answer.whole());
}

#[test]
fn locked_managers_wait_for_their_key_and_catch_up() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 1);
    lab.pack("web:1");
    lab.secret("db-password", CANARY);
    lab.ok("service create -d --name web --secret db-password web:1");
    lab.until_running("web", 1);
    let pids = lab.pids("web");
    lab.run("cluster unlock-key show")
        .refused(2, "BH-E0066")
        .says("autolock is off");
    let first = parse(&lab.ok("cluster update --autolock on"));
    assert_eq!(parse(&lab.ok("cluster unlock-key show")).expose(), first.expose());
    let managers = ["manager-1", "manager-2", "manager-3"];
    for manager in managers {
        assert_eq!(locked_with(&lab, manager), Some(1), "{manager}");
    }

    // One that is down while the key changes asks once, and catches up.
    lab.ok("dev kill manager-2");
    eventually("another leads", || decides(&lab));
    let rotated = lab.run("cluster unlock-key rotate");
    assert_eq!(rotated.code, 0, "{}", rotated.whole());
    let second = parse(&rotated.out);
    rotated.says("manager-2 is down; it still waits for unlock key 1");
    lab.ok("dev start manager-2");
    lab.until("manager-2", "locked");
    let socket = lab.socket("manager-2");
    let health = lab.run(&format!("health --socket {}", socket.display()));
    health.refused(1, "BH-E0090").says("waits for unlock key 1");
    unlock(&lab, "manager-2", &second);
    lab.until("manager-2", "ready");
    eventually("it took up the newest key", || {
        let with = locked_with(&lab, "manager-2");
        (with == Some(2)).then_some(()).ok_or(format!("{with:?}"))
    });

    // Every secret and the root's key move to a new epoch, and what was sealed before is gone from each disk.
    let renewed = lab.run("cluster key-ring rotate");
    assert_eq!(renewed.code, 0, "{}", renewed.whole());
    renewed.says("the last old byte is gone");
    assert!(
        lab.ok("cluster status")
            .contains("epoch 2, opened by 3 of 3 managers")
    );
    for manager in managers {
        let keys = open(&lab, manager, Some(&second)).expect("the newest key opens it");
        let part = keys.manager.as_ref().expect("a manager's");
        assert!(
            part.former_data_key.is_none(),
            "{manager} needs its former data key"
        );
    }
    assert_eq!(lab.pids("web"), pids, "no task was started again");
    lab.ok("service scale web=2");
    for task in lab.running("web") {
        let node = bulkhead_tests::text(&task, "node");
        assert_eq!(node, "worker-1");
    }
    // All managers off: each waits, and two are enough.
    for manager in managers {
        lab.ok(&format!("dev kill {manager}"));
    }
    for manager in managers {
        lab.ok(&format!("dev start {manager}"));
        lab.until(manager, "locked");
    }
    unlock(&lab, "manager-1", &second);
    unlock(&lab, "manager-3", &second);
    eventually("two of three decide", || decides(&lab));
    unlock(&lab, "manager-2", &second);
    lab.until("manager-2", "ready");
    assert_eq!(lab.pids("web").len(), 2, "no task ended");
    let off = lab.run("cluster update --autolock off");
    assert_eq!(off.code, 0, "{}", off.whole());
    assert_eq!(managers.map(|manager| locked_with(&lab, manager)), [None; 3]);
}

#[test]
fn a_disk_holds_no_key_and_no_secret_whenever_its_manager_dies() {
    if !may_run() {
        return;
    }
    let kills = std::env::var("BULKHEAD_TEST_KILLS").map_or(KILLS, |count| count.parse().expect("a count"));
    let lab = Lab::up(1, 0);
    lab.secret("canary", CANARY);
    let mut unlock_keys = vec![parse(&lab.ok("cluster update --autolock on"))];
    // Whatever was on disk before autolock went on is of no use once this has ended.
    lab.ok("cluster key-ring rotate");
    let mut state = 0x9E37_79B9_u32; // the moments differ, and are the same in each run as far as the machine lets them
    for kill in 0..kills {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let moment = Duration::from_millis(u64::from(state >> 16) % 1_500);
        let mut changes = lab.command("cluster unlock-key rotate");
        let mut changes = Follow::start(&mut changes);
        let _renewed = lab.run("cluster key-ring rotate -d"); // one may be under way
        let _begun = lab.run("cluster ca rotate -d");
        thread::sleep(moment); // the fault's own moment, not a wait for something
        lab.ok("dev kill manager-1");
        // A key that was printed may be in use from then on; one that was not never is.
        unlock_keys.extend(changes.end().iter().filter_map(|line| line.parse().ok()));
        scan(&lab, &unlock_keys, kill);
        let with = locked_with(&lab, "manager-1").expect("it stays locked");
        let key = unlock_keys.iter().rev().find(|key| key.generation() == with);
        let key = key.expect("nobody uses a key that no operator has seen").clone();
        lab.ok("dev start manager-1");
        lab.until("manager-1", "locked");
        unlock(&lab, "manager-1", &key);
        lab.until("manager-1", "ready");
        assert!(lab.ok("secret ls").contains("canary"), "nothing was lost");
    }
}

/// Nothing on the manager's disk is a key of its own, an unlock key or the canary.
fn scan(lab: &Lab, unlock_keys: &[UnlockKey], kill: u32) {
    let mut secrets: Vec<Vec<u8>> = vec![CANARY.to_vec()];
    for key in unlock_keys {
        secrets.push(key.expose().to_vec());
        secrets.push(key.to_text().as_bytes().to_vec());
        if let Ok(file) = open(lab, "manager-1", Some(key)) {
            let part = file.manager.as_ref().expect("a manager's");
            secrets.extend([part.data_key.to_vec(), part.envelope_key.to_vec()]);
            secrets.extend(part.former_data_key.iter().map(|key| key.to_vec()));
            secrets.push(file.credentials.key.pkcs8().to_vec());
        }
    }
    let mut found = Vec::new();
    files(&lab.data("manager-1"), &mut found);
    assert!(found.len() > 3, "{} files", found.len());
    // Secrets become many, and a store has tens of megabytes: one pass looks for all of them, by their first two bytes.
    let mut begins = vec![Vec::new(); 1 << 16];
    for secret in &secrets {
        begins[usize::from(u16::from_be_bytes([secret[0], secret[1]]))].push(secret.as_slice());
    }
    for (path, content) in found {
        for at in 0..content.len().saturating_sub(1) {
            let pair = u16::from_be_bytes([content[at], content[at + 1]]);
            let held = begins[usize::from(pair)]
                .iter()
                .any(|it| content[at..].starts_with(it));
            assert!(!held, "kill {kill}: {} holds a secret at {at}", path.display());
        }
    }
}
