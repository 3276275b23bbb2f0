//! `cluster status`: one screen.

use std::fmt::Write as _;
use std::time::Duration;

use bulkhead_identity::recovery::fingerprint;
use bulkhead_proto::wire::{ClusterStatus, MemberStatus};
use serde_json::{Value, json};

use super::ca;
use crate::app::App;
use crate::output::{Format, document, table, text};
use crate::refusal::{Exit, Refusal};

pub(super) async fn run(app: &mut App<'_>) -> Result<Exit, Refusal> {
    let status = app.connect()?.status().await?;
    let text = match app.global.format.unwrap_or(Format::Table) {
        Format::Table => people(&status, text::now_ms()),
        format => document(&json(&status), format),
    };
    app.print(&text)?;
    Ok(Exit::Done)
}

fn people(status: &ClusterStatus, now: i64) -> String {
    let mut out = String::new();
    let mut line = |key: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{key:<14}{value}");
    };
    let lab = if status.lab {
        ", a lab: faults may be injected"
    } else {
        ""
    };
    line("cluster", format!("{}{lab}", text::id(&status.cluster_id)));
    if status.stale {
        line(
            "STALE",
            "the manager that answers is not up to date; what follows may be old".into(),
        );
    }
    let leader = status.members.iter().find(|m| m.leader);
    line(
        "leader",
        leader.map_or_else(|| "none known".into(), |m| format!("{} ({})", m.name, m.address)),
    );
    let voters = status.members.iter().filter(|m| m.voter).count();
    let margin = match status.can_lose {
        0 => "can lose none".to_owned(),
        1 => "can lose 1 more manager".to_owned(),
        more => format!("can lose {more} more managers"),
    };
    line(
        "managers",
        format!("{voters} of {} vote; {margin}", status.members.len()),
    );
    if let Some(advice) = advice(voters) {
        line("", advice);
    }
    line(
        "term",
        format!(
            "{}, commit {}, applied here {}",
            status.term, status.index, status.applied
        ),
    );
    line(
        "tasks",
        format!(
            "{} running, {} pending",
            status.running_tasks, status.pending_tasks
        ),
    );
    line(
        "certificates",
        format!(
            "{} trusted root{}; valid for {}; the first to end ends {}",
            status.roots.len(),
            if status.roots.len() == 1 { "" } else { "s" },
            text::rough(Duration::from_millis(status.node_certificate_validity_ms)),
            text::distance(status.oldest_certificate_not_after, now)
        ),
    );
    for signer in &status.signers {
        line("signer", ca::said(signer, now));
    }
    line("key ring", key_ring(status));
    line("stores", stores(status));
    line(
        "backups",
        match &status.recovery_key {
            Some(key) => format!("sealed to the recovery key {}", fingerprint(&key.public)),
            None => "none can be made: 'bulkhead cluster recovery-key create' comes first".into(),
        },
    );
    if status.epoch > 1 {
        line("epoch", epoch(status, now));
    }
    line("autolock", autolock(status));
    let rows: Vec<Vec<String>> = status.members.iter().map(|m| row(m, status)).collect();
    out.push('\n');
    out.push_str(&table(
        &["MEMBER", "NAME", "ADDRESS", "VOTES", "LOG", ""],
        rows.iter().map(Vec::as_slice),
    ));
    out
}

fn epoch(status: &ClusterStatus, now: i64) -> String {
    let epoch = format!("{}: this cluster was restored or recovered", status.epoch);
    if status.return_until <= now {
        return epoch;
    }
    format!(
        "{epoch}; a worker may come back with a key that is newer than the state: that ends {}",
        text::distance(status.return_until, now)
    )
}

fn key_ring(status: &ClusterStatus) -> String {
    match (status.key_ring_epochs, status.key_ring_left) {
        (0 | 1, _) => status.key_ring.clone(),
        (epochs, left) => format!(
            "{}; {epochs} epochs are kept, {left} values are still under an older one",
            status.key_ring
        ),
    }
}

