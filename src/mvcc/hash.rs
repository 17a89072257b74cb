//! The hashes members compare: over the history of the key space, and over every bucket.

use super::{KeyRange, Revision, error::Error, store::SCHEDULED_COMPACT_KEY, view::View};
use crate::storage::{self, Bucket, Storage};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashKv {
    pub hash: u32,
    /// -1 before the first compaction.
    pub compact_revision: i64,
    pub hash_revision: i64,
}

/// The hash of all history up to `revision` (0: now; below 0 there is none) that compaction leaves. It does not depend on how far clean-up is.
///
/// It is always computed with the present compact revision. etcd may answer for its newest compaction revisions what
/// it noted while it removed their rows, with the compact revision before; it forgets that at a restart, so askers
/// compare only hashes of equal compact revision. Keeping such notes would cost one scan of all rows per compaction.
///
/// Scans all rows: not for a thread that others wait for.
pub fn hash_kv(view: &View, storage: &dyn Storage, revision: i64) -> Result<HashKv, Error> {
    if revision > 0 && revision < view.compact_revision {
        return Err(Error::Compacted);
    }
    if revision > view.revision {
        return Err(Error::FutureRev);
    }
    let at = if revision == 0 { view.revision } else { revision };
    let compacted = view.compact_revision;

    // Rows up to the compact revision count only if they are in this set.
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

    let mut hash = crc32c::crc32c(Bucket::Key.name().as_bytes());
    let mut damaged = false;
    storage.scan(Bucket::Key, &[], &[], &mut |key, value| {
        let Some((rev, tombstone)) = Revision::from_row_key(key) else {
            damaged = true;
            return false;
        };
        if rev.main > at {
            return false;
        }
        if rev.main <= compacted {
            while keep.next_if(|kept| *kept < rev).is_some() {}
            if keep.peek() != Some(&rev) || (tombstone && rev.main == compacted) {
                return true;
            }
        }
        hash = crc32c::crc32c_append(hash, key);
        hash = crc32c::crc32c_append(hash, &value);
        true
    })?;
    if damaged {
        return Err(Error::damaged("a row key is no revision"));
    }
    // A compaction that the view does not know may have taken rows from under the scan. It was noted before.
    if let Some(mark) = storage.get(Bucket::Meta, SCHEDULED_COMPACT_KEY)?
        && Revision::from_row_key(&mark).is_none_or(|(rev, _)| rev.main > compacted)
    {
        return Err(Error::ViewOutdated);
    }
    Ok(HashKv { hash, compact_revision: compacted, hash_revision: at })
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
