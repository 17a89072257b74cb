//! What a log holds: reading it at start, and which damage is repaired.
//!
//! The log is read twice. The first time, from the oldest segment on, finds the end of the log, the last hard state
//! and the snapshot records; they decide where raft starts. The second time, from there on, collects the entries.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;

use super::{
    Error, Result,
    disk::{Disk, File, Open},
    record::{Record, kind},
    segment::{Found, Name, Reader, Segment, lock},
};
use crate::pb::{etcdserverpb::Metadata, raftpb, walpb};

/// What a log held when it was opened.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovered {
    pub metadata: Metadata,
    /// The last one written; all zero if there is none.
    pub hard_state: raftpb::HardState,
    /// Where raft starts: the last snapshot record that the hard state's commit index covers.
    pub snapshot: walpb::Snapshot,
    /// All such snapshot records, in the order they were written.
    pub snapshots: Vec<walpb::Snapshot>,
    /// The entries after `snapshot`, without gaps. Those above the commit index may yet be replaced.
    pub entries: Vec<raftpb::Entry>,
    /// Set if the end of the log was cut.
    pub repaired: Option<Repair>,
}

/// A torn end that was cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// The segment, now cut.
    pub segment: PathBuf,
    /// Its length now.
    pub offset: u64,
    /// The segment as it was.
    pub copy: PathBuf,
    pub reason: &'static str,
}

/// What the writer needs to go on.
pub(super) struct Log {
    pub recovered: Recovered,
    pub metadata_bytes: Bytes,
    pub segments: Vec<Segment>,
    /// Whether there are snapshot records beyond the commit index.
    pub has_unusable_snapshots: bool,
    /// Where the last segment's last record ends; 0 if even its head is not whole, which is to be written then.
    pub end: u64,
    pub crc: u32,
}

/// Locks and reads the log in `dir`, and cuts a torn end.
pub(super) fn recover(disk: &dyn Disk, dir: &Path) -> Result<Log> {
    let mut segments = open_segments(disk, dir)?;
    let survey = Survey::of(&segments, dir)?;
    let repaired = match survey.tail.torn {
        Some(reason) => {
            let last = segments.last_mut().expect("a log without segments is refused above");
            Some(cut_torn_end(disk, dir, last, survey.tail.end, reason)?)
        }
        None => None,
    };

    let commit = survey.hard_state.commit();
    let snapshot_count = survey.snapshots.len();
    let snapshots: Vec<_> = survey.snapshots.into_iter().filter(|snapshot| snapshot.index() <= commit).collect();
    let start =
        snapshots.last().cloned().unwrap_or(walpb::Snapshot { index: Some(0), term: Some(0), conf_state: None });
    let Some(first) = segments.iter().rposition(|segment| segment.name.index <= start.index()) else {
        let oldest = dir.join(segments[0].name.to_string());
        return Err(Error::Incomplete {
            what: format!("raft starts at index {}, but the oldest segment is {}", start.index(), oldest.display()),
        });
    };
    let replay = Replay::of(&segments[first..], dir, &start)?;
    let last_index = start.index().saturating_add(replay.entries.len() as u64);
    if commit > last_index {
        return Err(Error::Incomplete {
            what: format!("the hard state says that index {commit} is committed, but the log ends at {last_index}"),
        });
    }
    let Some((metadata, metadata_bytes)) = replay.metadata else {
        return Err(Error::Incomplete { what: "it has no metadata record".to_owned() });
    };
    let (end, crc) = match survey.tail.has_records {
        true => (survey.tail.end, survey.tail.crc),
        false => (0, survey.tail.crc_before),
    };
    Ok(Log {
        has_unusable_snapshots: snapshots.len() < snapshot_count,
        recovered: Recovered {
            metadata,
            hard_state: survey.hard_state,
            snapshot: start,
            snapshots,
            entries: replay.entries,
            repaired,
        },
        metadata_bytes,
        segments,
        end,
        crc,
    })
}

