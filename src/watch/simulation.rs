//! Random clients, writes, compactions, lags and jumps against one hub; a checker that knows the whole history holds
//! every stream to the promises of a watch.
//!
//! `ACTD_WATCH_SEED=n` runs one seed, `ACTD_WATCH_RUNS=n` that many.

use std::collections::{BTreeMap, VecDeque};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use super::{model::*, *};
use crate::{
    mvcc::{KeyRange, Revision},
    pb::etcdserverpb::{WatchCreateRequest, WatchResponse},
};

/// What a client asked for and has seen so far.
#[derive(Debug)]
struct Watch {
    create: WatchCreateRequest,
    start: i64,
    /// Main revision below which everything has been seen.
    seen: i64,
    /// Fragments of a response whose last one is still to come.
    partial: Vec<Seen>,
    dead: bool,
}

#[derive(Debug, Default)]
struct Client {
    queue: VecDeque<usize>,
    /// Creates that wait for their answer.
    creating: VecDeque<WatchCreateRequest>,
    cancelling: VecDeque<i64>,
    watches: BTreeMap<i64, Watch>,
    progress: i64,
    asked: usize,
    answered: usize,
}

struct World {
    rng: StdRng,
    hub: Hub,
    model: Model,
    clients: BTreeMap<StreamId, Client>,
    now: u64,
    out: Vec<Outgoing>,
    largest: usize,
    counts: Counts,
}

/// What a run has exercised, so that the simulation cannot become idle unnoticed.
#[derive(Debug, Default)]
struct Counts {
    events: usize,
    fragments: usize,
    compacted: usize,
    progress: usize,
    manual: usize,
    behind: usize,
    prev_absent: usize,
}

const BUDGET: usize = 1500;
const FRAGMENT: usize = 200;
const CATCH_UP: usize = 400;

impl World {
    fn new(seed: u64) -> Self {
        let config = HubConfig {
            cluster_id: 1,
            member_id: 2,
            fragment_bytes: FRAGMENT,
            progress_interval_ms: 100,
            stream_budget_bytes: BUDGET,
            catch_up_bytes: CATCH_UP,
        };
        Self {
            rng: StdRng::seed_from_u64(seed),
            hub: Hub::new(config, seed),
            model: Model::new(),
            clients: BTreeMap::new(),
            now: 0,
            out: Vec::new(),
            largest: 0,
            counts: Counts::default(),
        }
    }

    fn key(&mut self) -> String {
        let len = self.rng.random_range(1..=2);
        (0..len).map(|_| self.rng.random_range('a'..='d')).collect()
    }

    fn write(&mut self) {
        let count = if self.rng.random_bool(0.6) { 1 } else { self.rng.random_range(2..8) };
        let mut keys: Vec<_> = (0..count).map(|_| self.key()).collect();
        keys.sort();
        keys.dedup();
        let value = "v".repeat(self.rng.random_range(0..60));
        let ops: Vec<_> = keys
            .iter()
            .map(|key| if self.rng.random_bool(0.3) { Op::Delete(key) } else { Op::Put(key, &value) })
            .collect();
        self.model.txn(&ops);
    }

    fn compact(&mut self) {
        let view = &self.model.view;
        let from = view.compact_revision.max(0) + 1;
        if from <= view.revision {
            let at = self.rng.random_range(from..=view.revision);
            self.model.compact(at);
        }
    }

    fn publish(&mut self, jump: bool) {
        let (from, mut to) = (self.hub.revision(), self.model.view.revision);
        if from < to && self.rng.random_bool(0.3) {
            // Not the newest view: the view in use runs ahead of the messages.
            to = self.rng.random_range(from + 1..=to);
        }
        let mut published = self.model.published_to(from, to);
        if jump {
            published.changes = [].into();
        }
        self.hub.on_published(&published, &mut self.model, &mut self.out).unwrap();
    }

