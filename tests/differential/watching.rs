//! Watch streams to both servers, compared by what a watch promises and not by how responses are cut: each watcher's
//! events in order, complete and once, the answers to create and cancel, fragments, progress.
//!
//! Events arrive whenever they arrive; they are compared at sync points, where nothing is being written. What each
//! watcher should have got by then follows from the history of an observer that watches everything.

use std::{collections::HashMap, time::Duration};

use actd::pb::etcdserverpb::{
    WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
    watch_request::RequestUnion,
};
use bytes::Bytes;
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{Instant, timeout, timeout_at},
};
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::{answer::Identity, common::Client, common::EventRecord};

const ANSWER_WITHIN: Duration = Duration::from_secs(15);
const PROGRESS_RETRY: Duration = Duration::from_millis(30);

/// A watcher as both servers should see it.
#[derive(Debug)]
struct Watcher {
    id: i64,
    key: Bytes,
    range_end: Bytes,
    no_put: bool,
    no_delete: bool,
    prev_kv: bool,
    fragment: bool,
    /// As asked for; 0 is now.
    start: i64,
    /// The first revision not yet compared.
    next: i64,
    /// Its start, where that is the compact revision: only the newest record of each key is left there (KV-79).
    at_compaction: Option<i64>,
    /// Known to be synced: it began at a revision still to come, or has got events.
    synced: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum State {
    Live,
    /// Began below the compact revision: told so and dead until the client cancels it (W-17, W-19).
    Compacted,
    Cancelled,
}

/// What one server sent to one watcher.
#[derive(Default)]
struct Received {
    events: Vec<EventRecord>,
    cancels: Vec<WatchResponse>,
    /// Between a response with `fragment` and the one that ends it.
    in_fragment: bool,
    /// Events at or below this are late: a progress response had said all were sent (W-41).
    progressed: i64,
}

struct Side {
    name: &'static str,
    requests: UnboundedSender<WatchRequest>,
    responses: UnboundedReceiver<Result<WatchResponse, tonic::Status>>,
    by_id: HashMap<i64, usize>,
    received: Vec<Received>,
    created: Option<WatchResponse>,
    progress: Option<i64>,
    last_progress: i64,
    fragments: u64,
}

impl Side {
    fn open(name: &'static str, client: &Client) -> Self {
        let (requests, outgoing) = unbounded_channel();
        let (incoming, responses) = unbounded_channel();
        let mut watch = client.watch.clone();
        // Reads all the time: an unread stream would hold up the other calls on its connection. And it opens the stream,
        // as a server need not answer at all before the first request.
        tokio::spawn(async move {
            let mut stream = match watch.watch(UnboundedReceiverStream::new(outgoing)).await {
                Ok(stream) => stream.into_inner(),
                Err(status) => return drop(incoming.send(Err(status))),
            };
            while let Some(response) = stream.message().await.transpose() {
                if incoming.send(response).is_err() {
                    return;
                }
            }
        });
        Self {
            name,
            requests,
            responses,
            by_id: HashMap::new(),
            received: Vec::new(),
            created: None,
            progress: None,
            last_progress: 0,
            fragments: 0,
        }
    }

    fn send(&self, request: Option<RequestUnion>) {
        self.requests.send(WatchRequest { request_union: request }).expect("the stream is open");
    }

    fn take(&mut self, response: WatchResponse, identity: &Identity) {
        let mut response = response;
        identity.header(&mut response.header);
        let revision = response.header.as_ref().map_or(0, |header| header.revision);
        if response.created {
            assert!(response.events.is_empty(), "W-4: a created response with events");
            assert!(self.created.replace(response).is_none(), "W-4: a second created response");
            return;
        }
        if response.watch_id == -1 && !response.canceled {
            assert!(response.events.is_empty(), "W-42: a progress response with events");
            assert!(revision >= self.last_progress, "W-45: progress went back from {}", self.last_progress);
            self.last_progress = revision;
            self.progress = Some(revision);
            for received in &mut self.received {
                received.progressed = revision;
            }
            return;
        }
        let Some(&watcher) = self.by_id.get(&response.watch_id) else {
            panic!("W-4, W-36: a response for the unknown watch id {}", response.watch_id);
        };
        let received = &mut self.received[watcher];
        if response.canceled {
            received.cancels.push(response);
            return;
        }
        assert!(received.cancels.is_empty(), "W-36: events of watcher {watcher} after its cancel");
        received.in_fragment = response.fragment;
        self.fragments += u64::from(response.fragment);
        for raw in &response.events {
            let mut event = EventRecord::decode_raw(raw);
            event.kv.iter_mut().chain(&mut event.prev_kv).for_each(|record| identity.record(record));
            let at = event.kv.as_ref().expect("an event has a record").mod_revision;
            assert!(at > received.progressed, "W-41: event at {at} after progress {}", received.progressed);
            received.events.push(event);
        }
    }

