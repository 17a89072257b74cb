//! The turns of a member's actors and of its disk, and what follows from each: what the threads of a server do.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{atomic::Ordering, mpsc::sync_channel},
};

use actd::{actor::shell::Flow, apply, mvcc::view::Sizes, raft, snapshot, wal};

use tokio::sync::oneshot::{self, error::TryRecvError};

use super::{
    member::{Job, Process, Seen, rows_size},
    plan::{MS, SECOND, TICK},
    world::{Event, World, hashed},
};

/// What a store that fails says.
const STORE_FAILS: [&str; 2] = ["injected failure", "an earlier write failed"];

impl World {
    pub fn tick(&mut self, m: usize, epoch: u64) {
        let process = self.process(m);
        // As the server's clock: a tick that raft has not looked at yet is not followed by another.
        if !process.status.tick_pending.swap(true, Ordering::AcqRel) {
            process.raft_tx.control(raft::Control::Tick);
        }
        // Clocks differ.
        let skew = self.members[m].skew;
        self.after(TICK * skew / 100, Event::Tick(m, epoch));
    }

    /// What follows at once from what has just happened to a member: effects on their way, who may go on, whose turn it is.
    pub fn pump(&mut self, m: usize) {
        if !self.is_up(m) {
            return;
        }
        self.seen(m);
        let process = self.process(m);
        process.deliveries.deliver_now();
        let messages: Vec<_> = process.outgoing.try_iter().flatten().collect();
        let asks: Vec<_> = process.lease_asks.try_iter().collect();
        let jobs: Vec<_> = process.hash_jobs.try_iter().collect();
        let wakes: Vec<u64> = process.apply_wakes.try_iter().collect();
        let (has_published, is_removed) = (process.ends.has_published(), process.is_removed.load(Ordering::Relaxed));
        for message in messages {
            self.send(m, message);
        }
        for ask in asks {
            self.lease_ask(m, ask);
        }
        let epoch = self.members[m].epoch;
        for pause in wakes {
            self.after(pause, Event::ApplyTurn(m, epoch));
        }
        for job in jobs {
            let hash = job.run().expect("memory is read");
            let id = self.members[m].id;
            self.truth.compaction(id, &hash);
            let took = self.draw((MS, 300 * MS));
            self.after(took, Event::Hashed(m, epoch, Some(hash)));
        }
        if has_published {
            self.wake_hub(m);
        }
        if is_removed {
            self.process(m).is_removed.store(false, Ordering::Relaxed);
            self.after(SECOND, Event::Removed(m, epoch));
        }
        let is_open = |answer: &mut oneshot::Receiver<()>| answer.try_recv() == Err(TryRecvError::Empty);
        self.process(m).defragments.retain_mut(is_open);
        self.look_at_snapshot(m);
        self.follow_leadership(m);
        self.collect(m);
        self.disk_begin(m);
        self.schedule(m);
    }

    /// Puts the turns on their way that somebody waits for.
    fn schedule(&mut self, m: usize) {
        let epoch = self.members[m].epoch;
        if self.process(m).raft.wants_turn() {
            let delay = self.draw(self.plan.config.turn);
            self.after(delay, Event::RaftTurn(m, epoch));
        }
        if self.process(m).apply.wants_turn() {
            let (each, until) = self.members[m].slow_apply;
            let slow = if until > self.now { each } else { 0 };
            if slow > 0 {
                self.mark("a batch waits for a slow applier");
            }
            let took = self.draw(self.plan.config.apply) + slow;
            self.after(took, Event::ApplyTurn(m, epoch));
        }
        if self.process(m).leases.wants_turn() {
            let delay = self.draw(self.plan.config.turn);
            self.after(delay, Event::LeaseTurn(m, epoch));
        }
        if self.process(m).checkpointer.wants_turn() {
            let took = self.draw(self.plan.config.disk);
            self.after(took, Event::CheckpointTurn(m, epoch));
        }
    }

