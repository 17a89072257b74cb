//! What the Kubernetes API server asks of its store, request by request in the shapes it uses (K-4 to K-35).

mod common;

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use actd::{
    mvcc::record::KeyValue,
    pb::etcdserverpb::{
        DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, StatusRequest,
        TxnRequest, TxnResponse, WatchCreateRequest,
        compare::{
            CompareResult::Equal,
            TargetUnion::{ModRevision, Version},
        },
    },
};
use common::{
    Client, EventRecord, Server,
    calls::{
        Op, PATIENCE, Watching, block_on, branch, compare, delete_of, etcd, get, keys, put, put_of, range_of, records,
        refusal, span, text,
    },
};
use tonic::Code;

const PODS: &str = "/registry/pods/";
const PODS_END: &str = "/registry/pods0";

/// A server and a test's calls to it.
fn with_client<F: Future<Output = ()>>(test: impl FnOnce(Client) -> F) {
    let server = Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), &[]);
    block_on(async { test(Client::connect(&server).await).await });
}

fn pod(name: &str) -> String {
    format!("{PODS}default/{name}")
}

fn revision_of(response: &TxnResponse) -> i64 {
    response.header.expect("a header").revision
}

/// K-18: the one shape of every write.
fn write(key: &str, expected: i64, change: RequestOp, otherwise: Option<RequestOp>) -> TxnRequest {
    let condition = compare(key.to_owned(), Equal, ModRevision(expected));
    branch([condition], [change], otherwise.into_iter().collect::<Vec<_>>())
}

fn create(key: &str, value: &str) -> TxnRequest {
    write(key, 0, put(key.to_owned(), value.to_owned()).op(), None)
}

fn update(key: &str, expected: i64, value: &str) -> TxnRequest {
    write(key, expected, put(key.to_owned(), value.to_owned()).op(), Some(get(key.to_owned()).op()))
}

fn remove(key: &str, expected: i64) -> TxnRequest {
    let delete = DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() };
    write(key, expected, delete.op(), Some(get(key.to_owned()).op()))
}

/// A transaction that must go through; its revision.
async fn done(c: &mut Client, request: TxnRequest) -> i64 {
    let response = c.txn(request).await.expect("a transaction");
    assert!(response.succeeded, "{response:?}");
    revision_of(&response)
}

#[test]
fn objects_are_created_updated_and_deleted_by_their_version() {
    with_client(|mut c| async move {
        let key = pod("a");
        // K-15, K-14, K-4: an absent key, of which only the revision counts.
        let health = c.range(get("/registry/health")).await.expect("a read");
        assert!(health.kvs.is_empty() && health.header.expect("a header").revision > 0);
        // K-18, K-19: the version is the header's, outside and inside.
        let created = c.txn(create(&key, "v1")).await.expect("a transaction");
        assert!(created.succeeded);
        let version = revision_of(&created);
        assert_eq!(put_of(&created.responses[0]).header.expect("a header").revision, version);
        assert_eq!(c.record(key.clone()).await.expect("it").mod_revision, version);
        // K-18: a second creation fails with nothing to say.
        let again = c.txn(create(&key, "other")).await.expect("a transaction");
        assert!(!again.succeeded && again.responses.is_empty());
        assert_eq!(revision_of(&again), version);
        // K-20: who comes with an old version gets the present object.
        let newer = done(&mut c, update(&key, version, "v2")).await;
        assert_eq!(newer, version + 1);
        for request in [update(&key, version, "late"), remove(&key, version), remove(&key, 0)] {
            let conflict = c.txn(request).await.expect("a transaction");
            assert!(!conflict.succeeded);
            let present = records(&range_of(&conflict.responses[0]).kvs).remove(0);
            assert_eq!(
                (text(&present.value), present.mod_revision, revision_of(&conflict)),
                ("v2".into(), newer, newer)
            );
        }
        // K-5
        let found = c.range(RangeRequest { limit: 1, ..get(key.clone()) }).await.expect("a read");
        assert_eq!((found.count, records(&found.kvs)[0].mod_revision), (1, newer));
        // K-19: a deletion too.
        let gone = c.txn(remove(&key, newer)).await.expect("a transaction");
        let deleted = delete_of(&gone.responses[0]);
        assert!(gone.succeeded && deleted.deleted == 1);
        assert_eq!((revision_of(&gone), deleted.header.expect("a header").revision), (newer + 1, newer + 1));
        // A conflict with an object that is gone shows none.
        let none = c.txn(update(&key, newer, "v3")).await.expect("a transaction");
        assert!(!none.succeeded && range_of(&none.responses[0]).kvs.is_empty());
        done(&mut c, create(&key, "again")).await;
    });
}

