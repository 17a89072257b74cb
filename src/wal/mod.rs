//! The write-ahead log: raft's entries, hard states and snapshot marks, in etcd's files.
//!
//! [`Wal`] is the log of one member, open for appending: a plain struct with one owner, which blocks while the disk
//! works. It makes, cuts, locks, reads, repairs and purges segments. What entries mean, when to sync and when to
//! purge is its owner's business; the actor around it lives elsewhere.
//!
//! Invariants:
//! 1. What was written before a successful sync is there after any crash, or [`Wal::open`] refuses. It never invents
//!    a record, and drops none but those of a torn end.
//! 2. After a failed write or sync nobody knows what is on the disk, so nothing is tried again: the log is poisoned
//!    and every later call answers the first error. Starting again reads what is really there.
//! 3. Indexes of appended entries leave no gap.
//! 4. No segment that a start needs is purged.
//!
//! A torn end is cut as etcd cuts it. One thing is stricter: where a length field looks like the end of the log but
//! its record and the next one lie intact behind it, a cut would silently drop synced records, so it counts as damage.

pub mod disk;
mod record;
mod recovery;
mod segment;
pub mod sim;
pub mod writer;

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use prost::Message;

use self::{
    disk::{Disk, File, Open, RealDisk},
    record::Encoder,
    segment::{Name, Segment},
};
pub use self::{
    recovery::{Recovered, Repair},
    writer::{Control, Writer},
};
use crate::{
    pb::{etcdserverpb::Metadata, raftpb, walpb},
    sim::Bug,
};

/// A segment is cut once it reaches this size.
pub const SEGMENT_BYTES: u64 = 64_000_000;

/// What need not be synced is written once it is this much.
const UNWRITTEN_BYTES_MAX: usize = 128 << 10;

/// A buffer that grew beyond this for one large batch is given back after it.
const BUFFER_BYTES_MAX: usize = 4 << 20;

/// A sync that takes longer is worth a warning.
const SLOW_SYNC: Duration = Duration::from_secs(1);

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no log where one should be opened.
    #[error("no write-ahead log in {}", dir.display())]
    NoLog { dir: PathBuf },

    /// There is something where a log should be made.
    #[error("a write-ahead log exists in {}", dir.display())]
    Exists { dir: PathBuf },

    #[error(
        "{} is locked by another process: is another member or a tool running on this data directory?",
        path.display()
    )]
    Locked { path: PathBuf },

    #[error(
        "the write-ahead log is damaged: segment {}, offset {offset}: {what}; nothing was changed. \
         Restore the segment or the whole data directory from a copy, or remove this member from the cluster, \
         delete its data directory and add it again",
        segment.display()
    )]
    Damaged { segment: PathBuf, offset: u64, what: String },

    #[error(
        "the write-ahead log is incomplete: {what}. Restore the missing files or the whole data directory from a copy, \
         or remove this member from the cluster, delete its data directory and add it again"
    )]
    Incomplete { what: String },

    #[error("write-ahead log: cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },

    /// An earlier call failed, so nothing more is written or acknowledged.
    #[error("the write-ahead log is closed since an earlier failure: {0}")]
    Poisoned(String),
}

impl Error {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { action, path: path.to_owned(), source }
    }
}

#[derive(Clone)]
pub struct Options {
    /// The directory of the segments.
    pub dir: PathBuf,
    /// Size from which on a segment is cut.
    pub segment_bytes: u64,
    /// Never sync: faster, and a power loss takes what was acknowledged.
    pub unsafe_no_fsync: bool,
    pub disk: Arc<dyn Disk>,
}

impl Options {
    pub fn new(dir: impl Into<PathBuf>) -> Options {
        Options { dir: dir.into(), segment_bytes: SEGMENT_BYTES, unsafe_no_fsync: false, disk: Arc::new(RealDisk) }
    }
}

/// What an append did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Appended {
    /// Bytes written to the disk; 0 if the batch waits in the buffer.
    pub bytes: u64,
    /// How long the write took, if there was one.
    pub write: Option<Duration>,
    /// How long the sync took, if there was one. It covers all that was appended before it, too.
    pub sync: Option<Duration>,
    /// Whether a new segment was begun; everything is synced then.
    pub cut: bool,
}

