//! The KV service over a socket, statement by statement: revisions, ranges, puts, deletes, compaction.
//! Transactions are in `api_txn.rs`.

mod common;

use std::path::Path;

use actd::{
    mvcc::record::KeyValue,
    pb::etcdserverpb::{
        LeaseRevokeRequest, LeaseTimeToLiveRequest, PutRequest, RangeRequest, WatchCreateRequest,
        range_request::{SortOrder, SortTarget},
    },
};
use common::{
    Client, Server,
    calls::{
        Op, PATIENCE, Watching, all, block_on, delete, delete_span, etcd, everything, get, keys, put, records, refusal,
        span, text,
    },
};
use tonic::{Code, Status};

fn start() -> Server {
    Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), &[])
}

/// A server and a test's calls to it.
fn with_client<F: Future<Output = ()>>(test: impl FnOnce(Client) -> F) {
    let server = start();
    block_on(async { test(Client::connect(&server).await).await });
}

fn compacted() -> (Code, String) {
    etcd(Code::OutOfRange, "mvcc: required revision has been compacted")
}

fn future() -> (Code, String) {
    etcd(Code::OutOfRange, "mvcc: required revision is a future revision")
}

fn at(revision: i64, request: RangeRequest) -> RangeRequest {
    RangeRequest { revision, ..request }
}

#[test]
fn revision_counts_effective_writes_and_nothing_else() {
    with_client(|mut c| async move {
        // KV-1
        assert_eq!(c.revision().await, 1);
        assert_eq!(c.set("a", "1").await, 2);
        let first = c.record("a").await.expect("a record");
        assert_eq!((first.create_revision, first.mod_revision, first.version), (2, 2, 1));
        // KV-4, KV-5: the same value again is a write of its own.
        assert_eq!(c.set("a", "1").await, 3);
        let second = c.record("a").await.expect("a record");
        assert_eq!((second.create_revision, second.mod_revision, second.version), (2, 3, 2));
        // KV-2: what changes nothing takes no revision; KV-7: and answers with the current one.
        let none = c.delete(delete("absent")).await.expect("a delete");
        assert_eq!((none.deleted, none.header.expect("a header").revision), (0, 3));
        let lease = c.grant(60).await;
        let empty = c.txn(all([delete("absent").op()])).await.expect("a transaction");
        assert_eq!(empty.header.expect("a header").revision, 3);
        assert_eq!(c.compact(2, false).await.expect("a compaction"), 3);
        c.lease.lease_revoke(LeaseRevokeRequest { id: lease }).await.expect("no keys, no revision");
        assert_eq!(c.revision().await, 3);
        // KV-6: nor does what is refused.
        let refused = PutRequest { lease: 4711, ..put("a", "2") };
        assert_eq!(refusal(c.put(refused).await), etcd(Code::NotFound, "requested lease not found"));
        assert_eq!(c.revision().await, 3);
        // KV-2: any number of changes of one transaction take one.
        let three = c.txn(all([put("x", "").op(), put("y", "").op(), delete("a").op()])).await.expect("applied");
        assert_eq!(three.header.expect("a header").revision, 4);
        // KV-5: created again, counted again.
        assert_eq!(c.set("a", "3").await, 5);
        let again = c.record("a").await.expect("a record");
        assert_eq!((again.create_revision, again.mod_revision, again.version), (5, 5, 1));
    });
}

#[test]
fn headers_name_cluster_member_and_term() {
    with_client(|mut c| async move {
        // G-5: each of them is this member's, and the same on every call.
        let status =
            c.maintenance.status(actd::pb::etcdserverpb::StatusRequest {}).await.expect("a status").into_inner();
        let known = status.header.expect("a header");
        assert!(known.cluster_id != 0 && known.member_id == status.leader && known.raft_term == status.raft_term);
        let written = c.put(put("a", "1")).await.expect("a put").header.expect("a header");
        let read = c.range(get("a")).await.expect("a read").header.expect("a header");
        let deleted = c.delete(delete("b")).await.expect("a delete").header.expect("a header");
        let txn = c.txn(all([get("a").op()])).await.expect("a transaction").header.expect("a header");
        for header in [written, read, deleted, txn] {
            assert_eq!(
                (header.cluster_id, header.member_id, header.raft_term),
                (known.cluster_id, known.member_id, known.raft_term)
            );
            assert_eq!(header.revision, 2);
        }
    });
}