#[test]
fn racing_updates_of_one_object_all_get_in_once() {
    with_client(|mut c| async move {
        let key = pod("counter");
        done(&mut c, create(&key, "0")).await;
        // K-20, K-22
        let add = |mut c: Client| {
            let key = key.clone();
            async move {
                for _ in 0..20 {
                    let mut present = c.record(key.clone()).await.expect("it");
                    loop {
                        let next = text(&present.value).parse::<u32>().expect("a number") + 1;
                        let request = update(&key, present.mod_revision, &next.to_string());
                        let response = c.txn(request).await.expect("a transaction");
                        if response.succeeded {
                            break;
                        }
                        present = records(&range_of(&response.responses[0]).kvs).remove(0);
                    }
                }
            }
        };
        tokio::join!(add(c.clone()), add(c.clone()), add(c.clone()), add(c.clone()));
        let counter = c.record(key).await.expect("it");
        assert_eq!((text(&counter.value), counter.version), ("80".into(), 81));
    });
}

async fn page(c: &mut Client, from: &str, limit: i64, revision: i64) -> RangeResponse {
    c.range(RangeRequest { limit, revision, ..span(from.to_owned(), PODS_END) }).await.expect("a page")
}

#[test]
fn lists_are_paged_at_the_first_pages_revision() {
    with_client(|mut c| async move {
        let all: Vec<_> = (0..25).map(|n| pod(&format!("p{n:02}"))).collect();
        for key in &all {
            done(&mut c, create(key, "v")).await;
        }
        done(&mut c, create("/registry/nodes/n", "v")).await;
        done(&mut c, create("/registry/pods0", "v")).await;
        let (mut listed, mut from, mut revision) = (Vec::new(), PODS.to_owned(), 0);
        for pages in 1.. {
            // K-6, K-7
            let found = page(&mut c, &from, 10, revision).await;
            if revision == 0 {
                revision = found.header.expect("a header").revision;
            }
            listed.extend(keys(&found));
            from = format!("{}\0", listed.last().expect("a page has keys"));
            // K-8: what is left is count minus keys.
            let left = found.count - found.kvs.len() as i64;
            assert_eq!((left, found.more), (25 - listed.len() as i64, left > 0));
            // Written meanwhile: deleted, changed, new, none of which shows.
            let key = pod(&format!("p{:02}", 9 + pages));
            let version = c.record(key.clone()).await.expect("it").mod_revision;
            done(&mut c, remove(&key, version)).await;
            done(&mut c, create(&pod(&format!("p{pages:02}x")), "new")).await;
            if left == 0 {
                assert_eq!(pages, 3);
                break;
            }
        }
        assert_eq!(listed, all);
        // K-12, K-13
        let count = c.range(RangeRequest { count_only: true, ..span(PODS, PODS_END) }).await.expect("a count");
        assert_eq!((count.count, count.kvs.len()), (25, 0));
        let only_keys = c.range(RangeRequest { keys_only: true, ..span(PODS, PODS_END) }).await.expect("keys");
        assert!(only_keys.kvs.len() == 25 && records(&only_keys.kvs).iter().all(|kv| kv.value.is_empty()));
        // K-11: a page whose revision is gone, and one of a time that is yet to come.
        let now = c.revision().await;
        c.compact(now, false).await.expect("a compaction");
        let pinned = |revision| RangeRequest { limit: 10, revision, ..span(PODS, PODS_END) };
        let compacted = etcd(Code::OutOfRange, "mvcc: required revision has been compacted");
        assert_eq!(refusal(c.range(pinned(revision)).await), compacted);
        let future = etcd(Code::OutOfRange, "mvcc: required revision is a future revision");
        assert_eq!(refusal(c.range(pinned(now + 1_000)).await), future);
    });
}

