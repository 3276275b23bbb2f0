//! The table, as text and as JSON.

use serde::Serialize;

use crate::samples::Summary;
use bulkhead_lab::system::Machine;

/// One line of the table.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Row {
    /// What was measured.
    pub(crate) what: String,
    pub(crate) median: String,
    pub(crate) p99: String,
    pub(crate) n: String,
    /// Processor time, per what.
    pub(crate) cpu: String,
    /// etcd in the same run.
    pub(crate) etcd: String,
    /// SwarmKit, quoted.
    pub(crate) swarmkit: &'static str,
    pub(crate) goal: &'static str,
    /// Whether the goal is reached; nothing where there is none, or nothing to hold against it.
    pub(crate) reached: Option<bool>,
    /// What the goal compares: the ratio, mostly.
    pub(crate) against: String,
    /// How much of the machine other programs took meanwhile, in percent.
    pub(crate) others_percent: Option<f64>,
    /// All numbers behind the line.
    pub(crate) figures: serde_json::Value,
}

impl Row {
    /// A line without a measurement. Why is kept whole among the figures; a cell is for a few words.
    pub(crate) fn failed(what: impl Into<String>, why: &str) -> Self {
        Self {
            what: what.into(),
            median: "failed".to_owned(),
            figures: serde_json::json!({ "error": why }),
            ..Self::default()
        }
    }

    /// With median, p99 and n of these values.
    pub(crate) fn figures(mut self, summary: &Summary, unit: Unit) -> Self {
        self.median = unit.show(summary.p50);
        self.p99 = unit.show(summary.p99);
        self.n = thousands(summary.n as f64);
        self
    }
}

/// How a number is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Millis,
    Seconds,
    PerSecond,
    Mebibytes,
}

impl Unit {
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::Millis if value < 10.0 => format!("{value:.2} ms"),
            Self::Millis => format!("{value:.0} ms"),
            Self::Seconds => format!("{value:.2} s"),
            Self::PerSecond => format!("{}/s", thousands(value)),
            Self::Mebibytes => format!("{value:.1} MiB"),
        }
    }
}

/// A whole number with its thousands set apart.
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Everything that was measured, and where.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    rows: Vec<Row>,
}

const HEADERS: [&str; 10] = [
    "what",
    "median",
    "p99",
    "n",
    "CPU",
    "etcd, same run",
    "SwarmKit*",
    "to reach",
    "reached",
    "others",
];

impl Report {
    pub(crate) fn new(machine: Machine) -> Self {
        Self {
            machine,
            rows: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    pub(crate) fn json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default(); // plain data always encodes
        text.push('\n');
        text
    }

    /// As Markdown whose columns also line up as plain text.
    pub(crate) fn table(&self) -> String {
        let mut lines: Vec<[String; 10]> = vec![HEADERS.map(str::to_owned)];
        lines.extend(self.rows.iter().map(cells));
        let width = |column: usize| {
            lines
                .iter()
                .map(|line| line[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..HEADERS.len()).map(width).collect();
        let mut text = format!("\n{}\n\n", self.machine);
        for (at, line) in lines.iter().enumerate() {
            for (cell, width) in line.iter().zip(&widths) {
                text.push_str(&format!("| {cell:width$} "));
            }
            text.push_str("|\n");
            if at == 0 {
                for width in &widths {
                    text.push_str(&format!("|{}", "-".repeat(width + 2)));
                }
                text.push_str("|\n");
            }
        }
        text.push_str(
            "\nmedian, p99: of the n values; for writes, rates of the rounds and latencies of all writes. \
             others: what programs that do not\nbelong to the measurement took of the machine meanwhile.\n\
             * measured on 2026-11-23 on a guest with 2 vCPUs (AMD EPYC), Docker Engine 20.10.24; not run here.\n",
        );
        text
    }
}

fn cells(row: &Row) -> [String; 10] {
    let reached = match row.reached {
        Some(true) => "yes",
        Some(false) => "no",
        None => "",
    };
    let reached = [reached, row.against.as_str()]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(", ");
    [
        row.what.clone(),
        row.median.clone(),
        row.p99.clone(),
        row.n.clone(),
        row.cpu.clone(),
        row.etcd.clone(),
        row.swarmkit.to_owned(),
        row.goal.to_owned(),
        reached,
        row.others_percent
            .map_or_else(String::new, |percent| format!("{percent:.0} %")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        for (value, unit, shown) in [
            (1234567.0, Unit::PerSecond, "1,234,567/s"),
            (999.6, Unit::PerSecond, "1,000/s"),
            (0.954, Unit::Millis, "0.95 ms"),
            (412.4, Unit::Millis, "412 ms"),
            (3.456, Unit::Seconds, "3.46 s"),
            (17.25, Unit::Mebibytes, "17.2 MiB"),
        ] {
            assert_eq!(unit.show(value), shown);
        }
    }

    #[test]
    fn the_columns_line_up_and_a_missing_peer_says_why() {
        let mut report = Report::new(Machine::default());
        report.add(Row {
            median: "1.00 ms".into(),
            goal: "≤ 2 ms",
            reached: Some(true),
            against: "0.50 ×".into(),
            etcd: "not run: it is not installed".into(),
            ..Row::default()
        });
        report.add(Row::failed("theirs", "a line\nand another"));
        let table = report.table();
        let lines: Vec<&str> = table.lines().filter(|line| line.starts_with('|')).collect();
        assert_eq!(lines.len(), 4);
        let widths: Vec<usize> = lines.iter().map(|line| line.chars().count()).collect();
        assert!(widths.windows(2).all(|pair| pair[0] == pair[1]), "{table}");
        assert!(lines[2].contains("| yes, 0.50 × "), "{table}");
        assert!(lines[2].contains("| not run: it is not installed "), "{table}");
        assert!(lines[3].contains("| failed "), "{table}");
        assert!(report.json().contains(r"a line\nand another"));
    }
}
