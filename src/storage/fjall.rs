//! Rows in fjall 3.1.
//!
//! ```text
//! <dir>/format   magic and version of this layout
//! <dir>/synced   how far the journal is durable (`journal.rs`)
//! <dir>/rows/    fjall's files
//! ```
//!
//! Two keyspaces share one journal and hence one order of batches. `key` holds `Bucket::Key`: keys ascend, so its
//! tables never overlap and compaction moves them without rewriting; `rest` holds the other buckets under a
//! prefix byte.
//!
//! A commit reaches the operating system, not the disk; [`Storage::sync`] makes it durable without
//! holding up commits. What power loss leaves opens as a prefix of whole batches (`journal.rs`).
//!
//! `get` reads the newest committed row and may run ahead of the batch being committed; `scan` and snapshots see
//! whole batches.

use super::cache::ValueCache;
use super::journal::{self, NoteFile, Repaired, Syncer};
use super::{Bucket, Error, Snapshot, Storage, Visit, WriteBatch};
use ::fjall::config::{BlockSizePolicy, CompressionPolicy, FilterPolicy};
use ::fjall::{
    AbstractTree, CompressionType, Database, Keyspace, KeyspaceCreateOptions, OwnedWriteBatch, PersistMode, Readable,
};
use bytes::Bytes;
use std::fs::File;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// What the file `format` holds; the digits are the version.
const FORMAT: &str = "actd store 1\n";
const FORMAT_MAGIC: &str = "actd store ";

/// fjall holds key lengths in 16 bits.
const MAX_KEY_BYTES: usize = u16::MAX as usize - 1;

#[derive(Clone, Debug)]
pub struct Options {
    /// Values of `Bucket::Key` kept in memory. 0 turns the cache off.
    pub value_cache_bytes: u64,
    /// Blocks of tables kept in memory. Small: hot values have a cache of their own.
    pub block_cache_bytes: u64,
    /// Tables kept open; others are opened for each read.
    pub open_tables: usize,
    /// `key` rows collected in memory before they are written as a table. Up to four times as much waits
    /// for the disk before commits block.
    pub memtable_bytes: u64,
    /// Journals beyond this make fjall flush what keeps the oldest. Bounds disk and the time of a start.
    pub journal_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            value_cache_bytes: 64 << 20,
            block_cache_bytes: 32 << 20,
            open_tables: 32,
            memtable_bytes: 32 << 20,
            journal_bytes: 128 << 20,
        }
    }
}

pub struct FjallStorage {
    db: Database,
    key: Keyspace,
    rest: Keyspace,
    values: ValueCache,
    syncer: Mutex<Syncer>,
    committed_batches: AtomicU64,
    blocked_micros: AtomicU64,
    /// Why nothing is written any more.
    failed: OnceLock<Error>,
    repaired: Option<Repaired>,
}

impl FjallStorage {
    /// An empty store in a new directory. Durable when it returns.
    pub fn create(dir: &Path, options: &Options) -> Result<Self, Error> {
        let rows = dir.join("rows");
        std::fs::create_dir_all(&rows).map_err(|e| failed(dir, e))?;
        drop(open_rows(&rows, options)?);
        NoteFile::create(&dir.join("synced"))?;
        let format = dir.join("format");
        let write = || {
            let mut file = File::create_new(&format)?;
            file.write_all(FORMAT.as_bytes())?;
            file.sync_all()
        };
        write().map_err(|e| failed(&format, e))?;
        sync_directories(dir).map_err(|e| failed(dir, e))?;
        Self::open(dir, options)
    }

