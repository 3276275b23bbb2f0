//! What was acknowledged and is no longer there as it was written stops its manager; the others serve.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::{Answer, Lab, eventually, may_run};

/// Where frames of the log may begin.
const BLOCK_BYTES: u64 = 4096;

#[test]
fn damage_stops_one_manager_and_two_programs_share_no_folder() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(3, 1);
    lab.secret("kept", b"value");
    second_programs_are_refused(&lab);
    a_flipped_bit_in_the_log(&lab);
    a_flipped_bit_in_the_key_file(&lab);
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
    lab.ok(&format!("dev kill {victim}"));
    // A frame begins with each block. The second one was acknowledged long ago, and others follow: it is no torn tail.
    flip_a_bit(&segment(&lab.data(&victim).join("raft")), BLOCK_BYTES + 60);
    start_in_vain(
        lab,
        &victim,
        "remove this manager from the cluster and join it again",
    );
    serves(lab, "after-log");
}

fn a_flipped_bit_in_the_key_file(lab: &Lab) {
    // Of three managers two must serve: the first victim leaves, another one joins in its place.
    let stopped = lab
        .nodes()
        .into_iter()
        .find(|node| lab.status(node)["state"] == "killed");
    let stopped = stopped.expect("the manager that was stopped");
    lab.ok(&format!("node rm -y --force {stopped}"));
    let victim = follower(lab, &[&stopped]);
    lab.ok(&format!("dev kill {victim}"));
    flip_a_bit(&lab.data(&victim).join("keys"), 120);
    start_in_vain(lab, &victim, "restore it from a copy, or join again");
}

/// Starts a damaged manager: it ends with 65, says what to do, and is not started again.
fn start_in_vain(lab: &Lab, victim: &str, next_step: &str) {
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
    assert!(log.contains("damaged"), "{log}");
    assert!(log.contains(next_step), "it says what to do: {log}");
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
