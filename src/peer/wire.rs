//! What requests between members have in common: headers, versions, and what all parts of the transport share.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use http::{HeaderMap, HeaderValue, Method, Request, request::Builder};
use tokio::sync::Semaphore;

use super::{Databases, Incoming, Wiring, dial, dial::Limits, metrics::Numbers};
use crate::{
    cluster::{Version, ids::hex},
    config::{ETCD_VERSION, Url},
    pb::raftpb::Message,
    telemetry::logs::Seldom,
};

pub const SERVER_FROM: &str = "x-server-from";
pub const SERVER_VERSION: &str = "x-server-version";
pub const MIN_CLUSTER_VERSION: &str = "x-min-cluster-version";
pub const CLUSTER_ID: &str = "x-etcd-cluster-id";
pub const PEER_URLS: &str = "x-peerurls";
pub const RAFT_TO: &str = "x-raft-to";

/// Oldest version this member talks to.
const OLDEST: Version = Version::new(3, 0, 0);
/// What a request without a version counts as.
const UNTOLD: Version = Version::new(2, 0, 0);
/// Oldest version that has the two streams.
const FIRST_WITH_STREAMS: Version = Version::new(2, 1, 0);

/// Waited for each read and write on a stream.
pub const STREAM_STEP: Duration = Duration::from_secs(5);
/// Waited for each write of a post; an answer may take as long as it likes.
const POST_STEP: Duration = Duration::from_secs(60);

/// Of one transport.
pub struct Shared {
    pub cluster_id: u64,
    pub member_id: u64,
    /// Own peer URLs as in the header: as configured until the members tell them.
    own_urls: ArcSwap<HeaderValue>,
    pub dial_timeout: Duration,
    local_address: Option<IpAddr>,
    pub incoming: Arc<dyn Incoming>,
    pub databases: Arc<dyn Databases>,
    pub numbers: Arc<Numbers>,
    /// Snapshots that may wait or be under way.
    pub snapshots: Arc<Semaphore>,
    /// By `Refused`: who is refused tries again ten times a second.
    told: [Mutex<Seldom>; 3],
}

/// Why somebody's requests are refused, for the log.
#[derive(Clone, Copy, Debug)]
pub enum Refused {
    Version,
    Cluster,
    Removed,
}

impl Shared {
    pub fn new(wiring: Wiring, snapshots_max: usize, dial_timeout: Duration) -> Self {
        let own_urls: Vec<String> = wiring.own_peer_urls.iter().map(ToString::to_string).collect();
        Self {
            cluster_id: wiring.cluster_id,
            member_id: wiring.member_id,
            own_urls: ArcSwap::from_pointee(url_header(&own_urls)),
            dial_timeout,
            local_address: wiring.local_address,
            incoming: wiring.incoming,
            databases: wiring.databases,
            numbers: Arc::new(Numbers::new(wiring.member_id)),
            snapshots: Arc::new(Semaphore::new(snapshots_max)),
            told: Default::default(),
        }
    }

    /// Whether a refusal is to be told, and how many were not.
    pub fn tell(&self, why: Refused) -> Option<u64> {
        self.told[why as usize].lock().unwrap_or_else(PoisonError::into_inner).admit()
    }

    /// The members tell other URLs of this one.
    pub fn set_own_urls(&self, urls: &[String]) {
        self.own_urls.store(Arc::new(url_header(urls)));
    }

    /// A request to another member, with its headers.
    pub fn request(&self, method: Method, url: &Url, path: &str) -> Builder {
        Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, dial::host(url))
            .header(SERVER_FROM, hex(self.member_id))
            .header(SERVER_VERSION, ETCD_VERSION)
            .header(MIN_CLUSTER_VERSION, OLDEST.to_string())
            .header(CLUSTER_ID, hex(self.cluster_id))
            .header(PEER_URLS, &**self.own_urls.load())
    }

    pub fn stream_limits(&self) -> Limits {
        Limits { read: Some(STREAM_STEP), write: Some(STREAM_STEP), ..self.post_limits() }
    }

    pub fn post_limits(&self) -> Limits {
        Limits { from: self.local_address, connect: self.dial_timeout, read: None, write: Some(POST_STEP) }
    }

    /// Hands over what arrived, unless its sender was removed or it is for somebody else.
    pub fn deliver(&self, message: Message) -> Result<(), Misdirected> {
        if message.to() != self.member_id || self.incoming.is_removed(message.from()) {
            return Err(Misdirected { from: message.from(), to: message.to() });
        }
        self.incoming.message(message);
        Ok(())
    }
}

fn url_header(urls: &[String]) -> HeaderValue {
    HeaderValue::from_str(&urls.join(",")).unwrap_or(HeaderValue::from_static(""))
}

#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("message from {from:x} to {to:x}")]
pub struct Misdirected {
    pub from: u64,
    pub to: u64,
}

pub fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
}

pub fn parse_id(text: &str) -> Option<u64> {
    (!text.starts_with('+')).then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

/// A version that is none.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the version in a request cannot be read: {0}")]
pub struct Unreadable(String);

fn version_of(headers: &HeaderMap, name: &str) -> Result<Version, Unreadable> {
    match headers.get(name) {
        None => Ok(UNTOLD),
        Some(value) if value.is_empty() => Ok(UNTOLD),
        Some(value) => {
            let text = String::from_utf8_lossy(value.as_bytes());
            text.parse().map_err(|_| Unreadable(text.into_owned()))
        }
    }
}

/// The two sides can work together; an error if a version cannot be read.
pub fn is_compatible(headers: &HeaderMap) -> Result<bool, Unreadable> {
    let theirs = version_of(headers, SERVER_VERSION)?.cluster_version();
    let their_oldest = version_of(headers, MIN_CLUSTER_VERSION)?.cluster_version();
    Ok(theirs >= OLDEST && their_oldest <= own_version().cluster_version())
}

/// Whether whoever answers with these headers knows the two streams.
pub fn has_streams(headers: &HeaderMap) -> bool {
    version_of(headers, SERVER_VERSION).is_ok_and(|version| version >= FIRST_WITH_STREAMS)
}

fn own_version() -> Version {
    ETCD_VERSION.parse().expect("the own version is one")
}
