//! The store's rules one by one, each by the statement it checks.

use bytes::Bytes;

use super::{
    Error, KeyRange, Revision,
    range::{Bounds, RangeCursor, range as read, range_within, weight},
    replay::{self, Limit},
    store::{FINISHED_COMPACT_KEY, SCHEDULED_COMPACT_KEY},
    test_support::*,
    txn::{is_read_only, put_cost, quota_cost, txn_cost, txn_read_only, txn_read_only_within},
};
use crate::{
    pb::etcdserverpb::{
        Compare, DeleteRangeRequest, InternalRaftRequest, LeaseGrantRequest, PutRequest, RangeRequest, RangeResponse,
        ResponseOp, TxnRequest, TxnResponse, compare::TargetUnion::*, response_op::Response,
    },
    storage::{Bucket, Storage, WriteBatch},
};

const NO_LIMIT: Limit = Limit { changes: usize::MAX, bytes: usize::MAX };

impl World {
    fn range(&self, req: &RangeRequest) -> Result<RangeResponse, Error> {
        read(&self.store.view(), &*self.storage, req)
    }

    fn kvs(&self, req: &RangeRequest) -> Vec<Flat> {
        self.range(req).unwrap().kvs.iter().map(flat).collect()
    }

    /// Keys and revisions of the history from `from` on; `-` marks a delete.
    fn history(&self, from: i64) -> Vec<String> {
        let view = self.store.view();
        let replay = replay::changes(&view, &*self.storage, KeyRange::ALL, from, view.revision, NO_LIMIT).unwrap();
        let text = |k: &Bytes| String::from_utf8_lossy(k).into_owned();
        replay
            .changes
            .iter()
            .map(|c| format!("{}{}@{}", if c.delete { "-" } else { "" }, text(&c.key), c.revision.main))
            .collect()
    }

    fn txn(&mut self, req: TxnRequest) -> Result<TxnResponse, Error> {
        let answer = self.store.txn(&req, &mut self.leases);
        self.commit();
        answer
    }
}

fn header_revision(op: &ResponseOp) -> i64 {
    match op.response.as_ref().unwrap() {
        Response::ResponseRange(r) => r.header.unwrap().revision,
        Response::ResponsePut(r) => r.header.unwrap().revision,
        Response::ResponseDeleteRange(r) => r.header.unwrap().revision,
        Response::ResponseTxn(r) => r.header.unwrap().revision,
    }
}

fn ranged(op: &ResponseOp) -> &RangeResponse {
    match op.response.as_ref().unwrap() {
        Response::ResponseRange(r) => r,
        other => panic!("{other:?}"),
    }
}

// KV-1, KV-2, KV-45, KV-48, KV-69
#[test]
fn only_effective_writes_grow_the_revision() {
    let mut w = World::new();
    assert_eq!(w.range(&range("a", "")).unwrap().header.unwrap().revision, 1);
    assert_eq!(w.put("a", "1"), 2);
    assert_eq!(w.kvs(&range("a", "")), [kv("a", "1", 2, 2, 1, 0)]);
    assert_eq!(w.delete("x", ""), 2, "nothing to delete");
    assert_eq!(w.delete("a", ""), 3);
    assert_eq!(w.delete("a", ""), 3, "deleted already");
    let nothing = txn(vec![], vec![op(delete("x", "z")), op(range("a", ""))], vec![]);
    assert_eq!(w.txn(nothing).unwrap().header.unwrap().revision, 3);
    let four =
        txn(vec![], vec![op(put("a", "")), op(put("b", "")), op(txn(vec![], vec![op(put("c", ""))], vec![]))], vec![]);
    assert_eq!(w.txn(four).unwrap().header.unwrap().revision, 4);
    w.compact(3);
    w.clean();
    assert_eq!(w.store.revision(), 4);
}

// KV-3, KV-47
#[test]
fn changes_of_one_write_are_numbered_in_execution_order() {
    let mut w = World::new();
    w.put("b", "");
    w.put("a", "");
    let nested = txn(vec![], vec![op(put("n", ""))], vec![]);
    let req = txn(vec![], vec![op(put("z", "")), op(delete("a", "c")), op(nested), op(put("c", ""))], vec![]);
    w.store.txn(&req, &mut w.leases).unwrap();
    let changes = w.commit();
    let order: Vec<_> = changes.iter().map(|c| (c.revision.sub, &c.key[..], c.delete)).collect();
    let want: [(i64, &[u8], bool); 5] =
        [(0, b"z", false), (1, b"a", true), (2, b"b", true), (3, b"n", false), (4, b"c", false)];
    assert_eq!(order, want);
    assert!(changes.iter().all(|c| c.revision.main == 4));
}

// KV-4, KV-5
#[test]
fn version_counts_puts_since_creation() {
    let mut w = World::new();
    w.put("a", "same");
    w.put("a", "same");
    assert_eq!(w.kvs(&range("a", "")), [kv("a", "same", 2, 3, 2, 0)]);
    w.delete("a", "");
    w.put("a", "new");
    assert_eq!(w.kvs(&range("a", "")), [kv("a", "new", 5, 5, 1, 0)]);
}

