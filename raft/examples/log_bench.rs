//! The log store against a plain preallocated file with one write and one flush per batch, on the same folder.
//!
//! `cargo run --release -p bulkhead-raft --example log_bench -- [--json] [FOLDER]`. Both take turns, so that what else the machine
//! does hits both. What is measured of the store is what consensus waits for: from `append` to its callback.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_identity::Unswapped;
use bulkhead_raft::encryption::{DataKey, Sealing};
use bulkhead_raft::file_system::{File, FileSystem as _, OpenMode, RealFileSystem};
use bulkhead_raft::log_store::{LogStore, Options};
use bulkhead_raft::seam::{Entropy as _, SystemEntropy};
use bulkhead_raft::{Command, Entry, TypeConfig, log_id};
use bytes::Bytes;
use openraft::EntryPayload;
use openraft::storage::{IOFlushed, RaftLogStorage as _};
use openraft::type_config::TypeConfigExt as _;

const ENTRIES: u64 = 64;
const ENTRY_BYTES: usize = 1024;
const BATCH_BYTES: usize = 64 * ENTRY_BYTES;
const FILE_BYTES: usize = 16 << 20;
const WARM_UP: usize = 300; // past the first rotation: from then on segments are recycled
const ROUNDS: usize = 3000;

#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
fn now() -> Instant {
    Instant::now()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let (options, folders): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|it| it.starts_with("--"));
    let base = folders.first().map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = base.join(format!("bulkhead-log-bench-{}", std::process::id()));
    RealFileSystem.create_directory(&folder)?;
    let result = run(&folder).await;
    std::fs::remove_dir_all(&folder)?;
    let (log, file) = result?;
    match options.iter().any(|it| it == "--json") {
        true => print_json(log, file),
        false => print(log, file),
    }
    Ok(())
}

async fn run(folder: &Path) -> io::Result<(Figures, Figures)> {
    let key = Unswapped::filled(|key| SystemEntropy.fill(key)).map_err(io::Error::other)?;
    let sealing = Sealing {
        keys: Arc::new(DataKey::new(key).into()),
        store: [1; 16],
        cluster_epoch: 1,
        member: 1,
    };
    let (fs, entropy) = (Arc::new(RealFileSystem), Arc::new(SystemEntropy));
    let (mut store, _) = LogStore::open(fs, &folder.join("log"), sealing, entropy, Options::default())
        .map_err(io::Error::other)?;
    let plain = Plain::new(&folder.join("plain"))?;

    let payload = Bytes::from(vec![0xA5; ENTRY_BYTES]);
    let (mut log, mut file) = (Vec::new(), Vec::new());
    for round in 0..WARM_UP + ROUNDS {
        let at = round as u64 * ENTRIES;
        let entries: Vec<Entry> = (at..at + ENTRIES)
            .map(|index| Entry {
                log_id: log_id(1, index),
                payload: EntryPayload::Normal(Command(payload.clone())),
            })
            .collect();
        let (sender, flushed) = TypeConfig::oneshot();
        let start = now();
        store.append(entries, IOFlushed::signal(sender)).await?;
        flushed.await.map_err(io::Error::other)??;
        log.push(start.elapsed());
        if round % 64 == 63 {
            store.purge(log_id(1, at)).await?;
        }
        let start = now();
        plain.append(round)?;
        file.push(start.elapsed());
    }
    Ok((figures(log.split_off(WARM_UP)), figures(file.split_off(WARM_UP))))
}

fn print(log: Figures, file: Figures) {
    println!("{ENTRIES} x {ENTRY_BYTES} B per batch, n={ROUNDS}      p50        p99");
    println!(
        "log store                     {:>9.1?}  {:>9.1?}",
        log.p50, log.p99
    );
    println!(
        "plain preallocated file       {:>9.1?}  {:>9.1?}",
        file.p50, file.p99
    );
    println!(
        "ratio (plain / log store)     {:>9.2}  {:>9.2}",
        file.p50.as_secs_f64() / log.p50.as_secs_f64(),
        file.p99.as_secs_f64() / log.p99.as_secs_f64()
    );
}

/// One line, for `make bench`.
fn print_json(log: Figures, file: Figures) {
    let times = |it: Figures| {
        format!(
            r#"{{"p50_ms":{:.4},"p99_ms":{:.4}}}"#,
            it.p50.as_secs_f64() * 1e3,
            it.p99.as_secs_f64() * 1e3
        )
    };
    println!(
        r#"{{"n":{ROUNDS},"entries":{ENTRIES},"entry_bytes":{ENTRY_BYTES},"log_store":{},"plain_file":{}}}"#,
        times(log),
        times(file)
    );
}

/// What a log would cost that only writes: no encryption, no checksum, no other thread.
struct Plain {
    file: Box<dyn File>,
    batch: Vec<u8>,
}

impl Plain {
    fn new(path: &Path) -> io::Result<Self> {
        let file = RealFileSystem.open(path, OpenMode::CreateNew)?;
        file.write_all_at(&vec![0; FILE_BYTES], 0)?;
        file.sync_data()?;
        let batch = vec![0x5A; BATCH_BYTES];
        Ok(Self { file, batch })
    }

    fn append(&self, round: usize) -> io::Result<()> {
        let offset = (round * BATCH_BYTES) % FILE_BYTES;
        self.file.write_all_at(&self.batch, offset as u64)?;
        self.file.sync_data()
    }
}

#[derive(Clone, Copy)]
struct Figures {
    p50: Duration,
    p99: Duration,
}

fn figures(mut times: Vec<Duration>) -> Figures {
    times.sort_unstable();
    Figures {
        p50: times[times.len() / 2],
        p99: times[times.len() * 99 / 100],
    }
}
