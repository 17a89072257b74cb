//! The world of one run: time, network, members, clients, and the scheduler that moves them. One thread, one seed.
//!
//! What the server's shells do around the cores is done here, in the same order: appends before committed entries,
//! batch before view, view before answers, answers before watchers. Times between the steps are drawn; a crash may come
//! between any two of them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use actd::{
    apply::{ConfChanged, Error, Outcome},
    cluster::{Change, Member as ClusterMember, Members},
    mvcc::{
        hash::{HashKv, scan_kv},
        range,
    },
    pb::{
        etcdserverpb::RangeRequest,
        raftpb::{self, MessageType},
    },
    raft::Room,
    snapshot::import::Expected,
    wal::sim::Fault as DiskFault,
    watch::{Published, StreamId},
};
use bytes::Bytes;
use prost::Message as _;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    client::{Client, Op},
    member::{Job, MIN_TTL, Member, Process},
    plan::{Config, LATE, MS, Plan, SECOND, TICK},
    truth::Truth,
    watcher::Watcher,
};

pub type OpId = usize;

/// What happens next to whom. The second number is the member's epoch.
pub enum Event {
    Tick(usize, u64),
    Sync(usize, u64),
    LeaseTick(usize, u64),
    DiskDone(usize, u64),
    Applied(usize, u64),
    HubWork(usize, u64),
    ConfChanged(usize, u64, ConfChanged),
    /// The hash of a compaction is computed.
    Hashed(usize, u64, Option<HashKv>),
    Unreachable(usize, u64, u64),
    Message(usize, Box<raftpb::Message>),
    /// A database is taken and sent; it arrives; its store is complete.
    SendSnapshot(usize, u64, Box<raftpb::Message>),
    Snapshot(usize, (usize, u64), Box<raftpb::Message>, Bytes, Expected),
    StepSnapshot(usize, u64),
    SnapshotReport(usize, u64, u64, bool),
    Client(usize),
    Request(OpId),
    /// A renewal comes to the leader.
    Forwarded(usize, OpId),
    Answer(OpId, Answer),
    GiveUp(OpId),
    Watcher(usize),
    /// The next request of a stream is read.
    WatchRequest(usize, usize, u64, StreamId),
    Deliver(usize, StreamId),
    Fault(usize),
    Restart(usize),
    RoomAgain(usize),
    Removed(usize, u64),
    Replace(usize),
}

/// What a client hears.
#[derive(Clone, Debug)]
pub enum Answer {
    Outcome(Outcome),
    Range(Result<actd::pb::etcdserverpb::RangeResponse, Error>),
    Renewed(Result<i64, Error>),
    /// The connection broke, or could not be made.
    Broken,
}

pub struct World {
    pub plan: Plan,
    pub now: u64,
    pub base: Instant,
    pub queue: BTreeMap<(u64, u64), Event>,
    pub sequence: u64,
    pub rng: StdRng,
    pub members: Vec<Member>,
    pub first: Vec<raftpb::Entry>,
    pub clients: Vec<Client>,
    pub ops: Vec<Op>,
    pub watchers: Vec<Watcher>,
    pub truth: Truth,
    /// From, to: cut until then.
    pub cuts: BTreeMap<(usize, usize), u64>,
    pub loss: (f64, u64),
    pub late: f64,
    /// Until when a client has been promised that a lease lives.
    pub promised: BTreeMap<i64, u64>,
    /// When a lease ran out and was revoked.
    pub expired: BTreeMap<i64, u64>,
    pub revocations_seen: usize,
    pub requests: BTreeMap<u64, OpId>,
    pub refused: Vec<u64>,
    pub next_member: u64,
    /// A member was asked to leave.
    pub is_smaller: bool,
    pub next_lease: i64,
    /// Faults are over: the cluster must heal.
    pub is_calm: bool,
    /// Clients begin nothing new.
    pub is_closing: bool,
    pub digest: u64,
    pub stats: Stats,
    /// What happened last, if somebody wants to read it.
    pub timeline: Option<VecDeque<String>>,
    pub timeline_max: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub events: u64,
    pub calls: u64,
    pub faults: u64,
    pub marks: BTreeMap<&'static str, u64>,
}

