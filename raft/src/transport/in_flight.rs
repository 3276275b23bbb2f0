//! Pipelined appends of one stream: when an answer is overdue, and which answers say what consensus takes them for.
//!
//! openraft 0.10.0-alpha.37 remembers when it sent each append, and takes an answer for that to all of them up to the index that it
//! names. An append without entries names the index of the one before it: the answer to that one, late since this process stood
//! still, would confirm that the follower still follows at a time when it was not asked. A leader that was deposed meanwhile
//! would answer reads. So an answer is held back while an append that it would be taken for is on its way, whose own answer says
//! the same; and no append is taken from consensus between an answer and what consensus makes of it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures::{Stream, StreamExt as _};
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::APPEND_WAIT;
use crate::type_config::{LogId, TypeConfig};

/// Appends sent and not answered yet.
#[derive(Debug, Default)]
pub struct InFlight {
    state: Mutex<State>,
    more: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The last entry that each names, or the one before its own where it has none.
    lasts: VecDeque<Option<LogId>>,
    /// Consensus has an answer, and did not ask for the next one yet.
    delivering: bool,
    waiting: Option<Waker>,
}

impl InFlight {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The appends of consensus, each noted as it is taken.
    pub fn requests<S>(self: &Arc<Self>, input: S) -> Requests<S> {
        Requests {
            input,
            in_flight: self.clone(),
        }
    }

    /// Consensus asks for an answer: it has made of the last one what it makes of it.
    pub fn asked(&self) {
        let mut state = self.state();
        state.delivering = false;
        if let Some(waiting) = state.waiting.take() {
            waiting.wake();
        }
    }

    /// The oldest append was answered. Whether consensus may be told; where not, a later answer says the same.
    pub fn answered(&self, answer: &StreamAppendResult<TypeConfig>) -> bool {
        let mut state = self.state();
        state.lasts.pop_front();
        let Ok(matching) = answer else { return true };
        state.delivering = state.lasts.front().is_none_or(|next| next > matching);
        state.delivering
    }

    /// Resolves when an answer is overdue: something was sent, and nothing came since this was called.
    pub async fn overdue(&self) {
        while self.state().lasts.is_empty() {
            self.more.notified().await;
        }
        sleep(APPEND_WAIT).await;
    }
}

/// See [`InFlight::requests`].
#[derive(Debug)]
pub struct Requests<S> {
    input: S,
    in_flight: Arc<InFlight>,
}

impl<S> Stream for Requests<S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin,
{
    type Item = AppendEntriesRequest<TypeConfig>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let in_flight = self.in_flight.clone();
        // Held while consensus hands one out, since it notes then that it was sent.
        let mut state = in_flight.state();
        if state.delivering {
            state.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let next = self.input.poll_next_unpin(cx);
        if let Poll::Ready(Some(request)) = &next {
            let last = request.entries.last().map(|entry| entry.log_id);
            state.lasts.push_back(last.or(request.prev_log_id));
            in_flight.more.notify_one();
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use futures::stream;
    use openraft::{EntryPayload, raft::StreamAppendError};

    use super::*;
    use crate::type_config::{Entry, Vote};

    fn id(index: u64) -> LogId {
        crate::type_config::log_id(1, index)
    }

    /// After `prev`, with entries up to `last`.
    fn append(prev: u64, last: u64) -> AppendEntriesRequest<TypeConfig> {
        AppendEntriesRequest {
            vote: Vote::new(1, 1),
            prev_log_id: Some(id(prev)),
            leader_commit: None,
            entries: (prev + 1..=last)
                .map(|index| Entry {
                    log_id: id(index),
                    payload: EntryPayload::Blank,
                })
                .collect(),
        }
    }

    fn sent(appends: &[(u64, u64)]) -> Arc<InFlight> {
        let in_flight = Arc::new(InFlight::default());
        let appends: Vec<_> = appends.iter().map(|(prev, last)| append(*prev, *last)).collect();
        let count = appends.len();
        let taken = in_flight.requests(stream::iter(appends)).count().now_or_never();
        assert_eq!(taken, Some(count));
        in_flight
    }

    #[test]
    fn an_answer_is_held_back_while_an_append_without_entries_of_the_same_index_is_on_its_way() {
        let in_flight = sent(&[(3, 5), (5, 5), (5, 5), (5, 8)]);
        let told: Vec<bool> = [5, 5, 5, 8]
            .map(|matching| {
                in_flight.asked();
                in_flight.answered(&Ok(Some(id(matching))))
            })
            .into();
        assert_eq!(told, [false, false, true, true]);
    }

    #[test]
    fn a_refusal_is_always_told() {
        let in_flight = sent(&[(3, 5), (5, 5)]);
        assert!(in_flight.answered(&Err(StreamAppendError::Conflict(id(3)))));
    }

    #[test]
    fn no_append_is_taken_between_an_answer_and_the_question_for_the_next() {
        let in_flight = Arc::new(InFlight::default());
        let appends = stream::iter([append(3, 5), append(5, 5)]);
        let mut requests = in_flight.requests(appends);
        let mut take = || requests.next().now_or_never().map(|it| it.is_some());
        assert_eq!(take(), Some(true));
        assert!(in_flight.answered(&Ok(Some(id(5)))));
        assert_eq!(take(), None, "it waits");
        in_flight.asked();
        assert_eq!(take(), Some(true));
    }
}