// KV-6, KV-43
#[test]
fn failed_requests_leave_no_trace() {
    let mut w = World::with_leases(&[1]);
    w.store.put(&put_leased("a", "1", 1), &mut w.leases).unwrap();
    w.commit();
    let before = (w.leases.clone(), w.store.sizes());
    let unknown = w.store.put(&put_leased("a", "2", 9), &mut w.leases);
    assert!(matches!(unknown, Err(Error::LeaseNotFound)));
    // The lease is looked at before the key.
    let both = PutRequest { ignore_value: true, ..put_leased("absent", "", 9) };
    assert!(matches!(w.store.put(&both, &mut w.leases), Err(Error::LeaseNotFound)));
    let absent = PutRequest { ignore_lease: true, ..put("absent", "") };
    assert!(matches!(w.store.put(&absent, &mut w.leases), Err(Error::KeyNotFound)));
    let (batch, changes) = w.store.take_batch();
    assert!(batch.is_empty() && changes.is_empty());
    assert_eq!((w.leases.clone(), w.store.sizes()), before);
    assert_eq!(w.put("b", ""), 3);
}

// KV-7, KV-13, KV-14
#[test]
fn pinned_read_shows_the_state_after_its_revision() {
    let mut w = World::new();
    w.put("a", "1");
    w.txn(txn(vec![], vec![op(put("a", "2")), op(put("b", "2"))], vec![])).unwrap();
    w.delete("a", "");
    let answer = w.range(&at("\0", "\0", 3)).unwrap();
    assert_eq!(answer.header.unwrap().revision, 4);
    assert_eq!(answer.kvs.iter().map(flat).collect::<Vec<_>>(), [kv("a", "2", 2, 3, 2, 0), kv("b", "2", 3, 3, 1, 0)]);
    assert_eq!(w.kvs(&at("\0", "\0", 2)), [kv("a", "1", 2, 2, 1, 0)]);
    assert_eq!(w.kvs(&at("\0", "\0", -3)), [kv("b", "2", 3, 3, 1, 0)], "a negative revision is the present");
    assert!(matches!(w.range(&at("a", "", 5)), Err(Error::FutureRev)));
}

// KV-8, KV-11, KV-19
#[test]
fn ranges_address_keys_bytewise() {
    let mut w = World::new();
    for key in ["a", "a\0", "b", "\0"] {
        w.put(key, "");
    }
    let keys = |req: RangeRequest| -> Vec<String> { w.kvs(&req).into_iter().map(|kv| kv.0).collect() };
    assert_eq!(keys(range("a", "")), ["a"]);
    assert_eq!(keys(range("a", "b")), ["a", "a\0"]);
    assert_eq!(keys(range("a\0", "\0")), ["a\0", "b"]);
    assert_eq!(keys(range("\0", "\0")), ["\0", "a", "a\0", "b"]);
    for (key, end) in [("b", "a"), ("b", "b"), ("absent", "")] {
        let answer = w.range(&range(key, end)).unwrap();
        assert_eq!((answer.count, answer.kvs.len()), (0, 0), "{key} {end}");
    }
    assert_eq!(w.range(&range("a", "")).unwrap().count, 1);
}

// KV-15, KV-16, KV-17, KV-18, KV-20
#[test]
fn limit_and_filters_leave_the_count_alone() {
    let mut w = World::new();
    for key in ["a", "b", "c", "d", "e"] {
        w.put(key, "");
    }
    let shape = |req: RangeRequest| {
        let answer = w.range(&req).unwrap();
        (answer.kvs.len(), answer.more, answer.count)
    };
    let all = range("a", "z");
    assert_eq!(shape(RangeRequest { limit: 2, ..all.clone() }), (2, true, 5));
    assert_eq!(shape(RangeRequest { limit: 5, ..all.clone() }), (5, false, 5));
    assert_eq!(shape(RangeRequest { limit: -1, ..all.clone() }), (5, false, 5));
    assert_eq!(shape(RangeRequest { min_mod_revision: 6, ..all.clone() }), (1, false, 5));
    assert_eq!(shape(RangeRequest { max_create_revision: 4, limit: 2, ..all.clone() }), (2, true, 5));
    assert_eq!(shape(RangeRequest { max_create_revision: 3, limit: 2, ..all.clone() }), (2, false, 5));
    assert_eq!(shape(RangeRequest { count_only: true, limit: 2, min_mod_revision: 6, ..all }), (0, false, 5));
}

// KV-21, KV-22
#[test]
fn unordered_sort_looks_only_at_limit_and_one() {
    let mut w = World::new();
    for (key, value) in [("a", "3"), ("b", "2"), ("c", "1"), ("d", "0")] {
        w.put(key, value);
    }
    let first = |order: i32, target: i32| {
        let req = RangeRequest { sort_order: order, sort_target: target, limit: 1, ..range("a", "z") };
        let answer = w.range(&req).unwrap();
        assert!(answer.more);
        flat(&answer.kvs[0]).0
    };
    assert_eq!(first(1, 4), "d", "ascending by value over all");
    assert_eq!(first(0, 4), "b", "no order: over the first two keys");
    assert_eq!(first(2, 3), "d", "descending by mod revision");
    assert_eq!(first(2, 0), "d", "descending by key");
    assert_eq!(first(1, 2), "a", "ascending by create revision");
}

// KV-24, KV-25
#[test]
fn keys_only_leaves_out_the_lease_unless_sorted_by_value() {
    let mut w = World::with_leases(&[5]);
    w.store.put(&put_leased("a", "value", 5), &mut w.leases).unwrap();
    w.commit();
    let keys_only = RangeRequest { keys_only: true, ..range("a", "z") };
    assert_eq!(w.kvs(&keys_only), [kv("a", "", 2, 2, 1, 0)]);
    assert_eq!(w.kvs(&RangeRequest { sort_target: 4, ..keys_only }), [kv("a", "", 2, 2, 1, 5)]);
    let single = RangeRequest { keys_only: true, ..range("a", "") };
    assert_eq!(w.kvs(&single), [kv("a", "", 2, 2, 1, 0)]);
    assert_eq!(w.kvs(&RangeRequest { sort_target: 4, ..single }), [kv("a", "", 2, 2, 1, 5)]);
}

