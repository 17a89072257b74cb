//! The Watch service over a socket, statement by statement (W-1 to W-46). Refusals and how streams end without a leader
//! are in `api_errors.rs`, streams in great number in `api_limits.rs`.

mod common;

use std::{path::Path, time::Duration};

use actd::pb::etcdserverpb::{
    DeleteRangeRequest, LeaseRevokeRequest, PutRequest, WatchCreateRequest, WatchResponse,
    watch_create_request::FilterType,
};
use common::{
    Client, EventRecord, Server,
    calls::{Op, Watching, all, block_on, delete, delete_span, put, text},
};

fn start(flags: &[&str]) -> Server {
    Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), flags)
}

/// A server and a test's calls to it.
fn with_client<F: Future<Output = ()>>(test: impl FnOnce(Client) -> F) {
    let server = start(&[]);
    block_on(async { test(Client::connect(&server).await).await });
}

fn on(key: &str) -> WatchCreateRequest {
    WatchCreateRequest { key: key.to_owned().into(), ..Default::default() }
}

fn over(key: &str, range_end: &str) -> WatchCreateRequest {
    WatchCreateRequest { range_end: range_end.to_owned().into(), ..on(key) }
}

fn from(start_revision: i64, create: WatchCreateRequest) -> WatchCreateRequest {
    WatchCreateRequest { start_revision, ..create }
}

fn header_revision(response: &WatchResponse) -> i64 {
    response.header.expect("a header").revision
}

fn decoded(response: &WatchResponse) -> Vec<EventRecord> {
    response.events.iter().map(EventRecord::decode_raw).collect()
}

/// Key, revision and whether it is a deletion.
fn brief(events: &[EventRecord]) -> Vec<(String, i64, bool)> {
    let one = |e: &EventRecord| {
        let kv = e.kv.as_ref().expect("a record");
        (text(&kv.key), kv.mod_revision, e.is_delete())
    };
    events.iter().map(one).collect()
}

/// That nothing came before: the next answer is to this request for progress.
async fn is_quiet(watching: &mut Watching) {
    let response = watching.progress().await;
    assert_eq!((response.watch_id, response.events.len()), (-1, 0), "{response:?}");
}

#[test]
fn ids_are_counted_from_zero_or_chosen() {
    with_client(|mut c| async move {
        c.set("k", "v").await;
        let mut watching = Watching::open(&c);
        let mut other = Watching::open(&c);
        let id = |watch_id| WatchCreateRequest { watch_id, ..on("k") };
        // W-2: skipping one that is in use.
        for (asked, given) in [(0, 0), (1, 1), (0, 2), (-7, -7), (100, 100), (0, 3)] {
            watching.create(id(asked));
            let created = watching.next().await;
            // W-4
            assert!(created.created && !created.canceled && created.events.is_empty());
            assert_eq!((created.watch_id, header_revision(&created)), (given, 2));
        }
        // W-1: of each stream.
        other.create(id(0));
        assert_eq!(other.next().await.watch_id, 0);
        // W-3, W-5: refused, and the one that is there is untouched.
        watching.create(id(100));
        let refused = watching.next().await;
        assert!(refused.created && refused.canceled && refused.watch_id == -1 && refused.events.is_empty());
        assert_eq!(header_revision(&refused), 2);
        // W-36, W-39: a cancelled id is not handed out again, but may be chosen (W-38).
        watching.cancel(3);
        let cancelled = watching.next().await;
        assert!(cancelled.canceled && !cancelled.created && cancelled.watch_id == 3);
        assert_eq!((cancelled.compact_revision, header_revision(&cancelled)), (0, 2));
        watching.create(id(0));
        assert_eq!(watching.next().await.watch_id, 4);
        watching.create(id(3));
        assert_eq!(watching.next().await.watch_id, 3);
        // W-37
        watching.cancel(4711);
        is_quiet(&mut watching).await;
        // W-30: each of the watchers gets its copy.
        c.set("k", "w").await;
        let mut ids = Vec::new();
        while ids.len() < 7 {
            let response = watching.next().await;
            assert_eq!((response.events.len(), header_revision(&response)), (1, 3));
            ids.push(response.watch_id);
        }
        ids.sort_unstable();
        assert_eq!(ids, [-7, 0, 1, 2, 3, 4, 100]);
        is_quiet(&mut watching).await;
    });
}

