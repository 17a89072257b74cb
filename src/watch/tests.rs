//! The numbered statements about watches, one situation each. Each test drives a hub the way the shell does.

use super::{model::*, *};
use crate::{
    mvcc::record::KeyValue,
    pb::etcdserverpb::{WatchCreateRequest, WatchRequest, WatchResponse, watch_create_request::FilterType},
};

struct Bench {
    hub: Hub,
    model: Model,
    stream: StreamId,
    out: Vec<Outgoing>,
    /// Take what is sent at once.
    taking: bool,
}

const SECOND: u64 = 1000;

fn config() -> HubConfig {
    HubConfig { cluster_id: 10, member_id: 20, progress_interval_ms: 60 * SECOND, ..HubConfig::default() }
}

impl Bench {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: HubConfig) -> Self {
        let mut hub = Hub::new(config, 7);
        let stream = hub.open_stream(0);
        let mut bench = Self { hub, model: Model::new(), stream, out: Vec::new(), taking: true };
        bench.publish();
        bench
    }

    fn publish(&mut self) {
        let published = self.model.published(self.hub.revision());
        self.hub.on_published(&published, &mut self.model, &mut self.out).unwrap();
    }

    /// The view moves on, but its changes are not told.
    fn jump(&mut self) {
        let mut published = self.model.published(self.hub.revision());
        published.changes = [].into();
        self.hub.on_published(&published, &mut self.model, &mut self.out).unwrap();
    }

    fn put(&mut self, key: &str, value: &str) {
        self.model.put(key, value);
        self.publish();
    }

    fn delete(&mut self, key: &str) {
        self.model.delete(key);
        self.publish();
    }

    fn send(&mut self, request: WatchRequest) {
        self.hub.on_request(self.stream, request, None, &self.model.view, &mut self.out);
    }

    fn create(&mut self, key: &str, options: WatchCreateRequest) -> i64 {
        self.send(create(WatchCreateRequest { key: key.to_owned().into(), ..options }));
        let sent = self.out.iter().position(|outgoing| outgoing.response.created).expect("a create is answered");
        let mut created = self.out.remove(sent);
        assert_eq!(sent, 0, "the created answer is the first");
        if self.taking {
            self.hub.on_taken(created.stream, created.bytes, &mut self.out);
        }
        created.response.events.clear();
        if created.response.canceled { -1 } else { created.response.watch_id }
    }

    fn watch(&mut self, key: &str) -> i64 {
        self.create(key, WatchCreateRequest::default())
    }

    /// Everything sent so far, catch-ups included.
    fn sent(&mut self) -> Vec<WatchResponse> {
        let mut sent = Vec::new();
        loop {
            while self.hub.catch_up(1, &mut self.model, &mut self.out).unwrap() {}
            if self.out.is_empty() {
                return sent;
            }
            for outgoing in std::mem::take(&mut self.out) {
                if self.taking {
                    self.hub.on_taken(outgoing.stream, outgoing.bytes, &mut self.out);
                }
                sent.push(outgoing.response);
            }
        }
    }

    /// Main revisions of the events sent to a watcher, one list per response.
    fn revisions(&mut self, id: i64) -> Vec<Vec<i64>> {
        let of_watcher = |response: &WatchResponse| {
            assert!(!response.canceled);
            events(response).iter().map(|seen| seen.kv.mod_revision).collect::<Vec<_>>()
        };
        self.sent().iter().filter(|response| response.watch_id == id).map(of_watcher).collect()
    }
}

fn from(start_revision: i64) -> WatchCreateRequest {
    WatchCreateRequest { start_revision, ..Default::default() }
}

fn to(range_end: &str) -> WatchCreateRequest {
    WatchCreateRequest { range_end: range_end.to_owned().into(), ..Default::default() }
}

fn header_revision(response: &WatchResponse) -> i64 {
    let header = response.header.expect("each answer has a header");
    assert_eq!((header.cluster_id, header.member_id, header.raft_term), (10, 20, 5));
    header.revision
}

// W-2, W-3, W-39
#[test]
fn watch_ids_count_up_and_skip_ids_in_use() {
    let mut bench = Bench::new();
    let with_id = |watch_id| WatchCreateRequest { watch_id, ..Default::default() };
    assert_eq!(bench.watch("a"), 0);
    assert_eq!(bench.create("a", with_id(2)), 2);
    assert_eq!(bench.create("a", with_id(-5)), -5);
    assert_eq!(bench.watch("a"), 1);
    assert_eq!(bench.watch("a"), 3);
    bench.send(cancel(3));
    bench.send(cancel(0));
    assert_eq!(bench.sent().len(), 2);
    assert_eq!(bench.watch("a"), 4);
    assert_eq!(bench.create("a", with_id(3)), 3);
}

