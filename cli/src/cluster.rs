//! `cluster`: making, joining, leaving and looking at the cluster itself.

mod backup;
mod ca;
pub(crate) mod join;
mod key_ring;
mod lock;
mod loss;
mod recovery_key;
mod status;
pub(crate) mod ticket;

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_identity::Key;
use bulkhead_proto::limits;
use bulkhead_proto::wire::{InitRequest, InitResponse, LeaveRequest, Phase, Role};
use clap::{Args, Subcommand};

use crate::app::App;
use crate::connection::Connection;
use crate::context;
use crate::health;
use crate::output::text;
use crate::refusal::{Code, Exit, Refusal, from_status};

pub(crate) use join::{Checklist, read_ticket};
pub(crate) use ticket::Ticket;

/// Making a cluster takes two keys, one commit and a listener; a slow disk is the longest of it.
const INIT: Duration = Duration::from_secs(30);
/// Leaving hands over what the node holds.
const LEAVE: Duration = Duration::from_secs(60);

/// What can be done with the cluster.
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterVerb {
    /// Makes a new cluster of the manager program behind --socket
    Init(Init),
    /// Adds the program behind --socket to a cluster
    Join(join::Join),
    /// Takes the program behind --socket out of its cluster
    Leave {
        /// Even if the cluster cannot be told, or loses its quorum
        #[arg(long)]
        force: bool,
    },
    /// Shows the cluster on one screen
    Status,
    /// Changes settings of the cluster
    Update(ca::Update),
    /// Renews the key ring, which seals secrets and the root's key
    #[command(subcommand)]
    KeyRing(key_ring::KeyRingVerb),
    /// Gives the manager program behind --socket the unlock key that it waits for
    Unlock(lock::Unlock),
    /// Shows and rotates the key that managers wait for where autolock is on
    #[command(subcommand)]
    UnlockKey(lock::UnlockKeyVerb),
    /// Shows and rotates the root of all certificates
    #[command(subcommand)]
    Ca(ca::CaVerb),
    /// Makes and shows the key that opens backups
    #[command(subcommand)]
    RecoveryKey(recovery_key::RecoveryKeyVerb),
    /// Makes backups, and looks at them without a cluster
    #[command(subcommand)]
    Backup(backup::BackupVerb),
    /// Makes the cluster of a backup again, on the empty manager behind --socket
    Restore(loss::Restore),
    /// Goes on from the manager behind --socket alone, when the quorum is lost for good
    Recover(loss::Recover),
    /// Makes, lists and revokes tickets, which let others join
    #[command(subcommand)]
    Ticket(ticket::TicketVerb),
    /// Makes a ticket for one worker or manager, as 'ticket create' does
    JoinToken {
        /// worker or manager
        #[arg(value_parser = ticket::role)]
        role: Role,
    },
}

/// Flags of `cluster init`.
#[derive(Debug, Args)]
pub(crate) struct Init {
    /// IP:PORT that this manager listens on [default: 0.0.0.0:7443]
    #[arg(long, value_name = "ADDRESS", value_parser = listen)]
    listen: Option<String>,
    /// HOST:PORT at which the others reach it; needed where --listen names no single address
    #[arg(long, value_name = "ADDRESS", value_parser = advertise)]
    advertise: Option<String>,
    /// Allows faults to be injected: for trials, never for work
    #[arg(long)]
    lab: bool,
    /// Managers wait for an unlock key when they start again; it is printed after the node's id
    #[arg(long)]
    autolock: bool,
    /// This node's name [default: the host's]
    #[arg(long)]
    name: Option<String>,
    /// Name of the first operator [default: the user's]
    #[arg(long, value_name = "NAME")]
    operator: Option<String>,
    /// Does not fail where the manager is in a cluster already; with --tickets-to it writes tickets all the same
    #[arg(long)]
    if_needed: bool,
    /// Also writes manager/ticket and worker/ticket below this folder
    #[arg(long, value_name = "FOLDER")]
    tickets_to: Option<PathBuf>,
    /// Joins that each of those tickets admits
    #[arg(long, value_name = "COUNT", default_value_t = limits::TICKET_USES, requires = "tickets_to",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::TICKET_USES_MAX)))]
    ticket_uses: u32,
}

pub(crate) async fn run(verb: ClusterVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        ClusterVerb::Init(options) => init(options, app).await,
        ClusterVerb::Join(options) => join::run(options, app).await,
        ClusterVerb::Leave { force } => leave(force, app).await,
        ClusterVerb::Status => status::run(app).await,
        ClusterVerb::Update(options) => ca::update(options, app).await,
        ClusterVerb::KeyRing(verb) => key_ring::run(verb, app).await,
        ClusterVerb::Unlock(options) => lock::unlock(options, app).await,
        ClusterVerb::UnlockKey(verb) => lock::run(verb, app).await,
        ClusterVerb::Ca(verb) => ca::run(verb, app).await,
        ClusterVerb::RecoveryKey(verb) => recovery_key::run(verb, app).await,
        ClusterVerb::Backup(verb) => backup::run(verb, app).await,
        ClusterVerb::Restore(options) => loss::restore(options, app).await,
        ClusterVerb::Recover(options) => loss::recover(options, app).await,
        ClusterVerb::Ticket(verb) => ticket::run(verb, app).await,
        ClusterVerb::JoinToken { role } => ticket::create(ticket::Create::plain(role), app).await,
    }
}