#[test]
fn whole_lists_may_be_streamed() {
    with_client(|mut c| async move {
        for n in 0..120 {
            done(&mut c, create(&pod(&format!("p{n:03}")), "v")).await;
        }
        // K-16, K-17, K-9
        let request = RangeRequest { limit: 100, ..span(PODS, PODS_END) };
        let mut parts = c.kv.range_stream(request).await.expect("a stream").into_inner();
        let mut listed = 0;
        let last = loop {
            let part = parts.message().await.expect("no error").expect("a last one").range_response.expect("a part");
            assert!(!part.kvs.is_empty());
            listed += part.kvs.len();
            if part.header.is_some() {
                break part;
            }
        };
        assert!(parts.message().await.expect("no error").is_none());
        assert_eq!((listed, last.count, last.more, last.header.expect("a header").revision), (100, 120, true, 121));
    });
}

/// A cache of the objects below the prefix, as the API server keeps it.
#[derive(Default)]
struct Cache {
    objects: BTreeMap<String, KeyValue>,
    revision: i64,
}

impl Cache {
    async fn list(c: &mut Client) -> Self {
        let listed = page(c, PODS, 0, 0).await;
        let objects = records(&listed.kvs).into_iter().map(|kv| (text(&kv.key), kv)).collect();
        Self { objects, revision: listed.header.expect("a header").revision }
    }

    fn watch(&self) -> WatchCreateRequest {
        // K-24, K-32
        WatchCreateRequest {
            key: PODS.into(),
            range_end: PODS_END.into(),
            start_revision: self.revision + 1,
            prev_kv: true,
            progress_notify: true,
            ..Default::default()
        }
    }

    fn take(&mut self, event: &EventRecord) {
        let kv = event.kv.clone().expect("an event has a record");
        assert!(kv.mod_revision >= self.revision, "K-27: in order");
        self.revision = kv.mod_revision;
        let key = text(&kv.key);
        // K-21, K-25: what was there before comes along, and is what this cache has.
        let is_new = !event.is_delete() && kv.create_revision == kv.mod_revision;
        assert_eq!(event.prev_kv.is_none(), is_new, "{event:?}");
        assert_eq!(event.prev_kv, self.objects.get(&key).cloned(), "{event:?}");
        if event.is_delete() {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key, kv);
        }
    }

    /// Takes events until the cache has `revision`, asking for progress as the API server does.
    async fn follow(&mut self, watching: &mut Watching, revision: i64) {
        let deadline = Instant::now() + PATIENCE;
        while self.revision < revision {
            assert!(Instant::now() < deadline, "at {} of {revision}", self.revision);
            // K-29
            watching.ask_progress();
            while let Ok(response) = tokio::time::timeout(Duration::from_millis(100), watching.message()).await {
                let response = response.expect("no error").expect("the stream goes on");
                assert!(!response.canceled, "{response:?}");
                response.events.iter().map(EventRecord::decode_raw).for_each(|event| self.take(&event));
                if response.events.is_empty() && !response.created {
                    // K-28
                    let told = response.header.expect("a header").revision;
                    assert!(told >= self.revision && response.watch_id == -1, "{response:?}");
                    self.revision = told;
                    break;
                }
            }
        }
    }
}

