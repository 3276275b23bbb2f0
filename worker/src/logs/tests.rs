use super::*;
use crate::runtime::tests::{Far, connected};
use bulkhead_launcher::log_file::LogWriter;
use bulkhead_launcher::message::{Reply, Request};
use std::os::fd::OwnedFd;
use std::path::Path;

const SMALL: u64 = 256 << 10; // two files of the least size

fn writer(folder: &Path) -> LogWriter {
    LogWriter::create(File::open(folder).expect("folder").into(), SMALL).expect("log")
}

fn open(folder: &Path) -> Vec<File> {
    let files = ["previous", "current"].map(|name| File::open(folder.join(name)));
    files.into_iter().filter_map(Result::ok).collect()
}

fn text(lines: &[Line]) -> Vec<String> {
    lines
        .iter()
        .map(|line| String::from_utf8_lossy(&line.text).into_owned())
        .collect()
}

/// Answers requests for the log files, as the launcher does.
async fn give_files(far: &Far, folder: &Path) {
    loop {
        let (envelope, _) = far.next().await;
        assert!(matches!(envelope.request, Request::Logs { .. }));
        let files: Vec<OwnedFd> = open(folder).into_iter().map(OwnedFd::from).collect();
        far.reply(envelope.id, Ok(Reply::Logs), &files);
    }
}

async fn ask(folder: &Path, query: Query) -> Vec<Line> {
    let (runtime, far, _events, _driver) = connected();
    let (to, mut from) = mpsc::channel(64);
    let task = LaunchId::try_from("web".to_owned()).expect("id");
    tokio::select! {
        sent = send(&runtime, task, query, to) => sent.expect("log"),
        () = give_files(&far, folder) => {}
    }
    let mut lines = Vec::new();
    while let Some(part) = from.recv().await {
        lines.extend(part);
    }
    lines
}

#[tokio::test]
async fn lines_are_whole_and_their_streams_apart() {
    let folder = tempfile::tempdir().expect("folder");
    let mut log = writer(folder.path());
    log.append(Stream::Output, 1_000_000, b"one\ntw");
    log.append(Stream::Error, 2_000_000, b"oh\n");
    log.append(Stream::Output, 3_000_000, b"o\nrest");
    let lines = ask(folder.path(), Query::default()).await;
    let shown: Vec<_> = lines
        .iter()
        .map(|l| (l.at_ms, l.stderr, l.text.as_slice()))
        .collect();
    assert_eq!(
        shown,
        [
            (1, false, &b"one"[..]),
            (2, true, b"oh"),
            (1, false, b"two"),
            (3, false, b"rest")
        ]
    );
}

#[tokio::test]
async fn tail_and_since_choose() {
    let folder = tempfile::tempdir().expect("folder");
    let mut log = writer(folder.path());
    for n in 1..=9u64 {
        log.append(Stream::Output, n * 1_000_000, format!("{n}\n").as_bytes());
    }
    log.finish(9_000_000);
    let cases: [(Option<u64>, i64, &[&str]); 4] = [
        (Some(2), 0, &["8", "9"]),
        (None, 8, &["8", "9"]),
        (Some(0), 0, &[]),
        (Some(9), 9, &["9"]),
    ];
    for (tail, since_ms, expected) in cases {
        let lines = ask(
            folder.path(),
            Query {
                tail,
                since_ms,
                follow: false,
            },
        )
        .await;
        assert_eq!(text(&lines), expected, "tail {tail:?} since {since_ms}");
    }
}

#[tokio::test]
async fn following_ends_with_the_task_and_crosses_files() {
    let folder = tempfile::tempdir().expect("folder");
    let mut log = writer(folder.path());
    log.append(Stream::Output, 1, b"first\n");
    let (runtime, far, _events, _driver) = connected();
    let (to, mut from) = mpsc::channel(1024);
    let task = LaunchId::try_from("web".to_owned()).expect("id");
    let query = Query {
        follow: true,
        ..Query::default()
    };
    let seen = async {
        let mut lines: Vec<Line> = from.recv().await.expect("what is there");
        // Just past one file, so that the reader must ask for the next.
        for _ in 0..5 {
            log.append(Stream::Output, 2, &[vec![b'x'; 30_000], b"\n".to_vec()].concat());
        }
        log.append(Stream::Output, 3, b"last");
        log.finish(4);
        while let Some(part) = from.recv().await {
            lines.extend(part);
        }
        lines
    };
    let (sent, lines) = tokio::select! {
        both = async { tokio::join!(send(&runtime, task, query, to), seen) } => both,
        () = give_files(&far, folder.path()) => unreachable!("it answers for ever"),
    };
    sent.expect("log");
    assert!(
        folder.path().join("previous").exists(),
        "the log went on in a second file"
    );
    let texts = text(&lines);
    assert_eq!(
        (texts.len(), texts[0].as_str(), texts[6].as_str()),
        (7, "first", "last")
    );
}

#[test]
fn a_log_that_went_round_unread_shows_the_gap() {
    let folder = tempfile::tempdir().expect("folder");
    let mut log = writer(folder.path());
    log.append(Stream::Output, 1, b"first\n");
    let mut reader = LogReader::default();
    reader.open(open(folder.path())).expect("open");
    assert_eq!(text(&reader.read().expect("read").1), ["first"]);
    let round = |log: &mut LogWriter| {
        for _ in 0..5 {
            log.append(Stream::Output, 2, &[vec![b'x'; 30_000], b"\n".to_vec()].concat());
        }
    };
    round(&mut log);
    while reader.read().expect("read").0 != Step::NextFile {} // to the end of the first file
    (0..4).for_each(|_| round(&mut log));
    reader.open(open(folder.path())).expect("open");
    let lines = text(&reader.read().expect("read").1);
    assert!(
        lines[0].contains("were overwritten"),
        "{:?}",
        &lines[0][..40.min(lines[0].len())]
    );
}

#[test]
fn a_line_without_end_is_cut() {
    let mut lines = Lines::default();
    for _ in 0..10 {
        lines.add(0, false, &vec![b'x'; MAX_RECORD_BYTES]);
    }
    assert_eq!(lines.take().len(), 10);
}

#[test]
fn what_is_no_log_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("current");
    std::fs::write(&path, [0; 64]).expect("write");
    let opened = LogReader::default().open(vec![File::open(&path).expect("open")]);
    assert!(matches!(opened, Err(LogError::Damaged(_))));
}

#[test]
fn parts_fit_a_message_and_lose_nothing() {
    let line = |n: usize| Line {
        at_ms: 0,
        stderr: false,
        text: vec![b'x'; n],
    };
    let lines: VecDeque<_> = (0..40).map(|n| line(n * 1000)).collect();
    let all: Vec<_> = parts(lines.clone()).collect();
    assert!(all.len() > 1);
    assert!(
        all.iter()
            .all(|part| part.iter().map(|l| l.text.len()).sum::<usize>() <= limits::CHUNK_BYTES)
    );
    assert_eq!(all.concat(), Vec::from(lines));
}
