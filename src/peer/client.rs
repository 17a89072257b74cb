//! Questions to other members over their peer URLs, each one request on a connection of its own.
//!
//! Rare questions only: joining, versions, hashes, forwarded renewals. raft's messages have connections of their own.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use prost::Message;
use serde::Deserialize;

use super::{
    CLUSTER_ID,
    dial::{self, Limits},
};
use crate::{
    cluster::{Member, ids, members_from_json},
    config::Url,
    pb::{
        etcdserverpb::{
            LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
        },
        leasepb::{LeaseInternalRequest, LeaseInternalResponse},
    },
};

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
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Versions {
    #[serde(rename = "etcdserver")]
    pub server: String,
    /// `not_decided` before it is known.
    #[serde(rename = "etcdcluster")]
    pub cluster: String,
    /// `unknown` before it is known; empty from members older than 3.6.
    pub storage: String,
}

/// `/members/hashkv` of another member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HashKv {
    pub revision: i64,
    pub hash: u32,
    pub compact_revision: i64,
    /// 0 from members older than 3.6.
    pub hash_revision: i64,
}

/// An answer as JSON; fields that are zero are left out by who sends it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct HashKvJson {
    header: HashKvHeader,
    hash: u32,
    compact_revision: i64,
    hash_revision: i64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct HashKvHeader {
    revision: i64,
}

/// Lists, versions, hashes and refusals are small.
const BODY_BYTES_MAX: usize = 4 << 20;
/// The keys of one lease; etcd has the same limit.
const LEASE_BYTES_MAX: usize = 100 << 20;
/// Of the text of a refusal.
const TEXT_CHARS_MAX: usize = 1_000;

/// The cluster id and the members a member of it lists.
pub async fn members(url: &str, timeout: Duration) -> Result<(u64, Vec<Member>), Error> {
    let (headers, body) = get("/members").send(url, timeout).await?;
    let id = headers.get(CLUSTER_ID).and_then(|id| u64::from_str_radix(id.to_str().ok()?, 16).ok());
    let id = id.ok_or_else(|| unreachable(url, "its answer has no cluster ID"))?;
    Ok((id, members_from_json(&body).map_err(|e| unreachable(url, format!("its list of members: {e}")))?))
}

pub async fn versions(url: &str, timeout: Duration) -> Result<Versions, Error> {
    let (_, body) = get("/version").send(url, timeout).await?;
    from_json(url, &body)
}

pub async fn downgrade_enabled(url: &str, timeout: Duration) -> Result<bool, Error> {
    let (_, body) = get("/downgrade/enabled").send(url, timeout).await?;
    match &body[..] {
        b"true" => Ok(true),
        b"false" => Ok(false),
        _ => Err(unreachable(url, "its answer is neither true nor false")),
    }
}

/// Asks the leader to promote the learner `id`, with the token of whoever asked for it; the members after it.
pub async fn promote(url: &str, id: u64, token: Option<&str>, timeout: Duration) -> Result<Vec<Member>, Error> {
    let path = format!("/members/promote/{id}");
    let question = Question { method: Method::POST, token: token.map(str::to_owned), ..get(&path) };
    let (_, body) = question.send(url, timeout).await?;
    members_from_json(&body).map_err(|e| unreachable(url, format!("its list of members: {e}")))
}

/// Asks the leader to renew a lease; its full time to live.
pub async fn renew_lease(url: &str, id: i64, timeout: Duration) -> Result<i64, Error> {
    let question = post_protobuf("/leases", &LeaseKeepAliveRequest { id });
    let (_, body) = question.send(url, timeout).await?;
    let response = LeaseKeepAliveResponse::decode(body).map_err(|e| unreachable(url, e))?;
    if response.id != id {
        return Err(unreachable(url, "its answer is about another lease"));
    }
    Ok(response.ttl)
}

