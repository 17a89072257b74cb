//! A client that watches, and what it was promised: what comes is ordered, unique, whole by revision, nothing is left
//! out, reports of progress are true, and it can go on elsewhere where it was cut off (W-13 to W-18, H-5 to H-8, H-14,
//! H-15).

use std::collections::{BTreeMap, VecDeque};

use actd::{
    mvcc::record::KeyValue,
    pb::etcdserverpb::watch_request::RequestUnion,
    pb::etcdserverpb::{WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse},
    sim,
    watch::StreamId,
};
use bytes::Bytes;
use prost::Message;
use rand::{RngExt, rngs::StdRng};

use super::model::Model;

pub struct Watcher {
    /// The member, its process and the stream there.
    pub at: Option<(usize, u64, StreamId)>,
    watches: Vec<Watch>,
    /// By the id that the member gave.
    by_id: BTreeMap<i64, usize>,
    creating: VecDeque<usize>,
    cancelling: VecDeque<i64>,
    /// Responses on their way: when they arrive, and their encoded size.
    pub queue: VecDeque<(u64, WatchResponse, usize)>,
    /// Requests on their way to the member.
    pub requests: VecDeque<WatchRequest>,
    asked: usize,
    answered: usize,
    /// It has asked for progress for the last time, and heard.
    last_asked: bool,
    last_answered: bool,
    /// Events so far.
    pub events: u64,
}

struct Watch {
    key: Bytes,
    end: Bytes,
    prev_kv: bool,
    /// Everything below has been seen; 0: it has never begun.
    next: i64,
    /// It began by itself at this revision, which may be in the future.
    start: i64,
    id: Option<i64>,
    /// It wants to hear of progress by itself; how often it has since all is quiet.
    is_reported: bool,
    reports: u64,
    /// A compaction cancelled it.
    is_compacted: bool,
}

impl Watcher {
    pub fn new(rng: &mut StdRng, key: impl Fn(&mut StdRng) -> Bytes) -> Self {
        let watches = (0..rng.random_range(1..=3)).map(|_| {
            let (a, b) = (key(rng), key(rng));
            let (key, end) = match rng.random_range(0..4) {
                0 => (a, Bytes::new()),
                1 => (Bytes::from_static(b"\0"), Bytes::from_static(b"\0")),
                2 => (a, Bytes::from_static(b"\0")),
                _ if a < b => (a, b),
                _ => (b, Bytes::from_static(b"\0")),
            };
            Watch {
                key,
                end,
                prev_kv: rng.random_bool(0.4),
                next: 0,
                start: 0,
                id: None,
                is_reported: false,
                reports: 0,
                is_compacted: false,
            }
        });
        Self {
            at: None,
            watches: watches.collect(),
            by_id: BTreeMap::new(),
            creating: VecDeque::new(),
            cancelling: VecDeque::new(),
            queue: VecDeque::new(),
            requests: VecDeque::new(),
            asked: 0,
            answered: 0,
            last_asked: false,
            last_answered: false,
            events: 0,
        }
    }

    /// The connection is gone.
    pub fn cut_off(&mut self) {
        self.at = None;
        self.by_id.clear();
        self.creating.clear();
        self.cancelling.clear();
        self.queue.clear();
        self.requests.clear();
        self.watches.iter_mut().for_each(|watch| watch.id = None);
        (self.asked, self.answered) = (0, 0);
        (self.last_asked, self.last_answered) = (false, false);
    }

