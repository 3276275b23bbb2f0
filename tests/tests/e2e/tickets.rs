//! Tickets that are wrong in any way admit nobody, and are said to no stranger.

use std::path::{Path, PathBuf};

use bulkhead_tests::{Answer, Lab, Spawned, eventually, may_run, text};
use serde_json::Value;

#[test]
fn what_is_wrong_with_a_ticket_is_said_and_nobody_joins() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 0);
    let joiner = Spawned::manager(&lab, "joiner");
    let lab = Tickets {
        lab: &lab,
        joiner: &joiner,
    };
    let nodes = lab.lab.ok("node ls -q");

    let ticket = lab.create("--role operator");
    for (mistyped, code) in [
        (ticket[..ticket.len() - 3].to_owned(), "BH-E0080"),
        (ticket.replace("BULKHEAD", "BULLHEAD"), "BH-E0080"),
        (with_other_end(&ticket), "BH-E0081"),
        (with_other_digest(&ticket), "BH-E0085"),
    ] {
        lab.operator(&mistyped).refused(8, code);
    }
    lab.as_manager(&lab.create("--role worker"))
        .refused(8, "BH-E0084");
    lab.operator(&lab.create("--role manager")).refused(8, "BH-E0084");

    // None of that used it.
    lab.operator(&ticket).success();
    lab.lab.ok("context rm -y by-ticket");
    lab.operator(&ticket).refused(8, "BH-E0083");

    let revoked = lab.created("--role operator");
    lab.lab
        .ok(&format!("cluster ticket revoke {}", text(&revoked, "id")));
    lab.operator(&text(&revoked, "ticket")).refused(8, "BH-E0081");
    an_expired_one(&lab);

    assert_eq!(lab.lab.ok("node ls -q"), nodes, "nobody joined");
    let log = format!("{}{}", lab.lab.log("manager-1"), joiner.log());
    let secrets = lab.secrets();
    assert!(secrets.len() == 5, "{}", secrets.len());
    assert!(
        !secrets.iter().any(|secret| log.contains(secret)),
        "a log holds a ticket"
    );
    assert!(log.contains("enrolment refused"), "{log}");
}

#[test]
fn strangers_hear_no_ticket_and_serve_no_operator() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 0);
    let stranger = Spawned::manager(&lab, "stranger");
    let address = format!("{}.201:7443", lab.network());
    let socket = stranger.socket();
    lab.ok(&format!(
        "cluster init --context other --socket {} --listen {address} --advertise {address} --name stranger",
        socket.display()
    ));
    lab.ok("context use dev");

    let joiner = Spawned::manager(&lab, "joiner");
    let ours = Tickets {
        lab: &lab,
        joiner: &joiner,
    };
    let ticket = ours.create("--role operator");
    ours.operator_at(&ticket, &address).refused(8, "BH-E0085");
    ours.as_manager_at(&ours.create("--role manager"), &address)
        .refused(8, "BH-E0085");
    assert!(!stranger.log().contains("enrol"), "{}", stranger.log());
    assert!(joiner.log().contains("root"), "{}", joiner.log());
    // The same ticket is good where it was made.
    ours.operator(&ticket).success();

    // Their operator finds us no cluster of his, and we say nothing.
    let managers = lab.folder().join("config/bulkhead/contexts/other/managers");
    std::fs::write(&managers, format!("{}:7443\n", lab.address("manager-1"))).expect("its own");
    let refused = lab.run("--context other node ls");
    assert!([8, 9].contains(&refused.code), "{}", refused.whole());
    assert!(!refused.out.contains("manager-1"), "{}", refused.whole());
}