impl World {
    pub fn new(plan: Plan, verbose: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(plan.seed ^ 0x5eed);
        let config = plan.config.clone();
        let ids: Vec<u64> = (1..=config.members as u64).map(|n| n * 0x0101_0101_0101_0101).collect();
        let first = ids.iter().zip(1..).map(|(id, index)| raftpb::Entry {
            r#type: Some(raftpb::EntryType::EntryConfChange.into()),
            term: Some(1),
            index: Some(index),
            data: Some(Change::Add(cluster_member(*id, false)).encode(0).encode_to_vec().into()),
        });
        let first: Vec<_> = first.collect();
        let clients = (0..config.clients).map(|_| Client::new(rng.random_range(0..config.members))).collect();
        let watchers = (0..config.watchers).map(|_| Watcher::new(&mut rng, |rng| key(rng, config.keys))).collect();
        let mut world = Self {
            now: 0,
            base: Instant::now(),
            queue: BTreeMap::new(),
            sequence: 0,
            members: ids.iter().map(|id| Member::new(*id, false)).collect(),
            first,
            clients,
            ops: Vec::new(),
            watchers,
            truth: Truth::new(MIN_TTL),
            cuts: BTreeMap::new(),
            loss: (config.loss, u64::MAX),
            late: config.late,
            promised: BTreeMap::new(),
            expired: BTreeMap::new(),
            revocations_seen: 0,
            requests: BTreeMap::new(),
            refused: Vec::new(),
            next_member: 0xa0,
            is_smaller: false,
            next_lease: 1,
            is_calm: false,
            is_closing: false,
            digest: 0xcbf2_9ce4_8422_2325,
            stats: Stats::default(),
            timeline: verbose.then(VecDeque::new),
            timeline_max: crate::variable("SIM_LINES").unwrap_or(300) as usize,
            rng,
            plan,
        };
        for m in 0..world.members.len() {
            world.start(m);
        }
        for client in 0..world.clients.len() {
            let at = world.rng.random_range(0..2 * SECOND);
            world.at(at, Event::Client(client));
        }
        for watcher in 0..world.watchers.len() {
            let at = world.rng.random_range(0..3 * SECOND);
            world.at(at, Event::Watcher(watcher));
        }
        for fault in 0..world.plan.faults.len() {
            let at = world.plan.faults[fault].at;
            world.at(at, Event::Fault(fault));
        }
        world
    }

    pub fn config(&self) -> &Config {
        &self.plan.config
    }

