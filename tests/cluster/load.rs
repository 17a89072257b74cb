//! Clients under load: writers, readers, a watcher and a lease holder, which note what they did and what they were told.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use actd::mvcc::record::KeyValue;
use actd::pb::etcdserverpb::{
    Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest, PutRequest, RangeRequest, RequestOp,
    TxnRequest, WatchCreateRequest, WatchRequest, compare, request_op::Request as OpRequest,
    watch_request::RequestUnion,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::task::JoinSet;
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
        let writes = matches!(call, Call::Put { .. } | Call::Delete { .. } | Call::PutIf { .. });
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
        let shared = Arc::new(Shared {
            began: Instant::now(),
            stop: AtomicBool::new(false),
            clients: Mutex::new(cluster.members.iter().map(Member::client).collect()),
            ops: Mutex::default(),
            newest_write: AtomicU64::new(0),
            longest_gap: AtomicU64::new(0),
            values: AtomicU64::new(0),
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
        };
        assert!(summary.done > 0);
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
        let _ = watching.run(&mut client, |events| events.last().is_some_and(|e| e.revision >= newest)).await;
    }
    assert!(watching.complaints.is_empty(), "{:#?}", watching.complaints);
    watching.events
}

/// A watcher of all keys that begins where it was cut off.
struct Watching {
    next: i64,
    events: Vec<Event>,
    complaints: Vec<String>,
}

impl Watching {
    fn new() -> Self {
        Self { next: 1, events: Vec::new(), complaints: Vec::new() }
    }

    async fn run(&mut self, client: &mut Client, enough: impl Fn(&[Event]) -> bool) -> Result<(), Status> {
        let create = WatchCreateRequest {
            key: b"\0".to_vec().into(),
            range_end: b"\0".to_vec().into(),
            start_revision: self.next,
            ..Default::default()
        };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // The request side stays open as long as the answers are read.
        let (sender, requests) = tokio::sync::mpsc::channel(1);
        let _ = sender.send(request).await;
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let mut answers = client.watch.watch(requests).await?.into_inner();
        while !enough(&self.events) {
            let answer = match tokio::time::timeout(TIMEOUT, answers.message()).await {
                Ok(answer) => answer?.ok_or_else(|| Status::unavailable("the stream ended"))?,
                Err(_) => return Ok(()),
            };
            if answer.canceled {
                self.complaints.push(format!("cancelled at {}: {}", self.next, answer.cancel_reason));
                return Ok(());
            }
            let events: Vec<Event> = answer.events.iter().map(decode).collect();
            for pair in events.windows(2) {
                // W-56: in order; keys of one revision in order, too, so none is there twice.
                if (pair[0].revision, &pair[0].key) >= (pair[1].revision, &pair[1].key) {
                    self.complaints.push(format!("out of order: {pair:?}"));
                }
            }
            if let Some(first) = events.first()
                && first.revision < self.next
            {
                self.complaints.push(format!("{first:?} again, after {}", self.next - 1));
            }
            if let Some(last) = events.last() {
                // All of a revision comes at once, so the next begins after it.
                self.next = last.revision + 1;
            }
            self.events.extend(events);
        }
        Ok(())
    }
}

fn decode(raw: &actd::mvcc::record::RawEvent) -> Event {
    let event = EventRecord::decode_raw(raw);
    let is_delete = event.is_delete();
    let kv = event.kv.expect("every event has its key");
    Event {
        revision: kv.mod_revision,
        key: String::from_utf8_lossy(&kv.key).into_owned(),
        value: (!is_delete).then(|| String::from_utf8_lossy(&kv.value).into_owned()),
    }
}

/// A watcher that moves from member to member must see the one history, each event once (W-51, W-56).
async fn watch(shared: Arc<Shared>, which: usize, mut rng: StdRng) {
    let mut watching = Watching::new();
    while !shared.stopped() {
        let mut client = shared.client(&mut rng);
        let stay = watching.events.len() + rng.random_range(50..400);
        let stop = shared.clone();
        if watching.run(&mut client, |events| events.len() >= stay || stop.stopped()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    // What it saw is a beginning of the history as any member tells it now.
    let deadline = Instant::now() + PATIENCE;
    let mut again = Watching::new();
    while again.next < watching.next && Instant::now() < deadline {
        let mut client = shared.client(&mut rng);
        let wanted = watching.next - 1;
        let _ = again.run(&mut client, |events| events.last().is_some_and(|e| e.revision >= wanted)).await;
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