// W-3, W-5, W-6, W-7, W-8, W-9, H-54, H-55
#[test]
fn refusals_tell_why_and_leave_the_stream_usable() {
    let mut bench = Bench::new();
    bench.put("a", "1");
    assert_eq!(bench.watch("a"), 0);
    let denied = "rpc error: code = PermissionDenied desc = etcdserver: permission denied";
    let compacted = "etcdserver: mvcc: required revision has been compacted";
    let empty = "mvcc: watcher range is empty";
    let duplicate = "mvcc: duplicate watch ID provided on the WatchStream";
    let good = WatchCreateRequest { key: "b".into(), watch_id: 4, ..Default::default() };
    bench.send(create(good.clone()));
    bench.sent();
    let bad_range = WatchCreateRequest { range_end: "a".into(), ..good.clone() };
    let same_range = WatchCreateRequest { range_end: "b".into(), ..good.clone() };
    let all_wrong = WatchCreateRequest { start_revision: -1, ..bad_range.clone() };
    let cases = [
        (all_wrong, Some(denied), compacted),
        (bad_range.clone(), Some(denied), denied),
        (bad_range, None, empty),
        (same_range, None, empty),
        (good, None, duplicate),
    ];
    for (request, reason, expected) in cases {
        let (request, view) = (create(request), bench.model.view.clone());
        bench.hub.on_request(bench.stream, request, reason.map(str::to_owned), &view, &mut bench.out);
        let sent = bench.sent();
        assert_eq!(sent.len(), 1);
        assert!(sent[0].created && sent[0].canceled && sent[0].events.is_empty());
        assert_eq!((sent[0].watch_id, sent[0].compact_revision, header_revision(&sent[0])), (-1, 0, 2));
        assert_eq!(sent[0].cancel_reason, expected);
    }
    // The watchers that were there are untouched, and no id was used up.
    bench.put("a", "2");
    bench.put("b", "2");
    let sent = bench.sent();
    assert_eq!(sent.iter().map(|response| response.watch_id).collect::<Vec<_>>(), [0, 4]);
    assert_eq!(bench.watch("a"), 1);
}

// W-4, W-13
#[test]
fn created_tells_the_revision_after_which_events_come() {
    let mut bench = Bench::new();
    bench.put("a", "1");
    // The view in use is ahead of what the hub has been told.
    bench.model.put("a", "2");
    bench.send(create(WatchCreateRequest { key: "a".into(), ..Default::default() }));
    bench.model.put("a", "3");
    bench.publish();
    let sent = bench.sent();
    assert!(sent[0].created && !sent[0].canceled && sent[0].events.is_empty());
    assert_eq!(header_revision(&sent[0]), 3);
    assert_eq!(sent.len(), 2);
    assert_eq!(events(&sent[1])[0].kv.mod_revision, 4);
}

// W-10
#[test]
fn empty_key_means_the_first_key() {
    let mut bench = Bench::new();
    let all = bench.create("", to("\0"));
    let first = bench.create("", WatchCreateRequest::default());
    let below = bench.create("", to("b"));
    bench.put("a", "");
    bench.put("z", "");
    bench.put("\0", "");
    let sent = bench.sent();
    let got = |id| sent.iter().filter(|response| response.watch_id == id).map(header_revision).collect::<Vec<_>>();
    assert_eq!(got(all), [2, 3, 4]);
    assert_eq!(got(first), [4]);
    assert_eq!(got(below), [2, 4]);
}

// W-11
#[test]
fn empty_requests_and_unknown_streams_are_ignored() {
    let mut bench = Bench::new();
    bench.send(WatchRequest { request_union: None });
    bench.hub.close_stream(bench.stream);
    bench.send(progress());
    bench.send(create(WatchCreateRequest::default()));
    bench.hub.on_taken(bench.stream, 5, &mut bench.out);
    bench.hub.close_stream(bench.stream);
    assert!(bench.out.is_empty() && bench.hub.is_clean());
}