#[test]
fn changes_of_one_revision_come_in_order_of_execution() {
    with_client(|mut c| async move {
        for key in ["c", "a", "b"] {
            c.set(key, "1").await;
        }
        let create = WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
        let mut watching = Watching::on(&c, create).await;
        // KV-3: list order, nested ones in place, keys of one deletion ascending. KV-47: all in one revision.
        let nested = all([put("n2", "").op(), put("n1", "").op()]);
        let request = all([put("z", "").op(), nested.op(), delete_span("a", "d").op(), put("k", "").op()]);
        c.txn(request).await.expect("a transaction");
        let events = watching.events(7).await;
        let order: Vec<_> = events.iter().map(|e| text(&e.kv.as_ref().expect("a record").key)).collect();
        assert_eq!(order, ["z", "n2", "n1", "a", "b", "c", "k"]);
        for event in &events {
            assert_eq!(event.kv.as_ref().expect("a record").mod_revision, 5);
        }
    });
}

#[test]
fn keys_and_values_are_any_bytes() {
    with_client(|mut c| async move {
        // KV-8: compared as unsigned bytes; zero bytes count.
        let given: [&[u8]; 6] = [b"\0", b"\0\0", b"a", b"a\0", b"\x7f", b"\xff\xfe"];
        for key in given.iter().rev() {
            c.set(*key, vec![0u8, 255, 10]).await;
        }
        let found = records(&c.range(everything()).await.expect("a read").kvs);
        let order: Vec<_> = found.iter().map(|kv| kv.key.to_vec()).collect();
        assert_eq!(order, given);
        assert!(found.iter().all(|kv| kv.value == [0u8, 255, 10][..]));
        // KV-8: an empty value is a value.
        c.set("empty", "").await;
        assert_eq!(c.range(get("empty")).await.expect("a read").count, 1);
    });
}

#[test]
fn revision_outlives_restarts_and_deletion() {
    let mut server = start();
    block_on(async {
        let mut c = Client::connect(&server).await;
        for _ in 0..5 {
            c.set("a", "1").await;
        }
        c.delete(delete("a")).await.expect("a delete");
        c.compact(7, true).await.expect("a compaction");
    });
    server.restart();
    block_on(async {
        let mut c = Client::connect(&server).await;
        // KV-9, KV-82
        assert_eq!(c.revision().await, 7);
        assert_eq!(refusal(c.range(at(6, get("a"))).await), compacted());
        assert_eq!(c.set("a", "1").await, 8);
    });
}

#[test]
fn ranges_are_one_key_an_interval_or_all_from_a_key() {
    with_client(|mut c| async move {
        for key in ["a", "b", "b1", "b2", "c", "\u{ff}"] {
            c.set(key, "v").await;
        }
        // KV-11, KV-12
        let cases: [(RangeRequest, &[&str]); 8] = [
            (get("b"), &["b"]),
            (span("b", "c"), &["b", "b1", "b2"]),
            (span("b1", "b2"), &["b1"]),
            (span("b2", "\0"), &["b2", "c", "\u{ff}"]),
            (everything(), &["a", "b", "b1", "b2", "c", "\u{ff}"]),
            (span("c", "b"), &[]),
            (span("b", "b"), &[]),
            (span("x", "y"), &[]),
        ];
        for (request, expected) in cases {
            let found = c.range(request.clone()).await.expect("a read");
            assert_eq!(keys(&found), expected, "{request:?}");
            assert_eq!((found.count, found.more), (expected.len() as i64, false), "{request:?}");
        }
        // KV-19
        let absent = c.range(get("nothing")).await.expect("absence is no error");
        assert_eq!((absent.count, absent.kvs.len(), absent.more), (0, 0, false));
    });
}