    /// Takes what comes until `done`; panics with `what` when that takes too long.
    async fn until(&mut self, identity: &Identity, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + ANSWER_WITHIN;
        while !done(self) {
            let next = timeout_at(deadline, self.responses.recv()).await;
            let response = next.unwrap_or_else(|_| {
                panic!("nothing more within {ANSWER_WITHIN:?} from {}; waited for {what}", self.name)
            });
            let response = response.unwrap_or_else(|| panic!("the stream ended; waited for {what}"));
            self.take(response.unwrap_or_else(|status| panic!("the stream failed: {status:?}")), identity);
        }
    }

    fn drain(&mut self, identity: &Identity) {
        while let Ok(response) = self.responses.try_recv() {
            self.take(response.unwrap_or_else(|status| panic!("the stream failed: {status:?}")), identity);
        }
    }
}

/// What creating a watcher came to.
pub enum Created {
    Accepted,
    Compacted,
    Refused(String),
}

/// One stream to the reference and the same to the subject.
pub struct WatchPair {
    sides: [Side; 2],
    watchers: Vec<Watcher>,
}

impl WatchPair {
    pub fn open(clients: [&Client; 2]) -> Self {
        let [reference, subject] = clients;
        let sides = [Side::open("the reference", reference), Side::open("the subject", subject)];
        Self { sides, watchers: Vec::new() }
    }

    /// Creates the watcher on both. Answers what the reference said, or how the two differ.
    pub async fn create(
        &mut self,
        identities: &[Identity; 2],
        request: WatchCreateRequest,
        compacted: i64,
    ) -> Result<Created, (WatchResponse, WatchResponse)> {
        for (side, identity) in self.sides.iter_mut().zip(identities) {
            side.send(Some(RequestUnion::CreateRequest(request.clone())));
            side.until(identity, "a created response (W-4)", |side| side.created.is_some()).await;
        }
        let [a, b] = &mut self.sides;
        let (created, other) = (a.created.take().expect("waited for"), b.created.take().expect("waited for"));
        if created != other {
            return Err((created, other));
        }
        if created.canceled {
            return Ok(Created::Refused(created.cancel_reason));
        }
        let revision = created.header.as_ref().map_or(0, |header| header.revision);
        let start = request.start_revision;
        let dead = start > 0 && start < compacted;
        let number = self.watchers.len();
        self.watchers.push(Watcher {
            id: created.watch_id,
            key: if request.key.is_empty() { Bytes::from_static(b"\0") } else { request.key },
            range_end: request.range_end,
            no_put: request.filters.contains(&0),
            no_delete: request.filters.contains(&1),
            prev_kv: request.prev_kv,
            fragment: request.fragment,
            start,
            next: if start == 0 { revision + 1 } else { start },
            synced: start == 0 || start > revision,
            at_compaction: (start > 0 && start == compacted).then_some(start),
            state: if dead { State::Compacted } else { State::Live },
        });
        for side in &mut self.sides {
            side.by_id.insert(created.watch_id, number);
            side.received.push(Received::default());
        }
        Ok(if dead { Created::Compacted } else { Created::Accepted })
    }