    /// A hash of all that happened, in its order.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    pub fn note(&mut self, words: &[u64]) {
        for word in words {
            self.digest = (self.digest ^ word).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub fn say(&mut self, text: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(lines) = &mut self.timeline {
            if lines.len() == self.timeline_max {
                lines.pop_front();
            }
            lines.push_back(format!("{:>10.4} s  {}", now as f64 / SECOND as f64, text()));
        }
    }

    pub fn mark(&mut self, branch: &'static str) {
        *self.stats.marks.entry(branch).or_default() += 1;
    }

    pub fn instant(&self) -> Instant {
        self.base + Duration::from_micros(self.now)
    }

    pub fn at(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.queue.insert((at.max(self.now), self.sequence), event);
    }

    pub fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    pub fn draw(&mut self, (from, to): (u64, u64)) -> u64 {
        if from >= to { from } else { self.rng.random_range(from..to) }
    }

    // Running

    /// Runs until `until`, or until `done` holds.
    pub fn run(&mut self, until: u64, mut done: impl FnMut(&World) -> bool) -> bool {
        let mut looked_at = 0;
        while let Some((&(at, sequence), _)) = self.queue.first_key_value() {
            if at > until {
                break;
            }
            let event = self.queue.remove(&(at, sequence)).expect("it was just seen");
            self.now = at;
            self.stats.events += 1;
            self.dispatch(event);
            if self.now >= looked_at {
                if done(self) {
                    return true;
                }
                looked_at = self.now + 20 * MS;
            }
        }
        self.now = until;
        done(self)
    }

    /// The member that an event happens to, and the process it is for, if only that.
    pub fn whose(event: &Event) -> Option<(usize, Option<u64>)> {
        match event {
            Event::Tick(m, e)
            | Event::Sync(m, e)
            | Event::LeaseTick(m, e)
            | Event::DiskDone(m, e)
            | Event::Applied(m, e)
            | Event::HubWork(m, e)
            | Event::ConfChanged(m, e, _)
            | Event::Hashed(m, e, _)
            | Event::Unreachable(m, e, _)
            | Event::SendSnapshot(m, e, _)
            | Event::StepSnapshot(m, e)
            | Event::SnapshotReport(m, e, ..)
            | Event::WatchRequest(_, m, e, _)
            | Event::Removed(m, e) => Some((*m, Some(*e))),
            Event::Message(m, _) | Event::Forwarded(m, _) => Some((*m, None)),
            _ => None,
        }
    }

    pub fn dispatch(&mut self, event: Event) {
        if let Some((m, epoch)) = Self::whose(&event) {
            let member = &self.members[m];
            if member.process.is_none() || epoch.is_some_and(|epoch| epoch != member.epoch) {
                return;
            }
            if member.paused_until > self.now {
                let until = member.paused_until;
                return self.at(until, event);
            }
            self.note(&[self.now, m as u64]);
        }
        match event {
            Event::Tick(m, epoch) => self.tick(m, epoch),
            Event::Sync(m, epoch) => self.sync(m, epoch),
            Event::LeaseTick(m, epoch) => {
                self.lease_tick(m);
                self.after(50 * MS, Event::LeaseTick(m, epoch));
            }
            Event::DiskDone(m, _) => self.disk_done(m),
            Event::Applied(m, _) => self.apply(m),
            Event::HubWork(m, _) => self.hub_work(m),
            Event::ConfChanged(m, _, done) => {
                let process = self.process(m);
                process.raft.conf_changed(done, &mut process.output);
                self.turn(m);
            }
            Event::Hashed(m, _, hash) => {
                self.process(m).core.hashed(hash);
                self.commit(m);
                self.turn(m);
            }
            Event::Unreachable(m, _, id) => {
                self.process(m).raft.unreachable(id);
                self.turn(m);
            }
            Event::Message(m, message) => self.deliver(m, *message),
            Event::SendSnapshot(m, epoch, message) => self.send_snapshot(m, epoch, message),
            Event::Snapshot(m, from, message, file, expected) => {
                self.snapshot_arrives(m, from, *message, file, expected)
            }
            Event::StepSnapshot(m, _) => self.step_snapshot(m),
            Event::SnapshotReport(m, _, to, delivered) => {
                self.process(m).raft.snapshot_sent(to, delivered);
                self.turn(m);
            }
            Event::Client(client) => self.client_turn(client),
            Event::Request(op) => self.request(op),
            Event::Forwarded(m, op) => self.renew(m, op),
            Event::Answer(op, answer) => self.answered(op, answer),
            Event::GiveUp(op) => self.give_up(op),
            Event::Watcher(watcher) => self.watcher_turn(watcher),
            Event::WatchRequest(watcher, m, _, stream) => self.watch_request(watcher, m, stream),
            Event::Deliver(watcher, stream) => self.deliver_watch(watcher, stream),
            Event::Fault(fault) => self.fault(fault),
            Event::Restart(m) => self.start(m),
            Event::RoomAgain(m) => self.members[m].disk.set_room(None),
            Event::Removed(m, _) => {
                self.say(|| format!("m{m} stops: it was removed"));
                self.crash(m, false);
                self.members[m].lost = Some("removed".to_owned());
            }
            Event::Replace(m) => self.replace(m),
        }
    }

    pub fn process(&mut self, m: usize) -> &mut Process {
        self.members[m].process.as_mut().expect("looked up before")
    }

    pub fn is_up(&self, m: usize) -> bool {
        self.members[m].process.is_some()
    }

    /// Up, and not standing still.
    pub fn is_awake(&self, m: usize) -> bool {
        self.is_up(m) && self.members[m].paused_until <= self.now
    }

    pub fn index_of(&self, id: u64) -> Option<usize> {
        self.members.iter().position(|member| member.id == id)
    }

    // Starting and crashing

    pub fn start(&mut self, m: usize) {
        if self.is_up(m) || self.members[m].lost.is_some() {
            return;
        }
        let seed = self.plan.seed;
        let (config, now) = (self.plan.config.clone(), self.now);
        let first = std::mem::take(&mut self.first);
        let started = self.members[m].start(&config, &first, now, seed);
        self.first = first;
        let member = &mut self.members[m];
        member.restart_at = None;
        match started {
            Ok(process) => {
                member.process = Some(process);
                let epoch = member.epoch;
                let applied = self.process(m).applied;
                self.say(|| format!("m{m} starts, applied {applied}"));
                let offset = self.draw((0, TICK));
                self.after(offset, Event::Tick(m, epoch));
                self.after(config.sync_interval, Event::Sync(m, epoch));
                self.after(50 * MS, Event::LeaseTick(m, epoch));
                self.turn(m);
            }
            Err(reason) => {
                if member.full_until > now || reason.contains("injected failure") {
                    // Somebody makes room and starts it again.
                    let at = member.full_until.max(now + 100 * MS);
                    return self.restart_after(m, at - now + MS);
                }
                assert!(member.may_refuse || reason == "removed", "m{m} does not start any more: {reason}");
                self.mark("damaged data is refused at start");
                self.say(|| format!("m{m} refuses to start: {reason}"));
                self.members[m].lost = Some(reason);
                self.after(100 * MS, Event::Replace(m));
            }
        }
    }

    /// The process ends. With `power` the disk keeps what was synced, and of the rest what the seed says.
    pub fn crash(&mut self, m: usize, power: bool) {
        let Some(mut process) = self.members[m].process.take() else { return };
        self.say(|| format!("m{m} crashes{}", if power { ", the power is gone" } else { "" }));
        let member = &mut self.members[m];
        member.paused_until = 0;
        if power && !process.in_hand.is_empty() {
            // In the middle of a write.
            let fault = [None, Some(DiskFault::Write), Some(DiskFault::Sync), Some(DiskFault::Sync)];
            if let Some(fault) = fault[self.rng.random_range(0..4)] {
                self.members[m].disk.fail(fault, 1);
                let jobs = std::mem::take(&mut process.in_hand);
                let _ = write(&mut process.writer, jobs);
            }
        }
        drop(process);
        let seed = self.rng.random_range(0..u64::MAX);
        let member = &mut self.members[m];
        if power {
            member.disk.crash(seed)
        } else {
            member.disk.kill()
        }
        let rng = &mut self.rng;
        member.stores.crash(power, |unsynced| rng.random_range(0..=unsynced));
        self.connections_break(m);
    }

    pub fn connections_break(&mut self, m: usize) {
        for op in 0..self.ops.len() {
            if !self.ops[op].done && self.ops[op].member == m && self.ops[op].arrived {
                self.after(MS, Event::Answer(op, Answer::Broken));
            }
        }
        for w in 0..self.watchers.len() {
            if self.watchers[w].at.is_some_and(|(at, ..)| at == m) {
                self.watchers[w].cut_off();
                let again = self.draw((5 * MS, 300 * MS));
                self.after(again, Event::Watcher(w));
            }
        }
    }

    pub fn restart_after(&mut self, m: usize, delay: u64) {
        let at = self.now + delay;
        self.members[m].restart_at = Some(at);
        self.at(at, Event::Restart(m));
    }

    // Network

    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cuts.get(&(from, to)).is_some_and(|until| *until > self.now)
    }

