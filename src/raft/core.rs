//! The raft core: proposals, reads, messages, ticks and durable answers in; log writes, committed entries and messages out.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use bytes::Bytes;

use raft::{
    Config, ProgressState, RawNode, SnapshotStatus, StateRole,
    eraftpb::{self as rs, MessageType},
};

use super::{
    Answer, Append, Committed, Inspection, Install, Progress, Proposal, Reading, convert,
    held::Held,
    lines::Lines,
    log::MemLog,
    reads::{ReadRequest, Reads},
};
use crate::{
    apply::{ConfChanged, Error, Response, Ticket},
    pb::{raftpb, walpb},
    sim::{self, Bug, HashMap},
};

/// How a member starts.
#[derive(Debug, Clone)]
pub struct Options {
    pub id: u64,
    pub election_ticks: usize,
    pub heartbeat_ticks: usize,
    pub pre_vote: bool,
    /// Commit may run this many entries ahead of apply before proposals are refused.
    pub apply_lag_max: u64,
    /// The same for revocations of leases: what makes room goes on longer.
    pub revoke_lag_max: u64,
    /// Entries kept behind a checkpoint for followers that lag.
    pub catch_up_entries: u64,
    /// Bytes of them kept in memory at most.
    pub catch_up_bytes: usize,
    /// Differs between members and between starts: names of read rounds, election timeouts.
    pub seed: u64,
}

/// What the log and the store know at start.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Index and term of the newest usable WAL snapshot record.
    pub compacted: (u64, u64),
    pub entries: Vec<raftpb::Entry>,
    pub hard_state: raftpb::HardState,
    /// Members as the store has them at `applied`.
    pub conf_state: raftpb::ConfState,
    pub applied: u64,
}

/// What is to be done after a poll, in this order: appends beside messages, then committed entries, then answers.
#[derive(Debug, Default)]
pub struct Output {
    pub appends: Vec<Append>,
    pub committed: Vec<Committed>,
    pub messages: Vec<raftpb::Message>,
    pub answers: Vec<Answer>,
    /// A snapshot whose record is durable: apply is to take on the state it names.
    pub install: Option<Install>,
}

/// Where there is room downstream.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub log: bool,
    pub apply: bool,
}

impl Room {
    pub const EVERYWHERE: Room = Room { log: true, apply: true };
}

/// A log write under way.
struct InFlight {
    number: u64,
    /// Messages that promise what it makes durable.
    promises: Vec<raftpb::Message>,
    /// Last index of it, if it has entries or a snapshot.
    end: Option<u64>,
    install: Option<Install>,
    since_tick: u64,
}

/// A leader that was removed still says what is committed: the others may not have heard of the removal, and the one who is
/// left of two could not commit it by itself.
struct Farewell {
    /// While this is the term: nobody else leads in it.
    term: u64,
    /// To whom, and up to where its log is known to be the leader's.
    others: Vec<(u64, u64)>,
}

/// A database on its way to another member: the log from `index` on is kept for it.
struct SnapshotOut {
    index: u64,
    /// Set when it was delivered (or not): kept until then.
    until_tick: Option<u64>,
}

pub struct Core {
    node: RawNode<MemLog>,
    options: Options,
    /// Taken from the inbox, not yet in the log: no leader is known, or it cannot be reached.
    queued: VecDeque<Proposal>,
    /// Given to the leader, not yet applied; by request id, with their content.
    pending: BTreeMap<u64, (Bytes, Ticket)>,
    /// Proposals of others that came while none could be taken or passed on.
    held_proposals: Held,
    reads: Reads,
    /// Read requests of others that came before this leader has committed anything of its term.
    held_reads: Held,
    answers: Vec<Answer>,
    /// Something for this leader was lost, and nothing has come from it since: what is proposed now waits for it or for
    /// the next one.
    out_of_reach: Option<u64>,
    /// Readys the WAL has not answered yet.
    in_flight: VecDeque<InFlight>,
    /// Number of the newest Ready, and of the newest one with another term or vote.
    number: u64,
    voted_in: u64,
    /// The commit index has moved since the log was last told. It is written with what is written next: nothing rests on it.
    commit_unwritten: bool,
    /// It is worth a write of its own.
    commit_wanted: bool,
    /// Committed entries that wait for a membership change to be in force, or for room in apply's inbox.
    held: VecDeque<Committed>,
    held_bytes: usize,
    /// The membership change apply has been given.
    conf_change_at: Option<u64>,
    /// A follower's messages that must not go out before that change is in force.
    held_messages: Vec<raftpb::Message>,
    /// Highest index the WAL has made durable. Invariant: nothing above it goes to apply.
    durable_index: u64,
    /// Index of the newest snapshot taken in; membership changes up to it are in its configuration.
    installed_index: u64,
    /// The snapshot that apply has not taken on yet.
    installing: bool,
    snapshots_out: HashMap<u64, SnapshotOut>,
    farewell: Option<Farewell>,
    /// What others may have been told before this member was alone, and acknowledged.
    alone_from: u64,
    ticks: u64,
    stopping: bool,
}

