//! Bugs that can be switched on, one at a time, to test the tests: a campaign that does not find them proves nothing.
//!
//! They are compiled in with the feature `planted` alone, which no release build may have.

#[cfg(all(feature = "planted", not(debug_assertions)))]
compile_error!("the feature `planted` breaks the product on purpose: it is for debug builds alone");

/// A bug: one that was found in some replicated store, or that would be here with one line less. Where somebody published it, a
/// line says who did: "as" means that what goes wrong, and why, is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Bug {
    /// A log entry is acknowledged before it is on the disk: as etcd#14370.
    AcknowledgesBeforeFlush = 1,
    /// The log is written and not flushed: as nats-server#7564, which Jepsen reported.
    SkipsFlush,
    /// A vote is kept in memory alone.
    ForgetsVote,
    /// A truncation of the log is kept in memory alone.
    ForgetsTruncation,
    /// A failed flush is taken for a good one.
    IgnoresFailedFlush,
    /// A snapshot takes the old one's place before it is flushed: as hashicorp/raft#229.
    SnapshotBeforeFlush,
    /// The folder is not flushed after a snapshot took the old one's place: as etcd#22314.
    SkipsFolderFlush,
    /// A snapshot from the leader is used and not saved.
    SkipsSavingSnapshot,
    /// A snapshot is not loaded at the start.
    SkipsLoadingSnapshot,
    /// The leader answers a read by its own commit index, without asking a quorum: as etcd#741, which Jepsen reported.
    ReadsWithoutQuorum,
    /// A read is answered by an index that is too old.
    ReadsTooOld,
    /// A version in a precondition is not compared.
    IgnoresPrecondition,
    /// A request that is sent again is done again: as jetcd#1444, after a report of Jepsen's.
    RepeatsRequest,
    /// What a transaction does depends on who applies it.
    AppliesDifferently,
    /// An entry is skipped now and then.
    SkipsEntry,
    /// A write that was made is called refused.
    CallsMadeRefused,
    /// A write of unknown outcome is called made.
    CallsUnknownMade,
    /// A machine that is lost with its disk comes back as the same member, with an empty log: as rethinkdb#5289. In
    /// simulations of the store alone it is the simulation that gives ids, as the state does otherwise.
    ReusesMemberId,
    /// The first entry after a start is not applied.
    SkipsFirstAfterStart,
    /// The log lets go of entries that no snapshot holds.
    PurgesAboveSnapshot,
    /// On the disk one entry more is kept than was to be.
    TruncatesOneTooFew,
    /// What was cut off stays among the newest entries in memory: as cockroach#63302.
    KeepsTruncatedInCache,
    /// A snapshot names the members of the one before it.
    SavesOldMembers,
    /// A snapshot says that it covers more than is in it, so that entries are skipped after a start: as etcd#13766.
    SavesOldState,
    /// After a start whatever is in the log is taken for committed: as goraft#69.
    TakesLogForCommitted,
    /// A voter does not compare the candidate's log with its own: as jgroups-raft#14.
    VotesForStaleLog,
    /// A candidate takes each answer for a vote: as jgroups-raft#65.
    CountsRefusedVotes,
    /// Who does not lead answers a read by its own state.
    ReadsAtFollower,
    /// A read does not wait until the state is as new as it has to be.
    ReadsBeforeApplied,
    /// A leader serves before it applied what former ones acknowledged: as redisraft#316.
    LeadsBeforeApplied,
    /// A write that the state refused is called made.
    CallsRefusedMade,
    /// A write of unknown outcome is called refused.
    CallsUnknownRefused,
    /// The answer to a write names the index before its own.
    AnswersEarlierIndex,
    /// A new version of an object has the number of the former one.
    KeepsVersion,
    /// A frame of the log is marked as acknowledged before it is written.
    MarksBeforeFlush,
    /// The folder is not flushed after a segment of the log got its name: as etcd#6368.
    SkipsSegmentFolderFlush,
    /// What a power loss left half written at the log's end is taken for damage: as etcd#5230.
    CallsTornTailDamage,
    /// A watch that fell too far behind is not told so: as etcd#17529.
    WatchLosesEvent,
    /// A watch from just below where the changes are known lacks the first one: as etcd#18089.
    WatchSkipsFirst,
    /// After a snapshot from the leader a watch goes on, without what happened in between.
    WatchSkipsSnapshot,
    /// A watch that resumes is told the last change again.
    WatchRepeatsEvent,
    /// A voter is removed before the one in its place votes.
    RemovesBeforeAdding,
    /// A rotation of the root waits for nobody.
    RotationWaitsForNobody,
    /// It goes on at its deadline even without a majority of the managers.
    RotationNeedsNoMajority,
    /// It waits for a node that does nothing for ever: as moby#45027.
    RotationHasNoDeadline,
    /// When it ended, nothing leads from the old root to the new one.
    RotationForgetsFormerRoot,
    /// It ends with the old root's key.
    RotationKeepsOldKey,
    /// Nodes are not told to trust the new root before it signs.
    RotationTellsNobody,
    /// A certificate comes without the one that leads to it from the old root.
    CertificateWithoutCross,
    /// Managers do not meet by a former root.
    ForgetsFormerRoot,
    /// A worker's reports are acknowledged and not committed.
    AcknowledgesLostReports,
}