// KV-29, KV-32 to KV-36
#[test]
fn chunks_add_up_to_the_answer_of_the_beginning() {
    let mut w = World::new();
    for i in 0..200 {
        w.put(&format!("k{i:03}"), "v");
    }
    for req in [
        range("k", "l"),
        RangeRequest { limit: 150, ..range("k", "l") },
        RangeRequest { limit: 200, ..range("k", "l") },
        RangeRequest { keys_only: true, limit: 7, ..range("k", "l") },
        RangeRequest { count_only: true, ..range("k", "l") },
        range("k005", ""),
        range("x", "z"),
        at("k", "l", 100),
    ] {
        let whole = w.range(&req).unwrap();
        let mut cursor = RangeCursor::new(&w.store.view(), &*w.storage, &req).unwrap();
        let mut kvs = Vec::new();
        let last = loop {
            let chunk = cursor.next_chunk(&w.store.view(), &*w.storage, 64, 1 << 20).unwrap();
            kvs.extend(chunk.kvs.iter().cloned());
            if cursor.is_done() {
                break chunk;
            }
            assert_eq!((chunk.header, chunk.more, chunk.count), (None, false, 0));
            // Later writes show in neither data nor header.
            w.put("k0000", "late");
            w.delete("k199", "");
        };
        assert_eq!(RangeResponse { kvs, ..last }, whole, "{req:?}");
        w.delete("k0000", "");
        w.put("k199", "v");
    }
}

// KV-37
#[test]
fn chunked_read_fails_once_its_revision_is_compacted() {
    let mut w = World::new();
    for key in ["a", "b", "c"] {
        w.put(key, "");
    }
    let mut cursor = RangeCursor::new(&w.store.view(), &*w.storage, &range("a", "z")).unwrap();
    cursor.next_chunk(&w.store.view(), &*w.storage, 1, 1).unwrap();
    w.compact(4);
    cursor.next_chunk(&w.store.view(), &*w.storage, 1, 1).unwrap();
    w.put("a", "");
    w.compact(5);
    let next = cursor.next_chunk(&w.store.view(), &*w.storage, 1, 1);
    assert!(matches!(next, Err(Error::Compacted)));
}

// KV-40, KV-41
#[test]
fn put_keeps_what_it_is_told_to_keep() {
    let mut w = World::with_leases(&[1, 2]);
    let first = PutRequest { prev_kv: true, ..put_leased("a", "1", 1) };
    assert_eq!(w.store.put(&first, &mut w.leases).unwrap().prev_kv, None);
    let second = PutRequest { prev_kv: true, ignore_value: true, ..put_leased("a", "", 2) };
    // The row of the first is still in the batch in hand.
    let prev = w.store.put(&second, &mut w.leases).unwrap().prev_kv.unwrap();
    assert_eq!(flat(&prev), kv("a", "1", 2, 2, 1, 1));
    let third = PutRequest { ignore_lease: true, ..put("a", "3") };
    assert_eq!(w.store.put(&third, &mut w.leases).unwrap().prev_kv, None, "not asked for");
    w.commit();
    assert_eq!(w.kvs(&range("a", "")), [kv("a", "3", 2, 4, 3, 2)]);
}

// KV-42, KV-47, L-30
#[test]
fn key_follows_the_lease_of_its_newest_put() {
    let mut w = World::with_leases(&[1, 2]);
    let mut lease_after = |req: Option<PutRequest>| {
        match req {
            Some(req) => drop(w.store.put(&req, &mut w.leases).unwrap()),
            None => drop(w.store.delete_range(&delete("a", ""), &mut w.leases).unwrap()),
        }
        w.commit();
        let live = w.leases.attached.clone();
        w.reopen();
        assert_eq!(w.leases.attached, live, "L-29");
        live.get(&b"a"[..]).copied().unwrap_or(0)
    };
    assert_eq!(lease_after(Some(put_leased("a", "", 1))), 1);
    assert_eq!(lease_after(Some(put_leased("a", "", 2))), 2);
    assert_eq!(lease_after(Some(PutRequest { ignore_lease: true, ..put("a", "") })), 2);
    assert_eq!(lease_after(Some(PutRequest { ignore_value: true, ..put("a", "") })), 0);
    assert_eq!(lease_after(Some(put_leased("a", "", 1))), 1);
    assert_eq!(lease_after(None), 0);
    assert_eq!(lease_after(Some(put("a", ""))), 0);
}

// KV-46
#[test]
fn delete_range_returns_what_it_removed() {
    let mut w = World::new();
    w.put("b", "2");
    w.put("a", "1");
    let req = DeleteRangeRequest { prev_kv: true, ..delete("a", "\0") };
    let answer = w.store.delete_range(&req, &mut w.leases).unwrap();
    assert_eq!((answer.deleted, answer.header.unwrap().revision), (2, 4));
    let kvs: Vec<_> = answer.prev_kvs.iter().map(flat).collect();
    assert_eq!(kvs, [kv("a", "1", 3, 3, 1, 0), kv("b", "2", 2, 2, 1, 0)]);
}