// W-14, W-16, W-29
#[test]
fn past_start_delivers_history_then_live_events() {
    let mut bench = Bench::new();
    for value in ["1", "2", "3"] {
        bench.put("a", value);
        bench.put("b", value);
    }
    let id = bench.create("a", from(3));
    assert_eq!(bench.hub.stats().behind, 1);
    let sent = bench.sent();
    assert_eq!(sent.len(), 1, "a catch-up joins revisions");
    assert_eq!(events(&sent[0]).iter().map(|seen| seen.kv.mod_revision).collect::<Vec<_>>(), [4, 6]);
    assert_eq!(header_revision(&sent[0]), 7);
    bench.put("a", "4");
    assert_eq!(bench.revisions(id), [[8]]);
}

// W-15, W-43, H-14, H-15
#[test]
fn future_start_sends_nothing_early() {
    let mut bench = Bench::with(HubConfig { progress_interval_ms: 100, ..config() });
    let id = bench.create("a", WatchCreateRequest { progress_notify: true, ..from(6) });
    bench.put("a", "2");
    bench.put("a", "3");
    bench.hub.on_tick(SECOND, &mut bench.out);
    bench.send(progress());
    assert_eq!(bench.sent(), []);
    // A snapshot brings the store past the start, with writes on both sides of it.
    for value in ["4", "5", "6", "7"] {
        bench.model.put("a", value);
    }
    bench.jump();
    bench.hub.on_tick(2 * SECOND, &mut bench.out);
    assert!(bench.out.is_empty(), "no progress before what was jumped over is read");
    let sent = bench.sent();
    assert_eq!(events(&sent[0]).iter().map(|seen| seen.kv.mod_revision).collect::<Vec<_>>(), [6, 7]);
    assert_eq!((sent[1].watch_id, header_revision(&sent[1])), (-1, 7));
    bench.hub.on_tick(3 * SECOND, &mut bench.out);
    bench.hub.on_tick(4 * SECOND, &mut bench.out);
    let sent = bench.sent();
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].watch_id, header_revision(&sent[0])), (id, 7));
}

// W-15: the next revision is still a future one.
#[test]
fn start_right_after_the_current_revision_is_not_reported_as_progress() {
    let mut bench = Bench::new();
    bench.create("a", from(2));
    bench.send(progress());
    assert_eq!(bench.sent(), []);
    bench.put("b", "");
    let sent = bench.sent();
    assert_eq!((sent.len(), sent[0].watch_id, header_revision(&sent[0])), (1, -1, 2));
}

// W-17, W-19, W-20, H-56
#[test]
fn compacted_start_is_created_then_cancelled() {
    let mut bench = Bench::new();
    for value in ["2", "3", "4", "5"] {
        bench.put("a", value);
    }
    bench.model.compact(4);
    bench.publish();
    let id = bench.create("a", from(3));
    assert_eq!(id, 0);
    let sent = bench.sent();
    assert_eq!(sent.len(), 1);
    assert!(sent[0].canceled && !sent[0].created && sent[0].events.is_empty() && sent[0].cancel_reason.is_empty());
    assert_eq!((sent[0].watch_id, sent[0].compact_revision, header_revision(&sent[0])), (0, 4, 0));

    // The id stays taken, and does not hold up the progress of the others.
    bench.send(create(WatchCreateRequest { key: "a".into(), watch_id: 9, ..from(1) }));
    bench.send(create(WatchCreateRequest { key: "a".into(), watch_id: 9, ..Default::default() }));
    let sent = bench.sent();
    assert_eq!((sent.len(), sent[2].watch_id), (3, -1));
    bench.watch("z");
    bench.send(progress());
    bench.send(cancel(9));
    bench.put("a", "6");
    let sent = bench.sent();
    assert_eq!(sent.len(), 2);
    assert_eq!((sent[0].watch_id, header_revision(&sent[0])), (-1, 5));
    assert_eq!((sent[1].watch_id, sent[1].canceled, header_revision(&sent[1])), (9, true, 5));
    bench.send(create(WatchCreateRequest { key: "a".into(), watch_id: 9, ..Default::default() }));
    assert!(!bench.sent()[0].canceled);
}

// W-14, H-10, H-13
#[test]
fn start_at_the_compact_revision_is_served() {
    let mut bench = Bench::new();
    bench.put("a", "2");
    bench.delete("a");
    bench.put("a", "4");
    bench.model.compact(3);
    bench.model.clean();
    let id = bench.create("a", WatchCreateRequest { prev_kv: true, ..from(3) });
    let sent = bench.sent();
    assert_eq!((sent.len(), sent[0].watch_id), (1, id));
    let seen = events(&sent[0]);
    assert_eq!((seen[0].delete, seen[0].kv.mod_revision, seen[0].prev.clone()), (true, 3, None));
    assert_eq!((seen[1].delete, seen[1].kv.mod_revision, seen[1].prev.clone()), (false, 4, None));
}

