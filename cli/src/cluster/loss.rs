//! `cluster restore` and `cluster recover`: a cluster that goes on without those who could decide about it.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    EnrolResponse, Phase, Raised, RecoverRequest, RecoverResponse, RestoreOrder, RestoreRequest,
    RestoreResponse, restore_request::Message,
};
use clap::Args;
use tokio::time::{Instant, sleep, timeout};

use super::{advertise, backup, context_name, listen, new_key, recovery_key};
use crate::app::App;
use crate::connection::Connection;
use crate::health;
use crate::output::text;
use crate::refusal::{Code, Exit, Refusal, from_status};

/// The whole backup is sent and read, a store is made, and the manager elects itself.
const RESTORE: Duration = Duration::from_secs(900);
/// A preview reads the state, and nothing else.
const PREVIEW: Duration = Duration::from_secs(60);
/// A member ends, its log is read, and another begins.
const RECOVER: Duration = Duration::from_secs(180);
const LOOK: Duration = Duration::from_millis(100);

/// Flags of `cluster restore`.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The backup
    file: PathBuf,
    /// The file with the recovery key; '-' reads it from stdin
    #[arg(long, value_name = "FILE")]
    recovery_key: PathBuf,
    /// IP:PORT that this manager listens on [default: 0.0.0.0:7443]
    #[arg(long, value_name = "ADDRESS", value_parser = listen)]
    listen: Option<String>,
    /// HOST:PORT at which the others reach it; workers look for the addresses of the old managers
    #[arg(long, value_name = "ADDRESS", value_parser = advertise)]
    advertise: Option<String>,
    /// This node's name [default: the host's]
    #[arg(long)]
    name: Option<String>,
    /// Your name as an operator [default: the user's]
    #[arg(long, value_name = "NAME")]
    operator: Option<String>,
    /// Nodes and operators that must not come back, by name or whole id
    #[arg(long, value_name = "NODE")]
    forget: Vec<String>,
}

/// Flags of `cluster recover`.
#[derive(Debug, Args)]
pub(crate) struct Recover {
    /// Nodes and operators that must not come back, by name or whole id
    #[arg(long, value_name = "NODE")]
    forget: Vec<String>,
    /// Only says what it would do
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn restore(options: Restore, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let (listen, advertise) = super::addresses(options.listen.clone(), options.advertise.clone())?;
    let key = recovery_key::read(&options.recovery_key, app)?;
    // What can be seen to be wrong is said before anything is touched.
    let header = backup::header(&options.file)?;
    if header.recovery_key != key.public() {
        let reason = format!(
            "it is sealed to the recovery key {}, and this key is {}",
            bulkhead_identity::recovery::fingerprint(&header.recovery_key),
            key.fingerprint()
        );
        let help = "name the recovery key that was in force when the backup was made";
        let place = options.file.display().to_string();
        return Err(Refusal::new(Code::WrongRecoveryKey, place, reason, help));
    }
    let program = app.program()?;
    let before = health::status(&mut program.local()).await?;
    if before.phase() != Phase::Uninitialised {
        let reason = format!("the program is {}", health::phase(&before));
        let help = "restore on a manager with an empty --data folder; one that still has its store may be able to \
                    'bulkhead cluster recover'";
        return Err(Refusal::new(Code::AlreadyMember, "cluster restore", reason, help));
    }
    let context_name = context_name(app);
    let contexts = app.contexts();
    // First, so that no cluster comes to be whose new key has nowhere to stay.
    let context = contexts.create(&context_name)?;
    let (own, operator_csr) = new_key()?;
    let order = RestoreOrder {
        recovery_key: key.expose().to_vec(),
        listen,
        advertise: advertise.clone(),
        name: options.name.clone().unwrap_or_default(),
        forget: options.forget.clone(),
        operator_csr,
        operator_id: text::new_id().to_vec(),
        operator_name: options
            .operator
            .clone()
            .unwrap_or_else(|| super::operator_name(app)),
    };
    let sent = send(&program, order, &options.file).await;
    let mut answer = match sent {
        Ok(answer) => answer,
        Err(refusal) => {
            // The folder is empty as yet; what stays would only be in the way of the next try.
            let _ = contexts.remove(&context_name);
            return Err(refusal);
        }
    };
    let operator: EnrolResponse = answer.operator.take().unwrap_or_default();
    let root = operator
        .roots
        .first()
        .map_or_else(String::new, |der| backup::root(der));
    context.keep(own, &operator)?;
    contexts.select(&context_name)?;
    app.print(&format!("{}\n", text::id(&answer.node_id)))?;
    let raised = answer.raised.unwrap_or_default();
    app.say(&format!(
        "the cluster is up as it was {} (index {}); {} is its only manager",
        text::distance(header.at, text::now_ms()),
        raised.from_index,
        answer.name
    ));
    app.say(&format!(
        "your key is in the context '{context_name}', which is selected now"
    ));
    app.say(&format!(
        "its root is {root}: whoever knows the recovery key's public half can seal a file to it, so compare"
    ));
    for line in meaning(&raised) {
        app.say(&line);
    }
    app.say("images were not in the backup: push them again, or tasks that need one wait");
    say_next(app, &advertise);
    Ok(Exit::Done)
}

async fn send(
    program: &Connection,
    order: RestoreOrder,
    path: &std::path::Path,
) -> Result<RestoreResponse, Refusal> {
    let mut file = File::open(path).map_err(|error| {
        Refusal::new(
            Code::Unreadable,
            path.display().to_string(),
            error.to_string(),
            "check the path",
        )
    })?;
    // A file that cannot be read on ends the stream early, and the manager sees a backup that is cut.
    let data = std::iter::from_fn(move || {
        let mut chunk = Vec::with_capacity(limits::CHUNK_BYTES);
        let read = file
            .by_ref()
            .take(limits::CHUNK_BYTES as u64)
            .read_to_end(&mut chunk);
        (read.ok()? > 0).then_some(Message::Data(chunk))
    });
    let messages = std::iter::once(Message::Order(order)).chain(data);
    let messages = messages.map(|message| RestoreRequest {
        message: Some(message),
    });
    match timeout(RESTORE, program.local().restore(tokio_stream::iter(messages))).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(from_status(&status, "cluster restore")),
        Err(_) => {
            let reason = format!("no answer within {} s", RESTORE.as_secs());
            let help = "read the manager's log; 'bulkhead health --socket' shows its state";
            Err(Refusal::new(
                Code::OutcomeUnknown,
                "cluster restore",
                reason,
                help,
            ))
        }
    }
}