/// etcd's limits for one append message and for messages in flight to one follower.
const APPEND_BYTES_MAX: u64 = 1 << 20;
const INFLIGHT_MAX: usize = 512;
/// Committed entries handed out by one Ready: bounds how long apply's inbox grows in one go.
const COMMITTED_BYTES_MAX: u64 = 4 << 20;
/// Proposals are forwarded in messages of about this size.
const FORWARD_BYTES_MAX: usize = 1 << 20;
/// Bytes of committed entries that wait for apply before this member stops taking more: as much again as apply's inbox holds.
const HELD_BYTES_MAX: usize = 64 << 20;
/// Ticks after which a read round is asked for again: 500 ms with the usual tick.
const READ_RETRY_TICKS: u64 = 5;
/// Ticks a log is kept for a follower after its snapshot was delivered: 30 s with the usual tick.
const SNAPSHOT_KEEP_TICKS: u64 = 300;

impl Core {
    pub fn new(options: Options, recovered: Recovered) -> Result<Self, String> {
        let mut hard_state = convert::hard_state_from_pb(&recovered.hard_state);
        // The commit record may lag behind the store: it is never synced for its own sake.
        hard_state.commit = hard_state.commit.max(recovered.applied);
        let entries = recovered
            .entries
            .iter()
            .map(|e| convert::entry_from_pb(e).ok_or_else(|| format!("log entry {e:?} has a type no member writes")))
            .collect::<Result<Vec<_>, _>>()?;
        let conf_state = convert::conf_state_from_pb(&recovered.conf_state);
        let mut log = MemLog::new(recovered.compacted, entries, hard_state, conf_state);
        log.applied = recovered.applied;
        let durable_index = log.last();
        let config = Config {
            id: options.id,
            election_tick: options.election_ticks,
            heartbeat_tick: options.heartbeat_ticks,
            applied: recovered.applied,
            max_size_per_msg: APPEND_BYTES_MAX,
            max_inflight_msgs: INFLIGHT_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_MAX,
            check_quorum: true,
            pre_vote: options.pre_vote,
            ..Default::default()
        };
        let logger = slog::Logger::root(Lines, slog::o!());
        let node = RawNode::new(&config, log, &logger).map_err(|e| format!("raft refuses this log: {e}"))?;
        Ok(Self {
            node,
            queued: VecDeque::new(),
            pending: BTreeMap::new(),
            held_proposals: Held::default(),
            reads: Reads::new(options.seed),
            options,
            held_reads: Held::default(),
            answers: Vec::new(),
            out_of_reach: None,
            in_flight: VecDeque::new(),
            number: 0,
            voted_in: 0,
            commit_unwritten: false,
            commit_wanted: false,
            held: VecDeque::new(),
            held_bytes: 0,
            conf_change_at: None,
            held_messages: Vec::new(),
            durable_index,
            installed_index: 0,
            installing: false,
            snapshots_out: HashMap::default(),
            farewell: None,
            alone_from: 0,
            ticks: 0,
            stopping: false,
        })
    }

    fn leads(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    pub fn propose(&mut self, proposal: Proposal) {
        if self.stopping {
            self.answers.push((proposal.ticket.reply, Err(Error::Stopped)));
        } else {
            self.queued.push_back(proposal);
        }
    }

    /// Somebody wants to read what is committed now.
    pub fn read(&mut self, request: ReadRequest) {
        if self.stopping {
            self.answers.push((request.reply, Err(Error::Stopped)));
        } else {
            self.reads.add(request);
        }
    }

    /// A message of another member. What does not fit is told, for the log. Panics if the log here has lost its end.
    pub fn step(&mut self, message: raftpb::Message) -> Result<(), &'static str> {
        let message = convert::message_from_pb(message, self.options.id)?;
        self.out_of_reach = self.out_of_reach.filter(|leader| *leader != message.from);
        match message.msg_type {
            MessageType::MsgHeartbeat if self.is_from_leader(&message) => {
                let last = self.node.raft.raft_log.last_index();
                assert!(
                    message.commit <= last,
                    "the leader {:x} says that entry {} is committed and that this member has acknowledged it, but the log \
                     here ends at {last}: was its end lost? A member that has lost what it acknowledged could help to elect a \
                     leader without it, so this one ends. Remove it from the cluster, empty its data directory and add it \
                     as a new one",
                    message.from,
                    message.commit
                );
                drop(self.node.raft.step(message));
            }
            MessageType::MsgAppendResponse if self.accepts_unsent(&message) => {
                return Err("it accepts entries that this leader does not have");
            }
            MessageType::MsgAppendResponse if self.takes_back(&message) => {}
            // Others are asked to lead only when they are up to date.
            MessageType::MsgTimeoutNow if self.installing || self.is_unwritten_alone() => {}
            MessageType::MsgPropose => {
                if !message.entries.iter().all(convert::is_readable) {
                    return Err("a proposal that no member can apply");
                }
                // Nobody waits for it here; a lost one costs its caller a timeout, so it is kept for the next leader.
                self.held_proposals.put(self.ticks, message);
            }
            MessageType::MsgReadIndex => self.step_read(message),
            // A member that was removed is answered with an error that means nothing to anybody.
            _ => drop(self.node.raft.step(message)),
        }
        Ok(())
    }

