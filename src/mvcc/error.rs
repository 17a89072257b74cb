//! What a request to the store can fail with.

use crate::storage;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The revision asked for is below the compact revision.
    #[error("mvcc: required revision has been compacted")]
    Compacted,
    #[error("mvcc: required revision is a future revision")]
    FutureRev,
    #[error("requested lease not found")]
    LeaseNotFound,
    /// A put that keeps the value or the lease of a key that does not exist.
    #[error("key not found")]
    KeyNotFound,
    /// Clean-up after a compaction that the reader's view does not know has deleted rows it needs. Take the newest
    /// view and read again: a pinned read then answers `Compacted`, any other succeeds.
    #[error("mvcc: the view is outdated")]
    ViewOutdated,
    /// The read would look at more than the bounds it was given; nothing has been read.
    #[error("mvcc: the read is too long")]
    TooLong,
    #[error(transparent)]
    Storage(#[from] storage::Error),
}

impl Error {
    /// A row that cannot be what was once written.
    pub(super) fn damaged(what: impl std::fmt::Display) -> Self {
        Error::Storage(storage::Error::Fatal(format!("damaged key row: {what}")))
    }
}
