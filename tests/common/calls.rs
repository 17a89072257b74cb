//! Requests written short, answers taken apart, and a watch stream with deadlines: for tests that make many calls.

use std::time::Duration;

use actd::{
    mvcc::record::{KeyValue, RawKeyValue},
    pb::etcdserverpb::{
        Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
        RequestOp, ResponseOp, TxnRequest, TxnResponse, WatchCancelRequest, WatchCreateRequest, WatchProgressRequest,
        WatchRequest, WatchResponse,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op::Request,
        response_op::Response,
        watch_request::RequestUnion,
    },
};
use bytes::Bytes;
use tokio::sync::mpsc::UnboundedSender;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{Client, EventRecord};

/// How long anything may take that must happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> PutRequest {
    PutRequest { key: key.into(), value: value.into(), ..Default::default() }
}

pub fn get(key: impl Into<Bytes>) -> RangeRequest {
    RangeRequest { key: key.into(), ..Default::default() }
}

pub fn span(key: impl Into<Bytes>, range_end: impl Into<Bytes>) -> RangeRequest {
    RangeRequest { key: key.into(), range_end: range_end.into(), ..Default::default() }
}

/// Every key there is.
pub fn everything() -> RangeRequest {
    span("\0", "\0")
}

pub fn delete(key: impl Into<Bytes>) -> DeleteRangeRequest {
    DeleteRangeRequest { key: key.into(), ..Default::default() }
}

pub fn delete_span(key: impl Into<Bytes>, range_end: impl Into<Bytes>) -> DeleteRangeRequest {
    DeleteRangeRequest { key: key.into(), range_end: range_end.into(), ..Default::default() }
}

/// A transaction without conditions.
pub fn all(success: impl Into<Vec<RequestOp>>) -> TxnRequest {
    TxnRequest { success: success.into(), ..Default::default() }
}

pub fn branch(
    compare: impl Into<Vec<Compare>>,
    success: impl Into<Vec<RequestOp>>,
    failure: impl Into<Vec<RequestOp>>,
) -> TxnRequest {
    TxnRequest { compare: compare.into(), success: success.into(), failure: failure.into() }
}

/// The target is the one the value belongs to.
pub fn compare(key: impl Into<Bytes>, result: CompareResult, than: TargetUnion) -> Compare {
    let target = match than {
        TargetUnion::Version(_) => CompareTarget::Version,
        TargetUnion::CreateRevision(_) => CompareTarget::Create,
        TargetUnion::ModRevision(_) => CompareTarget::Mod,
        TargetUnion::Value(_) => CompareTarget::Value,
        TargetUnion::Lease(_) => CompareTarget::Lease,
    };
    let (result, target) = (result as i32, target as i32);
    Compare { result, target, key: key.into(), range_end: Bytes::new(), target_union: Some(than) }
}

/// A request as an operation of a transaction.
pub trait Op {
    fn op(self) -> RequestOp;
}

macro_rules! op {
    ($($request:ident $variant:ident,)*) => {
        $(impl Op for $request {
            fn op(self) -> RequestOp {
                RequestOp { request: Some(Request::$variant(self)) }
            }
        })*
    };
}

op! {
    RangeRequest RequestRange,
    PutRequest RequestPut,
    DeleteRangeRequest RequestDeleteRange,
    TxnRequest RequestTxn,
}

macro_rules! taken {
    ($($name:ident $variant:ident $response:ident,)*) => {
        $(pub fn $name(op: &ResponseOp) -> &$response {
            match &op.response {
                Some(Response::$variant(response)) => response,
                other => panic!("an answer of another kind: {other:?}"),
            }
        })*
    };
}

taken! {
    range_of ResponseRange RangeResponse,
    put_of ResponsePut PutResponse,
    delete_of ResponseDeleteRange DeleteRangeResponse,
    txn_of ResponseTxn TxnResponse,
}

pub fn records(raw: &[RawKeyValue]) -> Vec<KeyValue> {
    raw.iter().map(|kv| kv.decode_record().expect("a record decodes")).collect()
}

