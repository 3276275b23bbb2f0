//! `cluster backup`: making one, and looking at one without a cluster.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_identity::backup::{BackupError, Opener, read_header};
use bulkhead_identity::bundle::Root;
use bulkhead_identity::recovery::{RecoveryKey, fingerprint};
use bulkhead_proto::wire::{
    AuditRecord, BackupHeader, BackupManifest, CreateBackupRequest, Object, Role, object::Object as Any,
};
use bulkhead_proto::{StateDigest, limits};
use clap::Subcommand;
use prost::Message as _;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{ca, recovery_key};
use crate::app::App;
use crate::connection::{Effect, Patience};
use crate::new_file::{claim, give_up, unwritable};
use crate::output::{Format, document, text};
use crate::refusal::{Code, Exit, Refusal, from_status};

/// A manager that sends nothing more for this long has gone.
const NEXT_PART: Duration = Duration::from_secs(30);

/// What can be done with backups.
#[derive(Debug, Subcommand)]
pub(crate) enum BackupVerb {
    /// Writes the whole state of the cluster, sealed to its recovery key; nobody waits for it
    Create {
        /// The new file
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Says what a backup is; with the recovery key also what is in it
    Inspect {
        /// The backup
        file: PathBuf,
        /// The file with the recovery key; '-' reads it from stdin
        #[arg(long, value_name = "FILE")]
        recovery_key: Option<PathBuf>,
    },
    /// Reads all of a backup, and fails unless everything is there as it was written
    Verify {
        /// The backup
        file: PathBuf,
        /// The file with the recovery key; '-' reads it from stdin
        #[arg(long, value_name = "FILE")]
        recovery_key: PathBuf,
    },
}

pub(super) async fn run(verb: BackupVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        BackupVerb::Create { output } => create(&output, app).await,
        BackupVerb::Inspect { file, recovery_key } => {
            let key = match recovery_key {
                Some(path) => Some(recovery_key::read(&path, app)?),
                None => None,
            };
            let shown = match &key {
                Some(key) => whole(&file, key)?,
                None => Shown {
                    header: header(&file)?,
                    bytes: length(&file)?,
                    held: None,
                },
            };
            show(&shown, app)
        }
        BackupVerb::Verify { file, recovery_key } => {
            let key = recovery_key::read(&recovery_key, app)?;
            let shown = whole(&file, &key)?;
            app.say("every chunk opens, and the state in it is whole");
            show(&shown, app)
        }
    }
}

async fn create(path: &Path, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    let mut file = claim(path)?;
    let made = async {
        let mut parts = connection
            .call(Effect::Read, Patience::default(), "backup", async |mut c| {
                c.create_backup(CreateBackupRequest {}).await
            })
            .await?;
        let late = |_| {
            let reason = format!("the manager sent nothing for {} s", NEXT_PART.as_secs());
            Refusal::new(Code::Unreachable, "backup", reason, "try again")
        };
        while let Some(part) = timeout(NEXT_PART, parts.message())
            .await
            .map_err(late)?
            .map_err(|status| from_status(&status, "backup"))?
        {
            file.write_all(&part.data)
                .map_err(|error| unwritable(path, &error))?;
        }
        file.sync_all().map_err(|error| unwritable(path, &error))?;
        header(path)
    };
    let made: Result<BackupHeader, Refusal> = made.await;
    let header = match made {
        Ok(header) => header,
        Err(refusal) => {
            give_up(path);
            return Err(refusal);
        }
    };
    app.say("images are not in it: keep their archives, and push them again after a restore");
    app.say(&format!(
        "'bulkhead cluster backup verify {} --recovery-key FILE' reads it all",
        path.display()
    ));
    let shown = Shown {
        header,
        bytes: length(path)?,
        held: None,
    };
    show(&shown, app)
}

/// What is said of a backup.
struct Shown {
    header: BackupHeader,
    bytes: u64,
    held: Option<Held>,
}

