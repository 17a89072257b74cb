//! The WAL writer actor: everything queued becomes one write and one sync.
//!
//! Owns the open segment. Its inbox is bounded in bytes; raft looks for room before it takes a Ready, so batches grow by
//! themselves while a sync is under way. A failed write or sync ends the process: nothing is acknowledged after it.

use std::sync::Arc;

use super::{Appended, Error, Wal};
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
    /// Sync what is buffered and end. Appends still queued are left: raft has ended before and was not told that they
    /// are durable, so nobody was told what they hold. The log then ends as it does when the power goes.
    Stop(std::sync::mpsc::SyncSender<()>),
}

/// Told of each write, for metrics.
pub type OnWrite = Arc<dyn Fn(&Appended) + Send + Sync>;

/// What is written and synced together.
#[derive(Default)]
struct Batch {
    entries: Vec<raftpb::Entry>,
    hard_state: Option<raftpb::HardState>,
    sync: bool,
    /// Newest Ready number.
    number: Option<u64>,
}

impl Batch {
    fn add(&mut self, append: Append) {
        if let Some(first) = append.entries.first() {
            // A new leader has replaced what an older one sent and nobody has written yet.
            let kept = self.entries.partition_point(|entry| entry.index() < first.index());
            self.entries.truncate(kept);
        }
        self.entries.extend(append.entries);
        self.hard_state = append.hard_state.or(self.hard_state.take());
        self.sync |= append.sync;
        self.number = Some(append.number);
    }
}

/// The actor's core: what raft appends, in as few writes as its order allows.
pub struct Writer {
    wal: Wal,
    keep_files: usize,
    batch: Batch,
    on_write: OnWrite,
}

impl Writer {
    /// At most `keep_files` segments stay that no start needs; 0: all.
    pub fn new(wal: Wal, keep_files: usize, on_write: OnWrite) -> Self {
        Self { wal, keep_files, batch: Batch::default(), on_write }
    }

    /// Queues an append. What must be in the log before it is written now: answers the Ready number up to which all is
    /// durable then.
    pub fn add(&mut self, append: Append) -> Result<Option<u64>, Error> {
        let mut durable = None;
        if let Some(snapshot) = &append.snapshot {
            // Behind everything older, in a write of its own: the entries that follow go on from it.
            durable = self.write()?;
            let hard_state = append.hard_state.as_ref().expect("a snapshot comes with the hard state that commits it");
            (self.on_write)(&self.wal.install_snapshot(snapshot, hard_state)?);
        }
        self.batch.add(append);
        Ok(durable)
    }

    /// Writes what is queued and syncs it: answers the Ready number up to which all is durable, if something was.
    pub fn write(&mut self) -> Result<Option<u64>, Error> {
        let batch = std::mem::take(&mut self.batch);
        if batch.number.is_some() {
            (self.on_write)(&self.wal.append(&batch.entries, batch.hard_state.as_ref(), batch.sync)?);
        }
        Ok(batch.number)
    }

    /// Writes a record from which raft can start, and drops segments below it.
    pub fn snapshot(&mut self, record: &walpb::Snapshot) -> Result<(), Error> {
        self.wal.append_snapshot(record)?;
        // Files that could not be removed are tried again at the next checkpoint.
        if let Err(e) = self.wal.purge(record.index(), self.keep_files) {
            tracing::warn!("cannot remove old log segments: {e}");
        }
        Ok(())
    }

    /// Writes and syncs all.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.write()?;
        self.wal.sync_all().map(drop)
    }
}

pub struct WalActor {
    writer: Writer,
    raft: RaftSender,
}

impl WalActor {
    pub fn new(writer: Writer, raft: RaftSender) -> Self {
        Self { writer, raft }
    }

    fn failed(&self, error: Error) -> ! {
        tracing::error!("cannot write the log: {error}; nothing more is acknowledged, the process ends");
        self.raft.control(raft::Control::LogFailed);
        std::process::exit(1)
    }

    fn tell(&self, durable: Result<Option<u64>, Error>) {
        match durable {
            Ok(None) => {}
            Ok(Some(number)) => {
                self.raft.control(raft::Control::Persisted(number));
            }
            Err(e) => self.failed(e),
        }
    }
}

impl Actor for WalActor {
    type Message = Append;
    type Control = Control;

