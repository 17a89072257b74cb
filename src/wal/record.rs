//! Frames and records: the bytes of the log.
//!
//! A frame is a little-endian length word, an encoded `walpb.Record`, and zero padding to a multiple of eight. The
//! rolling CRC-32C runs over the data of all records, from the first segment to the last.

use prost::{
    Message,
    encoding::{self, DecodeContext, WireType},
};

use crate::pb::{raftpb, walpb};

/// The types of records.
pub(super) mod kind {
    pub const METADATA: u8 = 1;
    pub const ENTRY: u8 = 2;
    pub const STATE: u8 = 3;
    pub const CRC: u8 = 4;
    pub const SNAPSHOT: u8 = 5;
}

/// Bytes of the length word before each record; every frame starts at a multiple of it.
pub(super) const WORD: usize = 8;

/// Appends frames to a buffer that is used again and again.
#[derive(Default)]
pub(super) struct Encoder {
    pub buffer: Vec<u8>,
    /// The rolling CRC, up to the last frame in the buffer.
    pub crc: u32,
}

impl Encoder {
    pub fn with_crc(crc: u32) -> Encoder {
        Encoder { buffer: Vec::new(), crc }
    }

    /// The first record of a segment.
    pub fn put_crc(&mut self) {
        self.frame(kind::CRC, None);
    }

    /// `bytes` is an encoded `etcdserverpb.Metadata`.
    pub fn put_metadata(&mut self, bytes: &[u8]) {
        self.record(kind::METADATA, &[], bytes);
    }

    pub fn put_entry(&mut self, entry: &raftpb::Entry) {
        // Type, term, index, and tag and length of the data; the data itself is copied once, into the frame.
        let mut head = Scratch::default();
        if entry.r#type() != raftpb::EntryType::EntryNormal {
            head.field(0x08, entry.r#type() as u64);
        }
        head.field(0x10, entry.term());
        head.field(0x18, entry.index());
        let data = entry.data();
        if !data.is_empty() {
            head.field(0x22, data.len() as u64);
        }
        self.record(kind::ENTRY, head.bytes(), data);
    }

    pub fn put_state(&mut self, state: &raftpb::HardState) {
        let mut data = Scratch::default();
        data.field(0x08, state.term());
        data.field(0x10, state.vote());
        data.field(0x18, state.commit());
        self.record(kind::STATE, data.bytes(), &[]);
    }

    pub fn put_snapshot(&mut self, snapshot: &walpb::Snapshot) {
        // Zeros are written too, as etcd does.
        let conf_state = snapshot.conf_state.clone().map(|mut state| {
            state.auto_leave = Some(state.auto_leave());
            state
        });
        let filled = walpb::Snapshot { index: Some(snapshot.index()), term: Some(snapshot.term()), conf_state };
        self.record(kind::SNAPSHOT, &filled.encode_to_vec(), &[]);
    }

    /// A record whose data is `head` and then `body`.
    fn record(&mut self, kind: u8, head: &[u8], body: &[u8]) {
        self.crc = crc32c::crc32c_append(crc32c::crc32c_append(self.crc, head), body);
        self.frame(kind, Some((head, body)));
    }

    fn frame(&mut self, kind: u8, data: Option<(&[u8], &[u8])>) {
        let mut record = Scratch::default();
        record.field(0x08, u64::from(kind));
        record.field(0x10, u64::from(self.crc));
        let mut data_bytes = 0;
        if let Some((head, body)) = data {
            data_bytes = head.len() + body.len();
            record.field(0x1a, data_bytes as u64);
        }
        let record_bytes = record.bytes().len() + data_bytes;
        let frame = Frame::of(record_bytes as u64);

        self.buffer.reserve(WORD + record_bytes + WORD);
        self.buffer.extend_from_slice(&frame.word().to_le_bytes());
        self.buffer.extend_from_slice(record.bytes());
        if let Some((head, body)) = data {
            self.buffer.extend_from_slice(head);
            self.buffer.extend_from_slice(body);
        }
        self.buffer.extend_from_slice(&[0; WORD][..frame.padding_bytes as usize]);
    }
}