    /// The membership that is in force here.
    pub fn conf_state(&self) -> raftpb::ConfState {
        convert::conf_state_to_pb(&self.node.store().conf_state)
    }

    /// Nobody leads in a term older than ours, and nobody else in one that this member leads.
    fn is_from_leader(&self, message: &rs::Message) -> bool {
        let term = self.node.raft.term;
        message.term > term || message.term == term && !self.leads()
    }

    fn answers_this_leader(&self, message: &rs::Message) -> bool {
        self.leads() && message.term == self.node.raft.term
    }

    /// The crate would count it for entries that come to these places later, and acknowledge them with nobody else having
    /// them.
    fn accepts_unsent(&self, message: &rs::Message) -> bool {
        self.answers_this_leader(message) && !message.reject && message.index > self.node.raft.raft_log.last_index()
    }

    /// A follower that lacks entries it has acknowledged to this leader: an old message, or the end of its log was lost.
    /// The crate would send them again, and nobody would know that its vote can no longer be trusted. Left alone, it
    /// ends at the next heartbeat.
    fn takes_back(&self, message: &rs::Message) -> bool {
        let progress = self.node.raft.prs().get(message.from);
        self.answers_this_leader(message) && message.reject && progress.is_some_and(|p| message.reject_hint < p.matched)
    }

    /// True right after the step of a snapshot that raft goes on from.
    pub fn has_snapshot(&self) -> bool {
        self.node.raft.snap().is_some()
    }

    /// One tick of the raft clock. What has waited past its deadline is told so.
    pub fn tick(&mut self, now: Instant) {
        self.ticks += 1;
        let election_ticks = self.options.election_ticks as u64;
        let hangs = self.in_flight.front().is_some_and(|write| self.ticks - write.since_tick >= election_ticks);
        if hangs && !self.is_sole_voter() {
            // A leader that cannot write must make room for one that can: no heartbeat, no candidacy.
            if self.leads() {
                tracing::error!("the log's disk does not answer; stepping down as leader");
                let term = self.node.raft.term;
                self.node.raft.become_follower(term, raft::INVALID_ID);
            }
        } else if !self.installing && !self.is_unwritten_alone() {
            // Whoever has not taken on its snapshot yet stands for no election: raft would look at entries that the
            // snapshot replaced.
            self.set_election_timeout();
            self.node.tick();
        }
        self.campaign_alone();
        self.say_farewell();
        self.held_proposals.expire((self.ticks + 1).saturating_sub(2 * election_ticks));
        let (ticks, members) = (self.ticks, self.node.raft.prs());
        // Whoever was removed meanwhile gets none any more.
        self.snapshots_out
            .retain(|id, out| members.get(*id).is_some() && out.until_tick.is_none_or(|until| ticks < until));

        let late = |ticket: &Ticket| ticket.deadline <= now;
        // Deadlines differ between callers, so the whole queue is looked at; it is long only when nothing moves.
        if self.queued.iter().any(|p| late(&p.ticket)) {
            let (gone, waiting): (VecDeque<_>, _) =
                std::mem::take(&mut self.queued).into_iter().partition(|p| late(&p.ticket));
            self.queued = waiting;
            // Never handed to raft: nothing was done (D-16).
            self.answers.extend(gone.into_iter().map(|p| (p.ticket.reply, Err(Error::DeadlineExceeded))));
        }
        // Given to the leader: it may still take effect (D-17, D-20).
        let gone: Vec<u64> = self.pending.iter().filter(|(_, (_, ticket))| late(ticket)).map(|(id, _)| *id).collect();
        let gone = gone.into_iter().filter_map(|id| self.pending.remove(&id));
        self.answers.extend(gone.map(|(_, ticket)| (ticket.reply, Err(Error::Timeout))));
        let gone = self.reads.late(now);
        self.answers.extend(gone.into_iter().map(|read| (read.reply, Err(Error::Timeout))));
    }