#[test]
fn invalid_ranges_are_refused_with_etcds_words() {
    with_client(|mut c| async move {
        // KV-10
        let empty = etcd(Code::InvalidArgument, "key is not provided");
        assert_eq!(refusal(c.range(get("")).await), empty);
        assert_eq!(refusal(c.range(span("", "\0")).await), empty);
        assert_eq!(refusal(c.delete(delete_span("", "\0")).await), empty);
        // KV-23, inside a transaction as well
        let bad = etcd(Code::InvalidArgument, "invalid sort option");
        for (sort_order, sort_target) in [(3, 0), (-1, 0), (0, 5), (0, -1)] {
            let request = RangeRequest { sort_order, sort_target, ..get("a") };
            assert_eq!(refusal(c.range(request.clone()).await), bad, "{sort_order} {sort_target}");
            assert_eq!(refusal(c.txn(all([request.op()])).await), bad);
        }
        // KV-13
        assert_eq!(refusal(c.range(at(2, get("a"))).await), future());
        assert_eq!(refusal(c.range(at(i64::MAX, get("a"))).await), future());
        c.range(at(-7, get("a"))).await.expect("negative is now");
    });
}

#[test]
fn limit_count_and_more() {
    with_client(|mut c| async move {
        for key in ["k1", "k2", "k3", "k4", "k5"] {
            c.set(key, "v").await;
        }
        // KV-16, KV-17: limit, keys, more; the count is always of the whole range.
        let cases: [(i64, &[&str], bool); 7] = [
            (0, &["k1", "k2", "k3", "k4", "k5"], false),
            (-3, &["k1", "k2", "k3", "k4", "k5"], false),
            (1, &["k1"], true),
            (2, &["k1", "k2"], true),
            (4, &["k1", "k2", "k3", "k4"], true),
            (5, &["k1", "k2", "k3", "k4", "k5"], false),
            (6, &["k1", "k2", "k3", "k4", "k5"], false),
        ];
        for (limit, expected, more) in cases {
            for sort_order in [SortOrder::None as i32, SortOrder::Ascend as i32] {
                let request = RangeRequest { limit, sort_order, ..span("k", "l") };
                let found = c.range(request).await.expect("a read");
                assert_eq!(keys(&found), expected, "limit {limit}");
                assert_eq!((found.more, found.count), (more, 5), "limit {limit}");
            }
        }
        // KV-18: nothing else matters for a count.
        for limit in [0, 2] {
            let request =
                RangeRequest { limit, count_only: true, min_mod_revision: 4, sort_order: 2, ..span("k", "l") };
            let found = c.range(request).await.expect("a read");
            assert_eq!((found.kvs.len(), found.more, found.count), (0, false, 5));
        }
    });
}

#[test]
fn revision_filters_come_before_the_limit_and_not_before_the_count() {
    with_client(|mut c| async move {
        // Created at 2 3 4 5, changed last at 8 3 6 7.
        for key in ["k1", "k2", "k3", "k4", "k3", "k4", "k1"] {
            c.set(key, "v").await;
        }
        let none = RangeRequest::default();
        // KV-20: inclusive, all of them, 0 is unset.
        let cases: [(RangeRequest, &[&str]); 6] = [
            (RangeRequest { min_mod_revision: 6, ..none.clone() }, &["k1", "k3", "k4"]),
            (RangeRequest { max_mod_revision: 6, ..none.clone() }, &["k2", "k3"]),
            (RangeRequest { min_create_revision: 4, ..none.clone() }, &["k3", "k4"]),
            (RangeRequest { max_create_revision: 3, ..none.clone() }, &["k1", "k2"]),
            (RangeRequest { min_mod_revision: 4, max_create_revision: 3, ..none.clone() }, &["k1"]),
            (RangeRequest { min_mod_revision: 9, ..none.clone() }, &[]),
        ];
        for (filter, expected) in cases {
            let request = RangeRequest { key: "k".into(), range_end: "l".into(), ..filter };
            let found = c.range(request.clone()).await.expect("a read");
            assert_eq!(keys(&found), expected, "{request:?}");
            // KV-17
            assert_eq!((found.count, found.more), (4, false), "{request:?}");
        }
        // KV-20: `more` is about what passes the filter.
        let limited = |limit| RangeRequest { min_mod_revision: 6, limit, ..span("k", "l") };
        let two = c.range(limited(2)).await.expect("a read");
        assert_eq!((keys(&two), two.more, two.count), (vec!["k1".to_owned(), "k3".into()], true, 4));
        assert!(!c.range(limited(3)).await.expect("a read").more);
    });
}

