//! kill -9 under load from many writers, again and again: nothing acknowledged is lost, nothing is half there, history
//! has each revision once and in order (D-1, D-2, D-3, D-6, KV-9, KV-71, KV-82, W-27, L-28).
//!
//! Environment: `KILL_ROUNDS` (20), `KILL_LOAD_MS` of one round (400).

mod common;

use std::{
    collections::HashMap,
    env,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{
    CompactionRequest, DefragmentRequest, DeleteRangeRequest, HashKvRequest, LeaseGrantRequest, LeaseTimeToLiveRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest, request_op::Request,
    watch_request::RequestUnion,
};
use common::{Client, EventRecord, Server};
use tokio_stream::wrappers::UnboundedReceiverStream;

const WRITERS: usize = 8;
/// Keys of one writer: few, so that each is overwritten and deleted often.
const KEYS: u64 = 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// What a writer knows of one of its keys.
#[derive(Clone, Debug, Default)]
struct Known {
    /// The newest acknowledged state: revision and value; no value: deleted.
    acknowledged: Option<(i64, Option<String>)>,
    /// Asked for after that and never answered: may have happened or not.
    unknown: Option<Option<String>>,
}

#[derive(Default)]
struct Writer {
    id: usize,
    seq: u64,
    keys: HashMap<String, Known>,
    leases: Vec<i64>,
    /// Every acknowledged change: revision → key and value.
    history: Vec<(i64, String, Option<String>)>,
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

impl Writer {
    /// Writes until told to stop or until the server is gone.
    async fn run(mut self, mut client: Client, stop: Arc<AtomicBool>) -> Self {
        while !stop.load(Ordering::Relaxed) {
            self.seq += 1;
            let value = format!("{}-{}", self.id, self.seq);
            let key = format!("w{}/{}", self.id, self.seq % KEYS);
            let ok = match self.seq % 10 {
                3 => self.delete(&mut client, key).await,
                5 | 8 => self.txn(&mut client, value).await,
                7 if self.seq % 50 == 7 => self.grant(&mut client).await,
                _ => self.put(&mut client, key, value).await,
            };
            if !ok {
                break;
            }
        }
        self
    }

    fn asked(&mut self, key: &str, value: Option<String>) {
        self.keys.entry(key.to_owned()).or_default().unknown = Some(value);
    }

    fn done(&mut self, key: &str, revision: i64, value: Option<String>) {
        let known = self.keys.get_mut(key).expect("asked before");
        known.unknown = None;
        known.acknowledged = Some((revision, value.clone()));
        self.history.push((revision, key.to_owned(), value));
    }

    async fn put(&mut self, client: &mut Client, key: String, value: String) -> bool {
        self.asked(&key, Some(value.clone()));
        let put = PutRequest { key: key.clone().into(), value: value.clone().into(), ..Default::default() };
        let Ok(answer) = client.kv.put(put).await else { return false };
        let revision = answer.into_inner().header.expect("a header").revision;
        self.done(&key, revision, Some(value));
        true
    }

    async fn delete(&mut self, client: &mut Client, key: String) -> bool {
        self.asked(&key, None);
        let delete = DeleteRangeRequest { key: key.clone().into(), ..Default::default() };
        let Ok(answer) = client.kv.delete_range(delete).await else { return false };
        let answer = answer.into_inner();
        if answer.deleted == 1 {
            self.done(&key, answer.header.expect("a header").revision, None);
        } else if let Some(known) = self.keys.get_mut(&key) {
            known.unknown = None;
        }
        true
    }

    /// Two keys that always change together.
    async fn txn(&mut self, client: &mut Client, value: String) -> bool {
        let keys = [format!("w{}/left", self.id), format!("w{}/right", self.id)];
        let put = |key: &String| RequestOp {
            request: Some(Request::RequestPut(PutRequest {
                key: key.clone().into(),
                value: value.clone().into(),
                ..Default::default()
            })),
        };
        let txn = TxnRequest { success: keys.iter().map(put).collect(), ..Default::default() };
        for key in &keys {
            self.asked(key, Some(value.clone()));
        }
        let Ok(answer) = client.kv.txn(txn).await else { return false };
        let revision = answer.into_inner().header.expect("a header").revision;
        for key in &keys {
            self.done(key, revision, Some(value.clone()));
        }
        true
    }

    async fn grant(&mut self, client: &mut Client) -> bool {
        let Ok(answer) = client.lease.lease_grant(LeaseGrantRequest { ttl: 3600, id: 0 }).await else { return false };
        self.leases.push(answer.into_inner().id);
        true
    }
}

async fn get(client: &mut Client, key: &str) -> Option<String> {
    let range = RangeRequest { key: key.to_owned().into(), ..Default::default() };
    let answer = client.kv.range(range).await.expect("a read after the restart").into_inner();
    answer.kvs.first().map(|kv| String::from_utf8(kv.decode_record().expect("a record").value.to_vec()).expect("UTF-8"))
}

/// Every key is as acknowledged, or as asked for last.
async fn check(client: &mut Client, writers: &mut [Writer]) {
    for writer in writers {
        for (key, known) in &mut writer.keys {
            let now = get(client, key).await;
            let acknowledged = known.acknowledged.as_ref().and_then(|(_, value)| value.clone());
            let lost = now != acknowledged && Some(&now) != known.unknown.as_ref();
            assert!(!lost, "{key} is {now:?}, acknowledged {acknowledged:?}, unknown {:?} (D-6)", known.unknown);
            // From here on the next round knows what is there.
            let revision = known.acknowledged.as_ref().map_or(0, |(revision, _)| *revision);
            known.acknowledged = Some((revision, now));
            known.unknown = None;
        }
        let [left, right] = [format!("w{}/left", writer.id), format!("w{}/right", writer.id)];
        assert_eq!(get(client, &left).await, get(client, &right).await, "a transaction is there in half (KV-71)");
        for lease in &writer.leases {
            let ask = LeaseTimeToLiveRequest { id: *lease, keys: false };
            let answer = client.lease.lease_time_to_live(ask).await.expect("an answer").into_inner();
            assert_eq!(answer.granted_ttl, 3600, "an acknowledged lease is lost (L-28)");
        }
    }
}

/// All events from `start` to `end`: each revision once, in order, none missing. Revision 1 is that of no change.
async fn history(client: &mut Client, start: i64, end: i64) -> Vec<(i64, EventRecord)> {
    let (requests, outgoing) = tokio::sync::mpsc::unbounded_channel();
    let create = WatchCreateRequest {
        key: vec![0].into(),
        range_end: vec![0].into(),
        start_revision: start,
        ..Default::default()
    };
    requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).expect("just opened");
    let stream = client.watch.watch(UnboundedReceiverStream::new(outgoing)).await.expect("a stream");
    let mut stream = stream.into_inner();
    let mut events: Vec<(i64, EventRecord)> = Vec::new();
    let mut next = start.max(2);
    while next <= end {
        let response = tokio::time::timeout(PATIENCE, stream.message()).await.expect("events come");
        let response = response.expect("the stream goes on").expect("the stream does not end");
        assert!(!response.canceled, "cancelled at {next}: {response:?}");
        for raw in &response.events {
            let event = EventRecord::decode_raw(raw);
            let revision = event.kv.as_ref().expect("a record").mod_revision;
            let same = events.last().is_some_and(|(last, _)| *last == revision);
            assert!(same || revision == next, "revision {revision} where {next} was due (W-26)");
            next = revision + 1;
            events.push((revision, event));
        }
    }
    events
}

async fn hash(client: &mut Client, revision: i64) -> u32 {
    let ask = HashKvRequest { revision };
    client.maintenance.hash_kv(ask).await.expect("a hash").into_inner().hash
}

async fn revision(client: &mut Client) -> i64 {
    let range = RangeRequest { key: "x".into(), ..Default::default() };
    client.kv.range(range).await.expect("a read").into_inner().header.expect("a header").revision
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(rounds());
}

async fn rounds() {
    let rounds = number("KILL_ROUNDS", 20);
    let load = Duration::from_millis(number("KILL_LOAD_MS", 400));
    let program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
    // Small, so that checkpoints and dropped segments happen between the kills.
    let mut server = Server::start(Path::new(&program), &["--snapshot-count=300", "--snapshot-catchup-entries=50"]);
    let mut writers: Vec<Writer> = (0..WRITERS).map(|id| Writer { id, ..Writer::default() }).collect();
    let mut newest = 1;
    let mut compacted = 0;
    let mut acknowledged = 0;
    for round in 0..rounds {
        // The last quarter compacts and defragments beside the load.
        let compacting = round >= rounds - rounds / 4;
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Vec::new();
        for writer in writers.drain(..) {
            let client = Client::connect(&server).await;
            running.push(tokio::spawn(writer.run(client, stop.clone())));
        }
        let began = Instant::now();
        if compacting {
            let mut client = Client::connect(&server).await;
            compacted = revision(&mut client).await;
            let compact = CompactionRequest { revision: compacted, physical: round % 2 == 0 };
            let _ = client.kv.compact(compact).await;
            let _ = client.maintenance.defragment(DefragmentRequest {}).await;
        }
        tokio::time::sleep(load.saturating_sub(began.elapsed())).await;
        server.kill();
        stop.store(true, Ordering::Relaxed);
        for writer in running {
            writers.push(tokio::time::timeout(PATIENCE, writer).await.expect("a writer ends").expect("no panic"));
        }
        server.restart();

        let mut client = Client::connect(&server).await;
        let now = revision(&mut client).await;
        let seen = writers.iter().flat_map(|w| &w.history).map(|(revision, ..)| *revision).max().unwrap_or(1);
        assert!(now >= seen && now >= newest, "the revision went down from {seen} or {newest} to {now} (KV-9)");
        newest = now;
        check(&mut client, &mut writers).await;

        // Every acknowledged change that is not compacted is in the history.
        let start = compacted.max(1);
        let events = history(&mut client, start, now).await;
        let by_key: HashMap<(i64, &[u8]), &EventRecord> =
            events.iter().map(|(revision, e)| ((*revision, &e.kv.as_ref().expect("a record").key[..]), e)).collect();
        for (revision, key, value) in writers.iter().flat_map(|w| &w.history).filter(|(r, ..)| *r >= start) {
            let event = by_key.get(&(*revision, key.as_bytes()));
            let event = event.unwrap_or_else(|| panic!("{key} at {revision} is not in the history (W-26)"));
            assert_eq!(event.is_delete(), value.is_none());
            let record = event.kv.as_ref().expect("a record");
            assert_eq!(record.value, value.clone().unwrap_or_default().as_bytes(), "{key} at {revision}");
        }
        acknowledged = writers.iter().map(|w| w.history.len()).sum();
    }
    // The same state gives the same hash after one more restart, a clean one (M-28).
    let mut client = Client::connect(&server).await;
    let before = hash(&mut client, newest).await;
    server.terminate();
    server.restart();
    let mut client = Client::connect(&server).await;
    assert_eq!(hash(&mut client, newest).await, before, "the hash changed over a restart");
    println!("{rounds} kills, {acknowledged} acknowledged changes, revision {newest}");
    assert!(acknowledged as u64 > rounds * 100, "too little load to mean anything: {acknowledged}");
}
