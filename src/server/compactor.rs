//! The compactor actor: the auto-compaction schedule, one compaction at a time.

use std::sync::{
    Arc,
    mpsc::{Receiver, sync_channel},
};
use std::time::{Duration, Instant};

use crate::{
    actor::{self, Actor, Turn, shell::Flow},
    api::Server,
    apply::Error,
    config::Config,
    mvcc::auto_compaction::{Mode, Schedule, parse_retention},
    pb::etcdserverpb::{CompactionRequest, InternalRaftRequest},
};

/// Look at the schedule.
pub struct Tick;

impl actor::Message for Tick {
    const KINDS: &'static [&'static str] = &["tick"];
}

/// The schedule the configuration asks for, if any.
pub fn schedule(config: &Config) -> Result<Option<Schedule>, String> {
    let mode = match config.auto_compaction_mode.as_str() {
        "revision" => Mode::Revision,
        _ => Mode::Periodic,
    };
    let retention = parse_retention(mode, &config.auto_compaction_retention)
        .map_err(|e| format!("error parsing CompactionRetention: {e}"))?;
    Ok(Schedule::new(mode, retention, Duration::ZERO, 1))
}

pub struct Compactor {
    schedule: Schedule,
    server: Arc<Server>,
    runtime: usize,
    tokio: tokio::runtime::Handle,
    start: Instant,
    /// The compaction under way and where its end is told.
    running: Option<(i64, Receiver<bool>)>,
}

impl Compactor {
    pub fn new(schedule: Schedule, server: Arc<Server>, runtime: usize, tokio: tokio::runtime::Handle) -> Self {
        Self { schedule, server, runtime, tokio, start: Instant::now(), running: None }
    }

    fn propose(&mut self, revision: i64) {
        let (done, running) = sync_channel(1);
        let (server, runtime) = (self.server.clone(), self.runtime);
        tracing::info!(revision, "auto-compaction begins");
        self.tokio.spawn(async move {
            let compaction = Some(CompactionRequest { revision, physical: false });
            let outcome = server.propose(InternalRaftRequest { compaction, ..Default::default() }, runtime).await;
            // Compacted by somebody else is as good.
            let compacted = matches!(outcome, Ok(_) | Err(Error::Compacted));
            match outcome {
                Err(e) if !compacted => tracing::warn!(revision, "auto-compaction failed: {e}; it is tried again"),
                _ => tracing::info!(revision, "auto-compaction is done"),
            }
            let _ = done.send(compacted);
        });
        self.running = Some((revision, running));
    }
}

impl Actor for Compactor {
    type Message = Tick;
    type Control = ();

    fn on_message(&mut self, _: Tick, turn: &Turn) {
        let now = turn.now.saturating_duration_since(self.start);
        if let Some((revision, running)) = &self.running {
            match running.try_recv() {
                Ok(true) => self.schedule.compacted(now, *revision),
                Ok(false) | Err(std::sync::mpsc::TryRecvError::Disconnected) => {}
                Err(std::sync::mpsc::TryRecvError::Empty) => return,
            }
            self.running = None;
        }
        let current = self.server.view.load().kv.revision;
        let leads = self.server.raft_status.read().is_leader;
        if let Some(revision) = self.schedule.tick(now, current, leads) {
            self.propose(revision);
        }
    }

    fn on_control(&mut self, (): (), _: &Turn) -> Flow {
        Flow::Continue
    }

    fn on_turn_end(&mut self, _: &Turn) {}
}