/// What is in a backup.
#[derive(Default)]
struct Held {
    /// The root that signs, as `cluster ca status` names it.
    root: String,
    kinds: BTreeMap<&'static str, u64>,
    key_ring: Vec<u32>,
}

fn show(shown: &Shown, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let text = match app.global.format.unwrap_or(Format::Table) {
        Format::Table => people(shown),
        format => document(&machine(shown), format),
    };
    app.print(&text)?;
    Ok(Exit::Done)
}

fn people(shown: &Shown) -> String {
    let header = &shown.header;
    let mut out = String::new();
    let mut say = |key: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{key:<14}{value}");
    };
    say("cluster", text::id(&header.cluster_id));
    say("made", text::distance(header.at, text::now_ms()));
    say(
        "state",
        format!("index {} of epoch {}", header.index, header.epoch),
    );
    say("sealed to", fingerprint(&header.recovery_key));
    say("images", if header.images { "in it" } else { "not in it" }.into());
    say("program", header.program_version.clone());
    say("size", text::bytes(shown.bytes));
    if let Some(held) = &shown.held {
        let kinds = held.kinds.iter().filter(|(kind, _)| **kind != CLUSTERS);
        let counted = kinds.map(|(kind, count)| match count {
            1 => format!("1 {}", kind.trim_end_matches('s')),
            count => format!("{count} {kind}"),
        });
        say("root", held.root.clone());
        say("holds", counted.collect::<Vec<_>>().join(", "));
        let epochs = held.key_ring.iter().map(u32::to_string);
        say(
            "key ring",
            format!("epochs {}", epochs.collect::<Vec<_>>().join(", ")),
        );
    }
    out
}

fn machine(shown: &Shown) -> Value {
    let header = &shown.header;
    json!({
        "cluster_id": text::id(&header.cluster_id),
        "epoch": header.epoch,
        "index": header.index,
        "at": text::time(header.at),
        "recovery_key": fingerprint(&header.recovery_key),
        "images": header.images,
        "level": header.level,
        "program_version": header.program_version,
        "bytes": shown.bytes,
        "verified": shown.held.is_some(),
        "root": shown.held.as_ref().map(|held| held.root.clone()),
        "objects": shown.held.as_ref().map(|held| json!(held.kinds)),
        "key_ring": shown.held.as_ref().map(|held| json!(held.key_ring)),
    })
}

fn length(path: &Path) -> Result<u64, Refusal> {
    let found = std::fs::metadata(path).map_err(|error| unreadable(path, &error))?;
    Ok(found.len())
}

fn unreadable(path: &Path, error: &std::io::Error) -> Refusal {
    let place = path.display().to_string();
    Refusal::new(Code::Unreadable, place, error.to_string(), "check the path")
}

/// What a backup says of itself.
pub(super) fn header(path: &Path) -> Result<BackupHeader, Refusal> {
    let file = File::open(path).map_err(|error| unreadable(path, &error))?;
    let mut bytes = Vec::new();
    file.take(2 * limits::BACKUP_HEADER_BYTES as u64)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(path, &error))?;
    let offset = bytes.len() as u64;
    read_header(&bytes)
        .and_then(|header| header.ok_or(BackupError::Truncated { offset }))
        .map_err(|error| refused(path, &error))
}

fn refused(path: &Path, error: &BackupError) -> Refusal {
    let (code, help) = match error {
        BackupError::NotBackup | BackupError::Version => (
            Code::NotBackup,
            "name a file that 'bulkhead cluster backup create' wrote",
        ),
        BackupError::Key { .. } => (
            Code::WrongRecoveryKey,
            "name the recovery key that was in force when the backup was made",
        ),
        BackupError::Header
        | BackupError::Chunk { .. }
        | BackupError::Truncated { .. }
        | BackupError::Surplus { .. }
        | BackupError::Large => (Code::DamagedBackup, "use another copy of it, or an older backup"),
    };
    Refusal::new(code, path.display().to_string(), error.to_string(), help)
}

