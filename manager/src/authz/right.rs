//! The right to an open stream, and when it is over.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_identity::{Certificate, Subject};
use bulkhead_proto::{Caller, Code, KeyId, limits};
use tokio::time::sleep;
use tonic::Status;

use super::{KeyState, Listing, lost_touch, rotated, unlisted};
use crate::freshness::Fresh;
use crate::refusal::refuse;

/// How often an open stream's certificate is held against the clock, which may be set meanwhile.
const EXPIRY_CHECK: Duration = Duration::from_secs(10);

/// What a caller's stream needs to stay open: a listed key, a certificate that is not over, a replica that can tell.
#[derive(Debug)]
pub(super) struct Right {
    pub(super) fresh: Fresh,
    pub(super) listing: Listing,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) caller: Caller,
    /// What must be listed; nothing for Raft methods, which know no list.
    pub(super) key: Option<(Subject, KeyId)>,
    /// When the connection was opened.
    pub(super) opened_ms: i64,
    pub(super) certificate: Option<Arc<Certificate>>,
    /// Whether certificate and replica must be current.
    pub(super) current: bool,
}

impl Right {
    /// Why the right is over, if it is.
    pub(super) fn over(&self) -> Option<Status> {
        if let Some(reason) = self.ended() {
            return Some(reason);
        }
        if !self.current {
            return None;
        }
        if self.certificate_left() == Some(Duration::ZERO) {
            return Some(self.expired());
        }
        (self.freshness_left() == Duration::ZERO).then(lost_touch)
    }

    /// Resolves with the reason once the right is over.
    pub(super) async fn until_over(&self) -> Status {
        let removed = self.listing.until(|| self.ended());
        if !self.current {
            return removed.await;
        }
        tokio::select! {
            biased;
            reason = removed => reason,
            () = self.until_expired() => self.expired(),
            () = self.until_stale() => lost_touch(),
        }
    }

    /// Why a commit ended the right: the key is no longer listed, or the root of its certificate was rotated away.
    fn ended(&self) -> Option<Status> {
        let gone = |(subject, key)| self.listing.of(&subject, key, self.opened_ms) != KeyState::Listed;
        if self.key.is_some_and(gone) {
            tracing::info!(target: "audit", caller = %self.caller, "stream closed: its key was removed");
            return Some(unlisted(self.caller));
        }
        let certificate = self.certificate.as_ref()?;
        self.listing.is_dropped(certificate, !self.current).then(|| {
            tracing::info!(target: "audit", caller = %self.caller, "stream closed: its root was rotated away");
            rotated()
        })
    }

    fn expired(&self) -> Status {
        tracing::info!(target: "audit", caller = %self.caller, "stream closed: its certificate expired");
        refuse(
            Code::CertificateTime,
            tonic::Code::PermissionDenied,
            "the certificate of this connection expired",
            "connect again with a renewed one",
        )
    }

    /// How long the caller's certificate is still valid; `None` where it has none.
    fn certificate_left(&self) -> Option<Duration> {
        let certificate = self.certificate.as_ref()?;
        let now = i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX);
        let left = certificate.not_after_ms().saturating_sub(now);
        Some(Duration::from_millis(u64::try_from(left).unwrap_or(0)))
    }

    async fn until_expired(&self) {
        loop {
            match self.certificate_left() {
                None => return std::future::pending().await,
                Some(Duration::ZERO) => return,
                Some(left) => sleep(left.min(EXPIRY_CHECK)).await,
            }
        }
    }

    /// For how long a replica that is stale may still serve the stream: [`limits::STREAM_GRACE`] in all.
    fn freshness_left(&self) -> Duration {
        limits::STREAM_GRACE.saturating_sub(self.fresh.stale_for())
    }

    async fn until_stale(&self) {
        loop {
            match self.freshness_left() {
                Duration::ZERO => return,
                left => sleep(left).await,
            }
        }
    }
}

/// This manager goes; whoever holds a stream asks another one.
pub(super) fn ending() -> Status {
    refuse(
        Code::NoQuorum,
        tonic::Code::Unavailable,
        "this manager is ending",
        "ask another manager",
    )
}
