//! When the answer of a pipelined append is overdue.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;
use tokio::time::sleep;

use super::APPEND_WAIT;

/// Appends sent and not answered yet.
#[derive(Debug, Default)]
pub struct InFlight {
    sent: AtomicU64,
    answered: AtomicU64,
    more: Notify,
}

impl InFlight {
    /// One more was sent.
    pub fn send(&self) {
        self.sent.fetch_add(1, Ordering::Relaxed);
        self.more.notify_one();
    }

    /// One more was answered.
    pub fn answer(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// Resolves when an answer is overdue: something was sent, and nothing came since this was called.
    pub async fn overdue(&self) {
        while self.sent.load(Ordering::Relaxed) == self.answered.load(Ordering::Relaxed) {
            self.more.notified().await;
        }
        sleep(APPEND_WAIT).await;
    }
}