    fn say_farewell(&mut self) {
        let raft = &mut self.node.raft;
        let Some(farewell) = self.farewell.as_ref().filter(|farewell| farewell.term == raft.term) else { return };
        let committed = raft.raft_log.committed;
        raft.msgs.extend(farewell.others.iter().map(|(id, matched)| rs::Message {
            msg_type: MessageType::MsgHeartbeat,
            from: self.options.id,
            to: *id,
            term: farewell.term,
            commit: committed.min(*matched),
            ..Default::default()
        }));
    }

    /// In place of the crate's choice, which comes from a generator of its own: a function of seed and term, so that
    /// one seed gives one run.
    fn set_election_timeout(&mut self) {
        let ticks = self.options.election_ticks;
        let mut x = self.options.seed ^ self.node.raft.term.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let spread = (x ^ (x >> 31)) % ticks as u64;
        self.node.raft.set_randomized_election_timeout(ticks + spread as usize);
    }

    fn is_sole_voter(&self) -> bool {
        self.node.raft.prs().conf().voters().ids().iter().eq([self.options.id])
    }

    /// A sole voter that would win an election before its log is on disk, as whoever others have just left: the crate
    /// lets nobody lead without.
    fn is_unwritten_alone(&self) -> bool {
        let log = &self.node.raft.raft_log;
        !self.leads() && self.is_sole_voter() && log.persisted < log.last_index()
    }

    /// Nobody else is told of anything.
    fn is_alone(&self) -> bool {
        self.is_sole_voter() && self.node.raft.prs().conf().learners().is_empty()
    }

    /// A sole voter need not wait for an election timeout: nobody else can lead.
    pub fn campaign_alone(&mut self) {
        let raft = &self.node.raft;
        let may = raft.promotable() && !self.installing && !self.is_unwritten_alone();
        if raft.state == StateRole::Follower && self.is_sole_voter() && may {
            // Refused while a membership change is committed but not applied; the next tick asks again.
            let _ = self.node.campaign();
        }
    }

    /// The WAL made everything up to Ready `number` durable.
    pub fn persisted(&mut self, number: u64, output: &mut Output) {
        self.node.on_persist_ready(number);
        while self.in_flight.front().is_some_and(|write| write.number <= number)
            && let Some(write) = self.in_flight.pop_front()
        {
            // An append that replaced a tail ends lower than the one before it.
            self.durable_index = write.end.unwrap_or(self.durable_index);
            output.install = write.install.or(output.install.take());
            self.send(write.promises, output);
        }
    }

    /// apply has recorded the membership change at `done.index` (or refused it): put it in force, answer, go on.
    pub fn conf_changed(&mut self, done: ConfChanged, output: &mut Output) {
        if self.conf_change_at == Some(done.index) {
            self.conf_change_at = None;
        } else {
            assert!(done.index <= self.installed_index, "apply answered another membership change");
        }
        let was_alone = self.is_alone();
        // A snapshot taken in meanwhile has the change in its configuration.
        if done.index > self.installed_index {
            if let Some((kind, node_id)) = done.change
                && let Some(change) = convert::conf_change(kind, node_id)
            {
                match self.node.apply_conf_change(&change) {
                    Ok(state) => self.node.mut_store().conf_state = state,
                    Err(e) => panic!("a recorded membership change is refused by raft: {e}"),
                }
            }
            if self.is_alone() && !was_alone {
                self.alone_from = self.node.raft.raft_log.committed;
            }
            self.applied(done.index);
            let raft = &mut self.node.raft;
            if raft.state == StateRole::Leader && raft.prs().get(self.options.id).is_none() {
                // Removed itself: the crate would count on its own acknowledgements.
                let term = raft.term;
                let others = raft.prs().iter().map(|(id, other)| (*id, other.matched)).collect();
                self.farewell = Some(Farewell { term, others });
                raft.become_follower(term, raft::INVALID_ID);
                self.say_farewell();
            }
        }
        self.answers.extend(done.answer);
        output.messages.append(&mut self.held_messages);
        self.campaign_alone();
    }

    /// apply has taken on the snapshot at `index`.
    pub fn installed(&mut self, index: u64) {
        assert_eq!(index, self.installed_index, "apply took on another snapshot");
        self.installing = false;
        self.applied(index);
    }

    fn applied(&mut self, index: u64) {
        self.node.advance_apply_to(index);
        self.node.mut_store().applied = index;
    }