impl Bug {
    /// All of them.
    pub const ALL: &[Bug] = &[
        Bug::AcknowledgesBeforeFlush,
        Bug::SkipsFlush,
        Bug::ForgetsVote,
        Bug::ForgetsTruncation,
        Bug::IgnoresFailedFlush,
        Bug::SnapshotBeforeFlush,
        Bug::SkipsFolderFlush,
        Bug::SkipsSavingSnapshot,
        Bug::SkipsLoadingSnapshot,
        Bug::ReadsWithoutQuorum,
        Bug::ReadsTooOld,
        Bug::IgnoresPrecondition,
        Bug::RepeatsRequest,
        Bug::AppliesDifferently,
        Bug::SkipsEntry,
        Bug::CallsMadeRefused,
        Bug::CallsUnknownMade,
        Bug::ReusesMemberId,
        Bug::SkipsFirstAfterStart,
        Bug::PurgesAboveSnapshot,
        Bug::TruncatesOneTooFew,
        Bug::KeepsTruncatedInCache,
        Bug::SavesOldMembers,
        Bug::SavesOldState,
        Bug::TakesLogForCommitted,
        Bug::VotesForStaleLog,
        Bug::CountsRefusedVotes,
        Bug::ReadsAtFollower,
        Bug::ReadsBeforeApplied,
        Bug::LeadsBeforeApplied,
        Bug::CallsRefusedMade,
        Bug::CallsUnknownRefused,
        Bug::AnswersEarlierIndex,
        Bug::KeepsVersion,
        Bug::MarksBeforeFlush,
        Bug::SkipsSegmentFolderFlush,
        Bug::CallsTornTailDamage,
        Bug::WatchLosesEvent,
        Bug::WatchSkipsFirst,
        Bug::WatchSkipsSnapshot,
        Bug::WatchRepeatsEvent,
        Bug::RemovesBeforeAdding,
        Bug::RotationWaitsForNobody,
        Bug::RotationNeedsNoMajority,
        Bug::RotationHasNoDeadline,
        Bug::RotationForgetsFormerRoot,
        Bug::RotationKeepsOldKey,
        Bug::RotationTellsNobody,
        Bug::CertificateWithoutCross,
        Bug::ForgetsFormerRoot,
        Bug::AcknowledgesLostReports,
    ];

    /// Whether it is in the rotation of the root, and not in the store.
    pub fn is_of_rotation(self) -> bool {
        self as u8 >= Bug::RotationWaitsForNobody as u8 && !self.is_of_tasks()
    }

    /// Whether it is in what managers plan for workers, and tell them.
    pub fn is_of_tasks(self) -> bool {
        self as u8 >= Bug::AcknowledgesLostReports as u8
    }
}

#[cfg(feature = "planted")]
static PLANTED: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// Switches a bug on in this process, instead of any other; or none.
#[cfg(feature = "planted")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.store(
        bug.map_or(0, |bug| bug as u8),
        std::sync::atomic::Ordering::Relaxed,
    );
}

/// Whether this bug is switched on.
#[cfg(feature = "planted")]
pub fn planted(bug: Bug) -> bool {
    PLANTED.load(std::sync::atomic::Ordering::Relaxed) == bug as u8
}

/// No bug is switched on.
#[cfg(not(feature = "planted"))]
pub const fn planted(_: Bug) -> bool {
    false
}
