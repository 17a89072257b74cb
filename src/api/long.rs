//! Reads too long for the thread of their connection: on the runtime's reader threads, in pieces as the client takes
//! them or whole. A client that takes nothing keeps nobody waiting, and what is kept for it is bounded.
//!
//! What a range holds is `mvcc::range`'s business; here is when it is read, and by whom.
//!
//! **Memory.** HTTP/2 has one frame of an answer and asks for the next before it can send it, so two wait for a client.
//! * A piece is of up to 1 MiB while the gate `answer_pieces` (64 MiB) has room for it, and else of up to 32 KiB, without
//!   a permit: nobody waits for room. All pieces: 64 MiB, and two small ones for each long answer that is not taken
//!   (or two rows, where one is larger), less than its client could keep waiting by asking for short answers.
//! * A whole answer waits for its room in `answers_whole` (64 MiB; a larger one goes alone), a request's time at most. It
//!   stands outside of HTTP/2, which gets copies of 64 KiB of it. One that is taken too slowly is cut off when another
//!   waits for its room.
//!
//! Permits live as long as the bytes they are for: inside of them, and with whoever makes them.

use std::{
    convert::Infallible,
    io::Write,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use flate2::{Compression, write::GzEncoder};
use futures_util::stream;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::StreamBody;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Response, Status, body::Body};

use super::Server;
use crate::{
    actor::{Gate, Permit},
    apply::View,
    mvcc::{
        self,
        range::{Bounds, RangeCursor},
    },
    pb::etcdserverpb::{RangeRequest, RangeResponse, RangeStreamResponse, ResponseHeader},
};

/// What is read on the thread of its connection: a moment that others do not notice.
pub const SHORT: Bounds = Bounds { keys: 1_000, bytes: 256 << 10 };
/// Rows of one piece or part, unless a single one is larger: while there is room, and when there is none.
const PIECE_BYTES: usize = 1 << 20;
const SMALL_PIECE_BYTES: usize = 32 << 10;
/// What HTTP/2 gets of a whole answer at once.
const SLICE_BYTES: usize = 64 << 10;
/// A whole answer makes room for one that waits when nothing of it was taken for so long, or when less was taken since it
/// began, but for this time at first, than so much in each second.
const TAKEN_WITHIN: Duration = Duration::from_secs(1);
const TAKEN_A_SECOND: usize = 1 << 20;
/// The largest message etcd's gRPC library sends.
const MESSAGE_BYTES_MAX: u64 = i32::MAX as u64;
/// A gRPC message begins with a flag and its length in 4 bytes.
const MESSAGE_HEAD_BYTES: usize = 5;
/// First and smallest parts of a stream (KV-34).
const PART_KEYS_FIRST: usize = 10;

/// What becomes of the body that tonic makes of an answer. Travels in the answer's extensions, which must be `Clone`.
#[derive(Clone)]
struct Exchange(Arc<Mutex<Option<ExchangeBody>>>);

type ExchangeBody = Box<dyn FnOnce() -> Body + Send>;

/// An answer with the body that `pieces` make, whatever its `message` is.
fn answer_of<T>(message: T, pieces: impl Stream<Item = Result<Bytes, Status>> + Send + 'static) -> Response<T> {
    let frames = stream::unfold(Some(Box::pin(pieces)), |pieces| async {
        let mut pieces = pieces?;
        Some(match pieces.next().await {
            Some(Ok(piece)) => (Frame::data(piece), Some(pieces)),
            Some(Err(status)) => (trailers(&status), None),
            None => (trailers(&Status::ok("")), None),
        })
    });
    let body = || Body::new(StreamBody::new(frames.map(Ok::<_, Infallible>)));
    let mut response = Response::new(message);
    response.extensions_mut().insert(Exchange(Arc::new(Mutex::new(Some(Box::new(body))))));
    response
}

fn trailers(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    let _ = status.add_header(&mut trailers);
    Frame::trailers(trailers)
}

/// Gives an answer the body that its handler asked for.
pub fn finish(response: http::Response<Body>) -> http::Response<Body> {
    let Some(Exchange(exchange)) = response.extensions().get::<Exchange>().cloned() else { return response };
    let exchange = exchange.lock().unwrap_or_else(PoisonError::into_inner).take();
    match exchange {
        Some(exchange) => response.map(|_| exchange()),
        None => response,
    }
}

/// Runs `read` on a reader thread.
async fn on_reader<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(read).await.map_err(|e| Status::internal(e.to_string()))
}

