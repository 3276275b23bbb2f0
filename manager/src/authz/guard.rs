//! A response that ends when its caller's right to it ends: so every stream closes at the commit that removes the
//! caller's key, soon after the replica can no longer tell, and with the manager.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;

/// A body under guard.
pub(super) struct Guarded {
    body: Body,
    /// Resolves with the reason when the right to the stream ends. `None`: no list decides.
    right: Option<BoxFuture<'static, Status>>,
    /// Resolves with the reason when the manager ends.
    stop: BoxFuture<'static, Status>,
    over: bool,
}

impl Guarded {
    pub(super) fn new(
        body: Body,
        right: Option<BoxFuture<'static, Status>>,
        stop: BoxFuture<'static, Status>,
    ) -> Self {
        Self {
            body,
            right,
            stop,
            over: false,
        }
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
        if let Some(right) = &mut this.right
            && let Poll::Ready(reason) = right.as_mut().poll(cx)
        {
            return Poll::Ready(Some(this.end(&reason)));
        }
        if let ready @ Poll::Ready(_) = Pin::new(&mut this.body).poll_frame(cx) {
            return ready;
        }
        // The stop last: what was done is answered, and only who waits for more is sent away.
        match this.stop.as_mut().poll(cx) {
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