    fn request(&mut self, id: StreamId) {
        if !self.hub.accepts_requests(id) {
            return;
        }
        let request = match self.rng.random_range(0..10) {
            0..5 => {
                let key = if self.rng.random_bool(0.1) { String::new() } else { self.key() };
                let end = match self.rng.random_range(0..4) {
                    0 | 1 => String::new(),
                    2 => "\0".to_owned(),
                    _ => self.key(),
                };
                let current = self.model.view.revision;
                let start_revision = match self.rng.random_range(0..6) {
                    0 | 1 => 0,
                    2 => self.rng.random_range(current..current + 8),
                    3 if self.rng.random_bool(0.1) => -1,
                    _ => self.rng.random_range(1..=current),
                };
                let mut filters = Vec::new();
                if self.rng.random_bool(0.15) {
                    filters.push(self.rng.random_range(0..2));
                }
                let create_request = WatchCreateRequest {
                    key: key.into(),
                    range_end: end.into(),
                    start_revision,
                    progress_notify: self.rng.random_bool(0.5),
                    filters,
                    prev_kv: self.rng.random_bool(0.5),
                    watch_id: if self.rng.random_bool(0.7) {
                        0
                    } else {
                        *[-7, 1, 2, 3, 5].choose(&mut self.rng).unwrap()
                    },
                    fragment: self.rng.random_bool(0.3),
                };
                self.clients.get_mut(&id).unwrap().creating.push_back(create_request.clone());
                create(create_request)
            }
            5..8 => {
                let watch_id = self.rng.random_range(-7..8);
                let client = self.clients.get_mut(&id).unwrap();
                if client.watches.contains_key(&watch_id) {
                    client.cancelling.push_back(watch_id);
                }
                cancel(watch_id)
            }
            _ => {
                self.clients.get_mut(&id).unwrap().asked += 1;
                progress()
            }
        };
        self.hub.on_request(id, request, None, &self.model.view, &mut self.out);
    }

    fn step(&mut self) {
        let some_client = (!self.clients.is_empty())
            .then(|| *self.clients.keys().nth(self.rng.random_range(0..self.clients.len())).unwrap());
        match (self.rng.random_range(0..100), some_client) {
            (0..30, _) => self.write(),
            (30..32, _) if self.rng.random_bool(0.5) => self.compact(),
            (32..34, _) => self.model.clean(),
            (34..55, _) => self.publish(false),
            (55..56, _) => self.publish(true),
            (56..58, _) if self.clients.len() < 4 => {
                let id = self.hub.open_stream(self.now);
                self.clients.insert(id, Client::default());
            }
            (58..59, Some(id)) if self.rng.random_bool(0.3) => {
                self.hub.close_stream(id);
                self.clients.remove(&id);
            }
            (59..72, Some(id)) => self.request(id),
            (72..80, _) => {
                self.now += self.rng.random_range(0..60);
                self.hub.on_tick(self.now, &mut self.out);
            }
            (80..90, Some(id)) => self.take(id),
            (90..100, _) => self.catch_up(),
            _ => {}
        }
        self.check_out();
    }

    fn take(&mut self, id: StreamId) {
        for _ in 0..self.rng.random_range(1..12) {
            let Some(bytes) = self.clients.get_mut(&id).unwrap().queue.pop_front() else { break };
            self.hub.on_taken(id, bytes, &mut self.out);
            self.check_out();
        }
    }

    fn catch_up(&mut self) {
        self.model.page_revisions = self.rng.random_range(1..20);
        let steps = self.rng.random_range(1..6);
        self.hub.catch_up(steps, &mut self.model, &mut self.out).unwrap();
    }

    fn check_out(&mut self) {
        self.counts.behind = self.counts.behind.max(self.hub.stats().behind);
        for outgoing in std::mem::take(&mut self.out) {
            assert_eq!(outgoing.bytes, prost::Message::encoded_len(&outgoing.response));
            self.largest = self.largest.max(outgoing.bytes);
            let client = self.clients.get_mut(&outgoing.stream).expect("nothing is sent to a closed stream");
            client.queue.push_back(outgoing.bytes);
            client.check(&self.model, self.hub.revision(), &outgoing.response, &mut self.counts);
        }
    }

