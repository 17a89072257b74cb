//! The bytes between members: three framings of [`Message`], to and from.
//!
//! Encoders append to a buffer. Decoders take chunks as they come from the network, wherever these are cut, and give
//! messages back; whatever a chunk holds, they answer with a message, "more", or an error. What they keep in memory is
//! bounded by what has arrived and by the limits below. Decoded bytes are copies of exact size: an entry that stays in
//! the log does not hold on to the buffer it came in.
//!
//! Not here: which message goes on which channel.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;
use prost::encoding::{DecodeContext, decode_key, skip_field};

use crate::pb::raftpb::{Entry, Message, MessageType};

/// Most bytes of one message on a stream or the pipeline.
pub const MESSAGE_MAX: u64 = 512 << 20;
/// Most bytes of the message before a database.
pub const SNAPSHOT_MESSAGE_MAX: u64 = 64 << 20;
/// Most entries of one message. Members send about 1 MiB of entries at once, none smaller than a few bytes.
const ENTRIES_MAX: u64 = 1 << 20;
/// A buffer that has grown beyond this is given back once it is empty.
const BUFFER_KEPT: usize = 1 << 20;

/// First byte of a frame on the append stream.
const LINK_HEARTBEAT: u8 = 0;
const APPEND: u8 = 1;
const WHOLE: u8 = 2;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("a message of {0} bytes is over the limit")]
    TooLong(u64),
    #[error("a message with {0} entries is over the limit")]
    TooManyEntries(u64),
    #[error("unknown frame type {0}")]
    UnknownFrame(u8),
    #[error("not a raft message: {0}")]
    Malformed(String),
    #[error("unexpected EOF")]
    CutOff,
}

/// Keeps a stream alive: nobody sends it, nobody gets it.
pub fn is_link_heartbeat(message: &Message) -> bool {
    message.r#type() == MessageType::MsgHeartbeat && message.from() == 0 && message.to() == 0
}

fn link_heartbeat() -> Message {
    Message { r#type: Some(MessageType::MsgHeartbeat as i32), ..Message::default() }
}

/// A message behind its length: all of the message stream, and the head of a snapshot.
pub fn put_with_length(message: &Message, out: &mut BytesMut) {
    let length = message.encoded_len();
    out.reserve(8 + length);
    out.put_u64(length as u64);
    message.encode(out).expect("a buffer that grows takes everything");
}

/// One message from exactly these bytes.
pub fn message_from(bytes: &[u8]) -> Result<Message, Error> {
    check_entries(bytes)?;
    Message::decode(bytes).map_err(|e| Error::Malformed(e.to_string()))
}

/// An entry of two bytes takes forty times that in memory, so they are counted before they are made.
fn check_entries(mut bytes: &[u8]) -> Result<(), Error> {
    const ENTRIES: u32 = 7;
    const RESPONSES: u32 = 14;
    if (bytes.len() as u64) <= ENTRIES_MAX {
        return Ok(());
    }
    let malformed = |e: prost::DecodeError| Error::Malformed(e.to_string());
    let mut entries = 0;
    while bytes.has_remaining() {
        let (tag, wire_type) = decode_key(&mut bytes).map_err(malformed)?;
        skip_field(wire_type, tag, &mut bytes, DecodeContext::default()).map_err(malformed)?;
        // Responses are for a member's own storage and never travel.
        entries += u64::from(tag == ENTRIES || tag == RESPONSES);
    }
    if entries > ENTRIES_MAX { Err(Error::TooManyEntries(entries)) } else { Ok(()) }
}

/// Which of the two streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Appends, each told as little as the other side does not know yet.
    Append,
    /// Everything else.
    Message,
}

impl Kind {
    /// Last but one part of the stream's path.
    pub fn path(self) -> &'static str {
        match self {
            Kind::Append => "msgapp",
            Kind::Message => "message",
        }
    }
}

/// Where an append stream is: both sides keep it in step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Position {
    term: u64,
    index: u64,
}

impl Position {
    fn after(message: &Message) -> Self {
        let index = message.entries.last().map_or(message.index(), Entry::index);
        Self { term: message.term(), index }
    }
}

/// Writes one stream.
#[derive(Debug)]
pub struct Encoder {
    kind: Kind,
    position: Position,
}

impl Encoder {
    pub fn new(kind: Kind) -> Self {
        Self { kind, position: Position::default() }
    }

    pub fn message(&mut self, message: &Message, out: &mut BytesMut) {
        if self.kind == Kind::Message {
            return put_with_length(message, out);
        }
        let follows = message.index() == self.position.index
            && message.log_term() == self.position.term
            && message.term() == self.position.term
            && message.r#type() == MessageType::MsgApp;
        if follows {
            out.put_u8(APPEND);
            out.put_u64(message.entries.len() as u64);
            for entry in &message.entries {
                let length = entry.encoded_len();
                out.reserve(8 + length);
                out.put_u64(length as u64);
                entry.encode(out).expect("a buffer that grows takes everything");
            }
            out.put_u64(message.commit());
            self.position.index = self.position.index.wrapping_add(message.entries.len() as u64);
        } else {
            out.put_u8(WHOLE);
            put_with_length(message, out);
            self.position = Position::after(message);
        }
    }

    pub fn link_heartbeat(&self, out: &mut BytesMut) {
        match self.kind {
            Kind::Append => out.put_u8(LINK_HEARTBEAT),
            Kind::Message => put_with_length(&link_heartbeat(), out),
        }
    }
}

