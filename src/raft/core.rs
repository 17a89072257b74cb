//! The raft core: proposals, ticks and durable answers in; log writes, committed entries and messages out.

use std::collections::VecDeque;
use std::time::Instant;

use raft::{
    Config, ProgressState, RawNode, StateRole,
    eraftpb::{self as rs, MessageType},
};

use super::{Answer, Append, Committed, Progress, Proposal, Reading, convert, log::MemLog};
use crate::{
    apply::{ConfChanged, Error, Ticket},
    pb::{raftpb, walpb},
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
    /// Entries kept behind a checkpoint for followers that lag.
    pub catch_up_entries: u64,
    /// Bytes of them kept in memory at most.
    pub catch_up_bytes: usize,
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
    pub messages: Vec<rs::Message>,
    pub answers: Vec<Answer>,
}

struct Pending {
    index: u64,
    term: u64,
    ticket: Ticket,
}

pub struct Core {
    node: RawNode<MemLog>,
    options: Options,
    /// Taken from the inbox, not yet in the log: no leader is known.
    queued: VecDeque<Proposal>,
    /// In the log, not yet committed. Ascending by index.
    pending: VecDeque<Pending>,
    answers: Vec<Answer>,
    /// Ready numbers the WAL has not answered yet, with the messages that wait for them.
    in_flight: VecDeque<(u64, Vec<rs::Message>)>,
    /// Committed entries that wait for a membership change to be in force.
    held: VecDeque<Committed>,
    /// The membership change apply has been given.
    conf_change_at: Option<u64>,
    /// Highest index the WAL has made durable. Invariant: nothing above it goes to apply.
    durable_index: u64,
    /// Last index of each append under way.
    append_ends: VecDeque<(u64, u64)>,
    stopping: bool,
}