// KV-50 to KV-54
#[test]
fn compares_judge_absent_keys_as_zero() {
    let mut w = World::with_leases(&[7]);
    w.store.put(&put_leased("a", "m", 7), &mut w.leases).unwrap();
    w.put("b", "n");
    let (equal, greater, less, not_equal) = (0, 1, 2, 3);
    for (holds, compare) in [
        (true, compare("a", "", equal, Version(1))),
        (true, compare("a", "", equal, CreateRevision(2))),
        (true, compare("a", "", less, ModRevision(3))),
        (true, compare("a", "", greater, Value("l".into()))),
        (true, compare("a", "", equal, Lease(7))),
        (false, compare("a", "", not_equal, Lease(7))),
        (true, compare("x", "", equal, Version(0))),
        (true, compare("x", "", equal, Lease(0))),
        (true, compare("x", "", less, ModRevision(1))),
        (false, compare("x", "", equal, Value(Bytes::new()))),
        (false, compare("x", "", not_equal, Value("m".into()))),
        (true, compare("a", "c", greater, Value("l".into()))),
        (false, compare("a", "c", greater, Value("m".into()))),
        (true, compare("b", "\0", equal, CreateRevision(3))),
        (true, compare("x", "z", equal, Version(0))),
        (false, compare("c", "a", not_equal, Value("".into()))),
        (true, compare("a", "", 9, Version(100))),
        // The target is not the one of the value given: compared with 0.
        (false, Compare { target: 0, ..compare("a", "", equal, ModRevision(1)) }),
        (true, Compare { target_union: None, ..compare("x", "", equal, Version(5)) }),
        (false, Compare { target_union: None, ..compare("a", "", equal, Value("".into())) }),
    ] {
        let answer = w.txn(txn(vec![compare.clone()], vec![], vec![])).unwrap();
        assert_eq!(answer.succeeded, holds, "{compare:?}");
    }
    let (yes, no) = (compare("a", "", equal, Version(1)), compare("a", "", equal, Version(2)));
    assert!(!w.txn(txn(vec![yes, no], vec![], vec![])).unwrap().succeeded, "KV-49");
}

// KV-55, KV-56
#[test]
fn compares_see_the_state_before_and_ranges_what_came_before_them() {
    let mut w = World::new();
    let nested = txn(vec![compare("k", "", 0, Version(0))], vec![op(range("k", ""))], vec![]);
    let answer = w.txn(txn(vec![], vec![op(range("k", "")), op(put("k", "1")), op(nested)], vec![])).unwrap();
    assert_eq!(ranged(&answer.responses[0]).count, 0);
    let Some(Response::ResponseTxn(nested)) = &answer.responses[2].response else { panic!() };
    assert!(nested.succeeded);
    assert_eq!(flat(&ranged(&nested.responses[0]).kvs[0]), kv("k", "1", 2, 2, 1, 0));
}

// KV-57
#[test]
fn pinned_ranges_of_a_txn_must_be_readable_before_it() {
    let mut w = World::new();
    w.put("a", "1");
    let with = |w: &mut World, revision| w.txn(txn(vec![], vec![op(put("b", "")), op(at("a", "", revision))], vec![]));
    assert!(matches!(with(&mut w, 3), Err(Error::FutureRev)), "not even its own revision");
    assert!(matches!(with(&mut w, -5), Err(Error::Compacted)));
    assert_eq!(w.store.revision(), 2);
    assert!(with(&mut w, -1).is_ok());
    assert!(with(&mut w, 2).is_ok());
    w.compact(3);
    assert!(matches!(with(&mut w, -1), Err(Error::Compacted)));
    assert!(matches!(with(&mut w, 2), Err(Error::Compacted)));
    assert!(with(&mut w, 3).is_ok());
}

// KV-58, KV-59, H-12, H-21
#[test]
fn txn_that_cannot_finish_does_not_begin() {
    let mut w = World::with_leases(&[1]);
    w.put("a", "1");
    w.put("a", "2");
    w.compact(3);
    let before = (w.store.sizes(), w.leases.clone());
    let keep_value = |key: &str| PutRequest { ignore_value: true, ..put(key, "") };
    let bad = [
        (op(put_leased("z", "", 9)), "requested lease not found"),
        (op(keep_value("new")), "key not found"),
        (op(at("a", "", 2)), "mvcc: required revision has been compacted"),
        (op(at("a", "", 4)), "mvcc: required revision is a future revision"),
    ];
    for (bad, reason) in bad {
        // An earlier op creates the key that the bad one would need; that does not help (KV-59).
        let start = vec![op(put_leased("new", "", 1)), op(delete("a", ""))];
        let nested =
            txn(vec![compare("a", "", 0, Version(9))], vec![], vec![op(txn(vec![], vec![bad.clone()], vec![]))]);
        for last in [bad.clone(), op(nested)] {
            let req = txn(vec![], [start.clone(), vec![last]].concat(), vec![]);
            let err = w.store.txn(&req, &mut w.leases).unwrap_err();
            assert_eq!(err.to_string(), reason);
            let (batch, changes) = w.store.take_batch();
            assert!(batch.is_empty() && changes.is_empty());
            assert_eq!((w.store.sizes(), w.leases.clone()), before);
        }
        let skipped = txn(vec![], vec![], vec![bad]);
        assert!(w.txn(skipped).is_ok(), "the branch not taken is not checked");
    }
    assert_eq!(w.kvs(&range("\0", "\0")), [kv("a", "2", 2, 3, 2, 0)]);
}

