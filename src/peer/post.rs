//! Posts to another member: the pipeline for single messages, and databases.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::{Method, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{self, Body, Frame},
    client::conn::http1::SendRequest,
};
use prost::Message as _;

use super::{
    Chunks, codec, dial,
    metrics::{PeerNumbers, Snapshots},
    reader::refusal,
    size_of,
    status::Urls,
    wire::Shared,
};
use crate::{cluster::ids::hex, config::Url, pb::raftpb::Message};

/// Messages that may wait for one of the senders.
const QUEUE_MAX: usize = 64;
/// Bytes they may have; one message always has room.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Posts under way at once.
pub const SENDERS: usize = 4;

/// Whom posts go to.
#[derive(Clone)]
pub struct Target {
    pub shared: Arc<Shared>,
    pub numbers: Arc<PeerNumbers>,
    pub urls: Arc<Urls>,
    pub id: u64,
}

/// Where messages for the pipeline are put.
pub struct Pipeline {
    messages: flume::Sender<Message>,
    bytes: Arc<AtomicUsize>,
}

/// Takes messages from the pipeline and posts them; there are [`SENDERS`] of them.
#[derive(Clone)]
pub struct PipelineEnd {
    messages: flume::Receiver<Message>,
    bytes: Arc<AtomicUsize>,
}

pub fn pipeline() -> (Pipeline, PipelineEnd) {
    let (sender, messages) = flume::bounded(QUEUE_MAX);
    let bytes = Arc::new(AtomicUsize::new(0));
    (Pipeline { messages: sender, bytes: bytes.clone() }, PipelineEnd { messages, bytes })
}

impl Pipeline {
    /// False if there is no room.
    pub fn put(&self, message: Message) -> bool {
        let bytes = size_of(&message);
        let held = self.bytes.fetch_add(bytes, Relaxed);
        let taken = (held == 0 || held + bytes <= QUEUE_BYTES_MAX) && self.messages.try_send(message).is_ok();
        if !taken {
            self.bytes.fetch_sub(bytes, Relaxed);
        }
        taken
    }
}

impl PipelineEnd {
    /// Until the pipeline is gone.
    pub async fn run(self, target: Target) {
        let mut kept = None;
        while let Ok(message) = self.messages.recv_async().await {
            self.bytes.fetch_sub(size_of(&message), Relaxed);
            let body = Bytes::from(message.encode_to_vec());
            match target.post_message(&body, &mut kept).await {
                Ok(()) => {
                    target.numbers.status.connected();
                    target.numbers.sent_bytes.fetch_add(body.len() as u64, Relaxed);
                }
                Err(reason) => {
                    target.failed(&reason, "message");
                    target.shared.incoming.unreachable(target.id);
                }
            }
        }
    }
}

/// A post without an answer.
struct Failed {
    reason: String,
    /// Certainly nothing of it has left.
    unsent: bool,
}

/// A connection that may be used again.
type Kept = Option<(Url, SendRequest<Full<Bytes>>)>;

impl Target {
    fn failed(&self, reason: &str, what: &str) {
        self.numbers.status.disconnected();
        self.numbers.sent_failures.fetch_add(1, Relaxed);
        tracing::debug!(peer = hex(self.id), "cannot post a {what}: {reason}");
    }

    async fn post_message(&self, body: &Bytes, kept: &mut Kept) -> Result<(), String> {
        let url = self.urls.pick().ok_or("no URL")?;
        if let Some((at, mut connection)) = kept.take()
            && at == url
            && connection.ready().await.is_ok()
        {
            match self.post_on(&mut connection, &url, body).await {
                Ok(answer) => return self.judge(answer, url, connection, kept).await,
                // The other side has closed it meanwhile, and nothing of the message has left: a new one is tried.
                Err(Failed { unsent: true, .. }) => {}
                // It may have arrived. A forwarded proposal must not arrive twice (D-21).
                Err(Failed { reason, .. }) => {
                    self.urls.failed(&url);
                    return Err(reason);
                }
            }
        }
        let fresh = async {
            let mut connection = dial::connect(&url, self.shared.post_limits()).await.map_err(|e| dial::chain(&e))?;
            let answer = self.post_on(&mut connection, &url, body).await.map_err(|e| e.reason)?;
            Ok((answer, connection))
        };
        match fresh.await {
            Ok((answer, connection)) => self.judge(answer, url, connection, kept).await,
            Err(reason) => {
                self.urls.failed(&url);
                Err(reason)
            }
        }
    }