/// Which managers still have something on disk that was to go.
pub(super) fn stores(status: &ClusterStatus) -> String {
    let late: Vec<&str> = status
        .members
        .iter()
        .filter(|m| m.resealed < status.reseal)
        .map(|m| m.name.as_str())
        .collect();
    match late.as_slice() {
        [] => "nothing is left on a manager's disk that was to go".to_owned(),
        late => format!(
            "older keys and entries are still on the disk of {}",
            late.join(", ")
        ),
    }
}

/// What happens to a manager that starts again, and which ones need another key than the newest.
fn autolock(status: &ClusterStatus) -> String {
    let said = if status.unlock_generation != 0 {
        format!(
            "on: a restarted manager waits for unlock key {}",
            status.unlock_generation
        )
    } else {
        "off: a restarted manager serves by itself".to_owned()
    };
    let pending = match status.unlock_pending {
        0 => String::new(),
        key => format!("; key {key} waits to be seen: run 'bulkhead cluster unlock-key show'"),
    };
    let others = status
        .members
        .iter()
        .filter(|m| m.locked_with != status.unlock_generation)
        .map(|m| match m.locked_with {
            0 => format!("; {} is not locked yet", m.name),
            key => format!("; {} still waits for key {key}", m.name),
        });
    [said, pending].into_iter().chain(others).collect()
}

/// The arithmetic of a number of managers that is a bad one.
fn advice(voters: usize) -> Option<String> {
    const HOW: &str = "'bulkhead node promote NAME' makes a manager of a standby";
    match voters {
        0 => None,
        1 => Some(format!(
            "1 manager: if it fails nothing can change; 3 may lose one; {HOW}"
        )),
        even if even % 2 == 0 => {
            let (quorum, spare) = (even / 2 + 1, even / 2 - 1);
            let spare = match spare {
                0 => "none may fail, and either that fails stops the cluster".to_owned(),
                spare => format!("{spare} may fail, as of {}", even - 1),
            };
            Some(format!("{even} managers: a quorum is {quorum}, {spare}; {HOW}"))
        }
        _ => None,
    }
}

fn row(member: &MemberStatus, status: &ClusterStatus) -> Vec<String> {
    let here = if member.node_id == status.node_id {
        "answers"
    } else {
        ""
    };
    let role = if member.leader { "leader" } else { "" };
    let words: Vec<&str> = [role, here].into_iter().filter(|word| !word.is_empty()).collect();
    let log = match member.matched {
        0 => "-".to_owned(),
        matched => matched.to_string(),
    };
    vec![
        member.member_id.to_string(),
        member.name.clone(),
        member.address.clone(),
        if member.voter { "yes" } else { "not yet" }.into(),
        log,
        words.join(", "),
    ]
}

