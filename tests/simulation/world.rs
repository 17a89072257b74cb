//! The world of one run: time, network, members, clients, and the scheduler that moves them. One thread, one seed.
//!
//! What the server's shells do around the cores is done here, in the same order: appends before committed entries,
//! batch before view, view before answers, answers before watchers. Times between the steps are drawn; a crash may come
//! between any two of them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use actd::{
    apply::{self, Error, Outcome},
    cluster::{Change, Member as ClusterMember, Members},
    mvcc::{hash::HashKv, range},
    pb::{
        etcdserverpb::RangeRequest,
        raftpb::{self, MessageType},
    },
    raft::{self, Input},
    wal::sim::Fault as DiskFault,
    watch::StreamId,
};
use bytes::Bytes;
use prost::Message as _;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::oneshot;

use super::{
    client::{Client, Op},
    faults::REMOVED,
    member::{Arrived, MIN_TTL, Member, Process, Receiving, TOOK_BACK, state_hash},
    plan::{Config, LATE, MS, Plan, SECOND, TICK},
    requests::Quiet,
    truth::Truth,
    turns::write,
    watcher::Watcher,
};

pub type OpId = usize;

/// What a member's tick takes, in hundredths of what it should.
pub const SKEW: std::ops::RangeInclusive<u64> = 90..=110;

/// What happens next to whom. The second number is the member's epoch.
pub enum Event {
    Tick(usize, u64),
    Sync(usize, u64),
    LeaseTick(usize, u64),
    RaftTurn(usize, u64),
    ApplyTurn(usize, u64),
    LeaseTurn(usize, u64),
    CheckpointTurn(usize, u64),
    DiskDone(usize, u64),
    HubWork(usize, u64),
    /// The hash of a compaction is computed.
    Hashed(usize, u64, Option<HashKv>),
    Unreachable(usize, u64, u64),
    Message(usize, Box<Sent>),
    /// A database is taken and sent; it arrives; its store is complete.
    SendSnapshot(usize, u64, Box<raftpb::Message>),
    Snapshot(usize, Box<Arrived>),
    /// The store of a snapshot is complete.
    Built(usize, u64),
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
    /// It has had time to hand over, and ends in order.
    Stopped(usize, u64),
    Replace(usize),
    /// The next of a row of removals.
    Shrink(usize),
}

