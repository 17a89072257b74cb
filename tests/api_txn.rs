//! Transactions over a socket, statement by statement (KV-49 to KV-72).

mod common;

use std::path::Path;

use actd::pb::etcdserverpb::{
    Compare, PutRequest, RangeRequest, RequestOp, TxnRequest, TxnResponse, WatchCreateRequest,
    compare::{
        CompareResult::{self, Equal, Greater, Less, NotEqual},
        TargetUnion::{self, CreateRevision, Lease, ModRevision, Value, Version},
    },
};
use common::{
    Client, Server,
    calls::{
        Op, Watching, all, block_on, branch, compare, delete, delete_of, delete_span, etcd, everything, get, keys, put,
        put_of, range_of, records, refusal, span, text, txn_of,
    },
};
use tonic::Code;

const MAX_OPS: usize = 128;

/// A server and a test's calls to it.
fn with_client<F: Future<Output = ()>>(test: impl FnOnce(Client) -> F) {
    let server = Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), &[]);
    block_on(async { test(Client::connect(&server).await).await });
}

fn revision(response: &TxnResponse) -> i64 {
    response.header.expect("a header").revision
}

/// Whether the conditions hold.
async fn holds(c: &mut Client, compare: impl Into<Vec<Compare>>) -> bool {
    c.txn(branch(compare, [], [])).await.expect("a transaction").succeeded
}

fn over(range_end: &'static str, compare: Compare) -> Compare {
    Compare { range_end: range_end.into(), ..compare }
}

#[test]
fn branch_taken_answers_in_order_and_kind() {
    with_client(|mut c| async move {
        c.set("a", "1").await;
        // KV-49
        let request = branch(
            [compare("a", Equal, Version(1)), compare("a", Equal, Value("1".into()))],
            [get("a").op(), put("b", "2").op(), delete("a").op(), all([get("b").op()]).op()],
            [get("other").op()],
        );
        let done = c.txn(request.clone()).await.expect("a transaction");
        assert!(done.succeeded && done.responses.len() == 4);
        assert_eq!(keys(range_of(&done.responses[0])), ["a"]);
        assert!(put_of(&done.responses[1]).prev_kv.is_none());
        assert_eq!(delete_of(&done.responses[2]).deleted, 1);
        assert_eq!(keys(range_of(&txn_of(&done.responses[3]).responses[0])), ["b"]);
        // KV-49: all conditions count.
        let other = c.txn(request).await.expect("a transaction");
        assert!(!other.succeeded && other.responses.len() == 1);
        assert_eq!(range_of(&other.responses[0]).count, 0);
        // KV-49: an empty list of conditions is true, an empty branch is fine.
        let empty = c.txn(TxnRequest::default()).await.expect("a transaction");
        assert!(empty.succeeded && empty.responses.is_empty());
    });
}

#[test]
fn conditions_compare_every_target_with_every_result() {
    with_client(|mut c| async move {
        let lease = c.grant(60).await;
        c.set("other", "").await;
        c.set("k", "m").await;
        c.put(PutRequest { lease, ..put("k", "m") }).await.expect("a put");
        // KV-50: a value below, the same and above the stored one.
        let targets: [[TargetUnion; 3]; 5] = [
            [Version(1), Version(2), Version(3)],
            [CreateRevision(2), CreateRevision(3), CreateRevision(4)],
            [ModRevision(3), ModRevision(4), ModRevision(5)],
            [Value("lzz".into()), Value("m".into()), Value("m\0".into())],
            [Lease(lease - 1), Lease(lease), Lease(lease + 1)],
        ];
        for values in targets {
            let expected: [(CompareResult, [bool; 3]); 4] = [
                (Equal, [false, true, false]),
                (Greater, [true, false, false]),
                (Less, [false, false, true]),
                (NotEqual, [true, false, true]),
            ];
            for (result, expected) in expected {
                for (than, expected) in values.iter().zip(expected) {
                    assert_eq!(
                        holds(&mut c, [compare("k", result, than.clone())]).await,
                        expected,
                        "{result:?} {than:?}"
                    );
                }
            }
        }
    });
}