#[test]
fn sorting_is_by_every_target_and_before_the_cut() {
    with_client(|mut c| async move {
        // Versions 3 1 2, created at 2 3 4, changed last at 7 3 5, values z y x.
        for (key, value) in [("a", "-"), ("b", "y"), ("c", "-"), ("c", "x"), ("a", "-"), ("a", "z")] {
            c.set(key, value).await;
        }
        let cases = [
            (SortTarget::Key, ["a", "b", "c"]),
            (SortTarget::Version, ["b", "c", "a"]),
            (SortTarget::Create, ["a", "b", "c"]),
            (SortTarget::Mod, ["b", "c", "a"]),
            (SortTarget::Value, ["c", "b", "a"]),
        ];
        for (target, ascending) in cases {
            let sorted = |sort_order: SortOrder, limit| RangeRequest {
                sort_order: sort_order as i32,
                sort_target: target as i32,
                limit,
                ..everything()
            };
            // KV-21
            let mut descending = ascending;
            descending.reverse();
            for (order, expected) in [(SortOrder::Ascend, ascending), (SortOrder::Descend, descending)] {
                let found = c.range(sorted(order, 0)).await.expect("a read");
                assert_eq!(keys(&found), expected, "{target:?} {order:?}");
                let first = c.range(sorted(order, 1)).await.expect("a read");
                assert_eq!((keys(&first), first.more, first.count), (vec![expected[0].to_owned()], true, 3));
            }
            // KV-22: without an order, ascending by the target among the first limit + 1 in key order.
            assert_eq!(keys(&c.range(sorted(SortOrder::None, 0)).await.expect("a read")), ascending);
            let mut first_two = ["a", "b"];
            first_two.sort_by_key(|key| ascending.iter().position(|k| k == key));
            let cut = c.range(sorted(SortOrder::None, 1)).await.expect("a read");
            assert_eq!((keys(&cut), cut.more), (vec![first_two[0].to_owned()], true), "{target:?}");
        }
    });
}

#[test]
fn keys_only_leaves_values_out() {
    with_client(|mut c| async move {
        c.set("a", "value").await;
        c.set("a", "value").await;
        // KV-24
        let found = c.range(RangeRequest { keys_only: true, ..get("a") }).await.expect("a read");
        let expected =
            KeyValue { key: "a".into(), create_revision: 2, mod_revision: 3, version: 2, ..KeyValue::default() };
        assert_eq!(records(&found.kvs), [expected]);
        // KV-25: where values had to be read for the order, the lease is there.
        let lease = c.grant(60).await;
        c.put(PutRequest { lease, ..put("b", "1") }).await.expect("a put");
        let by_value = RangeRequest { keys_only: true, sort_target: SortTarget::Value as i32, ..get("b") };
        assert_eq!(records(&c.range(by_value).await.expect("a read").kvs)[0].lease, lease);
    });
}