    /// Opens a store, cutting what power loss tore.
    pub fn open(dir: &Path, options: &Options) -> Result<Self, Error> {
        check_format(dir)?;
        engine::listen();
        let rows = dir.join("rows");
        let (notes, note) = NoteFile::open(&dir.join("synced"))?;
        refuse_locked(&rows)?;
        let checked = journal::check(&rows, note, dir)?;
        if let Some(repair) = &checked.repaired {
            tracing::warn!(
                journal = %repair.journal.display(), kept_bytes = repair.kept_bytes, cut_bytes = repair.cut_bytes,
                copy = %repair.copy.display(), "cut the torn end of the store's journal; the log has what it held"
            );
        }
        let (db, key, rest) = open_rows(&rows, options)?;
        verify_opened(&rows, &checked, [&key, &rest])?;
        let syncer = Syncer::new(&rows, &checked, notes, note)?;
        Ok(Self {
            db,
            key,
            rest,
            values: ValueCache::new(options.value_cache_bytes),
            syncer: Mutex::new(syncer),
            committed_batches: AtomicU64::new(0),
            blocked_micros: AtomicU64::new(0),
            failed: OnceLock::new(),
            repaired: checked.repaired,
        })
    }

    /// What was cut off at open, if anything.
    pub fn repaired(&self) -> Option<&Repaired> {
        self.repaired.as_ref()
    }

    /// Time commits took beyond what their size explains: waiting for a flush, a compaction or the disk.
    pub fn blocked(&self) -> Duration {
        Duration::from_micros(self.blocked_micros.load(Ordering::Relaxed))
    }

    /// Rewrites all tables without deleted and overwritten rows. Long; reads and commits go on meanwhile.
    pub fn major_compact(&self) -> Result<(), Error> {
        for keyspace in [&self.rest, &self.key] {
            keyspace.major_compact().map_err(|e| Error::Fatal(format!("compaction: {e}")))?;
        }
        Ok(())
    }

    /// Bytes the value cache holds.
    pub fn value_cache_bytes(&self) -> u64 {
        self.values.bytes()
    }

    fn keyspace(&self, bucket: Bucket) -> &Keyspace {
        if bucket == Bucket::Key { &self.key } else { &self.rest }
    }

    fn count_blocked(&self, took: Duration, rows: usize, bytes: usize) {
        // An unhindered commit takes about 2 µs a row and 1 µs a KiB.
        let expected = Duration::from_micros(1000 + 4 * rows as u64 + bytes as u64 / 512);
        if let Some(blocked) = took.checked_sub(expected) {
            self.blocked_micros.fetch_add(blocked.as_micros() as u64, Ordering::Relaxed);
        }
    }

    fn fail(&self, error: Error) -> Error {
        // The first is the reason; others follow from it.
        self.failed.get_or_init(|| error).clone()
    }

    fn check(&self) -> Result<(), Error> {
        self.failed.get().map_or(Ok(()), |reason| Err(reason.clone()))
    }
}

impl Storage for FjallStorage {
    fn get(&self, bucket: Bucket, key: &[u8]) -> Result<Option<Bytes>, Error> {
        let read = || {
            let found = with_row_key(bucket, key, |row_key| self.keyspace(bucket).get(row_key));
            found.map(|found| found.map(to_bytes)).map_err(read_failed)
        };
        if bucket == Bucket::Key { self.values.get(key, read) } else { read() }
    }

    fn scan(&self, bucket: Bucket, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), Error> {
        scan(&self.db.snapshot(), self.keyspace(bucket), bucket, from, to, visit)
    }

    fn commit(&self, batch: WriteBatch) -> Result<(), Error> {
        self.check()?;
        if batch.is_empty() {
            return Ok(());
        }
        let rows = batch.writes.len();
        let mut bytes = 0;
        let mut changes = OwnedWriteBatch::with_capacity(self.db.clone(), rows).durability(Some(PersistMode::Buffer));
        for (bucket, key, value) in &batch.writes {
            let keyspace = self.keyspace(*bucket);
            if key.len() > MAX_KEY_BYTES || (*bucket == Bucket::Key && key.is_empty()) {
                return Err(self.fail(Error::Fatal(format!("commit: a row key of {} bytes", key.len()))));
            }
            with_row_key(*bucket, key, |row_key| match value {
                Some(value) => {
                    bytes += value.len();
                    changes.insert(keyspace, row_key, &value[..]);
                }
                None => changes.remove(keyspace, row_key),
            });
        }
        let start = Instant::now();
        changes.commit().map_err(|e| self.fail(not_written(&e, engine::first_error())))?;
        self.count_blocked(start.elapsed(), rows, bytes);
        self.committed_batches.fetch_add(1, Ordering::Release);
        let key_rows = batch.writes.iter().filter(|(bucket, ..)| *bucket == Bucket::Key);
        self.values.committed(key_rows.map(|(_, key, value)| (key, value.as_ref())));
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        let mut syncer = self.syncer.lock().map_err(|_| Error::Fatal("a sync panicked".into()))?;
        self.check()?;
        let committed = self.committed_batches.load(Ordering::Acquire);
        syncer.sync(committed).map_err(|e| self.fail(e))
    }