/// The log of one member, open for appending.
pub struct Wal {
    options: Options,
    /// In order; the last one is written to. Invariant: never empty, sequence numbers without gaps.
    segments: VecDeque<Segment>,
    /// The file of the segment to come, made ahead so that a cut doesn't wait for it.
    next_file: Option<(PathBuf, Box<dyn File>)>,
    /// Whether `next_file` was made, or could not be, since the last cut.
    was_next_tried: bool,
    /// Where in the last segment the buffer goes.
    offset: u64,
    encoder: Encoder,
    /// Whether something was written to the last segment since its last sync.
    is_dirty: bool,
    /// The bytes every segment begins with.
    metadata: Bytes,
    hard_state: raftpb::HardState,
    /// The commit index in the last hard state that was synced.
    durable_commit: u64,
    /// Index of the last entry, or of a snapshot beyond it. The next entry may have any index up to this + 1.
    last_index: u64,
    /// The highest `last_index` ever: names the next segment.
    highest_index: u64,
    /// Indexes of snapshot records, in the order of the log, from the one a start would choose now.
    snapshots: VecDeque<u64>,
    written_bytes: u64,
    poison: Option<String>,
}

impl Wal {
    /// Whether there is a log in the directory.
    pub fn exists(disk: &dyn Disk, dir: &Path) -> Result<bool> {
        match disk.list(dir) {
            Ok(names) => Ok(names.iter().any(|name| name.ends_with(".wal"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::Io { action: "list", path: dir.to_owned(), source }),
        }
    }

    /// Makes a new log that begins with `entries` and `hard_state`. It is there as a whole or not at all.
    pub fn create(
        options: Options,
        metadata: &Metadata,
        entries: &[raftpb::Entry],
        hard_state: Option<&raftpb::HardState>,
    ) -> Result<Wal> {
        let disk = options.disk.clone();
        let dir = options.dir.clone();
        if Wal::exists(disk.as_ref(), &dir)? {
            return Err(Error::Exists { dir });
        }
        let mut building = dir.clone().into_os_string();
        building.push(".tmp");
        let building = PathBuf::from(building);
        disk.remove_dir(&building).map_err(Error::io("remove", &building))?;
        disk.create_dir(&building).map_err(Error::io("create", &building))?;

        let name = Name { sequence: 0, index: 0 };
        let path = building.join(name.to_string());
        let file = new_file(&options, &path)?;
        let filled = Metadata { node_id: Some(metadata.node_id()), cluster_id: Some(metadata.cluster_id()) };
        let mut wal = Wal {
            segments: VecDeque::from([Segment { name, file }]),
            next_file: None,
            was_next_tried: false,
            offset: 0,
            encoder: Encoder::default(),
            is_dirty: false,
            metadata: filled.encode_to_vec().into(),
            hard_state: raftpb::HardState::default(),
            durable_commit: 0,
            last_index: 0,
            highest_index: 0,
            snapshots: VecDeque::from([0]),
            written_bytes: 0,
            poison: None,
            options: Options { dir: building.clone(), ..options },
        };
        wal.encoder.put_crc();
        wal.encoder.put_metadata(&wal.metadata);
        wal.encoder.put_snapshot(&walpb::Snapshot::default());
        wal.encode(entries, hard_state);
        let mut done = Appended::default();
        wal.flush(&mut done)?;
        wal.sync(&mut done)?;

        disk.sync_dir(&building).map_err(Error::io("sync", &building))?;
        disk.rename(&building, &dir).map_err(Error::io("move the new log to", &dir))?;
        if let Some(parent) = dir.parent() {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            disk.sync_dir(parent).map_err(Error::io("sync", parent))?;
        }
        wal.options.dir = dir;
        Ok(wal)
    }

    /// Opens the log for appending, after reading what it holds and cutting a torn end.
    pub fn open(options: Options) -> Result<(Wal, Recovered)> {
        let disk = options.disk.clone();
        let dir = options.dir.clone();
        let log = recovery::recover(disk.as_ref(), &dir)?;
        if let Some(repair) = &log.recovered.repaired {
            tracing::warn!(
                segment = %repair.segment.display(), offset = repair.offset, copy = %repair.copy.display(),
                reason = repair.reason, "cut the torn end of the write-ahead log"
            );
        }
        let recovered = log.recovered;
        let mut segments = VecDeque::from(log.segments);
        let last = segments.back_mut().expect("a log without segments is not recovered");
        let path = dir.join(last.name.to_string());
        let size = last.file.size().map_err(Error::io("read the size of", &path))?;
        // What follows the last record must be zero, or it would be read as records one day.
        last.file.set_size(log.end).map_err(Error::io("truncate", &path))?;
        reserve(last.file.as_mut(), size.max(options.segment_bytes), &path)?;
        if !options.unsafe_no_fsync {
            // Records and names that were written but not synced before a kill were just read, and count as durable
            // from now on.
            last.file.sync().map_err(Error::io("sync", &path))?;
            disk.sync_dir(&dir).map_err(Error::io("sync", &dir))?;
        }
        for left_over in ["0.tmp", "1.tmp"] {
            let path = dir.join(left_over);
            match disk.remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", &path)(error)),
                _ => {}
            }
        }

        let last_index = recovered.entries.last().map_or(recovered.snapshot.index(), raftpb::Entry::index);
        let mut wal = Wal {
            offset: log.end,
            encoder: Encoder::with_crc(log.crc),
            next_file: None,
            was_next_tried: false,
            is_dirty: false,
            metadata: log.metadata_bytes,
            hard_state: recovered.hard_state,
            durable_commit: recovered.hard_state.commit(),
            last_index,
            highest_index: last_index.max(segments.back().map_or(0, |last| last.name.index.saturating_sub(1))),
            snapshots: VecDeque::from([recovered.snapshot.index()]),
            written_bytes: 0,
            poison: None,
            segments,
            options,
        };
        if log.end == 0 {
            wal.put_head();
        }
        if log.has_unusable_snapshots {
            // A crash came between the record of a snapshot from the leader and the hard state that commits it, so that
            // snapshot was never installed. As the last record counts, this keeps it unused when the commit index grows.
            wal.append_snapshot(&recovered.snapshot)?;
        }
        Ok((wal, recovered))
    }

    /// Adds the entries, and the hard state if it differs from the last one. With `sync` all that was appended so far
    /// is durable when this returns; without, it may stay in memory until the next sync.
    ///
    /// Panics if the entries' indexes leave a gap.
    pub fn append(
        &mut self,
        entries: &[raftpb::Entry],
        hard_state: Option<&raftpb::HardState>,
        sync: bool,
    ) -> Result<Appended> {
        self.check()?;
        self.encode(entries, hard_state);
        let result = self.write_out(sync);
        self.poison_on_error(result)
    }

    /// Marks that raft can start from the snapshot, durably.
    ///
    /// The mark counts once a hard state with a commit index not below it is durable too.
    pub fn append_snapshot(&mut self, snapshot: &walpb::Snapshot) -> Result<Appended> {
        self.check()?;
        self.encode_snapshot(snapshot);
        let mut done = Appended::default();
        let result = self.flush(&mut done).and_then(|()| self.sync(&mut done)).map(|()| done);
        self.poison_on_error(result)
    }

    /// Marks a snapshot that a leader sent, with the hard state that commits it, in one synced write.
    pub fn install_snapshot(&mut self, snapshot: &walpb::Snapshot, hard_state: &raftpb::HardState) -> Result<Appended> {
        self.check()?;
        self.encode_snapshot(snapshot);
        self.append(&[], Some(hard_state), true)
    }

    /// Makes all that was appended durable.
    pub fn sync_all(&mut self) -> Result<Appended> {
        self.append(&[], None, true)
    }

    /// Deletes the oldest segments that hold only entries below `below_index`, down to `keep_files` segments; 0 keeps
    /// all. A segment that a start needs is never deleted. Answers how many are gone.
    pub fn purge(&mut self, below_index: u64, keep_files: usize) -> Result<usize> {
        self.check()?;
        let bound = below_index.min(self.start_index());
        let mut deleted = 0;
        // The entry after `bound` is in the last segment whose name is not above it, or in a later one.
        while keep_files > 0 && self.segments.len() > keep_files.max(1) && self.segments[1].name.index <= bound {
            let path = self.path_of(&self.segments[0].name);
            // Oldest first: what a crash leaves has no gap.
            self.options.disk.remove_file(&path).map_err(Error::io("remove", &path))?;
            self.segments.pop_front();
            deleted += 1;
        }
        Ok(deleted)
    }

    /// Makes all durable and removes the segment made ahead. Dropping a log instead leaves it as a crash would.
    pub fn close(mut self) -> Result<()> {
        self.sync_all()?;
        if let Some((path, file)) = self.next_file.take() {
            drop(file);
            self.options.disk.remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }

    pub fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// Index of the last entry, or of a snapshot beyond it.
    pub fn last_index(&self) -> u64 {
        self.last_index
    }

    /// Bytes written since the log was made or opened.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// The index raft would start from if the process ended now.
    pub fn start_index(&self) -> u64 {
        let usable = |index: &&u64| **index <= self.durable_commit;
        self.snapshots.iter().rev().find(usable).copied().unwrap_or(0)
    }

    fn check(&self) -> Result<()> {
        match &self.poison {
            None => Ok(()),
            Some(first) => Err(Error::Poisoned(first.clone())),
        }
    }

    fn poison_on_error<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.poison = Some(error.to_string());
        }
        result
    }