/// etcd's limits for one append message and for messages in flight to one follower.
const APPEND_BYTES_MAX: u64 = 1 << 20;
const INFLIGHT_MAX: usize = 512;
/// Committed entries handed out by one Ready: bounds how long apply's inbox grows in one go.
const COMMITTED_BYTES_MAX: u64 = 4 << 20;

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
        let conf_state = rs::ConfState {
            voters: recovered.conf_state.voters,
            learners: recovered.conf_state.learners,
            ..Default::default()
        };
        let log = MemLog::new(recovered.compacted, entries, hard_state, conf_state);
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
        let logger = slog::Logger::root(LogDrain, slog::o!());
        let node = RawNode::new(&config, log, &logger).map_err(|e| format!("raft refuses this log: {e}"))?;
        Ok(Self {
            node,
            options,
            queued: VecDeque::new(),
            pending: VecDeque::new(),
            answers: Vec::new(),
            in_flight: VecDeque::new(),
            held: VecDeque::new(),
            conf_change_at: None,
            durable_index,
            append_ends: VecDeque::new(),
            stopping: false,
        })
    }

    pub fn propose(&mut self, proposal: Proposal) {
        if self.stopping {
            self.answers.push((proposal.ticket.reply, Err(Error::Stopped)));
        } else {
            self.queued.push_back(proposal);
        }
    }

    /// One tick of the raft clock. What has waited past its deadline is told so.
    pub fn tick(&mut self, now: Instant) {
        self.node.tick();
        self.campaign_alone();
        // Deadlines differ between callers, so the whole queue is looked at; it is long only when nothing moves.
        if self.queued.iter().any(|p| p.ticket.deadline <= now) {
            let (late, waiting) = std::mem::take(&mut self.queued).into_iter().partition(|p| p.ticket.deadline <= now);
            self.queued = waiting;
            let late: VecDeque<Proposal> = late;
            // Never handed to raft: nothing was done (D-16).
            self.answers.extend(late.into_iter().map(|p| (p.ticket.reply, Err(Error::DeadlineExceeded))));
        }
        if self.pending.front().is_some_and(|p| p.ticket.deadline <= now) {
            let (late, waiting) = std::mem::take(&mut self.pending).into_iter().partition(|p| p.ticket.deadline <= now);
            self.pending = waiting;
            let late: VecDeque<Pending> = late;
            // In the log: it may still take effect (D-17, D-20).
            self.answers.extend(late.into_iter().map(|p| (p.ticket.reply, Err(Error::Timeout))));
        }
    }

    /// A sole voter need not wait for an election timeout: nobody else can lead.
    pub fn campaign_alone(&mut self) {
        let raft = &self.node.raft;
        let alone = raft.prs().conf().voters().ids().iter().eq([self.options.id]);
        if alone && raft.state == StateRole::Follower && raft.promotable() {
            // Refused while a membership change is committed but not applied; the next tick asks again.
            let _ = self.node.campaign();
        }
    }

    /// The WAL made everything up to Ready `number` durable.
    pub fn persisted(&mut self, number: u64, output: &mut Output) {
        while self.append_ends.front().is_some_and(|(n, _)| *n <= number)
            && let Some((_, end)) = self.append_ends.pop_front()
        {
            // An append that replaced a tail ends lower than the one before it.
            self.durable_index = end;
        }
        self.node.on_persist_ready(number);
        while self.in_flight.front().is_some_and(|(n, _)| *n <= number)
            && let Some((_, messages)) = self.in_flight.pop_front()
        {
            output.messages.extend(messages);
        }
    }

    /// apply has recorded the membership change at `done.index` (or refused it): put it in force, answer, go on.
    pub fn conf_changed(&mut self, done: ConfChanged) {
        assert_eq!(self.conf_change_at.take(), Some(done.index), "apply answered another membership change");
        if let Some((kind, node_id)) = done.change
            && let Some(change) = convert::conf_change(kind, node_id)
        {
            match self.node.apply_conf_change(&change) {
                Ok(state) => self.node.mut_store().conf_state = state,
                Err(e) => panic!("a recorded membership change is refused by raft: {e}"),
            }
        }
        self.node.advance_apply_to(done.index);
        self.answers.extend(done.answer);
        self.campaign_alone();
    }

    /// The store is synced up to `synced`. The snapshot record to write, if the log can be dropped further.
    pub fn checkpoint(&self, synced: u64) -> Option<walpb::Snapshot> {
        let log = self.node.store();
        let index = log.compactable(synced, self.options.catch_up_entries, self.options.catch_up_bytes);
        let term = raft::Storage::term(log, index).ok()?;
        let first = raft::Storage::first_index(log).ok()?;
        (index >= first).then(|| walpb::Snapshot {
            index: Some(index),
            term: Some(term),
            conf_state: Some(convert::conf_state_to_pb(&log.conf_state)),
        })
    }

    pub fn compact(&mut self, index: u64) {
        self.node.mut_store().compact(index);
    }

    /// Refuses what waits and whatever comes.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.answers.extend(self.queued.drain(..).map(|p| (p.ticket.reply, Err(Error::Stopped))));
        self.answers.extend(self.pending.drain(..).map(|p| (p.ticket.reply, Err(Error::Stopped))));
    }

    /// Puts what waits into the log and makes every Ready there is, as long as `room` says there is room downstream.
    pub fn poll(&mut self, applied: u64, room: bool, output: &mut Output) {
        if room {
            self.propose_queued(applied);
            while self.node.has_ready() {
                self.take_ready(output);
            }
            self.hand_out_held(output);
        }
        output.answers.append(&mut self.answers);
    }

    fn propose_queued(&mut self, applied: u64) {
        if self.queued.is_empty() || self.node.raft.state != StateRole::Leader {
            return;
        }
        if self.node.raft.raft_log.committed > applied + self.options.apply_lag_max {
            self.answers.extend(self.queued.drain(..).map(|p| (p.ticket.reply, Err(Error::TooManyRequests))));
            return;
        }
        let entries: Vec<_> =
            self.queued.iter().map(|p| rs::Entry { data: p.data.clone(), ..Default::default() }).collect();
        let first = self.node.raft.raft_log.last_index() + 1;
        let term = self.node.raft.term;
        let message = rs::Message {
            msg_type: MessageType::MsgPropose,
            from: self.options.id,
            entries: entries.into(),
            ..Default::default()
        };
        match self.node.raft.step(message) {
            Ok(()) => {
                let proposals = self.queued.drain(..).enumerate();
                self.pending.extend(proposals.map(|(i, p)| Pending {
                    index: first + i as u64,
                    term,
                    ticket: p.ticket,
                }));
            }
            // Refused as a whole, e.g. during a leadership transfer: nothing is in the log.
            Err(_) => self.answers.extend(self.queued.drain(..).map(|p| (p.ticket.reply, Err(Error::ProposalDropped)))),
        }
    }

    /// One Ready, in raft-rs's own order. Nothing may call into the node between `ready` and `advance_append_async`.
    fn take_ready(&mut self, output: &mut Output) {
        let mut ready = self.node.ready();
        let number = ready.number();
        // A leader's appends may go out beside its own disk write.
        output.messages.extend(ready.take_messages());
        assert!(ready.snapshot().is_empty(), "no snapshot is ever requested by a lone member");

        let committed = ready.take_committed_entries();
        let entries = ready.take_entries();
        let hard_state = ready.hs().cloned();
        let sync = ready.must_sync();
        let promises = ready.take_persisted_messages();

        let to_disk: Vec<_> = entries.iter().map(convert::entry_to_pb).collect();
        if let Some(last) = entries.last() {
            self.append_ends.push_back((number, last.index));
        }
        // Readable before `advance_append_async`, which forgets them.
        self.node.mut_store().append(entries);
        if let Some(hs) = &hard_state {
            self.node.mut_store().hard_state = hs.clone();
        }
        self.node.advance_append_async(ready);

        if !to_disk.is_empty() || hard_state.is_some() {
            self.in_flight.push_back((number, promises));
            let hard_state = hard_state.as_ref().map(convert::hard_state_to_pb);
            output.appends.push(Append { number, entries: to_disk, hard_state, sync });
        } else {
            match self.in_flight.back_mut() {
                // Promises of this Ready rest on the write before it.
                Some((_, waiting)) => waiting.extend(promises),
                None => output.messages.extend(promises),
            }
            if self.in_flight.is_empty() {
                self.node.on_persist_ready(number);
            }
        }
        for entry in committed {
            assert!(entry.index <= self.durable_index, "entry {} is committed but not durable here", entry.index);
            let ticket = self.take_ticket(entry.index, entry.term);
            self.held.push_back(Committed {
                index: entry.index,
                term: entry.term,
                conf_change: entry.entry_type != rs::EntryType::EntryNormal,
                data: entry.data,
                ticket,
            });
        }
    }

    /// Who proposed the entry at `index` here. A proposal whose index went to another term's entry has lost its place.
    fn take_ticket(&mut self, index: u64, term: u64) -> Option<Ticket> {
        while let Some(first) = self.pending.front() {
            if first.index > index {
                return None;
            }
            let pending = self.pending.pop_front()?;
            if pending.index == index && pending.term == term {
                return Some(pending.ticket);
            }
            self.answers.push((pending.ticket.reply, Err(Error::Timeout)));
        }
        None
    }

    /// Gives apply what is committed, up to and with the next membership change.
    fn hand_out_held(&mut self, output: &mut Output) {
        let mut last = None;
        while self.conf_change_at.is_none()
            && let Some(entry) = self.held.pop_front()
        {
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
            self.node.advance_apply_to(index);
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
            sole_voter: conf.voters().ids().iter().eq([self.options.id]),
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

    pub fn log_bytes(&self) -> usize {
        self.node.store().bytes()
    }

    /// Each member's place in the log, this one's included; empty unless this member leads.
    pub fn progress(&self) -> Vec<Progress> {
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

/// Sends raft-rs's own lines to our log.
struct LogDrain;

impl slog::Drain for LogDrain {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
        let message = record.msg();
        match record.level() {
            slog::Level::Critical | slog::Level::Error => tracing::error!(target: "raft", "{message}"),
            slog::Level::Warning => tracing::warn!(target: "raft", "{message}"),
            slog::Level::Info => tracing::info!(target: "raft", "{message}"),
            _ => {}
        }
        Ok(())
    }
}