// KV-65
#[test]
fn from_key_delete_and_put_run_in_list_order() {
    let mut w = World::new();
    w.put("a", "1");
    w.store.txn(&txn(vec![], vec![op(delete("a", "\0")), op(put("a", "2"))], vec![]), &mut w.leases).unwrap();
    let changes = w.commit();
    assert_eq!(w.kvs(&range("a", "")), [kv("a", "2", 3, 3, 1, 0)]);
    // W-23: the state at mod revision - 1; a creation has none.
    assert_eq!(changes[0].prev, Some(Revision::new(2, 0)));
    assert_eq!(changes[1].prev, None);
    w.store.txn(&txn(vec![], vec![op(put("b", "1")), op(delete("b", "\0"))], vec![]), &mut w.leases).unwrap();
    let changes = w.commit();
    assert_eq!((changes[0].prev, changes[1].prev), (None, None));
}

// KV-41, KV-58, KV-65: what etcd's own check misses ends etcd's process; here it is an absent key like any other.
#[test]
fn put_that_keeps_what_its_txn_deletes_before_it_finds_no_key() {
    let keep_value = || op(PutRequest { ignore_value: true, ..put("b", "") });
    let keep_lease = || op(PutRequest { ignore_lease: true, ..put("b", "") });
    let nested = |ops| op(txn(vec![], ops, vec![op(delete("b", ""))]));
    for delete in [delete("b", "\0"), delete("a", "c"), delete("b", "")] {
        let first = || op(delete.clone());
        for keep in [keep_value, keep_lease] {
            let refused = [
                vec![first(), keep()],
                vec![nested(vec![first()]), keep()],
                vec![first(), nested(vec![keep()])],
                vec![nested(vec![nested(vec![first()])]), nested(vec![keep()])],
            ];
            for ops in refused {
                let mut w = World::with_leases(&[1]);
                w.store.put(&put_leased("b", "1", 1), &mut w.leases).unwrap();
                w.commit();
                let before = (w.store.sizes(), w.store.revision(), w.leases.clone());
                let err = w.store.txn(&txn(vec![], ops, vec![]), &mut w.leases).unwrap_err();
                assert_eq!(err.to_string(), "key not found");
                let (batch, changes) = w.store.take_batch();
                assert!(batch.is_empty() && changes.is_empty());
                assert_eq!((w.store.sizes(), w.store.revision(), w.leases.clone()), before);
            }
        }
    }

    // A delete that comes later, in a branch not taken, or elsewhere is in nobody's way.
    for ops in [
        vec![keep_value(), op(delete("b", "\0"))],
        vec![nested(vec![]), keep_value()],
        vec![op(delete("b\0", "\0")), keep_value()],
    ] {
        let mut w = World::new();
        w.put("b", "1");
        w.store.txn(&txn(vec![], ops, vec![]), &mut w.leases).unwrap();
    }
}

// KV-67, KV-68
#[test]
fn only_flat_ranges_are_read_only() {
    let ranges = || vec![op(range("a", ""))];
    assert!(is_read_only(&txn(vec![], ranges(), ranges())));
    assert!(is_read_only(&txn(vec![compare("a", "", 0, Version(0))], vec![], vec![])));
    assert!(!is_read_only(&txn(vec![], ranges(), vec![op(put("a", ""))])));
    assert!(!is_read_only(&txn(vec![], vec![op(txn(vec![], ranges(), vec![]))], vec![])));

    let mut w = World::new();
    w.put("a", "1");
    let req = txn(vec![compare("a", "", 0, Value("1".into()))], vec![op(range("a", "")), op(at("a", "", -1))], vec![]);
    let (answer, looks) = txn_read_only(&w.store.view(), &*w.storage, &req).unwrap();
    assert_eq!(looks, 3);
    assert_eq!((answer.succeeded, answer.header.unwrap().revision, answer.responses.len()), (true, 2, 2));
    assert_eq!(header_revision(&answer.responses[0]), 2);
    let future = txn(vec![], vec![op(at("a", "", 3))], vec![]);
    assert!(matches!(txn_read_only(&w.store.view(), &*w.storage, &future), Err(Error::FutureRev)));
}

#[test]
fn operations_are_counted_as_etcd_counts_them() {
    let mut w = World::with_leases(&[1]);
    let mut counted = |act: &dyn Fn(&mut World)| {
        act(&mut w);
        let tally = w.store.take_tally();
        (tally.ranges, tally.puts, tally.deletes, tally.txns)
    };
    let run = |w: &mut World, req: PutRequest| _ = w.store.put(&req, &mut w.leases);
    assert_eq!(counted(&|w| run(w, put("a", "1"))), (0, 1, 0, 0));
    assert_eq!(counted(&|w| run(w, PutRequest { prev_kv: true, ..put("a", "1") })), (1, 1, 0, 1));
    assert_eq!(counted(&|w| run(w, PutRequest { ignore_value: true, ..put("a", "") })), (1, 1, 0, 1));
    assert_eq!(counted(&|w| run(w, PutRequest { ignore_value: true, ..put("no", "") })), (1, 0, 0, 0));
    // A compare that fails, and three operations.
    let ops = vec![op(put("a", "6")), op(range("a", "")), op(delete("none", ""))];
    let req = txn(vec![compare("a", "", 0, Version(9)), compare("a", "", 0, Version(1))], vec![], ops);
    assert_eq!(counted(&|w| _ = w.txn(req.clone()).unwrap()), (2, 1, 1, 1));
    // Both halves of it have more than one: two compares, and a put that is looked up before and while it runs.
    let holds = || compare("a", "", 0, Version(4));
    let keep = op(PutRequest { ignore_value: true, ..put("a", "") });
    let req = txn(vec![holds(), holds()], vec![op(txn(vec![holds()], vec![keep], vec![]))], vec![]);
    assert_eq!(counted(&|w| _ = w.txn(req.clone()).unwrap()), (3 + 1 + 1, 1, 0, 2));
    let delete = DeleteRangeRequest { prev_kv: true, ..delete("a", "\0") };
    assert_eq!(counted(&|w| _ = w.store.delete_range(&delete, &mut w.leases)), (1, 0, 1, 1));
}

