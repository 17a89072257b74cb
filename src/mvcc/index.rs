//! The key index: which revisions each key has.

use std::{collections::BTreeMap, ops::Bound};

use bytes::Bytes;

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

#[derive(Clone, Copy, Debug)]
struct Row {
    meta: KeyMeta,
    tombstone: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Index {
    keys: BTreeMap<Bytes, Vec<Row>>,
}

fn at_or_before(rows: &[Row], at: i64) -> Option<KeyMeta> {
    rows.iter().rev().find(|r| r.meta.modified.main <= at).filter(|r| !r.tombstone).map(|r| r.meta)
}

impl Index {
    /// The live state of `key` at revision `at` (all changes with main <= `at`); `None` if absent or deleted then.
    pub fn get(&self, key: &[u8], at: i64) -> Option<KeyMeta> {
        at_or_before(self.keys.get(key)?, at)
    }

    /// Number of keys of `range` alive at `at`.
    pub fn count(&self, range: KeyRange<'_>, at: i64) -> usize {
        let mut n = 0;
        self.visit(range, at, &mut |_, _| {
            n += 1;
            true
        });
        n
    }

    /// Calls `visit` for each key of `range` alive at `at`, ascending, until it returns false.
    pub fn visit(&self, range: KeyRange<'_>, at: i64, visit: &mut dyn FnMut(&[u8], KeyMeta) -> bool) {
        for (key, rows) in self.keys.range::<[u8], _>((Bound::Included(range.key), Bound::Unbounded)) {
            if !range.contains(key) {
                break;
            }
            if let Some(meta) = at_or_before(rows, at)
                && !visit(key, meta)
            {
                break;
            }
        }
    }

    /// All changes (true: tombstone) of keys in `range` with `from` <= main <= `to`, sorted by revision.
    /// Cheap when little changed: sub-trees without a change since `from` are skipped.
    pub fn changes(&self, range: KeyRange<'_>, from: i64, to: i64) -> Vec<(Revision, bool, bytes::Bytes)> {
        let mut out = Vec::new();
        for (key, rows) in self.keys.iter().filter(|(k, _)| range.contains(k)) {
            out.extend(
                rows.iter()
                    .filter(|r| (from..=to).contains(&r.meta.modified.main))
                    .map(|r| (r.meta.modified, r.tombstone, key.clone())),
            );
        }
        out.sort();
        out
    }

    /// Records a put at `rev`, which is above every revision recorded so far.
    pub fn put(&mut self, key: &[u8], rev: Revision, row_bytes: u32) -> KeyMeta {
        let (created, version) = self.get(key, i64::MAX).map_or((rev.main, 1), |m| (m.created, m.version + 1));
        self.restore_put(key, rev, created, version, row_bytes);
        KeyMeta { modified: rev, created, version, row_bytes }
    }

    /// Records a delete at `rev`; returns what was deleted, `None` (and nothing recorded) if the key is not alive.
    pub fn delete(&mut self, key: &[u8], rev: Revision, row_bytes: u32) -> Option<KeyMeta> {
        let old = self.get(key, i64::MAX)?;
        self.restore_delete(key, rev, row_bytes);
        Some(old)
    }

    /// Rebuilding at start, rows in ascending revision order: a put row with the `created` and `version` it stores.
    /// Rows of earlier revisions of the key may be missing (compacted).
    pub fn restore_put(&mut self, key: &[u8], rev: Revision, created: i64, version: i64, row_bytes: u32) {
        let meta = KeyMeta { modified: rev, created, version, row_bytes };
        self.keys.entry(Bytes::copy_from_slice(key)).or_default().push(Row { meta, tombstone: false });
    }

    /// Rebuilding at start: a tombstone row.
    pub fn restore_delete(&mut self, key: &[u8], rev: Revision, row_bytes: u32) {
        let meta = KeyMeta { modified: rev, created: 0, version: 0, row_bytes };
        self.keys.entry(Bytes::copy_from_slice(key)).or_default().push(Row { meta, tombstone: true });
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
        let some: Vec<Bytes> = self
            .keys
            .range::<[u8], _>((Bound::Included(cursor), Bound::Unbounded))
            .take(keys + 1)
            .map(|(k, _)| k.clone())
            .collect();
        for key in some.iter().take(keys) {
            let rows = self.keys.get_mut(key).expect("just listed");
            let newest = rows.iter().map(|r| r.meta.modified).filter(|r| r.main <= at).max();
            rows.retain(|r| {
                let main = r.meta.modified.main;
                let keep =
                    main > at || (r.tombstone && main == at) || (!r.tombstone && Some(r.meta.modified) == newest);
                if !keep {
                    removed.push((r.meta.modified, r.tombstone, r.meta.row_bytes));
                }
                keep
            });
            if rows.is_empty() {
                self.keys.remove(key);
            }
        }
        some.get(keys).cloned()
    }

    /// The set *keep* of the hash rule for revision `at`, ascending: for each key, look at its lifetimes (create to
    /// tombstone; the last is open and may be empty); take the first lifetime whose tombstone is >= `at`, else the
    /// open one; its newest row with main <= `at`, if any, unless that row is that lifetime's closing tombstone.
    pub fn keep(&self, at: i64) -> Vec<Revision> {
        let mut out = Vec::new();
        for rows in self.keys.values() {
            let open = rows.iter().rposition(|r| r.tombstone).map_or(0, |i| i + 1);
            let mut begin = open;
            let mut end = rows.len();
            let mut start = 0;
            for (i, row) in rows.iter().enumerate().filter(|(_, r)| r.tombstone) {
                if row.meta.modified.main >= at {
                    (begin, end) = (start, i + 1);
                    break;
                }
                start = i + 1;
            }
            if let Some(row) = rows[begin..end].iter().rev().find(|r| r.meta.modified.main <= at)
                && !row.tombstone
            {
                out.push(row.meta.modified);
            }
        }
        out.sort();
        out
    }
}
