//! The bodies of a call on their way through: messages and bytes counted, the end noted, and streams that ask for a
//! leader ended when there is none for long.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tonic::{Code, Status, body::Body};

use super::status;
use crate::telemetry::{Metrics, RpcMethod, Traffic};

/// Finds the messages in a body's data: each begins with a flag and a length in 4 bytes.
#[derive(Debug, Default)]
struct Messages {
    head: [u8; 5],
    /// Bytes of the head that are there.
    head_bytes: usize,
    /// Bytes of the message still to come.
    left: usize,
}

impl Messages {
    /// Messages that end in `data`, and the bytes of messages it holds.
    fn count(&mut self, mut data: &[u8]) -> (u64, u64) {
        let (mut messages, mut bytes) = (0, 0);
        while !data.is_empty() {
            if self.head_bytes < self.head.len() {
                let n = data.len().min(self.head.len() - self.head_bytes);
                self.head[self.head_bytes..][..n].copy_from_slice(&data[..n]);
                self.head_bytes += n;
                data = &data[n..];
                if self.head_bytes < self.head.len() {
                    break;
                }
                let [_, length @ ..] = self.head;
                self.left = u32::from_be_bytes(length) as usize;
            }
            let n = data.len().min(self.left);
            self.left -= n;
            bytes += n as u64;
            data = &data[n..];
            if self.left == 0 {
                self.head_bytes = 0;
                messages += 1;
            }
        }
        (messages, bytes)
    }

    fn add(&mut self, data: &[u8], to: &Traffic) -> u64 {
        let (messages, bytes) = self.count(data);
        to.add(messages, bytes);
        messages
    }
}

/// A call whose counters are known.
#[derive(Clone)]
pub struct Call {
    metrics: Metrics,
    place: usize,
    began: Instant,
}

impl Call {
    /// The call of `path`, which counts as started; `None` if there is no such method.
    pub fn start(metrics: &Metrics, path: &str) -> Option<Self> {
        let place = metrics.rpcs.find(path)?;
        metrics.rpcs.of(place).started.fetch_add(1, Relaxed);
        Some(Self { metrics: metrics.clone(), place, began: Instant::now() })
    }

    pub fn method(&self) -> &RpcMethod {
        self.metrics.rpcs.of(self.place)
    }

    fn ended(&self, code: Code) {
        self.method().handled(code, self.began.elapsed());
    }
}

/// A call without an answer so far. If it is dropped, its client has given up.
pub struct Unanswered(Option<Call>);

impl Unanswered {
    pub fn new(call: Call) -> Self {
        Self(Some(call))
    }

    /// The answer as it is to be sent. `no_leader` ends a stream.
    pub fn meter(mut self, response: http::Response<Body>, no_leader: Option<NoLeader>) -> http::Response<Body> {
        let Some(call) = self.0.take() else { return response };
        // An answer that is nothing but an error has it in its head.
        if let Some(status) = Status::from_header_map(response.headers()) {
            // Unary errors count as messages, as etcd has it.
            call.method().sent.add(u64::from(!call.method().is_stream()), 0);
            call.ended(status.code());
            return response;
        }
        response.map(|body| Body::new(Answer { body, messages: Messages::default(), call, no_leader, ended: false }))
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call.ended(Code::Cancelled);
        }
    }
}

/// A request's body.
pub struct Asked<B> {
    body: B,
    messages: Messages,
    call: Option<Call>,
    /// Messages that have come.
    came: Arc<AtomicU64>,
}

impl<B> Asked<B> {
    pub fn new(body: B, call: Option<Call>, came: Arc<AtomicU64>) -> Self {
        Self { body, messages: Messages::default(), call, came }
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for Asked<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        if let (Poll::Ready(Some(Ok(frame))), Some(call)) = (&polled, &this.call)
            && let Some(data) = frame.data_ref()
        {
            let messages = this.messages.add(data, &call.method().received);
            this.came.fetch_add(messages, Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> Drop for Asked<B> {
    fn drop(&mut self) {
        // The look that finds no more messages counts as one, as etcd has it.
        if let Some(call) = self.call.as_ref().filter(|call| call.method().kind == "bidi_stream") {
            call.method().received.add(1, 0);
        }
    }
}

/// Ready when the member has been without a leader for long.
pub type NoLeader = Pin<Box<dyn Future<Output = ()> + Send>>;

/// An answer's body.
struct Answer {
    body: Body,
    messages: Messages,
    call: Call,
    no_leader: Option<NoLeader>,
    ended: bool,
}

impl Answer {
    fn end(&mut self, code: Code) {
        if !std::mem::replace(&mut self.ended, true) {
            self.call.ended(code);
        }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if let Some(no_leader) = &mut this.no_leader
            && no_leader.as_mut().poll(cx).is_ready()
        {
            this.no_leader = None;
            // What made the answers goes at once.
            this.body = Body::empty();
            let status = status::no_leader();
            this.end(status.code());
            let mut trailers = HeaderMap::new();
            let _ = status.add_header(&mut trailers);
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    this.messages.add(data, &this.call.method().sent);
                } else if let Some(trailers) = frame.trailers_ref() {
                    this.end(Status::from_header_map(trailers).map_or(Code::Unknown, |status| status.code()));
                }
            }
            Poll::Ready(Some(Err(status))) => this.end(status.code()),
            Poll::Ready(None) => this.end(Code::Ok),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // Nobody takes the rest: a unary call was done when its answer began.
        self.end(if self.call.method().is_stream() { Code::Cancelled } else { Code::Ok });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_the_data_is_cut() {
        let data = [b"\0\0\0\0\x03abc".as_slice(), b"\0\0\0\0\0", b"\x01\0\0\x01\0", &[7; 256]].concat();
        for cut in 1..data.len() {
            let mut messages = Messages::default();
            let counts = data.chunks(cut).map(|piece| messages.count(piece));
            assert_eq!(counts.fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)), (3, 259), "in pieces of {cut}");
        }
        let mut messages = Messages::default();
        assert_eq!(messages.count(&data[..data.len() - 1]), (2, 258), "the last message is not whole");
    }
}
