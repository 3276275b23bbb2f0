//! `cluster key-ring`: new keys for what is sealed in the state, and on every manager's disk.

use bulkhead_proto::wire::{ClusterStatus, RotateKeyRingRequest};
use clap::Subcommand;

use super::status::stores;
use crate::app::App;
use crate::output::text;
use crate::refusal::{Exit, Refusal};
use crate::wait::{self, Patience};

/// What can be done with the key ring.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyRingVerb {
    /// Begins an epoch, moves every secret and the root's key to it, and forgets the one before on every manager's disk
    Rotate {
        /// Does not wait until the last old byte is gone
        #[arg(short, long)]
        detach: bool,
        #[command(flatten)]
        patience: Patience,
    },
}

pub(super) async fn run(verb: KeyRingVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let KeyRingVerb::Rotate { detach, patience } = verb;
    let mut connection = app.connect()?;
    let request = RotateKeyRingRequest {
        request_id: text::new_id().to_vec(),
    };
    let answer = connection
        .change("cluster key-ring rotate", async |mut c| {
            c.rotate_key_ring(request.clone()).await
        })
        .await?;
    app.print(&format!("{}\n", text::id(&answer.id)))?;
    if detach {
        return Ok(Exit::Done);
    }
    let mut progress = app.progress();
    let done = async {
        loop {
            let status = connection.status().await?;
            if let Some(said) = ended(&status) {
                progress.set("key ring", &said);
                return Ok(Exit::Done);
            }
            progress.set("key ring", &going(&status));
            tokio::time::sleep(wait::POLL).await;
        }
    };
    let help =
        "'bulkhead cluster status' shows how far it is; a manager that is down does its part when it is back";
    wait::bounded(patience, "cluster key-ring rotate", help, done).await
}

fn ended(status: &ClusterStatus) -> Option<String> {
    let stores_done = status.members.iter().all(|m| m.resealed >= status.reseal);
    let done = !status.stale && status.key_ring_epochs == 1 && stores_done;
    done.then(|| {
        format!(
            "{}; the last old byte is gone from every manager's disk",
            status.key_ring
        )
    })
}

fn going(status: &ClusterStatus) -> String {
    match status.key_ring_epochs {
        0 | 1 => stores(status),
        _ => format!("{} values are still under an older epoch", status.key_ring_left),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::MemberStatus;

    use super::*;

    #[test]
    fn it_ended_when_one_epoch_is_left_and_every_store_is_sealed_anew() {
        let member = |name: &str, resealed| MemberStatus {
            name: name.into(),
            resealed,
            ..Default::default()
        };
        let status = |epochs, resealed| ClusterStatus {
            key_ring: "epoch 2, opened by 2 of 2 managers".into(),
            key_ring_epochs: epochs,
            key_ring_left: 5,
            reseal: 3,
            members: vec![member("m1", 3), member("m2", resealed)],
            ..Default::default()
        };
        assert_eq!(ended(&status(2, 3)), None);
        assert_eq!(going(&status(2, 3)), "5 values are still under an older epoch");
        assert_eq!(ended(&status(1, 2)), None);
        assert!(going(&status(1, 2)).ends_with("on the disk of m2"));
        assert!(ended(&status(1, 3)).is_some_and(|said| said.contains("last old byte is gone")));
        let stale = ClusterStatus {
            stale: true,
            ..status(1, 3)
        };
        assert_eq!(ended(&stale), None);
    }
}