/// A message on its way.
pub struct Sent {
    message: raftpb::Message,
    /// Messages are counted as they are sent.
    nth: u64,
    is_late: bool,
    is_copy: bool,
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
    /// Messages sent, and of each link the last that arrived.
    sent: u64,
    arrived: BTreeMap<(usize, usize), u64>,
    /// Until when clients have been promised that a lease lives, by the leaders of which terms.
    pub promised: BTreeMap<i64, BTreeMap<u64, u64>>,
    /// When a client heard that its revocation was done.
    pub revoked_at: BTreeMap<i64, u64>,
    /// When a lease ran out and was revoked, and in which term.
    pub expired: BTreeMap<i64, (u64, u64)>,
    pub revocations_seen: usize,
    /// When a leader asked last for the revocation of a lease that ran out.
    pub given_up: BTreeMap<i64, u64>,
    pub quiet: Option<Quiet>,
    pub requests: BTreeMap<u64, OpId>,
    pub refused: Vec<u64>,
    /// When a leader was asked last to hand over, and to whom, if to somebody.
    pub handed_over: u64,
    pub handed_to: Option<usize>,
    pub next_member: u64,
    /// A member was asked to leave.
    pub is_smaller: bool,
    pub next_lease: i64,
    /// Faults are over: the cluster must heal.
    pub is_calm: bool,
    /// Clients begin nothing new.
    pub is_closing: bool,
    /// Watches had time to hear of progress by themselves.
    pub is_reported: bool,
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
        Self {
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
            sent: 0,
            arrived: BTreeMap::new(),
            promised: BTreeMap::new(),
            revoked_at: BTreeMap::new(),
            expired: BTreeMap::new(),
            revocations_seen: 0,
            given_up: BTreeMap::new(),
            quiet: None,
            requests: BTreeMap::new(),
            refused: Vec::new(),
            handed_over: 0,
            handed_to: None,
            next_member: 0xa0,
            is_smaller: false,
            next_lease: 1,
            is_calm: false,
            is_closing: false,
            is_reported: false,
            digest: 0xcbf2_9ce4_8422_2325,
            stats: Stats::default(),
            timeline: verbose.then(VecDeque::new),
            timeline_max: crate::variable("SIM_LINES").unwrap_or(300) as usize,
            rng,
            plan,
        }
    }

    /// Everybody starts.
    pub fn begin_all(&mut self) {
        for m in 0..self.members.len() {
            self.members[m].skew = self.rng.random_range(SKEW);
            self.start(m);
        }
        for client in 0..self.clients.len() {
            let at = self.rng.random_range(0..2 * SECOND);
            self.at(at, Event::Client(client));
        }
        for watcher in 0..self.watchers.len() {
            let at = self.rng.random_range(0..3 * SECOND);
            self.at(at, Event::Watcher(watcher));
        }
        for fault in 0..self.plan.faults.len() {
            let at = self.plan.faults[fault].at;
            self.at(at, Event::Fault(fault));
        }
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
            | Event::RaftTurn(m, e)
            | Event::ApplyTurn(m, e)
            | Event::LeaseTurn(m, e)
            | Event::CheckpointTurn(m, e)
            | Event::DiskDone(m, e)
            | Event::HubWork(m, e)
            | Event::Hashed(m, e, _)
            | Event::Unreachable(m, e, _)
            | Event::SendSnapshot(m, e, _)
            | Event::Built(m, e)
            | Event::Stopped(m, e)
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
                self.mark("an event waits for a member that stands still");
                return self.at(until, event);
            }
            self.note(&[self.now, m as u64]);
        }
        let mut kind = DefaultHasher::new();
        std::mem::discriminant(&event).hash(&mut kind);
        self.note(&[kind.finish()]);
        let concerned = Self::whose(&event).map(|(m, _)| m);
        match event {
            Event::Tick(m, epoch) => self.tick(m, epoch),
            Event::Sync(m, epoch) => self.sync(m, epoch),
            Event::LeaseTick(m, epoch) => self.lease_tick(m, epoch),
            Event::RaftTurn(m, _) => self.raft_turn(m),
            Event::ApplyTurn(m, _) => self.apply_turn(m),
            Event::LeaseTurn(m, _) => self.lease_turn(m),
            Event::CheckpointTurn(m, _) => self.checkpoint_turn(m),
            Event::DiskDone(m, _) => self.disk_done(m),
            Event::HubWork(m, _) => self.hub_work(m),
            Event::Hashed(m, _, hash) => drop(self.process(m).apply_tx.control(apply::Control::Hashed(hash))),
            Event::Unreachable(m, _, id) => drop(self.process(m).raft_tx.control(raft::Control::Unreachable(id))),
            Event::Message(m, sent) => self.arrives(m, *sent),
            Event::SendSnapshot(m, epoch, message) => self.send_snapshot(m, epoch, message),
            Event::Snapshot(m, arrived) => self.snapshot_arrives(m, *arrived),
            Event::Built(m, _) => self.built(m),
            Event::SnapshotReport(m, _, to, delivered) => {
                self.process(m).raft_tx.control(raft::Control::SnapshotSent { to, delivered });
            }
            Event::Stopped(m, _) => self.stop(m),
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
                self.mark("a removed member ends");
                self.crash(m, false);
                self.members[m].lost = Some(REMOVED.to_owned());
            }
            Event::Replace(m) => self.replace(m),
            Event::Shrink(to) => {
                if !self.is_calm {
                    self.shrink(to);
                }
            }
        }
        if let Some(m) = concerned {
            self.pump(m);
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
        let (config, now, instant) = (self.plan.config.clone(), self.now, self.instant());
        let first = std::mem::take(&mut self.first);
        if std::mem::take(&mut self.members[m].is_clock_set) {
            self.mark("a start sees a clock that was set");
        }
        let others_hold = self.members[m].had_synced.is_some_and(|held| self.others_hold(m, held.last));
        let started = self.members[m].start(&config, &first, now, instant, others_hold, seed);
        self.first = first;
        let member = &mut self.members[m];
        member.restart_at = None;
        let (id, members_said_so) = (member.id, std::mem::take(&mut member.is_flipped));
        match started {
            Ok(process) => {
                member.process = Some(process);
                let epoch = member.epoch;
                let applied = self.process(m).applied();
                self.say(|| format!("m{m} starts, applied {applied}"));
                // Whatever happened to its log: what it says is what was written.
                let recovered = std::mem::take(&mut self.process(m).recovered);
                self.truth.recovered(id, &recovered);
                let revision = self.process(m).view.load().kv.revision;
                self.truth.starts(id, applied, revision);
                if members_said_so {
                    self.mark("a flipped bit did no harm");
                }
                let offset = self.draw((0, TICK));
                self.after(offset, Event::Tick(m, epoch));
                self.after(config.sync_interval, Event::Sync(m, epoch));
                self.after(50 * MS, Event::LeaseTick(m, epoch));
                self.pump(m);
            }
            Err(reason) => {
                if member.full_until > now || reason.contains("injected failure") {
                    // Somebody makes room and starts it again.
                    self.mark("a start finds a disk that is full or fails");
                    let at = self.members[m].full_until.max(now + 100 * MS);
                    return self.restart_after(m, at - now + MS);
                }
                assert!(member.may_refuse || reason == REMOVED, "m{m} does not start any more: {reason}");
                match reason.as_str() {
                    REMOVED => {}
                    TOOK_BACK => self.mark("a log that lost what nobody else may hold is not started"),
                    _ => self.mark("damaged data is refused at start"),
                }
                self.say(|| format!("m{m} refuses to start: {reason}"));
                self.members[m].lost = Some(reason);
                self.after(100 * MS, Event::Replace(m));
            }
        }
    }

    /// Whether all other voters are up and have applied everything up to `index`: it is durable in each of their logs.
    fn others_hold(&self, m: usize, index: u64) -> bool {
        let Some(members) = self.membership() else { return false };
        let mut others = members.iter().filter(|member| !member.is_learner && member.id != self.members[m].id);
        others.all(|member| {
            let process = self.index_of(member.id).and_then(|m| self.members[m].process.as_ref());
            process.is_some_and(|process| process.applied() >= index)
        })
    }

    /// The process ends. With `power` the disk keeps what was synced, and of the rest what the seed says.
    pub fn crash(&mut self, m: usize, power: bool) {
        let Some(mut process) = self.members[m].process.take() else { return };
        self.say(|| format!("m{m} crashes{}", if power { ", the power is gone" } else { "" }));
        let member = &mut self.members[m];
        member.paused_until = 0;
        member.is_store_broken = false;
        let jobs = std::mem::take(&mut process.in_hand);
        if !jobs.is_empty() {
            // In the middle of a write: nothing of it is there, or a part, or all though nobody was told.
            let faults = [Some(DiskFault::Write), Some(DiskFault::Sync), Some(DiskFault::Sync), None, None];
            let choice = self.rng.random_range(0..=faults.len());
            if let Some(fault) = faults.get(choice) {
                if let Some(fault) = fault {
                    self.members[m].disk.fail(*fault, 1);
                } else {
                    self.mark("a write is complete, and nobody was told");
                }
                let _ = write(&mut process.writer, jobs);
            }
        }
        // Who sends it a database sees the connection break.
        let coming = process.incoming.iter().map(|arrived| arrived.from);
        let coming = coming.chain(process.receiving.iter().map(|receiving| receiving.from));
        let coming: Vec<_> = coming.flatten().collect();
        let id = self.members[m].id;
        for (from, epoch) in coming {
            self.after(MS, Event::SnapshotReport(from, epoch, id, false));
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
        member.stores().crash(power, |unsynced| rng.random_range(0..=unsynced));
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

    /// Whether any of them joins members that there are.
    pub fn cut(&mut self, links: &[(usize, usize)], until: u64) -> bool {
        for link in links {
            self.cuts.insert(*link, until);
        }
        let count = self.members.len();
        links.iter().any(|(from, to)| *from < count && *to < count)
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
            self.mark("a cut keeps a message back");
            if !self.is_cut(to, from) {
                self.mark("a cut of one direction keeps a message back");
            }
            if self.rng.random_bool(0.3) {
                self.after(MS, Event::Unreachable(from, epoch, self.members[to].id));
            }
            return;
        }
        let (loss, until) = self.loss;
        let is_lossy = until > self.now && until != u64::MAX;
        let loss = if until > self.now { loss } else { self.plan.config.loss };
        if loss > 0.0 && self.rng.random_bool(loss) {
            return self.mark(if is_lossy { "a message is lost in a lossy time" } else { "a message is lost" });
        }
        self.sent += 1;
        let nth = self.sent;
        // The transport never sends a forwarded proposal twice.
        let repeat = self.plan.config.repeat;
        if repeat > 0.0 && kind != MessageType::MsgProp && self.rng.random_bool(repeat) {
            let latency = self.draw(self.plan.config.latency) * 3;
            let sent = Sent { message: message.clone(), nth, is_late: false, is_copy: true };
            self.after(latency, Event::Message(to, Box::new(sent)));
        }
        let late = self.late;
        let is_late = late > 0.0 && self.rng.random_bool(late);
        let latency = self.draw(if is_late { LATE } else { self.plan.config.latency });
        let sent = Sent { message, nth, is_late, is_copy: false };
        self.after(latency, Event::Message(to, Box::new(sent)));
    }

    /// What the network did to a message shows when it comes.
    fn arrives(&mut self, m: usize, sent: Sent) {
        let Sent { message, nth, is_late, is_copy } = sent;
        if let Some(from) = self.index_of(message.from()) {
            let last = self.arrived.entry((from, m)).or_default();
            let is_overtaken = nth < *last;
            *last = nth.max(*last);
            if is_overtaken && !is_copy {
                self.mark("a message comes behind one that was sent later");
            }
        }
        if is_late {
            self.mark("a message comes late");
        }
        if is_copy {
            self.mark("a message comes twice");
        }
        self.deliver(m, message);
    }

    pub fn deliver(&mut self, m: usize, message: raftpb::Message) {
        let from = message.from();
        if self.process(m).members().is_removed(from) {
            // Who was removed is told so, and stops.
            if let Some(zombie) = self.index_of(from)
                && self.is_up(zombie)
            {
                self.process(zombie).is_removed.store(true, Ordering::Relaxed);
                self.pump(zombie);
            }
            return;
        }
        let (commit, reject, hint) = (message.commit(), u64::from(message.reject()), message.reject_hint());
        self.note(&[from, message.r#type() as u64, message.term(), message.index(), commit, reject, hint]);
        for entry in &message.entries {
            self.note(&[entry.index(), entry.term(), hashed(entry.data())]);
        }
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
        if message.r#type() == MessageType::MsgTimeoutNow {
            self.mark("leadership handed over");
            self.members[m].told_to_lead = Some(message.term());
        }
        let process = self.process(m);
        // Without room it is dropped.
        if let Some(permit) = process.messages.try_enter(raft::message_bytes(&message)) {
            let _ = process.raft_tx.try_send(Input::Step(Box::new(message), permit));
        }
    }

    pub fn send_snapshot(&mut self, m: usize, epoch: u64, message: Box<raftpb::Message>) {
        let least = message.snapshot.as_ref().and_then(|s| s.metadata.as_ref()).map_or(0, |meta| meta.index());
        if self.process(m).applied() < least {
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
        let is_cut = lost && self.rng.random_bool(0.4);
        let is_flipped = lost && !is_cut && self.rng.random_bool(0.5);
        match self.index_of(to) {
            Some(to) if (!lost || is_cut || is_flipped) && !self.is_cut(m, to) => {
                self.say(|| format!("m{m} sends m{to} a snapshot of {}", expected.index));
                let arrived = Arrived { from: Some((m, epoch)), message: *message, file, expected, is_cut, is_flipped };
                self.after(arrives, Event::Snapshot(to, Box::new(arrived)));
            }
            to_whom => {
                if to_whom.is_some_and(|to| self.is_cut(m, to)) {
                    self.mark("a cut keeps a snapshot back");
                }
                self.mark("snapshot send interrupted");
                self.after(arrives, Event::SnapshotReport(m, epoch, to, false));
            }
        }
    }

    pub fn snapshot_arrives(&mut self, m: usize, mut arrived: Arrived) {
        let (from, epoch) = arrived.from.expect("its sender is named");
        let id = self.members[m].id;
        if !self.is_up(m) || self.is_cut(from, m) {
            return self.after(MS, Event::SnapshotReport(from, epoch, id, false));
        }
        if arrived.is_cut {
            let kept = self.rng.random_range(0..arrived.file.len());
            arrived.file.truncate(kept);
        }
        if arrived.is_flipped {
            let mut file = arrived.file.to_vec();
            let at = self.rng.random_range(0..file.len());
            file[at] ^= 1 << self.rng.random_range(0..8);
            arrived.file = file.into();
        }
        if !arrived.is_cut && !arrived.is_flipped && self.rng.random_bool(0.3) {
            // It came whole, and the connection broke before its sender heard of it.
            self.after(MS, Event::SnapshotReport(from, epoch, id, false));
            arrived.from = None;
        }
        if self.process(m).receiving.is_some() {
            self.mark("a second snapshot while one is taken in");
        }
        if self.process(m).reading().leader == 0 {
            self.mark("snapshot during an election");
        }
        self.process(m).incoming.push_back(arrived);
        self.receive(m);
        self.pump(m);
    }

    fn report(&mut self, m: usize, from: Option<(usize, u64)>, delivered: bool) {
        let id = self.members[m].id;
        if let Some((from, epoch)) = from {
            self.after(MS, Event::SnapshotReport(from, epoch, id, delivered));
        }
    }

    /// One database is taken in at a time.
    pub fn receive(&mut self, m: usize) {
        while self.process(m).receiving.is_none()
            && let Some(arrived) = self.process(m).incoming.pop_front()
        {
            let Arrived { from, message, file, expected, is_cut, is_flipped } = arrived;
            let index = expected.index;
            let is_news = index > self.process(m).applied();
            if is_news || is_cut {
                let built = self.members[m].stores().build(file, &expected);
                if is_cut {
                    assert!(built.is_err(), "a part of a database is taken for a whole");
                    self.mark("a part of a snapshot is refused");
                    self.report(m, from, false);
                    continue;
                }
                if is_flipped && built.is_err() {
                    self.mark("a snapshot with a flipped bit is refused");
                    self.report(m, from, false);
                    continue;
                }
                // One that flipped where nothing is does no harm: states are compared.
                built.expect("a member's snapshot can be taken in");
            }
            let receiving = Receiving { from, index, is_news, taken: None, is_taken: false, message: Some(message) };
            self.process(m).receiving = Some(receiving);
            let (took, epoch) = (self.draw(self.plan.config.disk), self.members[m].epoch);
            self.after(took, Event::Built(m, epoch));
        }
    }

    pub fn built(&mut self, m: usize) {
        let process = self.members[m].process.as_mut().expect("looked up before");
        let receiving = process.receiving.as_mut().expect("one is being taken in");
        let (index, is_news) = (receiving.index, receiving.is_news);
        let (told, taken) = oneshot::channel();
        receiving.taken = Some(taken);
        let message = receiving.message.take().expect("asked once");
        process.raft_tx.control(raft::Control::Snapshot(Box::new(message), told));
        if is_news {
            self.members[m].stores().complete(index);
        }
    }

    /// Whether the database in hand has come to its end.
    pub fn look_at_snapshot(&mut self, m: usize) {
        let process = self.members[m].process.as_mut().expect("looked up before");
        let applied = process.applied();
        let Some(receiving) = &mut process.receiving else { return };
        let Receiving { from, index, is_news, .. } = *receiving;
        if let Some(taken) = &mut receiving.taken {
            match taken.try_recv() {
                Ok(is_taken) => {
                    receiving.taken = None;
                    receiving.is_taken = is_taken;
                    if !is_taken && is_news {
                        self.members[m].stores().discard(index);
                        self.mark("raft has no use for a snapshot");
                    }
                }
                Err(_) => return,
            }
        }
        let process = self.process(m);
        let receiving = process.receiving.as_ref().expect("looked at above");
        let is_asked = receiving.message.is_none() && receiving.taken.is_none();
        // The next one waits until this one is in use.
        if is_asked && (!receiving.is_taken || applied >= index) {
            process.receiving = None;
            self.report(m, from, true);
            self.receive(m);
        }
    }

    // The end

    /// Members as the most advanced process knows them.
    pub fn membership(&self) -> Option<Members> {
        // Who begins to join knows nobody yet.
        let belongs = |process: &&Process| process.members().get(process.id).is_some();
        let up = self.members.iter().filter_map(|member| member.process.as_deref()).filter(belongs);
        up.max_by_key(|process| process.applied()).map(Process::members)
    }

    /// Everybody who belongs to the cluster is up, has applied everything and knows the leader.
    pub fn is_healed(&self) -> bool {
        let Some(members) = self.membership() else { return false };
        let mut leader = 0;
        members.iter().all(|member| {
            let Some(process) = self.index_of(member.id).and_then(|m| self.members[m].process.as_ref()) else {
                return false;
            };
            let now = process.reading();
            leader = if leader == 0 { now.leader } else { leader };
            let done = process.applied() == self.truth.executed && now.commit == self.truth.executed;
            done && now.leader != 0 && now.leader == leader && !process.apply.stepped.is_due()
        })
    }

    /// Who is up waits for members that were removed and have ended, and does not know it. So it is with etcd, where a
    /// leader that removes itself stays for a second only.
    pub fn is_orphaned(&self) -> bool {
        let has_ended = |id: u64| self.index_of(id).is_some_and(|m| !self.is_up(m)) && self.truth.is_removed(id);
        let up = self.members.iter().filter_map(|member| member.process.as_deref());
        let mut voters = up.filter(|process| !self.truth.is_removed(process.id)).filter_map(|process| {
            let members = process.members();
            let voters: Vec<u64> = members.iter().filter(|member| !member.is_learner).map(|member| member.id).collect();
            voters.contains(&process.id).then_some(voters)
        });
        let waits_for_ever = |known: &[u64]| 2 * known.iter().filter(|id| has_ended(**id)).count() >= known.len();
        voters.next().is_some_and(|known| waits_for_ever(&known) && voters.all(|known| waits_for_ever(&known)))
    }

    /// Who is where, for who asks why there is no healing.
    pub fn describe(&self) -> String {
        let one = |(m, member): (usize, &Member)| match &member.process {
            None => format!("m{m} ({:x}) down, lost {:?}", member.id, member.lost),
            Some(process) => {
                let now = process.reading();
                let (leader, applied, due) = (now.leader, process.applied(), process.apply.stepped.is_due());
                format!("m{m} ({:x}) leader {leader:x} commit {} applied {applied} due {due}", member.id, now.commit)
            }
        };
        let members: Vec<String> = self.members.iter().enumerate().map(one).collect();
        let list = |members: &Members| members.iter().map(|m| format!("{:x} learner {}", m.id, m.is_learner)).collect();
        let known: Vec<String> = self.membership().as_ref().map(list).unwrap_or_default();
        format!("executed {}; cluster {known:?}; {}", self.truth.executed, members.join("; "))
    }

    /// No member owes anybody an answer.
    pub fn has_answered(&self) -> bool {
        let owes = |process: &Process| {
            !process.waiters.is_empty()
                || !process.readers.is_empty()
                || !process.renewals.is_empty()
                || !process.defragments.is_empty()
        };
        !self.members.iter().filter_map(|member| member.process.as_deref()).any(owes)
    }

    /// Nothing of an operation is under way any more.
    pub fn is_idle(&self) -> bool {
        self.ops.iter().all(|op| op.done)
    }

    /// What was refused has not come to pass after all.
    pub fn finish_refused(&mut self) {
        for id in std::mem::take(&mut self.refused) {
            self.truth.refused(id);
        }
    }

    /// The last looks, when all is quiet.
    pub fn finish(&mut self) {
        self.finish_refused();
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
            hashes.insert(state_hash(&view, &*self.process(m).in_use));
            self.check_conf_state(m);
            self.check_sizes(m);
            let id = self.members[m].id;
            let index = view.applied_index;
            self.truth.members(id, index, &view.members);
        }
        assert_eq!(hashes.len(), 1, "members hash to {hashes:x?} at the same revision");
        for watcher in &self.watchers {
            watcher.finish(&self.truth.model, self.is_reported);
        }
    }
}

/// For the digest.
pub fn hashed(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

pub fn cluster_member(id: u64, is_learner: bool) -> ClusterMember {
    ClusterMember { id, peer_urls: vec![format!("http://m{id:x}:2380")], is_learner, ..ClusterMember::default() }
}

pub fn key(rng: &mut StdRng, keys: usize) -> Bytes {
    Bytes::from(format!("k{:02}", rng.random_range(0..keys)))
}