/// A few encoded fields on the stack.
struct Scratch {
    /// Four fields, each a tag of one byte and a varint of ten at most.
    buffer: [u8; 44],
    used: usize,
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch { buffer: [0; 44], used: 0 }
    }
}

impl Scratch {
    /// `tag` is the field's number and wire type as one byte.
    fn field(&mut self, tag: u8, mut value: u64) {
        self.push(tag);
        while value >= 0x80 {
            self.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.push(value as u8);
    }

    fn push(&mut self, byte: u8) {
        self.buffer[self.used] = byte;
        self.used += 1;
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.used]
    }
}

/// What a length word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub record_bytes: u64,
    pub padding_bytes: u64,
}

impl Frame {
    pub fn of(record_bytes: u64) -> Frame {
        Frame { record_bytes, padding_bytes: (WORD as u64 - record_bytes % WORD as u64) % WORD as u64 }
    }

    pub fn parse(word: u64) -> Frame {
        // Bits 59 to 62 mean nothing; bit 63 says whether bits 56 to 58 do.
        let padding_bytes = if word >> 63 == 1 { (word >> 56) & 7 } else { 0 };
        Frame { record_bytes: word & ((1 << 56) - 1), padding_bytes }
    }

    pub fn word(self) -> u64 {
        match self.padding_bytes {
            0 => self.record_bytes,
            padding => self.record_bytes | (0x80 | padding) << 56,
        }
    }

    /// Bytes of record and padding.
    pub fn body_bytes(self) -> u64 {
        self.record_bytes + self.padding_bytes
    }
}

/// A record as it lies in a read buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub kind: i64,
    pub crc: u32,
    pub data: &'a [u8],
}

impl<'a> Record<'a> {
    /// Parses a whole `walpb.Record`; fields in any order, unknown ones skipped.
    pub fn parse(mut bytes: &'a [u8]) -> Option<Record<'a>> {
        let mut record = Record { kind: 0, crc: 0, data: &[] };
        while !bytes.is_empty() {
            let (tag, wire_type) = encoding::decode_key(&mut bytes).ok()?;
            match (tag, wire_type) {
                (1, WireType::Varint) => record.kind = encoding::decode_varint(&mut bytes).ok()? as i64,
                (2, WireType::Varint) => record.crc = encoding::decode_varint(&mut bytes).ok()? as u32,
                (3, WireType::LengthDelimited) => {
                    let length = usize::try_from(encoding::decode_varint(&mut bytes).ok()?).ok()?;
                    (record.data, bytes) = bytes.split_at_checked(length)?;
                }
                (1..=3, _) => return None,
                _ => encoding::skip_field(wire_type, tag, &mut bytes, DecodeContext::default()).ok()?,
            }
        }
        Some(record)
    }

    /// Parses the record at the start of `bytes` without knowing its length, as the writers lay it out; answers the
    /// length too.
    pub fn parse_prefix(bytes: &'a [u8]) -> Option<(Record<'a>, usize)> {
        let mut rest = bytes.strip_prefix(&[0x08])?;
        let kind = encoding::decode_varint(&mut rest).ok()? as i64;
        rest = rest.strip_prefix(&[0x10])?;
        let crc = encoding::decode_varint(&mut rest).ok()? as u32;
        let mut data: &[u8] = &[];
        if kind != i64::from(kind::CRC) {
            rest = rest.strip_prefix(&[0x1a])?;
            let length = usize::try_from(encoding::decode_varint(&mut rest).ok()?).ok()?;
            (data, rest) = rest.split_at_checked(length)?;
        }
        Some((Record { kind, crc, data }, bytes.len() - rest.len()))
    }

    /// The rolling CRC after this record, or none if it doesn't follow from `crc`. A CRC record is compared only with
    /// a CRC that is not zero: where reading starts at a later segment, it says where the rolling CRC stands.
    pub fn follow(&self, crc: u32) -> Option<u32> {
        let (next, known) = if self.kind == i64::from(kind::CRC) {
            (self.crc, crc == 0 || crc == self.crc)
        } else {
            let next = crc32c::crc32c_append(crc, self.data);
            (next, next == self.crc)
        };
        known.then_some(next)
    }
}
