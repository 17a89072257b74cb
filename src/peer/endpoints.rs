//! What other members ask outside raft: lists, versions, hashes, renewals of leases. Answers come from views, from the
//! lease expirer, and for promotions from whoever makes membership changes.
//!
//! Not here: `/raft…`, and the listener itself.

use std::{sync::Arc, time::Duration};

use bytes::{Buf, Bytes};
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use prost::Message;
use serde::Serialize;
use tokio::time::Instant;

use super::CLUSTER_ID;
use crate::{
    api::{Server, lease::Renewal},
    apply::Error,
    cluster::{Member, ids, members_to_json},
    http::{
        Answer,
        front::{self, moved},
        not_found, set_type, text_error, version,
    },
    pb::{
        etcdserverpb::{
            LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
            ResponseHeader,
        },
        leasepb::{LeaseInternalRequest, LeaseInternalResponse},
    },
};

/// Why a learner stays one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PromoteError {
    #[error("membership: ID not found")]
    NotFound,
    #[error("membership: can only promote a learner member")]
    NotLearner,
    #[error("etcdserver: can only promote a learner member which is in sync with leader")]
    NotReady,
    #[error("{0}")]
    Other(String),
}

/// Promotes a learner on this member; answers the members after it.
pub type Promote = Arc<dyn Fn(u64) -> BoxFuture<'static, Result<Vec<Member>, PromoteError>> + Send + Sync>;

/// What the answers come from.
#[derive(Clone)]
pub struct Endpoints {
    pub server: Arc<Server>,
    /// Delivery queue for answers to own proposals.
    pub runtime: usize,
    pub promote: Promote,
}

/// How long a renewal may wait for what has just been granted.
const APPLY_WAIT: Duration = Duration::from_secs(1);
/// Between two questions to the expirer about a lease whose grant has just been applied.
const RETRY: Duration = Duration::from_millis(5);
const BODY_BYTES_MAX: usize = 64 << 10;
const PROMOTE: &str = "/members/promote/";

