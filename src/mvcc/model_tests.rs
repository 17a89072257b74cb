//! The store beside a naive model, on random histories.
//!
//! The model keeps the whole state of every revision and works everything out by brute force. Every answer, error and
//! change is compared; batches end, clean-up goes on and the store is reopened at random points. A failure prints its
//! seed; `MVCC_MODEL_SEED=n` runs that history alone, `MVCC_MODEL_HISTORIES=n` runs more of them.

use std::{collections::BTreeMap, fmt::Debug};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    Error, KeyRange, Revision, View,
    change::Change,
    hash::{CompactionJob, HashKv, hash_kv},
    range::{RangeCursor, range},
    record::{KeyValue, RawKeyValue},
    replay::{self, Limit},
    test_support::World,
    txn::{is_read_only, txn_read_only},
};
use crate::{
    pb::etcdserverpb::{
        Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
        RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse, compare::TargetUnion, request_op::Request,
        response_op::Response,
    },
    storage::Bucket,
};

/// Errors by name, so that the model need not build the store's.
type Outcome<T> = Result<T, &'static str>;

fn name(err: Error) -> &'static str {
    match err {
        Error::Compacted => "compacted",
        Error::FutureRev => "future",
        Error::LeaseNotFound => "lease",
        Error::KeyNotFound => "key",
        Error::ViewOutdated => "outdated",
        Error::TooLong => "too long",
        Error::Storage(err) => panic!("{err}"),
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Record {
    rev: Revision,
    kv: KeyValue,
}

type State = BTreeMap<Bytes, Record>;

#[derive(Clone, Debug)]
struct Event {
    rev: Revision,
    key: Bytes,
    /// `None`: deleted.
    kv: Option<KeyValue>,
}

#[derive(Clone)]
struct Model {
    /// The state after each main revision.
    states: BTreeMap<i64, State>,
    events: Vec<Event>,
    compacted: i64,
    known_leases: Vec<i64>,
}

fn in_range(key: &[u8], from: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == from,
        [0] => key >= from,
        _ => key >= from && key < end,
    }
}

fn head(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..Default::default() })
}

impl Model {
    fn new() -> Self {
        Self {
            states: BTreeMap::from([(1, State::new())]),
            events: Vec::new(),
            compacted: -1,
            known_leases: vec![1, 2, -7],
        }
    }

    fn revision(&self) -> i64 {
        *self.states.keys().next_back().unwrap()
    }

    fn now(&self) -> &State {
        &self.states[&self.revision()]
    }

