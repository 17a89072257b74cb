//! The WAL writer actor: everything queued becomes one write and one sync.
//!
//! Owns the open segment. Its inbox is bounded in bytes; raft looks for room before it takes a Ready, so batches grow by
//! themselves while a sync is under way. A failed write or sync ends the process: nothing is acknowledged after it.

use std::sync::Arc;

use super::{Appended, Wal};
use crate::{
    actor::{Actor, Message, Turn, shell::Flow},
    pb::{raftpb, walpb},
    raft::{self, Append, RaftSender},
};

impl Message for Append {
    const KINDS: &'static [&'static str] = &["append"];

    fn bytes(&self) -> usize {
        self.entries.iter().map(|e| e.data.as_ref().map_or(0, |d| d.len()) + 64).sum::<usize>() + 64
    }
}

#[derive(Debug)]
pub enum Control {
    /// Write this snapshot record, drop segments below it, let raft forget the entries.
    Snapshot(walpb::Snapshot),
    /// Sync what is buffered and end.
    Stop(std::sync::mpsc::SyncSender<()>),
}

/// Told of each write, for metrics.
pub type OnWrite = Arc<dyn Fn(&Appended) + Send + Sync>;

pub struct WalActor {
    wal: Wal,
    raft: RaftSender,
    keep_files: usize,
    entries: Vec<raftpb::Entry>,
    hard_state: Option<raftpb::HardState>,
    sync: bool,
    /// Newest Ready number of the batch in hand.
    number: Option<u64>,
    on_write: OnWrite,
}

impl WalActor {
    pub fn new(wal: Wal, raft: RaftSender, keep_files: usize, on_write: OnWrite) -> Self {
        Self { wal, raft, keep_files, entries: Vec::new(), hard_state: None, sync: false, number: None, on_write }
    }

    fn failed(&self, what: &str, error: impl std::fmt::Display) -> ! {
        tracing::error!("{what}: {error}; nothing more is acknowledged, the process ends");
        self.raft.control(raft::Control::LogFailed);
        std::process::exit(1)
    }

    fn write(&mut self) {
        let Some(number) = self.number.take() else { return };
        match self.wal.append(&self.entries, self.hard_state.as_ref(), self.sync) {
            Ok(appended) => (self.on_write)(&appended),
            Err(e) => self.failed("cannot write the log", e),
        }
        self.entries.clear();
        self.hard_state = None;
        self.sync = false;
        self.raft.control(raft::Control::Persisted(number));
    }
}

impl Actor for WalActor {
    type Message = Append;
    type Control = Control;

    fn on_message(&mut self, append: Append, _: &Turn) {
        if let Some(snapshot) = append.snapshot {
            // Behind everything older, in a write of its own: the entries that follow go on from it.
            self.write();
            let hard_state = append.hard_state.as_ref().expect("a snapshot comes with the hard state that commits it");
            match self.wal.install_snapshot(&snapshot, hard_state) {
                Ok(appended) => (self.on_write)(&appended),
                Err(e) => self.failed("cannot write the log's snapshot record", e),
            }
        }
        self.entries.extend(append.entries);
        self.hard_state = append.hard_state.or(self.hard_state.take());
        self.sync |= append.sync;
        self.number = Some(append.number);
    }

    fn on_control(&mut self, message: Control, _: &Turn) -> Flow {
        match message {
            Control::Snapshot(record) => {
                let index = record.index.unwrap_or(0);
                if let Err(e) = self.wal.append_snapshot(&record) {
                    self.failed("cannot write the log's snapshot record", e);
                }
                // Files that could not be removed are tried again at the next checkpoint.
                if let Err(e) = self.wal.purge(index, self.keep_files) {
                    tracing::warn!("cannot remove old log segments: {e}");
                }
                self.raft.control(raft::Control::Compact(index));
                Flow::Continue
            }
            Control::Stop(done) => {
                self.sync = true;
                self.write();
                let _ = done.send(());
                Flow::Stop
            }
        }
    }

    fn on_turn_end(&mut self, _: &Turn) {
        self.write();
    }
}