// W-18, W-34, H-8
#[test]
fn slow_reader_gets_all_events_or_the_cancel() {
    let big = "v".repeat(1000);
    let run = |compact| {
        let mut bench = Bench::with(HubConfig { stream_budget_bytes: 5000, ..config() });
        let id = bench.watch("a");
        let other = bench.watch("idle");
        bench.taking = false;
        for _ in 0..50 {
            bench.put("a", &big);
        }
        assert_eq!(bench.hub.stats().behind, 1);
        assert!(bench.hub.stats().queued_bytes <= 5000);
        assert!(!bench.hub.catch_up(10, &mut bench.model, &mut bench.out).unwrap(), "nothing to do without room");
        if compact {
            bench.model.compact(40);
            bench.model.clean();
            bench.publish();
        }
        bench.taking = true;
        bench.send(progress());
        (id, other, bench.sent())
    };

    let (id, _, sent) = run(false);
    let revisions: Vec<_> = sent.iter().flat_map(events).map(|seen| seen.kv.mod_revision).collect();
    assert_eq!(revisions, Vec::from_iter(2..=51));
    assert!(sent.iter().all(|response| response.watch_id == id || response.watch_id == -1));
    assert_eq!(header_revision(sent.last().unwrap()), 51);

    let (id, other, sent) = run(true);
    let delivered = sent.iter().flat_map(events).map(|seen| seen.kv.mod_revision).max().unwrap();
    assert!(delivered < 40);
    let canceled: Vec<_> = sent.iter().filter(|response| response.canceled).collect();
    assert_eq!(canceled.len(), 1);
    assert_eq!((canceled[0].watch_id, canceled[0].compact_revision, header_revision(canceled[0])), (id, 40, 0));
    // The stream's other watcher is alive: the waiting request for progress is answered for it.
    let progress = sent.last().unwrap();
    assert_eq!((progress.watch_id, header_revision(progress)), (-1, 51));
    assert_ne!(other, id);
}

// W-34: one stream that does not read stops nobody else.
#[test]
fn stalled_stream_does_not_hold_up_another() {
    let mut bench = Bench::with(HubConfig { stream_budget_bytes: 200, ..config() });
    bench.taking = false;
    bench.watch("a");
    let stalled = bench.stream;
    bench.stream = bench.hub.open_stream(0);
    bench.taking = true;
    bench.watch("a");
    let mut received = 0;
    for n in 2..40 {
        bench.put("a", "value");
        for outgoing in std::mem::take(&mut bench.out) {
            if outgoing.stream == bench.stream {
                assert_eq!(header_revision(&outgoing.response), n);
                bench.hub.on_taken(outgoing.stream, outgoing.bytes, &mut Vec::new());
                received += 1;
            }
        }
    }
    assert_eq!(received, 38);
    assert!(!bench.hub.accepts_requests(stalled) || bench.hub.stats().behind == 1);
}

// W-21, W-22, W-23, W-24, K-25
#[test]
fn prev_kv_is_the_record_before_the_change() {
    for live in [true, false] {
        let mut bench = Bench::new();
        let with_prev = |start| WatchCreateRequest { prev_kv: true, ..from(start) };
        let ids = live.then(|| (bench.create("a", with_prev(0)), bench.watch("a")));
        bench.put("a", "one");
        bench.put("a", "two");
        bench.delete("a");
        bench.put("a", "again");
        let (with, without) = ids.unwrap_or_else(|| (bench.create("a", with_prev(2)), bench.create("a", from(2))));
        let sent = bench.sent();
        let of = |id| sent.iter().filter(|r| r.watch_id == id).flat_map(events).collect::<Vec<_>>();
        let seen = of(with);
        let prev: Vec<_> = seen.iter().map(|seen| seen.prev.as_ref().map(|kv| kv.value.clone())).collect();
        assert_eq!(prev, [None, Some("one".into()), Some("two".into()), None], "live {live}");
        assert_eq!(seen[1].prev.as_ref().unwrap(), &seen[0].kv);
        assert_eq!((seen[1].kv.create_revision, seen[1].kv.version), (2, 2));
        assert_eq!((seen[3].kv.create_revision, seen[3].kv.version), (5, 1));
        let tombstone = KeyValue { key: "a".into(), mod_revision: 4, ..Default::default() };
        assert_eq!((seen[2].delete, &seen[2].kv), (true, &tombstone));
        assert!(of(without).iter().all(|seen| seen.prev.is_none()));
    }
}

