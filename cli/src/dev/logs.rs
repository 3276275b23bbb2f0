//! `dev logs`: what a node's programs wrote.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::layout::{Folder, unusable};
use crate::app::App;
use crate::refusal::{Exit, Refusal, printable};

/// How often a followed file is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Bytes of a log that are looked at for its last lines.
const TAIL_BYTES: u64 = 4 << 20;
/// Bytes that are printed at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// Flags of `dev logs`.
#[derive(Debug, Args)]
pub(super) struct Logs {
    /// The node
    node: String,
    /// Goes on with what is written, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Only so many of the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<usize>,
}

pub(super) async fn run(folder: &Folder, options: Logs, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let cluster = folder.cluster()?;
    let path = folder.log(cluster.node(&options.node)?);
    let failed = |e: std::io::Error| unusable(&path, &e);
    let mut file = open(&path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    if let Some(lines) = options.tail {
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))
            .map_err(failed)?;
        let text = read(&mut file, TAIL_BYTES).map_err(failed)?;
        app.print(last_lines(&text, lines))?;
    }
    loop {
        let text = read(&mut file, CHUNK_BYTES).map_err(failed)?;
        if !text.is_empty() {
            app.print(&text)?;
            continue;
        }
        if !options.follow {
            return Ok(Exit::Done);
        }
        tokio::select! {
            biased;
            _ = tokio::signal::ctrl_c() => return Ok(Exit::Done),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn open(path: &Path) -> std::io::Result<std::fs::File> {
    std::fs::File::open(path)
}

/// What comes next, safe for a terminal.
fn read(file: &mut std::fs::File, bytes: u64) -> std::io::Result<String> {
    let mut raw = Vec::new();
    file.take(bytes).read_to_end(&mut raw)?;
    let text = String::from_utf8_lossy(&raw);
    let lines: Vec<String> = text.split('\n').map(printable).collect();
    Ok(lines.join("\n"))
}

fn last_lines(text: &str, count: usize) -> &str {
    let body = text.strip_suffix('\n').unwrap_or(text);
    let start = body
        .rmatch_indices('\n')
        .nth(count.saturating_sub(1))
        .map_or(0, |(at, _)| at + 1);
    if count == 0 { "" } else { &text[start..] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_whole() {
        for (text, count, want) in [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 1, "c"),
            ("a\n", 5, "a\n"),
            ("", 3, ""),
            ("a\nb\n", 0, ""),
        ] {
            assert_eq!(last_lines(text, count), want, "{text:?} {count}");
        }
    }
}
