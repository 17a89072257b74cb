//! The key index: which revisions each key has. Persistent: a clone is a snapshot and costs one pointer.
//!
//! A counted B-tree of packed leaves ([`node`]); each sub-tree knows its number of keys, of keys alive and of rows, and
//! its newest change. One owner changes it, any number of clones read as they were. Holds no values and knows no
//! compact revision: the caller refuses reads that are too old.

mod keys;
mod node;
#[cfg(test)]
mod tests;

use super::{
    KeyRange, Revision,
    history::{History, Row},
};
use node::{Child, Recorded, Scan, Slice, Span};

/// What the index knows of a key at one point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyMeta {
    /// The newest change at or before the point asked for.
    pub modified: Revision,
    /// Main revision of the put that began this life of the key.
    pub created: i64,
    /// Puts since then, this one included.
    pub version: i64,
    /// Size of the row of `modified`: row key + value bytes.
    pub row_bytes: u32,
}

#[derive(Clone, Default)]
pub struct Index {
    root: Child,
}

impl Index {
    /// Keys held, dead ones that clean-up has not yet removed included.
    pub fn len(&self) -> usize {
        self.root.sum.keys
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The live state of `key` at revision `at` (all changes with main <= `at`); `None` if absent or deleted then.
    pub fn get(&self, key: &[u8], at: i64) -> Option<KeyMeta> {
        self.root.find(key)?.at(at).filter(|row| !row.tombstone).map(meta)
    }

    /// Number of keys of `range` alive at `at`. O(log n) at the current revision; at an older one it looks only into
    /// the sub-trees that changed since.
    pub fn count(&self, range: KeyRange<'_>, at: i64) -> usize {
        if range.is_single() {
            return usize::from(self.get(range.key, at).is_some());
        }
        span(range).map_or(0, |span| self.root.count(span, at))
    }

    /// Calls `visit` for each key of `range` alive at `at`, ascending, until it returns false.
    pub fn visit(&self, range: KeyRange<'_>, at: i64, visit: &mut dyn FnMut(&[u8], KeyMeta) -> bool) {
        if range.is_single() {
            if let Some(meta) = self.get(range.key, at) {
                visit(range.key, meta);
            }
        } else if let Some(span) = span(range) {
            self.root.visit(span, at, &mut |key, row| visit(key, meta(row)));
        }
    }

    /// All changes (true: tombstone) of keys in `range` with `from` <= main <= `to`, sorted by revision.
    /// Cheap when little changed: sub-trees without a change since `from` are skipped.
    pub fn changes(&self, range: KeyRange<'_>, from: i64, to: i64) -> Vec<(Revision, bool, bytes::Bytes)> {
        let mut found = Vec::new();
        if range.is_single() {
            let rows = self.root.find(range.key).into_iter().flat_map(|history| history.up_to(to));
            let key = bytes::Bytes::copy_from_slice(range.key);
            found.extend(
                rows.take_while(|row| row.revision.main >= from).map(|row| (row.revision, row.tombstone, key.clone())),
            );
        } else if let Some(span) = span(range) {
            self.root.changes(span, from, to, &mut found);
        }
        found.sort_unstable_by_key(|(revision, ..)| *revision);
        found
    }

    /// Records a put at `rev`, which is above every revision recorded so far.
    pub fn put(&mut self, key: &[u8], rev: Revision, row_bytes: u32) -> KeyMeta {
        meta(self.record(key, rev, |newest| Row::put_after(newest, rev, row_bytes)).now)
    }

    /// Records a delete at `rev`; returns what was deleted, `None` (and nothing recorded) if the key is not alive.
    pub fn delete(&mut self, key: &[u8], rev: Revision, row_bytes: u32) -> Option<KeyMeta> {
        // A look first, so that a delete of nothing copies nothing.
        if !self.root.find(key).is_some_and(History::is_alive) {
            return None;
        }
        self.record(key, rev, |_| Row::tombstone(rev, row_bytes)).before.map(meta)
    }

    /// Rebuilding at start, rows in ascending revision order: a put row with the `created` and `version` it stores.
    /// Rows of earlier revisions of the key may be missing (compacted).
    pub fn restore_put(&mut self, key: &[u8], rev: Revision, created: i64, version: i64, row_bytes: u32) {
        self.record(key, rev, |_| Row::put(rev, created, version, row_bytes));
    }

    /// Rebuilding at start: a tombstone row.
    pub fn restore_delete(&mut self, key: &[u8], rev: Revision, row_bytes: u32) {
        self.record(key, rev, |_| Row::tombstone(rev, row_bytes));
    }

    /// One slice of clean-up after a compaction at `at`: looks at up to `keys` keys from `cursor` on (empty: the
    /// first), drops the revisions that the compaction condemns, appends their rows (revision, tombstone, bytes) to
    /// `removed`, and returns where to go on; `None` when done. Kept per key: the newest revision <= `at`, unless it
    /// is a tombstone below `at`; a tombstone exactly at `at` stays.
    ///
    /// A removed row counts like a key looked at; keys in sub-trees where nothing can be condemned are not looked at.
    /// `cursor` needs not be a key: keys may come and go between slices.
    pub fn compact_slice(
        &mut self,
        at: i64,
        cursor: &[u8],
        keys: usize,
        removed: &mut Vec<(Revision, bool, u32)>,
    ) -> Option<bytes::Bytes> {
        let mut slice = Slice { at, left: keys.max(1), removed };
        let mut cursor = cursor.to_vec();
        loop {
            // Found first and changed after, so that leaves without anything condemned are not copied.
            let found = match self.root.scan(Some(&cursor), at, &mut slice.left) {
                Scan::Done => return None,
                Scan::Spent(next) => return Some(next.into()),
                Scan::Found(key) => key,
            };
            let next = self.root.compact(&found, &mut slice);
            self.root.shrink();
            cursor = next?;
            if slice.left == 0 {
                return Some(cursor.into());
            }
        }
    }

    /// The revisions with main <= `to` that a compaction at `at` condemns, ascending. Cheap when there are few: keys in
    /// sub-trees where nothing can be condemned are not looked at.
    pub fn condemned(&self, at: i64, to: i64) -> Vec<Revision> {
        let mut found = Vec::new();
        self.root.condemned(at, to, &mut found);
        found.sort_unstable();
        found
    }

    /// The set *keep* of the hash rule for revision `at`, ascending: for each key, look at its lifetimes (create to
    /// tombstone; the last is open and may be empty); take the first lifetime whose tombstone is >= `at`, else the
    /// open one; its newest row with main <= `at`, if any, unless that row is that lifetime's closing tombstone.
    pub fn keep(&self, at: i64) -> Vec<Revision> {
        let mut kept = Vec::new();
        self.root.each(&mut |history| kept.extend(history.kept_by_hash(at)));
        kept.sort_unstable();
        kept
    }

    fn record(&mut self, key: &[u8], rev: Revision, next: impl FnOnce(Option<Row>) -> Row) -> Recorded {
        assert!(rev.main >= self.root.sum.changed, "changes come in revision order");
        let (recorded, split) = self.root.record(key, next);
        if let Some(split) = split {
            self.root.grow(split);
        }
        recorded
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.root.sum.fmt(f)
    }
}

fn meta(row: Row) -> KeyMeta {
    KeyMeta { modified: row.revision, created: row.created, version: row.version, row_bytes: row.bytes }
}

/// A range of more than one key; `None` if empty.
fn span(range: KeyRange<'_>) -> Option<Span<'_>> {
    (!range.is_empty()).then_some(Span { from: Some(range.key), to: (!range.is_from_key()).then_some(range.end) })
}

/// Room that a node reserves when it outgrows its buffers. Little, because nodes are copied to size anyway and slack
/// is multiplied by all leaves.
const SPARE: usize = if cfg!(test) { 2 } else { 8 };

fn insert_tight<T>(items: &mut Vec<T>, i: usize, item: T) {
    if items.len() == items.capacity() {
        items.reserve_exact(SPARE);
    }
    items.insert(i, item);
}
