//! Power loss may drop or tear anything behind the last sync of the newest journal: the store opens all the same,
//! to a prefix of whole batches that holds at least what was synced. Damage before that refuses. The store in memory that the
//! simulation uses keeps the same contract.
//!
//! `ACTD_TORTURE=1` tries every position instead of a sample.

use actd::storage::{Bucket, FjallStorage, MemStorage, Options, Storage, WriteBatch};
use std::fs::{self, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

fn options() -> Options {
    Options { value_cache_bytes: 0, block_cache_bytes: 1 << 20, ..Options::default() }
}

/// Batch `n`: a counter, and rows whose number differs between batches.
fn batch(n: u64, value_bytes: usize) -> WriteBatch {
    let mut batch = WriteBatch::default();
    for row in 0..n % 4 + 1 {
        batch.put(Bucket::Key, row_key(n, row), row_value(n, row, value_bytes));
    }
    batch.put(Bucket::Meta, &b"n"[..], n.to_be_bytes().to_vec());
    batch.put(Bucket::Lease, n.to_be_bytes().to_vec(), n.to_be_bytes().to_vec());
    if n >= 3 {
        batch.delete(Bucket::Lease, (n - 2).to_be_bytes().to_vec());
    }
    batch
}

fn row_key(n: u64, row: u64) -> Vec<u8> {
    [n.to_be_bytes(), row.to_be_bytes()].concat()
}

/// Holds runs of zeros, which a lost sector could be mistaken for.
fn row_value(n: u64, row: u64, bytes: usize) -> Vec<u8> {
    let pattern: Vec<u8> = (0..192).map(|at: u64| if at < 64 { 0 } else { (at * 31 + n * 7 + row) as u8 }).collect();
    let mut value = pattern.repeat(bytes / pattern.len() + 1);
    value.truncate(bytes);
    value
}

fn commit(store: &dyn Storage, batches: Range<u64>, value_bytes: usize) {
    for n in batches {
        store.commit(batch(n, value_bytes)).unwrap();
    }
}

/// The number of batches the store shows; panics unless it shows exactly these.
fn whole_batches(store: &dyn Storage, value_bytes: usize) -> u64 {
    let last = store.get(Bucket::Meta, b"n").unwrap().map_or(0, |n| u64::from_be_bytes(n[..].try_into().unwrap()));
    let mut expected = (1..=last).flat_map(|n| (0..n % 4 + 1).map(move |row| (n, row)));
    let mut visit = |key: &[u8], value: bytes::Bytes| {
        let (n, row) = expected.next().expect("a row of a batch that is not there");
        assert_eq!(key, row_key(n, row));
        assert!(value == row_value(n, row, value_bytes), "batch {n}, row {row}");
        true
    };
    store.scan(Bucket::Key, b"", b"", &mut visit).unwrap();
    assert_eq!(expected.next(), None, "a row of a batch is missing, the counter says {last}");
    let mut leases = Vec::new();
    let mut visit = |key: &[u8], _| {
        leases.push(u64::from_be_bytes(key.try_into().unwrap()));
        true
    };
    store.scan(Bucket::Lease, b"", b"", &mut visit).unwrap();
    assert_eq!(leases, (last.saturating_sub(1).max(1)..=last).collect::<Vec<_>>());
    last
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else if entry.file_name().to_string_lossy().ends_with(".jnl") {
            copy_sparse(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Journals are 64 MiB of mostly nothing; an image is kept short of it, a trial gets it back.
fn copy_sparse(from: &Path, to: &Path) {
    let len = fs::metadata(from).unwrap().len();
    let end = data_end(from);
    let file = fs::File::create(to).unwrap();
    let mut data = vec![0; end as usize];
    fs::File::open(from).unwrap().read_exact_at(&mut data, 0).unwrap();
    file.write_all_at(&data, 0).unwrap();
    file.set_len(len.min(end + (1 << 16))).unwrap();
}

fn newest_journal(dir: &Path) -> PathBuf {
    let journals = fs::read_dir(dir.join("rows")).unwrap().filter_map(|entry| {
        let path = entry.unwrap().path();
        let id = path.file_name()?.to_str()?.strip_suffix(".jnl")?.parse::<u64>().ok()?;
        Some((id, path))
    });
    journals.max().unwrap().1
}

fn data_end(journal: &Path) -> u64 {
    let mut data = fs::read(journal).unwrap();
    while data.last_chunk::<4096>().is_some_and(|chunk| *chunk == [0; 4096]) {
        data.truncate(data.len() - 4096);
    }
    data.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1)
}

fn zero(file: &Path, at: u64, len: u64) {
    OpenOptions::new().write(true).open(file).unwrap().write_all_at(&vec![0; len as usize], at).unwrap();
}

fn torture() -> bool {
    std::env::var_os("ACTD_TORTURE").is_some()
}

struct Crashed {
    _dir: tempfile::TempDir,
    /// As the process left it, with everything the operating system had.
    image: PathBuf,
    trial: PathBuf,
    synced_batches: u64,
    value_bytes: usize,
    /// The part of the newest journal that was not synced.
    tail: Range<u64>,
}

impl Crashed {
    fn new(value_bytes: usize, synced_batches: u64, batches: u64, reopened: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store_dir = dir.path().join("store");
        let mut store = FjallStorage::create(&store_dir, &options()).unwrap();
        let half = synced_batches / 2;
        commit(&store, 1..half, value_bytes);
        if reopened {
            drop(store);
            store = FjallStorage::open(&store_dir, &options()).unwrap();
        }
        commit(&store, half..synced_batches + 1, value_bytes);
        store.sync().unwrap();
        let journal = newest_journal(&store_dir);
        let start = data_end(&journal);
        commit(&store, synced_batches + 1..batches + 1, value_bytes);
        let tail = start..data_end(&journal);
        let (image, trial) = (dir.path().join("image"), dir.path().join("trial"));
        copy(&store_dir, &image);
        drop(store);
        Self { _dir: dir, image, trial, synced_batches, value_bytes, tail }
    }

    fn new_trial(&self, damage: impl FnOnce(&Path)) {
        let _ = fs::remove_dir_all(&self.trial);
        copy(&self.image, &self.trial);
        damage(&newest_journal(&self.trial));
    }

    /// Opens a copy after `damage` to its newest journal; the number of batches it holds.
    fn opens_after(&self, what: &str, damage: impl FnOnce(&Path)) -> u64 {
        self.new_trial(damage);
        let open = || FjallStorage::open(&self.trial, &options()).unwrap_or_else(|e| panic!("{what}: {e}"));
        let store = open();
        let found = whole_batches(&store, self.value_bytes);
        assert!(found >= self.synced_batches, "{what}: {found} batches");
        // It is a store like any other.
        commit(&store, found + 1..found + 3, self.value_bytes);
        drop(store);
        let store = open();
        assert_eq!(store.repaired(), None, "{what}");
        assert_eq!(whole_batches(&store, self.value_bytes), found + 2, "{what}");
        found
    }

    fn refuses_after(&self, damage: impl FnOnce(&Path)) -> String {
        self.new_trial(damage);
        match FjallStorage::open(&self.trial, &options()) {
            Ok(store) => panic!("opened with {} batches", whole_batches(&store, self.value_bytes)),
            Err(e) => e.to_string(),
        }
    }

    /// Pieces of the tail aligned as a disk writes them: about `trials` of them.
    fn pieces(&self, len: u64, trials: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let first = self.tail.start.div_ceil(len);
        let count = self.tail.end.div_ceil(len).saturating_sub(first);
        let step = if torture() { 1 } else { count.div_ceil(trials).max(1) };
        (0..count).step_by(step as usize).map(move |n| (first + n) * len..(first + n + 1) * len)
    }
}

fn lost_pieces_leave_a_prefix(value_bytes: usize, batches: u64, trials: u64, reopened: bool) {
    let crashed = Crashed::new(value_bytes, 10, batches, reopened);
    assert_eq!(crashed.opens_after("nothing lost", |_| {}), batches);
    let mut shortest = batches;
    for len in [512, 4096] {
        for piece in crashed.pieces(len, trials) {
            let what = format!("{value_bytes}-byte values, zeros at {piece:?}");
            let found = crashed.opens_after(&what, |journal| zero(journal, piece.start, len));
            shortest = shortest.min(found);
        }
    }
    assert!(shortest < batches, "no trial lost anything");
    // The piece, and all that follows.
    for piece in crashed.pieces(512, trials) {
        let what = format!("{value_bytes}-byte values, cut at {}", piece.start);
        crashed.opens_after(&what, |journal| {
            OpenOptions::new().write(true).open(journal).unwrap().set_len(piece.start + 77).unwrap();
        });
    }
}

#[test]
fn the_store_in_memory_leaves_a_prefix_that_holds_what_was_synced() {
    for synced in 0..6 {
        for keep in 0..6 {
            let store = MemStorage::new();
            commit(&store, 1..synced + 1, 40);
            store.sync().unwrap();
            commit(&store, synced + 1..10, 40);
            store.crash(keep);
            assert_eq!(whole_batches(&store, 40), (synced + keep as u64).min(9));
            // And it goes on.
            let left = whole_batches(&store, 40);
            commit(&store, left + 1..12, 40);
            assert_eq!(whole_batches(&store, 40), 11);
        }
    }
}

#[test]
fn lost_pieces_of_small_batches_leave_a_prefix() {
    lost_pieces_leave_a_prefix(64, 80, 10, false);
}

#[test]
fn lost_pieces_of_middling_batches_leave_a_prefix() {
    lost_pieces_leave_a_prefix(1500, 40, 10, true);
}

#[test]
fn lost_pieces_of_large_batches_leave_a_prefix() {
    lost_pieces_leave_a_prefix(64 << 10, 14, 3, false);
}

/// A batch behind a hole is whole in itself and must not appear.
#[test]
fn batches_behind_a_hole_are_cut_with_a_copy_and_a_report() {
    let crashed = Crashed::new(1500, 10, 40, false);
    let middle = (crashed.tail.start + crashed.tail.end) / 2 / 512 * 512;
    let found = crashed.opens_after("hole", |journal| zero(journal, middle, 512));
    assert!((11..39).contains(&found));
    crashed.new_trial(|journal| zero(journal, middle, 512));
    let store = FjallStorage::open(&crashed.trial, &options()).unwrap();
    let repaired = store.repaired().unwrap();
    assert!(repaired.kept_bytes < middle + 512 && repaired.kept_bytes >= crashed.tail.start);
    assert_eq!(repaired.kept_bytes + repaired.cut_bytes, crashed.tail.end);
    assert_eq!(fs::metadata(&repaired.copy).unwrap().len(), repaired.cut_bytes);
}

/// One sector reached the disk, the next did not, two more did, and so on.
#[test]
fn any_pattern_of_lost_sectors_leaves_a_prefix() {
    let crashed = Crashed::new(64, 10, 24, false);
    let sectors: Vec<_> = crashed.pieces(512, u64::MAX).collect();
    let patterns = if torture() { 1024 } else { 12 };
    for n in 0..patterns {
        let lost = (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        crashed.opens_after(&format!("pattern {n}"), |journal| {
            for (at, sector) in sectors.iter().enumerate() {
                if lost >> (at % 64) & 1 == 1 {
                    zero(journal, sector.start, 512);
                }
            }
        });
    }
}

#[test]
fn damage_below_the_last_sync_refuses_and_names_the_file() {
    let crashed = Crashed::new(300, 40, 60, false);
    for at in [0, 512, crashed.tail.start / 2, crashed.tail.start - 512] {
        let text = crashed.refuses_after(|journal| zero(journal, at, 512));
        assert!(text.contains("rows/0.jnl") && text.contains("restore a backup"), "{text}");
    }
    let text = crashed.refuses_after(|journal| {
        OpenOptions::new().write(true).open(journal).unwrap().set_len(crashed.tail.start - 1).unwrap();
    });
    assert!(text.contains("which was synced"), "{text}");
    let text = crashed.refuses_after(|journal| fs::remove_file(journal).unwrap_or(()));
    assert!(text.contains("0.jnl"), "{text}");
}

#[test]
fn torn_note_leaves_the_note_before_it() {
    let crashed = Crashed::new(300, 40, 60, false);
    for slot in [0, 4096] {
        let tear = |journal: &Path| zero(&journal.ancestors().nth(2).unwrap().join("synced"), slot, 36);
        assert_eq!(crashed.opens_after("note torn", tear), 60);
    }
}

/// A store whose journal was completed and whose memtables were flushed behind the back of the last sync.
struct Rotated {
    _dir: tempfile::TempDir,
    image: PathBuf,
    trial: PathBuf,
    options: Options,
    /// The last batch surely in the completed journal, and the last of all.
    completed: u64,
    batches: u64,
}

const ROTATED_VALUE_BYTES: usize = 64 << 10;

impl Rotated {
    fn new(memtable_bytes: u64, batches_after: u64) -> Self {
        let options = Options { memtable_bytes, ..options() };
        let dir = tempfile::tempdir().unwrap();
        let (image, trial) = (dir.path().join("store"), dir.path().join("trial"));
        let store = FjallStorage::create(&image, &options).unwrap();
        commit(&store, 1..11, ROTATED_VALUE_BYTES);
        store.sync().unwrap();
        let mut n = 10;
        while !image.join("rows/1.jnl").exists() {
            n += 1;
            commit(&store, n..n + 1, ROTATED_VALUE_BYTES);
            assert!(n < 5_000, "the journal is never completed");
        }
        let batches = n + batches_after;
        commit(&store, n + 1..batches + 1, ROTATED_VALUE_BYTES);
        drop(store);
        Self { _dir: dir, image, trial, options, completed: n - 2, batches }
    }

    fn opened_after(&self, damage: impl FnOnce(&Path)) -> Result<u64, String> {
        let _ = fs::remove_dir_all(&self.trial);
        copy(&self.image, &self.trial);
        damage(&self.trial.join("rows"));
        let store = FjallStorage::open(&self.trial, &self.options).map_err(|e| e.to_string())?;
        Ok(whole_batches(&store, ROTATED_VALUE_BYTES))
    }
}

#[test]
fn crash_after_the_journal_was_completed_leaves_a_prefix() {
    let store = Rotated::new(16 << 20, 20);
    let end = data_end(&store.image.join("rows/1.jnl"));
    assert!(end > 1 << 20);
    // In a debug build a trial takes seconds.
    let holes = if torture() { 64 } else { 1 };
    for hole in 0..holes {
        let at = end * (2 * hole + 1) / (2 * holes) / 512 * 512;
        let found = store.opened_after(|rows| zero(&rows.join("1.jnl"), at, 4096)).unwrap();
        assert!(found >= store.completed && found < store.batches, "hole at {at}: {found} of {}", store.batches);
    }
    // A completed journal was durable to its end.
    let text = store.opened_after(|rows| zero(&rows.join("0.jnl"), 32 << 20, 512)).unwrap_err();
    assert!(text.contains("0.jnl") && text.contains("completed journal is damaged"), "{text}");
}