    pub fn raft_turn(&mut self, m: usize) {
        let instant = self.instant();
        let may_refuse = self.members[m].may_refuse;
        let process = self.process(m);
        let done = catch_unwind(AssertUnwindSafe(|| process.raft.turn(instant)));
        if let Err(panic) = done {
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            if !may_refuse || !text.contains("was its end lost") {
                resume_unwind(panic);
            }
            // Its operator sees why it ended, and replaces it.
            self.mark("a log that lost its end is noticed by what the leader says");
            self.crash(m, false);
            self.members[m].lost = Some(text);
            return self.after(100 * MS, Event::Replace(m));
        }
        self.leads_as_told(m);
        self.check_conf_state(m);
    }

    fn leads_as_told(&mut self, m: usize) {
        let now = self.process(m).reading();
        let told = &mut self.members[m].told_to_lead;
        if now.is_leader && told.take_if(|term| now.term == *term + 1).is_some() {
            let is_asked = self.handed_to == Some(m);
            self.mark(if is_asked { "a transfer moves leadership" } else { "who stops has handed over" });
        }
    }

    /// Raft has in force what the store says, as long as nothing of it is on its way.
    pub fn check_conf_state(&mut self, m: usize) {
        let process = self.process(m);
        let is_settled =
            !process.apply.stepped.is_due() && !process.raft.stepped.is_due() && process.receiving.is_none();
        if is_settled {
            let (force, stored) = (process.raft_conf_state(), process.members().conf_state());
            let sorted = |ids: &[u64]| {
                let mut ids = ids.to_vec();
                ids.sort_unstable();
                ids
            };
            assert_eq!(
                (sorted(&force.voters), sorted(&force.learners)),
                (sorted(&stored.voters), sorted(&stored.learners)),
                "m{m}: raft has other members in force than its store says"
            );
        }
    }

    /// Sizes are kept up to date with each row that comes and goes. Once nothing waits for clean-up they are those of the rows.
    pub fn check_sizes(&mut self, m: usize) {
        let process = self.process(m);
        let sum = rows_size(&*process.in_use);
        let sizes = process.view.load().kv.sizes;
        assert_eq!(sizes, Sizes { total: sum, in_use: sum }, "m{m} counts other sizes than its rows have");
    }

    pub fn lease_turn(&mut self, m: usize) {
        let instant = self.instant();
        self.process(m).leases.turn(instant);
    }

    pub fn disk_begin(&mut self, m: usize) {
        let now = self.now;
        let process = self.process(m);
        if !process.in_hand.is_empty() {
            return;
        }
        while let Some(control) = process.wal.try_recv_control() {
            match control {
                wal::Control::Snapshot(record) => process.in_hand.push(Job::Snapshot(record)),
                wal::Control::Stop(_) => {}
            }
        }
        while let Some(append) = process.wal.try_recv() {
            process.in_hand.push(Job::Append(append));
        }
        if process.in_hand.is_empty() {
            return;
        }
        let checkpoints = process.in_hand.iter().filter(|job| matches!(job, Job::Snapshot(_))).count();
        let (each, until) = self.members[m].slow;
        let slow = if until > now { each } else { 0 };
        if slow > 0 {
            self.mark("a write waits for a slow disk");
        }
        let took = self.draw(self.plan.config.disk) + slow;
        let epoch = self.members[m].epoch;
        self.after(took, Event::DiskDone(m, epoch));
        for _ in 0..checkpoints {
            self.mark("checkpoint");
        }
    }

    pub fn disk_done(&mut self, m: usize) {
        let process = self.process(m);
        let jobs = std::mem::take(&mut process.in_hand);
        match write(&mut process.writer, jobs) {
            Ok(done) => {
                for number in done.persisted {
                    process.raft_tx.control(raft::Control::Persisted(number));
                }
                for index in done.compacted {
                    process.raft_tx.control(raft::Control::Compact(index));
                }
            }
            Err(e) => {
                // Nothing more is acknowledged, the process ends.
                self.say(|| format!("m{m} ends: {e}"));
                self.mark("the log's disk failed");
                let text = e.to_string();
                let kinds = [
                    ("injected failure: Write", "a write of the log fails"),
                    ("injected failure: Sync", "a sync of the log fails"),
                    ("no storage space", "the log's disk is full"),
                ];
                for (_, what) in kinds.iter().filter(|(cause, _)| text.contains(cause)) {
                    self.mark(what);
                }
                self.end(m);
            }
        }
    }

