//! `bulkhead-worker`: runs what a cluster gives to this node. Started by `bulkhead-launcher`, without privileges.

use bulkhead_identity::process::{self, Program};
use bulkhead_launcher::connection::Connection;
use bulkhead_worker::config::Config;
use bulkhead_worker::program;
use clap::Parser;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Memory is wiped when it is freed: a secret passes through buffers of TLS, HTTP/2 and protobuf that no type of ours owns.
#[global_allocator]
static ALLOCATOR: zeroizing_alloc::ZeroAlloc<std::alloc::System> =
    zeroizing_alloc::ZeroAlloc(std::alloc::System);

/// Two: one for streams and the agent, one for the published ports beside it.
const THREADS: usize = 2;

fn main() -> ExitCode {
    // Before anything is opened: nothing else may have the launcher's descriptor.
    let launcher = bulkhead_launcher::take_channel();
    let config = Config::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .init();
    let ended = process::harden()
        .and_then(|()| process::confine(Program::Worker))
        .map_err(anyhow::Error::from)
        .and_then(|()| {
            let launcher =
                launcher.ok_or_else(|| anyhow::anyhow!("only bulkhead-launcher can start this"))?;
            run(config, Connection::from_descriptor(launcher)?)
        });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("ending: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config, launcher: Connection) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async {
            tokio::select! {
                biased;
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        Ok(Box::pin(program::run(config, launcher, stop)).await?)
    })
}