/// Asks the leader for the time a lease has left.
pub async fn lease_time_to_live(
    url: &str,
    id: i64,
    keys: bool,
    timeout: Duration,
) -> Result<LeaseTimeToLiveResponse, Error> {
    let request = LeaseInternalRequest { lease_time_to_live_request: Some(LeaseTimeToLiveRequest { id, keys }) };
    let (_, body) = post_protobuf("/leases/internal", &request).send(url, timeout).await?;
    let response = LeaseInternalResponse::decode(body).map_err(|e| unreachable(url, e))?;
    match response.lease_time_to_live_response {
        Some(response) if response.id == id => Ok(response),
        _ => Err(unreachable(url, "its answer is about another lease")),
    }
}

/// Revision 0: the present one.
pub async fn hash_kv(url: &str, cluster_id: u64, revision: i64, timeout: Duration) -> Result<HashKv, Error> {
    let body = if revision == 0 { "{}".to_owned() } else { format!(r#"{{"revision":{revision}}}"#) };
    let question = Question {
        cluster_id: Some(cluster_id),
        content_type: Some("application/json"),
        body: Bytes::from(body),
        ..get("/members/hashkv")
    };
    let (_, body) = question.send(url, timeout).await?;
    let HashKvJson { header, hash, compact_revision, hash_revision } = from_json(url, &body)?;
    Ok(HashKv { revision: header.revision, hash, compact_revision, hash_revision })
}

struct Question {
    method: Method,
    path: String,
    cluster_id: Option<u64>,
    token: Option<String>,
    content_type: Option<&'static str>,
    body: Bytes,
    answer_bytes_max: usize,
}

fn get(path: &str) -> Question {
    Question {
        method: Method::GET,
        path: path.to_owned(),
        cluster_id: None,
        token: None,
        content_type: None,
        body: Bytes::new(),
        answer_bytes_max: BODY_BYTES_MAX,
    }
}

fn post_protobuf(path: &str, message: &impl Message) -> Question {
    Question {
        method: Method::POST,
        content_type: Some("application/protobuf"),
        body: message.encode_to_vec().into(),
        answer_bytes_max: LEASE_BYTES_MAX,
        ..get(path)
    }
}

impl Question {
    /// Headers and body of an answer 200.
    async fn send(self, url: &str, timeout: Duration) -> Result<(HeaderMap, Bytes), Error> {
        match tokio::time::timeout(timeout, self.exchange(url, timeout)).await {
            Ok(answer) => answer,
            Err(_) => Err(unreachable(url, format!("no answer within {timeout:?}"))),
        }
    }

    async fn exchange(self, text: &str, timeout: Duration) -> Result<(HeaderMap, Bytes), Error> {
        let url = Url::parse(text).map_err(|e| unreachable(text, e))?;
        let limit = self.answer_bytes_max;
        let request = self.request(dial::host(&url)).map_err(|e| unreachable(text, e))?;
        let limits = Limits { from: None, connect: timeout, read: None, write: None };
        let mut sender = dial::connect(&url, limits).await.map_err(|e| unreachable(text, e))?;
        let answer = sender.send_request(request).await.map_err(|e| unreachable(text, dial::chain(&e)))?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, limit).collect().await.map_err(|e| unreachable(text, e))?.to_bytes();
        if head.status == StatusCode::OK {
            return Ok((head.headers, body));
        }
        let refusal: String = String::from_utf8_lossy(&body).trim().chars().take(TEXT_CHARS_MAX).collect();
        Err(Error::Refused { url: text.to_owned(), status: head.status.as_u16(), text: refusal })
    }

    fn request(self, host: &str) -> http::Result<Request<Full<Bytes>>> {
        let mut request = Request::builder().method(self.method).uri(self.path).header(header::HOST, host);
        if let Some(id) = self.cluster_id {
            request = request.header(CLUSTER_ID, ids::hex(id));
        }
        if let Some(token) = self.token {
            request = request.header(header::AUTHORIZATION, token);
        }
        if let Some(content_type) = self.content_type {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        request.body(Full::new(self.body))
    }
}

fn from_json<'a, T: Deserialize<'a>>(url: &str, body: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|e| unreachable(url, format!("its answer: {e}")))
}

fn unreachable(url: &str, reason: impl ToString) -> Error {
    Error::Unreachable { url: url.to_owned(), reason: reason.to_string() }
}
