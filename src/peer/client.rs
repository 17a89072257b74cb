//! Questions to other members over their peer URLs, each one request on a connection of its own.

use std::time::Duration;

use crate::{cluster::Member, pb::etcdserverpb::LeaseTimeToLiveResponse};

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No answer: no connection, cut off, or too late.
    #[error("{url}: {reason}")]
    Unreachable { url: String, reason: String },
    /// An answer other than the one asked for, e.g. 412 with a text.
    #[error("{url}: {status} {text}")]
    Refused { url: String, status: u16, text: String },
}

/// `/version` of another member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Versions {
    pub server: String,
    /// `not_decided` before it is known.
    pub cluster: String,
    pub storage: String,
}

/// `/members/hashkv` of another member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HashKv {
    pub revision: i64,
    pub hash: u32,
    pub compact_revision: i64,
    pub hash_revision: i64,
}

fn not_yet<T>(url: &str) -> Result<T, Error> {
    Err(Error::Unreachable { url: url.to_owned(), reason: "not implemented".to_owned() })
}

/// The cluster id and the members a member of it lists.
pub async fn members(url: &str, _timeout: Duration) -> Result<(u64, Vec<Member>), Error> {
    not_yet(url)
}

pub async fn versions(url: &str, _timeout: Duration) -> Result<Versions, Error> {
    not_yet(url)
}

pub async fn downgrade_enabled(url: &str, _timeout: Duration) -> Result<bool, Error> {
    not_yet(url)
}

/// Asks the leader to promote the learner `id`; the members after it.
pub async fn promote(url: &str, _id: u64, _timeout: Duration) -> Result<Vec<Member>, Error> {
    not_yet(url)
}

/// Asks the leader to renew a lease; its full time to live.
pub async fn renew_lease(url: &str, _id: i64, _timeout: Duration) -> Result<i64, Error> {
    not_yet(url)
}

/// Asks the leader for the time a lease has left.
pub async fn lease_time_to_live(
    url: &str,
    _id: i64,
    _keys: bool,
    _timeout: Duration,
) -> Result<LeaseTimeToLiveResponse, Error> {
    not_yet(url)
}

/// Revision 0: the present one.
pub async fn hash_kv(url: &str, _cluster_id: u64, _revision: i64, _timeout: Duration) -> Result<HashKv, Error> {
    not_yet(url)
}