    /// What to ask next; `newest` is a revision that exists somewhere. In the end only what brings all watches to life.
    pub fn next_request(&mut self, rng: &mut StdRng, newest: i64, is_closing: bool) -> Option<WatchRequest> {
        if let Some(at) =
            (0..self.watches.len()).find(|at| self.watches[*at].id.is_none() && !self.creating.contains(at))
        {
            let watch = &mut self.watches[at];
            let start_revision = if watch.next > 0 {
                sim::mark("a watch resumed where it had ended");
                if std::mem::take(&mut watch.is_compacted) {
                    sim::mark("a watch went on after a compaction");
                }
                watch.next
            } else {
                match rng.random_range(0..4) {
                    0 => rng.random_range(1..=newest),
                    1 if !is_closing => newest + rng.random_range(1..40),
                    _ => 0,
                }
            };
            watch.start = start_revision;
            watch.is_reported = rng.random_bool(0.5);
            self.creating.push_back(at);
            let create = WatchCreateRequest {
                key: watch.key.clone(),
                range_end: watch.end.clone(),
                start_revision,
                progress_notify: watch.is_reported,
                prev_kv: watch.prev_kv,
                ..Default::default()
            };
            return Some(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) });
        }
        let is_last = is_closing && !self.last_answered && self.creating.is_empty();
        if is_closing && !is_last {
            return None;
        }
        self.last_asked |= is_last;
        if is_last || rng.random_bool(0.6) {
            self.asked += 1;
            let ask = WatchProgressRequest {};
            return Some(WatchRequest { request_union: Some(RequestUnion::ProgressRequest(ask)) });
        }
        let ids: Vec<i64> = self.by_id.keys().copied().filter(|id| !self.cancelling.contains(id)).collect();
        if ids.is_empty() || rng.random_bool(0.7) {
            return None;
        }
        let watch_id = ids[rng.random_range(0..ids.len())];
        self.cancelling.push_back(watch_id);
        let cancel = WatchCancelRequest { watch_id };
        Some(WatchRequest { request_union: Some(RequestUnion::CancelRequest(cancel)) })
    }

    pub fn on_response(&mut self, model: &Model, response: &WatchResponse) {
        let header = response.header.as_ref().expect("every response has a header");
        assert!(header.revision <= model.revision, "a header of the future: {}", header.revision);
        let id = response.watch_id;
        if response.created {
            let at = self.creating.pop_front().expect("each create has one answer");
            assert!(!response.canceled, "a good watch was refused: {response:?}");
            let watch = &mut self.watches[at];
            watch.id = Some(id);
            watch.next = if watch.start == 0 { header.revision + 1 } else { watch.start };
            assert!(self.by_id.insert(id, at).is_none(), "watch id {id} is in use");
        } else if response.canceled && response.compact_revision != 0 {
            let at = self.by_id.remove(&id).expect("only a watch is cancelled");
            let watch = &mut self.watches[at];
            assert!(
                watch.next < response.compact_revision,
                "cancelled at {} though {} can be read, watch {id}",
                response.compact_revision,
                watch.next
            );
            assert!(response.compact_revision <= model.compacted, "nobody compacted {}", response.compact_revision);
            // It may go on from there, and so knows nothing of what was compacted.
            watch.next = response.compact_revision;
            watch.id = None;
            watch.is_compacted = true;
            sim::mark("a watch was cancelled by a compaction");
        } else if response.canceled {
            assert_eq!(self.cancelling.pop_front(), Some(id), "a watch was cancelled that nobody cancelled");
            if let Some(at) = self.by_id.remove(&id) {
                self.watches[at].id = None;
            }
        } else if !response.events.is_empty() {
            let watch = &mut self.watches[self.by_id[&id]];
            self.events += response.events.len() as u64;
            watch.on_events(model, response, header.revision);
        } else {
            sim::mark("progress reported");
            if id == -1 {
                self.answered += 1;
                self.last_answered |= self.last_asked;
                assert!(self.answered <= self.asked, "a report that nobody asked for");
                for at in self.by_id.values() {
                    self.watches[*at].on_progress(model, header.revision);
                }
            } else {
                let watch = &mut self.watches[self.by_id[&id]];
                watch.reports += 1;
                watch.on_progress(model, header.revision);
            }
        }
    }

    /// All watches live and have seen everything.
    pub fn is_done(&self, model: &Model) -> bool {
        let missing =
            |watch: &Watch| model.history(&watch.key, &watch.end, watch.next, model.revision).next().is_some();
        let is_quiet = self.creating.is_empty() && self.cancelling.is_empty() && self.requests.is_empty();
        is_quiet && self.is_told(model) && self.watches.iter().all(|watch| watch.id.is_some() && !missing(watch))
    }

    /// Its question for progress was answered. A watch of the future keeps its stream waiting.
    fn is_told(&self, model: &Model) -> bool {
        self.last_answered || self.watches.iter().any(|watch| watch.start > model.revision)
    }

    /// From now on all is quiet.
    pub fn begin_quiet(&mut self) {
        self.watches.iter_mut().for_each(|watch| watch.reports = 0);
    }

    /// Everything has been delivered. `reported`: what is quiet has had time to be reported.
    pub fn finish(&self, model: &Model, reported: bool) {
        assert!(self.is_told(model), "a question for progress was not answered");
        assert!(self.creating.is_empty(), "a creation was not answered");
        assert!(self.cancelling.is_empty(), "cancellations were not answered: {:?}", self.cancelling);
        for watch in &self.watches {
            assert!(watch.id.is_some(), "a watch did not come to life in the end");
            let missing = model.history(&watch.key, &watch.end, watch.next, model.revision).next();
            assert!(missing.is_none(), "a watch of {:?} from {} on never saw {missing:?}", watch.key, watch.next);
            let is_due = reported && watch.is_reported && watch.start <= model.revision;
            assert!(!is_due || watch.reports > 0, "no progress was reported of {:?}", watch.key);
        }
    }
}

