//! The stable names of refusals, and how a command that they end exits.
//!
//! Managers and the command line share them: a manager's refusal crosses the wire as a gRPC status with its code and
//! next step in the metadata. Both are interfaces: a number or a code that was published keeps its meaning.

/// The metadata key under which a status carries its [`Code`].
pub const CODE_KEY: &str = "bulkhead-code";
/// The metadata key under which a status carries the next step, as UTF-8.
pub const HINT_KEY: &str = "bulkhead-hint-bin";

macro_rules! exits {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $meaning:literal;)*) => {
        /// How a command ended, as its exit code.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Exit { $($(#[$doc])* $name = $number,)* }

        impl Exit {
            /// Every exit code, in order.
            pub const ALL: &[Exit] = &[$(Exit::$name,)*];

            /// What the code means, as the help topic prints it.
            pub const fn meaning(self) -> &'static str {
                match self { $(Exit::$name => $meaning,)* }
            }
        }
    };
}

exits! {
    /// It was done.
    Done = 0, "done, and converged if the command waits";
    /// What no other code says.
    Failed = 1, "any other error";
    /// The command line itself is wrong.
    Usage = 2, "wrong usage";
    /// No such object, or several.
    NotFound = 3, "not found, or ambiguous";
    /// The cluster goes on; the wait is over.
    NotConverged = 4, "accepted, but not converged before the timeout";
    /// An update stopped half-way.
    Paused = 5, "update paused";
    /// An update went back by itself.
    RolledBack = 6, "update rolled back";
    /// No node can take the task as things stand.
    Unplaceable = 7, "cannot be placed: no node can ever fit as things stand";
    /// The caller may not.
    Denied = 8, "denied: authentication, authorisation or policy";
    /// The cluster cannot decide now.
    NoQuorum = 9, "no quorum, no leader, or the cluster is locked";
    /// The object changed meanwhile.
    Conflict = 10, "conflict: the object changed meanwhile";
    /// `plan --exit-code` found something to do.
    Changes = 11, "the plan found changes";
    /// Ctrl-C.
    Interrupted = 130, "interrupted; the operation goes on in the cluster";
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $exit:ident, $title:literal;)*) => {
        /// The stable name of one kind of refusal.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code { $($(#[$doc])* $name,)* }

        impl Code {
            /// Every code, in order.
            pub const ALL: &[Code] = &[$(Code::$name,)*];

            /// The code as it is printed and documented.
            pub const fn as_str(self) -> &'static str {
                match self { $(Code::$name => $number,)* }
            }

            /// The code that is printed so; `None` where this version knows none.
            pub fn parse(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|code| code.as_str() == text)
            }

            /// What happened, in a few words.
            pub const fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)* }
            }

            /// The exit code of a command that this refusal ends.
            pub const fn exit(self) -> Exit {
                match self { $(Code::$name => Exit::$exit,)* }
            }
        }
    };
}