pub(super) async fn recover(options: Recover, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let program = app.program()?;
    let seen = ask(&program, &options.forget, true).await?;
    let raised = seen.raised.clone().unwrap_or_default();
    app.say(&format!(
        "the cluster {} would go on from {} alone, as of index {} and whatever else its log holds",
        text::id(&seen.cluster_id),
        seen.name,
        raised.from_index
    ));
    for line in meaning(&raised) {
        app.say(&line);
    }
    app.say(
        "what only the lost managers had committed is gone. If a majority of them can still be started, do that instead; \
         and make sure that they never run again once this is done: they would go on deciding on their own",
    );
    if options.dry_run {
        return Ok(Exit::Done);
    }
    app.confirm("Go on without the lost managers, for ever?")?;
    let begun = ask(&program, &options.forget, false).await?;
    let raised = begun.raised.unwrap_or_default();
    recovered(&program, raised.epoch).await?;
    app.print(&format!("{}\n", text::id(&begun.cluster_id)))?;
    app.say(&format!(
        "the cluster is up at epoch {}; {} is its only manager",
        raised.epoch, begun.name
    ));
    app.say(
        "next: add managers ('bulkhead cluster ticket create --role manager'), each with an empty folder;",
    );
    app.say("      a rotation of the root begins by itself: 'bulkhead cluster ca status'");
    Ok(Exit::Done)
}

async fn ask(program: &Connection, forget: &[String], dry_run: bool) -> Result<RecoverResponse, Refusal> {
    let request = RecoverRequest {
        dry_run,
        forget: forget.to_vec(),
    };
    match timeout(PREVIEW, program.local().recover(request)).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(from_status(&status, "cluster recover")),
        Err(_) => {
            let reason = format!("no answer within {} s", PREVIEW.as_secs());
            let help = "read the manager's log; 'bulkhead health --socket' shows its state";
            Err(Refusal::new(
                Code::OutcomeUnknown,
                "cluster recover",
                reason,
                help,
            ))
        }
    }
}

/// Waits until the program is a member of the new epoch, or of the old one again.
async fn recovered(program: &Connection, epoch: u64) -> Result<(), Refusal> {
    let until = Instant::now() + RECOVER;
    let help = "its log says why; 'bulkhead health --socket' shows its state";
    while Instant::now() < until {
        // It may not answer for a moment: one server ends, and another begins.
        if let Ok(status) = health::status(&mut program.local()).await
            && status.phase() == Phase::Member
        {
            match status.epoch == epoch {
                true if status.ready => return Ok(()),
                true => {}
                false => {
                    let reason = "the manager is what it was: the recovery failed";
                    return Err(Refusal::new(Code::Internal, "cluster recover", reason, help));
                }
            }
        }
        sleep(LOOK).await;
    }
    let reason = format!("the manager is not ready after {} s", RECOVER.as_secs());
    Err(Refusal::new(Code::NotReady, "cluster recover", reason, help))
}

/// What it means for the others, line by line.
fn meaning(raised: &Raised) -> Vec<String> {
    let mut lines = Vec::new();
    let now = text::now_ms();
    if !raised.managers.is_empty() {
        lines.push(format!(
            "gone for ever: the managers {}; each may join again with a ticket and an empty folder",
            raised.managers.join(", ")
        ));
    }
    if !raised.forgotten.is_empty() {
        lines.push(format!(
            "forgotten, and their keys are dead: {}",
            raised.forgotten.join(", ")
        ));
    }
    if raised.new_root {
        let workers = match raised.workers.as_slice() {
            [] => String::new(),
            workers => format!(": the workers and standbys {}", workers.join(", ")),
        };
        lines.push(format!(
            "the root is new, since its signer outside cannot know this manager: everyone joins again with a ticket{workers}"
        ));
    } else if !raised.workers.is_empty() {
        lines.push(format!(
            "come back by themselves: {}; with a key that this state does not know yet only until {}",
            raised.workers.join(", "),
            match text::time(raised.return_until) {
                serde_json::Value::String(at) => at,
                _ => text::distance(raised.return_until, now),
            }
        ));
    }
    if raised.tickets > 0 {
        lines.push(format!("void: {} tickets", raised.tickets));
    }
    lines
}

fn say_next(app: &mut App<'_>, advertise: &str) {
    app.say(&format!(
        "workers look for the old managers' addresses: one that {advertise} is not among joins again with a ticket"
    ));
    app.say("next: a rotation of the root begins by itself ('bulkhead cluster ca status'); make a backup when it is over,");
    app.say("      and add managers: 'bulkhead cluster ticket create --role manager'");
}
