//! Every difference that is known and why it is one, and what is left unasked. Nothing else may differ.
//!
//! An entry takes exactly its difference out of a pair of answers; what remains is compared as usual. Whoever removes an
//! entry sees the requests it is for.

use actd::pb::etcdserverpb::{RangeRequest, RangeResponse, TxnRequest, TxnResponse, request_op, response_op};
use tonic::Code;

use crate::{
    answer::{Answer, Reply},
    generate::Request,
};

/// What the reference is when an entry applies.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum When {
    /// An etcd of release 3.4, and the subject is none.
    Old,
    /// Any etcd.
    Always,
}

pub struct Known {
    pub statement: &'static str,
    pub reason: &'static str,
    pub when: When,
    /// Makes the two equal where they differ in this.
    pub align: fn(&Request, &mut Reply, &mut Reply),
}

/// What no etcd is ever asked, as it misbehaves there and shows nothing to compare with.
pub struct Never {
    pub statement: &'static str,
    pub reason: &'static str,
    /// Makes of such a request one that may be asked.
    pub spare: fn(&mut Request),
}

pub const NEVER_ASKED: &[Never] = &[
    Never {
        statement: "KV-38",
        reason: "a stream in no order, but by something else than the key: 3.7 sorts each part by itself",
        spare: |request| {
            if let Request::RangeStream(range) = request
                && range.sort_order == 0
                && (1..5).contains(&range.sort_target)
            {
                range.sort_target = 0;
            }
        },
    },
    Never {
        statement: "KV-58, KV-65",
        reason: "a put that keeps what its transaction may have deleted from some key on: it ends the process",
        spare: |request| {
            if let Request::Txn(txn) = request
                && deletes_from_key(txn)
            {
                ignore_nothing(txn);
            }
        },
    },
];

/// Not sent to an etcd 3.4, as the two would be in different states after it: statement and reason.
pub const NOT_ASKED_OF_OLD: &[(&str, &str)] = &[
    ("KV-23", "3.4 checks no sort option; an unknown one ends its process"),
    ("W-7", "3.4 starts a watcher from a negative revision as from now"),
    ("KV-80", "3.4 drops a tombstone at the compact revision, so a watcher from there misses the deletion"),
    ("M-12", "3.4 looks for puts only at the top of a transaction and lets nested ones pass under an alarm"),
    ("M-11", "with alarms of both kinds 3.4 obeys the one raised last, not CORRUPT"),
    ("M-7", "3.4 stores an alarm of type NONE; for member 0 that ends its process"),
];

/// What cannot occur with an etcd 3.4 as the reference.
pub const NEVER_WITH_OLD: &[&str] = &[
    "ok/RangeStream",
    "error/RangeStream does not support custom sort orders",
    "error/RangeStream does not support revision filters",
    "error/etcdserver: invalid sort option",
    "watch refused/etcdserver: mvcc: required revision has been compacted",
];

