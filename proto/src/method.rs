//! Who may call what: one exhaustive table. A method without a row does not build.

include!(concat!(env!("OUT_DIR"), "/methods.rs"));

use std::fmt;

/// What a caller proved to be before a method looks at its request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Caller {
    /// No client certificate and nothing else. A ticket is part of a request, so its holder starts here too.
    Anonymous,
    /// A listed worker.
    Worker,
    /// A listed manager.
    Manager,
    /// A listed operator.
    Operator,
    /// A listed standby.
    Standby,
    /// Root or the program's own user, on the local socket.
    Local,
}

impl Caller {
    /// Every class of callers.
    pub const ALL: [Caller; 6] = [
        Caller::Anonymous,
        Caller::Worker,
        Caller::Manager,
        Caller::Operator,
        Caller::Standby,
        Caller::Local,
    ];

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Caller::Anonymous => "anonymous",
            Caller::Worker => "worker",
            Caller::Manager => "manager",
            Caller::Operator => "operator",
            Caller::Standby => "standby",
            Caller::Local => "local",
        })
    }
}

/// A set of caller classes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Callers(u8);

impl Callers {
    const fn of(callers: &[Caller]) -> Self {
        let mut bits = 0;
        let mut at = 0;
        while at < callers.len() {
            bits |= callers[at].bit();
            at += 1;
        }
        Self(bits)
    }

    /// Whether this class may call.
    pub const fn contains(self, caller: Caller) -> bool {
        self.0 & caller.bit() != 0
    }
}

/// Which key list decides about a caller, besides its role.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// A valid manager chain that is not tombstoned: a learner starts with an empty list, so a positive one would
    /// shut it out for ever.
    NotRemoved,
    /// The caller's key is in the committed list of its (node, role), judged by a fresh replica.
    Listed,
    /// As [`Standing::Listed`], but a stale replica answers too and says that it is stale.
    ListedMaybeStale,
    /// Nothing to look up.
    None,
}

const JOINERS: Callers = Callers::of(&[
    Caller::Anonymous,
    Caller::Worker,
    Caller::Manager,
    Caller::Operator,
    Caller::Standby,
]);
const STANDBYS: Callers = Callers::of(&[Caller::Standby]);
const WORKERS: Callers = Callers::of(&[Caller::Worker]);
const LEAVERS: Callers = Callers::of(&[Caller::Worker, Caller::Standby]);
const CERTIFIED: Callers = Callers::of(&[Caller::Worker, Caller::Manager, Caller::Operator, Caller::Standby]);
const MANAGERS: Callers = Callers::of(&[Caller::Manager]);
const OPERATORS: Callers = Callers::of(&[Caller::Operator, Caller::Local]);
const LOCAL: Callers = Callers::of(&[Caller::Local]);

impl Method {
    /// The method of an HTTP/2 path; nothing for a path that is not ours.
    pub fn from_path(path: &str) -> Option<Method> {
        Method::ALL.iter().copied().find(|method| method.path() == path)
    }

    /// Who may call it.
    pub const fn callers(self) -> Callers {
        self.row().0
    }

    /// Which list the caller's key is held against.
    pub const fn standing(self) -> Standing {
        self.row().1
    }

    /// Whether its answer shows everything that was committed before the call, whichever manager is asked. Such an answer
    /// takes a question to a quorum, and is refused without one.
    pub const fn sees_latest(self) -> bool {
        matches!(
            self,
            Method::ControlGetRotation
                | Method::ControlGetUnlockKey
                | Method::ControlCreateBackup
                | Method::ControlListNodes
                | Method::ControlListTickets
                | Method::ControlListOperators
                | Method::ControlListSecrets
                | Method::ControlGetExposure
                | Method::ControlListServices
                | Method::ControlListTasks
                | Method::ControlExplain
                | Method::ControlListImages
                | Method::ControlLogs
                | Method::ControlWatch
                | Method::ControlListAudit
        )
    }