/// The keys of an answer, as text.
pub fn keys(response: &RangeResponse) -> Vec<String> {
    records(&response.kvs).iter().map(|kv| text(&kv.key)).collect()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Code and text of a refusal.
#[track_caller]
pub fn refusal<T: std::fmt::Debug>(outcome: Result<T, Status>) -> (Code, String) {
    let status = outcome.expect_err("refused");
    (status.code(), status.message().to_owned())
}

/// `code` and `etcdserver: <text>`, as [`refusal`] gives it.
pub fn etcd(code: Code, text: &str) -> (Code, String) {
    (code, format!("etcdserver: {text}"))
}

/// What unary calls answer, without the envelope.
impl Client {
    pub async fn put(&mut self, request: PutRequest) -> Result<PutResponse, Status> {
        self.kv.put(request).await.map(tonic::Response::into_inner)
    }

    pub async fn range(&mut self, request: RangeRequest) -> Result<RangeResponse, Status> {
        self.kv.range(request).await.map(tonic::Response::into_inner)
    }

    pub async fn delete(&mut self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse, Status> {
        self.kv.delete_range(request).await.map(tonic::Response::into_inner)
    }

    pub async fn txn(&mut self, request: TxnRequest) -> Result<TxnResponse, Status> {
        self.kv.txn(request).await.map(tonic::Response::into_inner)
    }

    pub async fn compact(&mut self, revision: i64, physical: bool) -> Result<i64, Status> {
        let request = actd::pb::etcdserverpb::CompactionRequest { revision, physical };
        self.kv.compact(request).await.map(|response| response.into_inner().header.expect("a header").revision)
    }

    /// Puts and answers the new revision.
    pub async fn set(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> i64 {
        self.put(put(key, value)).await.expect("a put").header.expect("a header").revision
    }

    /// The one record under a key.
    pub async fn record(&mut self, key: impl Into<Bytes>) -> Option<KeyValue> {
        records(&self.range(get(key)).await.expect("a read").kvs).pop()
    }

    /// The store's revision now.
    pub async fn revision(&mut self) -> i64 {
        self.range(get("no such key")).await.expect("a read").header.expect("a header").revision
    }

    /// Grants a lease with an id of the server's choice.
    pub async fn grant(&mut self, ttl: i64) -> i64 {
        let request = actd::pb::etcdserverpb::LeaseGrantRequest { ttl, id: 0 };
        self.lease.lease_grant(request).await.expect("a lease").into_inner().id
    }
}

type Opening = tokio::task::JoinHandle<Result<tonic::Response<Streaming<WatchResponse>>, Status>>;

/// One Watch stream. A server may hold the head of its answer back until there is a first message, so the call is made
/// beside the test.
pub struct Watching {
    requests: UnboundedSender<WatchRequest>,
    opening: Option<Opening>,
    responses: Option<Streaming<WatchResponse>>,
}

impl Watching {
    pub fn open(client: &Client) -> Self {
        let (requests, outgoing) = tokio::sync::mpsc::unbounded_channel();
        let mut watch = client.watch.clone();
        let call = async move { watch.watch(UnboundedReceiverStream::new(outgoing)).await };
        Self { requests, opening: Some(tokio::spawn(call)), responses: None }
    }

    /// A stream with one watcher, which has been created.
    pub async fn on(client: &Client, create: WatchCreateRequest) -> Self {
        let mut watching = Self::open(client);
        watching.create(create);
        let created = watching.next().await;
        assert!(created.created && !created.canceled, "{created:?}");
        watching
    }

    fn send(&self, union: RequestUnion) {
        self.requests.send(WatchRequest { request_union: Some(union) }).expect("the stream is open");
    }

    pub fn create(&self, request: WatchCreateRequest) {
        self.send(RequestUnion::CreateRequest(request));
    }

    pub fn cancel(&self, watch_id: i64) {
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }));
    }

    pub fn ask_progress(&self) {
        self.send(RequestUnion::ProgressRequest(WatchProgressRequest {}));
    }

    /// The next message, or how the stream ends.
    pub async fn message(&mut self) -> Result<Option<WatchResponse>, Status> {
        if let Some(opening) = &mut self.opening {
            let opened = opening.await.expect("the call does not panic");
            self.opening = None;
            self.responses = Some(opened?.into_inner());
        }
        self.responses.as_mut().expect("opened").message().await
    }

    pub async fn next(&mut self) -> WatchResponse {
        let next = tokio::time::timeout(PATIENCE, self.message()).await.expect("a response in time");
        next.expect("no error").expect("the stream goes on")
    }

    /// A progress answer for the whole stream, asked for until it comes (W-43).
    pub async fn progress(&mut self) -> WatchResponse {
        for _ in 0..300 {
            self.ask_progress();
            let next = tokio::time::timeout(Duration::from_millis(100), self.message()).await;
            if let Ok(next) = next {
                return next.expect("no error").expect("the stream goes on");
            }
        }
        panic!("no progress in {PATIENCE:?}");
    }

    /// The events of the next `count`, whatever responses they come in.
    pub async fn events(&mut self, count: usize) -> Vec<EventRecord> {
        let mut events = Vec::new();
        while events.len() < count {
            events.extend(self.next().await.events.iter().map(EventRecord::decode_raw));
        }
        assert_eq!(events.len(), count, "{events:?}");
        events
    }
}

/// Runs a test's calls.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}
