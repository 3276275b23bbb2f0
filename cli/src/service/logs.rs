//! `service logs`: what the tasks of a service wrote, from every node that can be reached.

use std::collections::BTreeMap;
use std::time::Duration;

use bulkhead_proto::wire::{ListTasksRequest, LogLine, LogsRequest, LogsResponse};
use clap::Args;
use serde_json::json;

use crate::app::App;
use crate::connection::{Connection, Effect, Patience, pages};
use crate::output::{Format, text};
use crate::quantity::{Since, since};
use crate::refusal::{Exit, Refusal, from_status, printable};
use crate::task;

/// Flags of `service logs`.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Name, id or unique prefix of an id; or a task's id
    service: String,
    /// Goes on with what is written later
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines of each task
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<u64>,
    /// Only what is newer: a duration like 10m, or a time like 2026-01-31T12:00:00Z
    #[arg(long, value_name = "WHEN", value_parser = since)]
    since: Option<Since>,
    /// Shows when each line was written
    #[arg(short, long)]
    timestamps: bool,
}

pub(super) async fn run(logs: Logs, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    let place = format!("service {}", logs.service);
    let since = logs.since.map_or(0, |since| since.before(text::now_ms()));
    let mut titles = titles(&mut connection, &logs.service).await?;
    let mut request = LogsRequest {
        service: logs.service.clone(),
        follow: logs.follow,
        tail: logs.tail,
        since,
        ..Default::default()
    };
    let patience = Patience {
        attempt: Duration::from_secs(30),
        ..Patience::default()
    };
    loop {
        let mut stream = connection
            .call(Effect::Read, patience, &place, async |mut c| {
                c.logs(request.clone()).await
            })
            .await?;
        let broken = loop {
            let answer = tokio::select! {
                biased;
                _ = tokio::signal::ctrl_c() => return Ok(Exit::Interrupted),
                answer = stream.message() => answer,
            };
            match answer {
                Ok(None) => return Ok(Exit::Done),
                Ok(Some(answer)) => {
                    let unknown = answer
                        .lines
                        .iter()
                        .any(|line| !titles.contains_key(&line.task_id));
                    if unknown {
                        titles.extend(self::titles(&mut connection, &logs.service).await?);
                    }
                    if let Some(newest) = answer.lines.iter().map(|line| line.at).max() {
                        request.since = request.since.max(newest + 1);
                    }
                    show(app, &answer, &titles, logs.timestamps)?;
                }
                Err(status) => break status,
            }
        };
        // What follows a broken stream starts after the last line that came.
        if !logs.follow {
            return Err(from_status(&broken, &place));
        }
        request.tail = None;
        tokio::time::sleep(crate::wait::POLL).await;
    }
}

/// What people call the service's tasks.
async fn titles(connection: &mut Connection, service: &str) -> Result<BTreeMap<Vec<u8>, String>, Refusal> {
    let request = ListTasksRequest {
        service: service.to_owned(),
        all: true,
        ..Default::default()
    };
    let place = format!("service {service}");
    let tasks = pages!(connection, &place, list_tasks, request, tasks);
    let title = |t: bulkhead_proto::wire::TaskSummary| {
        let id = t.task.as_ref()?.id.clone();
        Some((id, format!("{}@{}", task::title(&t), t.node_name)))
    };
    Ok(tasks.into_iter().filter_map(title).collect())
}

fn show(
    app: &mut App<'_>,
    answer: &LogsResponse,
    titles: &BTreeMap<Vec<u8>, String>,
    timestamps: bool,
) -> Result<(), Refusal> {
    let format = app.global.format.unwrap_or(Format::Table);
    let resolve = !app.global.no_resolve;
    let mut out = String::new();
    for line in &answer.lines {
        let id = text::id(&line.task_id);
        let title = titles.get(&line.task_id).filter(|_| resolve).cloned();
        out.push_str(&render(line, &title.unwrap_or(id), timestamps, format));
    }
    for missing in &answer.missing {
        app.say(&format!("not shown: {}", printable(missing)));
    }
    app.print(&out)
}

fn render(line: &LogLine, title: &str, timestamps: bool, format: Format) -> String {
    let content = String::from_utf8_lossy(&line.text);
    if format != Format::Table {
        let stream = if line.stderr { "stderr" } else { "stdout" };
        let value = json!({
            "task": title, "task_id": text::id(&line.task_id), "at": text::time(line.at),
            "stream": stream, "text": content.trim_end_matches('\n'),
        });
        return format!("{value}\n");
    }
    let at = match text::time(line.at) {
        serde_json::Value::String(time) if timestamps => format!("{time} "),
        _ => String::new(),
    };
    // A task may write what a terminal would obey; it is shown, not obeyed.
    format!("{at}{title} | {}\n", printable(content.trim_end_matches('\n')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_who_and_obeys_nothing() {
        let line = LogLine {
            task_id: vec![0; 16],
            at: 1_000,
            stderr: true,
            text: b"hi \x1b[2J\n".to_vec(),
        };
        assert_eq!(
            render(&line, "web.1@w1", false, Format::Table),
            "web.1@w1 | hi \\u{1b}[2J\n"
        );
        assert!(render(&line, "web.1@w1", true, Format::Table).starts_with("1970-01-01T00:00:01Z web.1@w1"));
        let json: serde_json::Value =
            serde_json::from_str(&render(&line, "web.1@w1", false, Format::Jsonl)).expect("an object");
        assert_eq!(
            (&json["stream"], &json["text"]),
            (&json!("stderr"), &json!("hi \u{1b}[2J"))
        );
    }
}