    pub fn unreachable(&mut self, id: u64) {
        self.node.report_unreachable(id);
        if id == self.node.raft.leader_id {
            self.out_of_reach = Some(id);
        }
    }

    /// The database for `to` was delivered, or not.
    pub fn snapshot_sent(&mut self, to: u64, delivered: bool) {
        if let Some(out) = self.snapshots_out.get_mut(&to) {
            out.until_tick = Some(self.ticks + SNAPSHOT_KEEP_TICKS);
        }
        self.node.report_snapshot(to, if delivered { SnapshotStatus::Finish } else { SnapshotStatus::Failure });
    }

    /// The store is synced up to `synced`. The snapshot record to write, if the log can be dropped further.
    pub fn checkpoint(&mut self, synced: u64) -> Option<walpb::Snapshot> {
        let log = self.node.store();
        let synced = if sim::has(Bug::LogDroppedTooEarly) { log.applied } else { synced };
        // A membership change that apply has recorded may not be in force yet: until then raft looks at its entry.
        let synced = synced.min(log.applied);
        let mut index = log.compactable(synced, self.options.catch_up_entries, self.options.catch_up_bytes);
        // Whoever is getting a snapshot needs what follows it, within reason.
        if log.bytes() < 4 * self.options.catch_up_bytes
            && let Some(first) = self.snapshots_out.values().map(|out| out.index).min()
        {
            index = index.min(first);
        }
        let term = raft::Storage::term(log, index).ok()?;
        let first = raft::Storage::first_index(log).ok()?;
        if index < first {
            return None;
        }
        // The record counts once a commit index that covers it is in the log.
        self.commit_wanted = true;
        Some(walpb::Snapshot { index: Some(index), term: Some(term), conf_state: Some(self.conf_state()) })
    }

    pub fn compact(&mut self, index: u64) {
        self.node.mut_store().compact(index);
    }

