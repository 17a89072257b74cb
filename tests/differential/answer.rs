//! Answers in a comparable form: what a server may choose freely is taken out or mapped, the rest stays as it came.

use std::collections::HashMap;

use actd::{
    mvcc::record::{KeyValue, RawKeyValue},
    pb::etcdserverpb::{self as rpc, RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse},
};
use bytes::Bytes;
use tonic::Code;

use crate::generate::{OWN_MEMBER, Request};

#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub code: Code,
    pub message: String,
}

pub type Reply = Result<Answer, Failure>;

#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    Range(RangeResponse),
    Put(rpc::PutResponse),
    DeleteRange(rpc::DeleteRangeResponse),
    Txn(TxnResponse),
    Compact(rpc::CompactionResponse),
    LeaseGrant(rpc::LeaseGrantResponse),
    LeaseRevoke(rpc::LeaseRevokeResponse),
    LeaseKeepAlive(rpc::LeaseKeepAliveResponse),
    LeaseTimeToLive(rpc::LeaseTimeToLiveResponse),
    LeaseLeases(rpc::LeaseLeasesResponse),
    HashKv(rpc::HashKvResponse),
    Alarm(rpc::AlarmResponse),
}

impl Answer {
    fn header_mut(&mut self) -> &mut Option<ResponseHeader> {
        match self {
            Self::Range(a) => &mut a.header,
            Self::Put(a) => &mut a.header,
            Self::DeleteRange(a) => &mut a.header,
            Self::Txn(a) => &mut a.header,
            Self::Compact(a) => &mut a.header,
            Self::LeaseGrant(a) => &mut a.header,
            Self::LeaseRevoke(a) => &mut a.header,
            Self::LeaseKeepAlive(a) => &mut a.header,
            Self::LeaseTimeToLive(a) => &mut a.header,
            Self::LeaseLeases(a) => &mut a.header,
            Self::HashKv(a) => &mut a.header,
            Self::Alarm(a) => &mut a.header,
        }
    }

    pub fn revision(&self) -> Option<i64> {
        self.clone().header_mut().as_ref().map(|header| header.revision)
    }
}

/// One server's own numbers, in terms of the reference.
pub struct Identity {
    pub member: u64,
    pub cluster: u64,
    /// Lease ids this server chose: ours → the reference's.
    pub leases: HashMap<i64, i64>,
}

impl Identity {
    /// Ids become 1 where they are the right ones, terms 1 where there is one.
    pub fn header(&self, header: &mut Option<ResponseHeader>) {
        if let Some(header) = header {
            let ours = |id: &mut u64, own| *id = if *id == own { 1 } else { *id };
            ours(&mut header.member_id, self.member);
            ours(&mut header.cluster_id, self.cluster);
            header.raft_term = header.raft_term.min(1);
        }
    }

    pub fn lease(&self, id: &mut i64) {
        *id = *self.leases.get(id).unwrap_or(id);
    }

    pub fn record(&self, record: &mut KeyValue) {
        self.lease(&mut record.lease);
    }

    fn raw_record(&self, raw: &mut RawKeyValue) {
        let mut record = raw.decode_record().expect("a record decodes");
        self.record(&mut record);
        *raw = record.to_raw();
    }

