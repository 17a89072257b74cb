//! The KV service: Range, RangeStream, Put, DeleteRange, Txn, Compact.

use std::{sync::Arc, time::Instant};

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::{Handle, validate};
use crate::{
    apply::{self, View},
    mvcc::{self, KeyRange, range, txn},
    pb::etcdserverpb::{
        CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, InternalRaftRequest,
        PutRequest, PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest, TxnResponse,
        kv_server::Kv, request_op,
    },
    telemetry::requests::Kind,
};

/// The answer to a request of a known kind is of that kind.
pub(super) const OTHER_KIND: &str = "a request is answered by a response of its kind";

/// First and smallest parts of a stream (KV-34).
const STREAM_KEYS_FIRST: usize = 10;
/// Rows in one part: a bound on memory whatever the keys hold.
const STREAM_BYTES_MAX: usize = 1 << 20;

impl Handle {
    /// The view a read asks for.
    async fn view_for(&self, serializable: bool) -> Result<Arc<View>, Status> {
        if serializable {
            Ok(self.server.view.load_full())
        } else if self.server.raft_status.read().is_learner {
            Err(super::status::learner_unsupported())
        } else {
            Ok(self.server.linearizable_view(self.runtime).await?)
        }
    }
}

#[tonic::async_trait]
impl Kv for Handle {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let req = request.into_inner();
        validate::range(&req)?;
        self.server.metrics.ranges.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let began = Instant::now();
        let view = self.view_for(req.serializable).await?;
        let server = self.server.clone();
        let reading = Instant::now();
        let is_long = is_long(&view, &req);
        let read = move || server.read(view, |view| range::range(&view.kv, &*server.storage, &req));
        let found = if is_long {
            // Beside the connections of this runtime, which would wait for it.
            tokio::task::spawn_blocking(read).await.map_err(|e| Status::internal(e.to_string()))?
        } else {
            read()
        };
        let metrics = &self.server.metrics;
        metrics.range_times[usize::from(found.is_ok())].record(reading.elapsed());
        metrics.requests.record(Kind::Range, found.is_ok(), began.elapsed());
        let (view, mut response) = found?;
        response.header = Some(self.server.header_of(&view));
        Ok(Response::new(response))
    }

    type RangeStreamStream = std::pin::Pin<Box<dyn Stream<Item = Result<RangeStreamResponse, Status>> + Send>>;

    async fn range_stream(&self, request: Request<RangeRequest>) -> Result<Response<Self::RangeStreamStream>, Status> {
        let req = request.into_inner();
        validate::range(&req)?;
        validate::range_stream(&req)?;
        let view = self.view_for(req.serializable).await?;
        let cursor = range::RangeCursor::new(&view.kv, &*self.server.storage, &req)?;
        let state = StreamState {
            handle: self.clone(),
            cursor,
            header: self.server.header_of(&view),
            keys: STREAM_KEYS_FIRST,
            failed: false,
        };
        let stream = tokio_stream::iter(state);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let req = request.into_inner();
        self.server.check_quota(txn::put_cost(&req), self.runtime)?;
        validate::put(&req)?;
        let request = InternalRaftRequest { put: Some(req), ..Default::default() };
        match self.server.propose(request, self.runtime).await? {
            apply::Response::Put(mut response) => {
                self.server.complete(&mut response.header);
                Ok(Response::new(response))
            }
            other => unreachable!("{OTHER_KIND}: {other:?}"),
        }
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let req = request.into_inner();
        validate::delete_range(&req)?;
        let request = InternalRaftRequest { delete_range: Some(req), ..Default::default() };
        match self.server.propose(request, self.runtime).await? {
            apply::Response::DeleteRange(mut response) => {
                self.server.complete(&mut response.header);
                Ok(Response::new(response))
            }
            other => unreachable!("{OTHER_KIND}: {other:?}"),
        }
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let req = request.into_inner();
        self.server.check_quota(txn::txn_cost(&req), self.runtime)?;
        validate::txn(&req, self.server.settings.max_txn_ops)?;
        if txn::is_read_only(&req) {
            // Local only if every range says so; one without ranges is served linearizably (KV-68).
            let began = Instant::now();
            let view = self.view_for(only_serializable_ranges(&req)).await?;
            let server = self.server.clone();
            let is_long = ranges(&req).any(|range| is_long(&view, range));
            let read = move || server.read(view, |view| txn::txn_read_only(&view.kv, &*server.storage, &req));
            let found = if is_long {
                tokio::task::spawn_blocking(read).await.map_err(|e| Status::internal(e.to_string()))?
            } else {
                read()
            };
            self.server.metrics.requests.record(Kind::ReadonlyTxn, found.is_ok(), began.elapsed());
            let (view, mut response) = found?;
            let revision = response.header.as_ref().map_or(view.kv.revision, |h| h.revision);
            response.header = Some(self.server.header(revision, self.server.raft_status.read().term));
            return Ok(Response::new(response));
        }
        let request = InternalRaftRequest { txn: Some(req), ..Default::default() };
        match self.server.propose(request, self.runtime).await? {
            apply::Response::Txn(mut response) => {
                self.server.complete(&mut response.header);
                Ok(Response::new(response))
            }
            other => unreachable!("{OTHER_KIND}: {other:?}"),
        }
    }

    async fn compact(&self, request: Request<CompactionRequest>) -> Result<Response<CompactionResponse>, Status> {
        let request = InternalRaftRequest { compaction: Some(request.into_inner()), ..Default::default() };
        match self.server.propose(request, self.runtime).await? {
            apply::Response::Compact(mut response) => {
                self.server.complete(&mut response.header);
                Ok(Response::new(response))
            }
            other => unreachable!("{OTHER_KIND}: {other:?}"),
        }
    }
}

