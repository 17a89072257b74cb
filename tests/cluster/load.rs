//! Clients under load: writers, readers, a watcher and a lease holder, which note what they did and what they were told.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use actd::mvcc::record::KeyValue;
use actd::pb::etcdserverpb::{
    Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest, PutRequest, RangeRequest, RequestOp,
    TxnRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, compare, request_op::Request as OpRequest,
    watch_request::RequestUnion,
};
use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{sync::mpsc::Sender, task::JoinSet};
use tonic::{Code, Status};

use crate::{
    common::{Client, EventRecord},
    history::{self, Call, Event, Found, Op, Outcome},
    members::{Cluster, Member, PATIENCE},
};

const KEYS: usize = 20;
/// What a client waits for an answer.
const TIMEOUT: Duration = Duration::from_millis(1500);
const LEASE_TTL: i64 = 5;
const LEASED: &str = "leased/";
/// Keys whose every change is noted.
const OWN: &str = "k";

/// Runs until it is finished; members are told to it so that it goes on with those that are there.
pub struct Load {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

struct Shared {
    began: Instant,
    stop: AtomicBool,
    /// Clients of all members, newest list.
    clients: Mutex<Vec<Client>>,
    ops: Mutex<Vec<Op>>,
    /// Time of the newest acknowledged write, in µs.
    newest_write: AtomicU64,
    /// The longest time between two acknowledged writes, in µs.
    longest_gap: AtomicU64,
    values: AtomicU64,
    /// Whether progress is asked for.
    bookmarked: bool,
    /// Answers that told how far a watcher is.
    bookmarks: AtomicU64,
    complaints: Mutex<Vec<String>>,
}

impl Shared {
    fn now(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    fn client(&self, rng: &mut StdRng) -> Client {
        let clients = self.clients.lock().unwrap();
        clients[rng.random_range(0..clients.len())].clone()
    }

    fn stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    fn complain(&self, text: String) {
        self.complaints.lock().unwrap().push(text);
    }

    fn note(&self, client: usize, call: Call, start: u64, outcome: Result<Outcome, Status>) {
        let end = self.now();
        let writes = !matches!(call, Call::Get { .. } | Call::GetSerializable { .. });
        let outcome =
            outcome.unwrap_or_else(|e| if certainly_nothing(&e) { Outcome::Refused } else { Outcome::Unknown });
        if writes && matches!(outcome, Outcome::Done { .. }) {
            let before = self.newest_write.swap(end, Relaxed);
            self.longest_gap.fetch_max(end.saturating_sub(before), Relaxed);
        }
        self.ops.lock().unwrap().push(Op { client, call, start, end, outcome });
    }
}

/// D-20.
fn certainly_nothing(status: &Status) -> bool {
    let open = [Code::Unavailable, Code::DeadlineExceeded, Code::Cancelled, Code::Unknown, Code::Internal];
    !open.contains(&status.code()) || status.message() == "etcdserver: too many requests"
}

async fn within<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(TIMEOUT, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Status::deadline_exceeded("the client gave up")),
    }
}

impl Load {
    /// `writers` and as many readers, one watcher per member, one lease holder.
    pub fn start(cluster: &Cluster, writers: usize, seed: u64) -> Self {
        Self::begin(cluster, writers, seed, true)
    }

    /// As `start`, on servers whose bookmarks overtake events: etcd before 3.4.25 and 3.5.8 (H-5).
    pub fn start_without_bookmarks(cluster: &Cluster, writers: usize, seed: u64) -> Self {
        Self::begin(cluster, writers, seed, false)
    }

