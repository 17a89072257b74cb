//! The hub: watchers in, published changes in, responses out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use prost::Message;

use super::{
    fanout,
    history::{History, HistoryError, HistoryLimit},
    key_index::KeyIndex,
    slab::{Slab, Slot},
    stream::{Stream, StreamId},
    watcher::{Options, SharedRange, State, Watcher, watched_range},
};
use crate::{
    mvcc::{change::Change, record::RawEvent, view::View},
    pb::etcdserverpb::{ResponseHeader, WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion},
    sim::{self, Bug},
    storage,
};

/// Watch id of answers that belong to no watcher: refusals and manual progress reports.
const NO_WATCHER: i64 = -1;
/// Distinct revisions in one response of a catch-up (etcd's number).
const CATCH_UP_REVISIONS: usize = 1000;

const REFUSED_COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const REFUSED_EMPTY_RANGE: &str = "mvcc: watcher range is empty";
const REFUSED_DUPLICATE_ID: &str = "mvcc: duplicate watch ID provided on the WatchStream";

#[derive(Clone, Debug)]
pub struct HubConfig {
    pub cluster_id: u64,
    pub member_id: u64,
    /// Responses that encode to this much are split for watchers that asked for it: max-request-bytes + 512 KiB.
    pub fragment_bytes: usize,
    /// Between two progress reports of a watcher, before the up to 10 % that each stream adds.
    pub progress_interval_ms: u64,
    /// Encoded responses queued for one stream; past it the stream's watchers fall behind.
    pub stream_budget_bytes: usize,
    /// Encoded events that one catch-up step reads, before the revision it is in ends.
    pub catch_up_bytes: usize,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self {
            cluster_id: 0,
            member_id: 0,
            fragment_bytes: 1_572_864 + 524_288,
            progress_interval_ms: 600_000,
            // A client that is a network round trip away should not fall behind at full speed: 1 MiB is 8 ms of 1 Gbit/s.
            stream_budget_bytes: 1 << 20,
            // A step of this size takes about 0.5 ms when its rows are not cached.
            catch_up_bytes: 64 << 10,
        }
    }
}

/// What apply tells each hub after each view it published.
#[derive(Clone, Debug)]
pub struct Published {
    pub view: Arc<View>,
    /// All changes since the view before, ascending.
    pub changes: Arc<[Change]>,
    pub raft_term: u64,
}

/// A response for the queue of a stream.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub stream: StreamId,
    pub response: WatchResponse,
    /// Encoded length of `response`: what [`Hub::on_taken`] wants to hear later.
    pub bytes: usize,
}

/// Numbers for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub streams: usize,
    /// Registered watch ids.
    pub watchers: usize,
    /// Watchers that read history.
    pub behind: usize,
    /// Encoded bytes handed out and not yet taken.
    pub queued_bytes: usize,
    /// Since the hub began.
    pub events_sent: u64,
}

#[derive(Debug)]
pub struct Hub {
    config: HubConfig,
    seed: u64,
    /// Everything up to here has been delivered to the watchers that are not behind. Invariant: a watcher is behind
    /// exactly if its next revision is not above this.
    revision: i64,
    raft_term: u64,
    opened: u64,
    streams: BTreeMap<StreamId, Stream>,
    watchers: Slab<Watcher>,
    /// The watchers that are not dead, by what they watch.
    keys: KeyIndex,
    /// Waiting watchers by their gate.
    waiting: BTreeSet<(i64, Slot)>,
    /// Streams with watchers behind and room in their queue.
    ready: BTreeSet<StreamId>,
    /// The stream that took the last catch-up step.
    ready_cursor: StreamId,
    /// Streams with a progress request that waits for an answer.
    asking: BTreeSet<StreamId>,
    ticks: BTreeSet<(u64, StreamId)>,
    behind: usize,
    events_sent: u64,
    /// (watcher, position of the change) of the revision in delivery; kept for its allocation.
    matches: Vec<(Slot, u32)>,
}

impl Hub {
    /// `seed` spreads the progress reports of streams.
    pub fn new(config: HubConfig, seed: u64) -> Self {
        Self {
            config,
            seed,
            revision: 0,
            raft_term: 0,
            opened: 0,
            streams: BTreeMap::new(),
            watchers: Slab::default(),
            keys: KeyIndex::default(),
            waiting: BTreeSet::new(),
            ready: BTreeSet::new(),
            ready_cursor: StreamId(0),
            asking: BTreeSet::new(),
            ticks: BTreeSet::new(),
            behind: 0,
            events_sent: 0,
            matches: Vec::new(),
        }
    }