impl Watch {
    fn on_events(&mut self, model: &Model, response: &WatchResponse, revision: i64) {
        let events: Vec<mvccpb_event::Event> = response.events.iter().map(|raw| mvccpb_event::decode(&raw.0)).collect();
        let newest = events.last().map_or(0, |event| event.kv.mod_revision);
        assert!(revision >= newest, "the header is behind its events");
        // Ordered, unique, reliable, resumable and atomic at once: exactly what comes next, and all of each revision.
        let due: Vec<_> = model.history(&self.key, &self.end, self.next, newest).collect();
        let shown: Vec<_> = due.iter().map(|c| (c.revision, &c.key, c.kv.as_ref())).collect();
        let got: Vec<_> = events
            .iter()
            .map(|event| (event.kv.mod_revision, &event.kv.key, (!event.delete).then_some(&event.kv)))
            .collect();
        assert_eq!(got, shown, "a watch of {:?} to {:?} from {} on", self.key, self.end, self.next);
        for (event, change) in events.iter().zip(&due) {
            let before = model.at(&change.key, change.revision - 1);
            match &event.prev {
                Some(prev) => assert!(self.prev_kv && Some(prev) == before, "wrong previous value of {change:?}"),
                // What was before a compacted revision may be gone.
                None => assert!(
                    !self.prev_kv || before.is_none() || change.revision <= model.compacted,
                    "no previous value of {change:?}"
                ),
            }
        }
        self.next = newest + 1;
    }

    fn on_progress(&mut self, model: &Model, revision: i64) {
        assert!(self.start <= revision, "progress {revision} before the start at {}", self.start);
        assert!(revision <= model.revision, "progress {revision} is of the future");
        assert!(self.next <= revision + 1, "progress {revision} goes back behind {}", self.next);
        let missing = model.history(&self.key, &self.end, self.next, revision).next();
        assert!(missing.is_none(), "progress {revision} overtakes {missing:?}");
        self.next = revision + 1;
    }
}

/// Events as clients decode them.
mod mvccpb_event {
    use super::{Bytes, KeyValue, Message};

    #[derive(Clone, PartialEq, Message)]
    pub struct Wire {
        #[prost(int32, tag = "1")]
        pub kind: i32,
        #[prost(message, optional, tag = "2")]
        pub kv: Option<KeyValue>,
        #[prost(message, optional, tag = "3")]
        pub prev_kv: Option<KeyValue>,
    }

    #[derive(Debug)]
    pub struct Event {
        pub delete: bool,
        pub kv: KeyValue,
        pub prev: Option<KeyValue>,
    }