#[test]
fn missing_keys_compare_as_zero_and_never_by_value() {
    with_client(|mut c| async move {
        // KV-51
        for zero in [Version(0), CreateRevision(0), ModRevision(0), Lease(0)] {
            assert!(holds(&mut c, [compare("absent", Equal, zero.clone())]).await, "{zero:?}");
            assert!(!holds(&mut c, [compare("absent", NotEqual, zero.clone())]).await, "{zero:?}");
        }
        assert!(holds(&mut c, [compare("absent", Less, Version(1))]).await);
        for result in [Equal, Greater, Less, NotEqual] {
            assert!(!holds(&mut c, [compare("absent", result, Value("".into()))]).await, "{result:?}");
        }
        // KV-52: no value in the message is 0 or empty.
        c.set("k", "").await;
        for (target, expected) in [(0, false), (1, false), (2, false), (3, true), (4, true)] {
            let unset = Compare { target, key: "k".into(), ..Default::default() };
            assert_eq!(holds(&mut c, [unset]).await, expected, "target {target}");
        }
        let unset = |target| Compare { target, key: "absent".into(), ..Default::default() };
        assert!(holds(&mut c, [unset(0), unset(1), unset(2), unset(4)]).await);
        // KV-54
        let unknown = Compare { result: 9, ..compare("k", Equal, Version(77)) };
        assert!(holds(&mut c, [unknown]).await);
    });
}

#[test]
fn conditions_on_a_range_are_about_each_of_its_keys() {
    with_client(|mut c| async move {
        for key in ["a1", "a2", "b1", "b1"] {
            c.set(key, "v").await;
        }
        // KV-53
        let version = |result, n| compare("a", result, Version(n));
        let cases = [
            (over("b", version(Equal, 1)), true),
            (over("b2", version(Equal, 1)), false),
            (over("b2", version(Less, 3)), true),
            (over("\0", version(Greater, 0)), true),
            (over("\0", version(Equal, 1)), false),
            (over("b", compare("a", Equal, Value("v".into()))), true),
            (over("b", compare("a", Equal, Value("w".into()))), false),
            // Without keys: as a missing one.
            (over("z", compare("x", Equal, Version(0))), true),
            (over("z", compare("x", Greater, Version(0))), false),
            (over("z", compare("x", NotEqual, Value("v".into()))), false),
            (over("a", compare("b", Equal, Version(0))), true),
        ];
        for (condition, expected) in cases {
            assert_eq!(holds(&mut c, [condition.clone()]).await, expected, "{condition:?}");
        }
    });
}

#[test]
fn conditions_see_the_state_before_and_operations_that_of_their_turn() {
    with_client(|mut c| async move {
        // KV-55
        let nested =
            branch([compare("k", Equal, Version(0))], [put("seen", "before").op()], [put("seen", "after").op()]);
        let done = c.txn(all([put("k", "1").op(), nested.op()])).await.expect("a transaction");
        assert!(txn_of(&done.responses[1]).succeeded);
        assert_eq!(text(&c.record("seen").await.expect("a record").value), "before");
        // KV-56, KV-72
        let with_prev = |key| actd::pb::etcdserverpb::DeleteRangeRequest { prev_kv: true, ..delete(key) };
        let request = all([
            get("new").op(),
            put("new", "1").op(),
            get("new").op(),
            all([delete("k").op()]).op(),
            span("a", "z").op(),
            with_prev("new").op(),
            PutRequest { prev_kv: true, ..put("seen", "2") }.op(),
            with_prev("new").op(),
        ]);
        // KV-62 allows no deletion of a key that the same list puts.
        let duplicate = etcd(Code::InvalidArgument, "duplicate key given in txn request");
        assert_eq!(refusal(c.txn(request.clone()).await), duplicate);
        let mut request = request;
        request.success.remove(7);
        request.success[5] = with_prev("x").op();
        let done = c.txn(request).await.expect("a transaction").responses;
        assert_eq!(range_of(&done[0]).count, 0);
        assert_eq!(keys(range_of(&done[2])), ["new"]);
        assert_eq!(delete_of(&txn_of(&done[3]).responses[0]).deleted, 1);
        assert_eq!(keys(range_of(&done[4])), ["new", "seen"]);
        assert_eq!(delete_of(&done[5]).deleted, 0);
        let before = put_of(&done[6]).prev_kv.as_ref().expect("asked for").decode_record().expect("it decodes");
        assert_eq!(text(&before.value), "before");
        // KV-65: a deletion from a key on, which the overlap check doesn't see, shows what the list put before it.
        let open = actd::pb::etcdserverpb::DeleteRangeRequest { prev_kv: true, ..delete_span("a", "\0") };
        let done = c.txn(all([put("z", "own").op(), open.op()])).await.expect("a transaction").responses;
        let removed: Vec<_> = records(&delete_of(&done[1]).prev_kvs).iter().map(|kv| text(&kv.key)).collect();
        assert_eq!(removed, ["new", "seen", "z"]);
    });
}