    async fn post_on(
        &self,
        connection: &mut SendRequest<Full<Bytes>>,
        url: &Url,
        body: &Bytes,
    ) -> Result<Response<body::Incoming>, Failed> {
        let request = self
            .shared
            .request(Method::POST, url, "/raft")
            .header(header::CONTENT_TYPE, "application/protobuf")
            .body(Full::new(body.clone()))
            .map_err(|e| Failed { reason: e.to_string(), unsent: false })?;
        connection.try_send_request(request).await.map_err(|mut e| {
            let unsent = e.take_message().is_some();
            Failed { reason: dial::chain(e.error()), unsent }
        })
    }

    async fn judge(
        &self,
        answer: Response<body::Incoming>,
        url: Url,
        connection: SendRequest<Full<Bytes>>,
        kept: &mut Kept,
    ) -> Result<(), String> {
        let verdict = self.verdict(answer).await;
        match verdict {
            Ok(()) => *kept = Some((url, connection)),
            Err(_) => self.urls.failed(&url),
        }
        verdict
    }

    async fn verdict(&self, answer: Response<body::Incoming>) -> Result<(), String> {
        match answer.status() {
            StatusCode::NO_CONTENT => Ok(()),
            StatusCode::FORBIDDEN => {
                self.shared.incoming.removed_here();
                Err("the peer says that this member has been removed from the cluster".to_owned())
            }
            status => Err(format!("{status}: {}", refusal(answer.into_body()).await)),
        }
    }

    /// Sends the database that `order` asks for.
    pub async fn send_database(self, order: Message) {
        let transfer = Snapshots::begin(&self.numbers, |numbers| &numbers.snapshots_sent);
        let peer = hex(self.id);
        let sent = async {
            let (message, chunks) =
                self.shared.databases.open(order).await.map_err(|e| format!("cannot open the database: {e}"))?;
            tracing::info!(peer, index = index_of(&message), "sending a database snapshot");
            self.post_database(&message, chunks).await
        };
        let delivered = match sent.await {
            Ok(bytes) => {
                transfer.done();
                self.numbers.status.connected();
                tracing::info!(peer, bytes, "sent a database snapshot");
                true
            }
            Err(reason) => {
                self.failed(&reason, "snapshot");
                tracing::warn!(peer, "cannot send a database snapshot: {reason}");
                false
            }
        };
        if !delivered {
            self.shared.incoming.unreachable(self.id);
        }
        self.shared.incoming.snapshot_sent(self.id, delivered);
    }

    async fn post_database(&self, message: &Message, chunks: Chunks) -> Result<usize, String> {
        let url = self.urls.pick().ok_or("no URL")?;
        let mut head = BytesMut::new();
        codec::put_with_length(message, &mut head);
        let sent = Arc::new(AtomicUsize::new(0));
        let body = Database { head: Some(head.freeze()), chunks, sent: sent.clone(), numbers: self.numbers.clone() };
        let posted = async {
            let mut connection = dial::connect(&url, self.shared.post_limits()).await.map_err(|e| dial::chain(&e))?;
            let request = self
                .shared
                .request(Method::POST, &url, "/raft/snapshot")
                .header(header::CONTENT_TYPE, "application/octet-stream")
                .body(body)
                .map_err(|e| e.to_string())?;
            let answer = connection.send_request(request).await.map_err(|e| dial::chain(&e))?;
            self.verdict(answer).await
        };
        posted.await.inspect_err(|_| self.urls.failed(&url))?;
        Ok(sent.load(Relaxed))
    }
}

fn index_of(message: &Message) -> u64 {
    message.snapshot.as_ref().and_then(|s| s.metadata.as_ref()).map_or(0, |m| m.index())
}

/// A message and the database behind it, as they come.
struct Database {
    head: Option<Bytes>,
    chunks: Chunks,
    sent: Arc<AtomicUsize>,
    numbers: Arc<PeerNumbers>,
}

impl Body for Database {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let next = match self.head.take() {
            Some(head) => Poll::Ready(Some(Ok(head))),
            None => self.chunks.poll_recv(cx),
        };
        next.map_ok(|bytes| {
            self.sent.fetch_add(bytes.len(), Relaxed);
            self.numbers.sent_bytes.fetch_add(bytes.len() as u64, Relaxed);
            Frame::data(bytes)
        })
    }
}