#[test]
fn pinned_reads_show_the_state_after_that_revision() {
    with_client(|mut c| async move {
        c.set("a", "1").await;
        c.txn(all([put("a", "2").op(), put("b", "1").op()])).await.expect("a transaction");
        c.delete(delete("a")).await.expect("a delete");
        c.set("a", "3").await;
        // KV-13, KV-14: content and metadata of that time; KV-7, KV-27: the header is of now.
        // Key, value, create revision and version at a revision.
        type Seen = (&'static str, &'static str, i64, i64);
        let cases: [(i64, &[Seen]); 5] = [
            (1, &[]),
            (2, &[("a", "1", 2, 1)]),
            (3, &[("a", "2", 2, 2), ("b", "1", 3, 1)]),
            (4, &[("b", "1", 3, 1)]),
            (5, &[("a", "3", 5, 1), ("b", "1", 3, 1)]),
        ];
        for (revision, expected) in cases {
            for serializable in [false, true] {
                let request = RangeRequest { serializable, ..at(revision, everything()) };
                let found = c.range(request).await.expect("a read");
                let records = records(&found.kvs);
                let seen: Vec<_> = records.iter().map(|kv| (kv.key.as_ref(), kv.value.as_ref())).collect();
                let expected_seen: Vec<_> = expected.iter().map(|e| (e.0.as_bytes(), e.1.as_bytes())).collect();
                assert_eq!(seen, expected_seen, "at {revision}");
                for (kv, (.., create, version)) in records.iter().zip(expected) {
                    assert_eq!((kv.create_revision, kv.version), (*create, *version), "at {revision}");
                }
                assert_eq!((found.count, found.header.expect("a header").revision), (expected.len() as i64, 5));
            }
        }
    });
}

/// All parts of a stream; or its end.
async fn stream(c: &mut Client, request: RangeRequest) -> Result<Vec<actd::pb::etcdserverpb::RangeResponse>, Status> {
    let mut parts = c.kv.range_stream(request).await?.into_inner();
    let mut found = Vec::new();
    while let Some(part) = tokio::time::timeout(PATIENCE, parts.message()).await.expect("in time")? {
        found.push(part.range_response.expect("a part"));
    }
    Ok(found)
}

#[test]
fn streamed_range_is_the_range_in_parts() {
    with_client(|mut c| async move {
        for n in 0..57 {
            c.set(format!("k{n:03}"), format!("v{n}")).await;
        }
        c.compact(10, false).await.expect("a compaction");
        // KV-29, KV-32, KV-35, KV-36
        let requests = [
            span("k", "l"),
            get("k007"),
            get("nothing"),
            span("x", "y"),
            RangeRequest { limit: 20, ..span("k", "l") },
            RangeRequest { limit: 57, ..span("k", "l") },
            RangeRequest { limit: 10, ..span("k", "l") },
            RangeRequest { keys_only: true, ..span("k", "l") },
            RangeRequest { count_only: true, ..span("k", "l") },
            RangeRequest { serializable: true, ..span("k03", "\0") },
            RangeRequest { sort_order: SortOrder::Ascend as i32, ..span("k", "l") },
            at(20, span("k", "l")),
            at(10, RangeRequest { limit: 3, ..span("k", "l") }),
        ];
        for request in requests {
            let whole = c.range(request.clone()).await.expect("a read");
            let parts = stream(&mut c, request.clone()).await.expect("a stream");
            let (last, before) = parts.split_last().expect("a message at least");
            // KV-33, KV-34
            for part in before {
                assert!(part.header.is_none() && part.count == 0 && !part.more, "{request:?}");
                assert!(!part.kvs.is_empty(), "{request:?}");
            }
            assert!(parts[0].kvs.len() <= 10, "{request:?}");
            assert!(!last.kvs.is_empty() || whole.kvs.is_empty(), "{request:?}");
            let kvs: Vec<_> = parts.iter().flat_map(|part| part.kvs.clone()).collect();
            assert_eq!(records(&kvs), records(&whole.kvs), "{request:?}");
            assert_eq!((last.header, last.count, last.more), (whole.header, whole.count, whole.more), "{request:?}");
        }
        assert!(stream(&mut c, span("k", "l")).await.expect("a stream").len() > 1);
    });
}

