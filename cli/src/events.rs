//! `events`: what changes in the cluster, as it changes.

use bulkhead_proto::wire::{Event, Kind, Object, WatchRequest, event, object};
use clap::Args;
use serde_json::json;

use crate::app::App;
use crate::connection::{Effect, Patience};
use crate::output::{Format, text};
use crate::refusal::{Code, Exit, Refusal};
use crate::task;

/// Flags of `events`.
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Only what concerns these: node, ticket, secret, image, service, task, cluster
    #[arg(long, value_name = "KIND", value_parser = kind)]
    kind: Vec<Kind>,
    /// Also what changed after this commit index, as far as it is kept
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    after: u64,
    /// Ends once what is known now was shown; without --after that is all that is kept
    #[arg(long)]
    no_follow: bool,
}

const KINDS: [(&str, Kind); 7] = [
    ("cluster", Kind::Cluster),
    ("node", Kind::Node),
    ("ticket", Kind::Ticket),
    ("secret", Kind::Secret),
    ("image", Kind::Image),
    ("service", Kind::Service),
    ("task", Kind::Task),
];

fn kind(text: &str) -> Result<Kind, String> {
    let found = KINDS.into_iter().find(|(name, _)| *name == text);
    found.map(|(_, kind)| kind).ok_or_else(|| {
        let names: Vec<&str> = KINDS.into_iter().map(|(name, _)| name).collect();
        format!("one of {}", names.join(", "))
    })
}

pub(crate) async fn run(events: Events, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    let kinds: Vec<i32> = events.kind.iter().map(|kind| *kind as i32).collect();
    let mut after = events.after;
    // The stream begins with an empty answer, and goes on for ever: this says where what is known now ends.
    let end = match events.no_follow {
        true => connection.status().await?.index,
        false => u64::MAX,
    };
    loop {
        let request = WatchRequest {
            after,
            kinds: kinds.clone(),
            oldest: events.no_follow && after == 0,
        };
        let mut stream = connection
            .call(Effect::Read, Patience::default(), "events", async |mut c| {
                c.watch(request.clone()).await
            })
            .await?;
        loop {
            let answer = tokio::select! {
                biased;
                _ = tokio::signal::ctrl_c() => return Ok(Exit::Interrupted),
                answer = stream.message() => answer,
            };
            match answer {
                Ok(Some(answer)) => {
                    after = after.max(answer.index);
                    for event in &answer.events {
                        show(app, event)?;
                    }
                    if answer.index >= end {
                        return Ok(Exit::Done);
                    }
                }
                // A manager that goes or falls behind ends its streams; the next one goes on where this one stopped.
                Ok(None) | Err(_) => break,
            }
        }
        tokio::time::sleep(crate::wait::POLL).await;
    }
}

fn show(app: &mut App<'_>, event: &Event) -> Result<(), Refusal> {
    let text = render(event, app.global.format.unwrap_or(Format::Table)).ok_or_else(|| {
        Refusal::new(
            Code::Unsupported,
            "events",
            "an event of no known kind",
            "update this program",
        )
    })?;
    app.print(&text)
}

/// One event as a line.
fn render(event: &Event, format: Format) -> Option<String> {
    let (action, kind, id, name, detail) = match event.change.as_ref()? {
        event::Change::Put(object) => {
            let (kind, id, name, new, detail) = describe(object)?;
            (if new { "created" } else { "changed" }, kind, id, name, detail)
        }
        event::Change::Deleted(reference) => {
            let found = KINDS.into_iter().find(|(_, kind)| *kind == reference.kind())?;
            (
                "removed",
                found.0,
                text::id(&reference.id),
                String::new(),
                String::new(),
            )
        }
    };
    if format != Format::Table {
        let value = json!({
            "index": event.index, "at": text::time(event.at), "actor": event.actor,
            "action": action, "kind": kind, "id": id, "name": name, "detail": detail,
        });
        return Some(format!("{value}\n"));
    }
    let at = text::time(event.at);
    let words = [
        at.as_str().unwrap_or("-"),
        kind,
        &text::short(&id),
        &name,
        action,
        &detail,
    ];
    let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
    let line = format!("{} (by {})", words.join(" "), event.actor);
    Some(format!("{}\n", crate::refusal::printable(&line)))
}

/// Kind, id, name, whether it is new, and what is worth saying.
fn describe(object: &Object) -> Option<(&'static str, String, String, bool, String)> {
    use object::Object as Of;
    let object = object.object.as_ref()?;
    let (kind, id, name, meta, detail) = match object {
        Of::Cluster(c) => ("cluster", &c.id, String::new(), &c.meta, String::new()),
        Of::Node(n) => ("node", &n.id, n.name.clone(), &n.meta, crate::node::summary(n)),
        Of::Ticket(t) => (
            "ticket",
            &t.id,
            String::new(),
            &t.meta,
            format!("{} uses left", t.uses_left),
        ),
        Of::Secret(s) => ("secret", &s.id, s.name.clone(), &s.meta, String::new()),
        Of::Image(i) => ("image", &i.id, i.name.clone(), &i.meta, String::new()),
        Of::Service(s) => {
            let name = s
                .versions
                .last()
                .and_then(|v| v.spec.as_ref())
                .map_or("", |spec| &spec.name);
            ("service", &s.id, name.to_owned(), &s.meta, String::new())
        }
        Of::Task(t) => {
            let message = t.status.as_ref().map_or("", |s| &s.message);
            let detail = format!("slot {} {} {message}", t.slot, task::state(t.status.as_ref()));
            (
                "task",
                &t.id,
                String::new(),
                &t.meta,
                detail.trim_end().to_owned(),
            )
        }
    };
    let new = meta
        .as_ref()
        .is_some_and(|meta| meta.version == meta.created_index);
    Some((kind, text::id(id), name, new, detail))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::wire::{Meta, ObjectRef, Secret};

    #[test]
    fn an_event_says_what_when_and_who() {
        let event = |change| Event {
            index: 7,
            at: 1_000,
            actor: "operator/x".into(),
            change: Some(change),
        };
        let secret = Secret {
            meta: Some(Meta {
                version: 7,
                created_index: 7,
                ..Default::default()
            }),
            id: vec![0; 16],
            name: "db".into(),
            ..Default::default()
        };
        let put = event(event::Change::Put(Object {
            object: Some(object::Object::Secret(secret)),
        }));
        assert_eq!(
            render(&put, Format::Table).as_deref(),
            Some("1970-01-01T00:00:01Z secret aaaaaaaaaaaa db created (by operator/x)\n")
        );
        let gone = event(event::Change::Deleted(ObjectRef {
            kind: Kind::Task.into(),
            id: vec![0; 16],
        }));
        assert_eq!(
            render(&gone, Format::Table).as_deref(),
            Some("1970-01-01T00:00:01Z task aaaaaaaaaaaa removed (by operator/x)\n")
        );
        assert!(render(&gone, Format::Jsonl).is_some_and(|line| line.contains("\"index\":7")));
        assert!(kind("colour").is_err());
    }
}