    fn begin(cluster: &Cluster, writers: usize, seed: u64, bookmarked: bool) -> Self {
        let shared = Arc::new(Shared {
            began: Instant::now(),
            stop: AtomicBool::new(false),
            clients: Mutex::new(cluster.members.iter().map(Member::client).collect()),
            ops: Mutex::default(),
            newest_write: AtomicU64::new(0),
            longest_gap: AtomicU64::new(0),
            values: AtomicU64::new(0),
            bookmarked,
            bookmarks: AtomicU64::new(0),
            complaints: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        for i in 0..writers {
            tasks.spawn(write(shared.clone(), i, StdRng::seed_from_u64(seed + i as u64)));
            tasks.spawn(read(shared.clone(), writers + i, StdRng::seed_from_u64(seed + 100 + i as u64)));
        }
        tasks.spawn(hold_lease(shared.clone(), StdRng::seed_from_u64(seed + 200)));
        for i in 0..cluster.members.len() {
            tasks.spawn(watch(shared.clone(), i, StdRng::seed_from_u64(seed + 300 + i as u64)));
        }
        Self { shared, tasks }
    }

    /// The members have changed.
    pub fn use_members(&self, cluster: &Cluster) {
        *self.shared.clients.lock().unwrap() = cluster.members.iter().map(Member::client).collect();
    }

    pub fn acknowledged(&self) -> usize {
        let ops = self.shared.ops.lock().unwrap();
        ops.iter().filter(|op| matches!(op.outcome, Outcome::Done { applied: true, .. })).count()
    }

    /// Waits until `n` more calls have been answered.
    pub async fn progress(&self, n: usize) {
        let wanted = self.acknowledged() + n;
        let deadline = Instant::now() + PATIENCE;
        while self.acknowledged() < wanted {
            assert!(Instant::now() < deadline, "the load does not go on: {} of {wanted}", self.acknowledged());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Forgets gaps between writes so far.
    pub fn reset_gap(&self) {
        self.shared.newest_write.store(self.shared.now(), Relaxed);
        self.shared.longest_gap.store(0, Relaxed);
    }

    /// The longest time without an acknowledged write since then.
    pub fn longest_gap(&self) -> Duration {
        let now = self.shared.now().saturating_sub(self.shared.newest_write.load(Relaxed));
        Duration::from_micros(self.shared.longest_gap.load(Relaxed).max(now))
    }

    /// Ends the load, waits for the members to come together, and checks everything that was noted.
    pub async fn finish(mut self, cluster: &Cluster) -> Summary {
        self.shared.stop.store(true, Relaxed);
        while self.tasks.join_next().await.is_some() {}
        cluster.until_led().await;
        cluster.until_equal().await;
        let complaints = std::mem::take(&mut *self.shared.complaints.lock().unwrap());
        assert!(complaints.is_empty(), "{complaints:#?}");
        let events = whole_history(&cluster.members[0]).await;
        let ops = std::mem::take(&mut *self.shared.ops.lock().unwrap());
        let of_ops: Vec<Event> = events.iter().filter(|e| e.key.starts_with(OWN)).cloned().collect();
        if let Err(e) = history::check(&ops, &of_ops) {
            panic!("{e}");
        }
        let count = |wanted: fn(&Outcome) -> bool| ops.iter().filter(|op| wanted(&op.outcome)).count();
        let summary = Summary {
            done: count(|o| matches!(o, Outcome::Done { .. })),
            refused: count(|o| *o == Outcome::Refused),
            unknown: count(|o| *o == Outcome::Unknown),
            events: events.len(),
            several: ops
                .iter()
                .filter(|op| matches!((&op.call, &op.outcome), (Call::PutAll { .. }, Outcome::Done { .. })))
                .count(),
            bookmarks: self.shared.bookmarks.load(Relaxed),
        };
        assert!(
            summary.done > 0 && summary.several > 0 && (summary.bookmarks > 0 || !self.shared.bookmarked),
            "{summary:?}"
        );
        summary
    }
}

#[derive(Debug)]
#[allow(dead_code)] // printed
pub struct Summary {
    pub done: usize,
    pub refused: usize,
    pub unknown: usize,
    pub events: usize,
    /// Transactions that put several keys.
    pub several: usize,
    pub bookmarks: u64,
}

async fn write(shared: Arc<Shared>, client: usize, mut rng: StdRng) {
    let mut kv = shared.client(&mut rng).kv;
    let mut known: BTreeMap<String, i64> = BTreeMap::new();
    while !shared.stopped() {
        let key = format!("{OWN}{:02}", rng.random_range(0..KEYS));
        let value = format!("v{}", shared.values.fetch_add(1, Relaxed));
        let start = shared.now();
        let (call, outcome) = match rng.random_range(0..10) {
            0 => {
                let request = DeleteRangeRequest { key: key.clone().into(), ..Default::default() };
                let done = within(kv.delete_range(request)).await;
                let done = done.map(|answer| Outcome::Done {
                    revision: answer.header.map_or(0, |h| h.revision),
                    found: None,
                    applied: answer.deleted > 0,
                });
                (Call::Delete { key: key.clone() }, done)
            }
            1..4 => {
                let mod_revision = known.get(&key).copied().unwrap_or(0);
                let put = PutRequest { key: key.clone().into(), value: value.clone().into(), ..Default::default() };
                let request = TxnRequest {
                    compare: vec![Compare {
                        result: compare::CompareResult::Equal.into(),
                        target: compare::CompareTarget::Mod.into(),
                        key: key.clone().into(),
                        target_union: Some(compare::TargetUnion::ModRevision(mod_revision)),
                        ..Default::default()
                    }],
                    success: vec![RequestOp { request: Some(OpRequest::RequestPut(put)) }],
                    failure: vec![],
                };
                let done = within(kv.txn(request)).await.map(|answer| Outcome::Done {
                    revision: answer.header.map_or(0, |h| h.revision),
                    found: None,
                    applied: answer.succeeded,
                });
                (Call::PutIf { key: key.clone(), mod_revision, value }, done)
            }
            4..6 => {
                let pairs = several(&shared, key.clone(), value, &mut rng);
                let put = |(key, value): &(String, String)| {
                    let put = PutRequest { key: key.clone().into(), value: value.clone().into(), ..Default::default() };
                    RequestOp { request: Some(OpRequest::RequestPut(put)) }
                };
                let request = TxnRequest { success: pairs.iter().map(put).collect(), ..Default::default() };
                let done = within(kv.txn(request)).await.map(|answer| Outcome::Done {
                    revision: answer.header.map_or(0, |h| h.revision),
                    found: None,
                    applied: answer.succeeded,
                });
                (Call::PutAll { pairs }, done)
            }
            _ => {
                let request = PutRequest { key: key.clone().into(), value: value.clone().into(), ..Default::default() };
                let done = within(kv.put(request)).await.map(|answer| Outcome::Done {
                    revision: answer.header.map_or(0, |h| h.revision),
                    found: None,
                    applied: true,
                });
                (Call::Put { key: key.clone(), value }, done)
            }
        };
        match &outcome {
            Ok(Outcome::Done { revision, applied: true, .. }) => {
                known.insert(key, *revision);
            }
            Ok(_) => {
                known.remove(&key);
            }
            Err(_) => kv = shared.client(&mut rng).kv,
        }
        shared.note(client, call, start, outcome);
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..8))).await;
    }
}

/// A pair and one or two of other keys, each with a value of its own.
fn several(shared: &Shared, key: String, value: String, rng: &mut StdRng) -> Vec<(String, String)> {
    let mut pairs = BTreeMap::from([(key, value)]);
    let wanted = rng.random_range(2..=3);
    while pairs.len() < wanted {
        let key = format!("{OWN}{:02}", rng.random_range(0..KEYS));
        pairs.entry(key).or_insert_with(|| format!("v{}", shared.values.fetch_add(1, Relaxed)));
    }
    pairs.into_iter().collect()
}

async fn read(shared: Arc<Shared>, client: usize, mut rng: StdRng) {
    while !shared.stopped() {
        // Any member must answer right, so each is asked.
        let mut kv = shared.client(&mut rng).kv;
        let key = format!("{OWN}{:02}", rng.random_range(0..KEYS));
        let serializable = rng.random_bool(0.2);
        let start = shared.now();
        let request = RangeRequest { key: key.clone().into(), serializable, ..Default::default() };
        let outcome = within(kv.range(request)).await.map(|answer| Outcome::Done {
            revision: answer.header.map_or(0, |h| h.revision),
            found: answer.kvs.first().map(|kv| {
                let kv: KeyValue = prost::Message::decode(kv.0.clone()).expect("a row");
                (String::from_utf8_lossy(&kv.value).into_owned(), kv.mod_revision)
            }) as Found,
            applied: false,
        });
        let call = if serializable { Call::GetSerializable { key } } else { Call::Get { key } };
        shared.note(client, call, start, outcome);
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..8))).await;
    }
}