/// The segments of `dir` in order, open and locked.
fn open_segments(disk: &dyn Disk, dir: &Path) -> Result<Vec<Segment>> {
    let mut names = Vec::new();
    for text in disk.list(dir).map_err(Error::io("list", dir))? {
        match Name::parse(&text) {
            Some(name) => names.push(name),
            None if text.ends_with(".wal") => tracing::warn!(name = text, "ignored file in WAL directory"),
            None => {}
        }
    }
    names.sort_unstable_by_key(|name| name.sequence);
    if names.is_empty() {
        return Err(Error::NoLog { dir: dir.to_owned() });
    }
    for pair in names.windows(2) {
        if pair[0].sequence.checked_add(1) != Some(pair[1].sequence) {
            return Err(Error::Incomplete {
                what: format!("segments between {} and {} are missing", pair[0], pair[1]),
            });
        }
    }
    let mut segments = Vec::with_capacity(names.len());
    for name in names {
        let path = dir.join(name.to_string());
        let mut file = disk.open(&path, Open::Existing).map_err(Error::io("open", &path))?;
        lock(file.as_mut(), &path)?;
        segments.push(Segment { name, file });
    }
    Ok(segments)
}

/// Where the records of the last segment end, and why.
struct Tail {
    end: u64,
    crc: u32,
    torn: Option<&'static str>,
    /// The rolling CRC before the last segment.
    crc_before: u32,
    /// Whether the last segment has any record but its CRC record.
    has_records: bool,
}

/// Shows every record of the segments to `visit`, which may say what is wrong with it. Only the last segment may have
/// a torn end.
fn read(
    segments: &[Segment],
    dir: &Path,
    mut visit: impl FnMut(&Record) -> std::result::Result<(), String>,
) -> Result<Tail> {
    let mut crc = 0;
    let mut tail = Tail { end: 0, crc: 0, torn: None, crc_before: 0, has_records: false };
    for (position, segment) in segments.iter().enumerate() {
        let is_last = position + 1 == segments.len();
        let path = dir.join(segment.name.to_string());
        let mut reader = Reader::new(segment.file.as_ref()).map_err(Error::io("read", &path))?;
        tail.crc_before = crc;
        tail.has_records = false;
        tail.torn = loop {
            let offset = reader.offset();
            let damaged = |what: String| Err(Error::Damaged { segment: path.clone(), offset, what });
            match reader.next(&mut crc).map_err(Error::io("read", &path))? {
                Found::Record(record) => {
                    let is_crc = record.kind == i64::from(kind::CRC);
                    if offset == 0 && !is_crc {
                        return damaged("the segment does not begin with a CRC record".to_owned());
                    }
                    tail.has_records |= !is_crc;
                    if let Err(what) = visit(&record) {
                        return damaged(what);
                    }
                }
                Found::End => break None,
                Found::Torn(why) if is_last => break Some(why),
                Found::Torn(why) => return damaged(format!("{why}, and a later segment exists")),
                Found::Damaged(what) => return damaged(what.to_owned()),
            }
        };
        tail.end = reader.offset();
    }
    tail.crc = crc;
    Ok(tail)
}

/// The first reading.
struct Survey {
    hard_state: raftpb::HardState,
    snapshots: Vec<walpb::Snapshot>,
    tail: Tail,
}

impl Survey {
    fn of(segments: &[Segment], dir: &Path) -> Result<Survey> {
        let mut hard_state = raftpb::HardState { term: Some(0), vote: Some(0), commit: Some(0) };
        let mut snapshots = Vec::new();
        let tail = read(segments, dir, |record| {
            if record.kind == i64::from(kind::STATE) {
                hard_state = decode_state(record)?;
            } else if record.kind == i64::from(kind::SNAPSHOT) {
                snapshots.push(decode_snapshot(record)?);
            }
            Ok(())
        })?;
        Ok(Survey { hard_state, snapshots, tail })
    }
}

/// The second reading.
struct Replay {
    metadata: Option<(Metadata, Bytes)>,
    entries: Vec<raftpb::Entry>,
}

impl Replay {
    fn of(segments: &[Segment], dir: &Path, start: &walpb::Snapshot) -> Result<Replay> {
        let mut replay = Replay { metadata: None, entries: Vec::new() };
        read(segments, dir, |record| replay.add(record, start))?;
        // Terms never go down along a log. Entries of an older term than the snapshot's are what a snapshot from a
        // leader replaced; it replaced the whole log, but its record cannot say so.
        if replay.entries.first().is_some_and(|entry| entry.term() < start.term()) {
            replay.entries.clear();
        }
        Ok(replay)
    }

