//! Our half of a stream that another member has dialled: a bounded queue, and the response body that empties it.
//!
//! The body takes everything that is queued into one chunk; the connection flushes when nothing is left. A reader that is
//! slow fills the queue, and what finds no room is lost.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame};
use tokio::{
    sync::mpsc,
    time::{Interval, MissedTickBehavior, interval},
};

use super::{
    codec::{Encoder, Kind},
    metrics::PeerNumbers,
    size_of,
};
use crate::pb::raftpb::Message;

/// Messages a stream may have waiting.
const QUEUE_MAX: usize = 4096;
/// Bytes they may have; one message always has room.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// A chunk is sent once it is as long as this.
const CHUNK: usize = 256 << 10;
/// A third of what the reader waits for a sign of life.
const LINK_HEARTBEAT: Duration = Duration::from_millis(5_000 / 3);

#[derive(Default)]
struct Shared {
    bytes: AtomicUsize,
    /// The writer has let go: what is queued is not sent any more.
    closed: AtomicBool,
    /// The connection has ended.
    broken: AtomicBool,
}

/// Where messages for the stream are put. Dropping it ends the stream at once.
pub struct Queue {
    messages: mpsc::Sender<Message>,
    shared: Arc<Shared>,
}

impl Queue {
    /// False if there is no room, or no connection any more.
    pub fn put(&self, message: Message) -> bool {
        let bytes = size_of(&message);
        let held = self.shared.bytes.fetch_add(bytes, Relaxed);
        let taken = (held == 0 || held + bytes <= QUEUE_BYTES_MAX) && self.messages.try_send(message).is_ok();
        if !taken {
            self.shared.bytes.fetch_sub(bytes, Relaxed);
        }
        taken
    }

    pub fn is_broken(&self) -> bool {
        self.shared.broken.load(Relaxed)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.closed.store(true, Relaxed);
    }
}

/// The body of the answer to whoever dialled.
pub struct StreamBody {
    messages: mpsc::Receiver<Message>,
    shared: Arc<Shared>,
    encoder: Encoder,
    chunk: BytesMut,
    heartbeat: Interval,
    numbers: Arc<PeerNumbers>,
    /// Told when the stream ends.
    ended: Option<Box<dyn FnOnce() + Send + Sync>>,
}

/// A new stream. `ended` is called when its connection has ended, whoever ended it. Must be called on a tokio runtime.
pub fn stream(
    kind: Kind,
    numbers: Arc<PeerNumbers>,
    ended: impl FnOnce() + Send + Sync + 'static,
) -> (Queue, StreamBody) {
    let (sender, messages) = mpsc::channel(QUEUE_MAX);
    let shared = Arc::new(Shared::default());
    let mut heartbeat = interval(LINK_HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    heartbeat.reset();
    let body = StreamBody {
        messages,
        shared: shared.clone(),
        encoder: Encoder::new(kind),
        chunk: BytesMut::new(),
        heartbeat,
        numbers,
        ended: Some(Box::new(ended)),
    };
    (Queue { messages: sender, shared }, body)
}

impl StreamBody {
    fn encode(&mut self, message: &Message) {
        self.shared.bytes.fetch_sub(size_of(message), Relaxed);
        let before = self.chunk.len();
        self.encoder.message(message, &mut self.chunk);
        self.numbers.sent_bytes.fetch_add((self.chunk.len() - before) as u64, Relaxed);
    }
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = &mut *self;
        let gone = || io::Error::other("the stream was replaced or its member removed");
        if this.shared.closed.load(Relaxed) {
            return Poll::Ready(Some(Err(gone())));
        }
        while this.chunk.len() < CHUNK {
            match this.messages.try_recv() {
                Ok(message) => this.encode(&message),
                Err(_) => match this.messages.poll_recv(cx) {
                    Poll::Ready(Some(message)) => this.encode(&message),
                    Poll::Ready(None) => return Poll::Ready(Some(Err(gone()))),
                    Poll::Pending => break,
                },
            }
        }
        if this.heartbeat.poll_tick(cx).is_ready() {
            this.encoder.link_heartbeat(&mut this.chunk);
        }
        if this.chunk.is_empty() {
            return Poll::Pending;
        }
        Poll::Ready(Some(Ok(Frame::data(this.chunk.split().freeze()))))
    }
}

impl Drop for StreamBody {
    fn drop(&mut self) {
        self.shared.broken.store(true, Relaxed);
        if let Some(ended) = self.ended.take() {
            ended();
        }
    }
}