    pub fn decode(raw: &Bytes) -> Event {
        let wire = Wire::decode(raw.clone()).expect("events decode");
        Event { delete: wire.kind == 1, kv: wire.kv.expect("an event has a record"), prev: wire.prev_kv }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use actd::{
        mvcc::record::RawEvent,
        pb::etcdserverpb::{
            InternalRaftRequest, PutRequest, RequestOp, ResponseHeader, TxnRequest, request_op::Request,
        },
    };
    use rand::SeedableRng;

    use super::*;

    /// Revision 2 is of `a`, 3 of `a` and `b` together, 4 of `b`.
    fn model() -> Model {
        let put = |key: &str, value: &str| PutRequest {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            ..Default::default()
        };
        let both = ["a", "b"].map(|key| RequestOp { request: Some(Request::RequestPut(put(key, "2"))) });
        let txn = TxnRequest { success: both.to_vec(), ..Default::default() };
        let mut model = Model::new(2);
        let one = |put| InternalRaftRequest { put: Some(put), ..Default::default() };
        let both = InternalRaftRequest { txn: Some(txn), ..Default::default() };
        for request in [one(put("a", "1")), both, one(put("b", "3"))] {
            model.execute(&request).expect("it is good");
        }
        model
    }

    /// One that watches all from revision 2 on, with previous values.
    fn watcher() -> Watcher {
        let mut watcher = Watcher::new(&mut StdRng::seed_from_u64(1), |_| Bytes::from_static(b"a"));
        let all = Bytes::from_static(b"\0");
        watcher.watches.truncate(1);
        let watch = &mut watcher.watches[0];
        (watch.key, watch.end, watch.prev_kv, watch.start) = (all.clone(), all, true, 2);
        watcher.creating.push_back(0);
        let created = WatchResponse { created: true, ..header(4) };
        watcher.on_response(&model(), &created);
        watcher
    }

    fn header(revision: i64) -> WatchResponse {
        WatchResponse { header: Some(ResponseHeader { revision, ..Default::default() }), ..Default::default() }
    }

    /// Events of these revisions, all keys of each, or its first alone.
    fn events(revisions: &[i64], whole: bool, with_previous: bool) -> WatchResponse {
        let model = model();
        let mut events = Vec::new();
        for revision in revisions {
            let changes = &model.revisions[revision];
            for change in &changes[..if whole { changes.len() } else { 1 }] {
                let previous = model.at(&change.key, revision - 1).filter(|_| with_previous);
                let kv = change.kv.clone();
                let wire = mvccpb_event::Wire { kind: 0, kv, prev_kv: previous.cloned() };
                events.push(RawEvent(wire.encode_to_vec().into()));
            }
        }
        WatchResponse { events, ..header(4) }
    }

    fn hears(responses: &[WatchResponse]) -> bool {
        let (mut watcher, model) = (watcher(), model());
        let all = || responses.iter().for_each(|response| watcher.on_response(&model, response));
        catch_unwind(AssertUnwindSafe(all)).is_ok()
    }

    #[test]
    fn good_and_bad_watches_are_told_apart() {
        assert!(hears(&[events(&[2], true, true), events(&[3, 4], true, true), header(4)]));
        assert!(hears(&[events(&[2, 3, 4], true, true)]));
        assert!(hears(&[events(&[2], true, true), header(2)]));
        assert!(!hears(&[events(&[3], true, true)]), "2 was left out");
        assert!(!hears(&[events(&[2], true, true), events(&[4], true, true)]), "3 was left out");
        assert!(!hears(&[events(&[2], true, true), events(&[2], true, true)]), "2 came twice");
        assert!(!hears(&[events(&[2, 4], true, true), events(&[3], true, true)]), "the order");
        assert!(!hears(&[events(&[2, 3], false, true)]), "half of 3");
        assert!(!hears(&[events(&[2, 3, 4], true, false)]), "no previous values");
        assert!(!hears(&[header(4)]), "progress overtakes");
        assert!(!hears(&[header(9)]), "progress of the future");
        assert!(!hears(&[events(&[2, 3, 4], true, true), header(2)]), "progress goes back");
        assert!(!hears(&[WatchResponse { canceled: true, compact_revision: 3, ..header(4) }]), "nobody compacted");
    }
}