#[test]
fn failing_operation_undoes_all_and_the_other_branch_is_not_looked_at() {
    with_client(|mut c| async move {
        for value in ["1", "2", "3"] {
            c.set("a", value).await;
        }
        let pinned = |revision| RangeRequest { revision, ..get("a") }.op();
        let compacted = etcd(Code::OutOfRange, "mvcc: required revision has been compacted");
        let future = etcd(Code::OutOfRange, "mvcc: required revision is a future revision");
        // KV-57: on a store never compacted, -1 is the lowest.
        assert_eq!(refusal(c.txn(all([put("b", "").op(), pinned(-5)])).await), compacted);
        c.txn(all([pinned(-1)])).await.expect("it reads");
        assert_eq!(c.compact(3, false).await.expect("a compaction"), 4);
        // KV-57, KV-58
        let bad_lease = PutRequest { lease: 99, ..put("leased", "") };
        let no_lease = etcd(Code::NotFound, "requested lease not found");
        let no_key = etcd(Code::InvalidArgument, "key not found");
        let cases: [(RequestOp, (Code, String)); 6] = [
            (pinned(5), future.clone()),
            (pinned(2), compacted.clone()),
            (bad_lease.clone().op(), no_lease.clone()),
            (all([bad_lease.op()]).op(), no_lease),
            (PutRequest { ignore_value: true, ..put("absent", "") }.op(), no_key.clone()),
            (all([all([PutRequest { ignore_lease: true, ..put("absent", "") }.op()]).op()]).op(), no_key),
        ];
        for (op, expected) in cases {
            let bad = all([put("b", "1").op(), op.clone()]);
            assert_eq!(refusal(c.txn(bad).await), expected, "{op:?}");
            // KV-6: nothing of it is there.
            assert_eq!((c.revision().await, c.record("b").await), (4, None));
            // KV-58: where it does not run, it does not matter.
            let elsewhere = branch([compare("a", Equal, Version(3))], [get("a").op()], [op.clone()]);
            assert!(c.txn(elsewhere).await.expect("a transaction").succeeded, "{op:?}");
        }
        // A read-only one is refused the same way.
        assert_eq!(refusal(c.txn(all([get("a").op(), pinned(5)])).await), future);
        assert_eq!(refusal(c.txn(all([get("a").op(), pinned(2)])).await), compacted);
    });
}

#[test]
fn both_branches_are_checked_for_shape_at_any_depth() {
    with_client(|mut c| async move {
        let invalid = |text| etcd(Code::InvalidArgument, text);
        // KV-60
        let cases: Vec<(RequestOp, _)> = vec![
            (get("").op(), invalid("key is not provided")),
            (put("", "v").op(), invalid("key is not provided")),
            (delete("").op(), invalid("key is not provided")),
            (branch([compare("", Equal, Version(0))], [], []).op(), invalid("key is not provided")),
            (PutRequest { ignore_value: true, ..put("k", "v") }.op(), invalid("value is provided")),
            (PutRequest { ignore_lease: true, lease: 1, ..put("k", "") }.op(), invalid("lease is provided")),
            (RangeRequest { sort_order: 3, ..get("k") }.op(), invalid("invalid sort option")),
            (RangeRequest { sort_target: 5, ..get("k") }.op(), invalid("invalid sort option")),
            (RequestOp { request: None }, invalid("key not found")),
        ];
        for (op, expected) in cases {
            let requests = [
                branch([], [op.clone()], []),
                branch([], [], [op.clone()]),
                branch([], [], [branch([], [], [op.clone()]).op()]),
                all([put("k2", "").op(), all([all([op.clone()]).op()]).op()]),
            ];
            for request in requests {
                assert_eq!(refusal(c.txn(request.clone()).await), expected, "{request:?}");
            }
        }
        let no_key = branch([compare("", Equal, Version(0))], [], []);
        assert_eq!(refusal(c.txn(no_key).await), invalid("key is not provided"));
        assert_eq!(c.revision().await, 1);
    });
}