    pub fn stats(&self) -> Stats {
        Stats {
            streams: self.streams.len(),
            watchers: self.watchers.len(),
            behind: self.behind,
            queued_bytes: self.streams.values().map(|stream| stream.queued_bytes).sum(),
            events_sent: self.events_sent,
        }
    }

    /// The revision up to which watchers that keep up have been sent everything.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    pub fn open_stream(&mut self, now_ms: u64) -> StreamId {
        self.opened += 1;
        let id = StreamId(self.opened);
        let interval = self.config.progress_interval_ms;
        let extra = interval / 10 * (spread(self.seed ^ id.0) % 1001) / 1000;
        let stream = Stream::new(now_ms, interval + extra);
        self.ticks.insert((stream.next_tick_ms, id));
        self.streams.insert(id, stream);
        id
    }

    /// Forgets the stream and all its watchers. Calls for a closed stream do nothing.
    pub fn close_stream(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get(&id) else { return };
        for slot in stream.watchers.values().copied().collect::<Vec<_>>() {
            self.remove_watcher(slot);
        }
        let stream = self.streams.remove(&id).expect("the stream was just found");
        self.ticks.remove(&(stream.next_tick_ms, id));
        self.asking.remove(&id);
        self.ready.remove(&id);
    }

    /// Whether the stream's next request may be read.
    pub fn accepts_requests(&self, id: StreamId) -> bool {
        self.streams.get(&id).is_some_and(|stream| stream.queued_bytes < self.config.stream_budget_bytes)
    }

    /// `denied` is the reason why the client may not watch [`watched_range`] of a create, as the client shall read it.
    /// `view` is [`History::view`].
    pub fn on_request(
        &mut self,
        id: StreamId,
        request: WatchRequest,
        denied: Option<String>,
        view: &View,
        out: &mut Vec<Outgoing>,
    ) {
        if !self.streams.contains_key(&id) {
            return;
        }
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(id, &create, denied, view, out),
            Some(RequestUnion::CancelRequest(cancel)) => self.cancel(id, cancel.watch_id, view, out),
            Some(RequestUnion::ProgressRequest(_)) => {
                let stream = self.stream_mut(id);
                // Several requests that wait get one answer, which holds for the newest.
                stream.progress_asked = Some(view.revision.max(stream.progress_asked.unwrap_or(0)));
                self.asking.insert(id);
                self.answer_progress(id, out);
            }
            None => {}
        }
    }

    fn create(
        &mut self,
        id: StreamId,
        create: &WatchCreateRequest,
        denied: Option<String>,
        view: &View,
        out: &mut Vec<Outgoing>,
    ) {
        let range = watched_range(create);
        let header = self.header(view.revision);
        let claimed = if create.start_revision < 0 {
            Err(REFUSED_COMPACTED.to_owned())
        } else if let Some(reason) = denied {
            Err(reason)
        } else if range.is_empty() {
            Err(REFUSED_EMPTY_RANGE.to_owned())
        } else {
            self.stream_mut(id).claim_id(create.watch_id).ok_or_else(|| REFUSED_DUPLICATE_ID.to_owned())
        };
        let mut created =
            WatchResponse { header: Some(header), watch_id: NO_WATCHER, created: true, ..Default::default() };
        let watch_id = match claimed {
            Ok(watch_id) => watch_id,
            Err(cancel_reason) => {
                return self.push(id, WatchResponse { canceled: true, cancel_reason, ..created }, out);
            }
        };
        created.watch_id = watch_id;
        self.push(id, created, out);

        let start = create.start_revision;
        let watcher = Watcher {
            stream: id,
            id: watch_id,
            range: SharedRange::new(range),
            next: if start == 0 { view.revision + 1 } else { start },
            // Not before the start, and not below the revision that the created answer tells.
            gate: if sim::has(Bug::EarlyProgress) { view.revision } else { start.max(view.revision) },
            state: State::Dead,
            options: Options::of(create),
            quiet: true,
        };
        let slot = self.watchers.insert(watcher);
        self.stream_mut(id).watchers.insert(watch_id, slot);
        if start > 0 && start < view.compact_revision {
            self.push_compacted(slot, view.compact_revision, out);
            return;
        }
        let range = self.keys.insert(self.watchers[slot].range.clone(), slot);
        self.watchers[slot].range = range;
        self.settle(slot);
    }

    fn cancel(&mut self, id: StreamId, watch_id: i64, view: &View, out: &mut Vec<Outgoing>) {
        let Some(&slot) = self.stream_mut(id).watchers.get(&watch_id) else { return };
        self.remove_watcher(slot);
        let header = Some(self.header(view.revision));
        self.push(id, WatchResponse { header, watch_id, canceled: true, ..Default::default() }, out);
        // It may have been the one that held up an answer.
        self.answer_progress(id, out);
    }

    pub fn on_published(
        &mut self,
        published: &Published,
        history: &mut dyn History,
        out: &mut Vec<Outgoing>,
    ) -> Result<(), storage::Error> {
        self.raft_term = published.raft_term;
        let to = published.view.revision;
        if to > self.revision {
            if leads(self.revision, to, &published.changes) {
                for changes in published.changes.chunk_by(same_revision) {
                    self.deliver(changes, history, out)?;
                }
            } else {
                self.jump(to);
            }
            self.revision = to;
            self.open_gates();
        }
        for id in self.asking.iter().copied().collect::<Vec<_>>() {
            self.answer_progress(id, out);
        }
        Ok(())
    }

    /// Sends the changes of one revision to the watchers that keep up.
    fn deliver(
        &mut self,
        changes: &[Change],
        history: &mut dyn History,
        out: &mut Vec<Outgoing>,
    ) -> Result<(), storage::Error> {
        let revision = changes[0].revision.main;
        let mut matches = std::mem::take(&mut self.matches);
        for (at, change) in (0..).zip(changes) {
            self.keys.visit(&change.key, |slot| {
                if self.watchers[slot].takes_live(change) {
                    matches.push((slot, at));
                }
            });
        }
        if changes.len() > 1 {
            matches.sort_unstable();
        }
        for of_watcher in matches.chunk_by(|a, b| a.0 == b.0) {
            let slot = of_watcher[0].0;
            let prev_kv = self.watchers[slot].options.prev_kv;
            let stream = &self.streams[&self.watchers[slot].stream];
            let queued = stream.queued_bytes;
            let mut bytes = 0;
            let mut events = Vec::with_capacity(of_watcher.len());
            if queued < self.config.stream_budget_bytes {
                for (_, at) in of_watcher {
                    let event = fanout::event(&changes[*at as usize], prev_kv, history)?;
                    bytes += event.0.len();
                    events.push(event);
                }
            }
            // An empty queue takes a response of any size, or a large one could never be sent.
            if events.is_empty() || (queued > 0 && queued + bytes > self.config.stream_budget_bytes) {
                sim::mark("slow watcher falls behind");
                if !sim::has(Bug::SlowWatcherLosesEvents) {
                    self.watchers[slot].next = revision;
                    self.set_state(slot, State::Behind);
                }
            } else {
                self.push_events(slot, revision, events, out);
            }
        }
        matches.clear();
        self.matches = matches;
        Ok(())
    }

    /// The revision goes on to `to` without its changes at hand.
    fn jump(&mut self, to: i64) {
        for slot in self.watchers.slots() {
            let delivered = self.revision;
            let watcher = &mut self.watchers[slot];
            if matches!(watcher.state, State::Live | State::Waiting) {
                watcher.next = watcher.next.max(delivered + 1);
                if sim::has(Bug::WatchGoesBack) {
                    watcher.next = (delivered - 1).max(1);
                }
                if sim::has(Bug::EarlyEvents) && watcher.state == State::Waiting {
                    watcher.next = delivered + 1;
                }
                if watcher.next <= to {
                    self.set_state(slot, State::Behind);
                }
            }
        }
    }

    /// Waiting watchers whose gate the hub has reached become live.
    fn open_gates(&mut self) {
        while let Some(&(gate, slot)) = self.waiting.first()
            && gate <= self.revision
        {
            self.set_state(slot, State::Live);
        }
    }

    /// When the next tick is due; `None` while there is no stream.
    pub fn next_tick(&self) -> Option<u64> {
        self.ticks.first().map(|&(at, _)| at)
    }

    /// Sends the periodic progress reports that are due.
    pub fn on_tick(&mut self, now_ms: u64, out: &mut Vec<Outgoing>) {
        while let Some(&(at, id)) = self.ticks.first()
            && at <= now_ms
        {
            self.ticks.remove(&(at, id));
            let stream = self.stream_mut(id);
            // From now, not from when it was due: missed ticks are not made up for.
            stream.next_tick_ms = now_ms + stream.tick_interval_ms;
            self.ticks.insert((self.streams[&id].next_tick_ms, id));
            self.report_progress(id, out);
        }
    }

    fn report_progress(&mut self, id: StreamId, out: &mut Vec<Outgoing>) {
        if !self.accepts_requests(id) {
            return;
        }
        let header = Some(self.header(self.revision));
        for slot in self.streams[&id].watchers.values().copied().collect::<Vec<_>>() {
            let watcher = &mut self.watchers[slot];
            let due = watcher.options.progress_notify && watcher.state == State::Live && watcher.quiet;
            let watch_id = watcher.id;
            watcher.quiet = true;
            if due {
                self.push(id, WatchResponse { header, watch_id, ..Default::default() }, out);
            }
        }
    }

    /// Answers a waiting progress request if everything up to the hub's revision is queued to the stream, and that is
    /// not below what was current when the client asked.
    fn answer_progress(&mut self, id: StreamId, out: &mut Vec<Outgoing>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let Some(asked_at) = stream.progress_asked else { return };
        let ready = stream.unready == 0 || sim::has(Bug::ProgressOvertakesEvents);
        let answerable = ready && asked_at <= self.revision && stream.queued_bytes < self.config.stream_budget_bytes;
        // etcd gives no answer without watchers: there is nothing to make a statement about.
        if stream.alive > 0 && !answerable {
            return;
        }
        let silent = stream.alive == 0;
        stream.progress_asked = None;
        self.asking.remove(&id);
        if !silent {
            let header = Some(self.header(self.revision));
            self.push(id, WatchResponse { header, watch_id: NO_WATCHER, ..Default::default() }, out);
        }
    }

    /// The transport took responses of `bytes` encoded bytes from the stream's queue.
    pub fn on_taken(&mut self, id: StreamId, bytes: usize, out: &mut Vec<Outgoing>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.queued_bytes =
            stream.queued_bytes.checked_sub(bytes).expect("no more is taken from a stream than was queued");
        self.update_ready(id);
        self.answer_progress(id, out);
    }

    /// Takes up to `steps` catch-up steps, each for one watcher of the next stream in turn. Returns whether more can
    /// be done now.
    pub fn catch_up(
        &mut self,
        steps: usize,
        history: &mut dyn History,
        out: &mut Vec<Outgoing>,
    ) -> Result<bool, storage::Error> {
        for _ in 0..steps {
            let after = StreamId(self.ready_cursor.0 + 1);
            let Some(id) = self.ready.range(after..).next().or_else(|| self.ready.first()).copied() else { break };
            self.ready_cursor = id;
            let slot = self.stream_mut(id).next_behind().expect("a ready stream has a watcher behind");
            self.read_history(slot, history, out)?;
            self.answer_progress(id, out);
        }
        Ok(!self.ready.is_empty())
    }

    fn read_history(
        &mut self,
        slot: Slot,
        history: &mut dyn History,
        out: &mut Vec<Outgoing>,
    ) -> Result<(), storage::Error> {
        let (current, compacted) = (history.view().revision, history.view().compact_revision);
        assert!(current >= self.revision, "the view in use is never older than the messages about views");
        let watcher = &self.watchers[slot];
        let from = watcher.next;
        if from < compacted {
            self.push_compacted(slot, compacted, out);
            return Ok(());
        }
        let limit = HistoryLimit { revisions: CATCH_UP_REVISIONS, bytes: self.config.catch_up_bytes };
        let page = match history.changes(watcher.range.as_range(), from, limit) {
            Ok(page) => page,
            Err(HistoryError::Compacted { compact_revision }) => {
                self.push_compacted(slot, compact_revision, out);
                return Ok(());
            }
            Err(HistoryError::Storage(error)) => return Err(error),
        };
        assert!(page.next_from > from, "a page of history moves on");
        let mut events = Vec::with_capacity(page.changes.len());
        for change in page.changes.iter().filter(|change| watcher.passes(change)) {
            events.push(fanout::event(change, watcher.options.prev_kv, history)?);
        }
        let watcher = &mut self.watchers[slot];
        watcher.next = page.next_from;
        if sim::has(Bug::EventTwice) && page.next_from > from + 1 {
            watcher.next -= 1;
        }
        watcher.gate = current;
        if !events.is_empty() {
            self.push_events(slot, current, events, out);
        }
        self.settle(slot);
        Ok(())
    }

    /// Puts a watcher into the state that follows from its next revision and its gate.
    fn settle(&mut self, slot: Slot) {
        let watcher = &self.watchers[slot];
        let state = if watcher.next <= self.revision {
            State::Behind
        } else if watcher.gate > self.revision {
            State::Waiting
        } else {
            State::Live
        };
        self.set_state(slot, state);
    }

    fn set_state(&mut self, slot: Slot, state: State) {
        let watcher = &mut self.watchers[slot];
        let (id, gate) = (watcher.stream, watcher.gate);
        let old = std::mem::replace(&mut watcher.state, state);
        if old == state {
            return;
        }
        let stream = self.streams.get_mut(&id).expect("a watcher's stream is open");
        match old {
            State::Waiting => _ = self.waiting.remove(&(gate, slot)),
            State::Behind => {
                stream.behind.remove(&slot);
                self.behind -= 1;
            }
            State::Live | State::Dead => {}
        }
        match state {
            State::Waiting => _ = self.waiting.insert((gate, slot)),
            State::Behind => {
                stream.behind.insert(slot);
                self.behind += 1;
            }
            State::Live | State::Dead => {}
        }
        let unready = |state| usize::from(matches!(state, State::Waiting | State::Behind));
        stream.unready = stream.unready + unready(state) - unready(old);
        stream.alive = stream.alive + usize::from(state != State::Dead) - usize::from(old != State::Dead);
        self.update_ready(id);
    }

    /// A stream catches up again when half its budget is free: not a single event for each one taken.
    fn update_ready(&mut self, id: StreamId) {
        let stream = &self.streams[&id];
        if !stream.behind.is_empty() && stream.queued_bytes <= self.config.stream_budget_bytes / 2 {
            self.ready.insert(id);
        } else {
            self.ready.remove(&id);
        }
    }

    fn remove_watcher(&mut self, slot: Slot) {
        self.retire(slot);
        let watcher = self.watchers.remove(slot);
        self.stream_mut(watcher.stream).watchers.remove(&watcher.id);
    }

    /// Ends deliveries to a watcher; its id stays registered.
    fn retire(&mut self, slot: Slot) {
        if self.watchers[slot].state != State::Dead {
            self.set_state(slot, State::Dead);
            self.keys.remove(&self.watchers[slot].range, slot);
        }
    }

    /// Cancels a watcher whose next revision has been compacted. This answer has no revision in its header.
    fn push_compacted(&mut self, slot: Slot, compact_revision: i64, out: &mut Vec<Outgoing>) {
        self.retire(slot);
        let (id, watch_id) = (self.watchers[slot].stream, self.watchers[slot].id);
        let header = Some(self.header(0));
        let canceled = WatchResponse { header, watch_id, canceled: true, compact_revision, ..Default::default() };
        self.push(id, canceled, out);
    }

    fn push_events(&mut self, slot: Slot, revision: i64, events: Vec<RawEvent>, out: &mut Vec<Outgoing>) {
        self.events_sent += events.len() as u64;
        let header = self.header(revision);
        let watcher = &mut self.watchers[slot];
        watcher.quiet = false;
        let id = watcher.stream;
        let response = WatchResponse { header: Some(header), watch_id: watcher.id, events, ..Default::default() };
        if watcher.options.fragment && response.events.len() > 1 && response.encoded_len() >= self.config.fragment_bytes
        {
            for fragment in fanout::fragments(response, self.config.fragment_bytes) {
                self.push(id, fragment, out);
            }
        } else {
            self.push(id, response, out);
        }
    }

    fn push(&mut self, id: StreamId, response: WatchResponse, out: &mut Vec<Outgoing>) {
        let bytes = response.encoded_len();
        let stream = self.stream_mut(id);
        stream.queued_bytes += bytes;
        if !stream.behind.is_empty() {
            self.update_ready(id);
        }
        out.push(Outgoing { stream: id, response, bytes });
    }

    fn stream_mut(&mut self, id: StreamId) -> &mut Stream {
        self.streams.get_mut(&id).expect("only open streams are named inside the hub")
    }

    fn header(&self, revision: i64) -> ResponseHeader {
        let HubConfig { cluster_id, member_id, .. } = self.config;
        ResponseHeader { cluster_id, member_id, revision, raft_term: self.raft_term }
    }

    /// What must be gone once all streams are closed.
    #[cfg(test)]
    pub(super) fn is_clean(&self) -> bool {
        let sets = self.waiting.is_empty() && self.ready.is_empty() && self.asking.is_empty() && self.ticks.is_empty();
        sets && self.streams.is_empty() && self.watchers.len() == 0 && self.keys.is_empty() && self.behind == 0
    }
}

fn same_revision(a: &Change, b: &Change) -> bool {
    a.revision.main == b.revision.main
}

/// True if `changes` are those of every revision above `from` up to `to`: each revision has at least one.
fn leads(from: i64, to: i64, changes: &[Change]) -> bool {
    let mut at = from;
    for change in changes {
        if change.revision.main != at && change.revision.main != at + 1 || change.revision.main == from {
            return false;
        }
        at = change.revision.main;
    }
    at == to
}

/// A bijection of the 64-bit numbers that leaves no pattern (the finalizer of splitmix64).
pub(super) fn spread(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}