    /// Cancels an id on both; whether there was such a watcher.
    pub async fn cancel(&mut self, identities: &[Identity; 2], id: i64) -> bool {
        let target = self.watchers.iter().rposition(|w| w.id == id && w.state != State::Cancelled);
        // The cancel of a watcher on compacted history comes first, whenever it comes (W-17).
        if let Some(number) = target.filter(|number| self.watchers[*number].state == State::Compacted) {
            self.wait_for_cancels(identities, number, 1).await;
        }
        for side in &self.sides {
            side.send(Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: id })));
        }
        let Some(number) = target else { return false };
        let before = usize::from(self.watchers[number].state == State::Compacted);
        self.watchers[number].state = State::Cancelled;
        self.wait_for_cancels(identities, number, before + 1).await;
        let [a, b] = &self.sides;
        assert_eq!(a.received[number].cancels, b.received[number].cancels, "W-36, W-19: cancel of id {id}");
        true
    }

    async fn wait_for_cancels(&mut self, identities: &[Identity; 2], number: usize, count: usize) {
        for (side, identity) in self.sides.iter_mut().zip(identities) {
            side.until(identity, "a canceled response (W-17, W-36)", |s| s.received[number].cancels.len() >= count)
                .await;
        }
    }

    /// Cancels the watchers that a compaction might meet while they still wait to be walked (W-55, W-18): whether it does
    /// is a matter of timing.
    pub async fn settle(&mut self, identities: &[Identity; 2]) {
        let waiting = |watcher: &&Watcher| watcher.state == State::Live && !watcher.synced;
        let ids: Vec<i64> = self.watchers.iter().filter(waiting).map(|watcher| watcher.id).collect();
        for id in ids {
            self.cancel(identities, id).await;
        }
    }

    pub fn send_nothing(&self) {
        self.sides.iter().for_each(|side| side.send(None));
    }

    /// Waits until both sides have delivered all of `history` up to `revision`, and compares. Answers the events seen.
    pub async fn sync(&mut self, identities: &[Identity; 2], history: &[EventRecord], revision: i64) -> u64 {
        let mut compared = 0;
        for number in 0..self.watchers.len() {
            match self.watchers[number].state {
                State::Compacted => {
                    self.wait_for_cancels(identities, number, 1).await;
                    let [a, b] = &self.sides;
                    assert_eq!(a.received[number].cancels, b.received[number].cancels, "W-17: watcher {number}");
                }
                State::Cancelled => self.sides.iter_mut().for_each(|side| side.received[number].events.clear()),
                State::Live => {
                    let expected = self.watchers[number].expected(history, revision);
                    let watcher = &self.watchers[number];
                    let what = format!("{} events up to {revision} (W-26) of {watcher:?}", expected.len());
                    for (side, identity) in self.sides.iter_mut().zip(identities) {
                        let all = |side: &Side| {
                            let received = &side.received[number];
                            received.events.len() >= expected.len() && !received.in_fragment
                        };
                        side.until(identity, &what, all).await;
                        side.drain(identity);
                    }
                    compared += self.compare(number, &expected) as u64;
                    let watcher = &mut self.watchers[number];
                    watcher.synced |= !expected.is_empty();
                    watcher.next = watcher.next.max(revision + 1);
                }
            }
        }
        compared
    }

    fn compare(&mut self, number: usize, expected: &[EventRecord]) -> usize {
        let [reference, subject] = self.sides.each_mut().map(|side| std::mem::take(&mut side.received[number].events));
        let watcher = &self.watchers[number];
        for (got, who) in [(&reference, "reference"), (&subject, "subject")] {
            let plain: Vec<_> = got.iter().map(|e| EventRecord { prev_kv: None, ..e.clone() }).collect();
            assert_eq!(plain, expected, "W-26: events of watcher {number} from the {who}");
            assert!(watcher.prev_kv || got.iter().all(|event| event.prev_kv.is_none()), "W-24: {who}");
        }
        assert_eq!(reference, subject, "W-23: prev_kv of watcher {number}");
        reference.len()
    }

    /// Whether a progress request must be answered soon: all watchers synced, none in the future or dead (W-43).
    pub fn answers_progress(&self, revision: i64) -> bool {
        let mut active = self.watchers.iter().filter(|watcher| watcher.state != State::Cancelled).peekable();
        active.peek().is_some() && active.all(|w| w.state == State::Live && w.start <= revision)
    }

    /// Asks both for progress (W-42), again and again as etcd drops the request while a watcher is not synced (W-43).
    pub async fn progress(&mut self, identities: &[Identity; 2], revision: i64) {
        for (side, identity) in self.sides.iter_mut().zip(identities) {
            side.drain(identity);
            side.progress = None;
            let deadline = Instant::now() + ANSWER_WITHIN;
            while side.progress.is_none() {
                let (who, watchers) = (side.name, &self.watchers);
                assert!(Instant::now() < deadline, "W-42: no answer to progress requests from {who}: {watchers:#?}");
                side.send(Some(RequestUnion::ProgressRequest(WatchProgressRequest {})));
                if let Ok(Some(Ok(response))) = timeout(PROGRESS_RETRY, side.responses.recv()).await {
                    side.take(response, identity);
                }
            }
            assert_eq!(side.progress, Some(revision), "W-42: progress of a quiet store");
        }
    }

    pub fn ask_progress(&self) {
        self.sides.iter().for_each(|side| side.send(Some(RequestUnion::ProgressRequest(WatchProgressRequest {}))));
    }

    pub fn fragments(&self) -> [u64; 2] {
        self.sides.each_ref().map(|side| side.fragments)
    }
}