/// Reads all of a backup: each chunk opens, and the objects are those that the state had.
fn whole(path: &Path, key: &RecoveryKey) -> Result<Shown, Refusal> {
    let damaged = |reason: &str| {
        let help = "use another copy of it, or an older backup";
        Refusal::new(Code::DamagedBackup, path.display().to_string(), reason, help)
    };
    let mut file = File::open(path).map_err(|error| unreadable(path, &error))?;
    let mut opener = Opener::new(key);
    let mut buffer = vec![0; limits::CHUNK_BYTES];
    let mut manifest: Option<BackupManifest> = None;
    let (mut begun, mut objects) = (false, 0_u64);
    let (mut held, mut digest, mut bytes) = (Held::default(), StateDigest::default(), 0_u64);
    loop {
        let read = file.read(&mut buffer).map_err(|error| unreadable(path, &error))?;
        if read == 0 {
            break;
        }
        bytes += read as u64;
        let chunks = opener
            .push(&buffer[..read])
            .map_err(|error| refused(path, &error))?;
        for chunk in chunks {
            if manifest.is_none() {
                let mut first =
                    BackupManifest::decode(chunk.as_slice()).map_err(|_| damaged("its manifest is none"))?;
                held.key_ring = first.keys.iter().map(|key| key.epoch).collect();
                first
                    .keys
                    .iter_mut()
                    .for_each(|it| zeroize::Zeroize::zeroize(&mut it.key));
                manifest = Some(first);
                continue;
            }
            if !begun {
                begun = true; // the state's own header is for who restores it
                continue;
            }
            let mut rest = chunk.as_slice();
            while !rest.is_empty() {
                // First all objects, then the audit log.
                if manifest.as_ref().is_some_and(|it| it.objects == objects) {
                    AuditRecord::decode_length_delimited(&mut rest)
                        .map_err(|_| damaged("a record of the audit log in it does not decode"))?;
                    *held.kinds.entry("audit records").or_default() += 1;
                    continue;
                }
                objects += 1;
                let object = Object::decode_length_delimited(&mut rest)
                    .map_err(|_| damaged("an object in it does not decode"))?;
                digest.toggle(&object);
                if let Some(Any::Cluster(cluster)) = &object.object {
                    held.root = root(&cluster.root_certificate);
                }
                *held.kinds.entry(kind(&object)).or_default() += 1;
            }
        }
    }
    let header = opener.header().cloned();
    opener.finish().map_err(|error| refused(path, &error))?;
    let manifest = manifest.ok_or_else(|| damaged("its manifest is missing"))?;
    if manifest.objects != objects || manifest.digest != digest.bytes() {
        return Err(damaged(
            "the objects in it are not those of the state that it is of",
        ));
    }
    Ok(Shown {
        header: header.ok_or_else(|| damaged("its header is missing"))?,
        bytes,
        held: Some(held),
    })
}

/// The short name of a root certificate.
pub(super) fn root(der: &[u8]) -> String {
    Root::from_der(der).map_or_else(|_| "none".into(), |root| ca::root(root.key_id().as_bytes()))
}

/// Each state has one, so people need not be told.
const CLUSTERS: &str = "clusters";

/// The plural of what an object is.
fn kind(object: &Object) -> &'static str {
    match &object.object {
        Some(Any::Cluster(_)) => CLUSTERS,
        Some(Any::Node(node)) => match node.role() {
            Role::Manager => "managers",
            Role::Standby => "standbys",
            Role::Worker => "workers",
            Role::Operator => "operators",
            Role::Unspecified => "nodes",
        },
        Some(Any::Ticket(_)) => "tickets",
        Some(Any::Secret(_)) => "secrets",
        Some(Any::Image(_)) => "image records",
        Some(Any::Service(_)) => "services",
        Some(Any::Task(_)) => "tasks",
        None => "objects of a newer version",
    }
}
