//! What must never happen in a cluster, and what must happen once all is well.

use std::fmt;

use serde::Serialize;

/// One rule. A run says of each whether it held, was broken, or was not put to the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// An acknowledged write is never lost, whatever loses power.
    AcknowledgedIsKept,
    /// What was surely refused never appears.
    RefusedNeverAppears,
    /// Replicas at one index have one state.
    OneStatePerIndex,
    /// A term has one leader.
    OneLeaderPerTerm,
    /// Of one version of an object there is one successor; a write of one's own is refused for no reason of others.
    OneSuccessor,
    /// A read sees what was acknowledged before it began.
    FreshReads,
    /// Everything that clients did with an object has an order that explains all answers.
    Linearizable,
    /// Whoever leads the newest term has applied all that was acknowledged before.
    LeadersAreComplete,
    /// While a member is replaced, no fewer vote than are to.
    VotersStay,
    /// A watch is told every change, once and in order, or to list again.
    WatchesTellAll,
    /// Consensus does not panic.
    NoPanic,
    /// A program starts again on what its disk holds after any crash.
    StartsAgain,
    /// Once all is well a write is served within ten seconds.
    ServesAgain,
    /// Once all is well the replicas come to one state.
    Converges,
    /// Managers believe each other over Raft, whichever roots they know.
    ManagersMeet,
    /// Nodes that are current, and nodes that were through when the phase began, believe each other.
    CurrentNodesMeet,
    /// The issuing root's key opens at every manager.
    RootKeyOpens,
    /// No certificate of a dropped root is committed.
    NothingOfADroppedRoot,
    /// A rotation begins, ends by its deadline, and leaves exactly the root that it was for.
    RotationEnds,
    /// Whoever was away during a rotation comes back by itself.
    EveryoneComesBack,
    /// A task runs on while nothing that it needs is struck.
    TasksRunOn,
    /// The value of a secret is in no file and in no log.
    SecretsStaySecret,
    /// When the cluster was removed, nothing of it is left.
    NothingIsLeft,
    /// What a scenario expects.
    Expected,
    /// Once all is well, what runs on the workers is what was asked for, each task with its secrets.
    WhatIsAskedForRuns,
    /// Whose key was revoked is served by no manager, not by one that is cut off either.
    NobodyRevokedIsServed,
}

impl Rule {
    /// Every rule that the simulated cluster can break.
    pub const OF_STATE: &[Rule] = &[
        Rule::AcknowledgedIsKept,
        Rule::RefusedNeverAppears,
        Rule::OneStatePerIndex,
        Rule::OneLeaderPerTerm,
        Rule::OneSuccessor,
        Rule::FreshReads,
        Rule::Linearizable,
        Rule::LeadersAreComplete,
        Rule::VotersStay,
        Rule::WatchesTellAll,
        Rule::NoPanic,
        Rule::StartsAgain,
        Rule::ServesAgain,
        Rule::Converges,
        Rule::WhatIsAskedForRuns,
    ];
    /// Every rule that whole programs in simulation can break.
    pub const OF_WIRE: &[Rule] = &[
        Rule::AcknowledgedIsKept,
        Rule::RefusedNeverAppears,
        Rule::OneStatePerIndex,
        Rule::OneLeaderPerTerm,
        Rule::FreshReads,
        Rule::Linearizable,
        Rule::NoPanic,
        Rule::StartsAgain,
        Rule::ServesAgain,
        Rule::Converges,
        Rule::WhatIsAskedForRuns,
        Rule::NobodyRevokedIsServed,
    ];
    /// Every rule that its rotations can break.
    pub const OF_ROTATION: &[Rule] = &[
        Rule::OneStatePerIndex,
        Rule::OneLeaderPerTerm,
        Rule::NoPanic,
        Rule::StartsAgain,
        Rule::ManagersMeet,
        Rule::CurrentNodesMeet,
        Rule::RootKeyOpens,
        Rule::NothingOfADroppedRoot,
        Rule::RotationEnds,
        Rule::EveryoneComesBack,
    ];
    /// Every rule that a cluster of real programs can break.
    pub const OF_PROGRAMS: &[Rule] = &[
        Rule::AcknowledgedIsKept,
        Rule::OneStatePerIndex,
        Rule::OneLeaderPerTerm,
        Rule::FreshReads,
        Rule::Linearizable,
        Rule::NoPanic,
        Rule::StartsAgain,
        Rule::ServesAgain,
        Rule::Converges,
        Rule::RotationEnds,
        Rule::TasksRunOn,
        Rule::SecretsStaySecret,
        Rule::NothingIsLeft,
        Rule::Expected,
    ];

    /// The rule in words.
    pub fn says(self) -> &'static str {
        match self {
            Self::AcknowledgedIsKept => "an acknowledged write is never lost",
            Self::RefusedNeverAppears => "what was surely refused never appears",
            Self::OneStatePerIndex => "replicas at one index have one state",
            Self::OneLeaderPerTerm => "a term has one leader",
            Self::OneSuccessor => "of one version of an object there is one successor",
            Self::FreshReads => "a read sees what was acknowledged before it began",
            Self::Linearizable => "all operations on an object have an order that explains the answers",
            Self::LeadersAreComplete => "a leader has applied all that was acknowledged before",
            Self::VotersStay => "while a member is replaced, no fewer vote than are to",
            Self::WatchesTellAll => "a watch is told every change once, or to list again",
            Self::NoPanic => "consensus does not panic",
            Self::StartsAgain => "a program starts again on what its disk holds",
            Self::ServesAgain => "once all is well a write is served within 10 s",
            Self::Converges => "once all is well the replicas come to one state",
            Self::ManagersMeet => "managers believe each other over Raft",
            Self::CurrentNodesMeet => "nodes that are current believe each other",
            Self::RootKeyOpens => "the issuing root's key opens at every manager",
            Self::NothingOfADroppedRoot => "no certificate of a dropped root is committed",
            Self::RotationEnds => "a rotation ends by its deadline, with its own root alone",
            Self::EveryoneComesBack => "whoever was away during a rotation comes back by itself",
            Self::TasksRunOn => "a task runs on while nothing that it needs is struck",
            Self::SecretsStaySecret => "a secret's value is in no file and in no log",
            Self::NothingIsLeft => "when the cluster is removed, nothing of it is left",
            Self::Expected => "what the scenario expects comes true",
            Self::WhatIsAskedForRuns => "once all is well, what was asked for is what runs",
            Self::NobodyRevokedIsServed => "whose key was revoked is served by no manager",
        }
    }
}

/// A rule that was broken, when, and how it showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Which rule.
    pub rule: Rule,
    /// Microseconds since the run began.
    pub at_us: u64,
    /// What was seen.
    pub evidence: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9} µs  {}: {}", self.at_us, self.rule.says(), self.evidence)
    }
}