impl Watcher {
    /// Its share of the history from `next` to `revision`, without prev_kv.
    fn expected(&self, history: &[EventRecord], revision: i64) -> Vec<EventRecord> {
        let _ = self.fragment;
        let first = history.partition_point(|event| event_revision(event) < self.next);
        let mut events: Vec<EventRecord> = history[first..]
            .iter()
            .take_while(|event| event_revision(event) <= revision)
            .filter(|event| self.covers(&event.kv.as_ref().expect("an event has a record").key))
            .cloned()
            .map(|event| EventRecord { prev_kv: None, ..event })
            .collect();
        if let Some(compacted) = self.at_compaction.filter(|at| *at >= self.next) {
            let key = |event: &EventRecord| event.kv.as_ref().expect("an event has a record").key.clone();
            let newest: HashMap<Bytes, usize> = events
                .iter()
                .enumerate()
                .filter(|(_, event)| event_revision(event) == compacted)
                .map(|(i, event)| (key(event), i))
                .collect();
            let mut i = 0;
            events.retain(|event| {
                i += 1;
                event_revision(event) != compacted || newest[&key(event)] == i - 1
            });
        }
        events.retain(|event| if event.is_delete() { !self.no_delete } else { !self.no_put });
        events
    }

    fn covers(&self, key: &Bytes) -> bool {
        match self.range_end.as_ref() {
            b"" => self.key == key,
            b"\0" => *self.key <= **key,
            end => *self.key <= **key && **key < *end,
        }
    }
}

pub fn event_revision(event: &EventRecord) -> i64 {
    event.kv.as_ref().expect("an event has a record").mod_revision
}

/// Sees every change from the first revision on.
pub struct Observer {
    pair: WatchPair,
    pub history: Vec<EventRecord>,
}

impl Observer {
    pub async fn open(clients: [&Client; 2], identities: &[Identity; 2]) -> Self {
        let mut pair = WatchPair::open(clients);
        let everything = Bytes::from_static(b"\0");
        let request = WatchCreateRequest {
            key: everything.clone(),
            range_end: everything,
            prev_kv: true,
            start_revision: 1,
            ..Default::default()
        };
        let created = pair.create(identities, request, 0).await;
        assert!(matches!(created, Ok(Created::Accepted)), "the observer is refused");
        Self { pair, history: Vec::new() }
    }

    /// Waits until both servers have delivered every change up to `revision`, and compares all of them.
    pub async fn sync(&mut self, identities: &[Identity; 2], revision: i64) -> u64 {
        let reached = |side: &Side| {
            side.received[0].events.last().is_some_and(|e| event_revision(e) >= revision)
                && !side.received[0].in_fragment
        };
        if self.history.last().map_or(1, event_revision) >= revision {
            return 0;
        }
        let what = format!("every event up to {revision} (W-35)");
        for (side, identity) in self.pair.sides.iter_mut().zip(identities) {
            side.until(identity, &what, reached).await;
        }
        let [reference, subject] = self.pair.sides.each_mut().map(|side| std::mem::take(&mut side.received[0].events));
        for (i, (a, b)) in reference.iter().zip(&subject).enumerate() {
            assert_eq!(a, b, "W-26: event {i} since the last sync");
        }
        assert_eq!(reference.len(), subject.len(), "W-26: number of events up to {revision}");
        let count = reference.len() as u64;
        self.history.extend(reference);
        count
    }

    /// No watcher can begin below the compact revision, so nobody asks for that part again.
    pub fn forget_below(&mut self, compacted: i64) {
        self.history.retain(|event| event_revision(event) >= compacted);
    }
}
