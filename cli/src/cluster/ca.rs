//! `cluster ca`: the root of the cluster and its rotation, and `cluster update`.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_identity::outside::Url;
use bulkhead_identity::pem::{self, PemError};
use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    CancelRotationRequest, ExternalSigner, GetRotationRequest, MoveSignerRequest, RotateRootRequest,
    RotationNode, RotationPhase, RotationStatus, SignerStatus, UpdateClusterRequest,
};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::lock;
use crate::app::App;
use crate::connection::Connection;
use crate::output::{Format, document, table, text};
use crate::quantity;
use crate::refusal::{Code, Exit, Refusal};
use crate::wait::{self, Patience};

/// What can be done with the root.
#[derive(Debug, Subcommand)]
pub(crate) enum CaVerb {
    /// Makes a new root, brings every node to it, and drops the old one
    Rotate(Rotate),
    /// Shows the root and how far a rotation is, node by node
    Status,
    /// Takes a rotation back, while the old root still signs: the new root and its key are gone then
    Cancel,
    /// Prints the roots that nodes trust, PEM: for a signer outside, and for other programs
    Roots,
    /// Tells the cluster that a root's external signer has another address or authority
    MoveSigner(MoveSigner),
}

/// Where an external signer is.
#[derive(Debug, Args)]
pub(crate) struct MoveSigner {
    /// Its address: https://HOST:PORT/PATH
    #[arg(long, value_name = "URL")]
    external_signer: Url,
    /// The authority of its TLS certificate, PEM: one certificate
    #[arg(long, value_name = "FILE")]
    external_signer_ca: PathBuf,
}

/// Flags of `cluster ca rotate`.
#[derive(Debug, Args)]
pub(crate) struct Rotate {
    /// How long nodes are waited for; who is later comes back by its key within 30 days
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = deadline)]
    deadline: Duration,
    /// The old root's key is known to others: nothing leads from the old root to the new one, so that who is away must
    /// join again
    #[arg(long)]
    compromised: bool,
    /// A root of your own, PEM, instead of one that the cluster makes: P-256, O=<cluster id>, valid for 366 days at least
    #[arg(long, value_name = "FILE", requires = "holder")]
    ca_cert: Option<PathBuf>,
    /// Its private key, PEM (PKCS#8, not encrypted); sealed in the cluster, and never shown again
    #[arg(long, value_name = "FILE", requires = "ca_cert", group = "holder")]
    ca_key: Option<PathBuf>,
    /// Who signs with its private key, in place of --ca-key: a signer outside of the cluster, https://HOST:PORT/PATH
    #[arg(long, value_name = "URL", requires_all = ["ca_cert", "external_signer_ca"], group = "holder")]
    external_signer: Option<Url>,
    /// The authority of the signer's TLS certificate, PEM: one certificate
    #[arg(long, value_name = "FILE", requires = "external_signer")]
    external_signer_ca: Option<PathBuf>,
    /// Does not wait until the old root is gone
    #[arg(short, long)]
    detach: bool,
    #[command(flatten)]
    patience: Patience,
}

/// Flags of `cluster update`.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Update {
    /// How long certificates of nodes are valid, from their next renewal on: 5m to 365d
    #[arg(long, value_name = "DURATION", value_parser = validity)]
    cert_expiry: Option<Duration>,
    /// Whether managers wait for an unlock key when they start again; `on` prints the key
    #[arg(long, value_name = "on|off", value_parser = switch)]
    autolock: Option<bool>,
    /// The age at which the key ring, which seals secrets and the root's key, is renewed: 1h to 3653d
    #[arg(long, value_name = "DURATION", value_parser = key_rotation)]
    key_rotation: Option<Duration>,
}

fn deadline(text: &str) -> Result<Duration, String> {
    within(text, &limits::ROTATION_DEADLINES, "10s to 30d")
}

fn validity(text: &str) -> Result<Duration, String> {
    within(text, &limits::CERTIFICATE_VALIDITIES, "5m to 365d")
}

fn key_rotation(text: &str) -> Result<Duration, String> {
    within(text, &limits::KEY_ROTATIONS, "1h to 3653d")
}

fn within(text: &str, bounds: &std::ops::RangeInclusive<Duration>, said: &str) -> Result<Duration, String> {
    let duration = quantity::duration(text).map_err(|e| e.one_line())?;
    match bounds.contains(&duration) {
        true => Ok(duration),
        false => Err(format!("from {said}")),
    }
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".to_owned()),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) async fn update(update: Update, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let request = UpdateClusterRequest {
        request_id: text::new_id().to_vec(),
        node_certificate_validity_ms: update.cert_expiry.map_or(0, millis),
        autolock: update.autolock,
        key_rotation_ms: update.key_rotation.map_or(0, millis),
    };
    let mut connection = app.connect()?;
    let answer = connection
        .change("cluster", async |mut c| c.update_cluster(request.clone()).await)
        .await?;
    app.print(&format!("{}\n", text::id(&answer.id)))?;
    match update.autolock {
        Some(true) => lock::show_new(&mut connection, app).await,
        Some(false) => lock::taken_up(&mut connection, 0, app).await,
        None => Ok(Exit::Done),
    }
}