#[test]
fn number_of_operations_is_bounded_with_the_remainder_for_nested_ones() {
    with_client(|mut c| async move {
        let gets = |n: usize| vec![get("k").op(); n];
        let conditions = |n: usize| vec![compare("k", Equal, Version(0)); n];
        let too_many = etcd(Code::InvalidArgument, "too many operations in txn request");
        // KV-61
        c.txn(branch(conditions(MAX_OPS), gets(MAX_OPS), gets(MAX_OPS))).await.expect("at the bound");
        let over = [
            branch(conditions(MAX_OPS + 1), [], []),
            branch([], gets(MAX_OPS + 1), []),
            branch([], [], gets(MAX_OPS + 1)),
        ];
        for request in over {
            assert_eq!(refusal(c.txn(request).await), too_many);
        }
        let nested = |n| all([all(gets(n)).op()]);
        c.txn(nested(MAX_OPS - 1)).await.expect("one is taken by the nesting");
        assert_eq!(refusal(c.txn(nested(MAX_OPS)).await), too_many);
        // The longest of the parent's three lists counts.
        let beside = |n| branch(conditions(100), [all(gets(n)).op()], []);
        c.txn(beside(28)).await.expect("at the bound");
        assert_eq!(refusal(c.txn(beside(29)).await), too_many);
        // Checked before keys are looked at.
        let mut both = gets(MAX_OPS + 1);
        both[0] = get("").op();
        assert_eq!(refusal(c.txn(all(both)).await), too_many);
    });
}

#[test]
fn duplicate_keys_are_refused_by_etcds_rules() {
    with_client(|mut c| async move {
        let p = |key| put(key, "").op();
        let d = |key| delete(key).op();
        let ds = |key, end| delete_span(key, end).op();
        let t = |success: Vec<RequestOp>, failure: Vec<RequestOp>| branch([], success, failure).op();
        let refused: Vec<(&str, Vec<RequestOp>)> = vec![
            // KV-62
            ("two puts", vec![p("a"), p("a")]),
            ("put, delete", vec![p("a"), d("a")]),
            ("delete, put", vec![d("a"), p("a")]),
            ("put in a deleted interval", vec![p("b"), ds("a", "c")]),
            ("an interval, then a put at its start", vec![ds("a", "c"), p("a")]),
            // KV-63
            ("put and nested put", vec![p("a"), t(vec![p("a")], vec![])]),
            ("nested put and put", vec![t(vec![], vec![p("a")]), p("a")]),
            ("delete and nested put", vec![d("a"), t(vec![p("a")], vec![])]),
            ("nested put and delete", vec![t(vec![], vec![p("a")]), d("a")]),
            ("nested delete and put", vec![t(vec![d("a")], vec![]), p("a")]),
            ("put and nested interval", vec![p("b"), t(vec![], vec![ds("a", "c")])]),
            ("siblings that put", vec![t(vec![p("a")], vec![]), t(vec![], vec![p("a")])]),
            ("two levels down", vec![p("a"), t(vec![t(vec![p("a")], vec![])], vec![])]),
            // KV-64
            ("sibling deletes, then sibling puts", vec![t(vec![d("a")], vec![]), t(vec![p("a")], vec![])]),
        ];
        let duplicate = etcd(Code::InvalidArgument, "duplicate key given in txn request");
        for (name, ops) in refused {
            assert_eq!(refusal(c.txn(branch([], ops.clone(), [])).await), duplicate, "{name}");
            assert_eq!(refusal(c.txn(branch([], [], ops)).await), duplicate, "{name}, as the failure branch");
        }
        let accepted: Vec<(&str, Vec<RequestOp>)> = vec![
            ("different keys", vec![p("a"), p("b"), d("c")]),
            ("overlapping deletes", vec![d("a"), ds("a", "c"), d("a")]),
            ("range and put", vec![span("a", "c").op(), p("a"), get("a").op()]),
            ("put at an interval's end", vec![ds("a", "c"), p("c")]),
            ("then and else of one", vec![t(vec![p("a")], vec![p("a")])]),
            ("put in then, delete in else", vec![t(vec![p("a")], vec![d("a")])]),
            ("interval without keys", vec![ds("c", "a"), p("b"), p("c")]),
            ("put behind a deleted key", vec![d("a"), p("a\0")]),
            ("three levels", vec![t(vec![t(vec![p("a")], vec![d("a")])], vec![p("a")]), p("b")]),
            ("nested deletes", vec![t(vec![d("a")], vec![ds("a", "c")]), d("a")]),
            // KV-64
            ("sibling puts, then sibling deletes", vec![t(vec![p("a")], vec![]), t(vec![d("a")], vec![])]),
            // KV-65
            ("from a key on", vec![ds("a", "\0"), p("b")]),
            ("put, then from a key on", vec![p("b"), ds("a", "\0")]),
        ];
        for (name, ops) in accepted {
            c.txn(branch([], ops, [])).await.unwrap_or_else(|status| panic!("{name}: {status:?}"));
        }
        // KV-65: in list order.
        c.txn(all([ds("a", "\0"), p("b")])).await.expect("a transaction");
        assert_eq!(keys(&c.range(everything()).await.expect("a read")), ["b"]);
        // KV-66
        c.txn(branch([], [p("a")], [p("a")])).await.expect("two lists");
        // Shape before duplicates, the success list before the failure list.
        let later = branch([], [p("a"), p("a")], [get("").op()]);
        assert_eq!(refusal(c.txn(later).await), etcd(Code::InvalidArgument, "key is not provided"));
    });
}

