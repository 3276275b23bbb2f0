//! `cluster recovery-key`: the key that opens backups. Its private half is made here and never crosses the wire but to the
//! one manager that restores.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use bulkhead_identity::recovery::{self, RECOVERY_FILE_BYTES, RecoveryKey};
use bulkhead_identity::seam::SystemEntropy;
use bulkhead_proto::wire::SetRecoveryKeyRequest;
use clap::Subcommand;
use serde_json::json;
use zeroize::Zeroizing;

use crate::app::App;
use crate::new_file::{claim, give_up, unwritable};
use crate::output::{Format, document, text};
use crate::refusal::{Code, Exit, Refusal};

/// What can be done with the recovery key.
#[derive(Debug, Subcommand)]
pub(crate) enum RecoveryKeyVerb {
    /// Makes the key, at a manager's --socket: its private half in a file of yours, its public half in the cluster
    Create {
        /// The new file; keep it away from the managers, and more than once
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Even if the cluster has one: backups that were made before open with the old one alone
        #[arg(long)]
        replace: bool,
    },
    /// Shows which key backups are sealed to
    Show,
}

pub(super) async fn run(verb: RecoveryKeyVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        RecoveryKeyVerb::Create { output, replace } => create(&output, replace, app).await,
        RecoveryKeyVerb::Show => show(app).await,
    }
}

async fn create(path: &Path, replace: bool, app: &mut App<'_>) -> Result<Exit, Refusal> {
    if app.global.socket.is_none() {
        return Err(Refusal::new(
            Code::BadField,
            "--socket",
            "who sets the recovery key can read every secret in the next backup, which no operator may",
            "set it on a manager's own machine: --socket DIR/manager.sock",
        ));
    }
    let mut connection = app.program()?;
    let mut file = claim(path)?;
    let made = async {
        let key = RecoveryKey::generate(&SystemEntropy).map_err(|error| {
            Refusal::new(
                Code::Internal,
                "recovery key",
                error.to_string(),
                "is /dev/urandom there?",
            )
        })?;
        let cluster = text::id(&connection.status().await?.cluster_id);
        let content = Zeroizing::new(format!(
            "# Recovery key {} of the Bulkhead cluster {cluster}.\n\
             # Whoever has it can read every secret in every backup: keep it away from the managers.\n{}\n",
            key.fingerprint(),
            key.to_text().as_str()
        ));
        // On the disk first: a cluster whose backups nobody can open would be worse than one without.
        file.write_all(content.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(|error| unwritable(path, &error))?;
        let request = SetRecoveryKeyRequest {
            request_id: text::new_id().to_vec(),
            public_key: key.public().to_vec(),
            replace,
        };
        connection
            .change("recovery key", async |mut c| {
                c.set_recovery_key(request.clone()).await
            })
            .await?;
        Ok(key.fingerprint())
    };
    let made: Result<String, Refusal> = made.await;
    match made {
        Ok(fingerprint) => {
            app.say(&format!(
                "the private half is in {}: copy it to a safe place, away from the managers, and more than once",
                path.display()
            ));
            app.say("next: 'bulkhead cluster backup create -o FILE'");
            app.print(&format!("{fingerprint}\n"))?;
            Ok(Exit::Done)
        }
        Err(refusal) => {
            // The cluster may have it: then this file is the only one that opens its backups.
            if refusal.code() != Code::OutcomeUnknown {
                give_up(path);
            }
            Err(refusal)
        }
    }
}

async fn show(app: &mut App<'_>) -> Result<Exit, Refusal> {
    let status = app.connect()?.status().await?;
    let Some(key) = status.recovery_key else {
        return Err(Refusal::new(
            Code::NoRecoveryKey,
            "cluster",
            "the cluster has no recovery key, so no backup can be made",
            "make one on a manager's machine: bulkhead --socket DIR/manager.sock cluster recovery-key create -o FILE",
        ));
    };
    let fingerprint = recovery::fingerprint(&key.public);
    let text = match app.global.format.unwrap_or(Format::Table) {
        Format::Table => format!(
            "{fingerprint}, in force since {}\n",
            text::distance(key.since, text::now_ms())
        ),
        format => document(
            &json!({ "fingerprint": fingerprint, "since": text::time(key.since) }),
            format,
        ),
    };
    app.print(&text)?;
    Ok(Exit::Done)
}

/// Reads the private half from its file; '-' is stdin.
pub(super) fn read(path: &Path, app: &mut App<'_>) -> Result<RecoveryKey, Refusal> {
    let stdin = path.as_os_str() == "-";
    let place = match stdin {
        true => "stdin".to_owned(),
        false => path.display().to_string(),
    };
    let unreadable = |error: std::io::Error| {
        let help = "name the file that 'bulkhead cluster recovery-key create' wrote";
        Refusal::new(Code::Unreadable, &place, error.to_string(), help)
    };
    // With room for all of it nothing is moved, and no copy stays behind unwiped.
    let mut content = Zeroizing::new(Vec::with_capacity(1 << 11));
    if stdin {
        let stdin = std::io::stdin().lock();
        stdin
            .take(RECOVERY_FILE_BYTES + 1)
            .read_to_end(&mut content)
            .map_err(unreadable)?;
    } else {
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let mode = file.metadata().map_err(unreadable)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            app.say(&format!(
                "others can read {place} (mode {mode:o}): whoever did can open every backup that is sealed to it"
            ));
        }
        file.take(RECOVERY_FILE_BYTES + 1)
            .read_to_end(&mut content)
            .map_err(unreadable)?;
    }
    // What is no text or too long is no key, and is refused as such.
    let fits = content.len() as u64 <= RECOVERY_FILE_BYTES;
    let content = match std::str::from_utf8(&content) {
        Ok(content) if fits => content,
        Ok(_) | Err(_) => "",
    };
    RecoveryKey::parse(content).map_err(|error| {
        let help = "copy the file whole; the line that begins with BULKHEAD-RECOVERY-1 is the key";
        Refusal::new(Code::BadField, place.clone(), error.to_string(), help)
    })
}