#[test]
fn who_needs_approval_waits_for_it_across_restarts() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 0);
    let joiner = Spawned::manager(&lab, "joiner");
    let ours = Tickets {
        lab: &lab,
        joiner: &joiner,
    };
    let ticket = ours.create("--role manager --approve --for-node second --uses 1");
    std::thread::scope(|scope| {
        let joining = scope.spawn(|| ours.as_manager(&ticket));
        let waiting = until_waiting(&lab, "second");
        let key = text(&waiting, "key_id");
        // Both sides show the same key, and nobody else's name or ticket was taken.
        lab.run("node ls").says(&key);
        eventually("the program says what it waits for", || {
            let status = lab.run(&format!("health --socket {}", joiner.socket().display()));
            let said = status.err.contains("node approve second") && status.err.contains(&key);
            said.then_some(()).ok_or(status.whole())
        });
        lab.run("node reject nobody").refused(3, "BH-E0060");
        lab.ok("node reject second");
        let refused = joining.join().expect("a thread");
        refused
            .refused(8, "BH-E0095")
            .says("waits for 'bulkhead node approve second'");
    });
    assert_eq!(lab.list("node ls").len(), 1, "nobody joined");

    let ticket = ours.create("--role manager --approve");
    std::thread::scope(|scope| {
        let joining = scope.spawn(|| ours.as_manager(&ticket));
        let waiting = lab.list("node ls --filter state=waiting");
        assert!(waiting.len() < 2, "{waiting:?}");
        let name = text(&until_waiting(&lab, ""), "name");
        // Neither side keeps it in memory alone.
        lab.ok("dev kill manager-1 --agent-only");
        let before = until_waiting(&lab, &name);
        joiner.restart(&lab);
        joining.join().expect("a thread");
        assert_eq!(
            text(&until_waiting(&lab, &name), "key_id"),
            text(&before, "key_id")
        );
        lab.ok(&format!("node approve {name}"));
        eventually("it votes", || {
            let nodes = lab.list(&format!("node ls --filter name={name} --filter state=ready"));
            (nodes.len() == 1).then_some(()).ok_or_else(|| joiner.log())
        });
        assert!(
            !lab.folder().join("joiner/joining").exists(),
            "nothing of it stays"
        );
    });
}

#[test]
fn a_ticket_on_the_line_is_taken_and_taken_off_it() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 0);
    let ticket = text(&lab.json("cluster ticket create --role operator"), "ticket");
    let address = format!("{}:7443", lab.address("manager-1"));
    let answer = lab.run(&format!(
        "operator join --context by-line --name eve {address} --ticket {ticket}"
    ));
    assert!(
        answer.err.contains("warning: a ticket on the command line"),
        "{}",
        answer.whole()
    );
    silent(answer, &ticket).success();
    lab.ok("context use dev");

    // One that waits shows what stands on its line meanwhile.
    let joiner = Spawned::manager(&lab, "joiner");
    let ticket = text(
        &lab.json("cluster ticket create --role manager --approve"),
        "ticket",
    );
    let own = format!("{}.202:7443", lab.network());
    let line = format!(
        "cluster join --socket {} --ticket {ticket} --listen {own} --advertise {own} {address}",
        joiner.socket().display()
    );
    let mut child = lab
        .command(&line)
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("it starts");
    until_waiting(&lab, "");
    let shown = std::fs::read(format!("/proc/{}/cmdline", child.id())).expect("it runs");
    let shown = String::from_utf8_lossy(&shown).replace('\0', " ");
    child.kill().expect("it runs");
    child.wait().expect("a child");
    assert!(
        shown.contains("--ticket-file -") && !shown.contains(secret(&ticket)),
        "{shown}"
    );
}

#[test]
fn all_tickets_are_revoked_at_once_and_guessing_is_slow() {
    if !may_run() {
        return;
    }
    let lab = Lab::up(1, 0);
    let joiner = Spawned::manager(&lab, "joiner");
    let ours = Tickets {
        lab: &lab,
        joiner: &joiner,
    };
    let tickets = [(); 3].map(|()| ours.create("--role operator"));
    lab.run("cluster ticket revoke --all").refused(2, "BH-E0130");
    assert_eq!(lab.ok("cluster ticket revoke --all -y").lines().count(), 3);
    assert!(lab.list("cluster ticket ls").is_empty());
    for ticket in &tickets {
        ours.operator(ticket).refused(8, "BH-E0081");
    }
    // Ten wrong ones are heard; then nobody at this address is, with whatever ticket.
    let mut answers = (0..20).map(|_| ours.operator(&with_other_end(&tickets[0])));
    let busy = answers
        .find(|answer| answer.err.contains("BH-E0053"))
        .expect("one is too many");
    busy.refused(9, "BH-E0053");
    assert!(lab.log("manager-1").contains("too many wrong tickets"));
}

