//! `audit`: what was done to the cluster's identities, secrets and keys, by whom; and the proof that nobody rewrote it.

mod verify;

use bulkhead_proto::audit::word;
use bulkhead_proto::wire::{AuditAction, AuditRecord, Kind, ObjectRef, Role};
use clap::Args;
use serde_json::{Value, json};

use crate::app::App;
use crate::node::hex;
use crate::output::{Filters, Listing, Row, text};
use crate::quantity::{Since, since};
use crate::refusal::{Exit, Refusal};

/// Flags of `audit`.
#[derive(Debug, Args)]
pub(crate) struct Audit {
    /// Only what is newer: a duration like 10m, or a time like 2026-01-31T12:00:00Z
    #[arg(long, value_name = "WHEN", value_parser = since)]
    since: Option<Since>,
    /// Only what this operator, node, ticket or user did or was refused: a name, or a principal like operator/ID
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
    /// Only what concerns this object: cluster, or node, operator, ticket, secret or service, then / and its name or id
    #[arg(long, value_name = "KIND/NAME", value_parser = of_object)]
    object: Option<OfObject>,
    #[command(flatten)]
    filters: Filters,
    /// Checks the whole log, and that every manager that can be reached has the same; -q prints its head alone
    #[arg(long, conflicts_with_all = ["since", "actor", "object", "filters"])]
    verify: bool,
    /// Proves that nothing was rewritten since this head was printed: the head, or a file that holds it
    #[arg(long, value_name = "HEAD|FILE", requires = "verify", value_parser = verify::earlier)]
    head: Option<verify::Earlier>,
}

pub(crate) async fn run(audit: Audit, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    if audit.verify {
        return verify::run(&mut connection, audit.head, app).await;
    }
    let since = audit.since.map_or(i64::MIN, |since| since.before(text::now_ms()));
    let log = verify::fetch(&mut connection).await?;
    let wanted = |record: &&AuditRecord| {
        record.at >= since
            && audit.actor.as_ref().is_none_or(|actor| is_by(record, actor))
            && audit.object.as_ref().is_none_or(|object| object.is_of(record))
    };
    let listing = Listing {
        headers: &["TIME", "ACTION", "OBJECT", "BY", "DETAIL"],
        keys: &["action", "actor", "actor_name", "address", "index", "sequence"],
        rows: log.records.iter().filter(wanted).map(row).collect(),
    };
    app.list(listing, &audit.filters)?;
    Ok(Exit::Done)
}

/// An object as `--object` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct OfObject {
    noun: String,
    /// Empty: any.
    name: String,
}

const NOUNS: [&str; 6] = ["cluster", "node", "operator", "ticket", "secret", "service"];

fn of_object(text: &str) -> Result<OfObject, String> {
    let (noun, name) = text.split_once('/').unwrap_or((text, ""));
    match NOUNS.contains(&noun) {
        true => Ok(OfObject {
            noun: noun.to_owned(),
            name: name.to_owned(),
        }),
        false => Err(format!("one of {}, then / and a name or id", NOUNS.join(", "))),
    }
}

impl OfObject {
    fn is_of(&self, record: &AuditRecord) -> bool {
        let fits = |reference: &Option<ObjectRef>, name: &str, role: Role| {
            reference.as_ref().is_some_and(|it| {
                // An operator's record is a node's, but for its role.
                noun(it.kind(), role) == self.noun
                    && (name == self.name || text::id(&it.id).starts_with(&self.name))
            })
        };
        fits(&record.object, &record.name, record.role())
            || fits(&record.related, &record.related_name, Role::Unspecified)
    }
}

/// Whether a record is of what this one did, or was refused: by its name, by its principal, or by its id.
fn is_by(record: &AuditRecord, actor: &str) -> bool {
    let id = record.actor.split_once('/').map_or("", |(_, id)| id);
    record.actor == actor || (record.actor_name == actor && !actor.is_empty()) || id == actor
}

fn noun(kind: Kind, role: Role) -> &'static str {
    match (kind, role) {
        (Kind::Node, Role::Operator) => "operator",
        (Kind::Node, _) => "node",
        (Kind::Cluster, _) => "cluster",
        (Kind::Ticket, _) => "ticket",
        (Kind::Secret, _) => "secret",
        (Kind::Image, _) => "image",
        (Kind::Service, _) => "service",
        (Kind::Task, _) => "task",
        (Kind::Unspecified, _) => "unknown",
    }
}

/// An object as a table shows it.
fn shown(reference: &ObjectRef, name: &str, role: Role) -> String {
    let noun = noun(reference.kind(), role);
    match (reference.kind(), name) {
        (Kind::Cluster, _) => noun.to_owned(),
        (_, "") => format!("{noun}/{}", text::short(&text::id(&reference.id))),
        (_, name) => format!("{noun}/{name}"),
    }
}

fn by(record: &AuditRecord) -> String {
    let (class, id) = record.actor.split_once('/').unwrap_or((&record.actor, ""));
    let who = match (id, record.actor_name.as_str()) {
        ("", _) => class.to_owned(),
        (id, "") => format!("{class}/{}", text::short(id)),
        (_, name) => format!("{class}/{name}"),
    };
    match record.address.as_str() {
        "" => who,
        address => format!("{who} from {address}"),
    }
}