impl Init {
    /// For a trial on this machine.
    pub(crate) fn local(address: String, name: String) -> Self {
        Self {
            listen: Some(address),
            advertise: None,
            lab: true,
            autolock: false,
            name: Some(name),
            operator: None,
            if_needed: false,
            tickets_to: None,
            ticket_uses: limits::TICKET_USES,
        }
    }
}

async fn init(options: Init, app: &mut App<'_>) -> Result<Exit, Refusal> {
    if options.if_needed {
        let status = health::status(&mut app.program()?.local()).await?;
        if status.phase() == Phase::Member {
            app.say(&format!(
                "{} is in a cluster already; nothing was made",
                status.name
            ));
            return write_tickets(&options, app).await;
        }
    }
    let answer = found(&options, app).await?;
    app.print(&format!("{}\n", text::id(&answer.node_id)))?;
    if !answer.unlock_key.is_empty() {
        app.print(&format!("{}\n", answer.unlock_key))?;
        app.say(
            "keep this unlock key where no manager is: without it a manager that starts again is of no use",
        );
    }
    app.say(&format!(
        "the cluster is up; its first manager is {}",
        answer.name
    ));
    app.say(&format!(
        "your key is in the context '{}', which is selected now",
        context_name(app)
    ));
    app.say("next: 'bulkhead cluster ticket create --role worker' prints how a worker joins;");
    app.say("      'bulkhead cluster status' shows the cluster");
    write_tickets(&options, app).await
}

/// Last of all: what failed here is made up for by `--if-needed`.
async fn write_tickets(options: &Init, app: &App<'_>) -> Result<Exit, Refusal> {
    if let Some(folder) = &options.tickets_to {
        // A connection of its own: one that was made before the cluster knows no more than how to make one.
        ticket::write_files(&mut app.program()?, folder, options.ticket_uses).await?;
    }
    Ok(Exit::Done)
}

/// The name of an operator who says none.
fn operator_name(app: &App<'_>) -> String {
    match app.environment.user.as_str() {
        "" => "operator".to_owned(),
        user => user.to_owned(),
    }
}

/// The context that a new cluster gets.
fn context_name(app: &App<'_>) -> String {
    app.global
        .context
        .clone()
        .unwrap_or_else(|| context::DEFAULT.into())
}

/// Makes a cluster of the program behind the socket, and a context that is selected.
pub(crate) async fn found(options: &Init, app: &mut App<'_>) -> Result<InitResponse, Refusal> {
    let (listen, advertise) = addresses(options.listen.clone(), options.advertise.clone())?;
    let mut program = app.program()?;
    let before = health::status(&mut program.local()).await?;
    if before.phase() != Phase::Uninitialised {
        let reason = format!("the program is {}", health::phase(&before));
        let help = "a program is of one cluster for ever; start another with an empty --data folder";
        return Err(Refusal::new(Code::AlreadyMember, "cluster init", reason, help));
    }
    let context_name = context_name(app);
    let contexts = app.contexts();
    // First, so that no cluster comes to be whose only key has nowhere to stay.
    let context = contexts.create(&context_name)?;
    let made = first_operator(options, listen, advertise, &mut program, app).await;
    let (key, mut answer) = match made {
        Ok(made) => made,
        Err(refusal) => {
            // The folder is empty as yet; what stays would only be in the way of the next try.
            let _ = contexts.remove(&context_name);
            return Err(refusal);
        }
    };
    context.keep(key, &answer.operator.take().unwrap_or_default())?;
    contexts.select(&context_name)?;
    Ok(answer)
}

async fn first_operator(
    options: &Init,
    listen: String,
    advertise: String,
    program: &mut Connection,
    app: &App<'_>,
) -> Result<(Key, InitResponse), Refusal> {
    let (key, operator_csr) = new_key()?;
    let request = InitRequest {
        listen,
        advertise,
        lab: options.lab,
        autolock: options.autolock,
        operator_csr,
        operator_id: text::new_id().to_vec(),
        operator_name: options.operator.clone().unwrap_or_else(|| operator_name(app)),
        name: options.name.clone().unwrap_or_default(),
    };
    match tokio::time::timeout(INIT, program.local().init(request)).await {
        Ok(Ok(answer)) => Ok((key, answer.into_inner())),
        Ok(Err(status)) => Err(from_status(&status, "cluster init")),
        Err(_) => {
            let reason = format!("no answer within {} s", INIT.as_secs());
            let help = "read the manager's log; 'bulkhead health --socket' shows its state";
            Err(Refusal::new(Code::OutcomeUnknown, "cluster init", reason, help))
        }
    }
}

