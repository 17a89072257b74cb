//! The changes of the past, for watchers that begin there or have fallen behind.

use super::{
    KeyRange, Revision,
    change::Change,
    error::Error,
    range::{Rows, StorageRows, decode},
    store::tombstone_record,
    view::View,
};
use crate::storage::Storage;

/// A piece of history, whole revisions only.
#[derive(Debug)]
pub struct Replay {
    /// In revision order.
    pub changes: Vec<Change>,
    /// Where to go on: everything below has been looked at.
    pub next: i64,
}

/// How much one piece may hold. Both are passed by at most one revision's changes.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    pub changes: usize,
    pub bytes: usize,
}

/// Revisions looked at in one step, at first; doubled while little is found.
const STEP: i64 = 1024;

/// The changes of `range` from main revision `from` to `to` (both included, `to` at most the view's revision) until
/// `limit` is reached. `from` below the compact revision is refused.
pub fn changes(
    view: &View,
    storage: &dyn Storage,
    range: KeyRange<'_>,
    from: i64,
    to: i64,
    limit: Limit,
) -> Result<Replay, Error> {
    if from < view.compact_revision {
        return Err(Error::Compacted);
    }
    let to = to.min(view.revision);
    let mut replay = Replay { changes: Vec::new(), next: from };
    let mut bytes = 0;
    let mut step = STEP;
    while replay.next <= to && !range.is_empty() {
        let end = to.min(replay.next.saturating_add(step - 1));
        for (rev, tombstone, key) in view.index.changes(range, replay.next, end) {
            let begins = replay.changes.last().is_some_and(|last| last.revision.main < rev.main);
            if begins && (replay.changes.len() >= limit.changes || bytes >= limit.bytes) {
                replay.next = rev.main;
                return Ok(replay);
            }
            let change = change(view, storage, rev, tombstone, key)?;
            bytes += change.kv.0.len();
            replay.changes.push(change);
        }
        replay.next = end + 1;
        if replay.changes.len() >= limit.changes || bytes >= limit.bytes {
            return Ok(replay);
        }
        step = step.saturating_mul(2);
    }
    replay.next = replay.next.max(to + 1);
    Ok(replay)
}

fn change(
    view: &View,
    storage: &dyn Storage,
    rev: Revision,
    tombstone: bool,
    key: bytes::Bytes,
) -> Result<Change, Error> {
    let kv = if tombstone { tombstone_record(key.clone(), rev.main) } else { StorageRows(storage).row(rev)? };
    let created = !tombstone && decode(&kv)?.create_revision == rev.main;
    // What was before a compacted revision is gone, whether or not clean-up has come by.
    let known = rev.main > view.compact_revision;
    let prev = if created || !known { None } else { view.index.get(&key, rev.main - 1).map(|meta| meta.modified) };
    Ok(Change::new(rev, key, tombstone, kv, prev))
}