#[test]
fn cache_that_lists_and_watches_stays_what_the_store_is() {
    with_client(|mut c| async move {
        for n in 0..10 {
            done(&mut c, create(&pod(&format!("p{n}")), "v")).await;
        }
        let mut cache = Cache::list(&mut c).await;
        assert_eq!(cache.objects.len(), 10);
        // Between list and watch: nothing may be lost (K-32).
        done(&mut c, create(&pod("between"), "v")).await;
        let mut watching = Watching::open(&c);
        watching.create(cache.watch());
        for round in 0..10 {
            for n in 0..10 {
                let key = pod(&format!("p{n}"));
                match c.record(key.clone()).await {
                    Some(kv) if (n + round) % 3 == 0 => done(&mut c, remove(&key, kv.mod_revision)).await,
                    Some(kv) => done(&mut c, update(&key, kv.mod_revision, &format!("{round}"))).await,
                    None => done(&mut c, create(&key, "new")).await,
                };
            }
            // Elsewhere: no event, but the revision goes on.
            c.set("/registry/leases/l", format!("{round}")).await;
            // K-14, K-29: a consistent read from the cache waits until it is as new as the store is now.
            let now = c.revision().await;
            cache.follow(&mut watching, now).await;
            let stored = Cache::list(&mut c).await;
            assert_eq!(cache.objects, stored.objects, "round {round}");
            assert!(cache.objects.contains_key(&pod("between")));
        }
    });
}

#[test]
fn progress_is_told_at_once_and_by_interval() {
    let flags = ["--watch-progress-notify-interval=200ms"];
    let server = Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), &flags);
    block_on(async {
        let mut c = Client::connect(&server).await;
        let cache = Cache::list(&mut c).await;
        let mut watching = Watching::on(&c, cache.watch()).await;
        let written = c.set("/registry/other", "v").await;
        // K-24, W-40
        let progress = loop {
            let response = watching.next().await;
            assert!(response.events.is_empty());
            if response.header.expect("a header").revision >= written {
                break response;
            }
        };
        assert_eq!((progress.watch_id, progress.created, progress.canceled), (0, false, false));
        // K-29, W-42: the whole stream, at once.
        let asked = Instant::now();
        loop {
            let response = watching.progress().await;
            if response.watch_id == -1 {
                assert_eq!(response.header.expect("a header").revision, written);
                break;
            }
        }
        assert!(asked.elapsed() < Duration::from_secs(3), "K-29 gives it that long");
    });
}

#[test]
fn watch_behind_a_compaction_ends_and_is_begun_anew() {
    with_client(|mut c| async move {
        let key = pod("a");
        let mut version = done(&mut c, create(&key, "v")).await;
        let old = Cache::list(&mut c).await;
        for n in 0..5 {
            version = done(&mut c, update(&key, version, &format!("{n}"))).await;
        }
        c.compact(version, false).await.expect("a compaction");
        // K-26: the old place is gone; a new list and its watch go on.
        let mut late = Watching::on(&c, old.watch()).await;
        let end = late.next().await;
        assert_eq!((end.canceled, end.compact_revision, end.events.len()), (true, version, 0));
        let mut cache = Cache::list(&mut c).await;
        let mut watching = Watching::on(&c, cache.watch()).await;
        let gone = done(&mut c, remove(&key, version)).await;
        cache.follow(&mut watching, gone).await;
        assert!(cache.objects.is_empty());
    });
}

/// What one API server does every five minutes: the revision noted last and its own look at it.
async fn compactor_round(c: &mut Client, term: i64) -> (bool, i64, i64) {
    // K-33
    let now = c.revision().await;
    let request = branch(
        [compare("compact_rev_key", Equal, Version(term))],
        [put("compact_rev_key", now.to_string()).op()],
        [get("compact_rev_key").op()],
    );
    let response = c.txn(request).await.expect("a transaction");
    let revision = revision_of(&response);
    if response.succeeded {
        return (true, term + 1, revision);
    }
    let found = records(&range_of(&response.responses[0]).kvs).remove(0);
    (false, found.version, revision)
}