#[test]
fn revisions_in_answers_follow_what_changed() {
    with_client(|mut c| async move {
        c.set("a", "1").await;
        // KV-67
        let read = c.txn(all([get("a").op()])).await.expect("a transaction");
        assert_eq!((revision(&read), range_of(&read.responses[0]).header.expect("a header").revision), (2, 2));
        // KV-69, KV-70: a deletion of nothing is before any change.
        let op = |response: &TxnResponse, n: usize| match &response.responses[n].response {
            Some(actd::pb::etcdserverpb::response_op::Response::ResponseRange(r)) => r.header.expect("a header"),
            Some(actd::pb::etcdserverpb::response_op::Response::ResponsePut(r)) => r.header.expect("a header"),
            Some(actd::pb::etcdserverpb::response_op::Response::ResponseDeleteRange(r)) => r.header.expect("a header"),
            other => panic!("{other:?}"),
        };
        let none = c.txn(all([delete("x").op(), get("a").op()])).await.expect("a transaction");
        assert_eq!((revision(&none), op(&none, 0).revision, op(&none, 1).revision), (2, 2, 2));
        let nested = all([put("n", "").op()]);
        let request = all([
            get("a").op(),
            delete("x").op(),
            put("b", "").op(),
            get("a").op(),
            delete("a").op(),
            delete("y").op(),
            nested.op(),
            RangeRequest { revision: 2, ..get("a") }.op(),
        ]);
        let done = c.txn(request).await.expect("a transaction");
        assert_eq!(revision(&done), 3);
        let revisions: Vec<_> = [0, 1, 2, 3, 4, 5].map(|n| op(&done, n).revision).into();
        assert_eq!(revisions, [2, 2, 3, 3, 3, 3]);
        // KV-70: only the revision is set in them; a nested answer's is 0, and its own operations have theirs.
        for n in 0..6 {
            let header = op(&done, n);
            assert_eq!((header.cluster_id, header.member_id, header.raft_term), (0, 0, 0));
        }
        let inner = txn_of(&done.responses[6]);
        assert_eq!(inner.header.map_or(0, |header| header.revision), 0);
        assert_eq!(op(inner, 0).revision, 3);
        // A pinned range inside shows its revision's state.
        assert_eq!(records(&range_of(&done.responses[7]).kvs)[0].mod_revision, 2);
    });
}

#[test]
fn transaction_is_seen_whole_or_not_at_all() {
    with_client(|mut c| async move {
        // KV-71, W-27
        let create = WatchCreateRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
        let mut watching = Watching::on(&c, create).await;
        let mut writer = c.clone();
        let writes = async {
            for round in 0..50 {
                let value = format!("{round}");
                let ops: Vec<_> = (0..10).map(|n| put(format!("k{n}"), value.clone()).op()).collect();
                writer.txn(all(ops)).await.expect("a transaction");
            }
        };
        let reads = async {
            for _ in 0..100 {
                let found = records(&c.range(span("k", "l")).await.expect("a read").kvs);
                let first = found.first().map(|kv| (kv.value.clone(), kv.mod_revision));
                assert!(found.iter().all(|kv| Some((kv.value.clone(), kv.mod_revision)) == first), "{found:?}");
            }
        };
        tokio::join!(writes, reads);
        let mut seen = 0;
        while seen < 500 {
            let response = watching.next().await;
            assert_eq!(response.events.len() % 10, 0, "whole revisions");
            seen += response.events.len();
        }
    });
}

#[test]
fn value_to_keep_that_the_same_transaction_deletes_is_of_no_key() {
    if std::env::var_os("ACTD_UNDER_TEST").is_some() {
        return common::left_out("this transaction ends etcd 3.7.1's process, on every member");
    }
    with_client(|mut c| async move {
        let lease = c.grant(60).await;
        c.put(PutRequest { lease, ..put("a", "1") }).await.expect("a put");
        // KV-65 lets the deletion through, and what it takes is not there to be kept.
        let keep = PutRequest { ignore_value: true, ignore_lease: true, ..put("a", "") };
        let refused = refusal(c.txn(all([delete_span("a", "\0").op(), keep.op()])).await);
        assert_eq!(refused, etcd(Code::InvalidArgument, "key not found"));
        let record = c.record("a").await.expect("nothing is applied");
        assert_eq!((text(&record.value), record.lease, record.version), ("1".to_owned(), lease, 1));
    });
}
