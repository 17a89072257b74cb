//! What a run consisted of. A random test that never tried something proves nothing about it.

use std::{collections::BTreeMap, fmt::Write};

use actd::pb::etcdserverpb::{AlarmRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, request_op};

use crate::{
    answer::{Answer, Reply},
    generate::Request,
};

const EFFECTIVE_WRITES_PERCENT: u64 = 30;

/// What every run must contain. Names of errors are their texts.
const REQUIRED: &[&str] = &[
    "call/Range",
    "call/RangeStream",
    "call/Put",
    "call/DeleteRange",
    "call/Txn",
    "call/Compact",
    "call/LeaseGrant",
    "call/LeaseRevoke",
    "call/LeaseKeepAlive",
    "call/LeaseTimeToLive",
    "call/LeaseLeases",
    "call/HashKV",
    "call/Alarm",
    "ok/Range",
    "ok/RangeStream",
    "ok/Put",
    "ok/DeleteRange",
    "ok/Txn",
    "ok/Compact",
    "ok/LeaseGrant",
    "ok/LeaseRevoke",
    "ok/LeaseKeepAlive",
    "ok/LeaseTimeToLive",
    "ok/LeaseLeases",
    "ok/HashKV",
    "ok/Alarm",
    "field/Range.range_end",
    "field/Range.limit",
    "field/Range.revision",
    "field/Range.sort_order",
    "field/Range.sort_target",
    "field/Range.serializable",
    "field/Range.keys_only",
    "field/Range.count_only",
    "field/Range.min_mod_revision",
    "field/Range.max_mod_revision",
    "field/Range.min_create_revision",
    "field/Range.max_create_revision",
    "field/Put.lease",
    "field/Put.prev_kv",
    "field/Put.ignore_value",
    "field/Put.ignore_lease",
    "field/DeleteRange.range_end",
    "field/DeleteRange.prev_kv",
    "field/Txn.compare",
    "field/Txn.success",
    "field/Txn.failure",
    "field/Txn nested",
    "field/Compare.range_end",
    "field/Compare.target 0",
    "field/Compare.target 1",
    "field/Compare.target 2",
    "field/Compare.target 3",
    "field/Compare.target 4",
    "field/Compare.result 0",
    "field/Compare.result 1",
    "field/Compare.result 2",
    "field/Compare.result 3",
    "field/Compact.physical",
    "field/LeaseGrant.ID",
    "field/LeaseTimeToLive.keys",
    "field/Alarm.action 0",
    "field/Alarm.action 1",
    "field/Alarm.action 2",
    "field/Alarm.memberID",
    "field/Alarm.alarm 0",
    "field/Alarm.alarm 1",
    "field/Alarm.alarm 2",
    "field/WatchCreate.range_end",
    "field/WatchCreate.start_revision",
    "field/WatchCreate.filters",
    "field/WatchCreate.prev_kv",
    "field/WatchCreate.watch_id",
    "field/WatchCreate.fragment",
    "field/WatchCreate.progress_notify",
    "watch/created",
    "watch/created on compacted history",
    "watch/cancel",
    "watch/cancel of an unknown id",
    "watch/empty request",
    "watch/progress answered",
    "watch/sync",
    "watch/events compared",
    "watch/fragments of the reference",
    "watch/fragments of the subject",
    "watch refused/mvcc: watcher range is empty",
    "watch refused/mvcc: duplicate watch ID provided on the WatchStream",
    "watch refused/etcdserver: mvcc: required revision has been compacted",
    "error/etcdserver: key is not provided",
    "error/etcdserver: key not found",
    "error/etcdserver: value is provided",
    "error/etcdserver: lease is provided",
    "error/etcdserver: too many operations in txn request",
    "error/etcdserver: duplicate key given in txn request",
    "error/etcdserver: invalid sort option",
    "error/RangeStream does not support custom sort orders",
    "error/RangeStream does not support revision filters",
    "error/etcdserver: mvcc: required revision has been compacted",
    "error/etcdserver: mvcc: required revision is a future revision",
    "error/etcdserver: mvcc: database space exceeded",
    "error/etcdserver: requested lease not found",
    "error/etcdserver: lease already exists",
    "error/etcdserver: too large lease TTL",
    "error/etcdserver: request is too large",
    "error/etcdserver: corrupt cluster",
    "error/message over the gRPC limit",
];

#[derive(Default)]
pub struct Histogram {
    counts: BTreeMap<String, u64>,
    mutating: u64,
    effective: u64,
}

impl Histogram {
    pub fn count(&mut self, name: &str) {
        self.add(name, 1);
    }

    pub fn add(&mut self, name: &str, n: u64) {
        *self.counts.entry(name.to_owned()).or_default() += n;
    }

    fn field(&mut self, name: &str, used: bool) {
        if used {
            self.add(&format!("field/{name}"), 1);
        }
    }

