//! What other members ask under `/raft`: their streams, posted messages, databases, probes.

use std::{io, pin::Pin, sync::Arc, task::Context, task::Poll};

use bytes::{Bytes, BytesMut};
use futures_util::future;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::{self, Frame};
use tokio::{sync::mpsc, time::timeout};

use super::{
    actor::Control,
    codec::{self, Kind, SnapshotHead},
    metrics::{PeerNumbers, Snapshots},
    probe,
    stream::{StreamBody, stream},
    transport::Transport,
    wire::{self, Refused, STREAM_STEP},
};
use crate::{cluster::ids::hex, config::ETCD_VERSION, pb::raftpb::MessageType};

/// Chunks of a database that may wait for whoever takes it in.
const CHUNKS_MAX: usize = 4;

/// Body of an answer on the peer port.
pub enum Body {
    Whole(Full<Bytes>),
    Stream(StreamBody),
}

impl body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.get_mut() {
            Body::Whole(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Body::Stream(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Whole(body) => body.is_end_stream(),
            Body::Stream(_) => false,
        }
    }

    fn size_hint(&self) -> body::SizeHint {
        match self {
            Body::Whole(body) => body.size_hint(),
            Body::Stream(_) => body::SizeHint::default(),
        }
    }
}

/// The connection is to be ended without an answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Cut(#[from] wire::Unreadable);

/// The paths that [`Transport::handle`] answers.
pub fn is_raft(path: &str) -> bool {
    matches!(path, "/raft" | "/raft/snapshot" | probe::PATH) || path.starts_with("/raft/stream/")
}

type Answer = Response<Body>;