#[test]
fn one_of_several_api_servers_compacts() {
    with_client(|mut c| async move {
        done(&mut c, create(&pod("a"), "v")).await;
        // Two servers begin without knowing the key: one of them wins each round.
        let (won, term_one, mut revision) = compactor_round(&mut c, 0).await;
        assert!(won && term_one == 1);
        let (won, term_two, _) = compactor_round(&mut c, 0).await;
        assert!(!won && term_two == 1, "the other one learns the term");
        let mut term = term_one;
        for round in 0..4 {
            for n in 0..5 {
                c.set(format!("/registry/x{n}"), format!("{round}")).await;
            }
            let before = revision;
            (_, term, revision) = compactor_round(&mut c, term).await;
            c.compact(before, false).await.expect("the revision of the round before");
            // K-34: the other one's turn with an old term, and a compaction that is no longer needed.
            let (won, learned, _) = compactor_round(&mut c, term - 1).await;
            assert!(!won && learned == term);
            let compacted = etcd(Code::OutOfRange, "mvcc: required revision has been compacted");
            assert_eq!(refusal(c.compact(before, false).await), compacted);
        }
        let note = c.record("compact_rev_key").await.expect("an ordinary key");
        assert_eq!(note.version, 5);
    });
}

#[test]
fn events_of_one_lease_go_together_while_other_objects_stay() {
    with_client(|mut c| async move {
        // K-35: an id of the server's choice, for many objects, never renewed.
        let lease = c.lease.lease_grant(LeaseGrantRequest { ttl: 6, id: 0 }).await.expect("a lease").into_inner();
        assert!(lease.id > 0 && lease.ttl == 6);
        for n in 0..50 {
            let key = format!("/registry/events/e{n:02}");
            let leased = PutRequest { lease: lease.id, ..put(key.clone(), "v") };
            done(&mut c, write(&key, 0, leased.op(), None)).await;
        }
        done(&mut c, create(&pod("a"), "v")).await;
        let create = WatchCreateRequest {
            key: "/registry/events/".into(),
            range_end: "/registry/events0".into(),
            prev_kv: true,
            ..Default::default()
        };
        let mut watching = Watching::on(&c, create).await;
        let response = watching.next().await;
        let events: Vec<_> = response.events.iter().map(EventRecord::decode_raw).collect();
        assert_eq!(events.len(), 50);
        let revision = c.revision().await;
        for event in events {
            assert!(event.is_delete() && event.kv.expect("a record").mod_revision == revision);
            assert_eq!(event.prev_kv.expect("K-25").lease, lease.id);
        }
        assert!(c.record(pod("a")).await.is_some());
    });
}

#[test]
fn status_and_large_objects_are_as_the_api_server_needs_them() {
    with_client(|mut c| async move {
        // K-30, K-31
        let status = c.maintenance.status(StatusRequest {}).await.expect("a status").into_inner();
        let numbers: Vec<u32> = status.version.split('.').map(|n| n.parse().expect("semantic")).collect();
        assert!(numbers.len() == 3 && numbers >= vec![3, 5, 13], "{}", status.version);
        assert!(status.db_size > 0);
        // K-23
        let key = pod("large");
        let large = |bytes: usize| write(&key, 0, put(key.clone(), vec![b'x'; bytes]).op(), None);
        let too_large = etcd(Code::InvalidArgument, "request is too large");
        assert_eq!(refusal(c.txn(large(1_572_864)).await), too_large);
        done(&mut c, large(1_500_000)).await;
        // K-10: an answer of tens of MB.
        for n in 0..15 {
            let key = pod(&format!("large{n}"));
            done(&mut c, write(&key, 0, put(key.clone(), vec![b'x'; 1_400_000]).op(), None)).await;
        }
        let listed = page(&mut c, PODS, 10_000, 0).await;
        let bytes: usize = records(&listed.kvs).iter().map(|kv| kv.value.len()).sum();
        assert_eq!((listed.kvs.len(), bytes), (16, 1_500_000 + 15 * 1_400_000));
    });
}