/// Begins a message of `length` bytes.
fn message_head(length: u64, room: usize) -> Result<BytesMut, Status> {
    if length > MESSAGE_BYTES_MAX {
        let text = format!("grpc: trying to send message larger than max ({length} vs. {MESSAGE_BYTES_MAX})");
        return Err(Status::resource_exhausted(text));
    }
    let mut message = BytesMut::with_capacity(MESSAGE_HEAD_BYTES + room);
    message.put_u8(0);
    message.put_u32(length as u32);
    Ok(message)
}

fn encoded<M: Message>(message: &M) -> Result<BytesMut, Status> {
    let length = message.encoded_len();
    let mut bytes = message_head(length as u64, length)?;
    message.encode(&mut bytes).expect("a buffer with room");
    Ok(bytes)
}

/// An encoded message as gzip.
fn compressed(message: &[u8]) -> BytesMut {
    let mut gzip = GzEncoder::new(BytesMut::zeroed(MESSAGE_HEAD_BYTES).writer(), Compression::default());
    let packed = gzip.write_all(&message[MESSAGE_HEAD_BYTES..]).and_then(|()| gzip.finish());
    let mut packed = packed.expect("memory takes all").into_inner();
    let length = packed.len() - MESSAGE_HEAD_BYTES;
    packed[0] = 1;
    packed[1..MESSAGE_HEAD_BYTES].copy_from_slice(&(length as u32).to_be_bytes());
    packed
}

/// Reads an answer in one go, after it has waited for the memory that it takes until it is sent. What else `read` found
/// comes back with it.
pub async fn whole<T: Message + Default + 'static, X: Send + 'static>(
    server: &Arc<Server>,
    view: Arc<View>,
    weigh: impl FnOnce(&View) -> usize + Send + 'static,
    read: impl Fn(&View) -> Result<(T, X), mvcc::Error> + Send + 'static,
) -> Result<(Response<T>, X), Status> {
    let weighed = view.clone();
    let bytes = on_reader(move || weigh(&weighed)).await?;
    let limit = server.settings.request_timeout;
    // Its records, and their encoding.
    let room = server.answers_whole.enter(bytes.saturating_mul(2));
    let permit = tokio::time::timeout(limit, room).await.map_err(|_| {
        Status::resource_exhausted(format!(
            "etcdserver: too many long answers at once, no memory for one more in {limit:?}"
        ))
    })?;
    let reader = server.clone();
    let read = move || {
        let (_, (answer, found)) = reader.read(view, read)?;
        Ok((encoded(&answer)?.freeze(), found))
    };
    let ((message, found), permit) = in_room(permit, read).await?;
    let (slices, taken) = mpsc::channel(1);
    tokio::spawn(hand_out(message, permit, server.answers_whole.clone(), slices));
    Ok((answer_of(T::default(), ReceiverStream::new(taken)), found))
}

/// Makes something on a reader thread. Its room stays taken until it is made or given up, whether or not anybody still
/// waits for it: a thread cannot be called off. What nobody waits for any more is not begun.
async fn in_room<T: Send + 'static>(
    permit: Permit,
    make: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<(T, Permit), Status> {
    let waiting = Arc::new(());
    let waits = Arc::downgrade(&waiting);
    let made = on_reader(move || {
        if waits.strong_count() == 0 {
            return Err(Status::cancelled("nobody waits for it"));
        }
        Ok((make()?, permit))
    });
    let made = made.await?;
    drop(waiting);
    made
}

/// Whether so few bytes of an answer were `taken` that it makes room for others.
fn is_slow(taken: usize, since: Duration) -> bool {
    (taken as f64) < since.saturating_sub(TAKEN_WITHIN).as_secs_f64() * TAKEN_A_SECOND as f64
}

/// Gives a message away as it is taken, unless its client is gone, or is slow while others wait at `gate`.
async fn hand_out(message: Bytes, permit: Permit, gate: Gate, slices: mpsc::Sender<Result<Bytes, Status>>) {
    let (began, mut taken) = (Instant::now(), 0);
    for slice in message.chunks(SLICE_BYTES) {
        let place = loop {
            let place = match tokio::time::timeout(TAKEN_WITHIN, slices.reserve()).await {
                Ok(Ok(place)) => Some(place),
                Ok(Err(_)) => return,
                Err(_) => None,
            };
            if gate.waiting() > 0 && (place.is_none() || is_slow(taken, began.elapsed())) {
                drop((message, permit, place));
                let text = "etcdserver: the answer was taken too slowly while others waited for its memory";
                let _ = slices.send(Err(Status::unavailable(text))).await;
                return;
            }
            if let Some(place) = place {
                break place;
            }
        };
        taken += slice.len();
        // A part of the message itself would keep all of it.
        place.send(Ok(Bytes::copy_from_slice(slice)));
    }
}

