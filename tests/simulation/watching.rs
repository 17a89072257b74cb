//! Watch streams: what the hub's shell does around its core, and the way of responses to their clients.

use actd::watch::{Published, StreamId};
use prost::Message as _;
use rand::RngExt;

use super::{
    member::Process,
    plan::MS,
    world::{Event, World, hashed},
};

impl World {
    // Watching

    pub fn wake_hub(&mut self, m: usize) {
        let delay = self.draw(self.plan.config.hub_delay);
        self.hub_due(m, self.now + delay);
    }

    /// The hub works then, or before if it was to work earlier.
    fn hub_due(&mut self, m: usize, at: u64) {
        let due = &mut self.process(m).hub_due;
        if due.is_none_or(|due| at < due) {
            *due = Some(at);
            let epoch = self.members[m].epoch;
            self.at(at, Event::HubWork(m, epoch));
        }
    }

    pub fn hub_work(&mut self, m: usize) {
        let (now, now_ms) = (self.now, self.now / MS);
        let process = self.process(m);
        if process.hub_due.is_none_or(|due| due > now) {
            // It has worked since, earlier than this was to be.
            return;
        }
        process.hub_due = None;
        let mut out = Vec::new();
        while let Some(message) = process.ends.try_published() {
            process.history.refresh();
            process.hub.on_published(&message, &mut process.history, &mut out).expect("memory is read");
        }
        if process.ends.skipped() != process.skipped_seen {
            process.skipped_seen = process.ends.skipped();
            process.jump(&mut out);
            self.mark("a watch hub saw the revision jump");
        }
        let process = self.process(m);
        if process.hub.next_tick().is_some_and(|at| at <= now_ms) {
            process.hub.on_tick(now_ms, &mut out);
        }
        let more = process.hub.catch_up(2, &mut process.history, &mut out).expect("memory is read");
        let next = process.hub.next_tick();
        self.forward(m, out);
        if more {
            self.wake_hub(m);
        }
        if let Some(next) = next {
            self.hub_due(m, next * MS);
        }
    }

    pub fn forward(&mut self, m: usize, out: Vec<actd::watch::Outgoing>) {
        for outgoing in out {
            let Some(&w) = self.process(m).streams.get(&outgoing.stream) else { continue };
            let take = self.draw(self.plan.config.take);
            let last = self.watchers[w].queue.back().map_or(0, |(at, ..)| *at);
            let at = last.max(self.now) + take;
            self.watchers[w].queue.push_back((at, outgoing.response, outgoing.bytes));
            self.at(at, Event::Deliver(w, outgoing.stream));
        }
    }

    pub fn deliver_watch(&mut self, w: usize, stream: StreamId) {
        let Some((m, epoch, at)) = self.watchers[w].at else { return };
        if at != stream || self.members[m].epoch != epoch {
            return;
        }
        let Some((_, response, bytes)) = self.watchers[w].queue.pop_front() else { return };
        self.note(&[w as u64, hashed(&response.encode_to_vec())]);
        self.say(|| {
            let revision = response.header.as_ref().map_or(0, |h| h.revision);
            let (events, canceled) = (response.events.len(), response.canceled);
            format!(
                "watcher {w} hears: id {} events {events} revision {revision} canceled {canceled}",
                response.watch_id
            )
        });
        self.watchers[w].on_response(&self.truth.model, &response);
        if self.is_up(m) {
            let mut out = Vec::new();
            self.process(m).hub.on_taken(stream, bytes, &mut out);
            self.forward(m, out);
            // A process that stands still takes note when it goes on.
            self.wake_hub(m);
        }
    }

    pub fn watcher_turn(&mut self, w: usize) {
        let newest = self.truth.model.revision;
        let again = self.draw((50 * MS, 900 * MS));
        match self.watchers[w].at {
            None => {
                let m = self.rng.random_range(0..self.members.len());
                let now_ms = self.now / MS;
                if self.is_awake(m) {
                    let epoch = self.members[m].epoch;
                    let process = self.process(m);
                    let mut out = Vec::new();
                    process.ends.set_active(true);
                    process.history.refresh();
                    if process.streams.is_empty() {
                        process.jump(&mut out);
                    }
                    let stream = process.hub.open_stream(now_ms);
                    process.streams.insert(stream, w);
                    self.watchers[w].at = Some((m, epoch, stream));
                    self.forward(m, out);
                    self.wake_hub(m);
                }
                return self.after(10 * MS, Event::Watcher(w));
            }
            Some((m, epoch, stream)) => {
                let is_there = self.is_up(m) && self.members[m].epoch == epoch;
                // In the end nobody waits for a member that never came to belong to the cluster.
                let id = self.members[m].id;
                let is_outside = self.membership().is_none_or(|members| members.get(id).is_none());
                let bored = if self.is_closing { is_outside } else { self.rng.random_bool(0.05) };
                if is_there && bored && self.is_awake(m) {
                    // It goes elsewhere, and on from where it was.
                    let process = self.process(m);
                    process.hub.close_stream(stream);
                    process.streams.remove(&stream);
                    process.ends.set_active(!process.streams.is_empty());
                    self.watchers[w].cut_off();
                } else if is_there {
                    let rng = &mut self.rng;
                    if let Some(request) = self.watchers[w].next_request(rng, newest, self.is_closing) {
                        self.say(|| format!("watcher {w} asks m{m}: {request:?}"));
                        let latency = self.draw((50, 2 * MS));
                        self.watchers[w].requests.push_back(request);
                        self.after(latency, Event::WatchRequest(w, m, epoch, stream));
                    }
                }
            }
        }
        self.after(again, Event::Watcher(w));
    }

    pub fn watch_request(&mut self, w: usize, m: usize, stream: StreamId) {
        let process = self.process(m);
        if process.streams.get(&stream) != Some(&w) {
            return;
        }
        if !process.hub.accepts_requests(stream) {
            // The reader of the stream waits.
            let epoch = self.members[m].epoch;
            return self.after(20 * MS, Event::WatchRequest(w, m, epoch, stream));
        }
        let Some(request) = self.watchers[w].requests.pop_front() else { return };
        let process = self.process(m);
        let mut out = Vec::new();
        process.history.refresh();
        let view = process.view.load().kv.clone();
        process.hub.on_request(stream, request, None, &view, &mut out);
        self.forward(m, out);
        self.wake_hub(m);
    }
}

impl Process {
    /// The hub is told of the newest view as a jump.
    fn jump(&mut self, out: &mut Vec<actd::watch::Outgoing>) {
        self.history.refresh();
        let view = self.view.load_full();
        if view.kv.revision > self.hub.revision() {
            let published =
                Published { view: view.kv.clone(), changes: Vec::new().into(), raft_term: view.applied_term };
            self.hub.on_published(&published, &mut self.history, out).expect("memory is read");
        }
    }
}
