//! Why a request that went towards the log was not carried out. `api::status` gives each its code and text.

use crate::{cluster::Refusal, mvcc, storage};

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
    #[error("{}", member_text(*.0))]
    Member(Refusal),
    #[error("re-configuration failed due to not enough started members")]
    NotEnoughStarted,
    #[error("unhealthy cluster")]
    Unhealthy,
    #[error("can only promote a learner member which is in sync with leader")]
    LearnerNotReady,
    #[error("not leader")]
    NotLeader,
    #[error("request timed out, possibly due to previous leader failure")]
    TimeoutLeaderFailed,
    #[error("request timed out, possibly due to connection lost")]
    TimeoutConnectionLost,
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

/// Why a membership change is left, as clients read it.
fn member_text(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Removed | Refusal::NotFound => "member not found",
        Refusal::Exists => "member ID already exist",
        Refusal::PeerUrlExists => "Peer URLs already exists",
        Refusal::NotLearner => "can only promote a learner member",
        Refusal::TooManyLearners => "too many learner members in cluster",
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Error::Member(refusal)
    }
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