pub(super) async fn run(verb: CaVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        CaVerb::Rotate(options) => rotate(options, app).await,
        CaVerb::Status => {
            let status = ask(&mut app.connect()?).await?;
            show(&status, app)
        }
        CaVerb::Cancel => cancel(app).await,
        CaVerb::Roots => {
            let status = app.connect()?.status().await?;
            let text: String = status.roots.iter().map(|root| pem::encode(root)).collect();
            app.print(&text)?;
            Ok(Exit::Done)
        }
        CaVerb::MoveSigner(to) => move_signer(to, app).await,
    }
}

fn signer(url: &Url, ca: &Path) -> Result<ExternalSigner, Refusal> {
    Ok(ExternalSigner {
        url: url.to_string(),
        ca: read(ca, pem::certificate)?,
    })
}

async fn move_signer(to: MoveSigner, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let request = MoveSignerRequest {
        request_id: text::new_id().to_vec(),
        external_signer: Some(signer(&to.external_signer, &to.external_signer_ca)?),
    };
    let mut connection = app.connect()?;
    connection
        .change_signed("cluster ca move-signer", async |mut c| {
            c.move_signer(request.clone()).await
        })
        .await?;
    let status = ask(&mut connection).await?;
    show(&status, app)
}

async fn cancel(app: &mut App<'_>) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    let request = CancelRotationRequest {
        request_id: text::new_id().to_vec(),
    };
    connection
        .change("cluster ca cancel", async |mut c| {
            c.cancel_rotation(request.clone()).await
        })
        .await?;
    let status = ask(&mut connection).await?;
    show(&status, app)
}

/// What `parse` finds in a file.
fn read<T>(path: &Path, parse: impl FnOnce(&[u8]) -> Result<T, PemError>) -> Result<T, Refusal> {
    let place = path.display().to_string();
    let unreadable =
        |e: std::io::Error| Refusal::new(Code::Unreadable, &place, e.to_string(), "check the path");
    let mut text = Zeroizing::new(Vec::with_capacity(limits::PEM_BYTES + 1));
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let most = u64::try_from(limits::PEM_BYTES).unwrap_or(u64::MAX);
    file.take(most + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() > limits::PEM_BYTES {
        let why = format!("a file with one certificate or key has at most {most} bytes");
        return Err(Refusal::new(
            Code::OverLimit,
            &place,
            why,
            "give the file with that alone",
        ));
    }
    parse(&text).map_err(|e| Refusal::new(Code::BadRoot, &place, e.to_string(), e.hint()))
}

async fn ask(connection: &mut Connection) -> Result<RotationStatus, Refusal> {
    connection
        .ask("cluster ca", async |mut c| {
            c.get_rotation(GetRotationRequest {}).await
        })
        .await
}

fn show(status: &RotationStatus, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let text = match app.global.format.unwrap_or(Format::Table) {
        Format::Table => people(status),
        format => document(&json(status), format),
    };
    app.print(&text)?;
    Ok(Exit::Done)
}

async fn rotate(options: Rotate, app: &mut App<'_>) -> Result<Exit, Refusal> {
    if options.compromised {
        app.confirm("Rotate without a way from the old root? Nodes that are down now must join again")?;
    }
    let root = match &options.ca_cert {
        Some(path) => read(path, pem::certificate)?,
        None => Vec::new(),
    };
    let root_key = match &options.ca_key {
        Some(path) => read(path, pem::private_key)?,
        None => Zeroizing::default(),
    };
    let external_signer = match (&options.external_signer, &options.external_signer_ca) {
        (Some(url), Some(ca)) => Some(signer(url, ca)?),
        _ => None,
    };
    let mut connection = app.connect()?;
    let request_id = text::new_id().to_vec();
    connection
        .change_signed("cluster ca rotate", async |mut c| {
            c.rotate_root(RotateRootRequest {
                request_id: request_id.clone(),
                deadline_ms: millis(options.deadline),
                compromised: options.compromised,
                root: root.clone(),
                root_key: root_key.to_vec(),
                external_signer: external_signer.clone(),
            })
            .await
        })
        .await?;
    if options.detach {
        let status = ask(&mut connection).await?;
        return show(&status, app);
    }
    let mut progress = app.progress();
    let ended = async {
        let mut next = Vec::new();
        loop {
            // As a command of its own, so that the operator's certificate follows the rotation, too.
            connection.look_again();
            let status = ask(&mut connection).await?;
            if status.phase() == RotationPhase::Unspecified {
                return match next.is_empty() || status.issuer == next {
                    true => Ok(Exit::Done),
                    false => Err(taken_back()),
                };
            }
            next.clone_from(&status.next);
            let left = text::distance(status.deadline, status.now);
            progress.set("phase", &format!("{}; the deadline is {left}", phase(&status)));
            if !status.paused.is_empty() {
                progress.set("paused", &status.paused);
            }
            for node in &status.nodes {
                progress.set(&node.name, &line(node));
            }
            tokio::time::sleep(wait::POLL).await;
        }
    };
    let help = "'bulkhead cluster ca status' shows how far it is";
    wait::bounded(options.patience, "cluster ca rotate", help, ended).await?;
    let status = ask(&mut app.connect()?).await?;
    show(&status, app)
}

fn taken_back() -> Refusal {
    Refusal::new(
        Code::Conflict,
        "cluster ca rotate",
        "the rotation was cancelled: the old root signs on",
        "'bulkhead cluster ca rotate' begins another",
    )
}

fn phase(status: &RotationStatus) -> &'static str {
    match status.phase() {
        RotationPhase::Unspecified => "no rotation is under way",
        RotationPhase::Bundle => "every node learns to trust the new root; the old one signs",
        RotationPhase::Issue => "the new root signs; every node renews its certificate",
    }
}

