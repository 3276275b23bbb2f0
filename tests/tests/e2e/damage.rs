//! What was acknowledged and is no longer there as it was written: its manager never counts as the same member again. It comes
//! back by itself as a new one where the others have a quorum, and stops where they have none; a damaged key file stops it for good.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::{Answer, Lab, eventually, may_run};

/// Where frames of the log may begin.
const BLOCK_BYTES: u64 = 4096;

#[test]
fn what_was_lost_is_never_acknowledged_again_and_two_programs_share_no_folder() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 1);
    lab.secret("kept", b"value");
    second_programs_are_refused(&lab);
    a_flipped_bit_in_the_log(&lab);
    a_store_that_is_gone(&lab);
    without_a_quorum_of_others(&lab);
    a_folder_that_was_put_back_from_a_copy(&lab);
    a_flipped_bit_in_the_key_file(&lab);
    every_manager_is_damaged(&lab);
}

fn second_programs_are_refused(lab: &Lab) {
    let of = |program: &str, node: &str| {
        let mut command: Command = lab.program(program);
        command.arg("--data").arg(lab.data(node));
        if program == "bulkhead-manager" {
            let owner = fs::metadata(lab.data(node)).expect("its folder").uid();
            command.uid(owner).gid(owner);
        }
        Answer::of(&mut command, b"")
    };
    let manager = of("bulkhead-manager", "manager-2").says("another program");
    assert_eq!(manager.code, 75, "{}", manager.whole());
    let launcher = of("bulkhead-launcher", "worker-1").says("another launcher");
    assert_ne!(launcher.code, 0, "{}", launcher.whole());
    let mut command = lab.program("bulkhead-launcher");
    command.arg("--data").arg(lab.data("worker-1")).arg("--forget");
    let forget = Answer::of(&mut command, b"");
    assert_ne!(forget.code, 0, "{}", forget.whole());
    lab.until_all_ready();
}

fn a_flipped_bit_in_the_log(lab: &Lab) {
    let victim = follower(lab, &[]);
    let before = member(lab, &victim);
    lab.ok(&format!("dev kill {victim}"));
    // A frame begins with each block. The second one was acknowledged long ago, and others follow: it is no torn tail.
    flip_a_bit(&segment(&lab.data(&victim).join("raft")), BLOCK_BYTES + 60);
    lab.ok(&format!("dev start {victim}"));
    let after = back(lab, &victim, before);
    assert!(lab.data(&victim).join("raft-damaged").exists(), "put aside");
    let audit = lab.ok("audit --format json");
    let said = format!("its store was lost: member {before} is {after} now");
    assert!(audit.contains(&said), "{audit}");
    serves(lab, "after-log");
}

fn a_store_that_is_gone(lab: &Lab) {
    let victim = follower(lab, &[]);
    let before = member(lab, &victim);
    lab.ok(&format!("dev kill {victim}"));
    fs::remove_dir_all(lab.data(&victim).join("raft")).expect("its store");
    lab.ok(&format!("dev start {victim}"));
    back(lab, &victim, before);
    serves(lab, "after-wipe");
}

fn without_a_quorum_of_others(lab: &Lab) {
    let leader = lab.leader();
    let victim = follower(lab, &[]);
    let other = follower(lab, &[&victim]);
    let before = member(lab, &victim);
    for node in [&victim, &other] {
        lab.ok(&format!("dev kill {node}"));
    }
    fs::remove_dir_all(lab.data(&victim).join("raft")).expect("its store");
    start_in_vain(
        lab,
        &victim,
        &["is gone", "bring a majority of the managers up without it"],
    );
    assert!(
        !lab.data(&victim).join("raft/store").exists(),
        "nothing took its place"
    );
    lab.ok(&format!("dev start {other}"));
    eventually("the others decide again", || {
        let answer = lab.run("secret ls");
        (answer.code == 0).then_some(()).ok_or(answer.whole())
    });
    lab.ok(&format!("dev start {victim}"));
    back(lab, &victim, before);
    assert!(lab.nodes().contains(&leader));
    serves(lab, "after-all");
}

