//! `explain`: for each node every filter that refuses, and the nearest fix.

use std::fmt::Write as _;

use bulkhead_proto::wire::{ExplainRequest, ExplainResponse};
use serde_json::{Value, json};

use crate::app::App;
use crate::output::{Format, document, table, text};
use crate::refusal::Refusal;
use crate::task;

/// Explains a service or a task; the other is empty.
pub(crate) async fn run(app: &mut App<'_>, service: String, task: String) -> Result<(), Refusal> {
    let place = if service.is_empty() {
        format!("task {task}")
    } else {
        format!("service {service}")
    };
    let request = ExplainRequest { service, task };
    let answer = app
        .connect()?
        .ask(&place, async |mut c| c.explain(request.clone()).await)
        .await?;
    let text = match app.global.format.unwrap_or(Format::Table) {
        Format::Table => people(&answer),
        format => document(&json(&answer), format),
    };
    app.print(&text)
}

/// The explanation for people: a verdict, the table, the fix.
pub(crate) fn people(answer: &ExplainResponse) -> String {
    let mut out = String::new();
    let verdict = match (answer.placeable, answer.ever) {
        (true, _) => "one more replica could be placed now",
        (false, true) => "no node can take it now; one could once it is free",
        (false, false) => "no node can ever take it as things stand",
    };
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{}: {verdict}", answer.subject);
    for pending in &answer.pending {
        let _ = writeln!(
            out,
            "{} is pending: {}",
            task::title(pending),
            task::reason(pending)
        );
    }
    out.push_str(&grid(answer));
    if !answer.nearest_fix.is_empty() {
        let _ = writeln!(out, "nearest fix: {}", answer.nearest_fix);
    }
    out
}

/// Node × reason.
pub(crate) fn grid(answer: &ExplainResponse) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for node in &answer.nodes {
        if node.refusals.is_empty() {
            rows.push(vec![
                node.node_name.clone(),
                "-".into(),
                "fits".into(),
                String::new(),
            ]);
        }
        for (at, refusal) in node.refusals.iter().enumerate() {
            let name = if at == 0 {
                node.node_name.clone()
            } else {
                String::new()
            };
            rows.push(vec![
                name,
                refusal.filter.clone(),
                refusal.reason.clone(),
                refusal.fix.clone(),
            ]);
        }
    }
    if rows.is_empty() {
        return "there is no worker\n".into();
    }
    table(
        &["NODE", "FILTER", "REASON", "FIX"],
        rows.iter().map(Vec::as_slice),
    )
}

fn json(answer: &ExplainResponse) -> Value {
    json!({
        "subject": answer.subject,
        "placeable": answer.placeable,
        "ever": answer.ever,
        "nearest_fix": answer.nearest_fix,
        "nodes": answer.nodes.iter().map(|node| json!({
            "node_id": text::id(&node.node_id),
            "node": node.node_name,
            "refusals": node.refusals.iter().map(|r| json!({
                "filter": r.filter, "reason": r.reason, "fix": r.fix,
            })).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "pending": answer.pending.iter().map(task::json).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::wire::{NodeVerdict, Refusal as Filtered};

    #[test]
    fn every_refusal_of_every_node_is_shown() {
        let refusal = |filter: &str, reason: &str| Filtered {
            filter: filter.into(),
            reason: reason.into(),
            fix: "ask for less".into(),
        };
        let answer = ExplainResponse {
            subject: "service big".into(),
            nodes: vec![
                NodeVerdict {
                    node_name: "worker-1".into(),
                    refusals: vec![
                        refusal("memory", "900 GiB of 2 GiB"),
                        refusal("ready", "it is down"),
                    ],
                    ..Default::default()
                },
                NodeVerdict {
                    node_name: "worker-2".into(),
                    ..Default::default()
                },
            ],
            nearest_fix: "reserve at most 2 GiB".into(),
            ..Default::default()
        };
        let want = "\
service big: no node can ever take it as things stand
NODE      FILTER  REASON            FIX
worker-1  memory  900 GiB of 2 GiB  ask for less
          ready   it is down        ask for less
worker-2  -       fits
nearest fix: reserve at most 2 GiB
";
        assert_eq!(people(&answer), want);
        assert_eq!(grid(&ExplainResponse::default()), "there is no worker\n");
    }
}
