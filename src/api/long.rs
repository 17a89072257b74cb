//! Reads too long for the thread of their connection: on the runtime's reader threads, in pieces as the client takes
//! them or whole, inside the memory that the gates `answer_pieces` and `answers_whole` give out.
//!
//! What a range holds is `mvcc::range`'s business; here is when it is read, and by whom.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use prost::Message;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, body::Body};

use super::Server;
use crate::{
    actor::Permit,
    apply::View,
    mvcc::{
        self,
        range::{Bounds, RangeCursor},
    },
    pb::etcdserverpb::{RangeRequest, RangeResponse, RangeStreamResponse, ResponseHeader},
};

/// What is read on the thread of its connection: a moment that others do not notice.
pub const SHORT: Bounds = Bounds { keys: 1_000, bytes: 256 << 10 };
/// Rows of one piece or part, unless a single one is larger.
const PIECE_BYTES: usize = 1 << 20;
/// The largest message etcd's gRPC library sends.
const MESSAGE_BYTES_MAX: u64 = i32::MAX as u64;
/// A gRPC message begins with a flag and its length in 4 bytes.
const MESSAGE_HEAD_BYTES: usize = 5;
/// First and smallest parts of a stream (KV-34).
const PART_KEYS_FIRST: usize = 10;

/// Marks a request whose answer's body may be exchanged: it came in as gRPC.
#[derive(Clone, Copy, Debug)]
struct InPieces;

/// What becomes of the body that tonic makes of an answer. Travels in the answer's extensions, which must be `Clone`.
#[derive(Clone)]
struct Exchange(Arc<Mutex<Option<ExchangeBody>>>);

type ExchangeBody = Box<dyn FnOnce(Body) -> Body + Send>;

pub fn mark<B>(request: &mut http::Request<B>) {
    request.extensions_mut().insert(InPieces);
}

/// False for callers inside the process, who take the answer as it is.
pub fn may_be_in_pieces<T>(request: &Request<T>) -> bool {
    request.extensions().get::<InPieces>().is_some()
}

fn exchange_body<T>(response: &mut Response<T>, exchange: impl FnOnce(Body) -> Body + Send + 'static) {
    response.extensions_mut().insert(Exchange(Arc::new(Mutex::new(Some(Box::new(exchange))))));
}

/// Gives an answer the body that its handler asked for.
pub fn finish(response: http::Response<Body>) -> http::Response<Body> {
    let Some(Exchange(exchange)) = response.extensions().get::<Exchange>().cloned() else { return response };
    let exchange = exchange.lock().unwrap_or_else(PoisonError::into_inner).take();
    match exchange {
        Some(exchange) => response.map(exchange),
        None => response,
    }
}

/// Runs `read` on a reader thread.
async fn on_reader<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(read).await.map_err(|e| Status::internal(e.to_string()))
}

/// Reads an answer in one go, after it has waited for the memory that it takes until it is sent.
pub async fn whole<T: Send + 'static>(
    server: &Arc<Server>,
    view: Arc<View>,
    weigh: impl FnOnce(&View) -> usize + Send + 'static,
    read: impl Fn(&View) -> Result<T, mvcc::Error> + Send + 'static,
) -> Result<(Arc<View>, Response<T>), Status> {
    let weighed = view.clone();
    let bytes = on_reader(move || weigh(&weighed)).await?;
    // Its records, and their encoding.
    let permit = server.answers_whole.enter(bytes.saturating_mul(2)).await;
    let reader = server.clone();
    let (view, answer) = on_reader(move || reader.read(view, read)).await??;
    let mut response = Response::new(answer);
    exchange_body(&mut response, |body| Body::new(body.map_frame(move |frame| held(frame, &permit))));
    Ok((view, response))
}

/// Keeps `permit` for as long as there may be more frames.
fn held(frame: Frame<Bytes>, _permit: &Permit) -> Frame<Bytes> {
    frame
}

/// A range under way.
struct Reading {
    server: Arc<Server>,
    cursor: RangeCursor,
    /// Of the piece that the transport has.
    permit: Option<Permit>,
}

impl Reading {
    /// The next records, once there is memory for them.
    async fn next(mut self, keys: usize) -> (Self, Result<RangeResponse, Status>) {
        // Who asks for a piece has sent the one before it.
        self.permit = None;
        self.permit = Some(self.server.answer_pieces.enter(PIECE_BYTES).await);
        let server = self.server.clone();
        let mut cursor = self.cursor.clone();
        let read = on_reader(move || {
            loop {
                let view = server.view.load_full();
                match cursor.next_chunk(&view.kv, &*server.storage, keys, PIECE_BYTES) {
                    Err(mvcc::Error::ViewOutdated) => {}
                    done => return (cursor, done),
                }
            }
        });
        match read.await {
            Ok((cursor, part)) => {
                self.cursor = cursor;
                (self, part.map_err(Status::from))
            }
            Err(e) => (self, Err(e)),
        }
    }
}

