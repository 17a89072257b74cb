//! The applier's shell: batches, publication, answers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use super::{Batch, Control, Core, Replies, ViewCell, Work, core::LeaseNotice};
use crate::{
    actor::{Actor, Turn, shell::Flow},
    cluster::Members,
    mvcc::hash::CompactionJob,
    raft::{self, Install},
    telemetry::Metrics,
    watch,
};

/// Where the applier's effects go.
pub struct Wiring {
    pub raft: raft::RaftSender,
    pub replies: Replies,
    pub view: ViewCell,
    /// Newest index whose effects are visible.
    pub applied: Arc<AtomicU64>,
    pub hubs: Vec<Hub>,
    pub lease_notices: Box<dyn Fn(Vec<LeaseNotice>) + Send>,
    /// Asks for a NOSPACE alarm.
    pub ask_alarm: Box<dyn Fn() + Send>,
    pub metrics: Metrics,
    /// Switches to the store of a snapshot and reads its state.
    pub install: Box<dyn FnMut(Install) -> anyhow::Result<Core> + Send>,
    /// Computes the hash of a compaction elsewhere and always sends [`Control::Hashed`] in the end.
    pub hash: Box<dyn Fn(CompactionJob) + Send>,
    /// An entry that takes longer is worth a line in the log.
    pub slow_apply: Duration,
    pub clean_up: CleanUp,
    /// Told of the members whenever they have changed, before raft is.
    pub on_members: Box<dyn Fn(&Members) + Send>,
}

/// How fast the clean-up after a compaction goes.
pub struct CleanUp {
    /// Keys looked at and rows removed in one slice.
    pub keys: usize,
    /// Between two slices, beside the entries that come first anyway.
    pub pause: Duration,
    /// Wakes the actor after this time.
    pub wake_after: Box<dyn Fn(Duration) + Send>,
}

/// A watch hub as apply sees it: never waited for.
pub type Hub = watch::Port;

pub struct ApplyActor {
    core: Core,
    wiring: Wiring,
    answers: Batch,
    defragment_waiters: Vec<tokio::sync::oneshot::Sender<()>>,
    compacting_since: Option<Instant>,
    /// No slice of clean-up before this.
    pause_until: Option<Instant>,
    clock: Laps,
}

/// When the entry before was done, so that none is charged with the time of those before it in its turn.
struct Laps(Instant);

impl Laps {
    /// The next entry begins: at the beginning of its turn, or when the one before ended.
    fn begin(&mut self, turn: Instant) {
        self.0 = self.0.max(turn);
    }

    fn end(&mut self, now: Instant) -> Duration {
        now.saturating_duration_since(std::mem::replace(&mut self.0, now))
    }
}

/// For the time of the last compaction alone.
#[allow(clippy::disallowed_methods)]
fn unix_secs() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl ApplyActor {
    pub fn new(core: Core, wiring: Wiring) -> Self {
        let answers = wiring.replies.batch();
        Self {
            core,
            wiring,
            answers,
            defragment_waiters: Vec::new(),
            compacting_since: None,
            pause_until: None,
            clock: Laps(Instant::now()),
        }
    }

    /// Takes on the state of a leader's snapshot. Control comes before data, so nothing is in hand.
    fn install(&mut self, install: Install) {
        self.wiring.metrics.installs_running.store(1, Ordering::Relaxed);
        let mut core = match (self.wiring.install)(install) {
            Ok(core) => core,
            // The record is in the log: only a restart can make it good.
            Err(e) => panic!("cannot take on the snapshot at {}: {e:#}", install.index),
        };
        core.follow(&self.core);
        self.compacting_since = None;
        (self.wiring.on_members)(core.members());
        for (reply, outcome) in std::mem::replace(&mut self.core, core).abandon() {
            self.answers.add(reply, outcome);
        }
        let view = Arc::new(self.core.view());
        self.wiring.view.publish(view.clone());
        self.wiring.applied.store(view.applied_index, Ordering::Release);
        self.answers.send();
        // The hubs see a jump: their watchers read what they missed from the new store (W-51).
        let published =
            watch::Published { view: view.kv.clone(), changes: Vec::new().into(), raft_term: view.applied_term };
        for hub in self.wiring.hubs.iter().filter(|h| h.is_active()) {
            hub.publish(published.clone());
        }
        self.wiring.metrics.installs_running.store(0, Ordering::Relaxed);
        self.wiring.raft.control(raft::Control::Installed(install.index));
    }

    fn commit(&mut self) {
        let began = Instant::now();
        let effects = match self.core.commit() {
            Ok(Some(effects)) => effects,
            Ok(None) => return,
            // A storage error is final: what was acknowledged is in the WAL, nothing more is acknowledged.
            Err(e) => panic!("cannot write the store: {e}"),
        };
        let counts = &self.wiring.metrics;
        counts.store_commit.record(began.elapsed());
        counts.store_did(&effects.tally);
        for notice in &effects.lease_notices {
            if let LeaseNotice::Granted { ttl, .. } = notice {
                counts.lease_ttls.record(Duration::from_secs(ttl.unsigned_abs()));
            }
            let counter = match notice {
                LeaseNotice::Granted { .. } => &counts.leases_granted,
                LeaseNotice::Gone { .. } => &counts.leases_gone,
            };
            counter.fetch_add(1, Ordering::Relaxed);
        }
        let view = Arc::new(self.core.view());
        let before = self.wiring.view.load_full();
        self.wiring.view.publish(view.clone());
        self.wiring.applied.store(view.applied_index, Ordering::Release);
        if !effects.lease_notices.is_empty() {
            // Behind the view: an expirer that begins to lead looks at the view first and hears of everything later.
            // Before the answer: whoever was granted a lease finds its timer set.
            (self.wiring.lease_notices)(effects.lease_notices);
        }
        for (reply, outcome) in effects.answers {
            self.answers.add(reply, outcome);
        }
        self.answers.send();
        if self.wiring.hubs.iter().any(watch::Port::is_active) {
            let published = watch::Published {
                view: view.kv.clone(),
                changes: effects.changes.into(),
                raft_term: view.applied_term,
            };
            for hub in self.wiring.hubs.iter().filter(|h| h.is_active()) {
                hub.publish(published.clone());
            }
        }
        if effects.wants_alarm {
            (self.wiring.ask_alarm)();
        }
        if !view.members.is_same(&before.members) {
            (self.wiring.on_members)(&view.members);
        }
        if let Some(done) = effects.conf_changed {
            self.wiring.raft.control(raft::Control::ConfChanged(done));
        }
    }
}