/// The one who waits for approval, under this name if one is given.
fn until_waiting(lab: &Lab, name: &str) -> Value {
    eventually("someone waits", || {
        let waiting = lab.list("node ls --filter state=waiting");
        match waiting.as_slice() {
            [one] if name.is_empty() || text(one, "name") == name => Ok(one.clone()),
            other => Err(format!("{other:?}")),
        }
    })
}

/// Tickets of a cluster, and a manager that would join it.
struct Tickets<'a> {
    lab: &'a Lab,
    joiner: &'a Spawned,
}

impl Tickets<'_> {
    fn create(&self, flags: &str) -> String {
        text(&self.created(flags), "ticket")
    }

    /// A new ticket with its id and end.
    fn created(&self, flags: &str) -> Value {
        let created = self.lab.json(&format!("cluster ticket create {flags}"));
        let ticket = text(&created, "ticket");
        let kept = format!(
            "{}{ticket}\n",
            std::fs::read_to_string(self.all()).unwrap_or_default()
        );
        std::fs::write(self.all(), kept).expect("its own folder");
        created
    }

    fn all(&self) -> PathBuf {
        self.lab.folder().join("tickets")
    }

    /// The secret part of every ticket that was made.
    fn secrets(&self) -> Vec<String> {
        let all = std::fs::read_to_string(self.all()).expect("tickets");
        all.lines().map(|ticket| secret(ticket).to_owned()).collect()
    }

    fn operator(&self, ticket: &str) -> Answer {
        self.operator_at(ticket, &format!("{}:7443", self.lab.address("manager-1")))
    }

    fn operator_at(&self, ticket: &str, address: &str) -> Answer {
        let file = self.file(ticket);
        let line = format!(
            "operator join --context by-ticket --name eve --ticket-file {} {address}",
            file.display()
        );
        let answer = self.lab.run(&line);
        self.lab.ok("context use dev");
        silent(answer, ticket)
    }

    fn as_manager(&self, ticket: &str) -> Answer {
        self.as_manager_at(ticket, &format!("{}:7443", self.lab.address("manager-1")))
    }

    fn as_manager_at(&self, ticket: &str, address: &str) -> Answer {
        let own = format!("{}.202:7443", self.lab.network());
        let (socket, file) = (self.joiner.socket(), self.file(ticket));
        let line = format!(
            "cluster join --socket {} --ticket-file {} --listen {own} --advertise {own} {address}",
            socket.display(),
            file.display()
        );
        silent(self.lab.run(&line), ticket)
    }

    fn file(&self, ticket: &str) -> PathBuf {
        let path: &Path = self.lab.folder();
        let path = path.join("ticket");
        std::fs::write(&path, ticket).expect("its own folder");
        path
    }
}

fn an_expired_one(tickets: &Tickets) {
    let expired = tickets.created("--role operator --ttl 1s");
    let ends = text(&expired, "expires_at");
    eventually("it expires", || {
        let now = Answer::of(
            std::process::Command::new("date").args(["-u", "+%FT%T.%3NZ"]),
            b"",
        )
        .success();
        (now > ends)
            .then_some(())
            .ok_or(format!("{now}, and it ends {ends}"))
    });
    tickets.operator(&text(&expired, "ticket")).refused(8, "BH-E0082");
}

/// No message repeats a ticket, not even one that is almost right.
fn silent(answer: Answer, ticket: &str) -> Answer {
    let said = format!("{}{}", answer.out, answer.err);
    assert!(!said.contains(secret(ticket)), "{}", answer.whole());
    answer
}

fn secret(ticket: &str) -> &str {
    ticket.rsplit('-').next().expect("a last part")
}

/// Another secret of the same form.
fn with_other_end(ticket: &str) -> String {
    let (start, secret) = ticket.rsplit_once('-').expect("a last part");
    let first = if secret.starts_with('a') { "b" } else { "a" };
    format!("{start}-{first}{}", &secret[1..])
}

/// The digest of another root.
fn with_other_digest(ticket: &str) -> String {
    let mut parts: Vec<String> = ticket.split('-').map(str::to_owned).collect();
    let first = if parts[2].starts_with('a') { "b" } else { "a" };
    parts[2] = format!("{first}{}", &parts[2][1..]);
    parts.join("-")
}