impl Endpoints {
    pub async fn answer<B>(&self, request: Request<B>) -> Answer
    where
        B: http_body::Body<Data: Buf>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let path = front::path(&request);
        let path = path.as_str();
        let (method, allow) = match path {
            "/members" | "/version" | "/members/hashkv" | "/downgrade/enabled" => (Method::GET, Some("GET")),
            "/leases" | "/leases/internal" => (Method::POST, None),
            _ if path.starts_with(PROMOTE) => (Method::POST, Some("POST")),
            // What has a slash and something behind it; the rest of the second is answered elsewhere.
            "/members/promote" => return moved(&request, PROMOTE),
            "/raft/stream" => return moved(&request, "/raft/stream/"),
            _ => return not_found(),
        };
        if request.method() != method {
            let mut response = text_error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
            if let Some(allow) = allow {
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
            }
            return response;
        }
        let (head, body) = request.into_parts();
        match path {
            "/version" => version(&self.server),
            "/members" => self.members(),
            "/downgrade/enabled" => self.downgrade_enabled().await,
            "/members/hashkv" => match read_body(body).await {
                Ok(body) => self.hash_kv(&head.headers, &body).await,
                Err(refusal) => *refusal,
            },
            path if path.starts_with(PROMOTE) => self.promote(&path[PROMOTE.len()..].replace("%2F", "/")).await,
            path => match read_body(body).await {
                Ok(body) if path == "/leases" => self.renew(body).await,
                Ok(body) => self.time_to_live(body).await,
                Err(refusal) => *refusal,
            },
        }
    }

    fn members(&self) -> Answer {
        self.with_cluster_id(ok("application/json", list(self.server.view.load().members.iter())))
    }

    async fn downgrade_enabled(&self) -> Answer {
        let answer = match self.server.linearizable_view(self.runtime).await {
            Ok(view) => ok("text/plain", view.members.downgrade().enabled.to_string()),
            Err(e) => {
                text_error(StatusCode::INTERNAL_SERVER_ERROR, &format!("failed linearized read: etcdserver: {e}"))
            }
        };
        self.with_cluster_id(answer)
    }

    async fn hash_kv(&self, headers: &HeaderMap, body: &[u8]) -> Answer {
        let cluster = ids::hex(self.server.settings.cluster_id);
        let asked = headers.get(CLUSTER_ID).map(HeaderValue::as_bytes).unwrap_or_default();
        if !asked.is_empty() && asked != cluster.as_bytes() {
            return text_error(StatusCode::PRECONDITION_FAILED, "cluster ID mismatch");
        }
        let Some(revision) = asked_revision(body) else {
            return text_error(StatusCode::BAD_REQUEST, "error unmarshalling request");
        };
        match self.server.hash_kv(revision).await {
            Ok((view, found)) => {
                let answer = HashKvAnswer {
                    header: Revision { revision: view.kv.revision },
                    hash: found.hash,
                    compact_revision: found.compact_revision,
                    hash_revision: found.hash_revision,
                };
                let text = serde_json::to_vec(&answer).expect("numbers always encode");
                self.with_cluster_id(ok("application/json", text))
            }
            Err(e) => text_error(StatusCode::BAD_REQUEST, &e.to_string()),
        }
    }

    async fn promote(&self, id: &str) -> Answer {
        // Go reads no sign.
        let answer = match id.parse().ok().filter(|_| !id.starts_with('+')) {
            Some(id) => match (self.promote)(id).await {
                Ok(members) => ok("application/json", list(&members)),
                Err(e @ PromoteError::NotFound) => text_error(StatusCode::NOT_FOUND, &e.to_string()),
                Err(e @ (PromoteError::NotLearner | PromoteError::NotReady)) => {
                    text_error(StatusCode::PRECONDITION_FAILED, &e.to_string())
                }
                Err(PromoteError::Other(e)) => {
                    tracing::warn!(id, "cannot promote a learner as another member asks: {e}");
                    let mut response = ok("application/json", r#"{"message":"Internal Server Error"}"#);
                    *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                    response
                }
            },
            None => text_error(StatusCode::NOT_FOUND, &format!("member {id} not found in cluster")),
        };
        self.with_cluster_id(answer)
    }

    async fn renew(&self, body: Bytes) -> Answer {
        let Ok(LeaseKeepAliveRequest { id }) = LeaseKeepAliveRequest::decode(body) else { return unreadable() };
        let deadline = Instant::now() + APPLY_WAIT;
        loop {
            match self.server.renew(id, self.runtime).await {
                Ok(Renewal::Ttl(ttl)) => return protobuf(&LeaseKeepAliveResponse { header: None, id, ttl }),
                Ok(Renewal::Gone) => return lease_not_found(),
                Ok(Renewal::NotLeader) => return text_error(StatusCode::BAD_REQUEST, "not a primary lessor"),
                Ok(Renewal::Later) => {}
                Err(Error::TimeoutAppliedIndex) => return late(),
                Err(e @ Error::NotPrimaryLessor) => return text_error(StatusCode::BAD_REQUEST, &e.to_string()),
                Err(e) => return text_error(StatusCode::BAD_REQUEST, &format!("etcdserver: {e}")),
            }
            if Instant::now() >= deadline {
                return late();
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn time_to_live(&self, body: Bytes) -> Answer {
        let Ok(request) = LeaseInternalRequest::decode(body) else { return unreadable() };
        let LeaseTimeToLiveRequest { id, keys } = request.lease_time_to_live_request.unwrap_or_default();
        match self.server.time_left(id).await {
            Ok((_, None)) => lease_not_found(),
            Ok((view, Some((ttl, granted_ttl)))) => {
                let keys = if keys { view.leases.keys(id).map(Bytes::copy_from_slice).collect() } else { Vec::new() };
                let header = Some(ResponseHeader::default());
                let response = LeaseTimeToLiveResponse { header, id, ttl, granted_ttl, keys };
                protobuf(&LeaseInternalResponse { lease_time_to_live_response: Some(response) })
            }
            Err(Error::TimeoutAppliedIndex) => late(),
            Err(e) => text_error(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
        }
    }

    /// Names the cluster, as most answers do.
    fn with_cluster_id(&self, mut answer: Answer) -> Answer {
        let id = ids::hex(self.server.settings.cluster_id);
        answer.headers_mut().insert(CLUSTER_ID, HeaderValue::try_from(id).expect("hexadecimal digits"));
        answer
    }
}

/// The revision in a question for a hash, read as Go reads it: names in any case, `null` is as if nothing were there.
fn asked_revision(body: &[u8]) -> Option<i64> {
    let question: Option<serde_json::Map<String, serde_json::Value>> = serde_json::from_slice(body).ok()?;
    let mut revision = 0;
    for (name, value) in question.unwrap_or_default() {
        if name.eq_ignore_ascii_case("revision") && !value.is_null() {
            revision = value.as_i64()?;
        }
    }
    Some(revision)
}

#[derive(Serialize)]
struct HashKvAnswer {
    header: Revision,
    #[serde(skip_serializing_if = "is_zero")]
    hash: u32,
    #[serde(skip_serializing_if = "is_zero")]
    compact_revision: i64,
    #[serde(skip_serializing_if = "is_zero")]
    hash_revision: i64,
}

#[derive(Serialize)]
struct Revision {
    #[serde(skip_serializing_if = "is_zero")]
    revision: i64,
}

fn is_zero<T: Default + PartialEq>(number: &T) -> bool {
    *number == T::default()
}

async fn read_body<B>(body: B) -> Result<Bytes, Box<Answer>>
where
    B: http_body::Body<Data: Buf>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match Limited::new(body, BODY_BYTES_MAX).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(e) if e.is::<LengthLimitError>() => {
            Err(Box::new(text_error(StatusCode::PAYLOAD_TOO_LARGE, "request body too large")))
        }
        Err(_) => Err(Box::new(text_error(StatusCode::BAD_REQUEST, "error reading body"))),
    }
}

fn list<'a>(members: impl IntoIterator<Item = &'a Member>) -> Vec<u8> {
    let mut text = members_to_json(members);
    text.push(b'\n');
    text
}

fn ok(content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(body.into()));
    set_type(&mut response, content_type);
    response
}