    /// Everything is published, taken and read: now nothing may be missing.
    fn finish(&mut self) {
        while self.hub.revision() < self.model.view.revision {
            self.publish(false);
        }
        self.check_out();
        for id in self.clients.keys().copied().collect::<Vec<_>>() {
            self.clients.get_mut(&id).unwrap().asked += 1;
            self.hub.on_request(id, progress(), None, &self.model.view, &mut self.out);
        }
        loop {
            self.check_out();
            let ids: Vec<_> = self.clients.keys().copied().collect();
            let mut idle = true;
            for id in ids {
                while let Some(bytes) = self.clients.get_mut(&id).unwrap().queue.pop_front() {
                    idle = false;
                    self.hub.on_taken(id, bytes, &mut self.out);
                    self.check_out();
                }
            }
            let more = self.hub.catch_up(3, &mut self.model, &mut self.out).unwrap();
            if idle && !more && self.out.is_empty() {
                break;
            }
        }
        let current = self.model.view.revision;
        for client in self.clients.values() {
            assert!(client.creating.is_empty() && client.cancelling.is_empty());
            let mut alive = false;
            for (id, watch) in client.watches.iter().filter(|(_, watch)| !watch.dead) {
                let missing = watch.expected(&self.model).next();
                assert!(missing.is_none(), "watch {id} never saw {missing:?}: {watch:?}");
                alive |= watch.start <= current;
            }
            if alive && client.watches.values().all(|watch| watch.dead || watch.start <= current) {
                assert_eq!(client.progress, current, "a request once synced is answered");
            }
        }
        assert_eq!(self.hub.stats().behind, 0);
        assert_eq!(self.hub.stats().queued_bytes, 0);
        for id in self.clients.keys() {
            self.hub.close_stream(*id);
        }
        assert!(self.hub.is_clean());
    }
}

impl Watch {
    fn range(&self) -> KeyRange<'_> {
        watched_range(&self.create)
    }

    /// What the watcher has still to see, oldest first.
    fn expected<'a>(&'a self, model: &'a Model) -> impl Iterator<Item = (Revision, &'a Row)> {
        let from = Revision::new(self.start.max(self.seen), 0);
        model.log.range(from..).map(|(rev, row)| (*rev, row)).filter(|(_, row)| {
            let filtered = self.create.filters.contains(&i32::from(row.delete));
            self.range().contains(&row.key) && !filtered
        })
    }

    fn check_events(&mut self, model: &Model, response: &WatchResponse, counts: &mut Counts) {
        let seen = events(response);
        counts.events += seen.len();
        self.partial.extend(seen);
        let newest = self.partial.last().unwrap().kv.mod_revision;
        assert!(response.header.unwrap().revision >= newest);
        assert!(newest <= model.view.revision);
        if response.fragment {
            assert!(self.create.fragment);
            assert!(response.events.len() == 1 || prost::Message::encoded_len(response) < FRAGMENT);
            counts.fragments += 1;
            return;
        }
        // Ordered, unique, reliable, resumable, filterable and atomic at once: exactly what comes next, and all of it
        // up to and including the newest revision.
        let due: Vec<_> = self.expected(model).take_while(|(rev, _)| rev.main <= newest).collect();
        let shown: Vec<_> = due.iter().map(|(rev, row)| (rev.main, row.delete, row.kv.clone())).collect();
        let got: Vec<_> =
            self.partial.iter().map(|seen| (seen.kv.mod_revision, seen.delete, seen.kv.clone())).collect();
        assert_eq!(got, shown, "{self:?}");
        for (seen, (rev, row)) in self.partial.iter().zip(&due) {
            let before = model.newest(&row.key, rev.main).map(|(_, row)| row.kv.clone());
            let readable = rev.main > model.view.compact_revision;
            counts.prev_absent += usize::from(self.create.prev_kv && before.is_some() && !readable);
            assert_eq!(seen.prev, before.filter(|_| self.create.prev_kv && readable), "{rev:?} {self:?}");
        }
        self.partial.clear();
        self.seen = newest + 1;
    }

    /// A report of progress up to `revision` must be true.
    fn check_progress(&self, model: &Model, revision: i64) {
        assert!(self.partial.is_empty());
        assert!(self.start <= revision + 1, "progress before the start: {self:?}");
        assert!(self.seen <= revision + 1, "progress {revision} goes back behind events: {self:?}");
        assert!(self.create.start_revision <= revision, "progress before the start: {self:?}");
        if let Some((rev, _)) = self.expected(model).next() {
            assert!(rev.main > revision, "progress {revision} overtakes {rev:?} of {self:?}");
        }
    }
}