    fn snapshot(&self) -> Box<dyn Snapshot> {
        Box::new(FjallSnapshot { snapshot: self.db.snapshot(), key: self.key.clone(), rest: self.rest.clone() })
    }

    fn disk_bytes(&self) -> u64 {
        // Fails only when the journal's lock is poisoned, and then commits fail too.
        self.db.disk_space().unwrap_or(0)
    }
}

struct FjallSnapshot {
    snapshot: ::fjall::Snapshot,
    key: Keyspace,
    rest: Keyspace,
}

impl Snapshot for FjallSnapshot {
    fn scan(&self, bucket: Bucket, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), Error> {
        let keyspace = if bucket == Bucket::Key { &self.key } else { &self.rest };
        scan(&self.snapshot, keyspace, bucket, from, to, visit)
    }
}

fn scan(
    snapshot: &::fjall::Snapshot,
    keyspace: &Keyspace,
    bucket: Bucket,
    from: &[u8],
    to: &[u8],
    visit: Visit<'_>,
) -> Result<(), Error> {
    if !to.is_empty() && from >= to {
        return Ok(());
    }
    let prefix = prefix(bucket);
    let start = prefix.iter().chain(from).copied().collect::<Vec<_>>();
    let end = match (prefix, to) {
        (None, []) => None,
        (None, to) => Some(to.to_vec()),
        (Some(prefix), []) => Some(vec![prefix + 1]),
        (Some(prefix), to) => Some([&[prefix], to].concat()),
    };
    let rows = match end {
        Some(end) => snapshot.range(keyspace, start..end),
        None => snapshot.range(keyspace, start..),
    };
    let skip = usize::from(prefix.is_some());
    for row in rows {
        let (key, value) = row.into_inner().map_err(read_failed)?;
        if !visit(&key[skip..], to_bytes(value)) {
            break;
        }
    }
    Ok(())
}

/// On disk: never changes.
fn prefix(bucket: Bucket) -> Option<u8> {
    match bucket {
        Bucket::Key => None,
        Bucket::Alarm => Some(1),
        Bucket::Auth => Some(2),
        Bucket::AuthRoles => Some(3),
        Bucket::AuthUsers => Some(4),
        Bucket::Cluster => Some(5),
        Bucket::Lease => Some(6),
        Bucket::Members => Some(7),
        Bucket::MembersRemoved => Some(8),
        Bucket::Meta => Some(9),
    }
}

fn with_row_key<T>(bucket: Bucket, key: &[u8], use_it: impl FnOnce(&[u8]) -> T) -> T {
    let Some(prefix) = prefix(bucket) else { return use_it(key) };
    let mut short = [0; 64];
    match short.get_mut(..=key.len()) {
        Some(row_key) => {
            row_key[0] = prefix;
            row_key[1..].copy_from_slice(key);
            use_it(row_key)
        }
        None => use_it(&[&[prefix], key].concat()),
    }
}

/// A small value is copied: as a slice it would keep its whole block in memory.
fn to_bytes(value: ::fjall::UserValue) -> Bytes {
    const OWN_BLOCK: usize = 16 << 10;
    if value.len() < OWN_BLOCK { Bytes::copy_from_slice(&value) } else { Bytes::from_owner(value) }
}