    fn encode(&mut self, entries: &[raftpb::Entry], hard_state: Option<&raftpb::HardState>) {
        for (position, entry) in entries.iter().enumerate() {
            let index = entry.index();
            assert!(index > 0, "entry without an index");
            assert!(index <= self.last_index + 1, "entry {index} leaves a gap after {}", self.last_index);
            assert!(position == 0 || index == self.last_index + 1, "entries of a batch are not in order");
            self.encoder.put_entry(entry);
            self.last_index = index;
        }
        self.highest_index = self.highest_index.max(self.last_index);
        if let Some(state) = hard_state
            && parts(state) != parts(&self.hard_state)
        {
            self.hard_state = *state;
            self.encoder.put_state(state);
        }
    }

    fn encode_snapshot(&mut self, snapshot: &walpb::Snapshot) {
        self.encoder.put_snapshot(snapshot);
        self.last_index = self.last_index.max(snapshot.index());
        self.highest_index = self.highest_index.max(self.last_index);
        self.snapshots.push_back(snapshot.index());
    }

    fn write_out(&mut self, sync: bool) -> Result<Appended> {
        let mut done = Appended::default();
        let is_full = self.offset + self.encoder.buffer.len() as u64 >= self.options.segment_bytes;
        if sync || is_full || self.encoder.buffer.len() >= UNWRITTEN_BYTES_MAX {
            self.flush(&mut done)?;
        }
        if sync {
            self.sync(&mut done)?;
        }
        if is_full {
            self.cut(&mut done)?;
        } else if !self.was_next_tried && self.offset >= self.options.segment_bytes / 2 {
            // Costs some 50 µs. If it fails, there is half a segment's time to make room until the cut tries again.
            self.was_next_tried = true;
            match self.make_next_file() {
                Ok(made) => self.next_file = Some(made),
                Err(error) => tracing::warn!(%error, "cannot make the next segment ahead"),
            }
        }
        Ok(done)
    }

