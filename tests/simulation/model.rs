//! What the log means: a naive store that executes committed requests one after another and keeps everything.
//!
//! It shares nothing with the server but the messages. Each answer of the server is compared with the one made here,
//! field by field; each watch event with the history kept here.

use std::collections::{BTreeMap, BTreeSet};

use actd::{
    apply::{Error, Response},
    mvcc::record::{KeyValue, RawKeyValue},
    pb::etcdserverpb::{
        CompactionResponse, Compare, DeleteRangeRequest, DeleteRangeResponse, InternalRaftRequest, LeaseGrantResponse,
        LeaseRevokeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp, ResponseHeader,
        ResponseOp, TxnRequest, TxnResponse, compare::TargetUnion, request_op::Request, response_op,
    },
};
use bytes::Bytes;

/// A change of a key, as it stands in the history for ever.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub revision: i64,
    pub key: Bytes,
    /// `None`: deleted.
    pub kv: Option<KeyValue>,
}

#[derive(Default)]
pub struct Model {
    /// All changes of each key, oldest first.
    keys: BTreeMap<Bytes, Vec<Change>>,
    /// The changes of each revision, in the order they were made.
    pub revisions: BTreeMap<i64, Vec<Change>>,
    pub revision: i64,
    /// -1 before the first compaction.
    pub compacted: i64,
    /// Time to live and keys.
    pub leases: BTreeMap<i64, (i64, BTreeSet<Bytes>)>,
    min_ttl: i64,
}

/// One write in progress.
struct Write {
    main: i64,
    changes: Vec<Change>,
}

impl Write {
    fn revision(&self) -> i64 {
        if self.changes.is_empty() { self.main - 1 } else { self.main }
    }
}

fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..Default::default() })
}

fn within(key: &[u8], from: &[u8], end: &[u8]) -> bool {
    match end {
        b"" => key == from,
        b"\0" => key >= from,
        _ => key >= from && key < end,
    }
}

fn raw(kv: &KeyValue, keys_only: bool) -> RawKeyValue {
    if keys_only {
        // The lease is left out, too (KV-25).
        return KeyValue { value: Bytes::new(), lease: 0, ..kv.clone() }.to_raw();
    }
    kv.to_raw()
}

impl Model {
    pub fn new(min_ttl: i64) -> Self {
        Self { revision: 1, compacted: -1, min_ttl, ..Self::default() }
    }

    /// The state of a key at a revision.
    pub fn at(&self, key: &[u8], revision: i64) -> Option<&KeyValue> {
        let changes = self.keys.get(key)?;
        changes.iter().rev().find(|change| change.revision <= revision)?.kv.as_ref()
    }

    fn alive(&self, from: &[u8], end: &[u8], revision: i64) -> Vec<KeyValue> {
        let found = self.keys.iter().filter(|(key, _)| within(key, from, end));
        found.filter_map(|(key, _)| self.at(key, revision).cloned()).collect()
    }