/// Bytes on their way, and the room that is kept for them.
struct Held {
    bytes: Bytes,
    _permit: Permit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A piece is about to be read.
struct Room(Option<Permit>);

impl Room {
    fn of(server: &Server) -> Self {
        Self(server.answer_pieces.try_enter(PIECE_BYTES))
    }

    fn bytes(&self) -> usize {
        if self.0.is_some() { PIECE_BYTES } else { SMALL_PIECE_BYTES }
    }

    /// The piece as it is sent. It keeps what it takes of the room.
    fn hold(self, piece: BytesMut) -> Bytes {
        let bytes = piece.freeze();
        match self.0 {
            Some(mut permit) if bytes.len() > SMALL_PIECE_BYTES => {
                permit.shrink_to(bytes.len());
                Bytes::from_owner(Held { bytes, _permit: permit })
            }
            _ => bytes,
        }
    }
}

/// A range under way.
struct Reading {
    server: Arc<Server>,
    cursor: RangeCursor,
}

impl Reading {
    /// The next records, and the room that they have.
    async fn next(&mut self, keys: usize) -> Result<(RangeResponse, Room), Status> {
        let server = self.server.clone();
        let mut cursor = self.cursor.clone();
        let read = move || {
            // Now that a thread is there for it.
            let room = Room::of(&server);
            loop {
                let view = server.view.load_full();
                match cursor.next_chunk(&view.kv, &*server.storage, keys, room.bytes()) {
                    Err(mvcc::Error::ViewOutdated) => {}
                    done => return done.map(|part| (cursor, part, room)),
                }
            }
        };
        let (cursor, part, room) = on_reader(read).await??;
        self.cursor = cursor;
        Ok((part, room))
    }
}

/// A range in key order as one message, whose length comes first.
pub async fn in_pieces(
    server: &Arc<Server>,
    view: Arc<View>,
    req: RangeRequest,
) -> Result<Response<RangeResponse>, Status> {
    let reader = server.clone();
    let begin = move || {
        let room = Room::of(&reader);
        // Length and first piece from one view, so that a short answer is not overtaken by compaction.
        let begun = reader.read(view, |view| {
            let mut cursor = RangeCursor::new(&view.kv, &*reader.storage, &req)?;
            let records = cursor.encoded_bytes(&view.kv);
            let first = cursor.next_chunk(&view.kv, &*reader.storage, usize::MAX, room.bytes())?;
            Ok((cursor, records, first))
        });
        begun.map(|begun| (begun, room))
    };
    let ((view, (cursor, records, first)), room) = on_reader(begin).await??;

    // The fields of the message in their order, as three messages: a message's encoding is that of its parts.
    let head = RangeResponse { header: Some(server.header_of(&view)), ..Default::default() };
    let tail = RangeResponse { count: cursor.count(), more: cursor.more(), ..Default::default() }.encode_to_vec();
    let length = head.encoded_len() as u64 + records + tail.len() as u64;
    let mut piece = message_head(length, head.encoded_len())?;
    head.encode(&mut piece).expect("a buffer that grows");
    let reading = Reading { server: server.clone(), cursor };
    let mut message = InOneMessage { reading, records, tail };
    let first = room.hold(message.add(piece, first.kvs)?);
    let pieces = stream::try_unfold((message, Some(first)), |(mut message, first)| async move {
        Ok(match first {
            Some(first) => Some((first, (message, None))),
            None => message.next().await?.map(|piece| (piece, (message, None))),
        })
    });
    Ok(answer_of(RangeResponse::default(), pieces))
}

struct InOneMessage {
    reading: Reading,
    /// Bytes of records that the length promises and that are still to come.
    records: u64,
    /// What follows the last record.
    tail: Vec<u8>,
}

impl InOneMessage {
    async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        if self.reading.cursor.is_done() {
            return Ok(None);
        }
        let (part, room) = self.reading.next(usize::MAX).await?;
        Ok(Some(room.hold(self.add(BytesMut::new(), part.kvs)?)))
    }

    /// Puts records behind `piece`, and the message's end behind the last.
    fn add(&mut self, mut piece: BytesMut, kvs: Vec<mvcc::record::RawKeyValue>) -> Result<BytesMut, Status> {
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
        Ok(piece)
    }
}

/// What stands for a stream of messages until its answer gets its body.
pub type Replaced<T> = tokio_stream::Empty<Result<T, Status>>;