#[test]
fn watchers_hear_of_their_keys_only() {
    with_client(|mut c| async move {
        // W-10
        let cases: [(WatchCreateRequest, &[&str]); 7] = [
            (on("b"), &["b"]),
            (over("b", "c"), &["b", "b1"]),
            (over("b", "\0"), &["b", "b1", "c"]),
            (over("\0", "\0"), &["a", "b", "b1", "c"]),
            (over("", "\0"), &["a", "b", "b1", "c"]),
            (over("", "b"), &["a"]),
            (on(""), &[]),
        ];
        let mut streams = Vec::new();
        for (create, expected) in cases {
            streams.push((Watching::on(&c, create.clone()).await, create, expected));
        }
        for key in ["a", "b", "b1", "c"] {
            c.set(key, "v").await;
        }
        for (watching, create, expected) in &mut streams {
            let mut heard = Vec::new();
            for (key, revision) in [("a", 2), ("b", 3), ("b1", 4), ("c", 5)] {
                if expected.contains(&key) {
                    // W-28: one response for each revision, with it.
                    let response = watching.next().await;
                    assert_eq!(header_revision(&response), revision, "{create:?}");
                    heard.extend(brief(&decoded(&response)));
                    assert_eq!(heard.last(), Some(&(key.to_owned(), revision, false)), "{create:?}");
                }
            }
            is_quiet(watching).await;
        }
    });
}

#[test]
fn watchers_start_where_they_are_told_to() {
    with_client(|mut c| async move {
        for value in ["1", "2", "3"] {
            c.set("k", value).await;
        }
        c.set("other", "v").await;
        c.delete(delete("k")).await.expect("a delete");
        c.compact(3, false).await.expect("a compaction");
        let expected = [("k".to_owned(), 3, false), ("k".to_owned(), 4, false), ("k".to_owned(), 6, true)];
        // W-14, W-16, KV-81
        for (start, events) in [(3, &expected[..]), (4, &expected[1..]), (5, &expected[2..]), (6, &expected[2..])] {
            let mut watching = Watching::on(&c, from(start, on("k"))).await;
            assert_eq!(brief(&watching.events(events.len()).await), events, "from {start}");
            is_quiet(&mut watching).await;
        }
        // W-13: from now on. W-15: from a revision to come, and nothing before it.
        let mut now = Watching::on(&c, on("k")).await;
        let mut later = Watching::on(&c, from(9, on("k"))).await;
        for value in ["7", "8", "9", "10"] {
            c.set("k", value).await;
        }
        assert_eq!(brief(&now.events(4).await).iter().map(|e| e.1).collect::<Vec<_>>(), [7, 8, 9, 10]);
        assert_eq!(brief(&later.events(2).await).iter().map(|e| e.1).collect::<Vec<_>>(), [9, 10]);
        // W-17, W-18: behind the compaction, one that goes on beside it.
        let mut late = Watching::on(&c, from(2, on("k"))).await;
        let cancel = late.next().await;
        assert!(cancel.canceled && !cancel.created && cancel.events.is_empty() && cancel.cancel_reason.is_empty());
        assert_eq!((cancel.watch_id, cancel.compact_revision, header_revision(&cancel)), (0, 3, 0));
        late.create(from(10, on("k")));
        assert!(late.next().await.created);
        assert_eq!(brief(&late.events(1).await)[0].1, 10);
    });
}

#[test]
fn events_tell_what_happened_and_what_was_before() {
    with_client(|mut c| async move {
        let with_prev = WatchCreateRequest { prev_kv: true, ..on("k") };
        let mut plain = Watching::on(&c, on("k")).await;
        let mut with = Watching::on(&c, with_prev.clone()).await;
        let lease = c.grant(60).await;
        c.put(PutRequest { lease, ..put("k", "1") }).await.expect("a put");
        c.set("k", "2").await;
        c.delete(delete("k")).await.expect("a delete");
        c.set("k", "3").await;
        // W-24, W-21, W-22
        let events = plain.events(4).await;
        assert!(events.iter().all(|e| e.prev_kv.is_none()));
        let kv = |n: usize| events[n].kv.clone().expect("a record");
        let fields = |n| (kv(n).create_revision, kv(n).mod_revision, kv(n).version, text(&kv(n).value), kv(n).lease);
        assert_eq!(fields(0), (2, 2, 1, "1".into(), lease));
        assert_eq!(fields(1), (2, 3, 2, "2".into(), 0));
        assert_eq!(fields(2), (0, 4, 0, String::new(), 0));
        assert_eq!(fields(3), (5, 5, 1, "3".into(), 0));
        assert_eq!(events.iter().map(EventRecord::is_delete).collect::<Vec<_>>(), [false, false, true, false]);
        // W-23
        let prev: Vec<_> = with.events(4).await.into_iter().map(|e| e.prev_kv).collect();
        assert_eq!(prev, [None, Some(kv(0)), Some(kv(1)), None]);
        // W-23: what is compacted is left out, and the event comes all the same.
        c.compact(3, true).await.expect("a compaction");
        let mut late = Watching::on(&c, from(3, with_prev)).await;
        let events = late.events(3).await;
        assert_eq!(events.iter().map(|e| e.prev_kv.clone()).collect::<Vec<_>>(), [None, Some(kv(1)), None]);
    });
}