impl Client {
    fn check(&mut self, model: &Model, hub_revision: i64, response: &WatchResponse, counts: &mut Counts) {
        let header = response.header.unwrap();
        assert_eq!((header.cluster_id, header.member_id), (1, 2));
        let current = model.view.revision;
        let id = response.watch_id;
        if response.created {
            assert_eq!(header.revision, current);
            let create = self.creating.pop_front().expect("each create has one answer");
            if response.canceled {
                let refused = create.start_revision < 0
                    || watched_range(&create).is_empty()
                    || self.watches.contains_key(&create.watch_id);
                assert!(refused && id == -1 && !response.cancel_reason.is_empty(), "{create:?}");
                return;
            }
            assert!(create.watch_id == 0 || create.watch_id == id);
            let start = if create.start_revision == 0 { current + 1 } else { create.start_revision };
            let watch = Watch { create, start, seen: 0, partial: Vec::new(), dead: false };
            assert!(self.watches.insert(id, watch).is_none());
        } else if response.canceled && header.revision == 0 {
            counts.compacted += 1;
            let watch = self.watches.get_mut(&id).unwrap();
            assert!(!watch.dead && watch.partial.is_empty());
            assert_eq!(response.compact_revision, model.view.compact_revision);
            assert!(watch.start.max(watch.seen) < response.compact_revision);
            watch.dead = true;
        } else if response.canceled {
            assert_eq!(self.cancelling.pop_front(), Some(id));
            assert_eq!((header.revision, response.compact_revision), (current, 0));
            self.watches.remove(&id).unwrap();
        } else if !response.events.is_empty() {
            let watch = self.watches.get_mut(&id).unwrap();
            assert!(!watch.dead);
            watch.check_events(model, response, counts);
        } else {
            assert!(header.revision >= self.progress && header.revision <= hub_revision);
            self.progress = header.revision;
            if id == -1 {
                counts.manual += 1;
                self.answered += 1;
                assert!(self.answered <= self.asked);
                assert!(self.watches.values().any(|watch| !watch.dead));
                self.watches
                    .values()
                    .filter(|watch| !watch.dead)
                    .for_each(|watch| watch.check_progress(model, header.revision));
            } else {
                counts.progress += 1;
                assert!(self.watches[&id].create.progress_notify && !self.watches[&id].dead);
                self.watches[&id].check_progress(model, header.revision);
            }
        }
    }
}

fn run(seed: u64, steps: usize) -> Counts {
    let mut world = World::new(seed);
    world.publish(false);
    for _ in 0..steps {
        world.step();
        for (id, client) in &world.clients {
            let queued: usize = client.queue.iter().sum();
            assert!(queued <= BUDGET + world.largest * 3 + 2000, "stream {id:?} holds {queued} bytes");
        }
    }
    world.finish();
    world.counts
}

// W-13..18, W-23, W-25..29, W-31, W-34..38, W-40..45, W-51, W-56, H-5..8, H-14, H-15, H-57.
#[test]
fn random_histories_keep_every_promise() {
    let var = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seeds = match (var("ACTD_WATCH_SEED"), var("ACTD_WATCH_RUNS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, runs) => 0..runs.unwrap_or(60),
    };
    let mut total = Counts::default();
    for seed in seeds.clone() {
        let counts = std::panic::catch_unwind(|| run(seed, 1200));
        let counts = counts.unwrap_or_else(|_| panic!("broken promise: rerun with ACTD_WATCH_SEED={seed}"));
        total.events += counts.events;
        total.fragments += counts.fragments;
        total.compacted += counts.compacted;
        total.progress += counts.progress;
        total.manual += counts.manual;
        total.behind = total.behind.max(counts.behind);
        total.prev_absent += counts.prev_absent;
    }
    println!("seeds {seeds:?}: {total:?}");
    if seeds.end - seeds.start > 20 {
        let seen = [total.events, total.fragments, total.compacted, total.progress, total.manual, total.prev_absent];
        assert!(seen.iter().all(|n| *n > 20) && total.behind > 3, "the simulation is idle: {total:?}");
    }
}
