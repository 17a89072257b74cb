//! The KV service: Range, RangeStream, Put, DeleteRange, Txn, Compact.

use std::{sync::Arc, sync::atomic::Ordering, time::Instant};

use tonic::{Request, Response, Status};

use super::{Handle, Server, long, routes::ENCODING, validate};
use crate::{
    apply::{self, View},
    mvcc::{self, range, store::Tally, txn},
    pb::etcdserverpb::{
        CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, InternalRaftRequest,
        PutRequest, PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest, TxnResponse,
        kv_server::Kv, request_op,
    },
    telemetry::requests::Kind,
};

/// The answer to a request of a known kind is of that kind.
pub(super) const OTHER_KIND: &str = "a request is answered by a response of its kind";

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
        self.server.metrics.ranges.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        let view = self.view_for(req.serializable).await?;
        let server = &self.server;
        let reading = Instant::now();
        let read = |view: &View| match req.range_end.is_empty() {
            // One row is short, whatever it holds.
            true => range::range(&view.kv, &*server.storage, &req),
            false => range::range_within(&view.kv, &*server.storage, long::SHORT, &req),
        };
        let answered = match server.read(view.clone(), read) {
            Err(mvcc::Error::TooLong) if range::RangeCursor::supports(&req) => long::in_pieces(server, view, req).await,
            Err(mvcc::Error::TooLong) => {
                let (weighed, reader) = (req.clone(), server.clone());
                let weigh = move |view: &View| range::weight(&view.kv, &weighed);
                let read = move |view: &View| {
                    let mut answer = range::range(&view.kv, &*reader.storage, &req)?;
                    answer.header = Some(reader.header_of(view));
                    Ok((answer, ()))
                };
                long::whole(server, view, weigh, read).await.map(|(answer, ())| answer)
            }
            found => found.map_err(Status::from).map(|(view, mut answer)| {
                answer.header = Some(server.header_of(&view));
                Response::new(answer)
            }),
        };
        server.metrics.range_times[usize::from(answered.is_ok())].record(reading.elapsed());
        server.metrics.requests.record(Kind::Range, answered.is_ok(), began.elapsed());
        answered
    }

    type RangeStreamStream = long::Replaced<RangeStreamResponse>;

    async fn range_stream(&self, request: Request<RangeRequest>) -> Result<Response<Self::RangeStreamStream>, Status> {
        let is_compressed = request.metadata().get(ENCODING).is_some_and(|encoding| encoding == "gzip");
        let req = request.into_inner();
        validate::range(&req)?;
        validate::range_stream(&req)?;
        let view = self.view_for(req.serializable).await?;
        Ok(long::parts(&self.server, &view, &req, is_compressed)?)
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
            let server = &self.server;
            let complete = |server: &Server, view: &View, (mut answer, ranges): (TxnResponse, u64)| {
                let revision = answer.header.as_ref().map_or(view.kv.revision, |h| h.revision);
                answer.header = Some(server.header(revision, server.raft_status.read().term));
                (answer, ranges)
            };
            let read = |view: &View| txn::txn_read_only_within(&view.kv, &*server.storage, long::SHORT, &req);
            let answered = match server.read(view.clone(), read) {
                Err(mvcc::Error::TooLong) => {
                    let (weighed, asked, reader) = (req.clone(), req.clone(), server.clone());
                    let weigh = move |view: &View| txn::weight(&view.kv, &weighed);
                    let read = move |view: &View| {
                        let answer = txn::txn_read_only(&view.kv, &*reader.storage, &asked)?;
                        Ok(complete(&reader, view, answer))
                    };
                    long::whole(server, view, weigh, read).await
                }
                found => found.map_err(Status::from).map(|(view, found)| {
                    let (answer, ranges) = complete(server, &view, found);
                    (Response::new(answer), ranges)
                }),
            };
            server.metrics.requests.record(Kind::ReadonlyTxn, answered.is_ok(), began.elapsed());
            let (response, ranges) = answered?;
            server.metrics.store_did(&Tally { ranges, txns: u64::from(ranges > 1), ..Tally::default() });
            return Ok(response);
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

/// At least one range, and none that asks for more than local state.
fn only_serializable_ranges(req: &TxnRequest) -> bool {
    let mut ops = req.success.iter().chain(&req.failure).peekable();
    ops.peek().is_some()
        && ops.all(|op| match &op.request {
            Some(request_op::Request::RequestRange(range)) => range.serializable,
            _ => false,
        })
}