#[test]
fn streamed_range_refuses_what_it_cannot_do() {
    with_client(|mut c| async move {
        c.set("a", "1").await;
        c.set("a", "2").await;
        c.compact(3, false).await.expect("a compaction");
        // KV-30
        let order = (Code::Unimplemented, "RangeStream does not support custom sort orders".to_owned());
        let filters = (Code::Unimplemented, "RangeStream does not support revision filters".to_owned());
        let cases = [
            (RangeRequest { sort_order: SortOrder::Descend as i32, ..get("a") }, order.clone()),
            (RangeRequest { sort_order: SortOrder::Ascend as i32, sort_target: 2, ..get("a") }, order),
            (RangeRequest { min_mod_revision: 1, ..get("a") }, filters.clone()),
            (RangeRequest { max_mod_revision: 1, ..get("a") }, filters.clone()),
            (RangeRequest { min_create_revision: 1, ..get("a") }, filters.clone()),
            (RangeRequest { max_create_revision: 1, ..get("a") }, filters),
            (get(""), etcd(Code::InvalidArgument, "key is not provided")),
            (RangeRequest { sort_order: 7, ..get("a") }, etcd(Code::InvalidArgument, "invalid sort option")),
            (at(4, get("a")), future()),
            (at(2, get("a")), compacted()),
        ];
        for (request, expected) in cases {
            assert_eq!(refusal(stream(&mut c, request.clone()).await), expected, "{request:?}");
        }
    });
}

#[test]
fn streamed_range_stays_at_its_revision_and_ends_when_that_is_compacted() {
    with_client(|mut c| async move {
        // More than a connection holds, so that the server waits for the reader.
        for n in 0..30 {
            c.set(format!("k{n:02}"), vec![b'x'; 1_200_000]).await;
        }
        let mut parts = c.kv.range_stream(span("k", "l")).await.expect("a stream").into_inner();
        let first = parts.message().await.expect("a part").expect("a part").range_response.expect("a part");
        assert!(!first.kvs.is_empty());
        // KV-32: later writes show in neither data nor header.
        let mut other = c.clone();
        for n in 0..30 {
            other.delete(delete(format!("k{n:02}"))).await.expect("a delete");
        }
        let (mut kvs, mut header) = (first.kvs.len(), first.header);
        while let Some(part) = parts.message().await.expect("the rest") {
            let part = part.range_response.expect("a part");
            kvs += part.kvs.len();
            header = part.header.or(header);
        }
        assert_eq!((kvs, header.expect("a header").revision), (30, 31));

        let mut parts = c.kv.range_stream(at(31, span("k", "l"))).await.expect("a stream").into_inner();
        parts.message().await.expect("a part").expect("a part");
        // KV-37
        c.compact(40, false).await.expect("a compaction");
        let end = loop {
            match parts.message().await {
                Ok(Some(_)) => {}
                end => break end,
            }
        };
        assert_eq!(refusal(end), compacted());
    });
}

#[test]
fn put_gives_and_keeps_what_is_asked() {
    with_client(|mut c| async move {
        let lease = c.grant(60).await;
        // KV-40
        let first = PutRequest { prev_kv: true, lease, ..put("a", "1") };
        assert!(c.put(first.clone()).await.expect("a put").prev_kv.is_none());
        let second = c.put(PutRequest { prev_kv: true, ..put("a", "2") }).await.expect("a put");
        let before = second.prev_kv.expect("a record").decode_record().expect("it decodes");
        let expected =
            KeyValue { key: "a".into(), value: "1".into(), create_revision: 2, mod_revision: 2, version: 1, lease };
        assert_eq!(before, expected);
        assert!(c.put(put("a", "3")).await.expect("a put").prev_kv.is_none(), "only when asked for");

        // KV-41
        c.put(PutRequest { lease, ..put("a", "kept") }).await.expect("a put");
        c.put(PutRequest { ignore_lease: true, ..put("a", "new") }).await.expect("a put");
        let kept_lease = c.record("a").await.expect("a record");
        assert_eq!((text(&kept_lease.value), kept_lease.lease), ("new".to_owned(), lease));
        c.put(PutRequest { ignore_value: true, ignore_lease: true, ..put("a", "") }).await.expect("a put");
        let kept_both = c.record("a").await.expect("a record");
        assert_eq!((text(&kept_both.value), kept_both.lease), ("new".to_owned(), lease));
        // KV-42: the value alone is kept, the lease is not.
        c.put(PutRequest { ignore_value: true, ..put("a", "") }).await.expect("a put");
        let kept_value = c.record("a").await.expect("a record");
        assert_eq!((text(&kept_value.value), kept_value.lease), ("new".to_owned(), 0));
        assert_eq!(kept_value.version, 7);
    });
}