/// Everything from the first revision on as one member tells it.
async fn whole_history(member: &Member) -> Vec<Event> {
    let deadline = Instant::now() + PATIENCE;
    let mut client = member.client();
    let range = RangeRequest { key: b"\0".to_vec().into(), range_end: b"\0".to_vec().into(), ..Default::default() };
    let newest = client.kv.range(range).await.expect("a range").into_inner().header.map_or(0, |h| h.revision);
    let mut watching = Watching::new();
    while watching.next <= newest {
        assert!(Instant::now() < deadline, "the history stops at {} of {newest}", watching.next);
        let _ = watching.run(&mut client, Ask::PREVIOUS, |watching| watching.next > newest).await;
    }
    assert!(watching.complaints.is_empty(), "{:#?}", watching.complaints);
    watching.events
}

/// What a watcher wants beside the events.
#[derive(Clone, Copy)]
struct Ask {
    previous: bool,
    /// Asks how far it is, after each answer and when it is quiet.
    bookmarks: bool,
}

impl Ask {
    const PREVIOUS: Self = Self { previous: true, bookmarks: false };
    /// A member that is asked for progress has its answer long before, if it has one.
    const QUIET: Duration = Duration::from_millis(100);
}

/// A watcher of all keys that begins where it was cut off.
struct Watching {
    next: i64,
    /// What was told last: a bookmark, or events.
    bookmark: Option<i64>,
    bookmarks: u64,
    events: Vec<Event>,
    /// All keys as they are after the newest event.
    state: HashMap<Bytes, KeyValue>,
    complaints: Vec<String>,
}