#[test]
fn filters_drop_kinds_of_events() {
    with_client(|mut c| async move {
        let (no_put, no_delete) = (FilterType::Noput as i32, FilterType::Nodelete as i32);
        let filtered = |filters: &[i32]| WatchCreateRequest { filters: filters.to_vec(), ..over("k", "l") };
        let mut deletions = Watching::on(&c, filtered(&[no_put])).await;
        let mut puts = Watching::on(&c, filtered(&[no_delete])).await;
        let mut nothing = Watching::on(&c, filtered(&[no_put, no_delete])).await;
        c.set("k1", "v").await;
        c.txn(all([put("k2", "v").op(), delete("k1").op()])).await.expect("a transaction");
        c.delete(delete("k2")).await.expect("a delete");
        // W-25
        let expected = [("k1".to_owned(), 3, true), ("k2".to_owned(), 4, true)];
        assert_eq!(brief(&deletions.events(2).await), expected);
        assert_eq!(brief(&puts.events(2).await), [("k1".to_owned(), 2, false), ("k2".to_owned(), 3, false)]);
        for watching in [&mut deletions, &mut puts, &mut nothing] {
            is_quiet(watching).await;
        }
    });
}

#[test]
fn events_of_a_revision_stay_together() {
    with_client(|mut c| async move {
        let mut live = Watching::on(&c, over("k", "l")).await;
        let ops: Vec<_> = (0..100).map(|n| put(format!("k{n:03}"), vec![b'x'; 10_000]).op()).collect();
        c.txn(all(ops)).await.expect("a transaction");
        c.delete(delete_span("k", "l")).await.expect("a delete");
        let id = c.grant(60).await;
        for n in 0..10 {
            c.put(PutRequest { lease: id, ..put(format!("k{n}"), "v") }).await.expect("a put");
        }
        c.lease.lease_revoke(LeaseRevokeRequest { id }).await.expect("revoked");
        let mut caught_up = Watching::on(&c, from(2, over("k", "l"))).await;
        for watching in [&mut live, &mut caught_up] {
            // W-26, W-27, W-32: in order, and none of a revision in another response.
            let (mut heard, mut last) = (Vec::new(), 0);
            while heard.len() < 220 {
                let response = watching.next().await;
                let events = brief(&decoded(&response));
                assert!(!response.fragment && events.first().expect("events").1 > last, "{last}");
                last = events.last().expect("events").1;
                assert!(header_revision(&response) >= last);
                heard.extend(events);
            }
            let mut sorted = heard.clone();
            sorted.sort_by_key(|e| (e.1, e.0.clone()));
            assert_eq!(heard, sorted);
            assert_eq!((heard[99].1, heard[100].1, heard[219].1), (2, 3, 14));
        }
    });
}

#[test]
fn large_responses_are_split_only_when_asked() {
    with_client(|mut c| async move {
        // More than 2 MiB in one revision, which no transaction may hold: deletions with what was before.
        for n in 0..30 {
            c.set(format!("k{n:02}"), vec![b'x'; 100_000]).await;
        }
        let with_prev = WatchCreateRequest { prev_kv: true, ..over("k", "l") };
        let mut whole = Watching::on(&c, with_prev.clone()).await;
        let mut split = Watching::on(&c, WatchCreateRequest { fragment: true, ..with_prev }).await;
        c.delete(delete_span("k", "l")).await.expect("a delete");
        // W-31
        let response = whole.next().await;
        assert_eq!((response.events.len(), response.fragment), (30, false));
        let mut events = Vec::new();
        let mut parts = 0;
        loop {
            let response = split.next().await;
            assert!(!response.events.is_empty() && response.watch_id == 0);
            assert_eq!(header_revision(&response), 32);
            events.extend(decoded(&response));
            parts += 1;
            if !response.fragment {
                break;
            }
        }
        assert!(parts > 1);
        assert_eq!(events, decoded(&response));
        // A small one is whole.
        c.set("k", "v").await;
        let small = split.next().await;
        assert_eq!((small.events.len(), small.fragment), (1, false));
    });
}

