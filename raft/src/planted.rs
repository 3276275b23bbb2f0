//! Bugs that can be switched on, one at a time, to test the tests: a campaign that does not find them proves nothing.
//!
//! They are compiled in with the feature `planted` alone, which no release build may have.

#[cfg(all(feature = "planted", not(debug_assertions)))]
compile_error!("the feature `planted` breaks the product on purpose: it is for debug builds alone");

/// A bug. Each is one that was found in some replicated store, or would be there with one line less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Bug {
    /// A log entry is acknowledged before it is on the disk.
    AcknowledgesBeforeFlush = 1,
    /// The log is written and not flushed.
    SkipsFlush,
    /// A vote is kept in memory alone.
    ForgetsVote,
    /// A truncation of the log is kept in memory alone.
    ForgetsTruncation,
    /// A failed flush is taken for a good one.
    IgnoresFailedFlush,
    /// A snapshot takes the old one's place before it is flushed.
    SnapshotBeforeFlush,
    /// The folder is not flushed after a snapshot took the old one's place.
    SkipsFolderFlush,
    /// A snapshot from the leader is used and not saved.
    SkipsSavingSnapshot,
    /// A snapshot is not loaded at the start.
    SkipsLoadingSnapshot,
    /// The leader answers a read by its own commit index, without asking a quorum.
    ReadsWithoutQuorum,
    /// A read is answered by an index that is too old.
    ReadsTooOld,
    /// A version in a precondition is not compared.
    IgnoresPrecondition,
    /// A request that is sent again is done again.
    RepeatsRequest,
    /// What a transaction does depends on who applies it.
    AppliesDifferently,
    /// An entry is skipped now and then.
    SkipsEntry,
    /// A write that was made is called refused.
    CallsMadeRefused,
    /// A write of unknown outcome is called made.
    CallsUnknownMade,
    /// A rotation of the root waits for nobody.
    RotationWaitsForNobody,
    /// It goes on at its deadline even without a majority of the managers.
    RotationNeedsNoMajority,
    /// It waits for a node that does nothing for ever.
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
        Bug::RotationWaitsForNobody,
        Bug::RotationNeedsNoMajority,
        Bug::RotationHasNoDeadline,
        Bug::RotationForgetsFormerRoot,
        Bug::RotationKeepsOldKey,
        Bug::RotationTellsNobody,
        Bug::CertificateWithoutCross,
        Bug::ForgetsFormerRoot,
    ];

    /// Whether it is in the rotation of the root, and not in the store.
    pub fn is_of_rotation(self) -> bool {
        self as u8 >= Bug::RotationWaitsForNobody as u8
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