/// A stream's position between two parts. Each part is read when the transport asks for it, from the newest view.
struct StreamState {
    handle: Handle,
    cursor: range::RangeCursor,
    header: crate::pb::etcdserverpb::ResponseHeader,
    keys: usize,
    failed: bool,
}

impl Iterator for StreamState {
    type Item = Result<RangeStreamResponse, Status>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.cursor.is_done() {
            return None;
        }
        let server = &self.handle.server;
        let keys = self.keys;
        let cursor = &mut self.cursor;
        let chunk = loop {
            let view = server.view.load_full();
            match cursor.next_chunk(&view.kv, &*server.storage, keys, STREAM_BYTES_MAX) {
                Err(mvcc::Error::ViewOutdated) => {}
                done => break done,
            }
        };
        match chunk {
            Ok(mut part) => {
                if self.cursor.is_done() {
                    part.header = Some(self.header);
                }
                let size = prost::Message::encoded_len(&part);
                let target = server.settings.max_request_bytes;
                if size < target / 2 {
                    self.keys = self.keys.saturating_mul(2);
                } else if size > target.saturating_mul(2) {
                    self.keys = (self.keys / 2).max(1);
                }
                Some(Ok(RangeStreamResponse { range_response: Some(part) }))
            }
            Err(e) => {
                self.failed = true;
                Some(Err(e.into()))
            }
        }
    }
}

/// Keys a read may look at on the thread of its connection.
const SHORT_READ_KEYS: usize = 1_000;

/// Whether a range may look at so many keys that others would notice. The index tells without reading.
fn is_long(view: &View, req: &RangeRequest) -> bool {
    let keys_in_order = range::RangeCursor::supports(req);
    if req.range_end.is_empty()
        || req.count_only
        || (keys_in_order && (1..=SHORT_READ_KEYS as i64).contains(&req.limit))
    {
        return false;
    }
    let range = KeyRange::new(&req.key, &req.range_end);
    view.kv.index.count(range, view.kv.revision) > SHORT_READ_KEYS
}

/// The ranges of a transaction that has nothing else.
fn ranges(req: &TxnRequest) -> impl Iterator<Item = &RangeRequest> {
    req.success.iter().chain(&req.failure).filter_map(|op| match &op.request {
        Some(request_op::Request::RequestRange(range)) => Some(range),
        _ => None,
    })
}

/// At least one range, and none that asks for more than local state.
fn only_serializable_ranges(req: &TxnRequest) -> bool {
    let mut ops = req.success.iter().chain(&req.failure).peekable();
    ops.peek().is_some()
        && ops.all(|op| match &op.request {
            Some(request_op::Request::RequestRange(range)) => range.serializable,
            _ => false,
        })
}