// W-23: the record before is older than the compaction, but was current at it.
#[test]
fn prev_kv_below_the_compact_revision_is_sent_while_it_is_readable() {
    let mut bench = Bench::new();
    bench.put("a", "old");
    bench.put("b", "");
    bench.put("b", "");
    let id = bench.create("a", WatchCreateRequest { prev_kv: true, ..Default::default() });
    bench.model.compact(4);
    bench.model.clean();
    bench.put("a", "new");
    bench.model.put("a", "newer");
    bench.model.compact(6);
    bench.publish();
    let sent = bench.sent();
    assert!(sent.iter().all(|response| response.watch_id == id));
    let prev: Vec<_> = sent.iter().flat_map(events).map(|seen| seen.prev.map(|kv| kv.value)).collect();
    assert_eq!(prev, [Some("old".into()), None]);
}

// W-25
#[test]
fn filters_drop_events_but_no_answers() {
    let mut bench = Bench::new();
    let filters = |kinds: &[FilterType]| WatchCreateRequest {
        filters: kinds.iter().map(|kind| *kind as i32).collect(),
        ..Default::default()
    };
    let no_put = bench.create("a", filters(&[FilterType::Noput]));
    let no_delete = bench.create("a", filters(&[FilterType::Nodelete]));
    let none = bench.create("a", filters(&[FilterType::Nodelete, FilterType::Noput]));
    bench.put("a", "");
    bench.delete("a");
    let sent = bench.sent();
    assert_eq!(sent.len(), 2);
    assert_eq!((sent[0].watch_id, header_revision(&sent[0])), (no_delete, 2));
    assert_eq!((sent[1].watch_id, header_revision(&sent[1])), (no_put, 3));
    bench.send(cancel(none));
    bench.send(progress());
    assert_eq!(bench.sent().len(), 2);
}

// W-26, W-27, W-28, W-30, W-32, K-27
#[test]
fn events_of_a_revision_stay_together_and_in_order() {
    let mut bench = Bench::new();
    let range = bench.create("a", to("d"));
    let wide = bench.create("a", to("\0"));
    bench.model.txn(&[Op::Put("c", ""), Op::Put("a", ""), Op::Put("x", "")]);
    bench.model.txn(&[Op::Delete("a"), Op::Delete("c")]);
    bench.model.txn(&[Op::Put("x", "")]);
    // Three revisions in one message.
    bench.publish();
    let sent = bench.sent();
    let of = |id| {
        let of_watcher = sent.iter().filter(|response| response.watch_id == id);
        let keys = of_watcher.map(|r| (header_revision(r), events(r).into_iter().map(|seen| seen.kv.key).collect()));
        keys.collect::<Vec<(i64, Vec<bytes::Bytes>)>>()
    };
    assert_eq!(of(range), [(2, vec!["c".into(), "a".into()]), (3, vec!["a".into(), "c".into()])]);
    let expected =
        [(2, vec!["c".into(), "a".into(), "x".into()]), (3, vec!["a".into(), "c".into()]), (4, vec!["x".into()])];
    assert_eq!(of(wide), expected);
}

// W-29
#[test]
fn catch_up_answers_hold_at_most_a_thousand_revisions() {
    let mut bench = Bench::with(HubConfig { catch_up_bytes: usize::MAX, ..config() });
    for _ in 0..2500 {
        bench.model.put("a", "");
    }
    bench.publish();
    let id = bench.create("a", from(2));
    let sizes: Vec<_> = bench.revisions(id).iter().map(Vec::len).collect();
    assert_eq!(sizes, [1000, 1000, 500]);
}