    /// Writes the buffer to the last segment.
    fn flush(&mut self, done: &mut Appended) -> Result<()> {
        if self.encoder.buffer.is_empty() {
            return Ok(());
        }
        let last = self.segments.back_mut().expect("there is a last segment");
        let took = match last.file.write_at(self.offset, &self.encoder.buffer) {
            Ok(took) => took,
            Err(source) => return Err(self.failed("write to", source)),
        };
        let bytes = self.encoder.buffer.len() as u64;
        self.encoder.buffer.clear();
        self.encoder.buffer.shrink_to(BUFFER_BYTES_MAX);
        self.offset += bytes;
        self.is_dirty = true;
        self.written_bytes += bytes;
        done.bytes += bytes;
        done.write = Some(done.write.unwrap_or_default() + took);
        Ok(())
    }

    /// Syncs the last segment. The buffer must have been flushed.
    fn sync(&mut self, done: &mut Appended) -> Result<()> {
        debug_assert!(self.encoder.buffer.is_empty(), "synced with records in the buffer");
        if self.is_dirty && !self.options.unsafe_no_fsync && !crate::sim::has(Bug::NoSync) {
            let last = self.segments.back_mut().expect("there is a last segment");
            let took = match last.file.sync() {
                Ok(took) => took,
                Err(source) => return Err(self.failed("sync", source)),
            };
            if took > SLOW_SYNC {
                tracing::warn!(took_ms = took.as_millis() as u64, expected_ms = 1000, "slow fdatasync");
            }
            done.sync = Some(done.sync.unwrap_or_default() + took);
        }
        self.is_dirty = false;
        self.durable_commit = self.hard_state.commit();
        // Records before the one a start would choose now will never be chosen again.
        if let Some(start) = self.snapshots.iter().rposition(|index| *index <= self.durable_commit) {
            self.snapshots.drain(..start);
        }
        Ok(())
    }