    pub fn cut(&mut self, links: &[(usize, usize)], until: u64) {
        for link in links {
            self.cuts.insert(*link, until);
        }
    }

    pub fn heal(&mut self) {
        self.cuts.clear();
        self.loss = (0.0, u64::MAX);
        for member in &mut self.members {
            member.slow = (0, 0);
            member.slow_apply = (0, 0);
        }
        self.plan.config.repeat = 0.0;
        self.late = 0.0;
        // Clients take what is due in time for the last look.
        self.plan.config.take = (100, MS);
        for w in 0..self.watchers.len() {
            if let Some((.., stream)) = self.watchers[w].at {
                for nth in 0..self.watchers[w].queue.len() as u64 {
                    self.after(nth * MS, Event::Deliver(w, stream));
                }
                self.watchers[w].queue.iter_mut().for_each(|(at, ..)| *at = 0);
            }
        }
        self.plan.config.snapshot_loss = 0.0;
    }

    pub fn send(&mut self, from: usize, message: raftpb::Message) {
        let (kind, to) = (message.r#type(), message.to());
        let Some(to) = self.index_of(to) else { return };
        let epoch = self.members[from].epoch;
        if kind == MessageType::MsgSnap {
            return self.after(MS, Event::SendSnapshot(from, epoch, Box::new(message)));
        }
        if self.is_cut(from, to) {
            if self.rng.random_bool(0.3) {
                self.after(MS, Event::Unreachable(from, epoch, self.members[to].id));
            }
            return;
        }
        let (loss, until) = self.loss;
        let loss = if until > self.now { loss } else { self.plan.config.loss };
        if loss > 0.0 && self.rng.random_bool(loss) {
            return;
        }
        // The transport never sends a forwarded proposal twice.
        let repeat = self.plan.config.repeat;
        if repeat > 0.0 && kind != MessageType::MsgProp && self.rng.random_bool(repeat) {
            let latency = self.draw(self.plan.config.latency) * 3;
            self.after(latency, Event::Message(to, Box::new(message.clone())));
        }
        let late = self.late;
        let is_late = late > 0.0 && self.rng.random_bool(late);
        let latency = self.draw(if is_late { LATE } else { self.plan.config.latency });
        self.after(latency, Event::Message(to, Box::new(message)));
    }

    pub fn deliver(&mut self, m: usize, message: raftpb::Message) {
        let from = message.from();
        if self.process(m).members().is_removed(from) {
            // Who was removed is told so, and stops.
            if let Some(zombie) = self.index_of(from)
                && self.is_up(zombie)
            {
                let epoch = self.members[zombie].epoch;
                self.after(MS, Event::Removed(zombie, epoch));
            }
            return;
        }
        self.note(&[from, message.r#type() as u64, message.term(), message.index()]);
        if self.timeline.is_some() && message.r#type() != MessageType::MsgHeartbeat {
            let (kind, term, index) = (message.r#type(), message.term(), message.index());
            let from = self.index_of(from).unwrap_or(99);
            let (entries, commit, reject) = (message.entries.len(), message.commit(), message.reject());
            let skip = matches!(kind, MessageType::MsgHeartbeatResp);
            if !skip {
                self.say(|| {
                    format!("m{from} → m{m} {kind:?} term {term} index {index} entries {entries} commit {commit} reject {reject}")
                });
            }
        }
        if message.r#type() == MessageType::MsgAppResp && message.reject() {
            self.mark("an append was rejected, and is sent again");
        }
        if let Err(reason) = self.process(m).raft.step(message) {
            assert!(self.members[m].may_refuse, "members send what members take: {reason}");
            // Its operator sees the warning, and replaces it.
            self.mark("a log that lost its end is noticed by what the leader says");
            self.crash(m, false);
            self.members[m].lost = Some(reason.to_owned());
            return self.after(100 * MS, Event::Replace(m));
        }
        self.turn(m);
    }

    pub fn send_snapshot(&mut self, m: usize, epoch: u64, message: Box<raftpb::Message>) {
        let least = message.snapshot.as_ref().and_then(|s| s.metadata.as_ref()).map_or(0, |meta| meta.index());
        if self.process(m).applied < least {
            return self.after(10 * MS, Event::SendSnapshot(m, epoch, message));
        }
        let (file, expected) = self.members[m].export();
        let mut message = message;
        let metadata = raftpb::SnapshotMetadata {
            conf_state: Some(expected.conf_state.clone()),
            index: Some(expected.index),
            term: Some(expected.term),
        };
        message.snapshot = Some(raftpb::Snapshot { data: Some(Bytes::new()), metadata: Some(metadata) });
        let to = message.to();
        let arrives = self.draw(self.plan.config.snapshot_transfer);
        let lost = self.rng.random_bool(self.plan.config.snapshot_loss);
        match self.index_of(to) {
            Some(to) if !lost && !self.is_cut(m, to) => {
                self.say(|| format!("m{m} sends m{to} a snapshot of {}", expected.index));
                self.after(arrives, Event::Snapshot(to, (m, epoch), message, file, expected));
            }
            _ => {
                self.mark("snapshot send interrupted");
                self.after(arrives, Event::SnapshotReport(m, epoch, to, false));
            }
        }
    }

    pub fn snapshot_arrives(
        &mut self,
        m: usize,
        (from, epoch): (usize, u64),
        message: raftpb::Message,
        file: Bytes,
        expected: Expected,
    ) {
        let id = self.members[m].id;
        let delivered = self.is_up(m) && !self.is_cut(from, m);
        self.after(MS, Event::SnapshotReport(from, epoch, id, delivered));
        if !delivered {
            return;
        }
        if self.process(m).is_receiving {
            self.mark("a second snapshot while one is taken in");
        }
        if self.process(m).raft.reading().leader == 0 {
            self.mark("snapshot during an election");
        }
        self.process(m).incoming.push_back((message, file, expected));
        self.receive(m);
    }

    /// One database is taken in at a time.
    pub fn receive(&mut self, m: usize) {
        let process = self.process(m);
        if process.is_receiving {
            return;
        }
        let Some((_, file, expected)) = process.incoming.front().cloned() else { return };
        process.is_receiving = true;
        let epoch = self.members[m].epoch;
        if expected.index > self.process(m).applied {
            self.members[m].prepare(file, &expected).expect("a member's snapshot can be taken in");
        }
        let took = self.draw(self.plan.config.disk);
        self.after(took, Event::StepSnapshot(m, epoch));
    }

    pub fn step_snapshot(&mut self, m: usize) {
        let process = self.process(m);
        let (message, _, expected) = process.incoming.pop_front().expect("one is being taken in");
        process.raft.step(message).expect("members send what members take");
        let is_taken = process.raft.has_snapshot();
        // The next one waits until this one is in use.
        process.is_receiving = is_taken && process.applied < expected.index;
        self.turn(m);
        if self.is_up(m) && !self.process(m).is_receiving {
            self.receive(m);
        }
    }

    // raft, log, apply

    pub fn tick(&mut self, m: usize, epoch: u64) {
        let instant = self.instant();
        let process = self.process(m);
        process.status.ticked(instant);
        process.raft.tick(instant);
        self.after(TICK, Event::Tick(m, epoch));
        self.turn(m);
    }

    /// Carries out what the core asks for, and what follows from that at once.
    pub fn turn(&mut self, m: usize) {
        if !self.is_up(m) {
            return;
        }
        let most = self.plan.config.apply_queue;
        let process = self.process(m);
        let (room, apply) = (process.wal_queue.len() < 64, process.work.len() < most);
        process.raft.poll(process.applied, Room { log: room, apply }, &mut process.output);
        let output = std::mem::take(&mut process.output);
        process.wal_queue.extend(output.appends.into_iter().map(Job::Append));
        process.installs.extend(output.install);
        process.work.extend(output.committed);
        for (reply, outcome) in output.answers {
            reply.answer(outcome);
        }
        for message in output.messages {
            self.send(m, message);
        }
        self.disk_begin(m);
        self.apply_begin(m);
        self.follow_leadership(m);
        self.collect(m);
    }

    pub fn disk_begin(&mut self, m: usize) {
        let now = self.now;
        let process = self.process(m);
        if !process.in_hand.is_empty() || process.wal_queue.is_empty() {
            return;
        }
        process.in_hand = process.wal_queue.drain(..).collect();
        let (each, until) = self.members[m].slow;
        let slow = if until > now { each } else { 0 };
        let took = self.draw(self.plan.config.disk) + slow;
        let epoch = self.members[m].epoch;
        self.after(took, Event::DiskDone(m, epoch));
    }

    pub fn disk_done(&mut self, m: usize) {
        let process = self.process(m);
        let jobs = std::mem::take(&mut process.in_hand);
        match write(&mut process.writer, jobs) {
            Ok(done) => {
                for number in done.persisted {
                    process.raft.persisted(number, &mut process.output);
                }
                for index in done.compacted {
                    process.raft.compact(index);
                }
                self.turn(m);
            }
            Err(e) => {
                // Nothing more is acknowledged, the process ends.
                self.say(|| format!("m{m} ends: {e}"));
                self.mark("the log's disk failed");
                self.crash(m, false);
                let down = self.draw((100 * MS, SECOND));
                self.restart_after(m, down);
            }
        }
    }

    pub fn apply_begin(&mut self, m: usize) {
        let process = self.process(m);
        let waits = process.is_applying
            || (process.work.is_empty() && process.installs.is_empty() && !process.core.is_cleaning());
        if !waits {
            process.is_applying = true;
            let (each, until) = self.members[m].slow_apply;
            let slow = if until > self.now { each } else { 0 };
            let took = self.draw(self.plan.config.apply) + slow;
            let epoch = self.members[m].epoch;
            self.after(took, Event::Applied(m, epoch));
        }
    }

    /// One turn of the applier: control first, then a batch, then a slice of clean-up.
    pub fn apply(&mut self, m: usize) {
        self.process(m).is_applying = false;
        if let Some(install) = self.process(m).installs.pop_front() {
            self.say(|| format!("m{m} installs the snapshot of {}", install.index));
            self.mark("snapshot installed");
            self.members[m].install(install);
            self.publish(m, Vec::new());
            let process = self.process(m);
            process.raft.installed(install.index);
            if process.is_receiving {
                process.is_receiving = false;
                self.receive(m);
            }
            return self.turn(m);
        }
        let most = self.plan.config.batch;
        let mut taken = 0;
        while taken < most
            && let Some(entry) = self.process(m).work.pop_front()
        {
            taken += 1;
            let id = self.members[m].id;
            let (index, term, conf_change) = (entry.index, entry.term, entry.conf_change);
            self.truth.applied(id, index, term, &entry.data, conf_change);
            self.process(m).core.apply(entry);
            // Compared with the other members at these places, so a batch ends there.
            let is_new = self.process(m).core.applied_index() == index;
            if is_new && (index % 16 == 0 || conf_change) {
                self.commit(m);
                let hash = self.state_hash(m);
                self.truth.state(id, index, hash);
            }
        }
        self.commit(m);
        if let Some(job) = self.process(m).core.take_hash_job() {
            let hash = job.run().expect("memory is read");
            let id = self.members[m].id;
            self.truth.compaction(id, &hash);
            let took = self.draw((MS, 300 * MS));
            let epoch = self.members[m].epoch;
            self.after(took, Event::Hashed(m, epoch, Some(hash)));
        }
        if self.process(m).core.is_cleaning() {
            let keys = self.plan.config.clean;
            self.process(m).core.clean_slice(keys);
            self.commit(m);
        }
        self.revoked();
        self.turn(m);
    }

    pub fn clean_all(&mut self, m: usize) {
        while self.is_up(m) && self.process(m).core.is_cleaning() {
            self.process(m).core.clean_slice(1_000);
            self.commit(m);
        }
    }

    pub fn commit(&mut self, m: usize) {
        let effects = match self.process(m).core.commit() {
            Ok(Some(effects)) => effects,
            Ok(None) => return,
            Err(e) => panic!("memory fails only when told to: {e}"),
        };
        self.publish(m, effects.changes);
        let now_ms = self.now.div_ceil(MS);
        let process = self.process(m);
        for notice in effects.lease_notices {
            match notice {
                actd::apply::LeaseNotice::Granted { id, ttl } => process.expirer.on_granted(id, ttl, now_ms),
                actd::apply::LeaseNotice::Gone { id } => process.expirer.on_revoked(id),
            }
        }
        for (reply, outcome) in effects.answers {
            reply.answer(outcome);
        }
        if let Some(done) = effects.conf_changed {
            let epoch = self.members[m].epoch;
            let delay = self.draw(self.plan.config.hub_delay);
            self.after(delay, Event::ConfChanged(m, epoch, done));
        }
        let id = self.members[m].id;
        if self.process(m).members().is_removed(id) {
            let epoch = self.members[m].epoch;
            self.after(SECOND, Event::Removed(m, epoch));
        }
    }

    pub fn publish(&mut self, m: usize, changes: Vec<actd::mvcc::change::Change>) {
        let capacity = self.plan.config.hub_queue;
        let process = self.process(m);
        let view = std::sync::Arc::new(process.core.view());
        process.view.publish(view.clone());
        process.applied = view.applied_index;
        if process.streams.is_empty() {
            return;
        }
        if process.published.len() >= capacity {
            process.skipped = true;
        } else {
            let published = Published { view: view.kv.clone(), changes: changes.into(), raft_term: view.applied_term };
            process.published.push_back(published);
        }
        self.wake_hub(m);
    }

    pub fn state_hash(&mut self, m: usize) -> u64 {
        let process = self.process(m);
        let view = process.view.load_full();
        let hash = scan_kv(&view.kv, &*process.in_use, 0).expect("the newest view can be hashed");
        let mut hash_all =
            u64::from(hash.hash) ^ (hash.compact_revision as u64) << 40 ^ (hash.hash_revision as u64) << 20;
        let mut add = |word: u64| hash_all = (hash_all ^ word).wrapping_mul(0x0000_0100_0000_01b3);
        for (id, ttl, remaining) in view.leases.iter() {
            [id as u64, ttl as u64, remaining as u64].into_iter().for_each(&mut add);
        }
        for member in view.members.iter() {
            [member.id, u64::from(member.is_learner)].into_iter().for_each(&mut add);
        }
        view.members.removed().for_each(&mut add);
        let leases: Vec<_> = view.leases.iter().collect();
        self.say(|| format!("m{m} at {}: {hash:?} {leases:?}", view.applied_index));
        hash_all
    }

    pub fn sync(&mut self, m: usize, epoch: u64) {
        let (count, interval) = (self.plan.config.snapshot_count, self.plan.config.sync_interval);
        let process = self.process(m);
        let applied = process.applied;
        if applied != process.synced {
            actd::storage::Storage::sync(&*process.in_use).expect("memory fails only when told to");
            process.synced = applied;
            if applied - process.checkpointed > count {
                process.checkpointed = applied;
                if let Some(record) = process.raft.checkpoint(applied) {
                    process.wal_queue.push_back(Job::Snapshot(record));
                    self.mark("checkpoint");
                }
            }
        }
        self.after(interval, Event::Sync(m, epoch));
        self.turn(m);
    }

    // The end

    /// Members as the most advanced process knows them.
    pub fn membership(&self) -> Option<Members> {
        // Who begins to join knows nobody yet.
        let belongs = |process: &&Process| process.members().get(process.settings.member_id).is_some();
        let up = self.members.iter().filter_map(|member| member.process.as_deref()).filter(belongs);
        up.max_by_key(|process| process.applied).map(Process::members)
    }

    /// Everybody who belongs to the cluster is up, has applied everything and knows the leader.
    pub fn is_healed(&self) -> bool {
        let Some(members) = self.membership() else { return false };
        let mut leader = 0;
        members.iter().all(|member| {
            let Some(process) = self.index_of(member.id).and_then(|m| self.members[m].process.as_ref()) else {
                return false;
            };
            let now = process.raft.reading();
            leader = if leader == 0 { now.leader } else { leader };
            let done = process.applied == self.truth.executed && now.commit == self.truth.executed;
            done && now.leader != 0 && now.leader == leader && !process.core.is_cleaning()
        })
    }

    /// Who is where, for who asks why there is no healing.
    pub fn describe(&self) -> String {
        let one = |(m, member): (usize, &Member)| match &member.process {
            None => format!("m{m} ({:x}) down, lost {:?}", member.id, member.lost),
            Some(process) => {
                let now = process.raft.reading();
                let (leader, applied, cleaning) = (now.leader, process.applied, process.core.is_cleaning());
                format!(
                    "m{m} ({:x}) leader {leader:x} commit {} applied {applied} cleaning {cleaning}",
                    member.id, now.commit
                )
            }
        };
        let members: Vec<String> = self.members.iter().enumerate().map(one).collect();
        let list = |members: &Members| members.iter().map(|m| format!("{:x} learner {}", m.id, m.is_learner)).collect();
        let known: Vec<String> = self.membership().as_ref().map(list).unwrap_or_default();
        format!("executed {}; cluster {known:?}; {}", self.truth.executed, members.join("; "))
    }

    /// Nothing of an operation is under way any more.
    pub fn is_idle(&self) -> bool {
        self.ops.iter().all(|op| op.done)
    }

    /// The last looks, when all is quiet.
    pub fn finish(&mut self) {
        for id in std::mem::take(&mut self.refused) {
            self.truth.refused(id);
        }
        let members = self.membership().expect("the cluster has healed");
        let mut hashes = BTreeSet::new();
        for member in members.iter() {
            let m = self.index_of(member.id).expect("the cluster has healed");
            assert_eq!(self.process(m).members(), members, "m{m} knows other members");
            let req =
                RangeRequest { key: b"\0".as_slice().into(), range_end: b"\0".as_slice().into(), ..Default::default() };
            let process = self.process(m);
            let view = process.view.load_full();
            let all = range::range(&view.kv, &*process.in_use, &req).expect("the newest view is read");
            let model = &self.truth.model;
            assert_eq!(
                all,
                model.range(&req, model.revision, model.compacted).expect("it exists"),
                "m{m} holds other keys"
            );
            assert_eq!(view.kv.compact_revision, model.compacted, "m{m} compacted elsewhere");
            hashes.insert(self.state_hash(m));
        }
        assert_eq!(hashes.len(), 1, "members hash to {hashes:x?} at the same revision");
        for watcher in &self.watchers {
            watcher.finish(&self.truth.model);
        }
    }
}

/// What the log's writer did.
#[derive(Default)]
struct Written {
    persisted: Vec<u64>,
    compacted: Vec<u64>,
}

/// As the log's actor: control first, then all appends as few writes.
fn write(writer: &mut actd::wal::Writer, jobs: Vec<Job>) -> Result<Written, actd::wal::Error> {
    let mut done = Written::default();
    let (records, appends): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|job| matches!(job, Job::Snapshot(_)));
    for job in records.into_iter().chain(appends) {
        match job {
            Job::Snapshot(record) => {
                writer.snapshot(&record)?;
                done.compacted.push(record.index());
            }
            Job::Append(append) => done.persisted.extend(writer.add(append)?),
        }
    }
    done.persisted.extend(writer.write()?);
    Ok(done)
}

pub fn cluster_member(id: u64, is_learner: bool) -> ClusterMember {
    ClusterMember { id, peer_urls: vec![format!("http://m{id:x}:2380")], is_learner, ..ClusterMember::default() }
}

pub fn key(rng: &mut StdRng, keys: usize) -> Bytes {
    Bytes::from(format!("k{:02}", rng.random_range(0..keys)))
}