/// The whole data folder, as it was before: the manager would vote, and lead, without what it acknowledged since.
fn a_folder_that_was_put_back_from_a_copy(lab: &Lab) {
    let leader = lab.leader();
    let victim = follower(lab, &[]);
    let before = member(lab, &victim);
    let (data, copy) = (lab.data(&victim), lab.folder().join("copy"));
    lab.ok(&format!("dev kill {victim}"));
    copied(&data, &copy);
    lab.ok(&format!("dev start {victim}"));
    lab.until_all_ready();
    serves(lab, "after-the-copy");
    // Both followers hold it, and what the leader knows of each has reached the other.
    eventually("both followers have heard of each other", || {
        let status = lab.json("cluster status");
        let last = status["index"].as_u64();
        let matched = |it: &serde_json::Value| it["leader"] == true || it["matched"].as_u64() >= last;
        let all = status["members"]
            .as_array()
            .is_some_and(|them| them.iter().all(matched));
        all.then_some(()).ok_or(status.to_string())
    });
    serves(lab, "after-that");
    for node in [&leader, &victim] {
        lab.ok(&format!("dev kill {node}"));
    }
    fs::remove_dir_all(&data).expect("its folder");
    copied(&copy, &data);
    // With the other follower it would be a majority.
    start_in_vain(
        lab,
        &victim,
        &[
            "put back from a copy",
            "bring a majority of the managers up without it",
        ],
    );
    lab.ok(&format!("dev start {leader}"));
    eventually("the others decide again", || {
        let answer = lab.run("secret ls");
        (answer.code == 0).then_some(()).ok_or(answer.whole())
    });
    lab.ok(&format!("dev start {victim}"));
    back(lab, &victim, before);
    for name in ["after-the-copy", "after-that"] {
        assert!(lab.ok("secret ls").contains(name), "{name}");
    }
}

fn copied(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.is_ok_and(|it| it.success()), "{}", from.display());
}

/// The Raft member id of a manager.
fn member(lab: &Lab, manager: &str) -> u64 {
    find_member(lab, manager).unwrap_or_else(|| panic!("{manager} is no member"))
}

fn find_member(lab: &Lab, manager: &str) -> Option<u64> {
    let status = lab.json("cluster status");
    let managers = status["members"].as_array().cloned().unwrap_or_default();
    let found = managers
        .into_iter()
        .find(|it| it["name"] == manager && it["voter"] == true);
    found.and_then(|it| it["member_id"].as_u64())
}

/// Waits until a manager votes under another id than before, and everything is ready.
fn back(lab: &Lab, manager: &str, before: u64) -> u64 {
    let after = eventually(&format!("{manager} votes as a new member"), || {
        let now = find_member(lab, manager);
        now.filter(|now| *now > before)
            .ok_or(format!("{now:?}, was {before}"))
    });
    lab.until_all_ready();
    after
}

fn a_flipped_bit_in_the_key_file(lab: &Lab) {
    let victim = follower(lab, &[]);
    lab.ok(&format!("dev kill {victim}"));
    flip_a_bit(&lab.data(&victim).join("keys"), 120);
    start_in_vain(
        lab,
        &victim,
        &["damaged", "restore it from a copy, or join again"],
    );
}

/// The two that are left, each in another place. Nobody can vouch for what is missing, so nobody serves.
fn every_manager_is_damaged(lab: &Lab) {
    for number in 1..=3 {
        serves(lab, &format!("before-the-damage-{number}"));
    }
    let managers = lab.nodes().into_iter().filter(|node| node.starts_with("manager"));
    let left: Vec<String> = managers
        .filter(|node| lab.status(node)["state"] == "ready")
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
    for node in &left {
        lab.ok(&format!("dev kill {node}"));
    }
    for (node, frame) in left.iter().zip(1..) {
        flip_a_bit(&segment(&lab.data(node).join("raft")), frame * BLOCK_BYTES + 60);
        start_in_vain(
            lab,
            node,
            &["is damaged", "bring a majority of the managers up without it"],
        );
    }
    let answer = lab.run("secret ls");
    assert_ne!(answer.code, 0, "{}", answer.whole());
}

/// Starts a damaged manager: it ends with 65, says what to do, and is not started again.
fn start_in_vain(lab: &Lab, victim: &str, words: &[&str]) {
    let seen = lab.log(victim).len();
    // Whether the command still saw it answer or not is of no interest.
    lab.run(&format!("dev start {victim}"));
    eventually(&format!("{victim} ends for good"), || {
        let status = lab.status(victim);
        (status["state"] == "killed")
            .then_some(())
            .ok_or(status.to_string())
    });
    let log = lab.log(victim)[seen..].to_owned();
    assert!(log.contains("exit status: 65"), "{log}");
    for words in words {
        assert!(
            log.contains(words),
            "it says what happened, and what to do: {log}"
        );
    }
}

fn serves(lab: &Lab, name: &str) {
    lab.secret(name, b"value");
    assert!(lab.ok("secret ls").contains("kept"));
}

/// A manager that does not lead.
fn follower(lab: &Lab, but: &[&str]) -> String {
    let leader = lab.leader();
    let managers = lab.nodes().into_iter().filter(|node| node.starts_with("manager"));
    let mut others = managers.filter(|node| *node != leader && !but.contains(&node.as_str()));
    others.next().expect("another manager")
}

/// The oldest segment of a log.
fn segment(folder: &Path) -> PathBuf {
    let names = fs::read_dir(folder).expect("a folder").flatten();
    let segments = names.map(|entry| entry.path()).filter(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("log-"))
    });
    segments
        .min()
        .unwrap_or_else(|| panic!("no segment in {}", folder.display()))
}

fn flip_a_bit(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path);
    let file = file.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("long enough");
    byte[0] ^= 0b0001_0000;
    file.write_all_at(&byte, at).expect("written");
}
