//! Why a snapshot was not made or not taken.

use crate::storage;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the database file is damaged: {0}")]
    Damaged(String),
    /// Sound, but not to be used here; the text says why.
    #[error("{0}")]
    Refused(String),
    #[error("a database file cannot hold {0}")]
    Unfit(String),
    #[error(transparent)]
    Storage(#[from] storage::Error),
    #[error("the database file: {0}")]
    Io(#[from] std::io::Error),
    /// Whoever was to receive it is gone.
    #[error("nobody receives the snapshot any more")]
    Gone,
}