// W-27, W-31
#[test]
fn only_fragments_part_a_revision() {
    for live in [true, false] {
        let mut bench = Bench::with(HubConfig { fragment_bytes: 1000, ..config() });
        let fragments = |start| WatchCreateRequest { fragment: true, ..to("\0") }.starting(start);
        let ids = live.then(|| (bench.create("a", fragments(0)), bench.create("a", to("\0"))));
        let big = "v".repeat(300);
        let huge = "v".repeat(3000);
        let keys: Vec<_> = (0..9).map(|n| format!("a{n}")).collect();
        let mut ops: Vec<_> = keys.iter().map(|key| Op::Put(key, &big)).collect();
        ops.insert(4, Op::Put("huge", &huge));
        bench.model.txn(&ops);
        bench.model.txn(&[Op::Put("one", &huge)]);
        bench.publish();
        let (split, whole) =
            ids.unwrap_or_else(|| (bench.create("a", fragments(2)), bench.create("a", to("\0").starting(2))));
        let sent = bench.sent();
        let of = |id| sent.iter().filter(|response| response.watch_id == id).collect::<Vec<_>>();
        let whole = of(whole);
        assert!(whole.iter().all(|response| !response.fragment));
        assert_eq!(whole.len(), if live { 2 } else { 1 });
        let split = of(split);
        assert!(split.len() > 4);
        for piece in &split {
            assert_eq!(piece.header, whole[if live && events(piece)[0].kv.mod_revision == 3 { 1 } else { 0 }].header);
            assert!(piece.events.len() == 1 || prost::Message::encoded_len(*piece) < 1000);
        }
        let last = |piece: &&&WatchResponse| !piece.fragment;
        assert_eq!(split.iter().filter(last).count(), whole.len());
        assert!(!split.last().unwrap().fragment);
        let all = |list: &[&WatchResponse]| list.iter().flat_map(|response| events(response)).collect::<Vec<_>>();
        assert_eq!(all(&split), all(&whole));
    }
}

// W-31: exactly at the limit it is split, below it is not.
#[test]
fn fragment_limit_is_inclusive() {
    let size = |fragment_bytes| {
        let mut bench = Bench::with(HubConfig { fragment_bytes, ..config() });
        bench.create("a", WatchCreateRequest { fragment: true, ..to("\0") });
        bench.model.txn(&[Op::Put("a", "value"), Op::Put("b", "value")]);
        bench.publish();
        let sent = bench.sent();
        (sent.len(), prost::Message::encoded_len(&sent[0]))
    };
    let (_, whole) = size(usize::MAX);
    assert_eq!(size(whole).0, 2);
    assert_eq!(size(whole + 1).0, 1);
}

// W-35, H-7
#[test]
fn nothing_is_lost_or_repeated_between_catch_up_and_live() {
    // The catch-up reads a view that is ahead of the messages, behind them a message is under way.
    let mut bench = Bench::new();
    for n in 0..10 {
        bench.put("a", &n.to_string());
    }
    bench.model.page_revisions = 4;
    let id = bench.create("a", from(2));
    bench.hub.catch_up(1, &mut bench.model, &mut bench.out).unwrap();
    bench.put("a", "live");
    bench.model.put("a", "ahead");
    assert!(!bench.hub.catch_up(9, &mut bench.model, &mut bench.out).unwrap());
    bench.model.put("a", "later");
    bench.publish();
    bench.put("a", "last");
    let got: Vec<_> = bench.revisions(id).concat();
    assert_eq!(got, Vec::from_iter(2..=15));
}

// W-36, W-37, H-55
#[test]
fn cancel_is_answered_once_and_unknown_ids_never() {
    let mut bench = Bench::new();
    bench.put("a", "");
    bench.watch("a");
    let id = bench.watch("a");
    bench.send(cancel(id));
    bench.send(cancel(id));
    bench.send(cancel(-1));
    bench.send(cancel(77));
    let sent = bench.sent();
    assert_eq!(sent.len(), 1);
    assert!(sent[0].canceled && !sent[0].created && sent[0].events.is_empty() && sent[0].cancel_reason.is_empty());
    assert_eq!((sent[0].watch_id, sent[0].compact_revision, header_revision(&sent[0])), (id, 0, 2));
    bench.put("a", "");
    assert_eq!(bench.revisions(0), [[3]]);
}

// W-38
#[test]
fn recreated_id_shows_nothing_of_the_old_watcher() {
    let mut bench = Bench::with(HubConfig { stream_budget_bytes: 300, ..config() });
    let with_id = |start| WatchCreateRequest { watch_id: 5, ..from(start) };
    bench.create("a", with_id(0));
    bench.taking = false;
    for _ in 0..30 {
        bench.put("a", "old");
    }
    bench.taking = true;
    for outgoing in std::mem::take(&mut bench.out) {
        bench.hub.on_taken(outgoing.stream, outgoing.bytes, &mut bench.out);
    }
    assert_eq!(bench.hub.stats().behind, 1);
    bench.send(cancel(5));
    bench.send(create(WatchCreateRequest { key: "b".into(), ..with_id(0) }));
    bench.put("a", "old");
    bench.put("b", "new");
    let sent = bench.sent();
    assert!(sent[0].canceled && sent[1].created);
    assert_eq!(sent.len(), 3);
    assert_eq!(events(&sent[2])[0].kv.key, "b");
}