    /// Refuses what waits and whatever comes.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.answers.extend(self.queued.drain(..).map(|p| (p.ticket.reply, Err(Error::Stopped))));
        let pending = std::mem::take(&mut self.pending).into_values();
        self.answers.extend(pending.map(|(_, ticket)| (ticket.reply, Err(Error::Stopped))));
        self.answers.extend(self.reads.take_all().into_iter().map(|read| (read.reply, Err(Error::Stopped))));
    }

    /// Puts what waits into the log, makes every Ready that the log's writer has room for, and gives apply what it has
    /// room for. A slow applier holds up neither heartbeats nor votes nor commits.
    pub fn poll(&mut self, applied: u64, room: Room, output: &mut Output) {
        if room.log && self.held_bytes < HELD_BYTES_MAX {
            if room.apply {
                self.propose_queued(applied);
            }
            self.step_held();
            self.ask_for_reads();
            while self.node.has_ready() {
                self.take_ready(output);
            }
        }
        if room.log && self.commit_wanted {
            self.write_commit(output);
        }
        if room.apply {
            self.hand_out_held(output);
        }
        output.answers.append(&mut self.answers);
    }

    fn write_commit(&mut self, output: &mut Output) {
        self.commit_wanted = false;
        if !std::mem::take(&mut self.commit_unwritten) {
            return;
        }
        let hard_state = Some(convert::hard_state_to_pb(&self.node.store().hard_state));
        let number = self.number;
        output.appends.push(Append { number, snapshot: None, entries: Vec::new(), hard_state, sync: false });
    }

    /// True while a proposal would be lost.
    fn is_leaderless(&self) -> bool {
        let raft = &self.node.raft;
        raft.leader_id == raft::INVALID_ID
            || self.out_of_reach == Some(raft.leader_id)
            || self.leads() && raft.lead_transferee.is_some()
    }

    fn propose_queued(&mut self, applied: u64) {
        if self.queued.is_empty() || self.is_leaderless() {
            return;
        }
        let leads_in = self.leads().then_some(self.node.raft.term);
        let is_over = |p: &Proposal| p.as_leader_of.is_some_and(|term| leads_in != Some(term));
        if self.queued.iter().any(is_over) && !sim::has(Bug::RevokeAfterLeadership) {
            let (refused, kept): (VecDeque<_>, _) = std::mem::take(&mut self.queued).into_iter().partition(is_over);
            self.queued = kept;
            self.answers.extend(refused.into_iter().map(|p| (p.ticket.reply, Err(Error::NotLeader))));
        }
        let lag = self.node.raft.raft_log.committed.saturating_sub(applied);
        let Options { apply_lag_max, revoke_lag_max, .. } = self.options;
        if lag > apply_lag_max {
            let is_let_through = |p: &Proposal| lag <= revoke_lag_max && p.ticket.request.lease_revoke.is_some();
            let (kept, refused): (VecDeque<_>, _) =
                std::mem::take(&mut self.queued).into_iter().partition(is_let_through);
            self.queued = kept;
            self.answers.extend(refused.into_iter().map(|p: Proposal| (p.ticket.reply, Err(Error::TooManyRequests))));
        }
        while !self.queued.is_empty() {
            let (mut entries, mut ids, mut bytes) = (Vec::new(), Vec::new(), 0);
            let bytes_max = if self.leads() { usize::MAX } else { FORWARD_BYTES_MAX };
            while bytes < bytes_max
                && let Some(proposal) = self.queued.pop_front()
            {
                bytes += proposal.data.len();
                let entry_type =
                    if proposal.conf_change { rs::EntryType::EntryConfChange } else { rs::EntryType::EntryNormal };
                entries.push(rs::Entry { entry_type, data: proposal.data.clone(), ..Default::default() });
                ids.push(proposal.id);
                self.pending.insert(proposal.id, (proposal.data, proposal.ticket));
            }
            let message = rs::Message {
                msg_type: MessageType::MsgPropose,
                from: self.options.id,
                entries: entries.into(),
                ..Default::default()
            };
            let refused = match self.step_proposal(message) {
                Ok(refused) => refused,
                // As a whole: nothing is in the log.
                Err(_) => (0..ids.len()).collect(),
            };
            for place in refused {
                if let Some((_, ticket)) = self.pending.remove(&ids[place]) {
                    self.answers.push((ticket.reply, Err(Error::ProposalDropped)));
                }
            }
        }
    }

    /// Steps a proposal. As leader raft sees membership changes without their content, which means other things to the
    /// crate than to etcd; they get it back before anything else looks. Answers the places of changes that raft has put
    /// an empty entry in place of, because another change is under way.
    fn step_proposal(&mut self, mut message: rs::Message) -> Result<Vec<usize>, raft::Error> {
        if !self.leads() {
            return self.node.raft.step(message).map(|()| Vec::new());
        }
        let raft = &mut self.node.raft;
        let first = raft.raft_log.last_index() + 1;
        let mut contents: Vec<(usize, Bytes)> = Vec::new();
        for (place, entry) in message.entries.iter_mut().enumerate() {
            if entry.entry_type != rs::EntryType::EntryNormal {
                contents.push((place, std::mem::take(&mut entry.data)));
            }
        }
        raft.step(message)?;
        let mut refused = Vec::new();
        for (place, content) in contents {
            let index = first + place as u64;
            let mut kept = false;
            let mut give_back = |entries: &mut [rs::Entry]| {
                let is_it = |e: &&mut rs::Entry| e.index == index && e.entry_type != rs::EntryType::EntryNormal;
                for entry in entries.iter_mut().filter(is_it) {
                    entry.data = content.clone();
                    kept = true;
                }
            };
            give_back(&mut raft.raft_log.unstable.entries);
            for message in raft.msgs.iter_mut().filter(|m| m.msg_type == MessageType::MsgAppend) {
                give_back(&mut message.entries);
            }
            if !kept {
                refused.push(place);
            }
        }
        Ok(refused)
    }

    /// Others' requests that can be stepped now.
    fn step_held(&mut self) {
        if !self.is_leaderless() {
            for message in self.held_proposals.take() {
                // Nobody waits for it here, so nobody is told.
                let _ = self.step_proposal(message);
            }
        }
        if !self.leads() {
            self.held_reads = Held::default();
        } else if self.node.raft.commit_to_current_term() {
            for message in self.held_reads.take() {
                self.step_read(message);
            }
        }
    }

    /// A read request, ours or another's, at a leader or on its way to one.
    fn step_read(&mut self, mut message: rs::Message) {
        if self.leads() {
            if !self.node.raft.commit_to_current_term() {
                // The crate would drop it silently.
                self.held_reads.put(self.ticks, message);
                return;
            }
            if let Some(entry) = message.entries.first_mut() {
                entry.data = self.reads.disguise(std::mem::take(&mut entry.data));
            }
        }
        // Without a leader it is lost; the round is asked for again.
        let _ = self.node.raft.step(message);
    }

    fn ask_for_reads(&mut self) {
        let leader = self.node.raft.leader_id;
        for read in self.reads.lost(leader) {
            self.answers.push((read.reply, Err(Error::LeaderChanged)));
        }
        if leader == raft::INVALID_ID || self.leads() && !self.node.raft.commit_to_current_term() {
            return;
        }
        if let Some(context) = self.reads.due(leader, self.ticks, READ_RETRY_TICKS) {
            self.step_read(rs::Message {
                msg_type: MessageType::MsgReadIndex,
                from: self.options.id,
                entries: vec![rs::Entry { data: context, ..Default::default() }].into(),
                ..Default::default()
            });
        }
    }

    /// One Ready, in raft-rs's own order. Nothing may call into the node between `ready` and `advance_append_async`.
    fn take_ready(&mut self, output: &mut Output) {
        let mut ready = self.node.ready();
        let number = ready.number();
        self.number = number;
        let mut messages = ready.take_messages();
        let mut promises = ready.take_persisted_messages();
        let committed = ready.take_committed_entries();
        let entries = ready.take_entries();
        let hard_state = ready.hs().cloned();
        let sync = ready.must_sync();
        let before = &self.node.store().hard_state;
        if hard_state.as_ref().is_some_and(|hs| hs.term != before.term || hs.vote != before.vote) {
            self.voted_in = number;
        }
        if self.voted_in == number || self.in_flight.front().is_some_and(|write| write.number <= self.voted_in) {
            // A sole voter leads before its vote is written. Whoever heard of it and saw it crash could get other entries
            // of the same term from it later.
            promises.splice(0..0, messages.drain(..));
        }
        let install = ready.snapshot().metadata.as_ref().filter(|meta| meta.index > 0).map(|meta| {
            let conf_state = meta.conf_state.clone().unwrap_or_default();
            (Install { index: meta.index, term: meta.term }, conf_state)
        });
        let snapshot = install.as_ref().map(|(install, conf_state)| walpb::Snapshot {
            index: Some(install.index),
            term: Some(install.term),
            conf_state: Some(convert::conf_state_to_pb(conf_state)),
        });
        let install = install.map(|(install, conf_state)| {
            // What the snapshot covers need not be applied any more.
            if !self.held.is_empty() {
                sim::mark("a snapshot covers entries that wait for apply");
            }
            if !sim::has(Bug::SnapshotKeepsEntries) {
                // Their effect comes with the snapshot, their result does not.
                let waiting = self.held.drain(..).filter_map(|entry| entry.ticket);
                self.answers.extend(waiting.map(|ticket| (ticket.reply, Err(Error::Timeout))));
                self.held_bytes = 0;
            }
            self.conf_change_at = None;
            self.installed_index = install.index;
            self.installing = true;
            self.node.mut_store().install(install.index, install.term, conf_state);
            install
        });

        let to_disk: Vec<_> = entries.iter().map(convert::entry_to_pb).collect();
        let end = entries.last().map(|last| last.index).or(install.as_ref().map(|i| i.index));
        // Readable before `advance_append_async`, which forgets them.
        self.node.mut_store().append(entries);
        if let Some(hs) = &hard_state {
            self.node.mut_store().hard_state = hs.clone();
        }
        let reads = ready.take_read_states();
        self.node.advance_append_async(ready);

        let messages = self.outgoing(messages);
        let promises = self.outgoing(promises);
        // A leader's appends may go out beside its own disk write.
        self.send(messages, output);
        for read in reads {
            let original = self.reads.original(&read.request_ctx);
            let context = original.as_deref().unwrap_or(&read.request_ctx);
            let served = self.reads.answered(context);
            self.answers.extend(served.into_iter().map(|r| (r.reply, Ok(Response::ReadIndex(read.index)))));
        }
        if !self.leads() {
            self.reads.forget_originals();
        }

        self.commit_unwritten |= hard_state.is_some();
        if sync {
            self.in_flight.push_back(InFlight { number, promises, end, install, since_tick: self.ticks });
            // A snapshot's record counts only with a commit index that covers it.
            let has_news = std::mem::take(&mut self.commit_unwritten) || snapshot.is_some();
            let hard_state = has_news.then(|| convert::hard_state_to_pb(&self.node.store().hard_state));
            output.appends.push(Append { number, snapshot, entries: to_disk, hard_state, sync });
            if sim::has(Bug::AckBeforeSync) {
                self.persisted(number, output);
            }
        } else if let Some(last) = self.in_flight.back_mut() {
            // Promises of this Ready rest on the write before it, and its number is covered by the next one.
            last.promises.extend(promises);
        } else {
            self.send(promises, output);
            self.node.on_persist_ready(number);
        }
        for entry in committed {
            assert!(entry.index <= self.durable_index, "entry {} is committed but not durable here", entry.index);
            let ticket = self.take_ticket(&entry);
            self.held_bytes += entry.data.len();
            self.held.push_back(Committed {
                index: entry.index,
                term: entry.term,
                conf_change: entry.entry_type != rs::EntryType::EntryNormal,
                data: entry.data,
                ticket,
            });
        }
    }

    /// Who waits for this entry here. An id that came twice, after a clock was set back, pairs nobody with another's entry.
    fn take_ticket(&mut self, entry: &rs::Entry) -> Option<Ticket> {
        if self.pending.is_empty() {
            return None;
        }
        let id = convert::request_id(entry);
        let (data, _) = self.pending.get(&id)?;
        let is_same = data.as_ptr() == entry.data.as_ptr() || *data == entry.data;
        if is_same { self.pending.remove(&id).map(|(_, ticket)| ticket) } else { None }
    }

    /// Messages as they go out: contexts of reads are given back to whom they belong, snapshots are noted.
    fn outgoing(&mut self, messages: Vec<rs::Message>) -> Vec<raftpb::Message> {
        let mut out = Vec::with_capacity(messages.len());
        for mut message in messages {
            if message.msg_type == MessageType::MsgReadIndexResp
                && let Some(entry) = message.entries.first_mut()
            {
                match self.reads.original(&entry.data) {
                    Some(original) => entry.data = original,
                    None => continue, // answered before
                }
            }
            if let Some(meta) = message.snapshot.as_ref().and_then(|s| s.metadata.as_ref()) {
                self.snapshots_out.insert(message.to, SnapshotOut { index: meta.index, until_tick: None });
            }
            out.extend(convert::message_to_pb(message));
        }
        out
    }

    /// A follower must have put a membership change in force before it says anything more.
    fn send(&mut self, messages: Vec<raftpb::Message>, output: &mut Output) {
        if self.conf_change_at.is_some() && !self.leads() {
            self.held_messages.extend(messages);
        } else {
            output.messages.extend(messages);
        }
    }

    /// Gives apply what is committed, up to and with the next membership change.
    fn hand_out_held(&mut self, output: &mut Output) {
        let mut last = None;
        while self.conf_change_at.is_none()
            && !self.installing
            && let Some(entry) = self.held.pop_front()
        {
            self.held_bytes -= entry.data.len();
            if entry.conf_change {
                self.conf_change_at = Some(entry.index);
            } else {
                last = Some(entry.index);
            }
            output.committed.push(entry);
        }
        if let Some(index) = last {
            // Handed out in order counts as applied for raft: apply is idempotent by index, and nothing the crate
            // does with the number depends on the state being there. A membership change is reported when in force.
            self.applied(index);
        }
    }

    pub fn reading(&self) -> Reading {
        let raft = &self.node.raft;
        let conf = raft.prs().conf();
        Reading {
            term: raft.term,
            leader: raft.leader_id,
            commit: raft.raft_log.committed,
            last_index: raft.raft_log.last_index(),
            is_leader: raft.state == StateRole::Leader,
            is_learner: conf.learners().contains(&self.options.id),
            is_alone: self.is_alone(),
            alone_from: self.alone_from,
        }
    }

    /// Hands leadership to `to`; 0: to the voter whose log has come furthest.
    pub fn transfer(&mut self, to: u64) {
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader {
            return;
        }
        let voters = raft.prs().conf().voters().ids();
        let best = raft
            .prs()
            .iter()
            .filter(|(id, _)| **id != self.options.id && voters.contains(**id))
            .max_by_key(|(_, p)| p.matched);
        let to = if to == 0 { best.map(|(id, _)| *id) } else { Some(to) };
        if let Some(to) = to {
            self.node.transfer_leader(to);
        }
    }

    pub fn pending(&self) -> usize {
        self.pending.len() + self.queued.len()
    }

    pub fn reads_pending(&self) -> usize {
        self.reads.pending()
    }

    pub fn log_bytes(&self) -> usize {
        self.node.store().bytes()
    }

    pub fn inspect(&self) -> Inspection {
        let raft = &self.node.raft;
        let role = match raft.state {
            StateRole::Follower => "StateFollower",
            StateRole::Candidate => "StateCandidate",
            StateRole::Leader => "StateLeader",
            StateRole::PreCandidate => "StatePreCandidate",
        };
        Inspection {
            id: raft.id,
            term: raft.term,
            vote: raft.vote,
            commit: raft.raft_log.committed,
            leader: raft.leader_id,
            role,
            transferee: raft.lead_transferee.unwrap_or(0),
            progress: self.progress(),
        }
    }

    fn progress(&self) -> Vec<Progress> {
        if self.node.raft.state != StateRole::Leader {
            return Vec::new();
        }
        let state = |s| match s {
            ProgressState::Probe => "StateProbe",
            ProgressState::Replicate => "StateReplicate",
            ProgressState::Snapshot => "StateSnapshot",
        };
        let progress = |(id, p): (&u64, &raft::Progress)| Progress {
            id: *id,
            matched: p.matched,
            next: p.next_idx,
            state: state(p.state),
        };
        self.node.raft.prs().iter().map(progress).collect()
    }
}