    fn on_message(&mut self, append: Append, _: &Turn) {
        let durable = self.writer.add(append);
        self.tell(durable);
    }

    fn on_control(&mut self, message: Control, _: &Turn) -> Flow {
        match message {
            Control::Snapshot(record) => {
                if let Err(e) = self.writer.snapshot(&record) {
                    self.failed(e);
                }
                self.raft.control(raft::Control::Compact(record.index()));
                Flow::Continue
            }
            Control::Stop(done) => {
                if let Err(e) = self.writer.finish() {
                    self.failed(e);
                }
                let _ = done.send(());
                Flow::Stop
            }
        }
    }

    fn on_turn_end(&mut self, _: &Turn) {
        let durable = self.writer.write();
        self.tell(durable);
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::Ordering, sync::mpsc::sync_channel, time::Duration};

    use super::*;
    use crate::{
        actor::{Inbox, shell},
        wal::{Options, sim::SimDisk, tests as log_tests},
    };

    fn append(number: u64, term: u64, indexes: std::ops::RangeInclusive<u64>) -> Append {
        let entry = |index| raftpb::Entry { term: Some(term), index: Some(index), ..Default::default() };
        Append { number, snapshot: None, entries: indexes.map(entry).collect(), hard_state: None, sync: true }
    }

    fn batch(appends: Vec<Append>) -> Vec<(u64, u64)> {
        let mut batch = Batch::default();
        appends.into_iter().for_each(|append| batch.add(append));
        batch.entries.iter().map(|entry| (entry.index(), entry.term())).collect()
    }

    #[test]
    fn tail_that_a_new_leader_replaced_before_it_was_written_is_left_out() {
        // A member that stood still gets an old leader's entries and a new one's in one go.
        let appends = vec![append(1, 2, 5..=8), append(2, 3, 7..=7), append(3, 3, 8..=9)];
        assert_eq!(batch(appends), [(5, 2), (6, 2), (7, 3), (8, 3), (9, 3)]);
        assert_eq!(batch(vec![append(1, 2, 5..=8), append(2, 3, 4..=5)]), [(4, 3), (5, 3)]);
    }

    #[test]
    fn stop_loses_no_append_that_raft_was_told_to_be_durable() {
        const PATIENCE: Duration = Duration::from_secs(10);
        for written in [0, 1, 3] {
            let disk = SimDisk::default();
            let options = Options { disk: Arc::new(disk.clone()), ..Options::new(log_tests::dir()) };
            let wal = Wal::create(options.clone(), &log_tests::metadata(), &[], None).unwrap();
            let (raft, told) = Inbox::new("raft", 1, 1);
            let (sender, inbox) = Inbox::new("wal", 64, 1 << 20);
            let system = actix_rt::System::new();
            let arbiter = system.block_on(async { actix_rt::Arbiter::new() });
            shell::spawn(&arbiter.handle(), inbox, false, move || {
                WalActor::new(Writer::new(wal, 1, Arc::new(|_| ())), raft)
            });

            let mut durable = 0;
            let mut hear = || {
                while let Some(control) = told.try_recv_control() {
                    let raft::Control::Persisted(number) = control else { panic!("{control:?}") };
                    durable = number;
                }
                durable
            };
            for number in 1..=written {
                sender.try_send(append(number, 1, number..=number)).unwrap();
            }
            let deadline = std::time::Instant::now() + PATIENCE;
            while hear() < written {
                assert!(std::time::Instant::now() < deadline, "the log is not written");
                std::thread::yield_now();
            }
            // These are still queued when the stop comes.
            sender.stats.controls.paused.store(true, Ordering::Relaxed);
            for number in written + 1..=written + 3 {
                sender.try_send(append(number, 1, number..=number)).unwrap();
            }
            let (done, stopped) = sync_channel(1);
            sender.control(Control::Stop(done));
            stopped.recv_timeout(PATIENCE).unwrap();
            arbiter.stop();
            arbiter.join().unwrap();

            disk.crash(written);
            let (_, recovered) = Wal::open(options).unwrap();
            let last = recovered.entries.last().map_or(0, raftpb::Entry::index);
            assert!(hear() >= written && last >= hear(), "told {}, written {last}", hear());
        }
    }
}