impl Watching {
    fn new() -> Self {
        let (events, state, complaints) = (Vec::new(), HashMap::new(), Vec::new());
        Self { next: 1, bookmark: None, bookmarks: 0, events, state, complaints }
    }

    async fn run(&mut self, client: &mut Client, ask: Ask, enough: impl Fn(&Self) -> bool) -> Result<(), Status> {
        let create = WatchCreateRequest {
            key: b"\0".to_vec().into(),
            range_end: b"\0".to_vec().into(),
            start_revision: self.next,
            prev_kv: ask.previous,
            ..Default::default()
        };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // The request side stays open as long as the answers are read.
        let (sender, requests) = tokio::sync::mpsc::channel(1);
        let _ = sender.send(request).await;
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let mut answers = client.watch.watch(requests).await?.into_inner();
        let (mut heard, mut created) = (Instant::now(), false);
        while !enough(self) {
            let answer = match tokio::time::timeout(Ask::QUIET, answers.message()).await {
                Ok(answer) => answer?.ok_or_else(|| Status::unavailable("the stream ended"))?,
                Err(_) if heard.elapsed() > TIMEOUT => return Ok(()),
                Err(_) => {
                    ask_for_bookmark(&sender, ask);
                    continue;
                }
            };
            heard = Instant::now();
            if answer.canceled {
                self.complaints.push(format!("cancelled at {}: {}", self.next, answer.cancel_reason));
                return Ok(());
            }
            created |= answer.created;
            if answer.events.is_empty() {
                // One that comes before the watcher says nothing about it (W-44).
                if created && !answer.created {
                    self.take_bookmark(answer.header.map_or(0, |header| header.revision));
                }
                continue;
            }
            self.take_events(answer.events.iter().map(EventRecord::decode_raw).collect(), ask);
            ask_for_bookmark(&sender, ask);
        }
        Ok(())
    }

    /// All up to this revision has been told (W-41), so that a new start behind it misses nothing.
    fn take_bookmark(&mut self, revision: i64) {
        // W-45; the revision before the first that is asked for is a bookmark, too.
        if revision < self.next - 1 {
            self.complaints.push(format!("a bookmark at {revision} after {}", self.next - 1));
        }
        self.bookmarks += 1;
        self.bookmark = Some(revision);
        self.next = self.next.max(revision + 1);
    }

    fn take_events(&mut self, raw: Vec<EventRecord>, ask: Ask) {
        let records: Vec<(EventRecord, Event)> = raw
            .into_iter()
            .map(|record| {
                let event = Event::from(&record);
                (record, event)
            })
            .collect();
        for pair in records.windows(2) {
            // W-56: in order; keys of one revision in order, too, so none is there twice.
            let (one, other) = (&pair[0].1, &pair[1].1);
            if (one.revision, &one.key) >= (other.revision, &other.key) {
                self.complaints.push(format!("out of order: {one:?}, {other:?}"));
            }
        }
        for (record, event) in records {
            if event.revision < self.next {
                let after = self.next - 1;
                self.complaints.push(format!("{event:?} after {after}, a bookmark: {:?}", self.bookmark));
            }
            self.take_state(record, ask, event.revision);
            self.events.push(event);
        }
        if let Some(last) = self.events.last() {
            // All of a revision comes at once (W-56), so the next begins after it.
            self.next = self.next.max(last.revision + 1);
        }
    }

    /// The previous value is the one the events before have left.
    fn take_state(&mut self, record: EventRecord, ask: Ask, revision: i64) {
        let is_delete = record.is_delete();
        let kv = record.kv.expect("every event has its key");
        let key = kv.key.clone();
        let before = if is_delete { self.state.remove(&key) } else { self.state.insert(key, kv) };
        let wanted = if ask.previous { before } else { None };
        if record.prev_kv != wanted {
            self.complaints.push(format!("before {revision} there was {wanted:?}, not {:?}", record.prev_kv));
        }
    }
}