fn open_rows(rows: &Path, options: &Options) -> Result<(Database, Keyspace, Keyspace), Error> {
    let open = || {
        let db = Database::builder(rows)
            .cache_size(options.block_cache_bytes)
            .max_cached_files(Some(options.open_tables))
            .max_journaling_size(options.journal_bytes)
            // The scan in `journal.rs` reads plain records, and values are small.
            .journal_compression(CompressionType::None)
            // With one, a memtable cannot be sealed between a flush's sync of the journal and the flush, which
            // takes all that are sealed: tables never hold what the journal could lose.
            .worker_threads(1)
            .open()?;
        let key = db.keyspace("key", || {
            KeyspaceCreateOptions::default()
                .max_memtable_size(options.memtable_bytes)
                // Ascending keys: a table's key range says all a filter could.
                .filter_policy(FilterPolicy::disabled())
                .expect_point_read_hits(true)
                .data_block_size_policy(BlockSizePolicy::all(4 << 10))
                .data_block_compression_policy(CompressionPolicy::new([
                    CompressionType::None,
                    CompressionType::None,
                    CompressionType::Lz4,
                ]))
        })?;
        let rest = db.keyspace("rest", || KeyspaceCreateOptions::default().max_memtable_size(8 << 20))?;
        Ok((db, key, rest))
    };
    let opened: Result<::fjall::Result<_>, _> = catch_unwind(AssertUnwindSafe(open));
    match opened {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(::fjall::Error::Locked)) => Err(locked(rows)),
        Ok(Err(e)) => Err(Error::Refused(format!(
            "{}: {e}; if the disk is sound, move the member's data directory away and let it join again, or \
             restore a backup",
            rows.display()
        ))),
        Err(_) => Err(Error::Refused(format!(
            "{}: the tables are damaged. Move the member's data directory away and let it join again, or restore \
             a backup",
            rows.display()
        ))),
    }
}

/// fjall must have found what `journal::check` found, and no table may be newer than the journals.
fn verify_opened(rows: &Path, checked: &journal::Checked, keyspaces: [&Keyspace; 2]) -> Result<(), Error> {
    let path = journal::path(rows, checked.newest);
    let len = std::fs::metadata(&path).map_err(|e| failed(&path, e))?.len();
    if len != checked.newest_end {
        let text = format!("{}: {} bytes are whole, {len} were read", path.display(), checked.newest_end);
        return Err(Error::Refused(text));
    }
    for keyspace in keyspaces {
        let tables = keyspace.tree.get_highest_persisted_seqno();
        if let (Some(tables), Some(journals)) = (tables, checked.last_seqno)
            && tables > journals
        {
            return Err(Error::Refused(format!(
                "{}: the end of the journal is lost, tables of {} hold newer rows. Move the member's data directory \
                 away and let it join again, or restore a backup",
                path.display(),
                keyspace.name()
            )));
        }
    }
    Ok(())
}

/// fjall syncs its files, but not every directory that names them.
fn sync_directories(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_directories(&entry.path())?;
        }
    }
    File::open(dir)?.sync_all()
}

fn check_format(dir: &Path) -> Result<(), Error> {
    let path = dir.join("format");
    let text = std::fs::read_to_string(&path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::InvalidData => {
            Error::Refused(format!("{}: {e}: {} is no store of actd", path.display(), dir.display()))
        }
        _ => failed(&path, e),
    })?;
    if text == FORMAT {
        return Ok(());
    }
    let said = match text.strip_prefix(FORMAT_MAGIC) {
        Some(version) => format!("format {} is unknown to this version of actd; use a newer one", version.trim_end()),
        None => "not the format file of a store of actd".into(),
    };
    Err(Error::Refused(format!("{}: {said}", path.display())))
}

/// Before the journals are looked at: they may be another process's.
fn refuse_locked(rows: &Path) -> Result<(), Error> {
    let path = rows.join("lock");
    let file = File::open(&path).map_err(|e| failed(&path, e))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(locked(rows)),
        Err(e) => Err(failed(&path, e.into())),
    }
}