codes! {
    /// A duration, size or number of CPUs.
    BadQuantity = "BH-E0001", Usage, "not a quantity";
    /// A name, label, port, constraint, tmpfs or variable.
    BadField = "BH-E0002", Usage, "not a valid value";
    /// More than a limit allows.
    OverLimit = "BH-E0003", Usage, "over a limit";
    /// A file could not be read.
    Unreadable = "BH-E0010", Failed, "cannot read";
    /// A file could not be written.
    Unwritable = "BH-E0011", Failed, "cannot write";
    /// `image pack` takes static programs only.
    NotStaticProgram = "BH-E0020", Failed, "not a static program";
    /// The archive or folder is no OCI layout.
    NotOciLayout = "BH-E0021", Failed, "not an OCI image layout";
    /// Content and digest or size differ.
    DamagedBlob = "BH-E0022", Failed, "content does not match its descriptor";
    /// An image that this cluster cannot run.
    UnsupportedImage = "BH-E0023", Failed, "image not supported";
    /// A layout with several images, and nothing says which.
    AmbiguousImage = "BH-E0024", NotFound, "which image is meant?";
    /// A help topic or command that does not exist.
    UnknownTopic = "BH-E0030", NotFound, "no such help topic";
    /// No context is chosen and none is named.
    NoContext = "BH-E0040", NotFound, "no cluster is selected";
    /// A context of this name is there already.
    ContextExists = "BH-E0041", Conflict, "context exists";
    /// None of the managers, or not the socket, could be reached.
    Unreachable = "BH-E0042", NoQuorum, "no manager answers";
    /// A change was sent and no answer came: it may have been made.
    OutcomeUnknown = "BH-E0043", NoQuorum, "outcome unknown";
    /// Who answered is not whom the caller has to reach.
    WrongPeer = "BH-E0044", Denied, "the other side is not who it should be";
    /// The caller is known, and may not.
    Denied = "BH-E0045", Denied, "denied";
    /// The caller's key is not listed in the cluster, or it showed none.
    UnknownCaller = "BH-E0046", Denied, "caller not known";
    /// A certificate's time is over or has not come.
    CertificateTime = "BH-E0047", Denied, "certificate outside its time";
    /// The managers cannot decide now; nothing was changed.
    NoQuorum = "BH-E0049", NoQuorum, "no quorum or no leader";
    /// The program is not a member of a cluster.
    NotMember = "BH-E0050", Failed, "not in a cluster";
    /// The program is a member already.
    AlreadyMember = "BH-E0051", Failed, "in a cluster already";
    /// This version of the other side has no such method.
    Unsupported = "BH-E0052", Failed, "not supported by the other side";
    /// Too much is under way; nothing was changed.
    Busy = "BH-E0053", NoQuorum, "too busy";
    /// No object has this name, id or prefix.
    NotFound = "BH-E0060", NotFound, "not found";
    /// Several objects have this prefix.
    Ambiguous = "BH-E0061", NotFound, "ambiguous";
    /// Another object has the name.
    NameTaken = "BH-E0062", Conflict, "name taken";
    /// The object is no longer what the request was made from.
    Conflict = "BH-E0063", Conflict, "changed meanwhile";
    /// Something still refers to the object.
    InUse = "BH-E0064", Failed, "still in use";
    /// The request refers to what is not there.
    UnknownReference = "BH-E0065", NotFound, "refers to what is not there";
    /// The managers refused the request's content.
    Invalid = "BH-E0066", Usage, "not valid";
    /// The disk under the cluster's log or image store is nearly full.
    StorageFull = "BH-E0067", Failed, "storage full";
    /// The step would take the cluster's quorum or its last way in.
    Unsafe = "BH-E0068", Failed, "would break the cluster";
    /// The changes asked for are no longer all known.
    Compacted = "BH-E0069", Failed, "history is no longer kept";
    /// The text is no ticket, or mistyped.
    BadTicket = "BH-E0080", Denied, "not a ticket";
    /// The cluster does not know the ticket, or its secret is wrong.
    TicketRefused = "BH-E0081", Denied, "ticket refused";
    /// The ticket's time is over.
    TicketExpired = "BH-E0082", Denied, "ticket expired";
    /// The ticket admitted all it could.
    TicketUsed = "BH-E0083", Denied, "ticket used up";
    /// The ticket is for another role.
    TicketRole = "BH-E0084", Denied, "ticket for another role";
    /// The root that the address offers is not the ticket's.
    RootMismatch = "BH-E0085", Denied, "wrong root certificate";
    /// The clocks are too far apart.
    ClockSkew = "BH-E0086", Failed, "clocks differ";
    /// The certificate request asks for what nobody grants, or is damaged.
    BadCertificateRequest = "BH-E0087", Denied, "certificate request refused";
    /// A step of joining failed for a reason without a code of its own.
    JoinFailed = "BH-E0088", Failed, "could not join";
    /// The address could not be listened on.
    CannotListen = "BH-E0089", Failed, "cannot listen";
    /// The program waits for its unlock key.
    Locked = "BH-E0090", Failed, "locked";
    /// The unlock key is another one, or mistyped.
    WrongUnlockKey = "BH-E0091", Denied, "wrong unlock key";
    /// A given root, or its key, cannot be the cluster's.
    BadRoot = "BH-E0092", Failed, "root refused";
    /// The root that the ticket names was rotated away.
    TicketOld = "BH-E0093", Denied, "ticket older than the root";
    /// The ticket is for a node of another name, or that name is taken.
    TicketName = "BH-E0094", Denied, "ticket for another name";
    /// An operator looked at who joins, and said no.
    JoinRejected = "BH-E0095", Denied, "join rejected by an operator";
    /// The signer outside of the cluster did not sign, or not what was asked for.
    SignerFails = "BH-E0096", Failed, "the external signer does not sign";
    /// A newer key of the node was seen in use: who has this one is a copy of it.
    SupersededKey = "BH-E0097", Denied, "superseded key";
    /// The file is no backup, or of a version that this program does not know.
    NotBackup = "BH-E0110", Failed, "not a backup";
    /// A backup was cut, changed or never finished.
    DamagedBackup = "BH-E0111", Failed, "damaged backup";
    /// The key is not the one that the backup is sealed to.
    WrongRecoveryKey = "BH-E0112", Denied, "another recovery key";
    /// The cluster has no recovery key, so nothing could be opened again.
    NoRecoveryKey = "BH-E0113", Failed, "no recovery key";
    /// The time to wait is over; the cluster goes on.
    NotConverged = "BH-E0100", NotConverged, "not converged in time";
    /// An update stopped half-way.
    UpdatePaused = "BH-E0101", Paused, "update paused";
    /// No node could ever take the task.
    Unplaceable = "BH-E0102", Unplaceable, "cannot be placed";
    /// The operator stopped waiting.
    Interrupted = "BH-E0103", Interrupted, "interrupted";
    /// The program is there and not ready to serve.
    NotReady = "BH-E0104", Failed, "not ready";
    /// A local cluster of this folder or subnet runs.
    DevRunning = "BH-E0120", Conflict, "a local cluster runs already";
    /// No local cluster runs here.
    DevAbsent = "BH-E0121", NotFound, "no local cluster";
    /// What the local cluster needs of the host is not granted.
    DevPrivilege = "BH-E0122", Denied, "not enough privilege";
    /// A program of the local cluster did not do its part.
    DevFailed = "BH-E0123", Failed, "the local cluster failed";
    /// A step that destroys needs a yes.
    NotConfirmed = "BH-E0130", Usage, "not confirmed";
    /// The audit log is not what was written.
    AuditBroken = "BH-E0140", Failed, "audit log does not verify";
    /// A defect of this program or of the cluster.
    Internal = "BH-E0150", Failed, "internal error";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_and_exit_is_documented_once() {
        let errors = include_str!("../../docs/reference/errors.md");
        for code in Code::ALL {
            let row = format!(
                "| `{}` | {} | {} |",
                code.as_str(),
                code.exit() as u8,
                code.title()
            );
            assert_eq!(errors.matches(&row).count(), 1, "{row}");
            assert_eq!(
                Code::parse(code.as_str()),
                Some(*code),
                "two kinds share a number"
            );
        }
        let exits = include_str!("../../docs/reference/exit-codes.md");
        for exit in Exit::ALL {
            let row = format!("| {} | {} |", *exit as u8, exit.meaning());
            assert_eq!(exits.matches(&row).count(), 1, "{row}");
        }
        assert_eq!(Code::parse("BH-E9999"), None);
    }
}
