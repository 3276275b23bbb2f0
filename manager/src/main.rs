//! `bulkhead-manager`: one manager of a cluster.

use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_identity::process::{self, Program};
use bulkhead_manager::program::{self, Config, Join};
use bulkhead_manager::refusal::chain;
use bulkhead_proto::Role;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Memory is wiped when it is freed: a secret passes through buffers of TLS, HTTP/2 and protobuf that no type of ours owns.
#[global_allocator]
static ALLOCATOR: zeroizing_alloc::ZeroAlloc<std::alloc::System> =
    zeroizing_alloc::ZeroAlloc(std::alloc::System);

/// A manager: replicates the cluster's state, issues certificates, schedules tasks.
///
/// It waits on its local socket until `bulkhead cluster init` or `bulkhead cluster join` tells it what to do.
#[derive(Parser)]
#[command(name = "bulkhead-manager", version)]
struct Arguments {
    /// The data folder, for this program alone; made if it is not there
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// The local socket [default: DIR/manager.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Joins as a standby: it holds nothing of the cluster until `bulkhead node promote`
    #[arg(long)]
    standby: bool,
    /// Join this cluster by itself: a manager's HOST:PORT, may be repeated
    #[arg(long, value_name = "ADDR", requires = "ticket_file")]
    join: Vec<String>,
    /// Where the ticket is, or will be
    #[arg(long, value_name = "FILE", requires = "join")]
    ticket_file: Option<PathBuf>,
    /// With --join: where to listen, IP:PORT
    #[arg(long, value_name = "ADDR", requires = "join", default_value = "")]
    listen: String,
    /// With --join: how others reach it, HOST:PORT
    #[arg(long, value_name = "ADDR", requires = "join", default_value = "")]
    advertise: String,
    /// With --join: the wished name
    #[arg(long, requires = "join", default_value = "")]
    name: String,
    /// Where the unlock key is, for a start without anybody where autolock is on [default: the systemd credential
    /// bulkhead.unlock-key, where there is one]
    #[arg(long, value_name = "FILE")]
    unlock_key_file: Option<PathBuf>,
    /// What to log, as in `info,bulkhead_raft=debug`
    #[arg(long, value_name = "FILTER", default_value = "info,openraft=warn")]
    log: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_new(&arguments.log).unwrap_or_else(|_| EnvFilter::new("info,openraft=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let started = process::harden()
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(std::fs::create_dir_all(&arguments.data)?))
        .and_then(|()| Ok(process::confine(Program::Manager)?))
        .and_then(|()| Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?));
    let runtime = match started {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bulkhead-manager: cannot start: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-manager: {}", chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

/// The unlock key that systemd hands over (systemd.exec(5), `LoadCredential=`).
fn credential() -> Option<PathBuf> {
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY")?;
    let path = PathBuf::from(folder).join("bulkhead.unlock-key");
    path.exists().then_some(path)
}

async fn run(arguments: Arguments) -> Result<(), program::ProgramError> {
    let stop = CancellationToken::new();
    let asked = stop.clone();
    let signals = tokio::spawn(async move {
        let (Ok(mut term), Ok(mut interrupt)) =
            (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        else {
            return;
        };
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        asked.cancel();
    });
    let socket = arguments
        .socket
        .unwrap_or_else(|| arguments.data.join("manager.sock"));
    let join = arguments.ticket_file.map(|ticket_file| Join {
        addresses: arguments.join,
        ticket_file,
        listen: arguments.listen,
        advertise: arguments.advertise,
        name: arguments.name,
    });
    let config = Config {
        data: arguments.data,
        socket,
        join,
        unlock_key_file: arguments.unlock_key_file.or_else(credential),
        role: match arguments.standby {
            true => Role::Standby,
            false => Role::Manager,
        },
    };
    let ended = program::run(config, stop).await;
    signals.abort();
    ended
}