#[test]
fn read_beyond_its_bounds_is_given_up_before_a_row_is_read() {
    let mut w = World::new();
    for key in ["a", "b", "c", "d"] {
        w.put(key, "value");
    }
    // Row key and record.
    let row = 17 + w.range(&range("a", "")).unwrap().kvs[0].0.len();
    let view = w.store.view();
    let all = range("a", "\0");
    let sorted = RangeRequest { sort_order: 2, limit: 1, ..all.clone() };
    let keys_only = RangeRequest { keys_only: true, ..all.clone() };
    let limited = RangeRequest { limit: 3, ..all.clone() };
    let filtered = RangeRequest { min_mod_revision: 5, ..all.clone() };
    let none = RangeRequest { count_only: true, ..all.clone() };
    let short = |req: &RangeRequest, keys, bytes| {
        let bounds = Bounds { keys, bytes };
        let once = txn(vec![], vec![op(req.clone())], vec![]);
        let twice = txn(vec![], vec![op(req.clone()), op(req.clone())], vec![]);
        let in_txn = |txn| txn_read_only_within(&view, &*w.storage, bounds, txn);
        match range_within(&view, &*w.storage, bounds, req) {
            Ok(found) => {
                assert_eq!(found, read(&view, &*w.storage, req).unwrap());
                assert!(in_txn(&once).is_ok());
                assert!(in_txn(&twice).is_err() || req.count_only, "all ranges of a transaction share the bounds");
                true
            }
            Err(Error::TooLong) => !matches!(in_txn(&once), Err(Error::TooLong)),
            Err(e) => panic!("{e}"),
        }
    };
    for (req, keys, bytes) in [
        (&all, 4, 4 * row),
        (&sorted, 4, 4 * row),
        // The key beyond the limit is not read.
        (&limited, 3, 3 * row),
        (&filtered, 4, row),
    ] {
        assert!(short(req, keys, bytes), "{req:?}");
        assert!(!short(req, keys - 1, bytes) && !short(req, keys, bytes - 1), "{req:?}");
    }
    assert!(short(&keys_only, 4, 4 * row + 100) && !short(&keys_only, 3, 4 * row + 100));
    assert!(short(&none, 0, 0));
    let compare = txn(vec![compare("a", "\0", 0, Version(1))], vec![], vec![]);
    let within = |keys| txn_read_only_within(&view, &*w.storage, Bounds { keys, bytes: 0 }, &compare);
    assert!(within(4).is_ok() && matches!(within(3), Err(Error::TooLong)));
    assert!(weight(&view, &all) >= 4 * row && weight(&view, &none) == 0);
}

// KV-69, KV-70
#[test]
fn answers_inside_a_txn_carry_the_revision_of_their_moment() {
    let mut w = World::new();
    w.put("a", "1");
    let nested = txn(vec![], vec![op(range("a", "")), op(delete("absent", ""))], vec![]);
    let ops = vec![
        op(range("a", "")),
        op(delete("absent", "")),
        op(nested.clone()),
        op(put("b", "")),
        op(range("a", "")),
        op(at("a", "", 2)),
        op(delete("absent", "")),
        op(delete("a", "")),
        op(nested),
    ];
    let answer = w.txn(txn(vec![], ops, vec![])).unwrap();
    assert_eq!(answer.header.unwrap().revision, 3);
    let revisions: Vec<_> = answer.responses.iter().map(header_revision).collect();
    assert_eq!(revisions, [2, 2, 0, 3, 3, 3, 3, 3, 0]);
    for (place, want) in [(2, 2), (8, 3)] {
        let Some(Response::ResponseTxn(nested)) = &answer.responses[place].response else { panic!() };
        assert_eq!(nested.responses.iter().map(header_revision).collect::<Vec<_>>(), [want, want]);
    }
}

// KV-75, KV-76, KV-77, KV-87
#[test]
fn compact_accepts_only_new_readable_revisions() {
    let mut w = World::new();
    assert!(matches!(w.store.compact(-1), Err(Error::Compacted)));
    assert!(w.store.compact(0).is_ok());
    assert!(matches!(w.store.compact(0), Err(Error::Compacted)));
    for value in ["1", "2", "3"] {
        w.put("a", value);
    }
    assert!(matches!(w.store.compact(5), Err(Error::FutureRev)));
    assert!(w.store.compact(3).is_ok());
    assert!(matches!(w.store.compact(3), Err(Error::Compacted)));
    w.commit();
    assert!(w.store.is_cleaning(), "the effect does not wait for clean-up");
    for _ in 0..2 {
        assert!(matches!(w.range(&at("a", "", 2)), Err(Error::Compacted)));
        assert_eq!(w.kvs(&at("a", "", 3)), [kv("a", "2", 2, 3, 2, 0)]);
        w.clean();
    }
    assert!(w.store.compact(4).is_ok(), "up to the present");
}