/// A fresh key and the request for its certificate.
pub(crate) fn new_key() -> Result<(Key, Vec<u8>), Refusal> {
    let refuse = |reason: String| Refusal::new(Code::Internal, "key", reason, "is /dev/urandom there?");
    let key = Key::generate().map_err(|e| refuse(e.to_string()))?;
    let csr = key.csr().map_err(|e| refuse(e.to_string()))?;
    Ok((key, csr))
}

async fn leave(force: bool, app: &mut App<'_>) -> Result<Exit, Refusal> {
    app.confirm("Take this node out of its cluster for ever?")?;
    let program = app.program()?;
    match tokio::time::timeout(LEAVE, program.local().leave(LeaveRequest { force })).await {
        Ok(Ok(answer)) => {
            let answer = answer.into_inner();
            app.say(&match answer.told {
                true => format!("{} has left the cluster, which lists it no more", answer.name),
                false => format!(
                    "{name} has left, but the cluster was not told: run 'bulkhead node rm {name}' there",
                    name = answer.name
                ),
            });
            Ok(Exit::Done)
        }
        Ok(Err(status)) => Err(from_status(&status, "cluster leave")),
        Err(_) => {
            let reason = format!("no answer within {} s", LEAVE.as_secs());
            let help = "'bulkhead node ls' shows whether it left";
            Err(Refusal::new(Code::OutcomeUnknown, "cluster leave", reason, help))
        }
    }
}

/// Checks IP:PORT to listen on.
pub(crate) fn listen(text: &str) -> Result<String, String> {
    match text.parse::<std::net::SocketAddr>() {
        Ok(address) => Ok(address.to_string()),
        Err(_) => Err(format!("write IP:PORT, like 0.0.0.0:{}", limits::MANAGER_PORT)),
    }
}

/// Checks HOST:PORT; without a port it is a manager's usual one.
pub(crate) fn advertise(text: &str) -> Result<String, String> {
    let complaint = || format!("write HOST:PORT, like manager-1.example:{}", limits::MANAGER_PORT);
    if let Ok(ip) = text.parse::<std::net::IpAddr>() {
        return Ok(std::net::SocketAddr::new(ip, limits::MANAGER_PORT).to_string());
    }
    if text.parse::<std::net::SocketAddr>().is_ok() {
        return Ok(text.to_owned());
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, port.parse::<u16>().map_err(|_| complaint())?),
        None => (text, limits::MANAGER_PORT),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    if host.is_empty() || host.len() > 253 || port == 0 || !host.chars().all(plain) {
        return Err(complaint());
    }
    Ok(format!("{host}:{port}"))
}

/// Where to listen, and what to tell the others. An address that means "all" tells nobody anything.
pub(crate) fn addresses(
    listen: Option<String>,
    advertise: Option<String>,
) -> Result<(String, String), Refusal> {
    let listen = listen.unwrap_or_else(|| format!("0.0.0.0:{}", limits::MANAGER_PORT));
    if let Some(advertise) = advertise {
        return Ok((listen, advertise));
    }
    let all = listen
        .parse::<std::net::SocketAddr>()
        .is_ok_and(|address| address.ip().is_unspecified());
    if all {
        let reason = format!("it listens on {listen}, which is no address that others can reach");
        let help = "say it: --advertise HOST:PORT; 'ip address' lists this machine's";
        return Err(Refusal::new(Code::BadField, "--advertise", reason, help));
    }
    Ok((listen.clone(), listen))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_complete_or_refused() {
        for (text, want) in [
            ("10.0.0.1", Some("10.0.0.1:7443")),
            ("10.0.0.1:99", Some("10.0.0.1:99")),
            ("manager-1", Some("manager-1:7443")),
            ("[::1]:5", Some("[::1]:5")),
            ("a:0", None),
            ("a:b", None),
            ("", None),
            ("a b:1", None),
        ] {
            assert_eq!(advertise(text).ok().as_deref(), want, "{text}");
        }
        assert!(listen("localhost:1").is_err() && listen("127.0.0.1:1").is_ok());
    }

    #[test]
    fn listening_everywhere_needs_an_address_to_tell() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(addresses(None, None).map_err(|e| e.code()), Err(Code::BadField));
        assert_eq!(
            addresses(some("10.0.0.1:1"), None),
            Ok(("10.0.0.1:1".into(), "10.0.0.1:1".into()))
        );
        assert_eq!(
            addresses(None, some("a:1")),
            Ok(("0.0.0.0:7443".into(), "a:1".into()))
        );
    }
}
