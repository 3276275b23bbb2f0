//! A response that ends when its caller's right to it ends: so every stream closes at the commit that removes the
//! caller's key, soon after the replica can no longer tell, and with the manager.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;

use super::right::{Right, ending};
use super::withheld;

/// A body under guard.
pub(super) struct Guarded {
    body: Body,
    /// `None`: no list decides.
    right: Option<Arc<Right>>,
    /// Cancelled when the manager ends.
    stop: CancellationToken,
    /// Resolves with the reason when either ends. Made once the body has to be waited for: most answers never are.
    waiting: Option<BoxFuture<'static, Status>>,
    /// Something of the answer has left.
    begun: bool,
    over: bool,
}

impl Guarded {
    pub(super) fn new(body: Body, right: Option<Right>, stop: CancellationToken) -> Self {
        Self {
            body,
            right: right.map(Arc::new),
            stop,
            waiting: None,
            begun: false,
            over: false,
        }
    }

    fn waiting(&mut self) -> &mut BoxFuture<'static, Status> {
        self.waiting.get_or_insert_with(|| {
            let (right, stop) = (self.right.clone(), self.stop.clone());
            async move {
                let over = async {
                    match right {
                        Some(right) => right.until_over().await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    reason = over => reason,
                    () = stop.cancelled() => ending(),
                }
            }
            .boxed()
        })
    }

    fn end(&mut self, reason: &Status) -> Result<Frame<bytes::Bytes>, Status> {
        self.over = true;
        self.body = Body::empty(); // what the service still prepares is dropped, and so is its side of the stream
        let mut trailers = HeaderMap::new();
        reason.add_header(&mut trailers)?;
        Ok(Frame::trailers(trailers))
    }
}

impl HttpBody for Guarded {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let this = &mut *self;
        if this.over {
            return Poll::Ready(None);
        }
        // The right first: nothing leaves after it ended.
        if let Some(reason) = this.right.as_ref().and_then(|right| right.over()) {
            let answered = !this.begun && Pin::new(&mut this.body).poll_frame(cx).is_ready();
            let reason = if answered { withheld(&reason) } else { reason };
            return Poll::Ready(Some(this.end(&reason)));
        }
        if let ready @ Poll::Ready(_) = Pin::new(&mut this.body).poll_frame(cx) {
            this.begun = true;
            return ready;
        }
        // The stop last: what was done is answered, and only who waits for more is sent away.
        match this.waiting().as_mut().poll(cx) {
            Poll::Ready(reason) => Poll::Ready(Some(this.end(&reason))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