// KV-79, KV-80, KV-85
#[test]
fn clean_up_leaves_what_is_readable_and_counts_the_rest_off() {
    let mut w = World::new();
    let empty = w.store.sizes().total;
    w.put("kept", "1"); // 2
    w.put("old", "1"); // 3
    w.put("old", "2"); // 4
    w.put("gone", "1"); // 5
    w.delete("gone", ""); // 6
    w.put("edge", "1"); // 7
    w.delete("edge", ""); // 8
    w.put("old", "3"); // 9
    w.compact(8);
    w.clean();
    let rows = |w: &World| -> Vec<i64> {
        w.storage.rows(Bucket::Key).iter().map(|(k, _)| Revision::from_row_key(k).unwrap().0.main).collect()
    };
    assert_eq!(rows(&w), [2, 4, 8, 9]);
    assert_eq!(w.history(8), ["-edge@8", "old@9"]);
    w.compact(9);
    w.clean();
    assert_eq!(rows(&w), [2, 9]);
    w.delete("kept", "\0");
    w.compact(10);
    w.put("x", "");
    w.delete("x", "");
    w.compact(12);
    w.clean();
    assert_eq!(rows(&w), [12], "the tombstone at the compact revision");
    let row = w.storage.rows(Bucket::Key).remove(0);
    assert_eq!(w.store.sizes().total, empty + (row.0.len() + row.1.len()) as u64 + 16);
    assert_eq!(w.store.sizes().in_use, w.store.sizes().total);
}

// KV-82
#[test]
fn interrupted_clean_up_goes_on_after_reopening() {
    let mut w = World::new();
    for value in 0..20 {
        w.put(&format!("k{}", value % 5), &value.to_string());
    }
    w.compact(18);
    assert!(!w.store.clean_slice(2));
    w.commit();
    w.reopen();
    assert!(w.store.is_cleaning());
    assert_eq!(w.store.compact_revision(), 18);
    w.clean();
    w.reopen();
    assert!(!w.store.is_cleaning());
    assert_eq!(w.storage.rows(Bucket::Key).len(), 5 + 3);
    let mark = Bytes::from(Revision::new(18, 0).to_row_key(false));
    for name in [SCHEDULED_COMPACT_KEY, FINISHED_COMPACT_KEY] {
        assert_eq!(w.storage.get(Bucket::Meta, name).unwrap(), Some(mark.clone()));
    }
}

// KV-81
#[test]
fn history_begins_at_the_compact_revision() {
    let mut w = World::new();
    for value in ["1", "2", "3"] {
        w.put("a", value);
    }
    w.compact(3);
    assert_eq!(w.history(3), ["a@3", "a@4"]);
    let view = w.store.view();
    let below = replay::changes(&view, &*w.storage, KeyRange::ALL, 2, 4, NO_LIMIT);
    assert!(matches!(below, Err(Error::Compacted)));
}

// W-27
#[test]
fn history_never_splits_a_revision() {
    let mut w = World::new();
    w.put("z", "");
    w.txn(txn(vec![], (0..9).map(|i| op(put(&format!("k{i}"), "value"))).collect(), vec![])).unwrap();
    w.put("z", "");
    let view = w.store.view();
    for limit in [Limit { changes: 2, bytes: 1000 }, Limit { changes: 1000, bytes: 20 }] {
        let mut sizes = Vec::new();
        let mut from = 2;
        while from <= view.revision {
            let piece = replay::changes(&view, &*w.storage, KeyRange::ALL, from, view.revision, limit).unwrap();
            sizes.push(piece.changes.len());
            from = piece.next;
        }
        assert_eq!(sizes, [10, 1], "{limit:?}");
    }
    let none = replay::changes(&view, &*w.storage, KeyRange::new(b"q", b""), 2, view.revision, NO_LIMIT).unwrap();
    assert_eq!((none.changes.len(), none.next), (0, view.revision + 1));
}

// H-7
#[test]
fn rows_are_seen_once_across_the_commit_of_their_batch() {
    let mut w = World::new();
    w.put("a", "1");
    let puts = |v: &str| txn(vec![], vec![op(put("a", v)), op(put("b", v)), op(range("\0", "\0"))], vec![]);
    for value in ["2", "3"] {
        // Two batches handed over, none of them committed: the writer reads both from memory.
        let answer = w.store.txn(&puts(value), &mut w.leases).unwrap();
        assert_eq!(ranged(&answer.responses[2]).kvs.len(), 2);
    }
    let (first, _) = w.store.take_batch();
    let answer = w.store.txn(&puts("4"), &mut w.leases).unwrap();
    assert_eq!(ranged(&answer.responses[2]).kvs.len(), 2);
    w.storage.commit(first).unwrap();
    w.store.committed();
    let read =
        w.store.txn(&txn(vec![], vec![op(txn(vec![], vec![op(range("\0", "\0"))], vec![]))], vec![]), &mut w.leases);
    let Some(Response::ResponseTxn(nested)) = &read.unwrap().responses[0].response else { panic!() };
    let kvs: Vec<_> = ranged(&nested.responses[0]).kvs.iter().map(flat).collect();
    assert_eq!(kvs, [kv("a", "4", 2, 5, 4, 0), kv("b", "4", 3, 5, 3, 0)]);
    w.commit();
    assert_eq!(w.history(2), ["a@2", "a@3", "b@3", "a@4", "b@4", "a@5", "b@5"]);
}

// H-9, KV-9
#[test]
fn revision_stays_when_the_newest_rows_are_cleaned_away() {
    let mut w = World::new();
    for (key, value) in [("a", "1"), ("b", "1"), ("c", "1"), ("a", "2"), ("b", "2"), ("c", "2"), ("a", "3")] {
        w.put(key, value);
    }
    for key in ["a", "b", "c"] {
        w.delete(key, "");
    }
    w.compact(11);
    // All rows go, but the process ends before the end of clean-up is noted.
    while !w.store.clean_slice(1) {}
    let (mut batch, _) = w.store.take_batch();
    batch.writes.retain(|(bucket, ..)| *bucket == Bucket::Key);
    w.storage.commit(batch).unwrap();
    w.reopen();
    assert!(w.store.revision() >= 11);
    assert_eq!(w.put("d", ""), 12);
    assert_eq!(w.delete("d", ""), 13);
    w.compact(13);
    w.clean();
    w.put("e", "");
    w.compact(14);
    w.reopen();
    assert_eq!(w.put("f", ""), 15);
}