/// A range in key order as one message, whose length comes first.
pub async fn in_pieces(
    server: &Arc<Server>,
    view: Arc<View>,
    req: RangeRequest,
) -> Result<Response<RangeResponse>, Status> {
    let permit = server.answer_pieces.enter(PIECE_BYTES).await;
    let reader = server.clone();
    let begin = move || {
        // Length and first piece from one view, so that a short answer is not overtaken by compaction.
        reader.read(view, |view| {
            let mut cursor = RangeCursor::new(&view.kv, &*reader.storage, &req)?;
            let records = cursor.encoded_bytes(&view.kv);
            let first = cursor.next_chunk(&view.kv, &*reader.storage, usize::MAX, PIECE_BYTES)?;
            Ok((cursor, records, first))
        })
    };
    let (view, (cursor, records, first)) = on_reader(begin).await??;

    // The fields of the message in their order, as three messages: a message's encoding is that of its parts.
    let head = RangeResponse { header: Some(server.header_of(&view)), ..Default::default() };
    let tail = RangeResponse { count: cursor.count(), more: cursor.more(), ..Default::default() }.encode_to_vec();
    let length = head.encoded_len() as u64 + records + tail.len() as u64;
    if length > MESSAGE_BYTES_MAX {
        let text = format!("grpc: trying to send message larger than max ({length} vs. {MESSAGE_BYTES_MAX})");
        return Err(Status::resource_exhausted(text));
    }
    let mut piece = BytesMut::with_capacity(MESSAGE_HEAD_BYTES + head.encoded_len() + PIECE_BYTES);
    piece.put_u8(0);
    piece.put_u32(length as u32);
    head.encode(&mut piece).expect("a buffer that grows");
    let mut message =
        InOneMessage { reading: Reading { server: server.clone(), cursor, permit: Some(permit) }, records, tail };
    let first = message.add(piece, first.kvs)?;

    let mut response = Response::new(RangeResponse::default());
    exchange_body(&mut response, move |_| Body::new(StreamBody::new(message.frames(first))));
    Ok(response)
}

struct InOneMessage {
    reading: Reading,
    /// Bytes of records that the length promises and that are still to come.
    records: u64,
    /// What follows the last record.
    tail: Vec<u8>,
}

impl InOneMessage {
    /// Puts records behind `piece`, and the message's end behind the last.
    fn add(&mut self, mut piece: BytesMut, kvs: Vec<mvcc::record::RawKeyValue>) -> Result<Bytes, Status> {
        let records = RangeResponse { kvs, ..Default::default() };
        let bytes = records.encoded_len() as u64;
        let is_last = self.reading.cursor.is_done();
        match self.records.checked_sub(bytes) {
            Some(left) if (left == 0) == is_last => self.records = left,
            // A row is not of the size that the index was told.
            _ => return Err(Status::internal("damaged key row: it is not of the size it was written in")),
        }
        piece.reserve(bytes as usize + self.tail.len());
        records.encode(&mut piece).expect("a buffer with room");
        if is_last {
            piece.put_slice(&self.tail);
        }
        Ok(piece.freeze())
    }

    fn frames(self, first: Bytes) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> {
        enum Next {
            Data(Bytes),
            Records,
            Trailers(Status),
            Nothing,
        }
        let after = |message: &Self| match message.reading.cursor.is_done() {
            true => Next::Trailers(Status::ok("")),
            false => Next::Records,
        };
        stream::unfold((self, Next::Data(first)), move |(mut message, next)| async move {
            let next = match next {
                Next::Records => {
                    let (reading, part) = message.reading.next(usize::MAX).await;
                    message.reading = reading;
                    match part.and_then(|part| message.add(BytesMut::new(), part.kvs)) {
                        Ok(piece) => Next::Data(piece),
                        Err(status) => Next::Trailers(status),
                    }
                }
                other => other,
            };
            match next {
                Next::Data(piece) => {
                    let after = after(&message);
                    Some((Ok(Frame::data(piece)), (message, after)))
                }
                Next::Trailers(status) => {
                    let mut trailers = HeaderMap::new();
                    let _ = status.add_header(&mut trailers);
                    Some((Ok(Frame::trailers(trailers)), (message, Next::Nothing)))
                }
                Next::Records | Next::Nothing => None,
            }
        })
    }
}

/// The messages of a `RangeStream`.
pub fn parts(
    server: &Arc<Server>,
    view: Arc<View>,
    req: &RangeRequest,
) -> Result<impl Stream<Item = Result<RangeStreamResponse, Status>> + Send + 'static, mvcc::Error> {
    let cursor = RangeCursor::new(&view.kv, &*server.storage, req)?;
    let header = server.header_of(&view);
    let reading = Reading { server: server.clone(), cursor, permit: None };
    Ok(stream::unfold(Some((reading, PART_KEYS_FIRST)), move |state| async move {
        let (reading, keys) = state.filter(|(reading, _)| !reading.cursor.is_done())?;
        let (reading, part) = reading.next(keys).await;
        match part {
            Ok(part) => {
                let keys = keys_after(keys, part.encoded_len(), reading.server.settings.max_request_bytes);
                Some((Ok(part_message(part, &reading, header)), Some((reading, keys))))
            }
            Err(e) => Some((Err(e), None)),
        }
    }))
}

fn part_message(mut part: RangeResponse, reading: &Reading, header: ResponseHeader) -> RangeStreamResponse {
    if reading.cursor.is_done() {
        part.header = Some(header);
    }
    RangeStreamResponse { range_response: Some(part) }
}

/// How many keys the part after one of `bytes` may hold (KV-34).
fn keys_after(keys: usize, bytes: usize, target: usize) -> usize {
    if bytes < target / 2 {
        keys.saturating_mul(2)
    } else if bytes > target.saturating_mul(2) {
        (keys / 2).max(1)
    } else {
        keys
    }
}