    /// The process ended by itself, and somebody starts it again.
    fn end(&mut self, m: usize) {
        self.crash(m, false);
        let down = self.draw((100 * MS, SECOND));
        self.restart_after(m, down);
    }

    /// A turn of an actor that ends the process if its store fails.
    fn vital(&mut self, m: usize, turn: impl FnOnce(&mut Process)) {
        let is_broken = self.members[m].is_store_broken;
        let process = self.process(m);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| turn(process))) {
            let text = panic.downcast_ref::<String>().map_or("", String::as_str);
            if !is_broken || !STORE_FAILS.iter().any(|reason| text.contains(reason)) {
                resume_unwind(panic);
            }
            self.say(|| format!("m{m} ends: its store fails"));
            self.mark("the store's disk failed");
            for (cause, what) in [("commit: ", "a commit of the store fails"), ("sync: ", "a sync of the store fails")]
            {
                if text.contains(cause) {
                    self.mark(what);
                }
            }
            self.end(m);
        }
    }

    pub fn apply_turn(&mut self, m: usize) {
        let instant = self.instant();
        let before = self.process(m).in_use.load();
        self.vital(m, |process| _ = process.apply.turn(instant));
        if self.is_up(m) && self.members[m].defragments_later && self.process(m).is_cleaning() {
            self.members[m].defragments_later = false;
            self.defragment(m);
        }
        if self.is_up(m) && !std::sync::Arc::ptr_eq(&before, &self.process(m).in_use.load()) {
            self.say(|| format!("m{m} has installed a snapshot"));
            self.mark("snapshot installed");
            // The store that was to fail is gone.
            self.members[m].is_store_broken = false;
        }
    }

    /// What it has applied, told before anybody hears of it.
    fn seen(&mut self, m: usize) {
        let id = self.members[m].id;
        let seen = std::mem::take(&mut *self.process(m).seen.borrow_mut());
        for one in seen {
            match one {
                Seen::Entry { index, term, data, conf_change } => {
                    self.note(&[index, term, hashed(&data)]);
                    self.truth.applied(id, index, term, &data, conf_change);
                }
                Seen::State { index, hash, members } => {
                    self.note(&[index, hash]);
                    self.truth.state(id, index, hash);
                    self.truth.members(id, index, &members);
                }
            }
        }
        self.revoked();
    }

    pub fn checkpoint_turn(&mut self, m: usize) {
        let instant = self.instant();
        self.vital(m, |process| _ = process.checkpointer.turn(instant));
    }

    pub fn sync(&mut self, m: usize, epoch: u64) {
        // A disk that is slow is not asked twice.
        let _ = self.process(m).checkpoint_tx.try_send(snapshot::Tick);
        self.after(self.plan.config.sync_interval, Event::Sync(m, epoch));
    }

    /// The process ends in order: in the order of the data flow, as the server does it.
    pub fn stop(&mut self, m: usize) {
        let instant = self.instant();
        let process = self.process(m);
        let (done, stopped) = sync_channel(1);
        process.raft_tx.control(raft::Control::Stop(done));
        assert_eq!(process.raft.turn(instant), Flow::Stop);
        stopped.try_recv().expect("raft has stopped");
        // What is in the log's lane stays there: nobody was told that it is durable.
        let jobs = std::mem::take(&mut process.in_hand);
        let _ = write(&mut process.writer, jobs).and_then(|_| process.writer.finish());
        let (done, _stopped) = sync_channel(1);
        process.apply_tx.control(apply::Control::Stop(done));
        self.vital(m, |process| _ = process.apply.turn(instant));
        if self.is_up(m) {
            self.pump(m);
            self.mark("stopped in order");
            self.end(m);
        }
    }
}

/// What the log's writer did.
#[derive(Default)]
pub struct Written {
    persisted: Vec<u64>,
    compacted: Vec<u64>,
}

/// As the log's actor: control first, then all appends as few writes.
pub fn write(writer: &mut actd::wal::Writer, jobs: Vec<Job>) -> Result<Written, actd::wal::Error> {
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
