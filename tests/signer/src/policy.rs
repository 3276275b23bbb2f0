//! What this signer signs, and what not: a manager that somebody else controls asks as well.

use std::time::{Duration, SystemTime};

use bulkhead_identity::Authority;
use bulkhead_identity::bundle::Root;
use bulkhead_identity::order::{Order, What};
use bulkhead_proto::Role;

/// No node's certificate is valid for longer; clusters ask for 90 days unless told otherwise, and for 365 at most.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);
/// How far a certificate's start may be from this machine's time.
const AROUND_NOW: Duration = Duration::from_secs(600);

/// The decisions that are its operator's.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    /// Whether it certifies another root.
    pub(crate) allow_cross: bool,
    /// The only roles that it signs for; none: all.
    pub(crate) only: Vec<Role>,
}

impl Policy {
    /// Whether it signs this, with the key of the root that is named `root`.
    pub(crate) fn judge(
        &self,
        authority: &Authority,
        root: &str,
        order: &Order,
        now_ms: i64,
    ) -> Result<(), &'static str> {
        let own = Root::from_der(authority.root_der()).map_err(|_| "its own root is none")?;
        if root != own.key_id().to_string() {
            return Err("it holds the key of another root");
        }
        let cluster = match order.what() {
            What::Leaf { subject, .. } => subject.cluster,
            What::Cross(next) => next.cluster(),
        };
        if cluster != own.cluster() {
            return Err("its root is of another cluster");
        }
        if (order.not_before_ms() - now_ms).abs() > millis(AROUND_NOW) {
            return Err("the certificate does not begin now: check both clocks");
        }
        match order.what() {
            // Whoever has such a certificate for a key of its own signs for itself.
            What::Cross(_) if !self.allow_cross => {
                Err("it certifies no other root: start it with --allow-cross")
            }
            What::Leaf { subject, .. } if !self.only.is_empty() && !self.only.contains(&subject.role) => {
                Err("it does not sign for this role")
            }
            What::Leaf { .. } if order.not_after_ms() - now_ms > millis(LONGEST) => {
                Err("the certificate would be valid for more than 366 days")
            }
            What::Leaf { .. } | What::Cross(_) => Ok(()),
        }
    }
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// This machine's time, milliseconds since 1970.
#[expect(
    clippy::disallowed_methods,
    reason = "a program of its own: no simulation drives its clock"
)]
pub(crate) fn now_ms() -> anyhow::Result<i64> {
    Ok(millis(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?))
}

#[cfg(test)]
mod tests {
    use bulkhead_identity::csr::{self, PublicKey};
    use bulkhead_identity::{Key, Subject};
    use bulkhead_proto::{ClusterId, NodeId};

    use super::*;

    const NOW: i64 = 1_780_000_000_000;
    const DAY: i64 = 86_400_000;

    fn root(cluster: u8) -> Authority {
        Authority::generate(ClusterId::from_bytes([cluster; 16]), NOW - DAY).expect("a root")
    }

    fn own(authority: &Authority) -> Root {
        Root::from_der(authority.root_der()).expect("a root")
    }

    fn leaf(cluster: u8, role: Role, from: i64, to: i64) -> Order {
        let csr = Key::generate().expect("a key").csr().expect("a request");
        let key: PublicKey = csr::public_key(&csr).expect("our own");
        let subject = Subject {
            cluster: ClusterId::from_bytes([cluster; 16]),
            node: NodeId::from_bytes([1; 16]),
            role,
        };
        Order::with_serial([0x41; 16], What::Leaf { subject, key }, from, to)
    }

    #[test]
    fn it_signs_what_its_operator_allows_and_nothing_else() {
        let (authority, next) = (root(7), root(7));
        let id = own(&authority).key_id().to_string();
        let usual = Policy {
            allow_cross: false,
            only: Vec::new(),
        };
        let judged = |policy: &Policy, order: &Order| policy.judge(&authority, &id, order, NOW);
        let good = leaf(7, Role::Manager, NOW, NOW + 90 * DAY);
        assert_eq!(judged(&usual, &good), Ok(()));
        let cross = Order::cross(&own(&authority), &own(&next), NOW).expect("ordered");
        for (order, says) in [
            (leaf(8, Role::Worker, NOW, NOW + DAY), "another cluster"),
            (leaf(7, Role::Worker, NOW - DAY, NOW + DAY), "begin now"),
            (leaf(7, Role::Worker, NOW + DAY, NOW + 2 * DAY), "begin now"),
            (leaf(7, Role::Worker, NOW, NOW + 367 * DAY), "366 days"),
            (cross.clone(), "--allow-cross"),
        ] {
            let why = judged(&usual, &order).expect_err(says);
            assert!(why.contains(says), "{why}");
        }
        let other = own(&next).key_id().to_string();
        let why = usual
            .judge(&authority, &other, &good, NOW)
            .expect_err("another root");
        assert!(why.contains("another root"), "{why}");
        let away = Policy {
            allow_cross: true,
            only: vec![Role::Worker],
        };
        assert_eq!(judged(&away, &cross), Ok(()));
        let why = judged(&away, &good).expect_err("a manager");
        assert!(why.contains("role"), "{why}");
    }
}
