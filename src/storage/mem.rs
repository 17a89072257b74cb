//! Rows in memory, with the crash semantics of the store on disk: batches are whole, survive in order, and
//! those synced survive always. For tests and simulation; deterministic.

use super::{Bucket, Error, Snapshot, Storage, Visit, WriteBatch};
use bytes::Bytes;
use imbl::OrdMap;
use std::collections::VecDeque;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};

/// Persistent: snapshots and the state as of the last sync are cheap clones.
type Rows = OrdMap<(Bucket, Bytes), Bytes>;

/// Cloning gives a handle to the same rows.
#[derive(Clone, Default)]
pub struct MemStorage {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    rows: Rows,
    /// The rows as of the last sync, and the batches committed since.
    synced: Rows,
    unsynced: VecDeque<WriteBatch>,
    commits_until_failure: Option<u64>,
    syncs_until_failure: Option<u64>,
    failed: bool,
}

impl MemStorage {
    pub fn new() -> Self {
        Self::default()
    }

    /// All rows of a bucket, ascending.
    pub fn rows(&self, bucket: Bucket) -> Vec<(Bytes, Bytes)> {
        let mut rows = Vec::new();
        let all = self.scan(bucket, &[], &[], &mut |key, value| {
            rows.push((Bytes::copy_from_slice(key), value));
            true
        });
        all.expect("a scan of memory fails only after an injected failure");
        rows
    }

    /// Batches committed since the last sync: what a crash may lose.
    pub fn unsynced_batches(&self) -> usize {
        self.lock().unsynced.len()
    }

    /// Power loss: what was synced and the first `keep_batches` batches after it remain. The store is
    /// then as if opened again: injected failures are gone.
    pub fn crash(&self, keep_batches: usize) {
        let mut state = self.lock();
        let mut rows = std::mem::take(&mut state.synced);
        for batch in state.unsynced.iter().take(keep_batches) {
            apply(&mut rows, batch);
        }
        *state = State { synced: rows.clone(), rows, ..State::default() };
    }

    /// The commit after `successes` more, and every one after it, fails and changes nothing.
    pub fn fail_commit_after(&self, successes: u64) {
        self.lock().commits_until_failure = Some(successes);
    }

    /// The sync after `successes` more fails, and with it everything that follows.
    pub fn fail_sync_after(&self, successes: u64) {
        self.lock().syncs_until_failure = Some(successes);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

impl State {
    fn check(&self) -> Result<(), Error> {
        if self.failed { Err(Error::Fatal("an earlier write failed".into())) } else { Ok(()) }
    }
}

fn count_down(left: &mut Option<u64>) -> bool {
    match left {
        Some(0) => true,
        Some(n) => {
            *n -= 1;
            false
        }
        None => false,
    }
}

fn apply(rows: &mut Rows, batch: &WriteBatch) {
    for (bucket, key, value) in &batch.writes {
        match value {
            Some(value) => rows.insert((*bucket, key.clone()), value.clone()),
            None => rows.remove(&(*bucket, key.clone())),
        };
    }
}

fn scan(rows: &Rows, bucket: Bucket, from: &[u8], to: &[u8], visit: Visit<'_>) {
    let start = (bucket, Bytes::copy_from_slice(from));
    for ((found, key), value) in rows.range((Bound::Included(start), Bound::Unbounded)) {
        if *found != bucket || (!to.is_empty() && &key[..] >= to) || !visit(key, value.clone()) {
            break;
        }
    }
}

impl Storage for MemStorage {
    fn get(&self, bucket: Bucket, key: &[u8]) -> Result<Option<Bytes>, Error> {
        Ok(self.lock().rows.get(&(bucket, Bytes::copy_from_slice(key))).cloned())
    }

    fn scan(&self, bucket: Bucket, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), Error> {
        // A clone, so that `visit` may use the store.
        let rows = self.lock().rows.clone();
        scan(&rows, bucket, from, to, visit);
        Ok(())
    }

    fn commit(&self, batch: WriteBatch) -> Result<(), Error> {
        let mut state = self.lock();
        state.check()?;
        if count_down(&mut state.commits_until_failure) {
            state.failed = true;
            return Err(Error::Fatal("commit: injected failure".into()));
        }
        if batch.is_empty() {
            return Ok(());
        }
        apply(&mut state.rows, &batch);
        state.unsynced.push_back(batch);
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        let mut state = self.lock();
        state.check()?;
        if count_down(&mut state.syncs_until_failure) {
            state.failed = true;
            return Err(Error::Fatal("sync: injected failure".into()));
        }
        while let Some(batch) = state.unsynced.pop_front() {
            apply(&mut state.synced, &batch);
        }
        Ok(())
    }

    fn snapshot(&self) -> Box<dyn Snapshot> {
        Box::new(MemSnapshot(self.lock().rows.clone()))
    }

    fn disk_bytes(&self) -> u64 {
        self.lock().rows.iter().map(|((_, key), value)| (key.len() + value.len()) as u64).sum()
    }
}

struct MemSnapshot(Rows);

impl Snapshot for MemSnapshot {
    fn scan(&self, bucket: Bucket, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), Error> {
        scan(&self.0, bucket, from, to, visit);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(n: u8) -> WriteBatch {
        let mut batch = WriteBatch::default();
        batch.put(Bucket::Meta, &b"n"[..], vec![n]);
        batch.put(Bucket::Key, vec![n], vec![n]);
        batch
    }

    fn counter(store: &MemStorage) -> Option<u8> {
        store.get(Bucket::Meta, b"n").unwrap().map(|v| v[0])
    }

    #[test]
    fn crash_keeps_synced_batches_and_the_prefix_asked_for() {
        for keep in 0..=3 {
            let store = MemStorage::new();
            store.commit(batch(1)).unwrap();
            store.sync().unwrap();
            for n in 2..=4 {
                store.commit(batch(n)).unwrap();
            }
            assert_eq!(store.unsynced_batches(), 3);
            store.crash(keep);
            assert_eq!(counter(&store), Some(1 + keep as u8));
            for n in 1..=4 {
                assert_eq!(store.get(Bucket::Key, &[n]).unwrap().is_some(), n <= 1 + keep as u8);
            }
            store.crash(0);
            assert_eq!(counter(&store), Some(1 + keep as u8), "what a crash left is durable");
        }
    }

    #[test]
    fn failed_commit_changes_nothing_and_ends_the_store() {
        let store = MemStorage::new();
        store.fail_commit_after(1);
        store.commit(batch(1)).unwrap();
        store.commit(batch(2)).unwrap_err();
        store.commit(batch(3)).unwrap_err();
        store.sync().unwrap_err();
        assert_eq!(counter(&store), Some(1));
    }
}
