//! What the tests of the store share: leases in memory, and short ways to write requests.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    change::Change,
    record::{KeyValue, RawKeyValue},
    store::{Leases, Store},
};
use crate::{
    pb::etcdserverpb::{
        Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, compare::TargetUnion,
        request_op::Request,
    },
    storage::{Storage, mem::MemStorage},
};

pub type Memory = MemStorage;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TestLeases {
    pub known: BTreeSet<i64>,
    pub attached: BTreeMap<Bytes, i64>,
}

impl TestLeases {
    pub fn of(known: &[i64]) -> Self {
        Self { known: known.iter().copied().collect(), attached: BTreeMap::new() }
    }
}

impl Leases for TestLeases {
    fn exists(&self, lease: i64) -> bool {
        self.known.contains(&lease)
    }

    fn lease_of(&self, key: &[u8]) -> i64 {
        self.attached.get(key).copied().unwrap_or(0)
    }

    fn attach(&mut self, lease: i64, key: &Bytes) {
        self.attached.insert(key.clone(), lease);
    }

    fn detach(&mut self, key: &[u8]) {
        self.attached.remove(key);
    }
}

/// A store with its storage and leases, each request a batch of its own unless said otherwise.
pub struct World {
    pub storage: Arc<Memory>,
    pub leases: TestLeases,
    pub store: Store,
}

impl World {
    pub fn new() -> Self {
        Self::with_leases(&[])
    }

    pub fn with_leases(known: &[i64]) -> Self {
        let storage = Arc::new(Memory::default());
        let mut leases = TestLeases::of(known);
        let store = Store::open(storage.clone(), &mut leases).unwrap();
        Self { storage, leases, store }
    }

    /// Commits the batch in hand; returns its changes.
    pub fn commit(&mut self) -> Vec<Change> {
        let (batch, changes) = self.store.take_batch();
        self.storage.commit(batch).unwrap();
        self.store.committed();
        changes
    }

    /// Forgets everything but what is committed.
    pub fn reopen(&mut self) {
        let mut leases = TestLeases { known: self.leases.known.clone(), ..Default::default() };
        self.store = Store::open(self.storage.clone(), &mut leases).unwrap();
        self.leases = leases;
    }

    pub fn put(&mut self, key: &str, value: &str) -> i64 {
        let answer = self.store.put(&put(key, value), &mut self.leases).unwrap();
        self.commit();
        answer.header.unwrap().revision
    }

    pub fn delete(&mut self, key: &str, end: &str) -> i64 {
        let answer = self.store.delete_range(&delete(key, end), &mut self.leases).unwrap();
        self.commit();
        answer.header.unwrap().revision
    }

    pub fn compact(&mut self, revision: i64) {
        self.store.compact(revision).unwrap();
        self.commit();
    }

    /// Keeps the hash of the compaction just made.
    pub fn hash_compaction(&mut self) {
        let job = self.store.take_hash_job().unwrap();
        self.store.hashed(Some(job.run().unwrap()));
    }

    pub fn clean(&mut self) {
        while !self.store.clean_slice(2) {
            self.commit();
        }
        self.commit();
    }
}

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

pub fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: text(key), value: text(value), ..Default::default() }
}

pub fn put_leased(key: &str, value: &str, lease: i64) -> PutRequest {
    PutRequest { lease, ..put(key, value) }
}

pub fn delete(key: &str, end: &str) -> DeleteRangeRequest {
    DeleteRangeRequest { key: text(key), range_end: text(end), prev_kv: false }
}

pub fn range(key: &str, end: &str) -> RangeRequest {
    RangeRequest { key: text(key), range_end: text(end), ..Default::default() }
}

pub fn at(key: &str, end: &str, revision: i64) -> RangeRequest {
    RangeRequest { revision, ..range(key, end) }
}

pub fn op(request: impl Into<Request>) -> RequestOp {
    RequestOp { request: Some(request.into()) }
}

impl From<PutRequest> for Request {
    fn from(req: PutRequest) -> Self {
        Request::RequestPut(req)
    }
}

impl From<DeleteRangeRequest> for Request {
    fn from(req: DeleteRangeRequest) -> Self {
        Request::RequestDeleteRange(req)
    }
}

impl From<RangeRequest> for Request {
    fn from(req: RangeRequest) -> Self {
        Request::RequestRange(req)
    }
}

impl From<TxnRequest> for Request {
    fn from(req: TxnRequest) -> Self {
        Request::RequestTxn(req)
    }
}

pub fn txn(compare: Vec<Compare>, success: Vec<RequestOp>, failure: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { compare, success, failure }
}

/// `result`: 0 equal, 1 greater, 2 less, 3 not equal. The target is the union's own.
pub fn compare(key: &str, end: &str, result: i32, with: TargetUnion) -> Compare {
    let target = match with {
        TargetUnion::Version(_) => 0,
        TargetUnion::CreateRevision(_) => 1,
        TargetUnion::ModRevision(_) => 2,
        TargetUnion::Value(_) => 3,
        TargetUnion::Lease(_) => 4,
    };
    Compare { result, target, key: text(key), range_end: text(end), target_union: Some(with) }
}

/// (key, value, create, mod, version, lease), to be compared in one go.
pub type Flat = (String, String, i64, i64, i64, i64);

pub fn flat(raw: &RawKeyValue) -> Flat {
    let kv: KeyValue = raw.decode_record().unwrap();
    let text = |b: Bytes| String::from_utf8_lossy(&b).into_owned();
    (text(kv.key), text(kv.value), kv.create_revision, kv.mod_revision, kv.version, kv.lease)
}

pub fn kv(key: &str, value: &str, create: i64, modified: i64, version: i64, lease: i64) -> Flat {
    (key.into(), value.into(), create, modified, version, lease)
}