// W-40
#[test]
fn periodic_progress_skips_watchers_that_had_events() {
    let mut bench = Bench::with(HubConfig { progress_interval_ms: 1000, ..config() });
    let notify = WatchCreateRequest { progress_notify: true, ..Default::default() };
    let busy = bench.create("a", notify.clone());
    let quiet = bench.create("b", notify);
    bench.watch("c");
    let first = bench.hub.next_tick().unwrap();
    assert!((1000..=1100).contains(&first));
    bench.put("a", "");
    bench.sent();
    bench.hub.on_tick(first - 1, &mut bench.out);
    assert!(bench.out.is_empty());
    bench.hub.on_tick(first, &mut bench.out);
    let sent = bench.sent();
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].watch_id, header_revision(&sent[0])), (quiet, 2));
    assert!(sent[0].events.is_empty() && !sent[0].created && !sent[0].canceled);
    assert_eq!(bench.hub.next_tick().unwrap(), 2 * first, "the interval of a stream is fixed");
    bench.hub.on_tick(2 * first, &mut bench.out);
    let ids: Vec<_> = bench.sent().iter().map(|response| response.watch_id).collect();
    assert_eq!(ids, [busy, quiet]);
}

// W-40: streams differ, by at most a tenth.
#[test]
fn progress_intervals_spread_by_a_tenth() {
    let mut hub = Hub::new(HubConfig { progress_interval_ms: 1000, ..config() }, 3);
    let mut intervals = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let id = hub.open_stream(0);
        intervals.insert(hub.next_tick().unwrap());
        hub.close_stream(id);
    }
    assert!(intervals.len() > 50);
    assert!(*intervals.first().unwrap() >= 1000 && *intervals.last().unwrap() <= 1100);
}

// W-41, W-42, W-43, W-45, H-5, K-28
#[test]
fn manual_progress_waits_for_watchers_that_lag() {
    let mut bench = Bench::new();
    bench.put("a", "");
    bench.put("a", "");
    bench.create("a", from(2));
    bench.send(progress());
    bench.send(progress());
    assert!(bench.out.is_empty());
    let sent = bench.sent();
    assert_eq!(sent.len(), 2, "events, then one answer for both requests");
    assert_eq!(sent[0].events.len(), 2);
    assert_eq!((sent[1].watch_id, header_revision(&sent[1]), sent[1].events.len()), (-1, 3, 0));
    // Synced: each request is answered at once.
    bench.send(progress());
    bench.send(progress());
    assert_eq!(bench.sent().len(), 2);
}

// W-42: what the client knows from elsewhere is not above the answer.
#[test]
fn manual_progress_is_not_below_the_revision_current_when_asked() {
    let mut bench = Bench::new();
    bench.watch("a");
    bench.model.put("a", "");
    bench.send(progress());
    assert_eq!(bench.sent(), []);
    bench.publish();
    let sent = bench.sent();
    assert_eq!(sent.iter().map(|response| response.watch_id).collect::<Vec<_>>(), [0, -1]);
    assert_eq!(header_revision(&sent[1]), 2);
}

// W-41, W-45: a catch-up may run ahead of the messages; progress then waits for them.
#[test]
fn progress_does_not_go_back_behind_events() {
    let mut bench = Bench::with(HubConfig { progress_interval_ms: 100, ..config() });
    bench.put("a", "2");
    let id = bench.create("a", WatchCreateRequest { progress_notify: true, ..from(2) });
    bench.model.put("a", "3");
    assert_eq!(bench.sent()[0].events.len(), 2);
    for tick in 1..4 {
        bench.hub.on_tick(tick * SECOND, &mut bench.out);
    }
    bench.send(progress());
    bench.model.put("b", "4");
    assert_eq!(bench.sent(), []);
    bench.publish();
    bench.hub.on_tick(4 * SECOND, &mut bench.out);
    let sent = bench.sent();
    assert_eq!(sent.iter().map(|r| (r.watch_id, header_revision(r))).collect::<Vec<_>>(), [(-1, 4), (id, 4)]);
    bench.put("a", "5");
    assert_eq!(bench.sent().len(), 1);
}

