//! A naive store for the tests: every row in one map, every question answered by a scan.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::{
    mvcc::{
        KeyRange, Revision,
        change::Change,
        hash::CompactionHashes,
        index::Index,
        record::{KeyValue, RawKeyValue},
        view::{Sizes, View},
    },
    pb::etcdserverpb::{
        WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
        watch_request::RequestUnion,
    },
    storage,
};

#[derive(Clone, Debug)]
pub struct Row {
    pub key: Vec<u8>,
    pub delete: bool,
    pub kv: KeyValue,
}

#[derive(Debug)]
pub struct Model {
    /// Everything that ever happened.
    pub log: BTreeMap<Revision, Row>,
    /// What compactions have left.
    pub rows: BTreeMap<Revision, Row>,
    pub view: View,
    /// Compact revision up to which condemned rows are gone.
    pub cleaned: i64,
    /// Pages of history are cut here, whatever the caller's limit.
    pub page_revisions: usize,
    /// Calls of `changes`.
    pub reads: usize,
}

pub enum Op<'a> {
    Put(&'a str, &'a str),
    Delete(&'a str),
}

impl Model {
    pub fn new() -> Self {
        Self {
            log: BTreeMap::new(),
            rows: BTreeMap::new(),
            view: View {
                revision: 1,
                compact_revision: -1,
                index: Index::default(),
                sizes: Sizes::EMPTY,
                hashes: CompactionHashes::default(),
            },
            cleaned: -1,
            page_revisions: usize::MAX,
            reads: 0,
        }
    }

    /// One write; nothing happens if it changes nothing.
    pub fn txn(&mut self, ops: &[Op<'_>]) {
        let main = self.view.revision + 1;
        let mut sub = 0;
        for op in ops {
            let (Op::Put(key, _) | Op::Delete(key)) = op;
            let before = self.newest(key.as_bytes(), i64::MAX).map(|(_, row)| row.kv.clone());
            let kv = match (op, &before) {
                (Op::Delete(_), None) => continue,
                (Op::Delete(_), _) => {
                    KeyValue { key: key.as_bytes().to_vec().into(), mod_revision: main, ..Default::default() }
                }
                (Op::Put(_, value), before) => KeyValue {
                    key: key.as_bytes().to_vec().into(),
                    create_revision: before.as_ref().map_or(main, |kv| kv.create_revision),
                    mod_revision: main,
                    version: before.as_ref().map_or(1, |kv| kv.version + 1),
                    value: value.as_bytes().to_vec().into(),
                    lease: 0,
                },
            };
            let row = Row { key: key.as_bytes().to_vec(), delete: matches!(op, Op::Delete(_)), kv };
            self.log.insert(Revision::new(main, sub), row.clone());
            self.rows.insert(Revision::new(main, sub), row);
            self.view.revision = main;
            sub += 1;
        }
    }

    pub fn put(&mut self, key: &str, value: &str) {
        self.txn(&[Op::Put(key, value)]);
    }

    pub fn delete(&mut self, key: &str) {
        self.txn(&[Op::Delete(key)]);
    }

    /// The live row of `key` with a main revision below `before`.
    pub fn newest(&self, key: &[u8], before: i64) -> Option<(Revision, &Row)> {
        let newest = self.log.range(..Revision::new(before, 0)).rev().find(|(_, row)| row.key == key);
        newest.map(|(rev, row)| (*rev, row)).filter(|(_, row)| !row.delete)
    }

    pub fn compact(&mut self, at: i64) {
        assert!(at > self.view.compact_revision && at <= self.view.revision);
        self.view.compact_revision = at;
    }

    /// Deletes what the compaction condemned: per key all but the newest row up to there, and that one too if it is
    /// a tombstone below the compact revision.
    pub fn clean(&mut self) {
        let at = self.view.compact_revision;
        let mut newest: BTreeMap<Vec<u8>, Revision> = BTreeMap::new();
        for (rev, row) in self.rows.range(..Revision::new(at + 1, 0)) {
            newest.insert(row.key.clone(), *rev);
        }
        self.rows.retain(|rev, row| rev.main > at || newest[&row.key] == *rev && !(row.delete && rev.main < at));
        self.cleaned = at;
    }

    fn change(&self, rev: Revision, row: &Row) -> Change {
        let prev = self.newest(&row.key, rev.main).map(|(prev, _)| prev);
        Change::new(rev, row.key.clone().into(), row.delete, row.kv.to_raw(), prev)
    }

    /// The message to hubs about everything above `from`.
    pub fn published(&self, from: i64) -> Published {
        self.published_to(from, self.view.revision)
    }

    /// A message about a view before the newest one.
    pub fn published_to(&self, from: i64, to: i64) -> Published {
        let rows = self.log.range(Revision::new(from + 1, 0)..Revision::new(to + 1, 0));
        let changes = rows.map(|(rev, row)| self.change(*rev, row)).collect();
        Published { view: Arc::new(View { revision: to, ..self.view.clone() }), changes, raft_term: 5 }
    }
}

impl History for Model {
    fn view(&self) -> &View {
        &self.view
    }

    fn changes(&mut self, range: KeyRange<'_>, from: i64, limit: HistoryLimit) -> Result<HistoryPage, HistoryError> {
        self.reads += 1;
        if from < self.view.compact_revision {
            return Err(HistoryError::Compacted { compact_revision: self.view.compact_revision });
        }
        let mut page = HistoryPage { changes: Vec::new(), next_from: self.view.revision + 1 };
        let (mut bytes, mut revisions, mut last) = (0, 0, 0);
        for (rev, row) in self.rows.range(Revision::new(from, 0)..).filter(|(_, row)| range.contains(&row.key)) {
            if rev.main != last {
                if bytes >= limit.bytes || revisions >= limit.revisions.min(self.page_revisions) {
                    page.next_from = rev.main;
                    break;
                }
                (last, revisions) = (rev.main, revisions + 1);
            }
            let change = self.change(*rev, row);
            bytes += change.event().0.len();
            page.changes.push(change);
        }
        Ok(page)
    }

    fn record(&mut self, revision: Revision) -> Result<Option<RawKeyValue>, storage::Error> {
        Ok(self.rows.get(&revision).filter(|row| !row.delete).map(|row| row.kv.to_raw()))
    }
}

pub fn create(create: WatchCreateRequest) -> WatchRequest {
    WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

pub fn cancel(watch_id: i64) -> WatchRequest {
    WatchRequest { request_union: Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })) }
}

pub fn progress() -> WatchRequest {
    WatchRequest { request_union: Some(RequestUnion::ProgressRequest(WatchProgressRequest {})) }
}

/// An event as a client reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub delete: bool,
    pub kv: KeyValue,
    pub prev: Option<KeyValue>,
}

pub fn events(response: &WatchResponse) -> Vec<Seen> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Event {
        #[prost(int32, tag = "1")]
        r#type: i32,
        #[prost(message, optional, tag = "2")]
        kv: Option<KeyValue>,
        #[prost(message, optional, tag = "3")]
        prev_kv: Option<KeyValue>,
    }
    let decode = |raw: &crate::mvcc::record::RawEvent| {
        let event: Event = prost::Message::decode(raw.0.clone()).unwrap();
        Seen { delete: event.r#type == 1, kv: event.kv.unwrap(), prev: event.prev_kv }
    };
    response.events.iter().map(decode).collect()
}
