//! The key index: which revisions each key has. Persistent: a clone is a snapshot and costs one pointer.

use super::{KeyRange, Revision};

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

#[derive(Clone, Debug, Default)]
pub struct Index {
    _todo: std::collections::BTreeMap<Vec<u8>, Vec<(Revision, bool)>>,
}

#[allow(unused_variables)]
impl Index {
    /// The live state of `key` at revision `at` (all changes with main <= `at`); `None` if absent or deleted then.
    pub fn get(&self, key: &[u8], at: i64) -> Option<KeyMeta> {
        todo!()
    }

    /// Number of keys of `range` alive at `at`.
    pub fn count(&self, range: KeyRange<'_>, at: i64) -> usize {
        todo!()
    }

    /// Calls `visit` for each key of `range` alive at `at`, ascending, until it returns false.
    pub fn visit(&self, range: KeyRange<'_>, at: i64, visit: &mut dyn FnMut(&[u8], KeyMeta) -> bool) {
        todo!()
    }

    /// All changes (true: tombstone) of keys in `range` with `from` <= main <= `to`, sorted by revision.
    /// Cheap when little changed: sub-trees without a change since `from` are skipped.
    pub fn changes(&self, range: KeyRange<'_>, from: i64, to: i64) -> Vec<(Revision, bool, bytes::Bytes)> {
        todo!()
    }

    /// Records a put at `rev`, which is above every revision recorded so far.
    pub fn put(&mut self, key: &[u8], rev: Revision, row_bytes: u32) -> KeyMeta {
        todo!()
    }

    /// Records a delete at `rev`; returns what was deleted, `None` (and nothing recorded) if the key is not alive.
    pub fn delete(&mut self, key: &[u8], rev: Revision, row_bytes: u32) -> Option<KeyMeta> {
        todo!()
    }

    /// Rebuilding at start, rows in ascending revision order: a put row with the `created` and `version` it stores.
    /// Rows of earlier revisions of the key may be missing (compacted).
    pub fn restore_put(&mut self, key: &[u8], rev: Revision, created: i64, version: i64, row_bytes: u32) {
        todo!()
    }

    /// Rebuilding at start: a tombstone row.
    pub fn restore_delete(&mut self, key: &[u8], rev: Revision, row_bytes: u32) {
        todo!()
    }

    /// One slice of clean-up after a compaction at `at`: looks at up to `keys` keys from `cursor` on (empty: the
    /// first), drops the revisions that the compaction condemns, appends their rows (revision, tombstone, bytes) to
    /// `removed`, and returns where to go on; `None` when done. Kept per key: the newest revision <= `at`, unless it
    /// is a tombstone below `at`; a tombstone exactly at `at` stays.
    pub fn compact_slice(
        &mut self,
        at: i64,
        cursor: &[u8],
        keys: usize,
        removed: &mut Vec<(Revision, bool, u32)>,
    ) -> Option<bytes::Bytes> {
        todo!()
    }

    /// The set *keep* of the hash rule for revision `at`, ascending: for each key, look at its lifetimes (create to
    /// tombstone; the last is open and may be empty); take the first lifetime whose tombstone is >= `at`, else the
    /// open one; its newest row with main <= `at`, if any, unless that row is that lifetime's closing tombstone.
    pub fn keep(&self, at: i64) -> Vec<Revision> {
        todo!()
    }
}