// W-43
#[test]
fn progress_without_watchers_has_no_answer() {
    let mut bench = Bench::new();
    bench.send(progress());
    let id = bench.watch("a");
    assert_eq!(bench.sent(), [], "the request is not remembered for later watchers");
    bench.send(progress());
    assert_eq!(bench.sent().len(), 1);
    bench.send(cancel(id));
    bench.send(progress());
    assert_eq!(bench.sent().len(), 1);
}

// W-43: cancelling the watcher that held it up frees the answer.
#[test]
fn waiting_progress_is_answered_when_the_laggard_is_cancelled() {
    let mut bench = Bench::new();
    bench.watch("a");
    let future = bench.create("a", from(100));
    bench.send(progress());
    assert_eq!(bench.sent(), []);
    bench.send(cancel(future));
    let sent = bench.sent();
    assert_eq!(sent.iter().map(|response| response.watch_id).collect::<Vec<_>>(), [future, -1]);
}

// W-51, H-6
#[test]
fn jump_of_the_revision_loses_and_repeats_nothing() {
    let mut bench = Bench::new();
    let id = bench.watch("a");
    bench.put("a", "2");
    for value in ["3", "4", "5"] {
        bench.model.put("a", value);
    }
    bench.jump();
    bench.put("a", "6");
    assert_eq!(bench.revisions(id).concat(), [2, 3, 4, 5, 6]);

    bench.model.put("a", "7");
    bench.model.put("a", "8");
    bench.model.compact(8);
    bench.model.clean();
    bench.jump();
    let sent = bench.sent();
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].watch_id, sent[0].canceled, sent[0].compact_revision), (id, true, 8));
}

// H-57
#[test]
fn creates_cancels_and_aborted_streams_leave_nothing() {
    let mut bench = Bench::new();
    bench.put("a", "");
    for n in 0..100_000i64 {
        let options = match n % 4 {
            0 => from(0),
            1 => from(1),
            2 => from(50),
            _ => to("\0"),
        };
        let id = bench.create("a", options);
        if n % 3 == 0 {
            bench.hub.close_stream(bench.stream);
            bench.stream = bench.hub.open_stream(0);
        } else {
            bench.send(cancel(id));
        }
        bench.out.clear();
        if n % 1000 == 0 {
            // Cancels are not taken here; do not let the stream fill.
            bench.hub.close_stream(bench.stream);
            bench.stream = bench.hub.open_stream(0);
        }
    }
    assert_eq!(bench.hub.stats().watchers, 0);
    bench.hub.close_stream(bench.stream);
    assert!(bench.hub.is_clean());
}

// W-55, K-32: every watcher that lags gets its turn.
#[test]
fn catch_up_steps_go_round() {
    let mut bench = Bench::with(HubConfig { catch_up_bytes: 1, ..config() });
    for n in 0..20 {
        bench.put("a", &n.to_string());
    }
    let mut expected = Vec::new();
    for _ in 0..3 {
        bench.stream = bench.hub.open_stream(0);
        for _ in 0..2 {
            let id = bench.create("a", from(2));
            expected.push((bench.stream, id));
        }
    }
    bench.hub.catch_up(6, &mut bench.model, &mut bench.out).unwrap();
    let mut served: Vec<_> = bench.out.iter().map(|outgoing| (outgoing.stream, outgoing.response.watch_id)).collect();
    served.sort_unstable();
    assert_eq!(served, expected, "six steps serve six watchers");
    assert!(bench.out.iter().all(|outgoing| outgoing.response.events.len() == 1), "a step is bounded by bytes");
}

// A stream whose client takes nothing is not asked for more.
#[test]
fn requests_wait_while_answers_are_not_taken() {
    let mut bench = Bench::with(HubConfig { stream_budget_bytes: 200, ..config() });
    bench.taking = false;
    let mut accepted = 0;
    while bench.hub.accepts_requests(bench.stream) {
        bench.watch("a");
        accepted += 1;
    }
    assert!((3..100).contains(&accepted));
    assert!(bench.hub.stats().queued_bytes < 300);
}

trait Starting {
    fn starting(self, start_revision: i64) -> Self;
}

impl Starting for WatchCreateRequest {
    fn starting(self, start_revision: i64) -> Self {
        Self { start_revision, ..self }
    }
}