#[test]
fn invalid_puts_are_refused_with_etcds_words() {
    with_client(|mut c| async move {
        let invalid = |text| etcd(Code::InvalidArgument, text);
        c.set("there", "1").await;
        let not_found = etcd(Code::NotFound, "requested lease not found");
        // KV-41, KV-43, and the order of the checks
        let cases = [
            (put("", "v"), invalid("key is not provided")),
            (PutRequest { ignore_value: true, ..put("", "v") }, invalid("key is not provided")),
            (PutRequest { ignore_value: true, ..put("there", "v") }, invalid("value is provided")),
            (PutRequest { ignore_lease: true, lease: 5, ..put("there", "v") }, invalid("lease is provided")),
            (
                PutRequest { ignore_value: true, ignore_lease: true, lease: 5, ..put("there", "v") },
                invalid("value is provided"),
            ),
            (PutRequest { ignore_value: true, ..put("absent", "") }, invalid("key not found")),
            (PutRequest { ignore_lease: true, ..put("absent", "v") }, invalid("key not found")),
            (PutRequest { lease: 4711, ..put("there", "v") }, not_found.clone()),
            (PutRequest { lease: -1, ..put("there", "v") }, not_found.clone()),
            (PutRequest { lease: 4711, ignore_value: true, ..put("absent", "") }, not_found),
        ];
        for (request, expected) in cases {
            assert_eq!(refusal(c.put(request.clone()).await), expected, "{request:?}");
        }
        // KV-43, KV-6: nothing of it happened.
        assert_eq!(c.record("there").await.expect("a record").version, 1);
        assert_eq!(c.revision().await, 2);
    });
}

#[test]
fn lease_of_a_key_is_the_newest_puts() {
    with_client(|mut c| async move {
        async fn attached(c: &mut Client, id: i64) -> Vec<String> {
            let request = LeaseTimeToLiveRequest { id, keys: true };
            let found = c.lease.lease_time_to_live(request).await.expect("an answer").into_inner();
            found.keys.iter().map(|key| text(key)).collect()
        }
        let (one, two) = (c.grant(60).await, c.grant(60).await);
        let leased = |lease| PutRequest { lease, ..put("a", "v") };
        // KV-42: attached, moved, detached.
        c.put(leased(one)).await.expect("a put");
        assert_eq!((attached(&mut c, one).await, c.record("a").await.expect("it").lease), (vec!["a".into()], one));
        c.put(leased(two)).await.expect("a put");
        assert_eq!((attached(&mut c, one).await, attached(&mut c, two).await), (vec![], vec!["a".to_owned()]));
        c.lease.lease_revoke(LeaseRevokeRequest { id: one }).await.expect("revoked");
        assert!(c.record("a").await.is_some(), "it is no longer of that lease");
        // KV-43
        let unknown = refusal(c.put(leased(one)).await);
        assert_eq!(unknown, etcd(Code::NotFound, "requested lease not found"));
        assert_eq!(attached(&mut c, two).await, ["a"]);
        c.set("a", "v").await;
        assert!(attached(&mut c, two).await.is_empty());
        c.lease.lease_revoke(LeaseRevokeRequest { id: two }).await.expect("revoked");
        assert!(c.record("a").await.is_some(), "detached by a put without lease");
        // KV-47: a deletion detaches.
        let three = c.grant(60).await;
        c.put(leased(three)).await.expect("a put");
        c.delete(delete("a")).await.expect("a delete");
        assert!(attached(&mut c, three).await.is_empty());
    });
}