    /// Ends the last segment and begins the next one.
    fn cut(&mut self, done: &mut Appended) -> Result<()> {
        let last = self.segments.back_mut().expect("there is a last segment");
        if let Err(source) = last.file.set_size(self.offset) {
            return Err(self.failed("truncate", source));
        }
        self.is_dirty = true;
        self.sync(done)?;

        self.was_next_tried = false;
        let (tmp_path, file) = match self.next_file.take() {
            Some(made) => made,
            None => self.make_next_file()?,
        };
        let name = Name { sequence: self.last_name().sequence + 1, index: self.highest_index + 1 };
        self.segments.push_back(Segment { name, file });
        self.offset = 0;
        self.put_head();
        self.flush(done)?;
        self.sync(done)?;
        // Only a segment that has its head gets a name.
        let path = self.path_of(&name);
        self.options.disk.rename(&tmp_path, &path).map_err(Error::io("rename the new segment to", &path))?;
        if !self.options.unsafe_no_fsync {
            self.options.disk.sync_dir(&self.options.dir).map_err(Error::io("sync", &self.options.dir))?;
        }
        done.cut = true;
        Ok(())
    }

    /// The first records of every segment but the first.
    fn put_head(&mut self) {
        self.encoder.put_crc();
        self.encoder.put_metadata(&self.metadata);
        if parts(&self.hard_state) != (0, 0, 0) {
            self.encoder.put_state(&self.hard_state);
        }
    }

    /// Makes the file of the segment after the last one.
    fn make_next_file(&self) -> Result<(PathBuf, Box<dyn File>)> {
        let path = self.options.dir.join(format!("{}.tmp", (self.last_name().sequence + 1) % 2));
        let file = new_file(&self.options, &path)?;
        Ok((path, file))
    }

    fn last_name(&self) -> Name {
        self.segments.back().expect("there is a last segment").name
    }

    fn path_of(&self, name: &Name) -> PathBuf {
        self.options.dir.join(name.to_string())
    }

    fn failed(&self, action: &'static str, source: io::Error) -> Error {
        Error::Io { action, path: self.path_of(&self.last_name()), source }
    }
}

/// Term, vote and commit, where a missing field is the same as zero.
fn parts(state: &raftpb::HardState) -> (u64, u64, u64) {
    (state.term(), state.vote(), state.commit())
}

/// Makes, locks and preallocates a file.
fn new_file(options: &Options, path: &Path) -> Result<Box<dyn File>> {
    let mut file = options.disk.open(path, Open::Create).map_err(Error::io("create", path))?;
    segment::lock(file.as_mut(), path)?;
    reserve(file.as_mut(), options.segment_bytes, path)?;
    Ok(file)
}

/// Preallocates. Without room for it the file grows as it is written: a nearly full disk is used to its end.
fn reserve(file: &mut dyn File, size: u64, path: &Path) -> Result<()> {
    if !file.reserve(size).map_err(Error::io("preallocate", path))? {
        tracing::warn!(path = %path.display(), bytes = size, "no room to preallocate a segment of the write-ahead log");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
