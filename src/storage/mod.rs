//! The store's rows on disk. The only place that names fjall.
//!
//! [`Storage`] is the seam: `fjall.rs` behind it in the server, `mem.rs` in tests and simulation.
//! `layout.rs` knows which directory of the data directory is the store in use, `journal.rs` what power
//! loss may leave of its unsynced end, `cache.rs` keeps hot values in memory.
//!
//! What a row means is not known here: `mvcc`, `apply` and `lease` write and read them.

use bytes::Bytes;

mod cache;
#[cfg(test)]
mod contract;
pub mod fjall;
mod in_use;
mod journal;
pub mod layout;
pub mod mem;

pub use self::fjall::{FjallStorage, Options};
pub use self::in_use::StoreInUse;
pub use self::journal::Repaired;
pub use self::layout::{StoreDir, refuse_foreign};
pub use self::mem::MemStorage;

/// The buckets of etcd's backend. In `Key` rows are keyed by revision and hold encoded `KeyValue`s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bucket {
    Alarm,
    Auth,
    AuthRoles,
    AuthUsers,
    Cluster,
    Key,
    Lease,
    Members,
    MembersRemoved,
    Meta,
}

impl Bucket {
    /// All buckets, in the order of their names in a backup file.
    pub const ALL: [Bucket; 10] = [
        Bucket::Alarm,
        Bucket::Auth,
        Bucket::AuthRoles,
        Bucket::AuthUsers,
        Bucket::Cluster,
        Bucket::Key,
        Bucket::Lease,
        Bucket::Members,
        Bucket::MembersRemoved,
        Bucket::Meta,
    ];

    /// etcd's name of the bucket.
    pub fn name(self) -> &'static str {
        match self {
            Bucket::Alarm => "alarm",
            Bucket::Auth => "auth",
            Bucket::AuthRoles => "authRoles",
            Bucket::AuthUsers => "authUsers",
            Bucket::Cluster => "cluster",
            Bucket::Key => "key",
            Bucket::Lease => "lease",
            Bucket::Members => "members",
            Bucket::MembersRemoved => "members_removed",
            Bucket::Meta => "meta",
        }
    }
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The write or sync failed or the store is damaged: the process must stop acknowledging and exit.
    #[error("storage: {0}")]
    Fatal(String),
    /// The store cannot be opened as it stands; the text names the file and what to do.
    #[error("storage: {0}")]
    Refused(String),
}

/// Changes that become visible together and survive a crash together or not at all.
#[derive(Clone, Debug, Default)]
pub struct WriteBatch {
    /// In order; a later write to the same row wins. `None` deletes.
    pub writes: Vec<(Bucket, Bytes, Option<Bytes>)>,
}

impl WriteBatch {
    /// A value of `Bucket::Key` may stay in the value cache as it is: it should own its bytes alone, not be a
    /// slice that keeps a larger buffer alive.
    pub fn put(&mut self, bucket: Bucket, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.writes.push((bucket, key.into(), Some(value.into())));
    }

    pub fn delete(&mut self, bucket: Bucket, key: impl Into<Bytes>) {
        self.writes.push((bucket, key.into(), None));
    }

    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }
}

/// Called for each row of a scan; returns whether to go on.
pub type Visit<'a> = &'a mut dyn FnMut(&[u8], Bytes) -> bool;

/// Rows on disk. One thread commits; any thread reads.
pub trait Storage: Send + Sync + 'static {
    fn get(&self, bucket: Bucket, key: &[u8]) -> Result<Option<Bytes>, Error>;

    /// Rows with `from` <= key < `to` in ascending order, as of the call; an empty `to` means no upper bound.
    fn scan(&self, bucket: Bucket, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), Error>;

    /// Makes the batch visible, atomically, without syncing it.
    fn commit(&self, batch: WriteBatch) -> Result<(), Error>;

    /// When it returns, every batch committed before the call survives power loss.
    fn sync(&self) -> Result<(), Error>;

    /// All rows as they stand now, unmoved by later commits. Rows it still needs stay on disk while it lives.
    fn snapshot(&self) -> Box<dyn Snapshot>;

    /// Bytes on disk, for metrics.
    fn disk_bytes(&self) -> u64;
}

/// The rows as of one moment.
pub trait Snapshot: Send + Sync {
    /// As [`Storage::scan`].
    fn scan(&self, bucket: Bucket, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), Error>;
}