fn locked(rows: &Path) -> Error {
    Error::Refused(format!("{} is locked: another process uses this store", rows.display()))
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::Fatal(format!("{}: {error}", path.display()))
}

/// Why a commit failed: the engine says only that it has failed before when its worker did.
fn not_written(error: &::fjall::Error, earlier: Option<&str>) -> Error {
    let mut text = format!("commit: {error}");
    if let (::fjall::Error::Poisoned, Some(earlier)) = (error, earlier) {
        text.push_str(&format!(", because of an earlier error: {earlier}"));
    }
    if text.contains("StorageFull") {
        text.push_str(
            "; the disk is full. Everything acknowledged is in the log: a start with more room loses nothing",
        );
    }
    Error::Fatal(text)
}

fn read_failed(error: ::fjall::Error) -> Error {
    Error::Fatal(format!("read: {error}"))
}

/// What the engine tells nobody but its log.
mod engine {
    use std::sync::OnceLock;

    static FIRST: OnceLock<String> = OnceLock::new();

    /// Takes the engine's errors down, from now on.
    pub fn listen() {
        // Another logger is there already, at the latest from the second store on.
        if log::set_logger(&Errors).is_ok() {
            log::set_max_level(log::LevelFilter::Error);
        }
    }

    pub fn first_error() -> Option<&'static str> {
        FIRST.get().map(String::as_str)
    }

    pub struct Errors;

    impl log::Log for Errors {
        fn enabled(&self, metadata: &log::Metadata) -> bool {
            let of = |name| metadata.target().starts_with(name);
            metadata.level() == log::Level::Error && (of("fjall") || of("lsm_tree"))
        }

        fn log(&self, record: &log::Record) {
            if self.enabled(record.metadata()) {
                tracing::error!("the store's engine: {}", record.args());
                FIRST.get_or_init(|| record.args().to_string());
            }
        }

        fn flush(&self) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_commit_names_the_first_error_and_a_full_disk() {
        use log::Log;
        let errors = engine::Errors;
        let full = "Worker #0 crashed: Io(Os { code: 28, kind: StorageFull })";
        let record = |target, text: std::fmt::Arguments<'_>| {
            errors.log(&log::Record::builder().level(log::Level::Error).target(target).args(text).build());
        };
        record("another", format_args!("of no interest"));
        record("fjall::worker_pool", format_args!("{full}"));
        record("fjall::worker_pool", format_args!("what follows"));
        let text = not_written(&::fjall::Error::Poisoned, engine::first_error()).to_string();
        assert!(text.contains("Poisoned") && text.contains(full) && text.contains("the disk is full"), "{text}");
        let text = not_written(&::fjall::Error::Poisoned, None).to_string();
        assert!(!text.contains("full"), "{text}");
    }
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    fn options() -> Options {
        Options { value_cache_bytes: 1 << 20, ..Options::default() }
    }

    fn commit(store: &FjallStorage, batches: std::ops::RangeInclusive<u8>) {
        for n in batches {
            let mut batch = WriteBatch::default();
            batch.put(Bucket::Key, vec![n], vec![n; 700]);
            batch.put(Bucket::Meta, &b"n"[..], vec![n]);
            store.commit(batch).unwrap();
        }
    }

    /// The counter of the last batch, which every row must agree with.
    fn last_batch(store: &FjallStorage) -> u8 {
        let last = store.get(Bucket::Meta, b"n").unwrap().unwrap()[0];
        let mut keys = Vec::new();
        let mut visit = |key: &[u8], _| {
            keys.extend_from_slice(key);
            true
        };
        store.scan(Bucket::Key, b"", b"", &mut visit).unwrap();
        assert_eq!(keys, (1..=last).collect::<Vec<_>>());
        last
    }

    fn journal_end(journal: &Path) -> u64 {
        journal::scan(&File::open(journal).unwrap(), 0, None).unwrap().end
    }

    fn zero(path: &Path, at: u64, len: usize) {
        OpenOptions::new().write(true).open(path).unwrap().write_all_at(&vec![0; len], at).unwrap();
    }

    /// A flush made batches durable that no sync noted, in a table for one keyspace and in the journal for the
    /// other. Cutting at the note would keep the first and lose the second.
    #[test]
    fn crash_after_a_flush_keeps_both_keyspaces_in_step() {
        for flushed in ["key", "rest"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("s");
            let journal = path.join("rows/0.jnl");
            let store = FjallStorage::create(&path, &options()).unwrap();
            commit(&store, 1..=10);
            store.sync().unwrap();
            let synced = journal_end(&journal);
            commit(&store, 11..=20);
            let keyspace = if flushed == "key" { &store.key } else { &store.rest };
            assert!(keyspace.rotate_memtable().unwrap());
            while keyspace.tree.get_highest_persisted_seqno().is_none() {
                std::thread::yield_now();
            }
            let flush = journal_end(&journal);
            commit(&store, 21..=30);
            drop(store);

            zero(&journal, flush + 2000, 512);
            let store = FjallStorage::open(&path, &options()).unwrap();
            assert_eq!(last_batch(&store), 22, "{flushed} flushed");
            assert!(store.repaired().is_some());
            drop(store);

            // No crash does this: the flush had synced it.
            zero(&journal, synced + 2000, 512);
            let text = FjallStorage::open(&path, &options()).map(|_| ()).unwrap_err().to_string();
            assert!(text.contains(&format!("tables of {flushed} hold newer rows")), "{text}");
        }
    }

    #[test]
    fn unknown_format_refuses_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(FjallStorage::create(&path, &options()).unwrap());
        for (format, says) in [("actd store 2\n", "format 2 is unknown"), ("bolt\n", "not the format file")] {
            std::fs::write(path.join("format"), format).unwrap();
            let text = FjallStorage::open(&path, &options()).map(|_| ()).unwrap_err().to_string();
            assert!(text.contains(says) && text.contains("/format:"), "{text}");
        }
        std::fs::remove_file(path.join("format")).unwrap();
        let text = FjallStorage::open(&path, &options()).map(|_| ()).unwrap_err().to_string();
        assert!(text.contains("no store of actd"), "{text}");
    }

    #[test]
    fn store_in_use_refuses_a_second_opener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let store = FjallStorage::create(&path, &options()).unwrap();
        commit(&store, 1..=5);
        let text = FjallStorage::open(&path, &options()).map(|_| ()).unwrap_err().to_string();
        assert!(text.contains("is locked"), "{text}");
        drop(store);
        assert_eq!(last_batch(&FjallStorage::open(&path, &options()).unwrap()), 5);
    }

    /// What a sync notes is what fjall wrote: the format this module reads is the one fjall writes.
    #[test]
    fn sync_notes_every_committed_batch() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let store = FjallStorage::create(&path, &options()).unwrap();
        for n in 1..=20 {
            commit(&store, n..=n);
            store.sync().unwrap();
            let (_, note) = NoteFile::open(&path.join("synced")).unwrap();
            assert_eq!(note.length, journal_end(&path.join("rows/0.jnl")));
        }
        let found = journal::scan(&File::open(path.join("rows/0.jnl")).unwrap(), 0, None).unwrap();
        assert_eq!(found.batches, 20);
    }

    #[test]
    fn major_compaction_keeps_rows_and_frees_deleted_ones() {
        let dir = tempfile::tempdir().unwrap();
        let store = FjallStorage::create(&dir.path().join("s"), &options()).unwrap();
        commit(&store, 1..=30);
        store.key.rotate_memtable_and_wait().unwrap();
        let mut batch = WriteBatch::default();
        (11..=30).for_each(|n| batch.delete(Bucket::Key, vec![n]));
        batch.put(Bucket::Meta, &b"n"[..], vec![10]);
        store.commit(batch).unwrap();
        store.key.rotate_memtable_and_wait().unwrap();
        let before = store.key.disk_space();
        store.major_compact().unwrap();
        assert_eq!(last_batch(&store), 10);
        assert!(store.key.disk_space() < before, "{} of {before} bytes", store.key.disk_space());
    }
}
