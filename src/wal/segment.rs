//! Segments: their names, and reading the records of one from start to end.

use std::{fmt, io, path::Path};

use super::{
    disk::File,
    record::{Frame, Record, WORD},
};

/// Torn writes lose whole sectors: what was written to a sector is there or none of it.
const SECTOR: u64 = 512;

/// Read from the disk at once, at least.
const CHUNK: usize = 1 << 20;

/// Place of a segment in the log, as its name tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub sequence: u64,
    /// No entry below this index begins in this segment or a later one, unless it replaces another.
    pub index: u64,
}

impl Name {
    pub fn parse(text: &str) -> Option<Name> {
        let (sequence, index) = text.strip_suffix(".wal")?.split_once('-')?;
        let hex = |digits: &str| {
            let lower_case = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            if digits.len() != 16 || !digits.bytes().all(lower_case) {
                return None;
            }
            u64::from_str_radix(digits, 16).ok()
        };
        Some(Name { sequence: hex(sequence)?, index: hex(index)? })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:016x}.wal", self.sequence, self.index)
    }
}

/// A segment that is open and locked.
pub(super) struct Segment {
    pub name: Name,
    pub file: Box<dyn File>,
}

/// Takes the lock of a segment's file; the error says who may have it.
pub(super) fn lock(file: &mut dyn File, path: &Path) -> super::Result<()> {
    match file.try_lock() {
        Ok(true) => Ok(()),
        Ok(false) => Err(super::Error::Locked { path: path.to_owned() }),
        Err(source) => Err(super::Error::Io { action: "lock", path: path.to_owned(), source }),
    }
}

/// What lies at a place of a segment.
#[derive(Debug)]
pub(super) enum Found<'a> {
    Record(Record<'a>),
    /// Nothing was ever written from here on.
    End,
    /// A write was cut short here, by a crash or for want of space.
    Torn(&'static str),
    /// Something that no cut write leaves behind.
    Damaged(&'static str),
}

/// Reads the records of one segment, in order.
pub(super) struct Reader<'a> {
    file: &'a dyn File,
    size: u64,
    /// Where the next frame begins.
    offset: u64,
    /// A piece of the file, beginning at `buffer_start`.
    buffer: Vec<u8>,
    buffer_start: u64,
}

impl<'a> Reader<'a> {
    pub fn new(file: &'a dyn File) -> io::Result<Reader<'a>> {
        Ok(Reader { file, size: file.size()?, offset: 0, buffer: Vec::new(), buffer_start: 0 })
    }

    /// Where the frame that [`Reader::next`] looks at next begins.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Looks at the next frame. `crc` is the rolling CRC and goes along. After anything but a record the reader stays
    /// where it is.
    pub fn next(&mut self, crc: &mut u32) -> io::Result<Found<'_>> {
        let start = self.offset;
        let left = self.size - start;
        if left == 0 {
            return Ok(Found::End);
        }
        if left < WORD as u64 {
            return Ok(Found::Torn("the file ends inside a length field"));
        }
        let word = u64::from_le_bytes(self.read(start, WORD)?.try_into().expect("eight bytes were asked for"));
        if word == 0 {
            if self.word_is_damaged(start, word, *crc)? {
                return Ok(Found::Damaged(
                    "the length field of a record is zero, but the record and more records follow",
                ));
            }
            return Ok(Found::End);
        }
        let frame = Frame::parse(word);
        let body_start = start + WORD as u64;
        let checked = if frame.body_bytes() > left - WORD as u64 {
            Err("the file ends inside a record")
        } else {
            let body = self.read(body_start, frame.body_bytes() as usize)?;
            let record = Record::parse(&body[..frame.record_bytes as usize]);
            match record.and_then(|record| record.follow(*crc)) {
                // No writer leaves this, and the next record would be looked for at the wrong place.
                Some(_) if frame != Frame::of(frame.record_bytes) => {
                    return Ok(Found::Damaged("the padding in the length field of a record is wrong"));
                }
                Some(next) => Ok(next),
                None if lost_a_sector(body_start, body) => Err("a part of the record was never written"),
                None if record.is_none() => return Ok(Found::Damaged("the record does not parse")),
                None => return Ok(Found::Damaged("the record's checksum does not match")),
            }
        };
        match checked {
            Ok(next) => *crc = next,
            Err(_) if self.word_is_damaged(start, word, *crc)? => {
                return Ok(Found::Damaged(
                    "the length field of a record is wrong, but the record and more records follow",
                ));
            }
            Err(torn) => return Ok(Found::Torn(torn)),
        }
        self.offset = body_start + frame.body_bytes();
        let body = self.read(body_start, frame.body_bytes() as usize)?;
        Ok(Found::Record(Record::parse(&body[..frame.record_bytes as usize]).expect("it has just been parsed")))
    }

    /// Whether a length field that looks like the end of the log is damage in its middle: behind it lies its whole
    /// record and then another, both with the right checksums. A cut write cannot leave that behind, because a length
    /// field and the byte after it reach the disk together unless a sector ends between them.
    fn word_is_damaged(&mut self, start: u64, word: u64, crc: u32) -> io::Result<bool> {
        let body_start = start + WORD as u64;
        if word == 0 && body_start.is_multiple_of(SECTOR) {
            return Ok(false);
        }
        let Some((first_bytes, crc)) = self.intact_record(body_start, crc)? else { return Ok(false) };
        let next = body_start + Frame::of(first_bytes).body_bytes();
        if self.size.saturating_sub(next) < WORD as u64 {
            return Ok(false);
        }
        Ok(self.intact_record(next + WORD as u64, crc)?.is_some())
    }

    /// The length of the record at `start`, whatever its length field says, and the rolling CRC after it; none if it
    /// is not whole.
    fn intact_record(&mut self, start: u64, crc: u32) -> io::Result<Option<(u64, u32)>> {
        let left = usize::try_from(self.size.saturating_sub(start)).unwrap_or(usize::MAX);
        // Most records are small; a large one is asked for again in full.
        for bytes in [left.min(CHUNK), left] {
            if let Some((record, length)) = Record::parse_prefix(self.read(start, bytes)?) {
                return Ok(record.follow(crc).map(|crc| (length as u64, crc)));
            }
        }
        Ok(None)
    }

    /// The bytes at `start`, which lie within the file.
    fn read(&mut self, start: u64, count: usize) -> io::Result<&[u8]> {
        let buffered =
            start >= self.buffer_start && start + count as u64 <= self.buffer_start + self.buffer.len() as u64;
        if !buffered {
            let wanted = (self.size - start).min(count.max(CHUNK) as u64) as usize;
            self.buffer.resize(wanted, 0);
            self.buffer_start = start;
            if self.file.read_at(start, &mut self.buffer)? < wanted {
                self.buffer.clear();
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was read"));
            }
        }
        let from = (start - self.buffer_start) as usize;
        Ok(&self.buffer[from..from + count])
    }
}

/// Whether one of the sectors that `body`, which lies at `start` in the file, covers in whole or in part is all zero.
fn lost_a_sector(start: u64, body: &[u8]) -> bool {
    let first = ((SECTOR - start % SECTOR) as usize).min(body.len());
    let (first, rest) = body.split_at(first);
    let lost = |piece: &[u8]| piece.iter().all(|byte| *byte == 0);
    (!first.is_empty() && lost(first)) || rest.chunks(SECTOR as usize).any(lost)
}