fn line(node: &RotationNode) -> String {
    let trusts = if node.trusts {
        "trusts the new root"
    } else {
        "trusts the old root"
    };
    let uses = if node.uses {
        "has a new certificate"
    } else {
        "has an old certificate"
    };
    match node.lags.as_str() {
        "" => format!("{trusts}, {uses}"),
        lags => format!("{trusts}, {uses}: {lags}"),
    }
}

/// How people tell roots apart: the first of the key's id.
pub(super) fn root(id: &[u8]) -> String {
    bulkhead_proto::KeyId::try_from(id).map_or_else(|_| "-".into(), |id| id.to_string()[..16].to_owned())
}

fn people(status: &RotationStatus) -> String {
    let mut out = String::new();
    let mut say = |key: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{key:<10}{value}");
    };
    say("root", format!("{} signs", root(&status.issuer)));
    say("rotation", phase(status).to_owned());
    if status.phase() != RotationPhase::Unspecified {
        say("new root", root(&status.next));
        say("deadline", text::distance(status.deadline, status.now));
    }
    if !status.paused.is_empty() {
        say("PAUSED", status.paused.clone());
    }
    for signer in &status.signers {
        say("signer", said(signer, status.now));
    }
    if status.former_until != 0 {
        let until = text::distance(status.former_until, status.now);
        say(
            "away",
            format!("a node that knows only the former root may come back by its key; that ends {until}"),
        );
    }
    if status.nodes.is_empty() {
        return out;
    }
    let mark = |yes: bool| if yes { "yes" } else { "-" }.to_owned();
    let rows: Vec<Vec<String>> = status
        .nodes
        .iter()
        .map(|node| {
            vec![
                node.name.clone(),
                text::role(node.role()).to_owned(),
                mark(node.trusts),
                mark(node.uses),
                mark(node.waited_for),
                node.lags.clone(),
            ]
        })
        .collect();
    out.push('\n');
    out.push_str(&table(
        &[
            "NODE",
            "ROLE",
            "TRUSTS NEW",
            "USES NEW",
            "WAITED FOR",
            "WHY NOT YET",
        ],
        rows.iter().map(Vec::as_slice),
    ));
    out
}

/// How an external signer fares, on one line.
pub(super) fn said(signer: &SignerStatus, now: i64) -> String {
    let of = root(&signer.root);
    let how = match (signer.failing_since, signer.worked_at) {
        (0, 0) => "was not asked yet".to_owned(),
        (0, at) => format!("signed {}", text::distance(at, now)),
        (since, _) => format!("fails, first {}: {}", text::distance(since, now), signer.reason),
    };
    format!("{} of root {of} {how}", signer.url)
}

pub(super) fn signers(signers: &[SignerStatus]) -> Value {
    let of = |signer: &SignerStatus| {
        json!({
            "root": root(&signer.root),
            "url": signer.url,
            "failing_since": time(signer.failing_since),
            "reason": (!signer.reason.is_empty()).then_some(&signer.reason),
            "worked_at": time(signer.worked_at),
        })
    };
    signers.iter().map(of).collect()
}

fn time(ms: i64) -> Value {
    if ms == 0 { Value::Null } else { text::time(ms) }
}

fn json(status: &RotationStatus) -> Value {
    let phase = match status.phase() {
        RotationPhase::Unspecified => Value::Null,
        RotationPhase::Bundle => "bundle".into(),
        RotationPhase::Issue => "issue".into(),
    };
    json!({
        "index": status.index,
        "phase": phase,
        "issuer": root(&status.issuer),
        "new_root": (!status.next.is_empty()).then(|| root(&status.next)),
        "started_at": time(status.started_at),
        "deadline": time(status.deadline),
        "former_until": time(status.former_until),
        "paused": (!status.paused.is_empty()).then_some(&status.paused),
        "signers": signers(&status.signers),
        "nodes": status.nodes.iter().map(|node| json!({
            "id": text::id(&node.node_id), "name": node.name, "role": text::role(node.role()),
            "trusts": node.trusts, "uses": node.uses, "waited_for": node.waited_for, "lags": node.lags,
        })).collect::<Vec<_>>(),
    })
}