impl Actor for ApplyActor {
    type Message = Work;
    type Control = Control;

    fn on_message(&mut self, work: Work, turn: &Turn) {
        self.clock.begin(turn.now);
        for entry in work.entries {
            let (index, bytes) = (entry.index, entry.data.len());
            let applied = self.core.apply(entry);
            let took = self.clock.end(Instant::now());
            if let Some((kind, done)) = applied {
                self.wiring.metrics.applies.record(kind, done, took);
                if took > self.wiring.slow_apply && !self.wiring.slow_apply.is_zero() {
                    self.wiring.metrics.slow_applies.fetch_add(1, Ordering::Relaxed);
                    let expected = self.wiring.slow_apply;
                    tracing::warn!(?took, expected_duration = ?expected, request = ?kind, index, bytes, "apply request took too long");
                }
            }
        }
    }

    fn on_control(&mut self, message: Control, _: &Turn) -> Flow {
        match message {
            Control::Defragment(done) => {
                self.defragment_waiters.push(done);
                Flow::Continue
            }
            Control::Install(install) => {
                self.install(install);
                Flow::Continue
            }
            Control::Hashed(hash) => {
                self.core.hashed(hash);
                Flow::Continue
            }
            Control::Stop(done) => {
                self.commit();
                let _ = done.send(());
                Flow::Stop
            }
        }
    }

    fn on_turn_end(&mut self, turn: &Turn) {
        self.commit();
        // The rows as they stand before clean-up takes any.
        if let Some(job) = self.core.take_hash_job() {
            (self.wiring.hash)(job);
        }
        if self.core.is_compacting() {
            self.compacting_since.get_or_insert_with(Instant::now);
        }
        if self.pause_until.is_some_and(|until| turn.now >= until) {
            self.pause_until = None;
        }
        // One slice of clean-up per turn, after the entries are out, so that writes never wait for more than that.
        if self.core.is_cleaning() && self.pause_until.is_none() {
            let slice = Instant::now();
            self.core.clean_slice(self.wiring.clean_up.keys);
            self.commit();
            self.wiring.metrics.compaction_pauses.record_ms(slice.elapsed());
            let pause = self.wiring.clean_up.pause;
            if self.core.is_cleaning() && !pause.is_zero() {
                self.pause_until = Some(turn.now + pause);
                (self.wiring.clean_up.wake_after)(pause);
            }
        }
        if !self.core.is_compacting()
            && let Some(began) = self.compacting_since.take()
        {
            let (took, view) = (began.elapsed(), self.wiring.view.load());
            let metrics = &self.wiring.metrics;
            metrics.compactions.record_ms(took);
            metrics.compaction_last.store(unix_secs(), Ordering::Relaxed);
            let compact_revision = view.kv.compact_revision;
            let hash = view.kv.hashes.at(compact_revision).map(|found| found.hash);
            tracing::info!(compact_revision, hash, ?took, "finished scheduled compaction");
        }
        if !self.core.is_cleaning() {
            for waiter in self.defragment_waiters.drain(..) {
                let _ = waiter.send(());
            }
        }
    }

    fn has_work(&self) -> bool {
        self.core.is_cleaning() && self.pause_until.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_charged_with_its_own_time_alone() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let mut laps = Laps(start);
        let turn = start + ms(10);
        // Two messages of one turn, the first with two entries.
        laps.begin(turn);
        assert_eq!(laps.end(turn + ms(90)), ms(90));
        assert_eq!(laps.end(turn + ms(91)), ms(1));
        laps.begin(turn);
        assert_eq!(laps.end(turn + ms(93)), ms(2));
        // The commit between turns is nobody's.
        let turn = turn + ms(500);
        laps.begin(turn);
        assert_eq!(laps.end(turn + ms(3)), ms(3));
    }
}
