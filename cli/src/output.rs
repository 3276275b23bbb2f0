//! How results are printed: tables, JSON, ids. Written once, so that every noun prints alike.
//!
//! Nothing is ever cut but ids in tables, and those only to a length that is still a unique prefix in practice.

mod progress;
pub(crate) mod text;

use std::io::Write;

use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::refusal::{Code, Refusal, printable};

pub(crate) use progress::{Progress, ProgressKind};

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// One document
    Json,
    /// One object on each line
    Jsonl,
}

/// Which rows of a list are shown.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Filters {
    /// Shows only what has this value; several must all hold
    #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = filter)]
    filters: Vec<(String, String)>,
}

fn filter(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE, like name=web")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// One object of a list.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// What `-q` prints.
    pub(crate) id: String,
    /// What the table shows.
    pub(crate) cells: Vec<String>,
    /// What JSON shows; its scalar fields can be filtered by.
    pub(crate) json: Value,
}

/// A list to print.
#[derive(Debug)]
pub(crate) struct Listing {
    /// The table's columns.
    pub(crate) headers: &'static [&'static str],
    /// The fields that a filter may name, beside `label`.
    pub(crate) keys: &'static [&'static str],
    /// The rows.
    pub(crate) rows: Vec<Row>,
}

/// The choices that decide how a result looks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    /// What was asked for; `None`: the default.
    pub(crate) format: Option<Format>,
    /// Only ids.
    pub(crate) quiet: bool,
    /// For people, whatever the output is.
    pub(crate) pretty: bool,
    /// Whether the output is a terminal.
    pub(crate) terminal: bool,
}

/// A list as text.
pub(crate) fn listing(listing: Listing, filters: &Filters, style: Style) -> Result<String, Refusal> {
    for (key, _) in &filters.filters {
        if key != "label" && !listing.keys.contains(&key.as_str()) {
            let reason = format!("'{key}' is not a key");
            let help = format!("keys: {}, label", listing.keys.join(", "));
            return Err(Refusal::new(Code::BadField, "--filter", reason, help));
        }
    }
    let fits = |row: &&Row| {
        filters
            .filters
            .iter()
            .all(|(key, value)| holds(&row.json, key, value))
    };
    let rows: Vec<&Row> = listing.rows.iter().filter(fits).collect();
    if style.quiet {
        return Ok(rows.iter().map(|row| format!("{}\n", row.id)).collect());
    }
    Ok(match style.format.unwrap_or(Format::Table) {
        Format::Table => table(listing.headers, rows.iter().map(|row| row.cells.as_slice())),
        Format::Json => {
            let all: Vec<&Value> = rows.iter().map(|row| &row.json).collect();
            format!("{:#}\n", Value::from_iter(all.into_iter().cloned()))
        }
        Format::Jsonl => rows.iter().map(|row| format!("{}\n", row.json)).collect(),
    })
}

/// Whether an object has a value: ids by prefix, names by part, labels by key or pair, the rest exactly.
fn holds(json: &Value, key: &str, value: &str) -> bool {
    let text = |v: &Value| match v {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    match key {
        "id" => text(&json["id"]).starts_with(value),
        "name" => text(&json["name"]).contains(value),
        "label" => match value.split_once('=') {
            Some((name, wanted)) => json["labels"].get(name).is_some_and(|v| text(v) == wanted),
            None => json["labels"].get(value).is_some(),
        },
        _ => text(&json[key]) == value,
    }
}

/// One document for one object or several: for people on a terminal, JSON otherwise.
pub(crate) fn documents(values: &[Value], style: Style) -> String {
    let people = style.pretty || style.terminal;
    let format = style
        .format
        .unwrap_or(if people { Format::Table } else { Format::Json });
    match format {
        Format::Table => {
            let each: Vec<String> = values.iter().map(|value| tree(value, 0)).collect();
            each.join("\n")
        }
        Format::Json => format!("{:#}\n", Value::from_iter(values.iter().cloned())),
        Format::Jsonl => values.iter().map(|value| format!("{value}\n")).collect(),
    }
}

/// One object that is no list: a table for people is the caller's.
pub(crate) fn document(value: &Value, format: Format) -> String {
    match format {
        Format::Json => format!("{value:#}\n"),
        Format::Table | Format::Jsonl => format!("{value}\n"),
    }
}

/// Columns as wide as their widest cell, two spaces between, nothing after the last.
pub(crate) fn table<'a>(headers: &[&str], rows: impl Iterator<Item = &'a [String]>) -> String {
    let mut lines: Vec<Vec<String>> = vec![headers.iter().map(|h| (*h).to_owned()).collect()];
    lines.extend(rows.map(|row| row.iter().map(|cell| printable(cell)).collect()));
    let mut widths = vec![0; headers.len()];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in &lines {
        let mut padded = String::new();
        for (width, cell) in widths.iter().zip(line) {
            padded.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(padded.trim_end());
        text.push('\n');
    }
    text
}

/// An object as indented `key: value` lines; what is empty is left out.
fn tree(value: &Value, depth: usize) -> String {
    let indent = "  ".repeat(depth);
    let scalar = |v: &Value| match v {
        Value::String(text) => printable(text),
        other => other.to_string(),
    };
    let empty = |v: &Value| match v {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    match value {
        Value::Object(fields) => fields
            .iter()
            .filter(|(_, v)| !empty(v))
            .map(|(key, v)| match v {
                Value::Object(_) | Value::Array(_) => format!("{indent}{key}:\n{}", tree(v, depth + 1)),
                v => format!("{indent}{key}: {}\n", scalar(v)),
            })
            .collect(),
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::Object(_) | Value::Array(_) => {
                    let inner = tree(item, depth + 1);
                    format!("{indent}- {}", inner.trim_start())
                }
                item => format!("{indent}- {}\n", scalar(item)),
            })
            .collect(),
        other => format!("{indent}{}\n", scalar(other)),
    }
}