    /// The table.
    const fn row(self) -> (Callers, Standing) {
        match self {
            Method::EnrolmentGetRoot | Method::EnrolmentEnrol | Method::EnrolmentReturn => {
                (JOINERS, Standing::None)
            }

            Method::DispatcherSession | Method::DispatcherFetchBlob | Method::DispatcherPushLogs => {
                (WORKERS, Standing::Listed)
            }
            Method::DispatcherWithdraw => (LEAVERS, Standing::Listed),
            Method::DispatcherAttend => (STANDBYS, Standing::Listed),
            Method::DispatcherRenew => (CERTIFIED, Standing::Listed),

            Method::RaftAppend
            | Method::RaftVote
            | Method::RaftPreVote
            | Method::RaftInstallSnapshot
            | Method::RaftTransferLeader => (MANAGERS, Standing::NotRemoved),

            Method::PeerForward
            | Method::PeerReadIndex
            | Method::PeerReportLiveness
            | Method::PeerRegisterEnvelopeKey
            | Method::PeerJoinRaft
            | Method::PeerLeaveRaft
            | Method::PeerTakeBack
            | Method::PeerHasBlob
            | Method::PeerPullBlob
            | Method::PeerOfferBlob
            | Method::PeerRelayLogs => (MANAGERS, Standing::Listed),

            // Who holds the recovery key can read every secret in the next backup, which no operator may.
            Method::ControlSetRecoveryKey => (LOCAL, Standing::Listed),

            Method::ControlGetClusterStatus => (OPERATORS, Standing::ListedMaybeStale),

            Method::ControlUpdateCluster
            | Method::ControlRotateRoot
            | Method::ControlGetRotation
            | Method::ControlGetUnlockKey
            | Method::ControlRotateUnlockKey
            | Method::ControlConfirmUnlockKey
            | Method::ControlRotateKeyRing
            | Method::ControlCancelRotation
            | Method::ControlMoveSigner
            | Method::ControlCreateBackup
            | Method::ControlListNodes
            | Method::ControlUpdateNode
            | Method::ControlRemoveNode
            | Method::ControlQuarantineNode
            | Method::ControlApproveNode
            | Method::ControlPromoteNode
            | Method::ControlDemoteNode
            | Method::ControlRejectNode
            | Method::ControlCreateTicket
            | Method::ControlListTickets
            | Method::ControlRevokeTicket
            | Method::ControlRevokeAllTickets
            | Method::ControlIssueOperator
            | Method::ControlListOperators
            | Method::ControlRevokeOperator
            | Method::ControlCreateSecret
            | Method::ControlListSecrets
            | Method::ControlRemoveSecret
            | Method::ControlGetExposure
            | Method::ControlCreateService
            | Method::ControlUpdateService
            | Method::ControlListServices
            | Method::ControlRemoveService
            | Method::ControlListTasks
            | Method::ControlExplain
            | Method::ControlPushBlob
            | Method::ControlCreateImage
            | Method::ControlListImages
            | Method::ControlRemoveImage
            | Method::ControlLogs
            | Method::ControlWatch
            | Method::ControlListAudit => (OPERATORS, Standing::Listed),

            Method::LocalGetStatus
            | Method::LocalInit
            | Method::LocalJoin
            | Method::LocalLeave
            | Method::LocalUnlock
            | Method::LocalRestore
            | Method::LocalRecover => (LOCAL, Standing::None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    #[test]
    fn every_described_method_has_a_row_under_its_own_path() {
        let set =
            prost_types::FileDescriptorSet::decode(crate::wire::DESCRIPTORS).expect("compiled at build time");
        let mut described = 0;
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let found = Method::from_path(&path).unwrap_or_else(|| panic!("{path} has no variant"));
                    assert_eq!(found.path(), path);
                    described += 1;
                }
            }
        }
        assert_eq!(described, Method::ALL.len());
    }

    #[test]
    fn no_worker_reaches_raft_peers_or_control() {
        for &method in Method::ALL {
            let path = method.path();
            let managers_only = ["/bulkhead.v1.Raft/", "/bulkhead.v1.Peer/"]
                .iter()
                .any(|p| path.starts_with(p));
            for caller in Caller::ALL {
                if managers_only {
                    assert_eq!(
                        method.callers().contains(caller),
                        caller == Caller::Manager,
                        "{path} {caller}"
                    );
                }
                if path.starts_with("/bulkhead.v1.Control/") {
                    let may = match method {
                        Method::ControlSetRecoveryKey => caller == Caller::Local,
                        _ => matches!(caller, Caller::Operator | Caller::Local),
                    };
                    assert_eq!(method.callers().contains(caller), may, "{path} {caller}");
                }
            }
        }
    }

    #[test]
    fn a_standby_only_renews_returns_leaves_and_hears_that_it_is_promoted() {
        let may: Vec<_> = Method::ALL
            .iter()
            .filter(|m| m.callers().contains(Caller::Standby) && !m.callers().contains(Caller::Anonymous))
            .collect();
        let own = [
            &Method::DispatcherAttend,
            &Method::DispatcherRenew,
            &Method::DispatcherWithdraw,
        ];
        assert_eq!(may, own);
    }

    #[test]
    fn what_an_operator_reads_is_the_latest_but_for_the_status_that_says_how_old_it_is() {
        let reads = ["Get", "List", "Explain", "Logs", "Watch", "CreateBackup"];
        for &method in Method::ALL {
            let called = method.path().strip_prefix("/bulkhead.v1.Control/");
            let reads = called.is_some_and(|it| reads.iter().any(|read| it.starts_with(read)));
            let may_be_old = method == Method::ControlGetClusterStatus;
            assert_eq!(method.sees_latest(), reads && !may_be_old, "{}", method.path());
        }
    }

    #[test]
    fn only_enrolment_is_open_to_anyone() {
        let open: Vec<_> = Method::ALL
            .iter()
            .filter(|m| m.callers().contains(Caller::Anonymous))
            .collect();
        assert_eq!(
            open,
            [
                &Method::EnrolmentGetRoot,
                &Method::EnrolmentEnrol,
                &Method::EnrolmentReturn
            ]
        );
    }
}
