//! Why a request that went towards the log was not carried out. `api::status` gives each its code and text.

use crate::{mvcc, storage};

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("mvcc: required revision has been compacted")]
    Compacted,
    #[error("mvcc: required revision is a future revision")]
    FutureRev,
    #[error("key not found")]
    KeyNotFound,
    #[error("requested lease not found")]
    LeaseNotFound,
    #[error("lease already exists")]
    LeaseExists,
    #[error("too large lease TTL")]
    LeaseTtlTooLarge,
    #[error("mvcc: database space exceeded")]
    NoSpace,
    #[error("corrupt cluster")]
    Corrupt,
    #[error("too many requests")]
    TooManyRequests,
    #[error("request is too large")]
    RequestTooLarge,
    #[error("request timed out")]
    Timeout,
    #[error("request timed out, waiting for the applied index took too long")]
    TimeoutAppliedIndex,
    #[error("not a primary lessor")]
    NotPrimaryLessor,
    #[error("context deadline exceeded")]
    DeadlineExceeded,
    #[error("raft proposal dropped")]
    ProposalDropped,
    #[error("leader changed")]
    LeaderChanged,
    #[error("no leader")]
    NoLeader,
    #[error("server stopped")]
    Stopped,
    #[error("unknown alarm action {0}; allowed are GET, ACTIVATE and DEACTIVATE")]
    AlarmAction(i32),
    #[error("not implemented: {0}")]
    NotImplemented(&'static str),
    /// The store can't be read: this member can't answer.
    #[error("{0}")]
    Storage(String),
}

impl From<mvcc::Error> for Error {
    fn from(e: mvcc::Error) -> Self {
        match e {
            mvcc::Error::Compacted => Error::Compacted,
            mvcc::Error::FutureRev => Error::FutureRev,
            mvcc::Error::LeaseNotFound => Error::LeaseNotFound,
            mvcc::Error::KeyNotFound => Error::KeyNotFound,
            other => Error::Storage(other.to_string()),
        }
    }
}

impl From<storage::Error> for Error {
    fn from(e: storage::Error) -> Self {
        Error::Storage(e.to_string())
    }
}
