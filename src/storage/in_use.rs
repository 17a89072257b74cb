//! The store in use, which a leader's snapshot may replace while readers go on.

use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;

use super::{Bucket, Error, FjallStorage, Snapshot, Storage, Visit, WriteBatch};

/// Passes every call to the store that is in use at its start. Rows are immutable and equal on all members, so a reader
/// with an older view finds the same rows in a newer store, or finds them compacted.
pub struct StoreInUse<S = FjallStorage>(ArcSwap<S>);

impl<S> StoreInUse<S> {
    pub fn new(store: S) -> Self {
        Self(ArcSwap::from_pointee(store))
    }

    pub fn load(&self) -> Arc<S> {
        self.0.load_full()
    }

    /// The one before it: its files may go when nobody else holds it.
    pub fn replace(&self, store: Arc<S>) -> Arc<S> {
        self.0.swap(store)
    }
}

impl<S: Storage> Storage for StoreInUse<S> {
    fn get(&self, bucket: Bucket, key: &[u8]) -> Result<Option<Bytes>, Error> {
        self.0.load().get(bucket, key)
    }

    fn scan(&self, bucket: Bucket, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), Error> {
        self.load().scan(bucket, from, to, visit)
    }

    fn commit(&self, batch: WriteBatch) -> Result<(), Error> {
        self.0.load().commit(batch)
    }

    fn sync(&self) -> Result<(), Error> {
        self.load().sync()
    }

    fn snapshot(&self) -> Box<dyn Snapshot> {
        self.load().snapshot()
    }

    fn disk_bytes(&self) -> u64 {
        self.0.load().disk_bytes()
    }
}