/// What a record says beside what every record says.
fn detail(record: &AuditRecord) -> String {
    let related = record
        .related
        .as_ref()
        .map(|it| shown(it, &record.related_name, Role::Unspecified));
    let related = related.map(|related| match record.action() {
        AuditAction::Join => format!("by {related}"),
        AuditAction::Refuse => format!("says {related}"),
        AuditAction::Unlock => format!("of {related}"),
        _ => format!("to {related}"),
    });
    let role = match (record.action(), record.object.as_ref().map(ObjectRef::kind)) {
        (AuditAction::Join, _) | (_, Some(Kind::Ticket)) => text::role(record.role()),
        _ => "",
    };
    let key = match record.key_id.get(..8) {
        Some(start) => format!("key {}", hex(start)),
        None => String::new(),
    };
    let until = match text::time(record.until) {
        Value::String(time) => format!("until {time}"),
        _ => String::new(),
    };
    let count = match record.count {
        0 | 1 => String::new(),
        count => format!("{count} times"),
    };
    let parts = [
        role.to_owned(),
        record.detail.clone(),
        related.unwrap_or_default(),
        key,
        until,
        count,
    ];
    parts
        .into_iter()
        .filter(|it| !it.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

fn row(record: &AuditRecord) -> Row {
    let object = record.object.as_ref();
    Row {
        id: record.sequence.to_string(),
        cells: vec![
            text::time(record.at).as_str().unwrap_or("-").to_owned(),
            word(record.action()).to_owned(),
            object.map_or_else(|| "-".to_owned(), |it| shown(it, &record.name, record.role())),
            by(record),
            detail(record),
        ],
        json: json(record),
    }
}

fn json(record: &AuditRecord) -> Value {
    let reference = |reference: &Option<ObjectRef>, name: &str, role: Role| {
        reference
            .as_ref()
            .map(|it| json!({ "kind": noun(it.kind(), role), "id": text::id(&it.id), "name": name }))
    };
    json!({
        "sequence": record.sequence,
        "index": record.index,
        "at": text::time(record.at),
        "action": word(record.action()),
        "object": reference(&record.object, &record.name, record.role()),
        "role": (record.role() != Role::Unspecified).then(|| text::role(record.role())),
        "actor": record.actor,
        "actor_name": record.actor_name,
        "address": record.address,
        "related": reference(&record.related, &record.related_name, Role::Unspecified),
        "key_id": hex(&record.key_id),
        "until": text::time(record.until),
        "detail": record.detail,
        "count": record.count,
        "request_id": text::id(&record.request_id),
        "hash": hex(&record.hash),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(kind: Kind, n: u8) -> Option<ObjectRef> {
        Some(ObjectRef {
            kind: kind.into(),
            id: vec![n; 16],
        })
    }

    fn join() -> AuditRecord {
        AuditRecord {
            sequence: 3,
            at: 1_000,
            action: AuditAction::Join.into(),
            actor: format!("ticket/{}", text::id(&[7; 16])),
            object: reference(Kind::Node, 1),
            name: "worker-1".into(),
            role: Role::Worker.into(),
            related: reference(Kind::Ticket, 7),
            key_id: vec![0xAB; 32],
            until: 2_000,
            count: 1,
            ..Default::default()
        }
    }

    fn refusal() -> AuditRecord {
        AuditRecord {
            action: AuditAction::Refuse.into(),
            actor: "anonymous".into(),
            address: "10.0.0.9".into(),
            related: reference(Kind::Node, 2),
            related_name: "manager-1".into(),
            detail: "join: BH-E0081 ticket refused".into(),
            count: 40,
            ..Default::default()
        }
    }

    #[test]
    fn a_record_reads_as_a_line() {
        let ticket = text::short(&text::id(&[7; 16]));
        assert_eq!(
            row(&join()).cells,
            [
                "1970-01-01T00:00:01Z",
                "join",
                "node/worker-1",
                &format!("ticket/{ticket}"),
                &format!("worker; by ticket/{ticket}; key abababababababab; until 1970-01-01T00:00:02Z"),
            ]
        );
        assert_eq!(
            row(&refusal()).cells[1..],
            [
                "refuse",
                "-",
                "anonymous from 10.0.0.9",
                "join: BH-E0081 ticket refused; says node/manager-1; 40 times",
            ]
        );
        assert_eq!(json(&join())["object"]["kind"], "node");
        assert_eq!(json(&refusal())["object"], Value::Null);
    }

    #[test]
    fn records_are_found_by_who_and_what() {
        let object = |text: &str| of_object(text).expect("an object");
        for (given, found) in [
            ("node/worker-1", true),
            ("node/worker", false),
            ("node", true),
            (&format!("node/{}", &text::id(&[1; 16])[..8]), true),
            ("ticket", true),
            ("operator/worker-1", false),
            ("secret", false),
        ] {
            assert_eq!(object(given).is_of(&join()), found, "{given}");
        }
        assert!(object("node/manager-1").is_of(&refusal()), "who says so");
        assert!(of_object("colour/red").is_err());
        let operator = AuditRecord {
            actor: format!("operator/{}", text::id(&[5; 16])),
            actor_name: "alice".into(),
            ..join()
        };
        for (given, found) in [
            ("alice", true),
            ("bob", false),
            ("", false),
            (operator.actor.as_str(), true),
            (&text::id(&[5; 16]), true),
        ] {
            assert_eq!(is_by(&operator, given), found, "{given}");
        }
        assert!(is_by(&refusal(), "anonymous"));
    }
}
