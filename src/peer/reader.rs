//! One of the two streams this member dials to another: opened, read to its end, opened again.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body;
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    codec::{Decoder, Kind},
    dial,
    metrics::PeerNumbers,
    status::{Link, Urls},
    wire::{self, STREAM_STEP, Shared},
};
use crate::{cluster::ids::hex, config::Url};

/// One try at most in this time.
const REDIAL: Duration = Duration::from_millis(100);
/// Of the text of a refusal.
const TEXT_MAX: usize = 4096;

pub struct Reader {
    pub shared: Arc<Shared>,
    pub numbers: Arc<PeerNumbers>,
    pub urls: Arc<Urls>,
    pub id: u64,
    pub kind: Kind,
}

enum Failure {
    /// This member is not one any more.
    Removed,
    Other(String),
}

impl Reader {
    /// Ends only when this member was removed.
    pub async fn run(self) {
        let mut link = Link::default();
        let (peer, stream) = (hex(self.id), self.kind.path());
        loop {
            let tried = Instant::now();
            if let Some(url) = self.urls.pick() {
                let failure = match self.dial(&url).await {
                    Ok(body) => {
                        self.numbers.status.connected();
                        if link.is_up() {
                            tracing::info!(peer, stream, url = url.as_str(), "stream to peer established");
                        }
                        self.read(body).await
                    }
                    Err(failure) => failure,
                };
                self.numbers.status.disconnected();
                match failure {
                    Failure::Removed => {
                        tracing::warn!(peer, stream, "a peer says that this member has been removed from the cluster");
                        return self.shared.incoming.removed_here();
                    }
                    Failure::Other(reason) => {
                        if link.is_down(&reason, Instant::now().into_std()) {
                            tracing::warn!(peer, stream, url = url.as_str(), "no stream to peer: {reason}");
                        }
                    }
                }
                self.urls.failed(&url);
            }
            sleep_until(tried + REDIAL).await;
        }
    }

    async fn dial(&self, url: &Url) -> Result<body::Incoming, Failure> {
        let other = |e: &dyn std::error::Error| Failure::Other(dial::chain(e));
        let mut connection = dial::connect(url, self.shared.stream_limits()).await.map_err(|e| other(&e))?;
        let path = format!("/raft/stream/{}/{}", self.kind.path(), hex(self.shared.member_id));
        let request = self
            .shared
            .request(Method::GET, url, &path)
            .header(wire::RAFT_TO, hex(self.id))
            .body(Empty::<Bytes>::new())
            .map_err(|e| other(&e))?;
        let answer = connection.send_request(request).await.map_err(|e| other(&e))?;
        match answer.status() {
            StatusCode::OK if wire::has_streams(answer.headers()) => Ok(answer.into_body()),
            StatusCode::OK => Err(Failure::Other("the peer's version has no such stream".to_owned())),
            StatusCode::GONE => Err(Failure::Removed),
            status => Err(Failure::Other(format!("{status}: {}", refusal(answer.into_body()).await))),
        }
    }

    async fn read(&self, mut body: body::Incoming) -> Failure {
        let mut decoder = Decoder::new(self.kind, self.id, self.shared.member_id);
        loop {
            let chunk = match body.frame().await {
                None => return Failure::Other("the peer closed the stream".to_owned()),
                Some(Err(e)) => return Failure::Other(dial::chain(&e)),
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            };
            self.numbers.received_bytes.fetch_add(chunk.len() as u64, Relaxed);
            decoder.push(&chunk);
            loop {
                match decoder.next() {
                    Ok(None) => break,
                    Ok(Some(message)) => {
                        if let Err(e) = self.shared.deliver(message) {
                            self.numbers.received_failures.fetch_add(1, Relaxed);
                            tracing::debug!("dropped a {e}");
                        }
                    }
                    Err(e) => {
                        self.numbers.received_failures.fetch_add(1, Relaxed);
                        return Failure::Other(e.to_string());
                    }
                }
            }
        }
    }
}

/// The text of a refusal, as far as it comes soon and is short.
pub async fn refusal(body: body::Incoming) -> String {
    let collected = timeout(STREAM_STEP, Limited::new(body, TEXT_MAX).collect()).await;
    let text = collected.ok().and_then(Result::ok).map(|body| body.to_bytes()).unwrap_or_default();
    String::from_utf8_lossy(&text).trim_end().to_owned()
}
