//! The raft actor's shell: feeds the core, carries out what it asks for.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::{Append, Committed, Control, Core, Output, Proposal, Status};
use crate::{
    actor::{Actor, Sender, Turn, shell::Flow},
    apply::{self, Replies},
    wal,
};

/// Whom raft talks to, in the order of the data flow.
pub struct Wiring {
    pub wal: Sender<Append, wal::Control>,
    pub apply: Sender<apply::Work, apply::Control>,
    pub replies: Replies,
    pub status: Arc<Status>,
    /// Written by apply: the newest index whose effects are visible.
    pub applied: Arc<AtomicU64>,
}

pub struct RaftActor {
    core: Core,
    wiring: Wiring,
    output: Output,
}

impl RaftActor {
    pub fn new(core: Core, wiring: Wiring) -> Self {
        Self { core, wiring, output: Output::default() }
    }

    fn carry_out(&mut self) {
        let Output { appends, committed, messages, answers } = &mut self.output;
        for append in appends.drain(..) {
            if self.wiring.wal.try_send(append).is_err() {
                // Room was checked before the Ready was taken; so the writer is gone, and with it durability.
                panic!("the write-ahead log's actor has ended");
            }
        }
        if !committed.is_empty() {
            let entries: Vec<Committed> = std::mem::take(committed);
            self.wiring.status.proposals_committed.fetch_add(entries.len() as u64, Ordering::Relaxed);
            if self.wiring.apply.try_send(apply::Work { entries }).is_err() {
                panic!("the applier has ended");
            }
        }
        // A lone member has nobody to write to.
        messages.clear();
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
    type Message = Proposal;
    type Control = Control;

    fn on_message(&mut self, proposal: Proposal, _: &Turn) {
        self.core.propose(proposal);
    }

    fn on_control(&mut self, message: Control, turn: &Turn) -> Flow {
        match message {
            Control::Tick => {
                self.wiring.status.tick_pending.store(false, Ordering::Release);
                self.core.tick(turn.now);
            }
            Control::Persisted(number) => self.core.persisted(number, &mut self.output),
            Control::ConfChanged(done) => self.core.conf_changed(done),
            Control::Checkpoint { synced } => {
                if let Some(record) = self.core.checkpoint(synced) {
                    self.wiring.wal.control(wal::Control::Snapshot(record));
                }
            }
            Control::Compact(index) => self.core.compact(index),
            Control::Transfer { to } => self.core.transfer(to),
            Control::Progress(answer) => {
                let _ = answer.send(self.core.progress());
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

    fn on_turn_end(&mut self, _: &Turn) {
        let room = self.wiring.wal.stats.has_room() && self.wiring.apply.stats.has_room();
        let applied = self.wiring.applied.load(Ordering::Relaxed);
        self.core.poll(applied, room, &mut self.output);
        self.carry_out();
        self.wiring.status.write(&self.core.reading());
        self.wiring.status.proposals_pending.store(self.core.pending() as u64, Ordering::Relaxed);
    }
}