fn json(status: &ClusterStatus) -> Value {
    json!({
        "cluster_id": text::id(&status.cluster_id),
        "index": status.index,
        "applied": status.applied,
        "stale": status.stale,
        "term": status.term,
        "leader_member": (status.leader_member != 0).then_some(status.leader_member),
        "leader": status.members.iter().find(|m| m.leader).map(|m| m.name.clone()),
        "can_lose": status.can_lose,
        "lab": status.lab,
        "autolock": status.autolock,
        "key_ring_epochs": status.key_ring_epochs,
        "key_ring_left": status.key_ring_left,
        "reseal": status.reseal,
        "unlock_key_pending": (status.unlock_pending != 0).then_some(status.unlock_pending),
        "unlock_key": (status.unlock_generation != 0).then_some(status.unlock_generation),
        "key_ring": status.key_ring,
        "epoch": status.epoch,
        "recovery_key": status.recovery_key.as_ref().map(|key| fingerprint(&key.public)),
        "return_until": text::time(status.return_until),
        "level": status.level,
        "roots": status.roots.iter()
            .map(|der| bulkhead_proto::Digest::of(der).to_string()).collect::<Vec<_>>(),
        "signers": ca::signers(&status.signers),
        "node_certificate_validity_ms": status.node_certificate_validity_ms,
        "oldest_certificate_not_after": text::time(status.oldest_certificate_not_after),
        "pending_tasks": status.pending_tasks,
        "running_tasks": status.running_tasks,
        "node_id": text::id(&status.node_id),
        "members": status.members.iter().map(|m| json!({
            "member_id": m.member_id, "node_id": text::id(&m.node_id), "name": m.name, "address": m.address,
            "voter": m.voter, "leader": m.leader, "matched": m.matched,
            "resealed": m.resealed,
            "locked_with": (m.locked_with != 0).then_some(m.locked_with),
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_numbers_of_managers_are_pointed_out() {
        for (voters, want) in [
            (1, Some("1 manager: if it fails nothing can change")),
            (2, Some("2 managers: a quorum is 2, none may fail")),
            (4, Some("4 managers: a quorum is 3, 1 may fail, as of 3")),
            (3, None),
            (5, None),
        ] {
            let got = advice(voters);
            match want {
                None => assert_eq!(got, None, "{voters}"),
                Some(want) => assert!(
                    got.as_ref().is_some_and(|it| it.starts_with(want)),
                    "{voters}: {got:?}"
                ),
            }
        }
    }

    #[test]
    fn one_screen_says_who_leads_and_what_may_fail() {
        let member = |id: u64, leader| MemberStatus {
            member_id: id,
            node_id: vec![u8::try_from(id).expect("small"); 16],
            name: format!("manager-{id}"),
            address: format!("127.77.0.{id}:7443"),
            voter: true,
            matched: if leader { 9 } else { 0 },
            leader,
            ..Default::default()
        };
        let status = ClusterStatus {
            index: 9,
            applied: 9,
            cluster_id: vec![0; 16],
            term: 2,
            members: vec![member(1, true), member(2, false)],
            can_lose: 1,
            roots: vec![vec![1]],
            node_certificate_validity_ms: 90 * 86_400_000,
            oldest_certificate_not_after: 90 * 86_400_000,
            running_tasks: 3,
            node_id: vec![2; 16],
            key_ring: "epoch 1, opened by 2 of 2".into(),
            ..Default::default()
        };
        let want = "\
cluster       aaaaaaaaaaaaaaaaaaaaaaaaaa
leader        manager-1 (127.77.0.1:7443)
managers      2 of 2 vote; can lose 1 more manager
              2 managers: a quorum is 2, none may fail, and either that fails stops the cluster; 'bulkhead node promote NAME' makes a manager of a standby
term          2, commit 9, applied here 9
tasks         3 running, 0 pending
certificates  1 trusted root; valid for 90d; the first to end ends in 90d
key ring      epoch 1, opened by 2 of 2
stores        nothing is left on a manager's disk that was to go
backups       none can be made: 'bulkhead cluster recovery-key create' comes first
autolock      off: a restarted manager serves by itself

MEMBER  NAME       ADDRESS          VOTES  LOG
1       manager-1  127.77.0.1:7443  yes    9    leader
2       manager-2  127.77.0.2:7443  yes    -    answers
";
        assert_eq!(people(&status, 0), want);
        let renewed = ClusterStatus {
            reseal: 2,
            key_ring_epochs: 2,
            key_ring_left: 7,
            ..status.clone()
        };
        assert!(people(&renewed, 0).contains("on the disk of manager-1, manager-2"));
        assert!(people(&renewed, 0).contains("7 values are still under an older one"));
        let mut locked = ClusterStatus {
            autolock: true,
            unlock_generation: 3,
            ..status
        };
        locked.members[0].locked_with = 3;
        let said = |locked: &ClusterStatus| autolock(locked);
        assert_eq!(
            said(&locked),
            "on: a restarted manager waits for unlock key 3; manager-2 is not locked yet"
        );
        locked.members[1].locked_with = 2;
        assert_eq!(
            said(&locked),
            "on: a restarted manager waits for unlock key 3; manager-2 still waits for key 2"
        );
        let stale = ClusterStatus {
            stale: true,
            ..ClusterStatus::default()
        };
        assert!(people(&stale, 0).contains("STALE") && people(&stale, 0).contains("none known"));
    }
}