fn protobuf(message: &impl Message) -> Answer {
    ok("application/protobuf", message.encode_to_vec())
}

fn lease_not_found() -> Answer {
    text_error(StatusCode::NOT_FOUND, "lease not found")
}

fn unreadable() -> Answer {
    text_error(StatusCode::BAD_REQUEST, "error unmarshalling request")
}

fn late() -> Answer {
    text_error(StatusCode::REQUEST_TIMEOUT, "waiting for node to catch up its applied index has timed out")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_for_a_hash_are_read_as_go_reads_them() {
        let cases: [(&str, Option<i64>); 14] = [
            ("{}", Some(0)),
            ("null", Some(0)),
            (r#"{"revision":1}"#, Some(1)),
            (r#"{"Revision":2,"x":[]}"#, Some(2)),
            (r#"{"revision":null}"#, Some(0)),
            (r#"{"revision":-1}"#, Some(-1)),
            ("", None),
            ("[]", None),
            ("\"a\"", None),
            ("{", None),
            (r#"{"revision":"1"}"#, None),
            (r#"{"revision":1.5}"#, None),
            (r#"{"revision":1}x"#, None),
            (r#"{"revision":99999999999999999999}"#, None),
        ];
        for (body, revision) in cases {
            assert_eq!(asked_revision(body.as_bytes()), revision, "{body}");
        }
    }
}