/// What the next bytes of a stream are.
#[derive(Debug)]
enum Expects {
    /// Append stream: a type byte. Message stream: a length.
    Frame,
    /// The length of a whole message.
    Length,
    Whole(usize),
    EntryCount,
    /// Entries, or the commit index once `left` is 0. `bytes`: of the entries so far.
    Entries {
        left: u64,
        bytes: u64,
        entries: Vec<Entry>,
    },
}

/// Reads one stream.
#[derive(Debug)]
pub struct Decoder {
    kind: Kind,
    position: Position,
    /// The ends of the stream, which appends do not tell.
    from: u64,
    to: u64,
    buffer: BytesMut,
    expects: Expects,
}

impl Decoder {
    /// Of the stream that `from` sends to `to`.
    pub fn new(kind: Kind, from: u64, to: u64) -> Self {
        Self { kind, position: Position::default(), from, to, buffer: BytesMut::new(), expects: Expects::Frame }
    }

    pub fn push(&mut self, chunk: &[u8]) {
        self.buffer.extend_from_slice(chunk);
    }

    /// The next message that has arrived completely; link heartbeats are left out. After an error the stream is of no use.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Message>, Error> {
        loop {
            match &mut self.expects {
                Expects::Frame if self.kind == Kind::Message => self.expects = Expects::Length,
                Expects::Frame => {
                    if self.buffer.is_empty() {
                        self.give_back();
                        return Ok(None);
                    }
                    self.expects = match self.buffer.get_u8() {
                        LINK_HEARTBEAT => Expects::Frame,
                        APPEND => Expects::EntryCount,
                        WHOLE => Expects::Length,
                        other => return Err(Error::UnknownFrame(other)),
                    };
                }
                Expects::Length => {
                    let Some(length) = self.number() else { return Ok(None) };
                    if length > MESSAGE_MAX {
                        return Err(Error::TooLong(length));
                    }
                    self.expects = Expects::Whole(length as usize);
                }
                Expects::Whole(length) => {
                    let length = *length;
                    if self.buffer.len() < length {
                        return Ok(None);
                    }
                    let message = message_from(&self.buffer[..length])?;
                    self.buffer.advance(length);
                    self.expects = Expects::Frame;
                    if self.kind == Kind::Append {
                        self.position = Position::after(&message);
                    }
                    if !is_link_heartbeat(&message) {
                        return Ok(Some(message));
                    }
                }
                Expects::EntryCount => {
                    let Some(left) = self.number() else { return Ok(None) };
                    if left > ENTRIES_MAX {
                        return Err(Error::TooManyEntries(left));
                    }
                    self.expects = Expects::Entries { left, bytes: 0, entries: Vec::new() };
                }
                Expects::Entries { left: 0, entries, .. } => {
                    if self.buffer.len() < 8 {
                        return Ok(None);
                    }
                    let entries = std::mem::take(entries);
                    let commit = self.buffer.get_u64();
                    self.expects = Expects::Frame;
                    return Ok(Some(self.append(entries, commit)));
                }
                Expects::Entries { left, bytes, entries } => {
                    let Some(mut head) = self.buffer.get(..8) else { return Ok(None) };
                    let length = head.get_u64();
                    let total = bytes.saturating_add(length);
                    if total > MESSAGE_MAX {
                        return Err(Error::TooLong(total));
                    }
                    let Some(body) = self.buffer[8..].get(..length as usize) else { return Ok(None) };
                    entries.push(Entry::decode(body).map_err(|e| Error::Malformed(e.to_string()))?);
                    self.buffer.advance(8 + length as usize);
                    *bytes = total;
                    *left -= 1;
                }
            }
        }
    }

    fn append(&mut self, entries: Vec<Entry>, commit: u64) -> Message {
        let Position { term, index } = self.position;
        self.position.index = index.wrapping_add(entries.len() as u64);
        Message {
            r#type: Some(MessageType::MsgApp as i32),
            to: Some(self.to),
            from: Some(self.from),
            term: Some(term),
            log_term: Some(term),
            index: Some(index),
            entries,
            commit: Some(commit),
            ..Message::default()
        }
    }

    fn number(&mut self) -> Option<u64> {
        if self.buffer.is_empty() {
            self.give_back();
        }
        (self.buffer.len() >= 8).then(|| self.buffer.get_u64())
    }

    fn give_back(&mut self) {
        if self.buffer.capacity() > BUFFER_KEPT {
            self.buffer = BytesMut::new();
        }
    }
}

/// Reads the head of a snapshot: the message before the database.
#[derive(Debug, Default)]
pub struct SnapshotHead(BytesMut);

impl SnapshotHead {
    /// The message and the first bytes of the database, once they are there.
    pub fn push(&mut self, chunk: &[u8]) -> Result<Option<(Message, Bytes)>, Error> {
        self.0.extend_from_slice(chunk);
        let Some(mut head) = self.0.get(..8) else { return Ok(None) };
        let length = head.get_u64();
        if length > SNAPSHOT_MESSAGE_MAX {
            return Err(Error::TooLong(length));
        }
        let Some(body) = self.0[8..].get(..length as usize) else { return Ok(None) };
        let message = message_from(body)?;
        self.0.advance(8 + length as usize);
        Ok(Some((message, std::mem::take(&mut self.0).freeze())))
    }

    /// What Go calls an end here: within a piece it reads, or between two.
    pub fn cut_off(&self) -> &'static str {
        if matches!(self.0.len(), 0 | 8) { "EOF" } else { "unexpected EOF" }
    }
}