// KV-9, KV-82: stores written by releases with H-9 have no row left at their compact revision.
#[test]
fn compaction_marks_alone_hold_the_revision() {
    for name in [SCHEDULED_COMPACT_KEY, FINISHED_COMPACT_KEY] {
        let mut w = World::new();
        let mut batch = WriteBatch::default();
        batch.put(Bucket::Meta, name, Revision::new(11, 0).to_row_key(false));
        w.storage.commit(batch).unwrap();
        w.reopen();
        assert_eq!((w.store.revision(), w.store.compact_revision()), (11, 11));
        assert_eq!(w.store.is_cleaning(), name == SCHEDULED_COMPACT_KEY);
        assert_eq!(w.put("a", ""), 12);
    }
}

// H-10
#[test]
fn delete_at_the_compact_revision_is_still_told() {
    let mut w = World::new();
    for value in ["1", "2", "3"] {
        w.put("k", value);
    }
    w.delete("k", "");
    w.put("k", "4");
    w.compact(5);
    assert_eq!(w.history(5), ["-k@5", "k@6"]);
    w.clean();
    assert_eq!(w.history(5), ["-k@5", "k@6"]);
}

// H-13
#[test]
fn tombstone_at_the_compact_revision_survives_resumed_clean_up() {
    let mut w = World::new();
    for key in ["a", "b", "c", "d"] {
        w.put(key, "");
    }
    w.delete("a", "");
    w.compact(6);
    while !w.store.clean_slice(1) {}
    let (mut batch, _) = w.store.take_batch();
    batch.writes.retain(|(bucket, ..)| *bucket == Bucket::Key);
    w.storage.commit(batch).unwrap();
    w.reopen();
    assert!(w.store.is_cleaning());
    w.clean();
    assert_eq!(w.history(6), ["-a@6"]);
    w.reopen();
    assert_eq!(w.history(6), ["-a@6"]);
}

// L-14
#[test]
fn revocation_deletes_all_its_keys_in_one_revision() {
    let mut w = World::with_leases(&[1]);
    for key in ["a", "b"] {
        w.store.put(&put_leased(key, "", 1), &mut w.leases).unwrap();
    }
    let keys: Vec<Bytes> = w.leases.attached.keys().cloned().collect();
    assert_eq!(w.store.delete_keys(&keys, &mut w.leases), 2);
    assert_eq!(w.store.delete_keys(&[], &mut w.leases), 0);
    assert_eq!(w.store.revision(), 4);
    assert!(w.leases.attached.is_empty());
    w.commit();
    assert_eq!(w.history(4), ["-a@4", "-b@4"]);
}

// M-16, H-58
#[test]
fn quota_cost_takes_the_larger_branch_with_nested_puts() {
    assert_eq!(put_cost(&put("key", "value")), 256 + 8);
    let nested = txn(vec![], vec![op(put("a", ""))], vec![op(put("a", "1")), op(put("b", "1"))]);
    let req = txn(vec![], vec![op(put("x", "")), op(nested)], vec![op(delete("x", "\0"))]);
    assert_eq!(txn_cost(&req), 257 + 2 * 258);
    assert_eq!(txn_cost(&txn(vec![], vec![op(range("a", ""))], vec![])), 0);
    let grant = InternalRaftRequest { lease_grant: Some(LeaseGrantRequest::default()), ..Default::default() };
    assert_eq!(quota_cost(&grant), 64);
    assert_eq!(quota_cost(&InternalRaftRequest { put: Some(put("a", "")), ..Default::default() }), 257);
    assert_eq!(quota_cost(&InternalRaftRequest { delete_range: Some(delete("a", "")), ..Default::default() }), 0);
}

#[test]
fn large_range_is_read_back_in_key_order() {
    let mut w = World::new();
    // Revisions far from key order; a gap in the middle so that both ways of fetching are taken.
    for i in 0..300 {
        w.put(&format!("{:03}", (i * 7) % 300), &i.to_string());
        if i % 150 == 149 {
            for _ in 0..400 {
                w.put("elsewhere", "");
            }
        }
    }
    let kvs = w.kvs(&range("0", "9"));
    let want: Vec<String> = (0..300).map(|i| format!("{i:03}")).collect();
    assert_eq!(kvs.iter().map(|kv| kv.0.clone()).collect::<Vec<_>>(), want);
    assert!(kvs.iter().all(|kv| (kv.1.parse::<usize>().unwrap() * 7) % 300 == kv.0.parse::<usize>().unwrap()));
}

#[test]
fn damaged_rows_are_errors() {
    for (key, value) in [(&b"short"[..], &b""[..]), (&[0; 17], b""), (&Revision::new(2, 0).to_row_key(false), b"\xff")]
    {
        let w = World::new();
        let mut batch = WriteBatch::default();
        batch.put(Bucket::Key, Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        w.storage.commit(batch).unwrap();
        let opened = super::Store::open(w.storage.clone(), &mut TestLeases::default());
        assert!(matches!(opened.err(), Some(Error::Storage(_))), "{key:?}");
    }
}