    /// The changes in a range from one revision to another, both included.
    pub fn history<'a>(
        &'a self,
        key: &'a [u8],
        end: &'a [u8],
        from: i64,
        to: i64,
    ) -> impl Iterator<Item = &'a Change> + 'a {
        let revisions = self.revisions.range(from..).take_while(move |(revision, _)| **revision <= to);
        revisions.flat_map(|(_, changes)| changes).filter(move |change| within(&change.key, key, end))
    }

    /// A range outside of transactions, by a reader whose newest revision is `newest`.
    pub fn range(&self, req: &RangeRequest, newest: i64, compacted: i64) -> Result<RangeResponse, Error> {
        let at = match req.revision {
            r if r > newest => return Err(Error::FutureRev),
            r if r <= 0 => newest,
            r if r < compacted => return Err(Error::Compacted),
            r => r,
        };
        Ok(self.answer(req, at, newest))
    }

    fn answer(&self, req: &RangeRequest, at: i64, newest: i64) -> RangeResponse {
        let mut found = self.alive(&req.key, &req.range_end, at);
        let mut answer = RangeResponse { header: header(newest), count: found.len() as i64, ..Default::default() };
        if !req.count_only {
            if req.limit > 0 && !req.range_end.is_empty() && found.len() as i64 > req.limit {
                found.truncate(req.limit as usize);
                answer.more = true;
            }
            answer.kvs = found.iter().map(|kv| raw(kv, req.keys_only)).collect();
        }
        answer
    }

    /// Executes one committed request.
    pub fn execute(&mut self, request: &InternalRaftRequest) -> Result<Response, Error> {
        let mut write = Write { main: self.revision + 1, changes: Vec::new() };
        let answer = if let Some(put) = &request.put {
            self.check_put(put)?;
            Response::Put(self.put(&mut write, put))
        } else if let Some(delete) = &request.delete_range {
            Response::DeleteRange(self.delete(&mut write, delete))
        } else if let Some(txn) = &request.txn {
            self.check_txn(txn)?;
            let selected = self.select(txn);
            let mut answer = self.run(&mut write, txn, &selected);
            answer.header = header(write.revision());
            Response::Txn(answer)
        } else if let Some(compaction) = &request.compaction {
            if compaction.revision <= self.compacted {
                return Err(Error::Compacted);
            }
            if compaction.revision > self.revision {
                return Err(Error::FutureRev);
            }
            self.compacted = compaction.revision;
            Response::Compact(CompactionResponse { header: header(self.revision) })
        } else if let Some(grant) = &request.lease_grant {
            if self.leases.contains_key(&grant.id) {
                return Err(Error::LeaseExists);
            }
            let ttl = grant.ttl.max(self.min_ttl);
            self.leases.insert(grant.id, (ttl, BTreeSet::new()));
            let answer = LeaseGrantResponse { header: header(self.revision), id: grant.id, ttl, error: String::new() };
            Response::LeaseGrant(answer)
        } else if let Some(revoke) = &request.lease_revoke {
            let (_, keys) = self.leases.remove(&revoke.id).ok_or(Error::LeaseNotFound)?;
            for key in keys {
                self.delete_one(&mut write, &key);
            }
            Response::LeaseRevoke(LeaseRevokeResponse { header: header(write.revision()) })
        } else {
            Response::Done
        };
        self.revision = write.revision();
        if !write.changes.is_empty() {
            self.revisions.insert(write.main, write.changes);
        }
        Ok(answer)
    }

    fn check_put(&self, put: &PutRequest) -> Result<(), Error> {
        if put.lease != 0 && !self.leases.contains_key(&put.lease) {
            return Err(Error::LeaseNotFound);
        }
        if (put.ignore_value || put.ignore_lease) && self.at(&put.key, i64::MAX).is_none() {
            return Err(Error::KeyNotFound);
        }
        Ok(())
    }

    fn detach(&mut self, key: &Bytes) {
        for (_, keys) in self.leases.values_mut() {
            keys.remove(key);
        }
    }

    fn record(&mut self, write: &mut Write, key: &Bytes, kv: Option<KeyValue>) {
        let change = Change { revision: write.main, key: key.clone(), kv };
        self.keys.entry(key.clone()).or_default().push(change.clone());
        write.changes.push(change);
    }

    fn put(&mut self, write: &mut Write, put: &PutRequest) -> PutResponse {
        let old = self.at(&put.key, i64::MAX).cloned();
        let mut kv = KeyValue {
            key: put.key.clone(),
            create_revision: old.as_ref().map_or(write.main, |old| old.create_revision),
            mod_revision: write.main,
            version: old.as_ref().map_or(1, |old| old.version + 1),
            value: put.value.clone(),
            lease: put.lease,
        };
        if let Some(old) = &old {
            if put.ignore_value {
                kv.value = old.value.clone();
            }
            if put.ignore_lease {
                kv.lease = old.lease;
            }
        }
        self.detach(&put.key);
        if let Some((_, keys)) = self.leases.get_mut(&kv.lease) {
            keys.insert(put.key.clone());
        }
        self.record(write, &put.key, Some(kv));
        let prev_kv = old.filter(|_| put.prev_kv).map(|old| old.to_raw());
        PutResponse { header: header(write.revision()), prev_kv }
    }

    fn delete_one(&mut self, write: &mut Write, key: &Bytes) {
        self.detach(key);
        self.record(write, key, None);
    }

    fn delete(&mut self, write: &mut Write, delete: &DeleteRangeRequest) -> DeleteRangeResponse {
        let doomed = self.alive(&delete.key, &delete.range_end, i64::MAX);
        for kv in &doomed {
            self.delete_one(write, &kv.key);
        }
        let prev_kvs = doomed.iter().filter(|_| delete.prev_kv).map(KeyValue::to_raw).collect();
        DeleteRangeResponse { header: header(write.revision()), deleted: doomed.len() as i64, prev_kvs }
    }

    fn holds(&self, compare: &Compare) -> bool {
        let found = self.alive(&compare.key, &compare.range_end, i64::MAX);
        let judge = |kv: Option<&KeyValue>| {
            let number = |pick: fn(&KeyValue) -> i64| kv.map_or(0, pick);
            let ordering = match compare.target_union.as_ref().expect("compares here have a target") {
                TargetUnion::Version(n) => number(|kv| kv.version).cmp(n),
                TargetUnion::CreateRevision(n) => number(|kv| kv.create_revision).cmp(n),
                TargetUnion::ModRevision(n) => number(|kv| kv.mod_revision).cmp(n),
                TargetUnion::Lease(n) => number(|kv| kv.lease).cmp(n),
                TargetUnion::Value(value) => match kv {
                    None => return false,
                    Some(kv) => kv.value.cmp(value),
                },
            };
            match compare.result {
                0 => ordering.is_eq(),
                1 => ordering.is_gt(),
                2 => ordering.is_lt(),
                _ => ordering.is_ne(),
            }
        };
        if found.is_empty() { judge(None) } else { found.iter().all(|kv| judge(Some(kv))) }
    }

    fn select(&self, txn: &TxnRequest) -> Selected {
        let succeeded = txn.compare.iter().all(|compare| self.holds(compare));
        let nested = ops(txn, succeeded).iter().filter_map(|op| match &op.request {
            Some(Request::RequestTxn(txn)) => Some(self.select(txn)),
            _ => None,
        });
        Selected { succeeded, nested: nested.collect() }
    }

    fn check_txn(&self, txn: &TxnRequest) -> Result<(), Error> {
        let selected = self.select(txn);
        self.check_selected(txn, &selected)
    }

    fn check_selected(&self, txn: &TxnRequest, selected: &Selected) -> Result<(), Error> {
        let mut nested = selected.nested.iter();
        for op in ops(txn, selected.succeeded) {
            match op.request.as_ref().expect("operations here are of a kind") {
                Request::RequestRange(range) if range.revision > self.revision => return Err(Error::FutureRev),
                Request::RequestRange(range) if range.revision != 0 && range.revision < self.compacted => {
                    return Err(Error::Compacted);
                }
                Request::RequestPut(put) => self.check_put(put)?,
                Request::RequestTxn(txn) => self.check_selected(txn, nested.next().expect("one each"))?,
                _ => {}
            }
        }
        Ok(())
    }

    fn run(&mut self, write: &mut Write, txn: &TxnRequest, selected: &Selected) -> TxnResponse {
        let mut nested = selected.nested.iter();
        let mut responses = Vec::new();
        for op in ops(txn, selected.succeeded) {
            let response = match op.request.as_ref().expect("operations here are of a kind") {
                Request::RequestRange(range) => {
                    let newest = write.revision();
                    let at = if range.revision > 0 { range.revision } else { newest };
                    response_op::Response::ResponseRange(self.answer(range, at, newest))
                }
                Request::RequestPut(put) => response_op::Response::ResponsePut(self.put(write, put)),
                Request::RequestDeleteRange(delete) => {
                    response_op::Response::ResponseDeleteRange(self.delete(write, delete))
                }
                Request::RequestTxn(txn) => {
                    response_op::Response::ResponseTxn(self.run(write, txn, nested.next().expect("one each")))
                }
            };
            responses.push(ResponseOp { response: Some(response) });
        }
        TxnResponse { header: Some(ResponseHeader::default()), succeeded: selected.succeeded, responses }
    }
}

/// What the compares decided.
struct Selected {
    succeeded: bool,
    nested: Vec<Selected>,
}

fn ops(txn: &TxnRequest, succeeded: bool) -> &[RequestOp] {
    if succeeded { &txn.success } else { &txn.failure }
}