pub const KNOWN: &[Known] = &[
    Known {
        statement: "KV-29",
        reason: "RangeStream is new in 3.7",
        when: When::Old,
        align: |request, reference, subject| {
            if matches!(request, Request::RangeStream(_)) && code(reference) == Some(Code::Unimplemented) {
                *reference = subject.clone();
            }
        },
    },
    Known {
        statement: "KV-25",
        reason: "with keys_only, 3.7 leaves the lease out unless it sorts by value; giving it is allowed",
        when: When::Always,
        align: |request, reference, subject| {
            for reply in [reference, subject] {
                each_range(request, reply, &mut |range, answer| {
                    if range.keys_only && range.sort_target != 4 {
                        for raw in &mut answer.kvs {
                            let mut record = raw.decode_record().expect("a record decodes");
                            record.lease = 0;
                            *raw = record.to_raw();
                        }
                    }
                });
            }
        },
    },
    Known {
        statement: "G-5",
        reason: "alarm answers of 3.4 have no header",
        when: When::Old,
        align: |_, reference, subject| {
            if let (Ok(Answer::Alarm(a)), Ok(Answer::Alarm(b))) = (reference, subject) {
                a.header = b.header;
            }
        },
    },
    Known {
        statement: "M-27, M-29, M-30",
        reason: "3.4 has no hash_revision, keeps no hashes of compactions, and takes in tombstones at the compact revision",
        when: When::Old,
        align: |_, reference, subject| {
            if let (Ok(Answer::HashKv(a)), Ok(Answer::HashKv(b))) = (reference, subject) {
                a.hash_revision = b.hash_revision;
                if b.compact_revision > 0 || b.compact_revision != a.compact_revision {
                    (a.hash, a.compact_revision) = (b.hash, b.compact_revision);
                }
            }
        },
    },
    Known {
        statement: "M-26, M-30",
        reason: "3.4 refuses to hash at the compact revision itself and keeps no hashes of compactions",
        when: When::Old,
        align: |request, reference, subject| {
            if matches!(request, Request::HashKv(_)) && code(reference) == Some(Code::OutOfRange) && subject.is_ok() {
                *reference = subject.clone();
            }
        },
    },
    Known {
        statement: "KV-58",
        reason: "of several failing operations 3.4 reports puts before ranges, 3.7 the first",
        when: When::Old,
        align: |request, reference, subject| {
            if matches!(request, Request::Txn(_)) && failed_check(reference) && failed_check(subject) {
                *reference = subject.clone();
            }
        },
    },
];

/// Whether this is what the check before a transaction's first operation answers.
fn failed_check(reply: &Reply) -> bool {
    const TEXTS: [&str; 4] = [
        "etcdserver: requested lease not found",
        "etcdserver: key not found",
        "etcdserver: mvcc: required revision is a future revision",
        "etcdserver: mvcc: required revision has been compacted",
    ];
    reply.as_ref().err().is_some_and(|error| TEXTS.contains(&error.message.as_str()))
}

fn code(reply: &Reply) -> Option<Code> {
    reply.as_ref().err().map(|error| error.code)
}

/// Visits the answers to all ranges of a request, those inside transactions too.
fn each_range(request: &Request, reply: &mut Reply, visit: &mut impl FnMut(&RangeRequest, &mut RangeResponse)) {
    match (request, reply) {
        (Request::Range(range) | Request::RangeStream(range), Ok(Answer::Range(answer))) => visit(range, answer),
        (Request::Txn(txn), Ok(Answer::Txn(answer))) => each_range_of_txn(txn, answer, visit),
        _ => {}
    }
}

fn each_range_of_txn(
    txn: &TxnRequest,
    answer: &mut TxnResponse,
    visit: &mut impl FnMut(&RangeRequest, &mut RangeResponse),
) {
    let branch = if answer.succeeded { &txn.success } else { &txn.failure };
    for (asked, got) in branch.iter().zip(&mut answer.responses) {
        match (&asked.request, &mut got.response) {
            (Some(request_op::Request::RequestRange(range)), Some(response_op::Response::ResponseRange(answer))) => {
                visit(range, answer);
            }
            (Some(request_op::Request::RequestTxn(inner)), Some(response_op::Response::ResponseTxn(answer))) => {
                each_range_of_txn(inner, answer, visit);
            }
            _ => {}
        }
    }
}

/// Whether there is a delete that the check for duplicate keys does not see (KV-65).
fn deletes_from_key(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|operation| match &operation.request {
        Some(request_op::Request::RequestDeleteRange(delete)) => *delete.range_end == *b"\0",
        Some(request_op::Request::RequestTxn(inner)) => deletes_from_key(inner),
        _ => false,
    })
}

/// A put that keeps a value or lease which the same transaction has deleted ends the process of any etcd: the key was
/// there when it was checked (KV-58).
fn ignore_nothing(txn: &mut TxnRequest) {
    for operation in txn.success.iter_mut().chain(&mut txn.failure) {
        match &mut operation.request {
            Some(request_op::Request::RequestPut(put)) => (put.ignore_value, put.ignore_lease) = (false, false),
            Some(request_op::Request::RequestTxn(inner)) => ignore_nothing(inner),
            _ => {}
        }
    }
}