    /// Counts a call by kind, fields and outcome; `before` is the revision it found.
    pub fn reply(&mut self, request: &Request, reply: &Reply, before: i64) {
        let call = match request {
            Request::Range(_) => "Range",
            Request::RangeStream(_) => "RangeStream",
            Request::Put(_) => "Put",
            Request::DeleteRange(_) => "DeleteRange",
            Request::Txn(_) => "Txn",
            Request::Compact(_) => "Compact",
            Request::LeaseGrant(_) => "LeaseGrant",
            Request::LeaseRevoke(_) => "LeaseRevoke",
            Request::LeaseKeepAlive(_) => "LeaseKeepAlive",
            Request::LeaseTimeToLive(_) => "LeaseTimeToLive",
            Request::LeaseLeases => "LeaseLeases",
            Request::HashKv(_) => "HashKV",
            Request::Alarm(_) => "Alarm",
        };
        self.count(&format!("call/{call}"));
        match reply {
            Ok(_) => self.count(&format!("ok/{call}")),
            Err(error) if error.message.contains("larger than max") => self.count("error/message over the gRPC limit"),
            Err(error) => self.count(&format!("error/{}", error.message)),
        }
        if matches!(request, Request::Put(_) | Request::DeleteRange(_) | Request::Txn(_)) {
            self.mutating += 1;
            let after = reply.as_ref().ok().and_then(Answer::revision);
            self.effective += u64::from(after.is_some_and(|revision| revision > before));
        }
        match request {
            Request::Range(range) | Request::RangeStream(range) => self.range(range),
            Request::Put(put) => self.put(put),
            Request::DeleteRange(delete) => self.delete(delete),
            Request::Txn(txn) => self.txn(txn),
            Request::Compact(compact) => self.field("Compact.physical", compact.physical),
            Request::LeaseGrant(grant) => self.field("LeaseGrant.ID", grant.id != 0),
            Request::LeaseTimeToLive(ttl) => self.field("LeaseTimeToLive.keys", ttl.keys),
            Request::Alarm(alarm) => self.alarm(alarm),
            Request::LeaseRevoke(_) | Request::LeaseKeepAlive(_) | Request::LeaseLeases | Request::HashKv(_) => {}
        }
    }

    fn range(&mut self, range: &RangeRequest) {
        self.field("Range.range_end", !range.range_end.is_empty());
        self.field("Range.limit", range.limit != 0);
        self.field("Range.revision", range.revision != 0);
        self.field("Range.sort_order", range.sort_order != 0);
        self.field("Range.sort_target", range.sort_target != 0);
        self.field("Range.serializable", range.serializable);
        self.field("Range.keys_only", range.keys_only);
        self.field("Range.count_only", range.count_only);
        self.field("Range.min_mod_revision", range.min_mod_revision != 0);
        self.field("Range.max_mod_revision", range.max_mod_revision != 0);
        self.field("Range.min_create_revision", range.min_create_revision != 0);
        self.field("Range.max_create_revision", range.max_create_revision != 0);
    }

    fn alarm(&mut self, alarm: &AlarmRequest) {
        self.field(&format!("Alarm.action {}", alarm.action), true);
        self.field("Alarm.memberID", alarm.member_id != 0);
        self.field(&format!("Alarm.alarm {}", alarm.alarm), true);
    }

    fn put(&mut self, put: &actd::pb::etcdserverpb::PutRequest) {
        self.field("Put.lease", put.lease != 0);
        self.field("Put.prev_kv", put.prev_kv);
        self.field("Put.ignore_value", put.ignore_value);
        self.field("Put.ignore_lease", put.ignore_lease);
    }

    fn delete(&mut self, delete: &actd::pb::etcdserverpb::DeleteRangeRequest) {
        self.field("DeleteRange.range_end", !delete.range_end.is_empty());
        self.field("DeleteRange.prev_kv", delete.prev_kv);
    }

    fn txn(&mut self, txn: &TxnRequest) {
        self.field("Txn.compare", !txn.compare.is_empty());
        self.field("Txn.success", !txn.success.is_empty());
        self.field("Txn.failure", !txn.failure.is_empty());
        let mut compares = txn.compare.clone();
        compares.dedup(); // a hundred times the same is no more than one
        for compare in &compares {
            self.field("Compare.range_end", !compare.range_end.is_empty());
            self.field(&format!("Compare.target {}", compare.target), true);
            self.field(&format!("Compare.result {}", compare.result), true);
        }
        for RequestOp { request } in txn.success.iter().chain(&txn.failure) {
            match request {
                Some(request_op::Request::RequestRange(range)) => self.range(range),
                Some(request_op::Request::RequestPut(put)) => self.put(put),
                Some(request_op::Request::RequestDeleteRange(delete)) => self.delete(delete),
                Some(request_op::Request::RequestTxn(inner)) => {
                    self.field("Txn nested", true);
                    self.txn(inner);
                }
                None => self.field("Txn empty operation", true),
            }
        }
    }

    pub fn watch_create(&mut self, watch: &WatchCreateRequest) {
        self.field("WatchCreate.range_end", !watch.range_end.is_empty());
        self.field("WatchCreate.start_revision", watch.start_revision != 0);
        self.field("WatchCreate.filters", !watch.filters.is_empty());
        self.field("WatchCreate.prev_kv", watch.prev_kv);
        self.field("WatchCreate.watch_id", watch.watch_id != 0);
        self.field("WatchCreate.fragment", watch.fragment);
        self.field("WatchCreate.progress_notify", watch.progress_notify);
    }

    pub fn render(&self) -> String {
        let mut text = String::new();
        for (name, count) in &self.counts {
            writeln!(text, "{count:>9}  {name}").expect("writing to a string");
        }
        let share = 100 * self.effective / self.mutating.max(1);
        write!(text, "{share} % of {} mutating requests changed something", self.mutating).expect("to a string");
        text
    }

    /// Fails where something required, except what is listed as `impossible`, occurred fewer than `needed` times.
    pub fn check(&self, needed: u64, impossible: &[&str]) {
        let seldom = |name: &&&str| self.counts.get(**name).is_none_or(|count| *count < needed);
        let rare: Vec<_> = REQUIRED.iter().filter(|name| !impossible.contains(name)).filter(seldom).collect();
        assert!(rare.is_empty(), "fewer than {needed} of: {rare:#?}");
        assert!(
            100 * self.effective >= EFFECTIVE_WRITES_PERCENT * self.mutating,
            "only {} of {} mutating requests changed something",
            self.effective,
            self.mutating
        );
    }
}
