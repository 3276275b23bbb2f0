//! Waiting for the cluster to get where it was told to go: bounded, and ended by Ctrl-C without undoing anything.

use std::time::Duration;

use clap::Args;

use crate::quantity;
use crate::refusal::{Code, Exit, Refusal};

/// How often a waiting command looks. Twice as often shows nothing that a person could read.
pub(crate) const POLL: Duration = Duration::from_millis(200);

/// How long a command waits.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Patience {
    /// Stops waiting after this time; 0 waits for ever
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    pub(crate) wait_timeout: Duration,
}

fn duration(text: &str) -> Result<Duration, String> {
    quantity::duration(text).map_err(|e| e.one_line())
}

/// Waits for `done`, at most as long as the patience lasts; `help` says how to go on looking.
pub(crate) async fn bounded(
    patience: Patience,
    place: &str,
    help: &str,
    done: impl Future<Output = Result<Exit, Refusal>>,
) -> Result<Exit, Refusal> {
    let over = async {
        if patience.wait_timeout.is_zero() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(patience.wait_timeout).await;
    };
    tokio::select! {
        biased;
        end = done => end,
        _ = tokio::signal::ctrl_c() => {
            Err(Refusal::new(Code::Interrupted, place, "the operation goes on in the cluster", help))
        }
        () = over => {
            let reason = format!("it took more than {}", crate::output::text::rough(patience.wait_timeout));
            Err(Refusal::new(Code::NotConverged, place, reason, help))
        }
    }
}
