//! The hashes members compare: over the history of the key space, and over every bucket.

use std::sync::Arc;

use super::{KeyRange, Revision, error::Error, index::Index, store::SCHEDULED_COMPACT_KEY, view::View};
use crate::storage::{self, Bucket, Snapshot, Storage, Visit};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashKv {
    pub hash: u32,
    /// -1 before the first compaction.
    pub compact_revision: i64,
    pub hash_revision: i64,
}

/// How many hashes of compactions are kept.
const KEPT: usize = 10;

/// The hashes of the newest compactions, ascending. In memory alone: gone with the process.
#[derive(Clone, Debug, Default)]
pub struct CompactionHashes(Arc<[HashKv]>);

impl CompactionHashes {
    pub fn at(&self, revision: i64) -> Option<HashKv> {
        self.0.iter().find(|kept| kept.hash_revision == revision).copied()
    }

    pub fn newest_first(&self) -> impl Iterator<Item = HashKv> + '_ {
        self.0.iter().rev().copied()
    }

    pub fn add(&mut self, hash: HashKv) {
        let mut all = self.0.to_vec();
        all.push(hash);
        all.sort_unstable_by_key(|kept| kept.hash_revision);
        self.0 = all[all.len().saturating_sub(KEPT)..].into();
    }
}

/// The hash of one compaction, still to be computed: over all that was written since the compaction before, and what
/// both leave of the time before that. As it needs rows that clean-up deletes, it has a hold on them.
pub struct CompactionJob {
    pub(super) index: Index,
    pub(super) rows: Box<dyn Snapshot>,
    pub(super) at: i64,
    /// -1: there was no compaction before.
    pub(super) previous: i64,
}

impl CompactionJob {
    /// Scans all rows: not for a thread that others wait for.
    ///
    /// Where nothing is alive at its revision this is not what [`scan_kv`] gives, as in etcd.
    pub fn run(self) -> Result<HashKv, Error> {
        let mut gone = self.index.condemned(self.at, self.previous).into_iter().peekable();
        let scan = |visit: Visit<'_>| self.rows.scan(Bucket::Key, &[], &[], visit);
        let hash = hash_rows(scan, self.at, |rev, _| {
            while gone.next_if(|gone| *gone < rev).is_some() {}
            gone.peek() != Some(&rev)
        })?;
        Ok(HashKv { hash, compact_revision: self.previous, hash_revision: self.at })
    }
}

/// What HashKV answers: for the revision of one of the newest compactions (0 included) the hash it left behind, for any
/// other what [`scan_kv`] finds.
pub fn hash_kv(view: &View, storage: &dyn Storage, revision: i64) -> Result<HashKv, Error> {
    match view.hashes.at(revision) {
        Some(kept) => Ok(kept),
        None => scan_kv(view, storage, revision),
    }
}

/// The hash of all history up to `revision` (0: now; below 0 there is none) that compaction leaves. It does not depend on
/// how far clean-up is.
///
/// Scans all rows: not for a thread that others wait for.
pub fn scan_kv(view: &View, storage: &dyn Storage, revision: i64) -> Result<HashKv, Error> {
    if revision > 0 && revision < view.compact_revision {
        return Err(Error::Compacted);
    }
    if revision > view.revision {
        return Err(Error::FutureRev);
    }
    let at = if revision == 0 { view.revision } else { revision };
    let compacted = view.compact_revision;

    let mut keep = view.index.keep(at);
    if keep.is_empty() {
        // Then all that a finished clean-up has left counts.
        view.index.visit(KeyRange::ALL, compacted, &mut |_, meta| {
            keep.push(meta.modified);
            true
        });
        keep.sort_unstable();
    }
    let mut keep = keep.into_iter().peekable();
    let hash = hash_rows(
        |visit| storage.scan(Bucket::Key, &[], &[], visit),
        at,
        |rev, tombstone| {
            while keep.next_if(|kept| *kept < rev).is_some() {}
            rev.main > compacted || keep.peek() == Some(&rev) && !(tombstone && rev.main == compacted)
        },
    )?;
    // A compaction that the view does not know may have taken rows from under the scan. It was noted before.
    if let Some(mark) = storage.get(Bucket::Meta, SCHEDULED_COMPACT_KEY)?
        && Revision::from_row_key(&mark).is_none_or(|(rev, _)| rev.main > compacted)
    {
        return Err(Error::ViewOutdated);
    }
    Ok(HashKv { hash, compact_revision: compacted, hash_revision: at })
}

/// Over the rows up to `at` that `counts` lets pass: revision, tombstone.
fn hash_rows(
    scan: impl FnOnce(Visit<'_>) -> Result<(), storage::Error>,
    at: i64,
    mut counts: impl FnMut(Revision, bool) -> bool,
) -> Result<u32, Error> {
    let mut hash = crc32c::crc32c(Bucket::Key.name().as_bytes());
    let mut damaged = false;
    scan(&mut |key, value| {
        let Some((rev, tombstone)) = Revision::from_row_key(key) else {
            damaged = true;
            return false;
        };
        if rev.main > at {
            return false;
        }
        if !counts(rev, tombstone) {
            return true;
        }
        hash = crc32c::crc32c_append(hash, key);
        hash = crc32c::crc32c_append(hash, &value);
        true
    })?;
    if damaged {
        return Err(Error::damaged("a row key is no revision"));
    }
    Ok(hash)
}

/// Rows of the meta bucket that differ between members with the same state.
const LOCAL_META: [&[u8]; 3] = [b"term", b"consistent_index", b"storageVersion"];

/// The hash of every bucket as it is on disk. Members need not agree on it.
pub fn hash_all(storage: &dyn Storage) -> Result<u32, storage::Error> {
    let mut hash = 0;
    for bucket in Bucket::ALL {
        hash = crc32c::crc32c_append(hash, bucket.name().as_bytes());
        storage.scan(bucket, &[], &[], &mut |key, value| {
            if bucket != Bucket::Meta || !LOCAL_META.contains(&key) {
                hash = crc32c::crc32c_append(hash, key);
                hash = crc32c::crc32c_append(hash, &value);
            }
            true
        })?;
    }
    Ok(hash)
}