    fn add(&mut self, record: &Record, start: &walpb::Snapshot) -> std::result::Result<(), String> {
        match u8::try_from(record.kind).unwrap_or(0) {
            kind::METADATA => match &self.metadata {
                Some((_, first)) if first != record.data => {
                    return Err("a metadata record differs from the first: segments of two members are mixed".into());
                }
                Some(_) => {}
                None => {
                    let metadata = Metadata::decode(record.data).map_err(|error| undecodable("metadata", &error))?;
                    self.metadata = Some((metadata, Bytes::copy_from_slice(record.data)));
                }
            },
            kind::ENTRY => {
                let entry = decode_entry(record)?;
                if entry.index() <= start.index() {
                    return Ok(());
                }
                let position = entry.index() - start.index() - 1;
                if position > self.entries.len() as u64 {
                    let expected = entry.index() - position + self.entries.len() as u64;
                    return Err(format!("entry {} follows, but entry {expected} is missing", entry.index()));
                }
                // A later entry replaces the one of its index and all after it.
                self.entries.truncate(position as usize);
                self.entries.push(entry);
            }
            kind::STATE | kind::CRC => {}
            kind::SNAPSHOT => {
                let snapshot = decode_snapshot(record)?;
                if snapshot.index() == start.index() && snapshot.term() != start.term() {
                    return Err(format!(
                        "a snapshot record at index {} has term {}, another has term {}",
                        start.index(),
                        snapshot.term(),
                        start.term()
                    ));
                }
            }
            _ => return Err(format!("unexpected block type {}", record.kind)),
        }
        Ok(())
    }
}

// The checksum covers the data of a record but not its type, and an entry's and a state's fields have the same numbers.
// What cannot be the one is therefore refused, lest a flipped bit in the type makes it the other.

fn decode_state(record: &Record) -> std::result::Result<raftpb::HardState, String> {
    let state = raftpb::HardState::decode(record.data).map_err(|error| undecodable("state", &error))?;
    let is_state = state.encoded_len() == record.data.len();
    let is_possible = state.term() > 0 || (state.vote() == 0 && state.commit() == 0);
    if !is_state || !is_possible {
        return Err("a state record holds something else".to_owned());
    }
    Ok(raftpb::HardState { term: Some(state.term()), vote: Some(state.vote()), commit: Some(state.commit()) })
}

fn decode_entry(record: &Record) -> std::result::Result<raftpb::Entry, String> {
    // The entry's data is a part of this copy, so it is copied once.
    let entry =
        raftpb::Entry::decode(Bytes::copy_from_slice(record.data)).map_err(|error| undecodable("entry", &error))?;
    let raw_type = entry.r#type.unwrap_or(0);
    if raftpb::EntryType::try_from(raw_type).is_err() || (raw_type != 0 && entry.data().is_empty()) {
        return Err(format!("an entry record holds something else (entry type {raw_type})"));
    }
    Ok(entry)
}

fn decode_snapshot(record: &Record) -> std::result::Result<walpb::Snapshot, String> {
    walpb::Snapshot::decode(record.data).map_err(|error| undecodable("snapshot", &error))
}

fn undecodable(what: &str, error: &prost::DecodeError) -> String {
    format!("the {what} record does not decode: {error}")
}

/// Cuts the segment at `end`, after copying all of it.
fn cut_torn_end(disk: &dyn Disk, dir: &Path, segment: &mut Segment, end: u64, reason: &'static str) -> Result<Repair> {
    crate::sim::mark("torn end of the log is cut");
    let path = dir.join(segment.name.to_string());
    let copy = dir.join(format!("{}.broken", segment.name));
    let mut target = disk.open(&copy, Open::Create).map_err(Error::io("create", &copy))?;
    copy_file(segment.file.as_ref(), target.as_mut()).map_err(Error::io("copy the torn segment to", &copy))?;
    disk.sync_dir(dir).map_err(Error::io("sync", dir))?;
    segment.file.set_size(end).map_err(Error::io("truncate", &path))?;
    segment.file.sync().map_err(Error::io("sync", &path))?;
    Ok(Repair { segment: path, offset: end, copy, reason })
}

fn copy_file(source: &dyn File, target: &mut dyn File) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        let count = source.read_at(offset, &mut buffer)?;
        if count == 0 {
            break;
        }
        target.write_at(offset, &buffer[..count])?;
        offset += count as u64;
    }
    target.sync()?;
    Ok(())
}
