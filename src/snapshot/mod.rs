//! Checkpoints: the store synced in the background, so that the log before it can go. Snapshots: the state as a
//! database file for backups and other members (`export.rs`, `backup.rs`), and such a file as a store (`import.rs`).
//!
//! The checkpointer actor owns nothing but its schedule. Each tick it syncs the store if something was applied; every
//! `--snapshot-count` entries, or 64 MB of rows and log written, it tells raft how far the store is safe, and raft has
//! the WAL write a snapshot record and drop what lies below it. Its inbox holds one tick; a disk that is slow is not
//! asked twice. A failed sync ends the process.

pub mod backup;
pub mod bbolt;
pub mod checksum;
mod error;
pub mod export;
pub mod import;
#[cfg(test)]
mod tests;
pub mod v2;

pub use self::error::Error;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    actor::{Actor, Message, Turn, shell::Flow},
    raft::{self, RaftSender},
    storage::Storage,
    telemetry::Metrics,
};

/// How often the store is synced: often enough that a flush has little to sync.
pub const SYNC_INTERVAL: Duration = Duration::from_millis(500);
/// Log written since the last checkpoint that asks for one before `--snapshot-count` does.
const LOG_BYTES_BETWEEN: u64 = 64 << 20;

/// Time to sync.
pub struct Tick;

impl Message for Tick {
    const KINDS: &'static [&'static str] = &["sync"];
}

pub struct Wiring {
    pub storage: Arc<dyn Storage>,
    pub raft: RaftSender,
    /// Newest applied index whose batch is committed.
    pub applied: Arc<AtomicU64>,
    pub entries_between: u64,
    pub metrics: Metrics,
}

pub struct Checkpointer {
    wiring: Wiring,
    synced: u64,
    checkpointed: u64,
    checkpointed_bytes: u64,
}

impl Checkpointer {
    pub fn new(wiring: Wiring) -> Self {
        let applied = wiring.applied.load(Ordering::Acquire);
        Self { wiring, synced: 0, checkpointed: applied, checkpointed_bytes: 0 }
    }
}

impl Actor for Checkpointer {
    type Message = Tick;
    type Control = ();

    fn on_message(&mut self, _: Tick, _: &Turn) {
        // Read before the sync: every batch up to here is committed, so the sync covers it.
        let applied = self.wiring.applied.load(Ordering::Acquire);
        if applied == self.synced {
            return;
        }
        let began = Instant::now();
        if let Err(e) = self.wiring.storage.sync() {
            panic!("cannot sync the store: {e}");
        }
        self.wiring.metrics.store_sync.record(began.elapsed());
        self.synced = applied;
        let log_bytes = self.wiring.metrics.wal_bytes.load(Ordering::Relaxed);
        if applied - self.checkpointed > self.wiring.entries_between
            || log_bytes - self.checkpointed_bytes > LOG_BYTES_BETWEEN
        {
            self.checkpointed = applied;
            self.checkpointed_bytes = log_bytes;
            self.wiring.raft.control(raft::Control::Checkpoint { synced: applied });
        }
    }

    fn on_control(&mut self, (): (), _: &Turn) -> Flow {
        Flow::Continue
    }

    fn on_turn_end(&mut self, _: &Turn) {}
}