#[test]
fn progress_is_of_the_whole_stream_and_never_early() {
    with_client(|mut c| async move {
        // W-43: without watchers there is none.
        let mut watching = Watching::open(&c);
        watching.ask_progress();
        watching.create(on("k"));
        assert!(watching.next().await.created);
        let mut last = 0;
        for round in 0..50 {
            let written = c.set("k", format!("{round}")).await;
            watching.ask_progress();
            // W-41: what happened up to the revision told came before; W-42, W-45.
            let mut heard = false;
            loop {
                let response = watching.next().await;
                if response.events.is_empty() {
                    assert_eq!(response.watch_id, -1);
                    let told = header_revision(&response);
                    assert!(told >= last, "{told} after {last}");
                    last = told;
                    assert!(heard || told < written, "{told} was told before the event of {written}");
                    if heard {
                        break;
                    }
                    watching.ask_progress();
                } else {
                    assert_eq!(brief(&decoded(&response)), [("k".to_owned(), written, false)]);
                    heard = true;
                }
            }
        }
        // W-15, W-43: none for a watcher of a revision to come.
        watching.create(from(1_000, on("k")));
        assert!(watching.next().await.created);
        watching.ask_progress();
        let none = tokio::time::timeout(Duration::from_millis(500), watching.message()).await;
        assert!(none.is_err(), "{none:?}");
    });
}

#[test]
fn progress_by_interval_is_for_who_asked_and_heard_nothing() {
    let server = start(&["--watch-progress-notify-interval=300ms"]);
    block_on(async {
        let mut c = Client::connect(&server).await;
        let mut watching = Watching::on(&c, WatchCreateRequest { progress_notify: true, watch_id: 5, ..on("k") }).await;
        let mut unasked = Watching::on(&c, on("k")).await;
        let revision = c.set("other", "v").await;
        // W-40
        for _ in 0..3 {
            let progress = watching.next().await;
            assert!(progress.events.is_empty() && !progress.created && !progress.canceled);
            assert_eq!(progress.watch_id, 5);
            assert!(header_revision(&progress) <= revision);
        }
        assert_eq!(header_revision(&watching.next().await), revision);
        let none = tokio::time::timeout(Duration::from_millis(50), unasked.message()).await;
        assert!(none.is_err(), "{none:?}");
    });
}

#[test]
fn catching_up_and_hearing_live_make_one_history() {
    with_client(|mut c| async move {
        // W-35, W-14: begun at any moment of a busy time, from its beginning.
        let mut writer = c.clone();
        let writes = async {
            for n in 0..400 {
                if n % 7 == 6 {
                    let request = DeleteRangeRequest { ..delete_span("k0", "k3") };
                    writer.delete(request).await.expect("a delete");
                } else {
                    writer.set(format!("k{}", n % 5), format!("{n}")).await;
                }
            }
            writer.set("k-end", "").await
        };
        let watches = async {
            let mut streams = Vec::new();
            for _ in 0..10 {
                streams.push(Watching::on(&c, from(1, over("k", "l"))).await);
                c.revision().await;
            }
            streams
        };
        let (end, streams) = tokio::join!(writes, watches);
        let mut histories = Vec::new();
        for mut watching in streams {
            let mut history = Vec::new();
            while history.last().is_none_or(|e: &(String, i64, bool)| e.1 < end) {
                history.extend(brief(&decoded(&watching.next().await)));
            }
            assert!(history.windows(2).all(|w| (w[0].1, &w[0].0) < (w[1].1, &w[1].0)), "ordered, and each once");
            histories.push(history);
        }
        assert!(histories.windows(2).all(|w| w[0] == w[1]));
        let mut revisions: Vec<_> = histories[0].iter().map(|e| e.1).collect();
        revisions.dedup();
        assert_eq!(revisions, (2..=end).collect::<Vec<_>>(), "every revision is there");
    });
}

#[test]
fn watchers_go_on_after_a_restart_where_they_were() {
    let mut server = start(&[]);
    let mut heard = block_on(async {
        let mut c = Client::connect(&server).await;
        let mut watching = Watching::on(&c, on("k")).await;
        for value in ["1", "2", "3"] {
            c.set("k", value).await;
        }
        brief(&watching.events(2).await)
    });
    server.restart();
    block_on(async {
        let mut c = Client::connect(&server).await;
        c.set("k", "4").await;
        // W-50, W-56
        let mut watching = Watching::on(&c, from(heard.last().expect("heard").1 + 1, on("k"))).await;
        heard.extend(brief(&watching.events(2).await));
    });
    assert_eq!(heard.iter().map(|e| e.1).collect::<Vec<_>>(), [2, 3, 4, 5]);
}