/// One request at a time is enough.
fn ask_for_bookmark(sender: &Sender<WatchRequest>, ask: Ask) {
    if ask.bookmarks {
        let request = RequestUnion::ProgressRequest(WatchProgressRequest {});
        let _ = sender.try_send(WatchRequest { request_union: Some(request) });
    }
}

impl From<&EventRecord> for Event {
    fn from(record: &EventRecord) -> Self {
        let kv = record.kv.as_ref().expect("every event has its key");
        Self {
            revision: kv.mod_revision,
            key: String::from_utf8_lossy(&kv.key).into_owned(),
            value: (!record.is_delete()).then(|| String::from_utf8_lossy(&kv.value).into_owned()),
        }
    }
}

/// A watcher that moves from member to member must see the one history, each event once (W-51, W-56).
async fn watch(shared: Arc<Shared>, which: usize, mut rng: StdRng) {
    let mut watching = Watching::new();
    while !shared.stopped() {
        let mut client = shared.client(&mut rng);
        // With and without what only some ask for; a new start is right behind a bookmark, where there are any.
        let ask = Ask { previous: rng.random_bool(0.5), bookmarks: shared.bookmarked && rng.random_bool(0.7) };
        let stay = watching.events.len() + rng.random_range(50..400);
        let stop = shared.clone();
        let enough = |watching: &Watching| {
            let rests = !ask.bookmarks || watching.bookmark.is_some_and(|at| at + 1 == watching.next);
            watching.events.len() >= stay && rests || stop.stopped()
        };
        if watching.run(&mut client, ask, enough).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    shared.bookmarks.fetch_add(watching.bookmarks, Relaxed);
    // What it saw is a beginning of the history as any member tells it now.
    let deadline = Instant::now() + PATIENCE;
    let mut again = Watching::new();
    // A bookmark may stand behind the newest event.
    let newest = watching.events.last().map_or(0, |event| event.revision);
    while again.next <= newest && Instant::now() < deadline {
        let mut client = shared.client(&mut rng);
        let _ = again.run(&mut client, Ask::PREVIOUS, |again| again.next > newest).await;
    }
    again.events.truncate(watching.events.len());
    if again.events != watching.events {
        let at = again.events.iter().zip(&watching.events).position(|(a, b)| a != b);
        shared.complain(format!(
            "watcher {which} saw another history: {} events instead of {}, first difference at {at:?}",
            watching.events.len(),
            again.events.len()
        ));
    }
    for complaint in watching.complaints {
        shared.complain(format!("watcher {which}: {complaint}"));
    }
}

/// A key under a lease that is renewed: it must be there as long as the last renewal promised (L-9, L-17).
async fn hold_lease(shared: Arc<Shared>, mut rng: StdRng) {
    let mut generation = 0;
    while !shared.stopped() {
        let mut client = shared.client(&mut rng);
        let grant = LeaseGrantRequest { ttl: LEASE_TTL, id: 0 };
        let Ok(granted) = within(client.lease.lease_grant(grant)).await else { continue };
        generation += 1;
        let key = format!("{LEASED}{generation}");
        let put =
            PutRequest { key: key.clone().into(), value: key.clone().into(), lease: granted.id, ..Default::default() };
        if within(client.kv.put(put)).await.is_err() {
            continue;
        }
        let mut promised = Instant::now();
        while !shared.stopped() {
            let mut client = shared.client(&mut rng);
            let asked = Instant::now();
            let (sender, requests) = tokio::sync::mpsc::channel(1);
            let _ = sender.send(LeaseKeepAliveRequest { id: granted.id }).await;
            let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
            let renewed = tokio::time::timeout(TIMEOUT, async {
                let mut answers = client.lease.lease_keep_alive(requests).await?.into_inner();
                answers.message().await
            })
            .await;
            match renewed {
                Ok(Ok(Some(answer))) if answer.ttl > 0 => {
                    promised = asked + Duration::from_secs(answer.ttl.unsigned_abs());
                }
                Ok(Ok(Some(_))) => {
                    if Instant::now() < promised {
                        shared.complain(format!(
                            "lease {:x} is gone {:?} early",
                            granted.id,
                            promised - Instant::now()
                        ));
                    }
                    break;
                }
                _ => {}
            }
            let request = RangeRequest { key: key.clone().into(), ..Default::default() };
            if let Ok(answer) = within(client.kv.range(request)).await
                && answer.kvs.is_empty()
            {
                if Instant::now() < promised {
                    shared.complain(format!("{key} is gone {:?} early", promised - Instant::now()));
                }
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
