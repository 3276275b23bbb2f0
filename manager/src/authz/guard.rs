//! A response that ends when its caller's right to it ends: so every stream closes at the commit that removes the
//! caller's key, and soon after the replica can no longer tell.

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
    /// Resolves with the reason when the stream has to end.
    ends: Option<BoxFuture<'static, Status>>,
}

impl Guarded {
    pub(super) fn new(body: Body, ends: BoxFuture<'static, Status>) -> Self {
        Self {
            body,
            ends: Some(ends),
        }
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
        let Some(ends) = &mut this.ends else {
            return Poll::Ready(None);
        };
        // The guard first: nothing leaves after it fired.
        if let Poll::Ready(reason) = ends.as_mut().poll(cx) {
            this.ends = None;
            this.body = Body::empty(); // what the service still prepares is dropped, and so is its side of the stream
            let mut trailers = HeaderMap::new();
            return Poll::Ready(Some(match reason.add_header(&mut trailers) {
                Ok(()) => Ok(Frame::trailers(trailers)),
                Err(error) => Err(error),
            }));
        }
        Pin::new(&mut this.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.ends.is_none() || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