#[test]
fn deletions_tell_what_they_removed() {
    with_client(|mut c| async move {
        for key in ["d", "c", "b", "a"] {
            c.set(key, key).await;
        }
        // KV-45
        let none = c.delete(delete_span("c", "b")).await.expect("a delete");
        assert_eq!((none.deleted, none.header.expect("a header").revision), (0, 5));
        // KV-46
        let one = c.delete(delete("d")).await.expect("a delete");
        assert_eq!((one.deleted, one.prev_kvs.len(), one.header.expect("a header").revision), (1, 0, 6));
        let request = actd::pb::etcdserverpb::DeleteRangeRequest { prev_kv: true, ..delete_span("a", "\0") };
        let rest = c.delete(request.clone()).await.expect("a delete");
        let removed: Vec<_> = records(&rest.prev_kvs).iter().map(|kv| (text(&kv.key), kv.mod_revision)).collect();
        assert_eq!((rest.deleted, removed), (3, vec![("a".into(), 5), ("b".into(), 4), ("c".into(), 3)]));
        // KV-48
        let again = c.delete(request).await.expect("a delete");
        assert_eq!((again.deleted, again.header.expect("a header").revision), (0, 7));
    });
}

#[test]
fn compaction_takes_what_is_below_its_revision() {
    with_client(|mut c| async move {
        for value in ["1", "2", "3", "4"] {
            c.set("a", value).await;
        }
        c.set("gone", "1").await;
        c.delete(delete("gone")).await.expect("a delete");
        c.set("a", "5").await;
        assert_eq!(c.revision().await, 8);
        // KV-75
        assert_eq!(refusal(c.compact(9, false).await), future());
        assert_eq!(c.compact(4, false).await.expect("a compaction"), 8);
        assert_eq!(refusal(c.compact(4, false).await), compacted());
        assert_eq!(refusal(c.compact(3, true).await), compacted());
        // KV-77, KV-79, KV-87
        assert_eq!(refusal(c.range(at(3, get("a"))).await), compacted());
        assert_eq!(refusal(c.range(at(1, RangeRequest { count_only: true, ..everything() })).await), compacted());
        for (revision, value) in [(4, "3"), (5, "4"), (7, "4"), (8, "5")] {
            let found = c.range(at(revision, get("a"))).await.expect("readable");
            assert_eq!(text(&records(&found.kvs)[0].value), value, "at {revision}");
        }
        assert_eq!(c.range(at(6, get("gone"))).await.expect("readable").count, 1);
        // KV-78: once it answers, the rows are gone; what was to be kept is there.
        assert_eq!(c.compact(7, true).await.expect("a compaction"), 8);
        assert_eq!(c.range(at(7, everything())).await.expect("readable").count, 1);
        // KV-80, KV-81: the tombstone at the compact revision is still told.
        let create = WatchCreateRequest { key: "gone".into(), start_revision: 7, ..Default::default() };
        let mut watching = Watching::on(&c, create).await;
        let event = watching.events(1).await.remove(0);
        assert!(event.is_delete() && event.kv.expect("a record").mod_revision == 7);
        let late = WatchCreateRequest { key: "gone".into(), start_revision: 6, ..Default::default() };
        let mut refused = Watching::on(&c, late).await;
        let cancel = refused.next().await;
        assert_eq!((cancel.canceled, cancel.compact_revision, cancel.header.expect("one").revision), (true, 7, 0));
        // KV-75: the current revision itself.
        assert_eq!(c.compact(8, false).await.expect("a compaction"), 8);
        assert_eq!(text(&c.record("a").await.expect("alive").value), "5");
    });
}

#[test]
fn first_compaction_may_be_at_zero() {
    with_client(|mut c| async move {
        // KV-76
        assert_eq!(refusal(c.compact(-1, false).await), compacted());
        assert_eq!(c.compact(0, false).await.expect("once"), 1);
        assert_eq!(refusal(c.compact(0, false).await), compacted());
        assert_eq!(c.compact(1, false).await.expect("the current one"), 1);
    });
}
