//! Progress on stderr: one line for each thing that changes.
//!
//! A terminal is repainted; anything else gets one line for each change of state, so that a log can be read.

use std::io::Write;

use clap::ValueEnum;
use serde_json::json;

use crate::refusal::printable;

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Default)]
pub(crate) enum ProgressKind {
    /// Repainted on a terminal, plain elsewhere
    #[default]
    Auto,
    /// Repainted lines
    Tty,
    /// One line for each change
    Plain,
    /// One JSON object for each change
    Json,
    /// Nothing
    None,
}

/// Lines that change while a command waits.
pub(crate) struct Progress<'a> {
    kind: ProgressKind,
    out: &'a mut dyn Write,
    /// In the order in which they were first said.
    lines: Vec<(String, String)>,
    painted: usize,
}

impl std::fmt::Debug for Progress<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl<'a> Progress<'a> {
    /// Progress to `out`, a terminal or not.
    pub(crate) fn new(kind: ProgressKind, terminal: bool, out: &'a mut dyn Write) -> Self {
        let kind = match (kind, terminal) {
            (ProgressKind::Auto, true) => ProgressKind::Tty,
            (ProgressKind::Auto, false) => ProgressKind::Plain,
            (kind, _) => kind,
        };
        Self {
            kind,
            out,
            lines: Vec::new(),
            painted: 0,
        }
    }

    /// Says what stands for `key` now; the same again says nothing.
    pub(crate) fn set(&mut self, key: &str, line: &str) {
        let line = printable(line);
        match self.lines.iter_mut().find(|(kept, _)| kept == key) {
            Some((_, kept)) if *kept == line => return,
            Some((_, kept)) => kept.clone_from(&line),
            None => self.lines.push((key.to_owned(), line.clone())),
        }
        let text = match self.kind {
            ProgressKind::None => String::new(),
            ProgressKind::Json => format!("{}\n", json!({ "subject": key, "state": line })),
            ProgressKind::Plain | ProgressKind::Auto => format!("{key}: {line}\n"),
            ProgressKind::Tty => self.painting(),
        };
        self.say(&text);
    }

    /// A sentence that stays, above lines that follow.
    pub(crate) fn note(&mut self, text: &str) {
        let text = match self.kind {
            ProgressKind::None => String::new(),
            ProgressKind::Json => format!("{}\n", json!({ "note": text })),
            ProgressKind::Plain | ProgressKind::Auto | ProgressKind::Tty => format!("{text}\n"),
        };
        self.lines.clear();
        self.painted = 0;
        self.say(&text);
    }

    fn painting(&mut self) -> String {
        let up = match self.painted {
            0 => String::new(),
            lines => format!("\x1b[{lines}A\x1b[J"),
        };
        self.painted = self.lines.len();
        let body: String = self
            .lines
            .iter()
            .map(|(key, line)| format!("{key}  {line}\n"))
            .collect();
        up + &body
    }

    fn say(&mut self, text: &str) {
        // Progress that nobody can see is no reason to stop.
        let _ = self
            .out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(kind: ProgressKind, terminal: bool) -> String {
        let mut out = Vec::new();
        let mut progress = Progress::new(kind, terminal, &mut out);
        progress.set("web.1", "pending");
        progress.set("web.1", "pending");
        progress.set("web.1", "running");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn a_state_is_said_once() {
        assert_eq!(
            shown(ProgressKind::Auto, false),
            "web.1: pending\nweb.1: running\n"
        );
        assert_eq!(
            shown(ProgressKind::Plain, true),
            "web.1: pending\nweb.1: running\n"
        );
        assert_eq!(shown(ProgressKind::None, true), "");
        assert_eq!(
            shown(ProgressKind::Auto, true),
            "web.1  pending\n\x1b[1A\x1b[Jweb.1  running\n"
        );
        assert!(shown(ProgressKind::Json, false).starts_with("{\"state\":\"pending\""));
    }
}