/// The messages of a `RangeStream`. If they are to be compressed, those are that are no work for the thread of the
/// connection.
pub fn parts(
    server: &Arc<Server>,
    view: &View,
    req: &RangeRequest,
    is_compressed: bool,
) -> Result<Response<Replaced<RangeStreamResponse>>, mvcc::Error> {
    let cursor = RangeCursor::new(&view.kv, &*server.storage, req)?;
    let header = server.header_of(view);
    let reading = Reading { server: server.clone(), cursor };
    let parts = stream::try_unfold((reading, PART_KEYS_FIRST), move |(mut reading, keys)| async move {
        if reading.cursor.is_done() {
            return Ok(None);
        }
        let (part, room) = reading.next(keys).await?;
        let keys = keys_after(keys, part.encoded_len(), reading.server.settings.max_request_bytes);
        let message = encoded(&part_message(part, &reading, header))?;
        let is_short = message.len() - MESSAGE_HEAD_BYTES <= SHORT.bytes;
        let message = if is_compressed && is_short { compressed(&message) } else { message };
        Ok(Some((room.hold(message), (reading, keys))))
    });
    Ok(answer_of(tokio_stream::empty(), parts))
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

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// One reader thread, so that what is read next can be held up.
    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap()
    }

    #[test]
    fn room_stays_taken_while_a_read_goes_on_that_nobody_waits_for() {
        runtime().block_on(async {
            let gate = Gate::new("test", 2, 10);
            let (go_on, held_up) = std::sync::mpsc::channel::<()>();
            let (begins, begun) = oneshot::channel();
            let made = in_room(gate.enter(10).await, move || {
                begins.send(()).unwrap();
                let _ = held_up.recv();
                Ok(())
            });
            // Its caller goes when it has begun.
            tokio::select! {
                _ = made => panic!("it is held up"),
                begun = begun => begun.unwrap(),
            }
            assert_eq!(gate.usage_bytes(), (10, 10));
            drop(go_on);
            tokio::time::timeout(PATIENCE, gate.enter(10)).await.expect("room, when it has ended");
        });
    }

    #[test]
    fn what_nobody_waits_for_is_not_read() {
        runtime().block_on(async {
            let gate = Gate::new("test", 2, 10);
            let (go_on, held_up) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || _ = held_up.recv());
            let (reads, read) = oneshot::channel();
            let made = in_room(gate.enter(10).await, || reads.send(()).map_err(|()| unreachable!("it is listened to")));
            assert!(tokio::time::timeout(Duration::ZERO, made).await.is_err(), "the thread is busy");
            assert_eq!(gate.usage_bytes(), (10, 10));
            drop(go_on);
            busy.await.unwrap();
            assert!(read.await.is_err(), "read for nobody");
            tokio::time::timeout(PATIENCE, gate.enter(10)).await.expect("room, when the thread has seen it");
        });
    }

    #[test]
    fn an_answer_is_slow_below_a_mebibyte_a_second_after_the_first() {
        let is_slow = |taken, ms| is_slow(taken, Duration::from_millis(ms));
        assert!(!is_slow(0, 1_000) && is_slow(0, 1_001));
        assert!(!is_slow(1 << 20, 2_000) && is_slow((1 << 20) - 1, 2_000) && is_slow(1 << 20, 2_001));
        // One slice each 0.9 s.
        assert!(!is_slow(64 << 10, 900) && is_slow(128 << 10, 1_800) && is_slow(128 << 10, 3_600));
        assert!(!is_slow(60 << 20, 61_000) && is_slow(60 << 20, 61_001));
    }

    #[test]
    fn who_takes_little_by_little_keeps_the_room_until_another_waits() {
        runtime().block_on(async {
            const SLICES: usize = 200;
            let gate = Gate::new("test", 2, 10);
            let permit = gate.enter(10).await;
            let (slices, mut taken) = mpsc::channel(1);
            let message = Bytes::from(vec![0; SLICES * SLICE_BYTES]);
            tokio::spawn(hand_out(message, permit, gate.clone(), slices));
            let slow = async {
                let mut ends_well = 0;
                while let Some(slice) = taken.recv().await {
                    match slice {
                        Ok(_) => ends_well += 1,
                        Err(status) => return (ends_well, status),
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                panic!("the whole answer was handed out");
            };
            let begun = Instant::now();
            let (room, (slices, status)) = tokio::join!(tokio::time::timeout(PATIENCE, gate.enter(10)), slow);
            room.expect("the slow one makes room");
            assert!(begun.elapsed() > TAKEN_WITHIN && slices < SLICES / 2, "{slices} slices");
            assert_eq!(status.code(), tonic::Code::Unavailable);
        });
    }
}
