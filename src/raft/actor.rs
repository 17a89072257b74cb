//! The raft actor's shell: feeds the core, carries out what it asks for.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::{Append, Committed, Control, Core, Input, Output, Room, Status};
use crate::{
    actor::{Actor, Sender, Turn, shell::Flow},
    apply::{self, Replies},
    pb::raftpb,
    telemetry::logs::Seldom,
    wal,
};

/// Whom raft talks to, in the order of the data flow.
pub struct Wiring {
    pub wal: Sender<Append, wal::Control>,
    pub apply: Sender<apply::Work, apply::Control>,
    /// Takes messages for other members; never waits.
    pub send: Box<dyn Fn(Vec<raftpb::Message>) + Send>,
    pub replies: Replies,
    pub status: Arc<Status>,
    /// Written by apply: the newest index whose effects are visible.
    pub applied: Arc<AtomicU64>,
}

pub struct RaftActor {
    core: Core,
    wiring: Wiring,
    output: Output,
    /// Lines about messages that are not taken.
    refused: Seldom,
}

impl RaftActor {
    pub fn new(core: Core, wiring: Wiring) -> Self {
        Self { core, wiring, output: Output::default(), refused: Seldom::default() }
    }

    pub fn core(&self) -> &Core {
        &self.core
    }

    fn step(&mut self, message: raftpb::Message) {
        let (kind, from) = (message.r#type(), message.from.unwrap_or(0));
        if let Err(reason) = self.core.step(message) {
            self.wiring.status.messages_refused.fetch_add(1, Ordering::Relaxed);
            if let Some(unsaid) = self.refused.admit() {
                tracing::warn!(from = format!("{from:x}"), ?kind, unsaid, "a peer's message is not taken: {reason}");
            }
        }
    }

    fn carry_out(&mut self) {
        let Output { appends, committed, messages, answers, install } = &mut self.output;
        for append in appends.drain(..) {
            if self.wiring.wal.try_send(append).is_err() {
                // Room was checked before the Ready was taken; so the writer is gone, and with it durability.
                panic!("the write-ahead log's actor has ended");
            }
        }
        if !messages.is_empty() {
            (self.wiring.send)(std::mem::take(messages));
        }
        if let Some(install) = install.take() {
            self.wiring.apply.control(apply::Control::Install(install));
        }
        if !committed.is_empty() {
            let entries: Vec<Committed> = std::mem::take(committed);
            self.wiring.status.proposals_committed.fetch_add(entries.len() as u64, Ordering::Relaxed);
            if self.wiring.apply.try_send(apply::Work { entries }).is_err() {
                panic!("the applier has ended");
            }
        }
        if !answers.is_empty() {
            let mut batch = self.wiring.replies.batch();
            for (reply, outcome) in answers.drain(..) {
                if outcome.is_err() {
                    self.wiring.status.proposals_failed.fetch_add(1, Ordering::Relaxed);
                }
                batch.add(reply, outcome);
            }
            batch.send();
        }
    }
}

impl Actor for RaftActor {
    type Message = Input;
    type Control = Control;

    fn on_message(&mut self, input: Input, _: &Turn) {
        match input {
            Input::Propose(proposal) => self.core.propose(proposal),
            Input::Read(request) => self.core.read(request),
            Input::Step(message, _) => self.step(*message),
        }
    }

    fn on_control(&mut self, message: Control, turn: &Turn) -> Flow {
        match message {
            Control::Tick => {
                self.wiring.status.tick_pending.store(false, Ordering::Release);
                self.wiring.status.ticked(turn.now);
                self.core.tick(turn.now);
            }
            Control::Persisted(number) => self.core.persisted(number, &mut self.output),
            Control::ConfChanged(done) => self.core.conf_changed(done, &mut self.output),
            Control::Installed(index) => self.core.installed(index),
            Control::Snapshot(message, taken) => {
                self.step(*message);
                let _ = taken.send(self.core.has_snapshot());
            }
            Control::Unreachable(id) => self.core.unreachable(id),
            Control::SnapshotSent { to, delivered } => self.core.snapshot_sent(to, delivered),
            Control::AdvanceTicks(ticks) => {
                for _ in 0..ticks {
                    self.core.tick(turn.now);
                }
            }
            Control::Checkpoint { synced } => {
                if let Some(record) = self.core.checkpoint(synced) {
                    self.wiring.wal.control(wal::Control::Snapshot(record));
                }
            }
            Control::Compact(index) => self.core.compact(index),
            Control::Transfer { to } => self.core.transfer(to),
            Control::Inspect(answer) => {
                let _ = answer.send(self.core.inspect());
            }
            Control::LogFailed => panic!("the write-ahead log failed"),
            Control::Stop(done) => {
                self.core.stop();
                self.on_turn_end(turn);
                let _ = done.send(());
                return Flow::Stop;
            }
        }
        Flow::Continue
    }

    fn on_turn_end(&mut self, turn: &Turn) {
        let room = Room { log: self.wiring.wal.stats.has_room(), apply: self.wiring.apply.stats.has_room() };
        let applied = self.wiring.applied.load(Ordering::Relaxed);
        self.core.poll(applied, room, &mut self.output);
        // Before anybody is told: who asks here because of what another member said finds it known (H-41).
        self.wiring.status.write(&self.core.reading(), turn.now);
        self.carry_out();
        self.wiring.status.proposals_pending.store(self.core.pending() as u64, Ordering::Relaxed);
        self.wiring.status.reads_pending.store(self.core.reads_pending() as u64, Ordering::Relaxed);
    }
}