    fn raw_records<'a>(&self, records: impl IntoIterator<Item = &'a mut RawKeyValue>) {
        records.into_iter().for_each(|record| self.raw_record(record));
    }

    pub fn normalise(&self, request: &Request, reply: &mut Reply) {
        let Ok(answer) = reply else { return };
        self.header(answer.header_mut());
        match (answer, request) {
            (Answer::Range(a), Request::Range(range) | Request::RangeStream(range)) => self.range(range, a),
            (Answer::Put(a), _) => self.raw_records(&mut a.prev_kv),
            (Answer::DeleteRange(a), _) => self.raw_records(&mut a.prev_kvs),
            (Answer::Txn(a), Request::Txn(txn)) => self.txn(txn, a),
            (Answer::LeaseGrant(a), _) => self.lease(&mut a.id),
            (Answer::LeaseKeepAlive(a), _) => self.lease(&mut a.id),
            (Answer::LeaseTimeToLive(a), _) => {
                self.lease(&mut a.id);
                a.keys.sort(); // L-20: in no particular order
            }
            (Answer::LeaseLeases(a), _) => {
                a.leases.iter_mut().for_each(|lease| self.lease(&mut lease.id));
                a.leases.sort_by_key(|lease| lease.id); // L-24: by remaining time, and many are equal
            }
            (Answer::Alarm(a), _) => {
                for alarm in &mut a.alarms {
                    alarm.member_id = if alarm.member_id == self.member { OWN_MEMBER } else { alarm.member_id };
                }
                a.alarms.sort_by_key(|alarm| (alarm.alarm, alarm.member_id));
            }
            _ => {}
        }
    }

    fn txn(&self, txn: &TxnRequest, answer: &mut TxnResponse) {
        use rpc::{request_op::Request as Asked, response_op::Response as Got};
        let branch = if answer.succeeded { &txn.success } else { &txn.failure };
        for (asked, got) in branch.iter().zip(&mut answer.responses) {
            match (&asked.request, &mut got.response) {
                (Some(Asked::RequestRange(range)), Some(Got::ResponseRange(a))) => self.range(range, a),
                (_, Some(Got::ResponsePut(a))) => self.raw_records(&mut a.prev_kv),
                (_, Some(Got::ResponseDeleteRange(a))) => self.raw_records(&mut a.prev_kvs),
                (Some(Asked::RequestTxn(inner)), Some(Got::ResponseTxn(a))) => self.txn(inner, a),
                _ => {}
            }
        }
    }

    /// KV-21: the order among equal sort keys is open, and with it who of the last group is cut off.
    fn range(&self, asked: &RangeRequest, answer: &mut RangeResponse) {
        self.raw_records(&mut answer.kvs);
        if asked.sort_target == 0 {
            return; // keys are unique
        }
        let mut records: Vec<KeyValue> =
            answer.kvs.iter().map(|raw| raw.decode_record().expect("a record decodes")).collect();
        let sort_key = |record: &KeyValue| match asked.sort_target {
            1 => (record.version, Bytes::new()),
            2 => (record.create_revision, Bytes::new()),
            3 => (record.mod_revision, Bytes::new()),
            _ => (0, record.value.clone()), // nothing to see of it with `keys_only`: all are one group
        };
        for group in records.chunk_by_mut(|a, b| sort_key(a) == sort_key(b)) {
            group.sort_by(|a, b| a.key.cmp(&b.key));
        }
        if answer.more
            && let Some(last) = records.last().map(&sort_key)
        {
            for record in records.iter_mut().filter(|record| sort_key(record) == last) {
                let (version, create_revision, mod_revision, value) = match asked.sort_target {
                    1 => (record.version, 0, 0, Bytes::new()),
                    2 => (0, record.create_revision, 0, Bytes::new()),
                    3 => (0, 0, record.mod_revision, Bytes::new()),
                    _ => (0, 0, 0, record.value.clone()),
                };
                *record = KeyValue { version, create_revision, mod_revision, value, ..Default::default() };
            }
        }
        answer.kvs = records.iter().map(KeyValue::to_raw).collect();
    }
}

/// Takes out what may differ between two runs of one server: a clock's last digit, and hashes over server-chosen ids.
pub fn reconcile(server_leases: bool, reference: &mut Reply, subject: &mut Reply) {
    match (reference, subject) {
        (Ok(Answer::LeaseTimeToLive(a)), Ok(Answer::LeaseTimeToLive(b))) if (a.ttl - b.ttl).abs() <= 2 => b.ttl = a.ttl,
        (Ok(Answer::HashKv(a)), Ok(Answer::HashKv(b))) if server_leases => b.hash = a.hash,
        _ => {}
    }
}