/// Writes a result. A reader who has seen enough, as `| head` has, is no error.
pub(crate) fn write(out: &mut dyn Write, text: &str) -> Result<(), Refusal> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Refusal::new(
            Code::Unwritable,
            "stdout",
            e.to_string(),
            "check where the output goes",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PLAIN: Style = Style {
        format: None,
        quiet: false,
        pretty: false,
        terminal: false,
    };

    fn nodes() -> Listing {
        let row = |id: &str, name: &str, zone: &str| Row {
            id: id.into(),
            cells: vec![id[..2].into(), name.into(), "ready".into()],
            json: json!({ "id": id, "name": name, "state": "ready", "labels": { "zone": zone } }),
        };
        Listing {
            headers: &["ID", "NAME", "STATE"],
            keys: &["id", "name", "state"],
            rows: vec![row("aaaa", "worker-1", "a"), row("abbb", "w2", "b")],
        }
    }

    fn shown(filters: &[&str], style: Style) -> Result<String, Code> {
        let filters = filters.iter().map(|f| filter(f).expect("a pair")).collect();
        listing(nodes(), &Filters { filters }, style).map_err(|e| e.code())
    }

    #[test]
    fn a_table_aligns_and_has_no_trailing_space() {
        let want = "ID  NAME      STATE\naa  worker-1  ready\nab  w2        ready\n";
        assert_eq!(shown(&[], PLAIN).as_deref(), Ok(want));
    }

    #[test]
    fn filters_choose_rows_and_unknown_keys_are_refused() {
        let quiet = Style { quiet: true, ..PLAIN };
        for (filters, want) in [
            (&["id=aa"][..], "aaaa\n"),
            (&["name=w2"], "abbb\n"),
            (&["label=zone"], "aaaa\nabbb\n"),
            (&["label=zone=b"], "abbb\n"),
            (&["state=ready", "id=ab"], "abbb\n"),
            (&["state=down"], ""),
        ] {
            assert_eq!(shown(filters, quiet).as_deref(), Ok(want), "{filters:?}");
        }
        assert_eq!(shown(&["colour=red"], quiet), Err(Code::BadField));
    }

    #[test]
    fn json_is_one_document_and_jsonl_a_line_each() {
        let json = Style {
            format: Some(Format::Json),
            ..PLAIN
        };
        let parsed: Value = serde_json::from_str(&shown(&[], json).expect("rows")).expect("one document");
        assert_eq!(parsed[1]["name"], "w2");
        let lines = Style {
            format: Some(Format::Jsonl),
            ..PLAIN
        };
        let text = shown(&[], lines).expect("rows");
        assert_eq!(text.lines().count(), 2);
        assert!(
            text.lines()
                .all(|line| serde_json::from_str::<Value>(line).is_ok())
        );
    }

    #[test]
    fn an_inspected_object_is_json_unless_a_person_looks() {
        let value = [
            json!({ "id": "x", "none": null, "list": [{ "a": 1, "b": 2 }, "s"], "map": { "k": "v\u{1b}" } }),
        ];
        assert!(documents(&value, PLAIN).starts_with("[\n"));
        let terminal = Style {
            terminal: true,
            ..PLAIN
        };
        let want = "id: x\nlist:\n  - a: 1\n    b: 2\n  - s\nmap:\n  k: v\\u{1b}\n";
        assert_eq!(documents(&value, terminal), want);
    }
}