fn refuse(status: StatusCode, text: &str) -> Answer {
    let mut answer = Response::new(Body::Whole(Full::from(format!("{text}\n"))));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

fn wrong_method(allowed: &'static str) -> Answer {
    let mut answer = refuse(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
    answer
}

fn done() -> Answer {
    let mut answer = Response::new(Body::Whole(Full::default()));
    *answer.status_mut() = StatusCode::NO_CONTENT;
    answer
}

impl Transport {
    /// Answers a request under `/raft`. Must be called on the arbiter of the transport.
    pub async fn handle<B>(&self, request: Request<B>) -> Result<Response<Body>, Cut>
    where
        B: body::Body<Data = Bytes> + Unpin,
        B::Error: std::error::Error + 'static,
    {
        let path = request.uri().path();
        if path == probe::PATH {
            let mut answer = Response::new(Body::Whole(Full::from(probe::answer())));
            let json = HeaderValue::from_static("text/plain; charset=utf-8");
            answer.headers_mut().insert(header::CONTENT_TYPE, json);
            return Ok(answer);
        }
        let is_stream = path.starts_with("/raft/stream/");
        let method = if is_stream { Method::GET } else { Method::POST };
        if request.method() != method {
            return Ok(wrong_method(if is_stream { "GET" } else { "POST" }));
        }
        let mut answer = match self.check(&request)? {
            Some(refusal) => refusal,
            None if is_stream => self.accept_stream(&request),
            None => {
                self.remember_sender(&request);
                if path == "/raft" { self.take_message(request).await } else { self.take_database(request).await }
            }
        };
        let headers = answer.headers_mut();
        headers.insert(wire::CLUSTER_ID, HeaderValue::from_str(&hex(self.shared.cluster_id)).expect("hex is a header"));
        if is_stream {
            headers.insert(wire::SERVER_VERSION, HeaderValue::from_static(ETCD_VERSION));
        }
        Ok(answer)
    }

    fn check<B>(&self, request: &Request<B>) -> Result<Option<Answer>, Cut> {
        if !wire::is_compatible(request.headers())? {
            if let Some(unsaid) = self.shared.tell(Refused::Version) {
                tracing::warn!(
                    peer = wire::text(request.headers(), wire::SERVER_FROM),
                    version = wire::text(request.headers(), wire::SERVER_VERSION),
                    unsaid,
                    "refused a peer of an incompatible version"
                );
            }
            return Ok(Some(refuse(StatusCode::PRECONDITION_FAILED, "incompatible version")));
        }
        if wire::text(request.headers(), wire::CLUSTER_ID) != hex(self.shared.cluster_id) {
            if let Some(unsaid) = self.shared.tell(Refused::Cluster) {
                tracing::warn!(
                    peer = wire::text(request.headers(), wire::SERVER_FROM),
                    cluster = wire::text(request.headers(), wire::CLUSTER_ID),
                    unsaid,
                    "refused a peer of another cluster"
                );
            }
            return Ok(Some(refuse(StatusCode::PRECONDITION_FAILED, "cluster ID mismatch")));
        }
        Ok(None)
    }

    /// Who is no peer is counted under 0: anybody may claim any id.
    fn numbers_of_sender(&self, headers: &HeaderMap) -> Arc<PeerNumbers> {
        let sender = wire::parse_id(wire::text(headers, wire::SERVER_FROM)).filter(|id| self.peer(*id).is_some());
        self.shared.numbers.of(sender.unwrap_or(0))
    }

    fn remember_sender<B>(&self, request: &Request<B>) {
        if let Some(id) = wire::parse_id(wire::text(request.headers(), wire::SERVER_FROM)) {
            self.remember(id, request);
        }
    }

    fn remember<B>(&self, id: u64, request: &Request<B>) {
        let urls = wire::text(request.headers(), wire::PEER_URLS);
        if !urls.is_empty() && self.peer(id).is_none() {
            self.add_remote(id, &urls.split(',').map(str::to_owned).collect::<Vec<_>>());
        }
    }

    fn accept_stream<B>(&self, request: &Request<B>) -> Answer {
        let path = request.uri().path();
        let tail = path.strip_prefix("/raft/stream/").unwrap_or_default();
        let kind = [Kind::Append, Kind::Message].into_iter().find_map(|kind| {
            let from = tail.strip_prefix(kind.path())?.strip_prefix('/')?;
            (!from.contains('/')).then_some((kind, from))
        });
        let Some((kind, from)) = kind else { return refuse(StatusCode::NOT_FOUND, "invalid path") };
        let Some(from) = wire::parse_id(from) else { return refuse(StatusCode::NOT_FOUND, "invalid from") };
        if self.shared.incoming.is_removed(from) {
            if let Some(unsaid) = self.shared.tell(Refused::Removed) {
                tracing::warn!(peer = hex(from), unsaid, "refused a stream of a removed member");
            }
            return refuse(StatusCode::GONE, "removed member");
        }
        let Some(peer) = self.peer(from).filter(|peer| !peer.is_remote) else {
            // It may have been added, and this member not have heard of it yet: it tries again.
            self.remember(from, request);
            return refuse(StatusCode::NOT_FOUND, "error sender not found");
        };
        if wire::text(request.headers(), wire::RAFT_TO) != hex(self.shared.member_id) {
            return refuse(StatusCode::PRECONDITION_FAILED, "to field mismatch");
        }
        let sender = peer.sender.clone();
        let (queue, body) = stream(kind, peer.numbers.clone(), move || {
            sender.control(Control::Ended(kind));
        });
        peer.sender.control(Control::Dialled(kind, queue));
        tracing::debug!(peer = hex(from), stream = kind.path(), "a peer has dialled a stream");
        Response::new(Body::Stream(body))
    }

    async fn take_message<B>(&self, request: Request<B>) -> Answer
    where
        B: body::Body<Data = Bytes> + Unpin,
        B::Error: std::error::Error + 'static,
    {
        let numbers = self.numbers_of_sender(request.headers());
        let failed = |status, text| {
            numbers.received_failures.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            refuse(status, text)
        };
        let mut body = request.into_body();
        let mut bytes = BytesMut::new();
        loop {
            match timeout(STREAM_STEP, body.frame()).await {
                Ok(None) => break,
                Ok(Some(Ok(frame))) => bytes.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Ok(Some(Err(_))) | Err(_) => return failed(StatusCode::BAD_REQUEST, "error reading raft message"),
            }
            if bytes.len() as u64 > codec::MESSAGE_MAX {
                return failed(StatusCode::BAD_REQUEST, "error reading raft message");
            }
        }
        let Ok(message) = codec::message_from(&bytes) else {
            return failed(StatusCode::BAD_REQUEST, "error unmarshalling raft message");
        };
        numbers.received_bytes.fetch_add(bytes.len() as u64, std::sync::atomic::Ordering::Relaxed);
        if let Err(e) = self.shared.deliver(message) {
            tracing::debug!("dropped a {e}");
            let mut answer = failed(StatusCode::INTERNAL_SERVER_ERROR, "error processing raft message");
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            return answer;
        }
        done()
    }

    async fn take_database<B>(&self, request: Request<B>) -> Answer
    where
        B: body::Body<Data = Bytes> + Unpin,
        B::Error: std::error::Error + 'static,
    {
        let numbers = self.numbers_of_sender(request.headers());
        let transfer = Snapshots::begin(&numbers, |numbers| &numbers.snapshots_received);
        let mut body = request.into_body();
        let undecodable =
            |reason: String| refuse(StatusCode::BAD_REQUEST, &format!("failed to decode raft message ({reason})"));
        let mut head = SnapshotHead::default();
        let (message, first) = loop {
            let chunk = match next(&mut body).await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return undecodable(head.cut_off().to_owned()),
                Err(e) => return undecodable(e.to_string()),
            };
            match head.push(&chunk) {
                Ok(None) => {}
                Ok(Some(found)) => break found,
                Err(codec::Error::TooLong(_)) => return undecodable("rafthttp: error limit exceeded".to_owned()),
                Err(e) => return undecodable(e.to_string()),
            }
        };
        if message.r#type() != MessageType::MsgSnap {
            return refuse(StatusCode::BAD_REQUEST, "wrong raft message type");
        }
        let (from, to) = (message.from(), message.to());
        if to != self.shared.member_id || self.shared.incoming.is_removed(from) {
            let reason = wire::Misdirected { from, to };
            let text = format!("failed to process raft message ({reason})");
            return refuse(StatusCode::INTERNAL_SERVER_ERROR, &text);
        }
        tracing::info!(peer = hex(from), "receiving a database snapshot");
        let (sender, chunks) = mpsc::channel(CHUNKS_MAX);
        let feed = async move {
            let mut total = first.len();
            if !first.is_empty() && sender.send(Ok(first)).await.is_err() {
                return total;
            }
            loop {
                let chunk = match next(&mut body).await {
                    Ok(None) => return total,
                    Ok(Some(chunk)) => Ok(chunk),
                    Err(e) => Err(e),
                };
                let last = chunk.is_err();
                total += chunk.as_ref().map_or(0, Bytes::len);
                if sender.send(chunk).await.is_err() || last {
                    return total;
                }
            }
        };
        let (total, received) = future::join(feed, self.shared.databases.receive(message, chunks)).await;
        numbers.received_bytes.fetch_add(total as u64, std::sync::atomic::Ordering::Relaxed);
        match received {
            Ok(()) => {
                transfer.done();
                tracing::info!(peer = hex(from), bytes = total, "received a database snapshot");
                done()
            }
            Err(reason) => {
                tracing::warn!(peer = hex(from), "cannot take in a database snapshot: {reason}");
                refuse(StatusCode::INTERNAL_SERVER_ERROR, &reason)
            }
        }
    }
}

/// The next bytes of a body, within the time one read may take.
async fn next<B>(body: &mut B) -> io::Result<Option<Bytes>>
where
    B: body::Body<Data = Bytes> + Unpin,
    B::Error: std::error::Error + 'static,
{
    match timeout(STREAM_STEP, body.frame()).await {
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "i/o timeout")),
        Ok(None) => Ok(None),
        Ok(Some(Ok(frame))) => Ok(Some(frame.into_data().unwrap_or_default())),
        Ok(Some(Err(e))) => Err(io::Error::other(super::dial::chain(&e))),
    }
}