    /// Runs `body` on a draft of the next state and keeps it if it changed something.
    fn write<T>(&mut self, body: impl FnOnce(&mut Draft<'_>) -> T) -> (T, i64) {
        let main = self.revision() + 1;
        let mut draft = Draft { model: self, state: self.now().clone(), main, events: Vec::new() };
        let out = body(&mut draft);
        let (state, events) = (draft.state, draft.events);
        if !events.is_empty() {
            self.events.extend(events);
            self.states.insert(main, state);
        }
        (out, self.revision())
    }

    fn put(&mut self, req: &PutRequest) -> Outcome<PutResponse> {
        self.check(&[Request::RequestPut(req.clone())])?;
        Ok(self.write(|draft| draft.put(req)).0)
    }

    fn delete_range(&mut self, req: &DeleteRangeRequest) -> DeleteRangeResponse {
        self.write(|draft| draft.delete_range(req)).0
    }

    fn revoke(&mut self, lease: i64) -> Vec<Bytes> {
        self.known_leases.retain(|l| *l != lease);
        let keys: Vec<Bytes> = self.now().iter().filter(|(_, r)| r.kv.lease == lease).map(|(k, _)| k.clone()).collect();
        self.write(|draft| keys.iter().for_each(|k| draft.delete(k)));
        keys
    }

    fn txn(&mut self, req: &TxnRequest) -> Outcome<TxnResponse> {
        let mut runs = Vec::new();
        self.selected(req, &mut runs);
        self.check(&runs)?;
        let (mut response, revision) = self.write(|draft| draft.txn(req));
        response.header = head(revision);
        Ok(response)
    }

    /// The operations that will run, without the nested transactions themselves.
    fn selected(&self, req: &TxnRequest, out: &mut Vec<Request>) {
        for op in if self.compares_hold(req) { &req.success } else { &req.failure } {
            match op.request.as_ref().unwrap() {
                Request::RequestTxn(txn) => self.selected(txn, out),
                other => out.push(other.clone()),
            }
        }
    }

    fn check(&self, runs: &[Request]) -> Outcome<()> {
        let mut kept = self.now().clone();
        for run in runs {
            match run {
                Request::RequestDeleteRange(req) => kept.retain(|key, _| !in_range(key, &req.key, &req.range_end)),
                Request::RequestPut(put) => {
                    if put.lease != 0 && !self.known_leases.contains(&put.lease) {
                        return Err("lease");
                    }
                    if (put.ignore_value || put.ignore_lease) && !kept.contains_key(&put.key) {
                        return Err("key");
                    }
                }
                Request::RequestRange(range) if range.revision > self.revision() => return Err("future"),
                Request::RequestRange(range) if range.revision != 0 && range.revision < self.compacted => {
                    return Err("compacted");
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn compares_hold(&self, req: &TxnRequest) -> bool {
        req.compare.iter().all(|c| self.compare_holds(c))
    }

    fn compare_holds(&self, c: &Compare) -> bool {
        let union = c.target_union.clone().unwrap();
        let found: Vec<KeyValue> =
            self.now().iter().filter(|(k, _)| in_range(k, &c.key, &c.range_end)).map(|(_, r)| r.kv.clone()).collect();
        let judge = |ordering: std::cmp::Ordering| match c.result {
            0 => ordering.is_eq(),
            1 => ordering.is_gt(),
            2 => ordering.is_lt(),
            3 => !ordering.is_eq(),
            _ => true,
        };
        if found.is_empty() {
            return match union {
                TargetUnion::Value(_) => false,
                TargetUnion::Version(n)
                | TargetUnion::CreateRevision(n)
                | TargetUnion::ModRevision(n)
                | TargetUnion::Lease(n) => judge(0.cmp(&n)),
            };
        }
        found.iter().all(|kv| {
            judge(match &union {
                TargetUnion::Version(n) => kv.version.cmp(n),
                TargetUnion::CreateRevision(n) => kv.create_revision.cmp(n),
                TargetUnion::ModRevision(n) => kv.mod_revision.cmp(n),
                TargetUnion::Lease(n) => kv.lease.cmp(n),
                TargetUnion::Value(v) => kv.value.cmp(v),
            })
        })
    }

    fn compact(&mut self, revision: i64) -> Outcome<()> {
        if revision <= self.compacted {
            return Err("compacted");
        }
        if revision > self.revision() {
            return Err("future");
        }
        self.compacted = revision;
        Ok(())
    }

    /// A range as of `newest` (the present, for a reader with that view).
    fn range(&self, req: &RangeRequest, newest: i64) -> Outcome<RangeResponse> {
        if req.revision > newest {
            return Err("future");
        }
        if req.revision > 0 && req.revision < self.compacted {
            return Err("compacted");
        }
        let at = if req.revision > 0 { req.revision } else { newest };
        Ok(answer(&self.states[&at], req, newest))
    }

    fn txn_read_only(&self, req: &TxnRequest) -> Outcome<TxnResponse> {
        let mut runs = Vec::new();
        self.selected(req, &mut runs);
        self.check(&runs)?;
        let responses = runs
            .iter()
            .map(|run| {
                let Request::RequestRange(req) = run else { panic!("not read-only") };
                ResponseOp { response: Some(Response::ResponseRange(self.range(req, self.revision()).unwrap())) }
            })
            .collect();
        Ok(TxnResponse { header: head(self.revision()), succeeded: self.compares_hold(req), responses })
    }

    fn prev(&self, event: &Event) -> Option<Revision> {
        let created = event.kv.as_ref().is_some_and(|kv| kv.create_revision == kv.mod_revision);
        if created { None } else { self.states[&(event.rev.main - 1)].get(&event.key).map(|r| r.rev) }
    }

    /// What a finished clean-up leaves.
    fn rows(&self) -> Vec<&Event> {
        let k = self.compacted;
        let survives = |e: &Event| {
            let alive = k >= 1 && self.states[&k].get(&e.key).is_some_and(|r| r.rev == e.rev);
            e.rev.main > k || alive || (e.kv.is_none() && e.rev.main == k)
        };
        self.events.iter().filter(|e| survives(e)).collect()
    }

    fn hash(&self, revision: i64) -> Outcome<HashKv> {
        if revision > 0 && revision < self.compacted {
            return Err("compacted");
        }
        if revision > self.revision() {
            return Err("future");
        }
        let (r, k) = (if revision == 0 { self.revision() } else { revision }, self.compacted);
        let mut by_key: BTreeMap<&Bytes, Vec<Vec<&Event>>> = BTreeMap::new();
        for event in &self.events {
            let lives = by_key.entry(&event.key).or_insert_with(|| vec![vec![]]);
            lives.last_mut().unwrap().push(event);
            if event.kv.is_none() {
                lives.push(vec![]);
            }
        }
        let mut keep = Vec::new();
        for lives in by_key.values() {
            let closed = |l: &&Vec<&Event>| l.last().is_some_and(|e| e.kv.is_none() && e.rev.main >= r);
            let life = lives.iter().find(closed).unwrap_or(lives.last().unwrap());
            if let Some(newest) = life.iter().rfind(|e| e.rev.main <= r).filter(|e| e.kv.is_some()) {
                keep.push(newest.rev);
            }
        }
        let counts = |row: &&Event| {
            let (main, tombstone) = (row.rev.main, row.kv.is_none());
            let condemned = main <= k && !keep.is_empty() && !keep.contains(&row.rev);
            !(main > r || condemned || (main == k && tombstone))
        };
        let hash = hash_of(self.rows().into_iter().filter(counts));
        Ok(HashKv { hash, compact_revision: k, hash_revision: r })
    }

    /// What a compaction to `at` leaves, after one to `previous`.
    fn compaction_hash(&self, at: i64, previous: i64) -> HashKv {
        let old = |row: &Event| at >= 1 && self.states[&at].get(&row.key).is_some_and(|r| r.rev == row.rev);
        let counts = |row: &&Event| row.rev.main <= at && (row.rev.main > previous || old(row));
        HashKv { hash: hash_of(self.events.iter().filter(counts)), compact_revision: previous, hash_revision: at }
    }
}

fn hash_of<'a>(rows: impl Iterator<Item = &'a Event>) -> u32 {
    let mut bytes = b"key".to_vec();
    for row in rows {
        bytes.extend(row.rev.to_row_key(row.kv.is_none()));
        bytes.extend(row_value(row));
    }
    crc32c::crc32c(&bytes)
}

fn row_value(event: &Event) -> Bytes {
    let only_key = KeyValue { key: event.key.clone(), ..Default::default() };
    event.kv.as_ref().unwrap_or(&only_key).to_raw().0
}

fn answer(state: &State, req: &RangeRequest, newest: i64) -> RangeResponse {
    let all: Vec<KeyValue> =
        state.iter().filter(|(k, _)| in_range(k, &req.key, &req.range_end)).map(|(_, r)| r.kv.clone()).collect();
    let mut out = RangeResponse { header: head(newest), count: all.len() as i64, ..Default::default() };
    if req.count_only {
        return out;
    }
    let filters =
        [req.min_mod_revision, req.max_mod_revision, req.min_create_revision, req.max_create_revision] != [0; 4];
    let mut kvs: Vec<KeyValue> = all
        .into_iter()
        .filter(|kv| req.min_mod_revision == 0 || kv.mod_revision >= req.min_mod_revision)
        .filter(|kv| req.max_mod_revision == 0 || kv.mod_revision <= req.max_mod_revision)
        .filter(|kv| req.min_create_revision == 0 || kv.create_revision >= req.min_create_revision)
        .filter(|kv| req.max_create_revision == 0 || kv.create_revision <= req.max_create_revision)
        .collect();
    out.more = req.limit > 0 && kvs.len() as i64 > req.limit;
    if req.limit > 0 && req.sort_order == 0 && !filters {
        kvs.truncate(req.limit as usize + 1);
    }
    kvs.sort_by(|a, b| {
        let (a, b) = if req.sort_order == 2 { (b, a) } else { (a, b) };
        match req.sort_target {
            0 => a.key.cmp(&b.key),
            1 => a.version.cmp(&b.version),
            2 => a.create_revision.cmp(&b.create_revision),
            3 => a.mod_revision.cmp(&b.mod_revision),
            _ => a.value.cmp(&b.value),
        }
    });
    if req.limit > 0 {
        kvs.truncate(req.limit as usize);
    }
    if req.keys_only {
        for kv in &mut kvs {
            kv.value.clear();
            if req.sort_target != 4 {
                kv.lease = 0;
            }
        }
    }
    out.kvs = kvs.iter().map(KeyValue::to_raw).collect();
    out
}

struct Draft<'a> {
    model: &'a Model,
    state: State,
    main: i64,
    events: Vec<Event>,
}

impl Draft<'_> {
    fn revision(&self) -> i64 {
        self.main - i64::from(self.events.is_empty())
    }

    fn event(&mut self, key: &Bytes, kv: Option<KeyValue>) -> Revision {
        let rev = Revision::new(self.main, self.events.len() as i64);
        self.events.push(Event { rev, key: key.clone(), kv });
        rev
    }

    fn put(&mut self, req: &PutRequest) -> PutResponse {
        let old = self.state.get(&req.key).map(|r| r.kv.clone());
        let mut kv = KeyValue {
            key: req.key.clone(),
            create_revision: old.as_ref().map_or(self.main, |o| o.create_revision),
            mod_revision: self.main,
            version: old.as_ref().map_or(0, |o| o.version) + 1,
            value: req.value.clone(),
            lease: req.lease,
        };
        if req.ignore_value {
            kv.value = old.clone().unwrap_or_default().value;
        }
        if req.ignore_lease {
            kv.lease = old.clone().unwrap_or_default().lease;
        }
        let rev = self.event(&req.key, Some(kv.clone()));
        self.state.insert(req.key.clone(), Record { rev, kv });
        PutResponse { header: head(self.main), prev_kv: old.filter(|_| req.prev_kv).map(|kv| kv.to_raw()) }
    }

    fn delete(&mut self, key: &Bytes) {
        self.state.remove(key).unwrap();
        self.event(key, None);
    }

    fn delete_range(&mut self, req: &DeleteRangeRequest) -> DeleteRangeResponse {
        let gone: Vec<KeyValue> = self
            .state
            .values()
            .filter(|r| in_range(&r.kv.key, &req.key, &req.range_end))
            .map(|r| r.kv.clone())
            .collect();
        gone.iter().for_each(|kv| self.delete(&kv.key));
        DeleteRangeResponse {
            header: head(self.revision()),
            deleted: gone.len() as i64,
            prev_kvs: if req.prev_kv { gone.iter().map(KeyValue::to_raw).collect() } else { vec![] },
        }
    }

    fn txn(&mut self, req: &TxnRequest) -> TxnResponse {
        let succeeded = self.model.compares_hold(req);
        let ops = if succeeded { &req.success } else { &req.failure };
        let responses = ops
            .iter()
            .map(|op| {
                let response = match op.request.as_ref().unwrap() {
                    Request::RequestPut(req) => Response::ResponsePut(self.put(req)),
                    Request::RequestDeleteRange(req) => Response::ResponseDeleteRange(self.delete_range(req)),
                    Request::RequestTxn(req) => Response::ResponseTxn(self.txn(req)),
                    Request::RequestRange(req) => {
                        let pinned = self.model.states.get(&req.revision);
                        let state = if req.revision > 0 { pinned.unwrap() } else { &self.state };
                        Response::ResponseRange(answer(state, req, self.revision()))
                    }
                };
                ResponseOp { response: Some(response) }
            })
            .collect();
        TxnResponse { header: head(0), succeeded, responses }
    }
}

/// Random requests over few keys, so that they meet.
struct Gen {
    rng: StdRng,
}

impl Gen {
    fn below(&mut self, n: usize) -> usize {
        self.rng.random_range(0..n)
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    fn key(&mut self) -> Bytes {
        Bytes::from_static(self.pick(&[b"a" as &[u8], b"b", b"b\0", b"c", b"d", b"\0", b"\xff\xff"]))
    }

    fn end(&mut self) -> Bytes {
        if self.chance(35) { Bytes::new() } else { self.key() }
    }

    fn value(&mut self) -> Bytes {
        Bytes::from_static(self.pick(&[b"" as &[u8], b"x", b"y", b"a longer value", b"\0"]))
    }

    /// A revision around what can be read.
    fn revision(&mut self, newest: i64) -> i64 {
        match self.below(10) {
            0 => self.pick(&[-5, -1, newest + 1, i64::MAX, i64::MIN]),
            1..=4 => 0,
            _ => self.rng.random_range(0..=newest),
        }
    }

    fn put(&mut self) -> PutRequest {
        let (ignore_value, ignore_lease) = (self.chance(15), self.chance(15));
        PutRequest {
            key: self.key(),
            value: if ignore_value { Bytes::new() } else { self.value() },
            lease: if ignore_lease { 0 } else { self.pick(&[0, 0, 0, 1, 2, -7, 99]) },
            prev_kv: self.chance(30),
            ignore_value,
            ignore_lease,
        }
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        DeleteRangeRequest { key: self.key(), range_end: self.end(), prev_kv: self.chance(50) }
    }

    fn range(&mut self, newest: i64) -> RangeRequest {
        let mut req = RangeRequest {
            key: self.key(),
            range_end: self.end(),
            revision: self.revision(newest),
            limit: self.pick(&[0, 0, 1, 2, 3, 4, -1, i64::MAX - 1]),
            keys_only: self.chance(20),
            count_only: self.chance(10),
            ..Default::default()
        };
        if self.chance(50) {
            req.key = Bytes::from_static(b"\0");
            req.range_end = req.key.clone();
        }
        if self.chance(50) {
            req.sort_order = self.below(3) as i32;
            req.sort_target = self.below(5) as i32;
        }
        if self.chance(30) {
            let mut bound = || if self.chance(50) { 0 } else { self.rng.random_range(-1..=newest + 1) };
            req.min_mod_revision = bound();
            req.max_mod_revision = bound();
            req.min_create_revision = bound();
            req.max_create_revision = bound();
        }
        req
    }

    fn compare(&mut self, newest: i64) -> Compare {
        let number = self.rng.random_range(0..=newest + 1);
        let small = self.rng.random_range(0..4);
        let (target, union) = match self.below(5) {
            0 => (0, TargetUnion::Version(small)),
            1 => (1, TargetUnion::CreateRevision(number * (small % 2))),
            2 => (2, TargetUnion::ModRevision(number * (small % 2))),
            3 => (3, TargetUnion::Value(self.value())),
            _ => (4, TargetUnion::Lease(self.pick(&[0, 1, 2, -7]))),
        };
        Compare {
            result: self.pick(&[0, 1, 2, 3, 3, 17]),
            target,
            key: self.key(),
            range_end: self.end(),
            target_union: Some(union),
        }
    }

    fn txn(&mut self, newest: i64, depth: usize, only_ranges: bool) -> TxnRequest {
        let compare = (0..self.pick(&[0, 0, 1, 1, 2])).map(|_| self.compare(newest)).collect();
        let mut branch = || -> Vec<RequestOp> {
            (0..self.below(4))
                .map(|_| {
                    let request = match self.below(10) {
                        _ if only_ranges => Request::RequestRange(self.range(newest)),
                        0..=3 => Request::RequestPut(self.put()),
                        4 | 5 => Request::RequestDeleteRange(self.delete()),
                        6 if depth > 0 => Request::RequestTxn(self.txn(newest, depth - 1, false)),
                        7 if depth > 0 => Request::RequestTxn(self.txn(newest, depth - 1, true)),
                        _ => {
                            // Most pinned ranges of a transaction fail it; not too many of them.
                            let mut range = self.range(newest);
                            if self.chance(70) {
                                range.revision = 0;
                            }
                            Request::RequestRange(range)
                        }
                    };
                    RequestOp { request: Some(request) }
                })
                .collect()
        };
        TxnRequest { success: branch(), failure: branch(), compare }
    }
}

/// One history: the store, the model, and what the last batches left behind.
struct Run {
    gen_: Gen,
    world: World,
    model: Model,
    /// Changes made since the last commit are the model's events from here on.
    reported: usize,
    /// A view that stays behind, as a slow reader's.
    old: View,
    /// The hash of a compaction under way.
    hashing: Option<CompactionJob>,
}

fn same<T: Debug + PartialEq>(real: &T, model: &T, what: &dyn Debug) {
    assert_eq!(real, model, "\nleft: the store, right: the model, on {what:?}\n");
}

impl Run {
    fn new(seed: u64) -> Self {
        let world = World::with_leases(&[1, 2, -7]);
        let old = world.store.view();
        Self {
            gen_: Gen { rng: StdRng::seed_from_u64(seed) },
            world,
            model: Model::new(),
            reported: 0,
            old,
            hashing: None,
        }
    }

    fn step(&mut self) {
        let newest = self.model.revision();
        let World { store, leases, .. } = &mut self.world;
        match self.gen_.below(100) {
            0..=29 => {
                let req = self.gen_.put();
                same(&store.put(&req, leases).map_err(name), &self.model.put(&req), &req);
            }
            30..=41 => {
                let req = self.gen_.delete();
                same(&store.delete_range(&req, leases).unwrap(), &self.model.delete_range(&req), &req);
            }
            42..=74 => {
                let req = self.gen_.txn(newest, 2, false);
                same(&store.txn(&req, leases).map_err(name), &self.model.txn(&req), &req);
            }
            75..=80 => {
                let rev = self.gen_.revision(newest);
                same(&store.compact(rev).map_err(name), &self.model.compact(rev), &("compact", rev));
            }
            81..=84 => {
                let lease = self.gen_.pick(&[1, 2, -7]);
                leases.known.remove(&lease);
                let keys = self.model.revoke(lease);
                assert_eq!(store.delete_keys(&keys, leases), keys.len());
            }
            85..=89 => {
                let lease = self.gen_.pick(&[1, 2, -7]);
                leases.known.insert(lease);
                self.model.known_leases.push(lease);
            }
            90..=95 => {
                let keys = 1 + self.gen_.below(3);
                store.clean_slice(keys);
            }
            _ => self.reopen(),
        }
        assert_eq!(self.world.store.revision(), self.model.revision());
        assert_eq!(self.world.store.compact_revision(), self.model.compacted);
        let attached: BTreeMap<Bytes, i64> =
            self.model.now().iter().filter(|(_, r)| r.kv.lease != 0).map(|(k, r)| (k.clone(), r.kv.lease)).collect();
        assert_eq!(self.world.leases.attached, attached);
        if self.gen_.chance(40) {
            self.commit();
            self.read();
        }
    }

    fn reopen(&mut self) {
        self.commit();
        let hash = hash_kv(&self.world.store.view(), &*self.world.storage, 0).unwrap();
        if self.gen_.chance(50) {
            // Clean-up that is not committed is as if it had not been.
            self.world.store.clean_slice(1);
        }
        self.hashing = None;
        self.world.reopen();
        same(&hash_kv(&self.world.store.view(), &*self.world.storage, 0).unwrap(), &hash, &"reopening");
    }

    fn commit(&mut self) {
        let changes = self.world.commit();
        let events = &self.model.events[self.reported..];
        self.reported = self.model.events.len();
        self.same_changes(&changes, &events.iter().collect::<Vec<_>>(), true);
        if self.gen_.chance(50)
            && let Some(job) = self.hashing.take()
        {
            let expected = self.model.compaction_hash(job.at, job.previous);
            same(&job.run().map_err(name), &Ok(expected), &"a compaction");
            self.world.store.hashed(None); // kept, it would answer for its revision
        }
        self.hashing = self.world.store.take_hash_job().or(self.hashing.take());

        let rows = self.world.storage.rows(Bucket::Key);
        let bytes: usize = rows.iter().map(|(k, v)| k.len() + v.len() + 16).sum();
        assert_eq!(self.world.store.sizes().total, (16 << 10) + bytes as u64);
    }

    fn same_changes(&self, changes: &[Change], events: &[&Event], fresh: bool) {
        let real: Vec<_> =
            changes.iter().map(|c| (c.revision, c.key.clone(), c.delete, c.kv.clone(), c.prev)).collect();
        let model: Vec<_> = events
            .iter()
            .map(|e| {
                let gone = KeyValue { key: e.key.clone(), mod_revision: e.rev.main, ..Default::default() };
                let kv: RawKeyValue = e.kv.as_ref().unwrap_or(&gone).to_raw();
                let prev = self.model.prev(e).filter(|_| fresh || e.rev.main > self.model.compacted);
                (e.rev, e.key.clone(), e.kv.is_none(), kv, prev)
            })
            .collect();
        same(&real, &model, &"changes");
    }

    /// Reads of all kinds from the published view, and from one that is behind.
    fn read(&mut self) {
        let view = self.world.store.view();
        let storage = self.world.storage.clone();
        let newest = view.revision;

        let req = self.gen_.range(newest);
        let answer = range(&view, &*storage, &req).map_err(name);
        same(&answer, &self.model.range(&req, newest), &req);
        if RangeCursor::supports(&req) {
            same(&self.read_in_chunks(&view, &req), &answer, &("in chunks", &req));
        }

        // A reader whose view is behind gets what was true then, or is told to take a newer view.
        let old = self.old.revision;
        let req = RangeRequest { revision: 0, ..self.gen_.range(old) };
        match range(&self.old, &*storage, &req) {
            Err(Error::ViewOutdated) => assert!(self.model.compacted > self.old.compact_revision),
            answer => same(&answer.map_err(name), &self.model.range(&req, old), &req),
        }
        if self.gen_.chance(20) {
            self.old = view.clone();
        }

        let req = self.gen_.txn(newest, 0, true);
        assert!(is_read_only(&req));
        same(
            &txn_read_only(&view, &*storage, &req).map(|(answer, _)| answer).map_err(name),
            &self.model.txn_read_only(&req),
            &req,
        );

        let rev = self.gen_.revision(newest).max(0);
        same(&hash_kv(&view, &*storage, rev).map_err(name), &self.model.hash(rev), &("hash", rev));

        self.replay(&view);
    }

    fn read_in_chunks(&mut self, view: &View, req: &RangeRequest) -> Outcome<RangeResponse> {
        let storage = &*self.world.storage;
        let mut cursor = RangeCursor::new(view, storage, req).map_err(name)?;
        let mut kvs = Vec::new();
        let promised = cursor.encoded_bytes(view);
        loop {
            let (keys, bytes) = (1 + self.gen_.below(3), self.gen_.below(120));
            let chunk = cursor.next_chunk(view, storage, keys, bytes).map_err(name)?;
            assert_eq!(chunk.header.is_some(), cursor.is_done());
            assert!(!chunk.kvs.is_empty() || (cursor.is_done() && kvs.is_empty()), "an empty part");
            kvs.extend(chunk.kvs.clone());
            if cursor.is_done() {
                let records = RangeResponse { kvs: kvs.clone(), ..Default::default() };
                assert_eq!(prost::Message::encoded_len(&records) as u64, promised);
                return Ok(RangeResponse { kvs, ..chunk });
            }
        }
    }

    fn replay(&mut self, view: &View) {
        let (key, end) = (self.gen_.key(), self.gen_.end());
        let range = if self.gen_.chance(50) { KeyRange::ALL } else { KeyRange::new(&key, &end) };
        let from = self.gen_.rng.random_range(1..=view.revision + 1);
        let limit = Limit { changes: 1 + self.gen_.below(5), bytes: 10 + self.gen_.below(200) };
        let mut got = Vec::new();
        let mut next = from;
        while next <= view.revision {
            match replay::changes(view, &*self.world.storage, range, next, view.revision, limit) {
                Ok(piece) => {
                    assert!(piece.next > next, "no progress");
                    assert!(piece.changes.iter().all(|c| (next..piece.next).contains(&c.revision.main)));
                    next = piece.next;
                    got.extend(piece.changes);
                }
                Err(err) => {
                    assert_eq!(name(err), "compacted");
                    assert!(next < self.model.compacted);
                    return;
                }
            }
        }
        assert!(from >= self.model.compacted || from > view.revision);
        // Changes at the compact revision that the same write undid are there until clean-up comes by.
        let undone = |rev: Revision, key: &Bytes| {
            let k = self.model.compacted;
            rev.main == k && self.model.states[&k].get(key).map(|r| r.rev) != Some(rev)
        };
        got.retain(|c| c.delete || !undone(c.revision, &c.key));
        let events: Vec<&Event> = self
            .model
            .events
            .iter()
            .filter(|e| e.rev.main >= from && in_range(&e.key, range.key, range.end))
            .filter(|e| e.kv.is_none() || !undone(e.rev, &e.key))
            .collect();
        self.same_changes(&got, &events, false);
    }

    /// Once clean-up is done, the rows are what the history alone decides.
    fn finish(&mut self) {
        self.commit();
        let view = self.world.store.view();
        let before = hash_kv(&view, &*self.world.storage, 0).unwrap();
        self.world.clean();
        let after = hash_kv(&self.world.store.view(), &*self.world.storage, 0).unwrap();
        same(&after, &before, &"clean-up");
        self.read();

        let rows = self.world.storage.rows(Bucket::Key);
        let model: Vec<(Bytes, Bytes)> =
            self.model.rows().iter().map(|e| (Bytes::from(e.rev.to_row_key(e.kv.is_none())), row_value(e))).collect();
        same(&rows, &model, &"rows");
        self.world.reopen();
        assert!(!self.world.store.is_cleaning());
        same(&self.world.store.sizes(), &view_sizes(&rows), &"sizes");
    }
}

fn view_sizes(rows: &[(Bytes, Bytes)]) -> super::view::Sizes {
    let total = (16 << 10) + rows.iter().map(|(k, v)| k.len() + v.len() + 16).sum::<usize>() as u64;
    super::view::Sizes { total, in_use: total }
}

fn history(seed: u64, ops: usize) {
    let mut run = Run::new(seed);
    for _ in 0..ops {
        run.step();
    }
    run.finish();
}

#[test]
fn store_agrees_with_a_naive_model() {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if let Some(seed) = number("MVCC_MODEL_SEED") {
        return history(seed, 60);
    }
    for seed in 0..number("MVCC_MODEL_HISTORIES").unwrap_or(300) {
        if let Err(failure) = std::panic::catch_unwind(|| history(seed, 60)) {
            eprintln!("run again with MVCC_MODEL_SEED={seed}");
            std::panic::resume_unwind(failure);
        }
    }
}
