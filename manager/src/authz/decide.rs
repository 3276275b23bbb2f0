//! Who may call what, as one pure decision over the caller table and what the replica knows about the caller's key.
//!
//! It runs after the TLS handshake proved the key and `identity` read the certificate; it repeats neither.

use bulkhead_proto::{Caller, Method, Standing};

/// What the replica knows about the caller's key in the lists of its (node, role).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// In the committed list.
    Listed,
    /// In no list: never admitted, or not yet seen by this replica.
    Unknown,
    /// Removed on purpose.
    Tombstoned,
    /// Its successor was in use before the connection was opened: a clone's, or put back from an old copy.
    Superseded,
}

/// Whether the replica may be trusted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaAge {
    /// See [`crate::Freshness`].
    Fresh,
    /// It may have missed a removal or an admission.
    Stale,
}

/// The answer to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The method may look at the request.
    Allowed,
    /// No replica would allow it, whatever the key.
    Denied,
    /// No replica would allow it: the key is in no list, or was removed.
    Unlisted,
    /// No replica would allow it, and the key's node has a clone.
    Clone,
    /// This replica cannot tell; another one may.
    Unavailable,
}

/// Decides about one call. A caller on the local socket has no key: the kernel vouches for it.
pub fn decide(method: Method, caller: Caller, key: KeyState, age: ReplicaAge) -> Decision {
    if !method.callers().contains(caller) {
        return Decision::Denied;
    }
    let keyless = caller == Caller::Local;
    match (method.standing(), key, age) {
        (Standing::None, _, _) => Decision::Allowed,
        (Standing::NotRemoved, KeyState::Tombstoned, _) => Decision::Unlisted,
        (Standing::NotRemoved, _, _) => Decision::Allowed,
        (Standing::Listed, _, ReplicaAge::Stale) => Decision::Unavailable,
        (Standing::ListedMaybeStale, _, _) | (Standing::Listed, _, _) if keyless => Decision::Allowed,
        // One that it calls superseded may have been certified anew meanwhile.
        (Standing::ListedMaybeStale, KeyState::Unknown | KeyState::Superseded, ReplicaAge::Stale) => {
            Decision::Unavailable
        }
        (Standing::ListedMaybeStale | Standing::Listed, KeyState::Superseded, _) => Decision::Clone,
        (Standing::ListedMaybeStale | Standing::Listed, KeyState::Listed, _) => Decision::Allowed,
        (Standing::ListedMaybeStale | Standing::Listed, _, _) => Decision::Unlisted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [KeyState; 4] = [
        KeyState::Listed,
        KeyState::Unknown,
        KeyState::Tombstoned,
        KeyState::Superseded,
    ];
    const AGES: [ReplicaAge; 2] = [ReplicaAge::Fresh, ReplicaAge::Stale];

    fn each(mut check: impl FnMut(Method, Caller, KeyState, ReplicaAge, Decision)) {
        for &method in Method::ALL {
            for caller in Caller::ALL {
                for key in KEYS {
                    for age in AGES {
                        check(method, caller, key, age, decide(method, caller, key, age));
                    }
                }
            }
        }
    }

    #[test]
    fn a_caller_outside_the_row_is_denied_whatever_its_key() {
        each(|method, caller, key, age, got| {
            if !method.callers().contains(caller) {
                assert_eq!(
                    got,
                    Decision::Denied,
                    "{} {caller} {key:?} {age:?}",
                    method.path()
                );
            }
        });
    }

    #[test]
    fn a_key_that_is_not_listed_is_never_allowed_where_a_list_decides() {
        each(|method, caller, key, age, got| {
            let listed = matches!(method.standing(), Standing::Listed | Standing::ListedMaybeStale);
            if listed && caller != Caller::Local && key != KeyState::Listed {
                assert_ne!(
                    got,
                    Decision::Allowed,
                    "{} {caller} {key:?} {age:?}",
                    method.path()
                );
            }
        });
    }

    #[test]
    fn a_stale_replica_never_decides_by_its_list() {
        each(|method, caller, key, age, got| {
            let asked = method.callers().contains(caller) && method.standing() == Standing::Listed;
            if asked && age == ReplicaAge::Stale {
                assert_eq!(got, Decision::Unavailable, "{} {caller} {key:?}", method.path());
            }
        });
    }

    #[test]
    fn raft_takes_an_unknown_manager_but_no_removed_one() {
        for age in AGES {
            let ask = |key| decide(Method::RaftAppend, Caller::Manager, key, age);
            assert_eq!(ask(KeyState::Unknown), Decision::Allowed);
            assert_eq!(ask(KeyState::Tombstoned), Decision::Unlisted);
            // Two managers that are put back from copies of different moments could else cost the quorum.
            assert_eq!(ask(KeyState::Superseded), Decision::Allowed);
        }
    }

    #[test]
    fn a_clone_is_told_from_a_stranger_by_a_fresh_replica_alone() {
        each(|method, caller, key, age, got| {
            let listed = matches!(method.standing(), Standing::Listed | Standing::ListedMaybeStale);
            let asked = method.callers().contains(caller) && listed && caller != Caller::Local;
            let known = key == KeyState::Superseded && age == ReplicaAge::Fresh;
            assert_eq!(
                got == Decision::Clone,
                asked && known,
                "{} {caller} {key:?}",
                method.path()
            );
        });
    }

    #[test]
    fn a_listed_caller_of_the_row_is_allowed_by_a_fresh_replica() {
        each(|method, caller, key, age, got| {
            let called_rightly = method.callers().contains(caller);
            let proven = key == KeyState::Listed || caller == Caller::Local;
            if called_rightly && proven && age == ReplicaAge::Fresh {
                assert_eq!(got, Decision::Allowed, "{} {caller} {key:?}", method.path());
            }
        });
    }

    #[test]
    fn status_answers_from_a_stale_replica() {
        let ask = |caller, key| decide(Method::ControlGetClusterStatus, caller, key, ReplicaAge::Stale);
        assert_eq!(ask(Caller::Operator, KeyState::Listed), Decision::Allowed);
        assert_eq!(ask(Caller::Operator, KeyState::Unknown), Decision::Unavailable);
        assert_eq!(ask(Caller::Operator, KeyState::Tombstoned), Decision::Unlisted);
        assert_eq!(ask(Caller::Local, KeyState::Unknown), Decision::Allowed);
    }
}
