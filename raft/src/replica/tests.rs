use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;

use crate::file_system::SimFileSystem;
use crate::log_store::Flushing;
use crate::offline::tests::{leads, me, secret, start, store};

#[tokio::test(start_paused = true)]
async fn a_replica_is_settled_once_every_proposal_has_its_answer() {
    let mut slow = store(&SimFileSystem::new(), "/raft", 1, 1);
    slow.log.flushing = Flushing::Delayed(Arc::new(|| {
        tokio::time::sleep(Duration::from_millis(300)).boxed()
    }));
    let replica = start(&slow).await;
    replica.initialise(me()).await.expect("a cluster of one");
    leads(&replica).await;
    assert!(replica.settled(Duration::ZERO).await, "nothing was proposed");
    let proposing = replica.clone();
    let asked = tokio::spawn(async move { proposing.propose(secret(1)).await });
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(
        !replica.settled(Duration::from_millis(50)).await,
        "the disk is not through"
    );
    assert!(replica.settled(Duration::from_secs(10)).await);
    tokio::task::yield_now().await;
    assert!(asked.is_finished(), "it has its answer");
    assert!(asked.await.expect("no panic").is_ok());
}
