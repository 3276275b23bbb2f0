//! What this node trusts follows what the cluster trusts; and a node that no manager takes any more, since its certificate
//! ended or its root was rotated away while it was off, comes back by its key.

use std::time::Duration;

use bulkhead_identity::comeback::come_back;
use bulkhead_identity::follow::{self, Due};
use bulkhead_identity::seam::Entropy;
use bulkhead_identity::tls::Expect;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::keep::Keep;
use crate::session::{Connected, Trust, chain};

/// A node without a session for this long asks the managers whether its certificate is the reason.
const ALONE: Duration = Duration::from_secs(5);
/// And asks again at most this often, once one has decided; where none could, as soon as it was alone for so long again.
const AGAIN: Duration = Duration::from_secs(15);
/// Between attempts to keep the cluster's roots: a rotation waits for this node.
const RETRY: Duration = Duration::from_secs(2);

/// Follows the cluster, for ever.
pub(crate) async fn run(
    keep: &Keep,
    mut trust: watch::Receiver<Trust>,
    mut connected: watch::Receiver<Option<Connected>>,
    entropy: &dyn Entropy,
) {
    let mut next = Instant::now();
    let mut unkept = false;
    loop {
        let alone = async {
            sleep_until(next).await;
            // Gone is the session's sender only when this program ends.
            let _ = connected.wait_for(Option::is_none).await;
            timeout(ALONE, connected.wait_for(Option::is_some)).await.is_err()
        };
        // Cancel-safe: all only say that it is time to look.
        let alone = tokio::select! {
            biased;
            changed = trust.changed() => {
                if changed.is_err() {
                    return;
                }
                false
            }
            () = sleep(RETRY), if unkept => false,
            alone = alone => alone,
        };
        if alone {
            next = match come_back_by_key(keep, entropy).await {
                Asked::Decided => Instant::now() + AGAIN,
                Asked::Undecided => Instant::now(),
            };
            continue;
        }
        let told = trust.borrow_and_update().clone();
        if follow::due(&keep.identity().current(), &told.told()) != Some(Due::Trust) {
            unkept = false;
            continue;
        }
        let kept = keep.trust(told.roots);
        unkept = kept.is_err();
        match kept {
            Ok(()) => tracing::info!(target: "audit", "this node trusts other roots now"),
            Err(error) => {
                tracing::error!(error = %chain(&error), "the cluster's roots could not be taken up")
            }
        }
    }
}

/// What came of asking every manager.
enum Asked {
    /// This node is back, or one of them said no.
    Decided,
    /// None was there that could say.
    Undecided,
}

async fn come_back_by_key(keep: &Keep, entropy: &dyn Entropy) -> Asked {
    let mut asked = Asked::Undecided;
    let _turn = keep.turn().await;
    for manager in keep.managers() {
        let current = keep.identity().current();
        match come_back(&current, &manager.address, Expect::AnyManager, entropy).await {
            Ok(credentials) => match keep.renew(credentials) {
                Ok(()) => {
                    tracing::info!(target: "audit", "this node came back by its committed key");
                    return Asked::Decided;
                }
                Err(error) => tracing::error!(error = %chain(&error), "new credentials could not be kept"),
            },
            Err(error) => {
                if !error.is_undecided() {
                    asked = Asked::Decided;
                }
                tracing::info!(manager = manager.address, error = %chain(&error), "not taken back there");
            }
        }
    }
    asked
}

#[cfg(test)]
mod tests {
    use bulkhead_identity::seam::{Clock as _, SystemClock, SystemEntropy};
    use bulkhead_identity::store::KeyFile;
    use bulkhead_identity::{Authority, Bundle, Certificate, Credentials, Key, Subject, csr};
    use bulkhead_proto::{ClusterId, NodeId, Role};

    use super::*;

    const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

    fn authority() -> Authority {
        Authority::generate(CLUSTER, now_ms() - 60_000).expect("a root")
    }

    fn now_ms() -> i64 {
        i64::try_from(SystemClock::start().wall_millis()).expect("a date")
    }

    fn credentials(authority: &Authority) -> Credentials {
        let key = Key::generate().expect("a key");
        let public = csr::public_key(&key.csr().expect("a request")).expect("our own");
        let subject = Subject {
            cluster: CLUSTER,
            node: NodeId::from_bytes([1; 16]),
            role: Role::Worker,
        };
        let der = authority
            .issue(&subject, &public, now_ms() - 60_000, now_ms() + 3_600_000)
            .expect("a certificate");
        Credentials {
            key,
            certificate: Certificate::from_der(&der).expect("our own"),
            chain: Vec::new(),
            bundle: Bundle::from_ders(vec![authority.root_der().to_vec()]).expect("our own"),
        }
    }

    /// A full disk, or a folder that cannot be written for a while: the rotation must not wait for its deadline then.
    #[tokio::test]
    async fn roots_that_could_not_be_kept_are_tried_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let (there, gone) = (folder.path().join("there"), folder.path().join("gone"));
        std::fs::create_dir(&there).expect("a folder");
        let (old, new) = (authority(), authority());
        let path = there.join("node.key");
        let file = KeyFile {
            credentials: credentials(&old).into(),
            name: "worker".into(),
            managers: Vec::new(),
            manager: None,
            lock: None,
            standby: None,
        };
        file.save(&path).expect("written");
        let keep = Keep::open(&path).expect("ours").expect("there");
        let (tell, told) = watch::channel(Trust::default());
        let (_session, connected) = watch::channel(None);
        let roots = vec![old.root_der().to_vec(), new.root_der().to_vec()];
        let mut changed = keep.identity().changed();

        std::fs::rename(&there, &gone).expect("its own");
        tell.send_replace(Trust {
            roots: roots.clone(),
            issuer: Vec::new(),
        });
        let followed = run(&keep, told, connected, &SystemEntropy);
        tokio::pin!(followed);
        tokio::select! {
            biased;
            () = &mut followed => panic!("it ended"),
            () = tokio::task::yield_now() => {} // it has tried
        }
        assert_eq!(keep.identity().current().bundle.roots().len(), 1);
        std::fs::rename(&gone, &there).expect("its own");
        tokio::select! {
            biased;
            () = &mut followed => panic!("it ended"),
            changed = timeout(10 * RETRY, changed.changed()) => changed.expect("tried again").expect("it lives"),
        }
        assert_eq!(keep.identity().current().bundle.ders(), roots);
    }
}
